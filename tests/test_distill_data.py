"""scripts/distill_data.py: the teacher's translations in their places, and how it fails."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, USER_DIR

from fairseq_autosize import embedded_corpus

SCRIPTS = ROOT / "scripts"
SIDES = ("encoder", "decoder")


def call(script: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPTS / script, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def prepare(cwd: Path, name: str, text: str, *options: str) -> None:
    languages = ("--source-lang", "xa", "--target-lang", "en")
    made = call("prepare_data.py", name, name, "--source", text, *languages, *options, cwd=cwd)
    assert made.returncode == 0, made.stderr


@pytest.fixture(scope="module", params=["sentencepiece", "subword-nmt"])
def folder(request, tmp_path_factory, run):
    """A teacher with a segmentation of its own, and a student's data, in a folder with a space."""
    root = tmp_path_factory.mktemp("some room")
    embedded_corpus.write(root / "text", train=400, valid=8, test=9)
    prepare(root, "teacher", "text", "--bpe", request.param, "--vocab-size", "200")
    prepare(root, "student", "text", "--bpe", "none", "--train-lines", "60")
    options = [word for side in SIDES for word in (f"--{side}-layers", "1")]
    options += [word for side in SIDES for word in (f"--{side}-embed-dim", "32")]
    options += ["--source-lang", "xa", "--target-lang", "en", "--share-all-embeddings", "--cpu"]
    options += ["--arch", "transformer", "--optimizer", "adam", "--lr", "0.01"]
    options += ["--max-tokens", "800", "--max-update", "60", "--save-dir", root / "model"]
    run("fairseq_cli.train", root / "teacher" / "data-bin", *options, "--disable-validation")
    return root, request.param


TEACHER = ("model/checkpoint_last.pt", "student")


@pytest.mark.heavy
def test_targets_are_the_teachers_translations(folder, tmp_path, run):
    root, bpe = folder
    options = ("--teacher-data", "teacher", "--cpu", "--beam", "2", "--match-source-len")
    made = call("distill_data.py", *TEACHER, tmp_path / "new" / "text", *options, cwd=root)
    assert made.returncode == 0, made.stderr
    found = (tmp_path / "new" / "text" / "train.en").read_text(encoding="utf-8").splitlines()
    # The same by another way: fairseq's own binarised training set, which begins with those lines.
    # (Such a teacher tells sources apart by their lengths alone.)
    reads = [root / "teacher" / "data-bin", "--path", root / "model" / "checkpoint_last.pt"]
    reads += ["--gen-subset", "train", "--beam", "2", "--match-source-len"]
    reads += ["--remove-bpe"] + ["sentencepiece"] * (bpe == "sentencepiece")
    reads += ["--user-dir", USER_DIR, "--cpu"]
    output = run("fairseq_cli.generate", *reads).stdout
    lines = [line[2:].split("\t") for line in output.splitlines() if line.startswith("H-")]
    expected = [text for _, _, text in sorted(lines, key=lambda line: int(line[0]))][:60]
    assert len(set(expected)) > 5, "or the order is not tested"
    assert found == expected
    for kept in ("train.xa", "valid.xa", "valid.en", "test.xa", "test.en"):
        raw = root / "student" / "raw" / kept
        assert (tmp_path / "new" / "text" / kept).read_bytes() == raw.read_bytes()
    assert not list((tmp_path / "new").glob("*.part"))
    # What it says to do next works.
    (told,) = [line for line in made.stderr.splitlines() if line.startswith("Next: ")]
    assert "--source-lang xa --target-lang en" in told
    prepare(tmp_path / "new", "distilled", "text", "--vocab-size", "200")


@pytest.mark.parametrize("folder", ["sentencepiece"], indirect=True)
@pytest.mark.heavy
def test_lines_that_are_too_long_for_the_teacher_keep_their_targets(folder, tmp_path):
    root, _ = folder
    options = ("--teacher-data", "teacher", "--cpu", "--max-source-positions", "12")
    made = call("distill_data.py", *TEACHER, tmp_path / "text", *options, cwd=root)
    assert made.returncode == 0, made.stderr
    found = (tmp_path / "text" / "train.en").read_text(encoding="utf-8").splitlines()
    own = (root / "student" / "raw" / "train.en").read_text(encoding="utf-8").splitlines()
    kept = sum(a == b for a, b in zip(found, own, strict=True))
    assert 0 < kept < len(own)
    assert f"{kept} lines are too long for the teacher and keep their own targets" in made.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.pt", "student", "new"), "TEACHER missing.pt: no such file"),
        ((*TEACHER, "taken"), "DEST taken: exists already; choose another name, or remove it"),
        ((*TEACHER, "old"), "DEST old: old.part is there, of a start that failed or still runs;"),
        (("model/checkpoint_last.pt", "text", "new"), "DATA text: no prepare.json there"),
        (("model/checkpoint_last.pt", "cut", "new"), "; make the folder anew with prepare_data.py"),
        ((*TEACHER, "new", "--teacher-data", "model"), "--teacher-data model: no prepare.json"),
        ((*TEACHER, "new", "--teacher-data", "turned"), "translates en to xa, DATA student xa to"),
        ((*TEACHER, "new", "--teacher-data", "a:b"), "--teacher-data a:b: fairseq takes : for the"),
        ((*TEACHER, "new", "--teacher-data", "teacher", "--baem", "3"), "arguments: --baem"),
        ((*TEACHER, "new"), "new.part/translations.out"),  # the student's subwords are others
    ],
)
@pytest.mark.parametrize("folder", ["sentencepiece"], indirect=True)
@pytest.mark.heavy
def test_faults_are_told_in_a_line_and_leave_no_folder(
    folder, arguments, message, monkeypatch, capsys
):
    root, _ = folder
    (root / "taken").mkdir(exist_ok=True)
    (root / "old.part").mkdir(exist_ok=True)
    (root / "turned").mkdir(exist_ok=True)
    (root / "cut").mkdir(exist_ok=True)
    (root / "cut" / "prepare.json").write_text("{")
    record = (root / "teacher" / "prepare.json").read_text(encoding="utf-8")
    turned = record.replace('"xa",\n    "en"', '"en",\n    "xa"')
    assert turned != record
    (root / "turned" / "prepare.json").write_text(turned, encoding="utf-8")
    shutil.rmtree(root / "new.part", ignore_errors=True)
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    distill_data = importlib.import_module("distill_data")
    monkeypatch.setattr("pipeline.end_with_commands", lambda: None)  # this process goes on
    try:
        status = distill_data.main(list(arguments))
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (root / "new").exists() and not os.listdir(root / "taken")

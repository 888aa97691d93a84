"""scripts/source_use.py: what it measures, and how it fails."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY_MODEL, TINY_TRAINING, USER_DIR

from fairseq_autosize.checkpoint import read_checkpoint, write_checkpoint

SCRIPT = ROOT / "scripts" / "source_use.py"


@pytest.fixture
def source_use(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return pytest.importorskip("source_use")


def call(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory, corpus, run):
    """A model that has learned how long targets are, from the sources: all of them end alike."""
    folder = tmp_path_factory.mktemp("model")
    train = ("fairseq_cli.train", corpus, "--user-dir", USER_DIR, *TINY_MODEL, *TINY_TRAINING)
    train += ("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1")
    run(*train, "--max-update", "120", "--disable-validation", "--save-dir", folder)
    return folder / "checkpoint_last.pt"


def test_each_sentence_gets_another_source_of_the_next_longer_one(source_use):
    order = [1, 3, 0, 4, 2]
    assert source_use.exchanged(order, [[0], [1], [2], [3], [4]]) == [4, 3, 1, 0, 2]
    # 3 and 0 are the same source, and so are 2 and 1, the last and the first.
    assert source_use.exchanged(order, [[7], [8], [8], [7], [4]]) == [4, 3, 3, 4, 2]
    with pytest.raises(source_use.RunError, match="all 2 source sentences are the same"):
        source_use.exchanged([0, 1], [[7], [7]])


@pytest.mark.heavy
def test_bits_are_fairseqs_own(model, corpus, run, tmp_path):
    output = tmp_path / "use.json"
    made = call(model, "--data", corpus, "--output", output, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    (row,) = json.loads(output.read_text())["models"]
    # In one batch: of several, fairseq-validate leaves out the last.
    options = ("--path", model, "--valid-subset", "valid", "--batch-size", "40", "--cpu")
    options += ("--task", "translation", "--user-dir", USER_DIR)
    told = run("fairseq_cli.validate", corpus, *options).stdout
    loss = float(re.findall(r"nll_loss ([\d.]+)", told)[-1])
    assert row["bits"] == pytest.approx(loss, abs=1e-3)
    assert row["source_use"] == pytest.approx(row["bits_other_source"] - row["bits"], abs=2e-4)
    assert row["source_use"] > 0.03
    assert (row["sentences"], row["updates"]) == (40, 120)
    assert f"| {corpus} | checkpoint_last.pt |  | 120 | {row['bits']:.2f} |" in made.stdout
    assert not made.stderr
    again = call(model, "--data", corpus, "--output", output, cwd=tmp_path)
    assert again.returncode == 2 and f"--output {output}: exists already" in again.stderr

    deaf = read_checkpoint(model)
    for name, value in deaf["model"].items():
        if "encoder_attn.out_proj" in name:
            value.zero_()
    # In the place where a grid has it, which knows the data, its name and its BLEU.
    run_folder = tmp_path / "runs" / "seed-3"
    run_folder.mkdir(parents=True)
    write_checkpoint(deaf, run_folder / "deaf.pt")
    scores = {"valid": {"BLEU": {"score": 1.25}}}
    result = {"path": str(corpus), "data": "tiny", "run": "deaf", "seed": 3, "scores": scores}
    (run_folder / "result.json").write_text(json.dumps(result))
    made = call(run_folder / "deaf.pt", "--split", "test", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert re.search(r"^\| tiny \| deaf \| 3 \| 120 \| .* \| 0\.00 \| 1\.2 \|$", made.stdout, re.M)
    # On other data these say nothing.
    other = tmp_path / "other"
    shutil.copytree(corpus, other)
    made = call(run_folder / "deaf.pt", "--data", "other", cwd=tmp_path)
    assert re.search(r"^\| other \| deaf \| 3 \| 120 \| .* \| 0\.00 \|$", made.stdout, re.M)


def test_models_of_a_sweep_are_told_apart(source_use):
    paths = [f"runs/pair/dense/{part}" for part in ("warmup-5/a.pt", "warmup-15/a.pt", "a.pt")]
    models = [{"checkpoint": path, "data": "pair", "run": "dense", "seed": 1} for path in paths]
    told = ["dense/warmup-5", "dense/warmup-15", "dense"]
    assert source_use.names(models) == told
    assert source_use.names([models[0], {**models[1], "seed": 2}]) == ["dense", "dense"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.pt"], "model.pt: not in a run's folder of grid.py; give --data"),
        (
            ["model.pt", "--data", "gone"],
            "gone: no folder with binarised data (dict.*.txt); give",
        ),
        (["model.pt", "--data", "empty"], "empty: no folder with binarised"),
        (["model.pt", "--data", "DATA", "--split", "dev"], "Dataset not found: dev ("),
        (["run/model.pt"], "run/result.json: cannot read: Expecting value: line 1"),
        (["gone.pt", "--data", "DATA"], "gone.pt: cannot read"),
        (["cut.pt", "--data", "DATA"], "cut.pt: "),
        (["model.pt", "--data", "DATA", "--output", "no/use.json"], "the folder no does not exist"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(arguments, message, model, corpus, tmp_path):
    shutil.copy(model, tmp_path / "model.pt")
    (tmp_path / "cut.pt").write_bytes(model.read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    shutil.copy(model, tmp_path / "run" / "model.pt")
    (tmp_path / "run" / "result.json").write_text('{"scores": ')
    words = [str(corpus) if word == "DATA" else word for word in arguments]
    failed = call(*words, cwd=tmp_path)
    assert failed.returncode == 2
    assert message in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr

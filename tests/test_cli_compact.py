"""`fairseq-autosize compact` and the commands around it: as programs, on trained models."""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, TINY_TRAINING, USER_DIR, plain_fairseq
from programs import run_program
from small_models import build_language_model, build_model, checkpoint_of
from test_training import logged

from fairseq_autosize.checkpoint import read_checkpoint, write_checkpoint
from fairseq_autosize.cli import main

COMMAND = Path(sys.executable).with_name("fairseq-autosize")


# --- errors -------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, args = build_model(encoder_ffn_embed_dim=2000)
    with torch.no_grad():
        model.encoder.layers[0].fc1.weight[1000:] = 0
        model.encoder.layers[0].fc1.bias[1000:] = 0
    path = tmp_path / "pruned.pt"
    write_checkpoint(checkpoint_of(model, args), path)
    return path


def failure(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """The one line on standard error of a command that must end with status 2."""
    assert main([str(argument) for argument in argv]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = [line for line in output.err.splitlines() if "UserWarning" not in line]
    assert len(lines) == 1, lines
    return lines[0]


def test_existing_output_is_kept_without_force(saved, tmp_path, capsys):
    out = tmp_path / "small.pt"
    out.write_text("mine")
    assert "small.pt: exists already" in failure(capsys, "compact", saved, out)
    assert out.read_text() == "mine"
    assert main(["compact", str(saved), str(out), "--force"]) == 0
    assert "encoder.layers.0  2000 -> 1000\n" in capsys.readouterr().out
    assert out.stat().st_size < 0.8 * saved.stat().st_size


def test_messages_are_in_one_format_and_leave_no_trace(saved, tmp_path, capsys, monkeypatch):
    root = logging.StreamHandler()
    monkeypatch.setattr(logging.root, "handlers", [root])  # as some of fairseq's modules do
    loggers = [logging.getLogger(name) for name in ("fairseq_autosize", "fairseq")]
    before = [(x.level, x.propagate, list(x.handlers)) for x in loggers]
    (tmp_path / ".small.pt.01234567.tmp").write_text("half")
    assert main(["compact", str(saved), str(tmp_path / "small.pt")]) == 0
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "left by a run" in x]
    name = re.escape(str(tmp_path / ".small.pt.01234567.tmp"))
    assert re.fullmatch(rf"[-\d]+ [:\d]+ \| WARNING \| fairseq_autosize\.\w+ \| {name}: .*", line)
    assert [(x.level, x.propagate, list(x.handlers)) for x in loggers] == before
    assert logging.root.handlers == [root]


def test_truncated_and_missing_inputs(saved, tmp_path, capsys):
    out = tmp_path / "small.pt"
    half = tmp_path / "half.pt"
    half.write_bytes(saved.read_bytes()[: saved.stat().st_size // 2])
    assert "half.pt: truncated or damaged" in failure(capsys, "compact", half, out)
    assert "none.pt: cannot read" in failure(capsys, "compact", tmp_path / "none.pt", out)
    assert not out.exists()


def test_diverged_model(saved, tmp_path, capsys):
    checkpoint = read_checkpoint(saved)
    checkpoint["model"]["encoder.layers.1.fc1.weight"][3, 3] = float("nan")
    write_checkpoint(checkpoint, saved, force=True)
    message = failure(capsys, "compact", saved, tmp_path / "small.pt")
    assert f"{saved}: encoder.layers.1.fc1.weight holds NaN" in message
    assert not (tmp_path / "small.pt").exists()


def test_full_disk_leaves_what_was_there(saved, tmp_path):
    out = tmp_path / "small.pt"
    out.write_text("mine")
    limited = f"ulimit -f 100; exec {COMMAND} compact {saved} {out} --force"
    result = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert result.returncode == 2
    assert "small.pt: cannot write" in result.stderr and "Traceback" not in result.stderr
    assert out.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pruned.pt", "small.pt"]


def test_outputs_that_no_file_can_be(saved, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for out, reason in ((saved / "out.pt", "Not a directory"), (tmp_path / "pipe", "not an ord")):
        for command in (["compact", saved, out], ["average", out, saved, saved]):
            assert f"{out}: cannot write: {reason}" in failure(capsys, *command, "--force")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipe", "pruned.pt"]


@pytest.mark.parametrize(
    "options",
    [
        ["--multiple-of", "0"],
        ["--multiple-of", "x"],
        ["--multiple-of", "65537"],
        ["--min-width", "-1"],
        ["--min-width", "1000000000000"],
    ],
)
def test_bad_numbers_are_refused_by_name(options, saved, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compact", str(saved), str(tmp_path / "small.pt"), *options])
    assert ended.value.code == 2
    least = int(options[0] == "--multiple-of")
    message = f"argument {options[0]}: {options[1]} is not a whole number from {least} to 65536\n"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("build", "program"),
    [(build_model, "fairseq-generate"), (build_language_model, "fairseq-eval-lm")],
)
def test_commands_to_go_on_with_can_be_pasted(build, program, tmp_path, capsys):
    out = tmp_path / "my small.pt"
    write_checkpoint(checkpoint_of(*build()), tmp_path / "model.pt")
    assert main(["compact", str(tmp_path / "model.pt"), str(out)]) == 0
    use, train = capsys.readouterr().out.splitlines()[-3:-1]
    assert use.startswith(f"use it:   {program} DATA --user-dir fairseq_autosize ")
    assert use.endswith(f" --path '{out}' ...")
    assert train.endswith(f" --finetune-from-model '{out}' --prox none ...")


def test_sizes_are_told_where_the_input_is_replaced(saved, capsys):
    before = saved.stat().st_size
    assert main(["compact", str(saved), str(saved), "--force"]) == 0
    told = f"file: {before:,} -> {saved.stat().st_size:,} bytes"
    assert told in capsys.readouterr().out and saved.stat().st_size < before


def test_average_and_its_errors(saved, tmp_path, capsys):
    out = tmp_path / "mean.pt"
    assert main(["average", str(out), str(saved), str(saved)]) == 0
    assert "mean of 2 checkpoints; 3,020 of 4,020 neurons alive" in capsys.readouterr().out
    assert "exists already" in failure(capsys, "average", out, saved, saved)
    assert "at least two" in failure(capsys, "average", tmp_path / "one.pt", saved)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "--max-epoch", "2"], "--arch: give the architecture"),
        (["data", "--arch", "transformer"], "--max-update or --max-epoch: give one"),
        (["data", "--arch", "t", "--max-epoch", "2", "--no-save"], "--no-save: each stage goes on"),
        (["data", "--arch", "t", "--max-epoch", "2", "--reset-meters"], "--reset-meters: each"),
        (["data", "--arch", "t", "--max-epoch", "4", "--save-interval", "2"], "--save-interval 2:"),
        (["data", "--arch", "t", "--max-epoch", "4", "--patience", "5"], "--patience 5: fairseq"),
        (
            ["data", "--arch", "t", "--max-epoch", "4", "--lr-scheduler", "reduce_lr_on_plateau"],
            "--lr-scheduler reduce_lr_on_plateau: fairseq begins to wait anew",
        ),
        (
            ["data", "--arch", "t", "--max-epoch", "4", "--restore-file", "old.pt"],
            "--restore-file old.pt: the stages count their epochs from a training's start",
        ),
        (
            ["data", "--arch", "t", "--max-epoch", "4", "--continue-once=old.pt"],
            "--continue-once old.pt: the stages count their epochs from a training's start",
        ),
        (["data", "--arch", "trans", "--max-epoch", "4"], "cannot compact architecture trans (unk"),
        (
            ["data", "--arch", "multilingual_transformer", "--max-epoch", "4"],
            "cannot compact architecture multilingual_transformer: it is a model for each pair",
        ),
    ],
)
def test_trainings_that_cannot_go_in_stages(arguments, message, tmp_path, capsys):
    arguments = [*arguments, "--save-dir", tmp_path]
    assert message in failure(capsys, "train-compacting", *arguments)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ([], "checkpoint_last.pt"),
        (["--checkpoint-suffix", "_x"], "checkpoint_last_x.pt"),
        (["--checkpoint-suffix=-1.x"], "checkpoint_last-1.x.pt"),
    ],
)
def test_stages_do_not_go_on_from_another_architecture(options, name, saved, tmp_path, capsys):
    saved.rename(tmp_path / name)
    arguments = ["data", "--arch", "transformer_tiny", "--max-epoch", "1", "--save-dir", tmp_path]
    message = failure(capsys, "train-compacting", *arguments, *options)
    told = "is there already, and of --arch transformer, not transformer_tiny; choose another"
    assert f"{tmp_path / name} {told}" in message


# --- trained models -----------------------------------------------------------------------------

DETERMINISTIC = ["--dropout", "0", "--prox", "l21", "--prox-strength", "5"]


@pytest.fixture(scope="module")
def trained(corpus, run, tmp_path_factory) -> Path:
    """A checkpoint with some neurons dead, trained without dropout."""
    folder = tmp_path_factory.mktemp("trained")
    run(
        *("fairseq_cli.train", corpus, "--user-dir", USER_DIR, *TINY_MODEL, *TINY_TRAINING),
        *(*DETERMINISTIC, "--max-update", "40", "--save-dir", folder),
    )
    return folder / "checkpoint_last.pt"


def compacted(source: Path, target: Path, *options: str) -> str:
    result = subprocess.run(
        [COMMAND, "compact", source, target, *options], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def translations(output: str) -> tuple[list[str], list[float]]:
    """The best hypotheses in the order of the corpus, and their scores."""
    found = sorted(re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", output, re.M), key=lambda hit: int(hit[0]))
    return [text for _, _, text in found], [float(score) for _, score, _ in found]


def assert_same(
    found: tuple[list[str], list[float]], wanted: tuple[list[str], list[float]]
) -> None:
    assert found[0] == wanted[0]
    assert found[1] == pytest.approx(wanted[1], abs=1e-4)


@pytest.mark.heavy
def test_compacted_models_translate_the_same(trained, corpus, run, tmp_path):
    generate = ["fairseq_cli.generate", corpus, "--cpu", "--max-tokens", "400", "--beam", "5"]
    generate += ["--max-len-b", "10", "--required-batch-size-multiple", "1"]
    ours = ["--user-dir", USER_DIR]
    wanted = translations(run(*generate, *ours, "--path", trained).stdout)
    assert len(wanted[0]) == 43
    told = compacted(trained, tmp_path / "small.pt")
    assert "fairseq-generate DATA --user-dir fairseq_autosize" in told
    small = run(*generate, *ours, "--path", tmp_path / "small.pt").stdout
    assert_same(translations(small), wanted)
    # The uniform one in a fairseq that lacks the package.
    compacted(trained, tmp_path / "uniform.pt", "--uniform")
    plain = ["--user-dir", plain_fairseq(tmp_path)]
    uniform = run(*generate, *plain, "--path", tmp_path / "uniform.pt").stdout
    assert_same(translations(uniform), wanted)


@pytest.mark.heavy
def test_training_goes_on_as_without_compaction(trained, corpus, run, tmp_path):
    (tmp_path / "wide").mkdir()
    shutil.copy(trained, tmp_path / "wide")
    train = ["fairseq_cli.train", corpus, "--user-dir", USER_DIR, *TINY_TRAINING, *DETERMINISTIC]
    train += ["--max-update", "90", "--save-dir"]
    told = compacted(trained, tmp_path / "small.pt", "--keep-optimizer")
    flags = re.search(r"^train on: .*?(--arch .*) \.\.\.$", told, re.M)[1].split()
    wide = run(*train, tmp_path / "wide", *TINY_MODEL).stdout
    small = run(*train, tmp_path / "narrow", *TINY_MODEL, *flags).stdout
    losses = [[p["loss"] for p in logged(output)] for output in (wide, small)]
    assert len(losses[0]) == 50
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-3)  # three decimals are logged
    ends = [
        read_checkpoint(tmp_path / name / "checkpoint_last.pt")["extra_state"]["val_loss"]
        for name in ("wide", "narrow")
    ]
    assert ends[1] == pytest.approx(ends[0], rel=1e-5, abs=1e-3)


@pytest.mark.heavy
def test_training_in_stages_ends_where_one_run_ends(trained, corpus, run, tmp_path):
    train = [corpus, "--user-dir", USER_DIR, *TINY_MODEL, *TINY_TRAINING, *DETERMINISTIC]
    # Only the first stage may start from it.
    train += ["--finetune-from-model", trained, "--max-update", "30", "--save-dir"]
    whole = run("fairseq_cli.train", *train, tmp_path / "whole").stdout
    staged = subprocess.run(
        [
            COMMAND,
            "train-compacting",
            "--share",
            "0.01",
            "--stage-epochs",
            "2",
            *train,
            tmp_path / "staged",
            "--checkpoint-suffix",
            "_x",
        ],
        capture_output=True,
        text=True,
    )
    assert staged.returncode == 0, staged.stderr[-4000:]
    # Some neurons die in the first stage, the others in the second: the third is without any.
    widths = re.findall(r"^  encoder (\S+) (\S+); decoder (\S+) (\S+)$", staged.stdout, re.M)
    assert len(widths) == 2 and set(widths[0]) != {"0"} == set(widths[1])
    assert "--prox l21: there is nothing left to shrink" in staged.stdout
    losses = [[p["loss"] for p in logged(output)] for output in (whole, staged.stdout)]
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)
    ends = [logged(output, "valid")[-1]["valid_loss"] for output in (whole, staged.stdout)]
    assert ends[1] == pytest.approx(ends[0], abs=2e-3)
    assert (tmp_path / "staged" / "checkpoint_last_x.pt").exists()


@pytest.mark.heavy
def test_stages_that_are_told_to_end_leave_nothing_behind_and_go_on(trained, corpus, run, tmp_path):
    train = [corpus, "--user-dir", USER_DIR, *TINY_MODEL, *TINY_TRAINING, *DETERMINISTIC]
    train += ["--finetune-from-model", trained, "--max-update", "30", "--save-dir"]
    whole = run("fairseq_cli.train", *train, tmp_path / "whole").stdout
    staged = [COMMAND, "train-compacting", "--share", "0.01", "--stage-epochs", "2"]
    staged += [*train, tmp_path / "staged"]

    def children() -> int:
        found = 0
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                words = (process / "cmdline").read_bytes()
                found += b"fairseq_cli.train" in words and bytes(tmp_path / "staged") in words
        return found

    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(staged, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 120
            while "stage 2: " not in (tmp_path / "log").read_text() and time.monotonic() < end:
                time.sleep(0.1)
            while not children() and time.monotonic() < end:
                time.sleep(0.1)
        finally:
            process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert children() == 0
    log = (tmp_path / "log").read_text()
    assert "going on without them" in log and "Traceback" not in log
    again = subprocess.run(staged, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-4000:]
    assert "going on from " in again.stderr and "stage 1: up to epoch 4" in again.stderr
    losses = [[p["loss"] for p in logged(output)] for output in (whole, again.stdout)]
    assert 0 < len(losses[1]) < len(losses[0])
    assert losses[1] == pytest.approx(losses[0][-len(losses[1]) :], abs=2e-3)
    ends = [logged(output, "valid")[-1]["valid_loss"] for output in (whole, again.stdout)]
    assert ends[1] == pytest.approx(ends[0], abs=2e-3)


@pytest.mark.heavy
def test_export_as_a_program(trained, corpus, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    export = [COMMAND, "export", trained, tmp_path / "ct2", "--format", "ctranslate2"]
    result = subprocess.run(
        [*export, "--quantization", "int8", "--data-dir", corpus], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"differ by at most \d\.\de-0[5-9] in the log probability", result.stdout)
    assert re.search(r"^with int8 weights by at most", result.stdout, re.M)
    translator = ctranslate2.Translator(str(tmp_path / "ct2"))
    assert translator.translate_batch([["ba", "be"]], max_decoding_length=5)[0].hypotheses
    again = subprocess.run(export, capture_output=True, text=True)
    assert again.returncode == 2 and "exists already" in again.stderr


@pytest.mark.heavy
def test_uniform_checkpoint_passes_the_stock_converter(trained, corpus, tmp_path):
    pytest.importorskip("ctranslate2")
    compacted(trained, tmp_path / "uniform.pt", "--uniform")
    result = run_program(
        *("ctranslate2.converters.fairseq", "--model_path", tmp_path / "uniform.pt"),
        *("--data_dir", corpus, "--user_dir", USER_DIR, "--output_dir", tmp_path / "ct2"),
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert json.loads((tmp_path / "ct2" / "config.json").read_text())

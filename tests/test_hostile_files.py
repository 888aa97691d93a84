"""Broken and hostile checkpoints: every command that reads one says so in a line, runs nothing.

What the reader refuses, and why, is in test_checkpoint.py; here it is what the commands make of it.
"""

import argparse
import html
import os
import random
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_MODEL, TINY_TRAINING, USER_DIR
from programs import run_program
from small_models import TASK, build_model, checkpoint_of, dictionary
from test_checkpoint import Crafted, Storage, craft, crafted_tensor, gadgets

from fairseq_autosize import staged_training
from fairseq_autosize.cli import main

FC1 = "encoder.layers.0.fc1.weight"
V = "decoder.layers.0.encoder_attn.v_proj.weight"


def valid_checkpoint(folder: Path) -> dict[str, Any]:
    """A checkpoint as a training leaves it, with the optimizer's state and a moving average."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1}
    model, args = build_model(share_all_embeddings=True, task="translation", **sizes)
    with torch.no_grad():
        model.encoder.layers[0].fc1.weight[2:] = 0
    task = TASK | {"data": str(folder), "source_lang": "xx", "target_lang": "yy"}
    state = {i: {"exp_avg": p.detach().clone()} for i, p in enumerate(model.parameters())}
    return checkpoint_of(model, args, task) | {
        "last_optimizer_state": {"state": state, "param_groups": [{"params": [*state]}]},
        "extra_state": {
            "ema": {FC1: model.encoder.layers[0].fc1.weight.detach().clone()},
            "train_iterator": {"epoch": 2, "iterations_in_epoch": 0},
        },
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("dict.xx.txt", "dict.yy.txt"):
        dictionary().save(str(tmp_path / name))
    torch.save(valid_checkpoint(tmp_path), tmp_path / "good.pt")
    return tmp_path


# --- the commands -----------------------------------------------------------------------------

# What each one reads is bad.pt, and what it writes is called out.
COMMANDS = {
    "count": "count bad.pt",
    "count after another": "count good.pt bad.pt --json",
    "compact": "compact bad.pt out",
    "compact with everything": "compact bad.pt out --uniform --keep-optimizer --force",
    "average": "average out good.pt bad.pt",
    "average before another": "average out bad.pt good.pt",
    "export": "export bad.pt out --format ctranslate2",
    "train-compacting": "train-compacting DATA --arch transformer --max-epoch 2 --save-dir run",
}
READING = list(COMMANDS)
SETTINGS = [name for name in COMMANDS if name != "average before another"]  # of another's file
COMPACTING = [name for name in COMMANDS if name.startswith(("compact", "export"))]


class Result:
    """What a command did."""

    def __init__(self, command: str, capsys: pytest.CaptureFixture) -> None:
        before = set(os.listdir())
        memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        self.status = main(command.split())
        self.seconds = time.monotonic() - start
        self.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory  # KiB
        self.out, self.err = capsys.readouterr()
        self.written = set(os.listdir()) - before - {"run"}


@pytest.fixture
def attempt(folder, capsys, monkeypatch) -> Callable[[str], Result]:
    monkeypatch.chdir(folder)

    def train(command: list[str]) -> int:
        """Instead of fairseq-train: a stage that leaves bad.pt as its checkpoint."""
        Path("run").mkdir(exist_ok=True)
        Path("run/checkpoint_last.pt").write_bytes(Path("bad.pt").read_bytes())
        return 0

    def run(command: str) -> Result:
        if command == "export":
            pytest.importorskip("ctranslate2")
        Path("run/checkpoint_last.pt").unlink(missing_ok=True)
        with monkeypatch.context() as patched:
            patched.setattr(staged_training, "_run", train)
            return Result(COMMANDS[command], capsys)

    return run


def assert_refused(result: Result, told: str = "") -> None:
    lines = [line for line in result.err.splitlines() if " | INFO | " not in line]
    assert result.status == 2 and not result.written
    assert "bad.pt" not in result.out and ("good.pt" in result.out or not result.out)
    assert len(lines) == 1 and lines[0].startswith("fairseq-autosize: error: "), result.err
    assert told in lines[0]
    assert "Traceback" not in result.err and "weights_only" not in result.err
    assert result.seconds < 10 and result.memory < 300_000


@pytest.mark.parametrize("command", READING)
def test_valid_checkpoint_passes(attempt, command):
    Path("bad.pt").write_bytes(Path("good.pt").read_bytes())
    result = attempt(command)
    assert result.status == 0, result.err


# --- files that carry code --------------------------------------------------------------------

KINDS = ["posix.system", "builtins.getattr", "Popen", "CallsItself"]


@pytest.mark.parametrize("place", ["model", "cfg", "last_optimizer_state", "extra_state"])
@pytest.mark.parametrize("kind", KINDS)
def test_code_is_not_run(attempt, folder, kind, place):
    checkpoint = valid_checkpoint(folder)
    checkpoint[place]["deep"] = gadgets(folder / "canary")[kind]
    torch.save(checkpoint, "bad.pt")
    for command in READING:
        assert_refused(attempt(command), "carries code: it names ")
    assert not Path("canary").exists()


# --- damage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", READING)
def test_truncated_files(attempt, command):
    data = Path("good.pt").read_bytes()
    for length in random.Random(3).sample(range(len(data)), 50):
        Path("bad.pt").write_bytes(data[:length])
        assert_refused(attempt(command), "bad.pt: " if command != "train-compacting" else "last.pt")


@pytest.mark.parametrize("command", ["count", "compact with everything", "average"])
def test_flipped_bits(attempt, command):
    data = Path("good.pt").read_bytes()
    chooser = random.Random(4)
    refused = 0
    for _ in range(50):
        damaged = bytearray(data)
        damaged[chooser.randrange(len(data))] ^= 1 << chooser.randrange(8)
        Path("bad.pt").write_bytes(damaged)
        result = attempt(command)
        if result.status:  # the others are dates and padding in the archive
            assert_refused(result)
            refused += 1
        Path("out").unlink(missing_ok=True)
    assert refused > 20


# --- contents that do not belong together -------------------------------------------------------


def replaced(checkpoint: dict, *path: object, by: object) -> dict:
    """Put a value at a path of keys in nested dicts and namespaces."""
    inside = checkpoint
    for key in path[:-1]:
        inside = inside[key]
        inside = vars(inside) if isinstance(inside, argparse.Namespace) else inside
    inside[path[-1]] = by
    return checkpoint


def huge(checkpoint: dict) -> dict:
    """Four numbers, stretched by strides of zero to a matrix that no memory holds."""
    return {"model": {FC1: crafted_tensor(Storage(), (2**30, 2**30), (0, 0))}}


# What is changed -> the commands that must refuse it, and what they tell.
CONTENTS: dict[str, tuple[Callable[[dict], Any], list[str], str]] = {
    "a list": (lambda c: [c], READING, "it holds a list, no dict"),
    "no model": (lambda c: {"cfg": c["cfg"]}, READING, 'it has no "model"'),
    "model a list": (lambda c: c | {"model": []}, READING, '"model" is a list, no dict'),
    "a number for a tensor": (
        lambda c: replaced(c, "model", FC1, by=1.0),
        READING,
        f"model[{FC1}] is a float, no tensor",
    ),
    "complex weights": (
        lambda c: replaced(c, "model", FC1, by=torch.ones(12, 8, dtype=torch.complex64)),
        READING,
        f"model[{FC1}] is not a dense tensor of numbers",
    ),
    "whole numbers": (
        lambda c: replaced(c, "model", FC1, by=torch.ones(12, 8, dtype=torch.int64)),
        READING,
        "",
    ),
    "three dimensions": (
        lambda c: replaced(c, "model", FC1, by=torch.ones(12, 8, 1)),
        READING,
        "",
    ),
    "fc1 wider than fc2": (
        lambda c: replaced(c, "model", FC1, by=torch.ones(12, 9)),
        READING,
        "",
    ),
    "no feed-forward layers": (
        lambda c: c | {"model": {"a\n\x1b[31mb": torch.ones(2, 2)}},
        READING,
        "",
    ),
    "heads that do not fit": (
        lambda c: replaced(c, "model", V, by=torch.ones(8, 8, 1)),
        ["count", "count after another", *COMPACTING],
        "do not belong together",
    ),
    "settings a number": (lambda c: c | {"cfg": 3}, SETTINGS, "cfg is a int"),
    "a setting without a name": (
        lambda c: replaced(c, "cfg", "task", 5, by=1),
        SETTINGS,
        "cfg.task has the key 5",
    ),
    "no settings": (
        lambda c: c | {"cfg": None},
        COMPACTING,
        "the checkpoint has no settings of its model",
    ),
    "unknown architecture": (
        lambda c: replaced(c, "cfg", "model", "arch", by=["transformer"]),
        COMPACTING,
        "cannot compact architecture",
    ),
    "NaN": (
        lambda c: replaced(c, "model", FC1, by=torch.full((12, 8), float("nan"))),
        [*COMPACTING, "average", "average before another"],
        f"{FC1} holds NaN or infinity",
    ),
    "a moving average of another model": (
        lambda c: replaced(c, "extra_state", "ema", FC1, by=torch.ones(3, 8)),
        COMPACTING,
        f"extra_state[ema][{FC1}] is no moving average",
    ),
    "an optimizer without slots": (
        lambda c: replaced(c, "last_optimizer_state", "state", 0, by=3),
        ["compact with everything"],
        "--keep-optimizer: the optimizer's state is not one of torch's",
    ),
    "an optimizer whose parameters are no numbers": (
        lambda c: replaced(
            c, "last_optimizer_state", "param_groups", 0, "params", 0, by=torch.ones(3)
        ),
        ["compact with everything"],
        "--keep-optimizer: the optimizer's state is not one of torch's",
    ),
    "an optimizer of another model": (
        lambda c: replaced(c, "last_optimizer_state", "state", 0, "exp_avg", by=torch.ones(5)),
        ["compact with everything"],
        "compact without --keep-optimizer",
    ),
    "a history that is none": (
        lambda c: c | {"autosize": {"history": 5}},
        COMPACTING,
        "autosize.history is a int",
    ),
    "no progress": (
        lambda c: c | {"extra_state": {"train_iterator": {"epoch": "2"}}},
        ["train-compacting"],
        "does not tell how far its training is",
    ),
    "declared size": (huge, READING, "more elements than the file has data for"),
    "declared storage": (
        lambda c: {"model": Crafted(bytearray, 2**40)},
        READING,
        "calls builtins.bytearray",
    ),
    "settings of a huge layer": (
        lambda c: replaced(c, "cfg", "model", "decoder_ffn_embed_dim", by=2**40),
        [],
        "",
    ),
    "settings of a huge embedding": (
        lambda c: replaced(c, "cfg", "model", "encoder_embed_dim", by=2**40),
        ["export"],
        "",
    ),
    "settings of many layers": (
        lambda c: replaced(c, "cfg", "model", "decoder_layers", by=10**9),
        ["export"],
        "the settings ask for 1000000000 layers; at most 500",
    ),
    "settings of many positions": (
        lambda c: replaced(c, "cfg", "model", "max_source_positions", by=10**10),
        ["export"],
        "the settings ask for",
    ),
    "settings of no positions": (
        lambda c: replaced(c, "cfg", "model", "max_source_positions", by="many"),
        ["export"],
        "max_source_positions 'many': must be a number >= 5",
    ),
    "settings of more layers than there are": (
        lambda c: replaced(c, "cfg", "model", "decoder_layers", by=3),
        ["export"],
        "fairseq cannot run the model that the checkpoint's settings describe",
    ),
    "heads as text": (
        lambda c: replaced(c, "cfg", "model", "encoder_attention_heads", by="2"),
        ["export"],
        "",
    ),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_contents_that_do_not_belong_together(attempt, folder, case):
    change, refusing, told = CONTENTS[case]
    write_bad(case, change(valid_checkpoint(folder)), "bad.pt")
    for command in READING:
        result = attempt(command)
        if command in refusing:
            assert_refused(result, told)
        elif result.status:  # such as a mean of parameters of different shapes
            assert_refused(result)
        if Path("out").is_file():
            Path("out").unlink()


def write_bad(case: str, bad: Any, path: str) -> None:
    if "declared" in case:
        craft(path, bad)
    else:
        torch.save(bad, path)


@pytest.mark.parametrize("case", CONTENTS)
def test_a_report_has_a_checkpoint_or_says_why_not(folder, capsys, monkeypatch, case):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(folder)
    Path("run").mkdir()
    Path("run/train.log").write_text(
        '2026-01-01 | INFO | train_inner | {"loss": "9.5", "num_updates": "10"}\n'
    )
    change, refusing, told = CONTENTS[case]
    write_bad(case, change(valid_checkpoint(folder)), "run/checkpoint_last.pt")
    result = Result("report run --output report.html", capsys)
    assert result.status == 0 and result.seconds < 10
    lines = result.err.splitlines()
    assert len(lines) <= 1, lines
    if "count" in refusing:
        assert told in lines[0] and told in html.unescape(Path("report.html").read_text())


# --- what is no file --------------------------------------------------------------------------


@pytest.mark.parametrize("command", [name for name in READING if name != "train-compacting"])
def test_directory_and_missing_file(attempt, command):
    assert_refused(attempt(command), "bad.pt: cannot read: No such file or directory")
    Path("bad.pt").mkdir()
    assert_refused(attempt(command), "bad.pt: is a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("command", [name for name in READING if name != "train-compacting"])
def test_no_permission(attempt, command):
    Path("bad.pt").write_bytes(Path("good.pt").read_bytes())
    Path("bad.pt").chmod(0)
    assert_refused(attempt(command), "bad.pt: cannot read: Permission denied")


# --- fairseq's own programs -------------------------------------------------------------------

GENERATE = ["fairseq_cli.generate", "--max-len-b", "5", "--path"]
TRAIN = ["fairseq_cli.train", *TINY_MODEL, *TINY_TRAINING, "--max-update", "1", "--save-dir", "new"]
CODE = r"unsupported GLOBAL posix\.system|module posix is blocked"
HUGE = r"does not match expected size \(4503599627370496 bytes"
CUT = r"OSError: \[Errno 22\] Invalid argument|PytorchStreamReader failed"  # by where it is cut


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("program", "file", "told"),
    [
        (GENERATE, "code", CODE),
        (GENERATE, "half", CUT),
        (GENERATE, "list", "list indices must be integers"),
        ([*TRAIN, "--restore-file"], "code", CODE),
        ([*TRAIN, "--restore-file"], "half", CUT),
        (GENERATE, "huge", HUGE),
        ([*TRAIN, "--restore-file"], "huge", HUGE),
        ([*TRAIN, "--finetune-from-model"], "code", CODE),
    ],
)
def test_programs_of_fairseq(corpus, tmp_path, program, file, told):
    """They run nothing and end with an error; its traceback is fairseq's."""
    checkpoint = valid_checkpoint(tmp_path)
    if file == "code":
        checkpoint["extra_state"]["deep"] = gadgets(tmp_path / "canary")["posix.system"]
    torch.save([checkpoint] if file == "list" else checkpoint, tmp_path / "bad.pt")
    if file == "huge":
        tensor = crafted_tensor(Storage(count=2**50), (2**50,), (1,))
        craft(tmp_path / "bad.pt", {"model": {FC1: tensor}})
    if file == "half":
        data = (tmp_path / "bad.pt").read_bytes()
        (tmp_path / "bad.pt").write_bytes(data[: len(data) // 2])
    module, *arguments = program
    command = [module, corpus, "--user-dir", USER_DIR, "--cpu", *arguments, tmp_path / "bad.pt"]
    result = run_program(*command, cwd=tmp_path)
    assert result.returncode != 0
    assert re.search(told, result.stdout), result.stdout[-3000:]
    assert not (tmp_path / "canary").exists()
    assert not list(tmp_path.glob("new/checkpoint*"))

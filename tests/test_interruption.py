"""Trainings that are killed or diverge: what is left on the disk, and what the user is told."""

import contextlib
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, TINY_TRAINING, USER_DIR
from programs import run_program

from fairseq_autosize.checkpoint import CheckpointError, read_checkpoint, write_checkpoint

KILLS = 10  # of each training; and twice as many of the writing alone

# Writing takes longer than an update: there are many positions, of which few are used.
MODEL = [*TINY_MODEL, "--encoder-learned-pos", "--max-source-positions", "100000"]
TRAIN = ["--user-dir", USER_DIR, *MODEL, *TINY_TRAINING, "--prox", "l21", "--max-epoch", "500"]


def updates_of(path: Path) -> int | None:
    """The number of updates of a checkpoint; None where it is damaged."""
    try:
        return read_checkpoint(path)["optimizer_history"][-1]["num_updates"]
    except CheckpointError:
        return None


def wait_for_writing(folder: str, since: float) -> None:
    """Return as soon as a checkpoint, or what will become one, has been written to since then."""
    while True:
        with contextlib.suppress(FileNotFoundError):  # renamed or removed since it was listed
            if any(p.stat().st_mtime > since for p in Path(folder).glob("*.pt*")):
                return
        time.sleep(0.001)


def kill_while_training(folder: str, seed: int) -> None:
    """Let fairseq-train, in whose process this is called, fork before its first epoch.

    Each child trains and saves until it is killed, so that the imports and the loading are waited
    for once. What each one leaves is written to killed.json: file -> updates.
    """
    from fairseq.trainer import Trainer

    begin, chooser, left = Trainer.begin_epoch, random.Random(seed), []

    def begin_epoch(trainer: Trainer, epoch: int) -> None:
        begin(trainer, epoch)
        while epoch == 1 and len(left) < KILLS:
            forked = time.time()
            child = os.fork()
            if not child:
                left.extend([{}] * KILLS)  # so that it forks no more
                return
            wait_for_writing(folder, forked)
            time.sleep(chooser.uniform(0, 0.8))
            if len(left) % 2:  # every other one in the midst of writing, wherever the others are
                wait_for_writing(folder, time.time())
                time.sleep(chooser.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
            left.append({p.name: updates_of(p) for p in sorted(Path(folder).glob("*.pt"))})
        if len(left) == KILLS and epoch == 1:
            Path(folder, "killed.json").write_text(json.dumps(left))
            os._exit(0)

    Trainer.begin_epoch = begin_epoch


def killed(corpus: Path, folder: Path, *options: str) -> list[dict[str, int | None]]:
    """What a training leaves each time that it is killed."""
    first = f"import test_interruption as t; t.kill_while_training({str(folder)!r}, 5)"
    run_program(
        *("fairseq_cli.train", corpus, *TRAIN, *options, "--save-dir", folder),
        path=Path(__file__).parent,
        first=first,
    )
    return json.loads((folder / "killed.json").read_text())


def assert_resumes(corpus: Path, folder: Path, checkpoint: str, updates: int) -> None:
    output = run_program(
        *("fairseq_cli.train", corpus, *TRAIN, "--save-dir", folder / "again"),
        *("--restore-file", folder / checkpoint, "--max-update", updates + 1),
    )
    assert output.returncode == 0, output.stdout[-3000:]
    assert f"Loaded checkpoint {folder / checkpoint} (epoch" in output.stdout


@pytest.mark.heavy
def test_checkpoints_of_updates_are_always_whole(corpus, tmp_path):
    """--save-interval-updates: the file of each update is renamed into its place."""
    options = ["--save-interval-updates", "1", "--keep-interval-updates", "2"]
    for files in killed(corpus, tmp_path, *options, "--disable-validation"):
        # Of whichever epoch the training has come to.
        found = {name: n for name, n in files.items() if re.match(r"checkpoint_\d+_", name)}
        assert None not in found.values(), files
        assert all(re.fullmatch(rf"checkpoint_\d+_{n}\.pt", name) for name, n in found.items())
    assert found
    newest, updates = max(found.items(), key=lambda item: item[1])
    assert_resumes(corpus, tmp_path, newest, updates)


@pytest.mark.heavy
def test_best_or_last_is_always_whole(corpus, tmp_path):
    """Without other checkpoints the first of the two is renamed into its place, and then copied."""
    saves = killed(corpus, tmp_path, "--max-tokens", "100000")
    seen = [n for files in saves for n in files.values()]
    for files in saves:
        assert set(files) <= {"checkpoint_best.pt", "checkpoint_last.pt"}
        assert not files or any(files.values()), files
        assert files.get("checkpoint_best.pt", True), files  # never copied to
    assert any(seen)
    whole = {name: n for name, n in saves[-1].items() if n}
    newest, updates = max(whole.items(), key=lambda item: item[1])
    assert_resumes(corpus, tmp_path, newest, updates)


def test_own_writing_can_be_killed(tmp_path):
    """`write_checkpoint` leaves the old file or the new one."""
    path = tmp_path / "checkpoint.pt"
    contents = [{"model": {"w": torch.full((10**6,), float(i))}} for i in range(2)]
    write_checkpoint(contents[0], path)
    chooser = random.Random(6)
    for _ in range(2 * KILLS):
        child = os.fork()
        if not child:
            try:
                while True:
                    for content in contents:
                        write_checkpoint(content, path, force=True)
            finally:
                os._exit(1)
        time.sleep(chooser.uniform(0.02, 0.2))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        weight = read_checkpoint(path)["model"]["w"]
        assert weight.numel() == 10**6 and bool((weight == weight[0]).all())


@pytest.mark.heavy
def test_divergence_is_told_as_such(corpus, tmp_path):
    """torch makes a bare StopIteration of it, in the hooks with which fairseq looks for NaN."""
    result = run_program(
        *("fairseq_cli.train", corpus, "--user-dir", USER_DIR, *TINY_MODEL, *TINY_TRAINING),
        *("--lr", "1e10", "--max-update", "40", "--disable-validation", "--save-dir", tmp_path),
        *("--prox", "l21"),
    )
    assert result.returncode != 0
    last = result.stdout.strip().splitlines()[-1]
    assert last.startswith("FloatingPointError: gradients are Nan/Inf: the training has diverged;")
    assert "crash.pt in --save-dir has the parameters as they were before" in last
    assert "StopIteration" not in result.stdout
    assert (tmp_path / "crash.pt").exists()

"""Several processes on the CPU: every rank has the same model, that of one process."""

import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_MODEL, TINY_TRAINING
from programs import run_program
from step_checker import TESTS, checked
from test_docs import shell
from test_training import AUTOSIZE, assert_same_checkpoints, count_dead
from test_training_modes import read

from fairseq_autosize.checkpoint import read_checkpoint

pytestmark = pytest.mark.heavy

# Adam divides by the root of the second moment: where a gradient is 0 but for rounding, the order
# of a sum decides the step. This epsilon keeps such steps small.
TRAIN = ("fairseq_cli.train", *AUTOSIZE, *TINY_MODEL, *TINY_TRAINING, "--dropout", "0")
TRAIN += ("--adam-eps", "1e-3", "--prox", "l21")


def train(ranks: int, folder: Path, *arguments: object) -> list[dict]:
    """Train with `ranks` processes that check their updates; what each has noted."""
    with socket.socket() as free:
        free.bind(("", 0))
        address = f"tcp://localhost:{free.getsockname()[1]}"
    together = ("--distributed-world-size", ranks, "--distributed-no-spawn")
    together += ("--distributed-init-method", address, "--distributed-backend", "gloo")
    together += ("--ddp-backend", "legacy_ddp")

    def one(rank: int):
        joined = (*together, "--distributed-rank", rank) if ranks > 1 else ()
        return run_program(
            *(*TRAIN, *arguments, *joined, "--save-dir", folder),
            path=TESTS,
            first=checked(folder / f"rank{rank}"),
        )

    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(ranks) as pool:
        for result in pool.map(one, range(ranks)):
            assert result.returncode == 0, result.stdout[-3000:]
    return [read(folder / f"rank{rank}") for rank in range(ranks)]


def assert_close(first: Path, second: Path) -> None:
    """Equal parameters but for the rounding of sums in another order, and the same dead."""
    a, b = (read_checkpoint(folder / "checkpoint_last.pt")["model"] for folder in (first, second))
    for name, value in a.items():
        assert torch.allclose(value, b[name], rtol=0, atol=1e-6), name
        assert torch.equal(value == 0, b[name] == 0), name


def test_ranks_agree_and_equal_one_process(corpus, tmp_path):
    """Batches that do not divide evenly among the ranks, some of them in parts of an update."""
    common = (corpus, "--prox-strength", "6", "--max-update", "30")
    (alone,) = train(1, tmp_path / "1", *common, "--update-freq", "4")
    for ranks, update_freq in ((2, 2), (4, 1)):
        folder = tmp_path / str(ranks)
        noted = train(ranks, folder, *common, "--update-freq", update_freq)
        assert [n["updates"] for n in noted] == [30] * ranks
        assert len({n["hash"] for n in noted}) == 1, "the ranks have different models"
        assert noted[0]["dead"] == alone["dead"]
        assert_close(tmp_path / "1", folder)
    dead, total = count_dead(tmp_path / "1" / "checkpoint_last.pt")
    assert 0 < dead < total


def test_interrupted_ranks_go_on_together_or_alone(corpus, tmp_path):
    """On the way to a target: in as many processes bit for bit, and in one process."""
    common = (corpus, "--prox-target-sparsity", "0.6", "--max-update", "20")
    whole = train(2, tmp_path / "whole", *common)
    # At the end of an epoch: in the middle, other processes would share out its batches anew.
    train(2, tmp_path / "parts", *common, "--max-epoch", "2")
    shutil.copytree(tmp_path / "parts", tmp_path / "alone")
    parts = train(2, tmp_path / "parts", *common)
    for noted in (whole, parts):
        assert noted[0]["hash"] == noted[1]["hash"], "the ranks have different models"
    checkpoints = [tmp_path / name / "checkpoint_last.pt" for name in ("whole", "parts", "alone")]
    assert_same_checkpoints(*checkpoints[:2])
    train(1, tmp_path / "alone", *common, "--update-freq", "2")
    assert [count_dead(checkpoint) for checkpoint in checkpoints] == [(58, 96)] * 3
    assert_close(tmp_path / "whole", tmp_path / "alone")


def test_processes_that_do_not_meet_are_refused(corpus, tmp_path):
    """fairseq would train one process, with its part of the data."""
    alone = ("--distributed-world-size", "2", "--distributed-port", "9218", "--max-update", "1")
    result = run_program(*TRAIN, corpus, *alone, "--save-dir", tmp_path)
    assert result.returncode != 0
    assert "--distributed-world-size 2, but this process has joined no" in result.stdout
    assert not list(tmp_path.glob("*.pt"))


def test_script_trains_on_the_cpu(corpus, tmp_path):
    arguments = " ".join(map(str, (corpus, *TRAIN[1:], "--save-dir", tmp_path)))
    shell(
        f"bash {ROOT}/scripts/train_distributed.sh --processes 2 {arguments} --max-update 2 > log",
        tmp_path,
    )
    assert "training on 2 devices" in (tmp_path / "log").read_text()
    assert (tmp_path / "checkpoint_last.pt").is_file()

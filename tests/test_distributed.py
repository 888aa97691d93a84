"""Several processes on the CPU: every rank has the same model, that of one process."""

import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_MODEL, TINY_TRAINING
from programs import run_program
from step_checker import TESTS, checked
from test_docs import shell
from test_training import AUTOSIZE, assert_same_checkpoints, count_dead
from test_training_modes import FLAT, FP16, read

from fairseq_autosize.checkpoint import parameter_names, read_checkpoint, task_entry

pytestmark = pytest.mark.heavy

# Adam divides by the root of the second moment: where a gradient is 0 but for rounding, the order
# of a sum decides the step. This epsilon keeps such steps small.
TRAIN = ("fairseq_cli.train", *AUTOSIZE, *TINY_MODEL, *TINY_TRAINING, "--dropout", "0")
TRAIN += ("--adam-eps", "1e-3", "--prox", "l21")


def train(
    ranks: int, folder: Path, *arguments: object, first: str = "", backend: str = "legacy_ddp"
) -> list[dict]:
    """Train with `ranks` processes that check their updates; what each has noted."""
    with socket.socket() as free:
        free.bind(("", 0))
        address = f"tcp://localhost:{free.getsockname()[1]}"
    together = ("--distributed-world-size", ranks, "--distributed-no-spawn")
    together += ("--distributed-init-method", address, "--distributed-backend", "gloo")
    together += ("--ddp-backend", backend)

    def one(rank: int):
        joined = (*together, "--distributed-rank", rank) if ranks > 1 else ()
        return run_program(
            *(*TRAIN, *arguments, *joined, "--save-dir", folder),
            path=TESTS,
            first=first + checked(folder / f"rank{rank}"),
        )

    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(ranks) as pool:
        for result in pool.map(one, range(ranks)):
            assert result.returncode == 0, result.stdout[-3000:]
    return [read(folder / f"rank{rank}") for rank in range(ranks)]


def assert_same_hashes(noted: list[dict]) -> None:
    """All parameters were the same in all processes after every update."""
    first, *others = (n["hashes"] for n in noted)
    assert len(set(first)) > 1 and all(hashes == first for hashes in others)


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
    for ranks, update_freq, backend in ((2, 2, "legacy_ddp"), (4, 1, "no_c10d")):
        folder = tmp_path / str(ranks)
        noted = train(ranks, folder, *common, "--update-freq", update_freq, backend=backend)
        assert [n["updates"] for n in noted] == [30] * ranks
        assert_same_hashes(noted)
        assert noted[0]["dead"] == alone["dead"]
        assert_close(tmp_path / "1", folder)
    dead, total = count_dead(tmp_path / "1" / "checkpoint_last.pt")
    assert 0 < dead < total


def test_interrupted_ranks_go_on_together_or_alone(corpus, tmp_path):
    """On the way to a target: in as many processes bit for bit, and in one process."""
    common = (corpus, "--prox-target-sparsity", "0.6", "--max-update", "20")
    common += ("--prox-freeze-update", "12")
    whole = train(2, tmp_path / "whole", *common)
    # At the end of an epoch: in the middle, other processes would share out its batches anew.
    train(2, tmp_path / "parts", *common, "--max-epoch", "2")
    shutil.copytree(tmp_path / "parts", tmp_path / "alone")
    parts = train(2, tmp_path / "parts", *common)
    for noted in (whole, parts):
        assert_same_hashes(noted)
    checkpoints = [tmp_path / name / "checkpoint_last.pt" for name in ("whole", "parts", "alone")]
    assert_same_checkpoints(*checkpoints[:2])
    train(1, tmp_path / "alone", *common, "--update-freq", "2")
    assert [count_dead(checkpoint) for checkpoint in checkpoints] == [(58, 96)] * 3
    assert_close(tmp_path / "whole", tmp_path / "alone")


@pytest.mark.parametrize("half", ["", f"{FP16} --fp16-no-flatten-grads"])
def test_ranks_interrupted_in_an_epoch_equal_uninterrupted(half, corpus, tmp_path):
    """In as many processes, bit for bit: on the way to a target, at its freeze, and after it."""
    common = (corpus, "--prox-target-sparsity", "0.6", "--prox-freeze-update", "16", *half.split())
    train(2, tmp_path / "whole", *common, "--max-update", "25")
    for stop in (5, 16, 19, 25):
        parts = train(2, tmp_path / "parts", *common, "--max-update", stop)
        assert_same_hashes(parts)
        state = read_checkpoint(tmp_path / "parts" / "checkpoint_last.pt")["extra_state"]
        assert stop == 25 or state["train_iterator"]["iterations_in_epoch"] > 0, "not in an epoch"
    checkpoints = [tmp_path / name / "checkpoint_last.pt" for name in ("whole", "parts")]
    assert_same_checkpoints(*checkpoints)
    assert count_dead(checkpoints[1]) == (58, 96)


@pytest.mark.parametrize("masters", ["flat", "one by one"])
def test_half_precision_ranks_agree(masters, corpus, tmp_path):
    """Each rank's model is its masters rounded, in every update; so the checkpoint is, too."""
    half = FP16.split() + ([] if masters == "flat" else ["--fp16-no-flatten-grads"])
    common = (corpus, "--prox-strength", "6", "--max-update", "40", *half)
    first, second = noted = train(2, tmp_path, *common, first=FLAT)
    assert first["updates"] == second["updates"] == 40 and first["skipped"] == 0
    assert_same_hashes(noted)
    dead, total = count_dead(tmp_path / "checkpoint_last.pt")
    assert 0 < dead < total and dead == first["dead"][-1] == second["dead"][-1]
    checkpoint = read_checkpoint(tmp_path / "checkpoint_last.pt")
    saved = task_entry(checkpoint)[1]["prox_precision"]["masters"]
    state = checkpoint["model"]
    model = torch.cat([state[name].flatten() for name in parameter_names(state)])
    assert torch.equal(torch.cat([x.flatten() for x in saved]).half().float(), model)


def test_processes_that_do_not_meet_are_refused(corpus, tmp_path):
    """fairseq would train one process, with its part of the data."""
    alone = ("--distributed-world-size", "2", "--distributed-port", "9218", "--max-update", "1")
    result = run_program(*TRAIN, corpus, *alone, "--save-dir", tmp_path)
    assert result.returncode != 0
    assert "--distributed-world-size 2, but this process has joined no" in result.stdout
    assert not list(tmp_path.glob("*.pt"))


def test_torchrun_on_a_cpu_is_refused(corpus, tmp_path):
    """fairseq would train each process alone, into the same files."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += ["-m", TRAIN[0], corpus, *TRAIN[1:], "--max-update", "1", "--save-dir", tmp_path]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode != 0
    assert "error: --distributed-world-size 1, but torchrun has started 2 proc" in result.stderr
    assert not list(tmp_path.glob("*.pt"))


def test_script_trains_on_the_cpu(corpus, tmp_path):
    arguments = " ".join(map(str, (corpus, *TRAIN[1:], "--save-dir", tmp_path)))
    shell(
        f"bash {ROOT}/scripts/train_distributed.sh --processes 2 {arguments} --max-update 2 > log",
        tmp_path,
    )
    assert "training on 2 devices" in (tmp_path / "log").read_text()
    assert (tmp_path / "checkpoint_last.pt").is_file()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_script_ends_when_one_process_fails(corpus, tmp_path):
    """The other one would wait half an hour for it."""
    real = Path(sys.executable).with_name("fairseq-train")
    (tmp_path / "fairseq-train").write_text(
        "#!/usr/bin/env bash\n"
        "case $* in *'--distributed-rank 1 '*) sleep 5; exit 3 ;; esac\n"
        f'echo $$ > {tmp_path}/pid\nexec {real} "$@"\n'
    )
    (tmp_path / "fairseq-train").chmod(0o755)
    script = ["bash", ROOT / "scripts" / "train_distributed.sh", "--processes", "2"]
    command = [*script, corpus, *TRAIN[1:], "--save-dir", tmp_path / "saved"]
    path = os.pathsep.join([str(tmp_path), str(real.parent), os.environ["PATH"]])
    result = subprocess.run(
        list(map(str, command)),
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert result.stderr.endswith("train_distributed.sh: error: one of 2 processes failed\n")
    waiting = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 30
    while is_running(waiting) and time.monotonic() < end:
        time.sleep(0.1)
    assert not is_running(waiting)


SRUN = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=1 ]] || exit 9
shift
for ((task = 0; task < SLURM_NTASKS; task++)); do SLURM_PROCID=$task "$@" || exit; done
"""


def slurm(folder: Path, *arguments: str, **variables: object) -> subprocess.CompletedProcess:
    """Run train_slurm.sh as in a job, on stand-ins for Slurm's and fairseq's programs."""
    programs = {
        "srun": SRUN,
        "scontrol": "#!/usr/bin/env bash\n[[ $3 == 'n[7-8]' ]] && printf 'n7\\nn8\\n'\n",
        "fairseq-train": "#!/usr/bin/env bash\necho $SRUN_CPUS_PER_TASK $*\n",
    }
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": 40123, "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_NNODES": 2}
    job |= {"SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 1, "SLURM_CPUS_PER_TASK": 3, **variables}
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    told = {name: str(value) for name, value in job.items() if value is not None}
    return subprocess.run(
        ["bash", ROOT / "scripts" / "train_slurm.sh", *arguments],
        env=os.environ | told | {"PATH": path},
        capture_output=True,
        text=True,
    )


def test_slurm_script_gives_each_task_on_a_cpu_its_rank(tmp_path):
    """Left to fairseq, one task a node trains nothing there, and ends with status 0."""
    result = slurm(tmp_path, "DATA", "--cpu", "--prox", "l21")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "3 DATA --cpu --prox l21 --distributed-world-size 2 --distributed-no-spawn "
        "--distributed-init-method tcp://n7:10123 --distributed-backend gloo "
        f"--ddp-backend legacy_ddp --distributed-rank {rank}"
        for rank in (0, 1)
    ]


def test_slurm_script_leaves_the_ranks_on_gpus_to_fairseq(tmp_path):
    result = slurm(tmp_path, "DATA", "--prox", "l21", PORT=7)
    assert result.returncode == 0, result.stderr
    line = "3 DATA --prox l21 --distributed-world-size 2 --distributed-port 7"
    assert result.stdout.splitlines() == [line] * 2


def test_slurm_script_refuses_tasks_that_do_not_fit(tmp_path):
    result = slurm(tmp_path, "DATA", SLURM_NTASKS_PER_NODE=4)
    assert result.returncode == 2 and not result.stdout
    assert "2 tasks on 2 nodes with 4 on each: give --nodes and --ntasks-per-node" in result.stderr
    result = slurm(tmp_path, "DATA", SLURM_NTASKS=4, SLURM_NTASKS_PER_NODE=None)
    assert result.returncode == 2
    assert "4 tasks on 2 nodes with an unknown number on each: give --nodes" in result.stderr
    result = slurm(tmp_path, "DATA", SLURM_NTASKS="")
    assert result.returncode == 2 and "not in a Slurm job; submit it" in result.stderr

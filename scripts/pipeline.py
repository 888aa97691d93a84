"""What grid.py and experiment.py share: run a program, read what it wrote, score it."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sacrebleu
from prepare_data import installed_versions

import fairseq_autosize
from fairseq_autosize.training_log import TrainingLog

USER_DIR = Path(fairseq_autosize.__file__).parent


class RunError(Exception):
    """A setting or a command that failed; the message says which and where its log is."""


# What `execute` waits for, in whichever thread.
_running: set[subprocess.Popen] = set()
_ending = threading.Event()


def end_with_commands() -> None:
    """From now on SIGTERM ends the commands that run, too, and then this process.

    They would go on alone in their folders, where the next start finds nobody at work. The terminal
    sends Ctrl-C to all by itself.
    """

    def end(number: int, _: object) -> None:
        _ending.set()
        for process in tuple(_running):
            process.terminate()
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def execute(
    command: Sequence[str], log: Path, append: bool = False, lock: int | None = None
) -> tuple[float, float]:
    """Run a command with its output in a file.

    Args:
        lock: of a locked file, which stays so while the command runs, even if this process is
            killed.

    Returns:
        Its CPU seconds (user and system) and wall seconds.

    Raises:
        RunError: it ended with another status than 0, or this process has been told to end.
    """
    if _ending.is_set():
        raise RunError(f"{log}: not begun, since this program was told to end")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    start = time.monotonic()
    with log.open("a" if append else "w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=() if lock is None else (lock,),
        )
        _running.add(process)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            _running.discard(process)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        told = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise RunError(f"exit {process.returncode}, see the end of {log}: {told[:300]}")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - start


def check_path(path: Path, name: str = "") -> None:
    """Refuse a path that fairseq would take for several.

    Args:
        name: what the user knows it by, such as DATA, for the message.

    Raises:
        RunError: it is such a one.
    """
    if os.pathsep in str(path):
        told = f"fairseq takes {os.pathsep} for the end of a path; choose another name"
        raise RunError(f"{name} {path}: {told}".lstrip())


def record_of(folder: Path, name: str = "") -> dict[str, Any]:
    """What prepare_data.py noted about a folder; `name` as in `check_path`.

    Raises:
        RunError: it did not make the folder, or its note is damaged.
    """
    noted = folder / "prepare.json"
    if not noted.is_file():
        told = "no prepare.json there; make it with prepare_data.py"
        raise RunError(f"{name} {folder}: {told}".lstrip())
    try:
        return json.loads(noted.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{noted}: {error}; make the folder anew with prepare_data.py") from error


def corpus_identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """What in a prepare.json tells one data set from another."""
    return {key: record.get(key) for key in ("languages", "bpe", "vocab_size", "sha256")}


def translations(log: Path) -> dict[int, str]:
    """The best translations in the output of fairseq's programs, by the line of the corpus."""
    found: dict[int, str] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"H-(\d+)\t[^\t]*\t(.*)", line):
            found.setdefault(int(match[1]), match[2])  # --nbest has more, the best first
    return found


def hypotheses(log: Path, lines: int) -> list[str]:
    """The same in the order of the corpus.

    Raises:
        RunError: they are not as many as the corpus has lines; fairseq drops batches silently.
    """
    found = translations(log)
    if len(found) != lines:
        raise RunError(f"{log}: {len(found)} translations of {lines} lines")
    return [found[index] for index in sorted(found)]


def history(log: Path) -> list[dict[str, float]]:
    """Neurons alive and validation loss over the updates, from the training log."""
    told = TrainingLog()
    told.read(log)
    points = []
    for part, prefix in ((told.train, ""), (told.valid, "valid_")):
        names = {"loss": f"{prefix}loss", "neurons_alive": "neurons_alive"}
        points += [
            {"update": update} | {new: values[old] for old, new in names.items() if old in values}
            for update, values in part.items()
        ]
    return sorted(points, key=lambda point: point["update"])


def frozen_at(log: Path) -> int | None:
    """The update after which the dead neurons were frozen, from the training log."""
    text = log.read_text(encoding="utf-8", errors="replace")
    updates = [int(n) for n in re.findall(r"frozen after update (\d+):", text)]
    return min(updates, default=None)  # a resumed run says it again


def lines_of(path: Path) -> list[str]:
    """The lines of a text; only newlines end one."""
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def scores(translations: list[str], references: list[str]) -> dict[str, dict[str, Any]]:
    """BLEU and chrF of a test set, each with its signature; the length as a ratio (BLEU's)."""
    found = {}
    for metric in (sacrebleu.BLEU(), sacrebleu.CHRF()):
        score = metric.corpus_score(translations, [references])
        signature = str(metric.get_signature())
        found[score.name] = {"score": round(score.score, 2), "signature": signature}
        if score.name == "BLEU":
            found["BLEU"]["length"] = round(score.sys_len / max(score.ref_len, 1), 4)
    return found


def versions() -> dict[str, str]:
    """Of what the results depend on."""
    return {
        "python": platform.python_version(),
        "fairseq_autosize": fairseq_autosize.__version__,
        **installed_versions(("torch", "fairseq-fixed", "fairseq", "sacrebleu")),
    }


def git_state(folder: Path) -> str:
    """The commit of a checkout, with "-dirty" if files differ from it; "none" if git tells none."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # git is not installed
        return "none"
    return found.stdout.strip() if found.returncode == 0 else "none"

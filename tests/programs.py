"""Programs run as their users run them, without waiting for torch and fairseq to be imported.

``python -m fairseq_cli.train`` spends 5 to 8 seconds on imports and 1 or 2 on a tiny model. So each
program runs in a process of its own, forked from one that has imported fairseq and nothing else of
interest: not this package, nor fairseq's programs.
"""

import atexit
import logging
import multiprocessing
import os
import random
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

_context = multiprocessing.get_context("forkserver")
# torch imports the last one, for some seconds, when a program makes its first optimizer.
_context.set_forkserver_preload(["fairseq.trainer", "fairseq.tasks", "sacrebleu", "torch._dynamo"])


def _program(
    module: str, arguments: list[str], folder: str, cwd: str | None, path: str | None, first: str
):
    """What the new process does: become ``python -m module arguments``."""
    import numpy as np

    multiprocessing.set_start_method(None, force=True)  # that of an ordinary process
    logging.root.handlers.clear()  # that of a module of fairseq, which sets one when it is imported
    logging.root.setLevel(logging.WARNING)
    random.seed()  # a fork has the state of its parent; a new process would not
    np.random.seed()
    for name, mode, descriptors in (("stdin", os.O_RDONLY, [0]), ("stdout", os.O_WRONLY, [1, 2])):
        opened = os.open(os.path.join(folder, name), mode)
        for descriptor in descriptors:
            os.dup2(opened, descriptor)
    # The server's own standard input is closed, and its streams belong to the first test's output.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(ENVIRONMENT)
    if cwd is not None:
        os.chdir(cwd)
    sys.path[0] = os.getcwd()
    if path is not None:
        sys.path.insert(0, path)
    sys.argv = [module, *arguments]
    try:
        exec(first, {})
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception:
        sys.excepthook(*sys.exc_info())  # as Python does; multiprocessing would not ask the hook
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()


def run_program(
    module: str,
    *arguments: object,
    cwd: Path | None = None,
    stdin: str | None = None,
    path: Path | None = None,
    first: str = "",
) -> subprocess.CompletedProcess:
    """Run ``python -m module arguments`` with one thread; output and errors come as one text.

    Args:
        path: a folder to put first on the module search path.
        first: Python code to execute in the process before the program.
    """
    os.environ.update(ENVIRONMENT)  # for the server, which the first call starts
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "stdin").write_text(stdin or "")
        output = Path(folder, "stdout")
        output.touch()
        options = [None if place is None else str(place) for place in (cwd, path)]
        words = [str(argument) for argument in arguments]
        process = _context.Process(target=_program, args=(module, words, folder, *options, first))
        process.start()
        try:
            process.join()
        finally:
            process.kill()
        return subprocess.CompletedProcess([module, *words], process.exitcode, output.read_text())

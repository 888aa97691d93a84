"""The `fairseq-autosize` command."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from . import __version__
from .checkpoint import CheckpointError, printable, read_checkpoint
from .groups import GroupError
from .report import count_neurons, format_count, layers_with_nan

_PROG = "fairseq-autosize"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        Exit status: 0, or 2 after an error of the user or in a file, which is then one line on
        standard error. (argparse leaves with 2 as well for a wrong command line.)
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except (CheckpointError, GroupError) as error:
        sys.stderr.write(f"{_PROG}: error: {printable(str(error))}\n")
        return 2
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough. Python flushes standard output once more
        # when it ends, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description="Look at fairseq Transformers that were trained with --prox.",
        epilog=f"example: {_PROG} count checkpoints/checkpoint_best.pt",
    )
    parser.add_argument("--version", action="version", version=f"{_PROG} {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_count(commands)
    return parser


def _add_count(commands: argparse._SubParsersAction) -> None:
    count = commands.add_parser(
        "count",
        help="neurons alive and pruned, and parameters before and after compaction",
        description="Count the feed-forward neurons of each layer: alive, and pruned (all weights "
        "of the neuron's row of fc1 are exactly zero). Reads any fairseq Transformer checkpoint, "
        "and runs no code from it.",
        epilog=f"example: {_PROG} count checkpoints/checkpoint_best.pt --json",
    )
    count.add_argument("checkpoints", nargs="+", metavar="CKPT", help="checkpoint file")
    count.add_argument(
        "--json",
        action="store_true",
        help="print JSON: one object, or for several checkpoints a list of objects with a path",
    )
    count.set_defaults(run=_count)


def _count(arguments: argparse.Namespace) -> None:
    counts = []
    for path in arguments.checkpoints:
        checkpoint = read_checkpoint(path)
        try:
            counts.append(count_neurons(checkpoint))
            for name in layers_with_nan(checkpoint):
                sys.stderr.write(
                    f"{_PROG}: warning: {path}: {printable(name)}: fc1.weight holds NaN; "
                    "neurons with NaN count as alive\n"
                )
        except (CheckpointError, GroupError) as error:
            raise CheckpointError(f"{path}: {error}") from error
    several = len(counts) > 1
    if arguments.json:
        named = [
            {"path": path, **count}
            for path, count in zip(arguments.checkpoints, counts, strict=True)
        ]
        sys.stdout.write(json.dumps(named if several else counts[0], indent=2) + "\n")
        return
    tables = [
        f"{path}\n{format_count(count)}" if several else format_count(count)
        for path, count in zip(arguments.checkpoints, counts, strict=True)
    ]
    sys.stdout.write("\n\n".join(tables) + "\n")

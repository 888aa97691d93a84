"""The `fairseq-autosize` command."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from . import __version__
from .checkpoint import CheckpointError, file_sha256, printable, read_checkpoint, write_checkpoint
from .compaction import Compaction, compact
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
    except (CheckpointError, GroupError, ImportError) as error:
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
    _add_compact(commands)
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


def _add_compact(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "compact",
        help="write a smaller checkpoint, without the dead neurons, that computes the same",
        description="Remove the dead feed-forward neurons of a checkpoint. The result has a width "
        "for each layer (architecture transformer_autosize), computes the same as the input, and "
        "is loaded by fairseq with --user-dir fairseq_autosize; with --uniform by any fairseq.",
        epilog=f"example: {_PROG} compact checkpoints/checkpoint_best.pt small.pt",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint file")
    parser.add_argument("output", metavar="OUT", help="file to write")
    parser.add_argument(
        "--uniform",
        action="store_true",
        help="pad all layers of a side to the widest one, so that the stock architecture holds "
        "the result and neither fairseq nor a converter needs this package",
    )
    parser.add_argument(
        "--multiple-of",
        type=_positive,
        default=1,
        metavar="N",
        help="pad every width to a multiple of N >= 1 (kernels like 8 or 32; default: 1)",
    )
    parser.add_argument(
        "--min-width",
        type=_not_negative,
        default=0,
        metavar="N",
        help="pad every width to at least N >= 0 neurons (default: 0)",
    )
    parser.add_argument(
        "--keep-optimizer",
        action="store_true",
        help="keep the optimizer's state, cut like the model, so that training can go on",
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it exists")
    parser.set_defaults(run=_compact)


def _compact(arguments: argparse.Namespace) -> None:
    path = arguments.checkpoint
    checkpoint = read_checkpoint(path)
    try:
        before = count_neurons(checkpoint)
        result = compact(
            checkpoint,
            uniform=arguments.uniform,
            multiple_of=arguments.multiple_of,
            min_width=arguments.min_width,
            keep_optimizer=arguments.keep_optimizer,
            provenance={
                "source": os.path.basename(path),
                "source_sha256": file_sha256(path),
                "signature": before["signature"],
            },
        )
    except (CheckpointError, GroupError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    write_checkpoint(result.checkpoint, arguments.output, force=arguments.force)
    after = count_neurons(result.checkpoint)["parameters"]["total"]
    sys.stdout.write(_describe(arguments, result, before["parameters"]["total"], after))


def _describe(arguments: argparse.Namespace, result: Compaction, before: int, after: int) -> str:
    """What was done, and the commands that go on from there."""
    wide = max(len(layer.name) for layer in result.layers)
    lines = [
        f"{printable(layer.name).ljust(wide)}  {layer.before} -> {layer.after}"
        + (f" ({layer.after - layer.alive} of them padding)" if layer.after > layer.alive else "")
        + (f", {layer.folded} constant neurons folded into fc2.bias" if layer.folded else "")
        for layer in result.layers
    ]
    if result.ema_rows:
        lines.append(
            f"the stored moving average loses {result.ema_rows} neurons that are dead in the model "
            "but not quite zero in the average; its translations may differ"
        )
    sizes = [os.path.getsize(path) for path in (arguments.checkpoint, arguments.output)]
    share = 100 * after / before
    lines += [
        f"parameters: {before:,} -> {after:,} ({share:.1f} %); "
        f"file: {sizes[0]:,} -> {sizes[1]:,} bytes",
        f"wrote {arguments.output}: architecture {result.arch}",
    ]
    user_dir = "" if arguments.uniform else " --user-dir fairseq_autosize"
    architecture = [f"--arch {result.arch}"]
    for side, widths in result.widths.items():
        if arguments.uniform:
            architecture.append(f"--{side}-ffn-embed-dim {widths[0]}")
        else:
            architecture.append(f"--{side}-ffn-dims {','.join(map(str, widths))}")
    start = "--restore-file" if arguments.keep_optimizer else "--finetune-from-model"
    lines += [
        "",
        f"use it:   fairseq-generate DATA{user_dir} --path {arguments.output} ...",
        f"train on: fairseq-train DATA --user-dir fairseq_autosize {' '.join(architecture)} "
        f"{start} {arguments.output} ...",
    ]
    return "\n".join(lines) + "\n"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number >= 1")
    return int(text)


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number >= 0")
    return int(text)

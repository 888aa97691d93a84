"""The `fairseq-autosize` command."""

import argparse
import contextlib
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import __version__
from .averaging import average
from .checkpoint import CheckpointError, file_sha256, printable, read_checkpoint, write_checkpoint
from .compaction import Compaction, compact
from .export import QUANTIZATIONS, ExportError, export_ctranslate2
from .groups import GroupError
from .html_report import ReportError, read_run, write_report
from .report import count_neurons, format_count, layers_with_nan
from .staged_training import StageError, train_in_stages

_PROG = "fairseq-autosize"

_MOST = 2**16  # of neurons that a layer is padded to

# What ends a command with one line: a mistake of the user's, or in a file.
_ERRORS = (CheckpointError, GroupError, ExportError, StageError, ReportError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        Exit status: 0, or 2 after an error of the user or in a file, which is then one line on
        standard error. (argparse leaves with 2 as well for a wrong command line.)
    """
    arguments = _parser().parse_args(argv)
    status = 0
    try:
        with _logging():
            status = arguments.run(arguments) or 0
        sys.stdout.flush()
    except _ERRORS as error:
        _tell(error)
        return 2
    except OSError as error:
        if error.filename is not None:  # such as a name that is too long
            _tell(f"{error.filename}: {error.strerror}")
            return 2
        # Of standard output, which Python flushes once more when it ends; that must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # the reader, as `head`, has not seen enough
            _tell(f"standard output: {error.strerror}")
            return 2
    return status


def _tell(error: Exception | str) -> None:
    sys.stderr.write(f"{_PROG}: error: {printable(str(error))}\n")


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Show this package's messages and the libraries' warnings on standard error, as fairseq does.

    Not through the root logger: some of fairseq's modules configure it when they are imported, in
    formats of their own. Who calls `main` from a program finds the loggers as they were.
    """
    handler = logging.StreamHandler()
    form = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
    handler.setFormatter(logging.Formatter(form, datefmt="%Y-%m-%d %H:%M:%S"))
    before = []
    levels = {"fairseq_autosize": logging.INFO, "fairseq": logging.WARNING}
    levels["matplotlib"] = logging.WARNING  # fairseq makes the root logger show all it has to say
    for name, level in levels.items():
        logger = logging.getLogger(name)
        before.append((logger, logger.level, logger.propagate))
        logger.setLevel(level)
        logger.propagate = False
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, level, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Put the file's name before what is wrong with its contents."""
    try:
        yield
    except (CheckpointError, GroupError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description="Count, shrink and deploy fairseq Transformers that were trained with --prox.",
        epilog=f"example: {_PROG} count checkpoints/checkpoint_last.pt",
    )
    parser.add_argument("--version", action="version", version=f"{_PROG} {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_count(commands)
    _add_compact(commands)
    _add_average(commands)
    _add_export(commands)
    _add_train_compacting(commands)
    _add_report(commands)
    return parser


def _add_count(commands: argparse._SubParsersAction) -> None:
    count = commands.add_parser(
        "count",
        help="neurons alive and pruned, and parameters before and after compaction",
        description="Count the feed-forward neurons of each layer: alive, and pruned (all weights "
        "of the neuron's row of fc1 are exactly zero). Reads any fairseq Transformer checkpoint, "
        "and runs no code from it.",
        epilog=f"example: {_PROG} count checkpoints/checkpoint_last.pt --json",
    )
    count.add_argument("checkpoints", nargs="+", metavar="CKPT", help="checkpoint file")
    count.add_argument(
        "--json",
        action="store_true",
        help="print JSON: one object, or for several checkpoints a list of objects with a path",
    )
    count.set_defaults(run=_count)


def _count(arguments: argparse.Namespace) -> int:
    """Counts what can be counted; 2 if a file cannot."""
    counts = []
    several = len(arguments.checkpoints) > 1
    for path in arguments.checkpoints:
        try:
            checkpoint = read_checkpoint(path)
            with _naming(path):
                counts.append((path, count_neurons(checkpoint)))
                for name in layers_with_nan(checkpoint):
                    sys.stderr.write(
                        f"{_PROG}: warning: {path}: {printable(name)}: fc1.weight holds NaN; "
                        "neurons with NaN count as alive\n"
                    )
        except CheckpointError as error:
            _tell(error)
    if arguments.json and several:
        named = [{"path": path, **count} for path, count in counts]
        sys.stdout.write(json.dumps(named, indent=2) + "\n")
    elif arguments.json and counts:
        sys.stdout.write(json.dumps(counts[0][1], indent=2) + "\n")
    elif counts:
        tables = [
            f"{path}\n{format_count(count)}" if several else format_count(count)
            for path, count in counts
        ]
        sys.stdout.write("\n\n".join(tables) + "\n")
    return 0 if len(counts) == len(arguments.checkpoints) else 2


def _add_compact(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "compact",
        help="write a smaller checkpoint, without the dead neurons, that computes the same",
        description="Remove the dead feed-forward neurons of a checkpoint. The result has a width "
        "for each layer (architecture transformer_autosize), computes the same as the input, and "
        "is loaded by fairseq with --user-dir fairseq_autosize; with --uniform by any fairseq.",
        epilog=f"example: {_PROG} compact checkpoints/checkpoint_last.pt small.pt",
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
    with _naming(path):
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
    after = count_neurons(result.checkpoint)["parameters"]["total"]
    size = os.path.getsize(path)  # now, since OUT may replace it
    write_checkpoint(result.checkpoint, arguments.output, force=arguments.force)
    sizes = size, os.path.getsize(arguments.output)
    sys.stdout.write(_describe(arguments, result, (before["parameters"]["total"], after), sizes))


def _describe(
    arguments: argparse.Namespace,
    result: Compaction,
    parameters: tuple[int, int],
    sizes: tuple[int, int],
) -> str:
    """What was done, and the commands that go on from there; numbers are before and after."""
    # Attention is of interest only where it has lost heads.
    layers = [*result.layers, *(x for x in result.attention if x.before != x.alive or x.folded)]
    wide = max(len(layer.name) for layer in layers)
    lines = [
        f"{printable(layer.name).ljust(wide)}  {layer.before} -> {layer.after}"
        + (f" ({layer.after - layer.alive} of them padding)" if layer.after > layer.alive else "")
        + (f", {layer.folded} constant ones folded into the bias after" if layer.folded else "")
        for layer in layers
    ]
    if result.ema_rows:
        lines.append(
            f"the stored moving average loses {result.ema_rows} rows that are dead in the model "
            "but not quite zero in the average; its translations may differ"
        )
    before, after = parameters
    share = 100 * after / before
    lines += [
        f"parameters: {before:,} -> {after:,} ({share:.1f} %); "
        f"file: {sizes[0]:,} -> {sizes[1]:,} bytes",
        f"wrote {arguments.output}: architecture {result.arch}",
    ]
    architecture = [f"--arch {result.arch}"]
    if arguments.uniform:
        architecture += [f"--{side}-ffn-embed-dim {w[0]}" for side, w in result.widths.items()]
    else:
        architecture += result.width_options()
    # In a training of its own a target would count from the small model, and prune it again.
    start, prox, without = "--finetune-from-model", " --prox none", ", without other --prox options"
    if arguments.keep_optimizer:
        start, prox, without = "--continue-once", "", ""
    program = "fairseq-generate" if result.translates else "fairseq-eval-lm"
    output = shlex.quote(str(arguments.output))
    lines += [
        "",
        f"use it:   {program} DATA --user-dir fairseq_autosize --path {output} ...",
        "train on: fairseq-train DATA --user-dir fairseq_autosize --save-dir NEW_FOLDER "
        f"{' '.join(architecture)} {start} {output}{prox} ...",
        "          (...: the other options as in the training, the sizes of the model among them"
        f"{without})",
    ]
    return "\n".join(lines) + "\n"


def _positive(text: str) -> int:
    return _whole(text, 1)


def _not_negative(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or not least <= int(text) <= _MOST:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} to {_MOST}")
    return int(text)


def _add_average(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "average",
        help="average the parameters of several checkpoints of one training",
        description="Write the mean of the parameters of several checkpoints. Neurons that are "
        "dead in some of them only are alive in the mean.",
        epilog=f"example: {_PROG} average mean.pt checkpoints/checkpoint{{8,9,10}}.pt",
    )
    parser.add_argument("output", metavar="OUT", help="file to write")
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="checkpoints, oldest first")
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it exists")
    parser.set_defaults(run=_average)


def _average(arguments: argparse.Namespace) -> None:
    checkpoints = [read_checkpoint(path) for path in arguments.checkpoints]
    result, revived = average(checkpoints, arguments.checkpoints)
    with _naming(arguments.checkpoints[-1]):  # its settings
        neurons = count_neurons(result)["ffn_neurons"]
    write_checkpoint(result, arguments.output, force=arguments.force)
    sys.stdout.write(
        f"wrote {arguments.output}: mean of {len(revived)} checkpoints; {neurons['alive']:,} of "
        f"{neurons['total']:,} neurons alive, the union of those alive in any of them\n"
    )
    for path, count in zip(arguments.checkpoints, revived, strict=True):
        if count:
            sys.stdout.write(f"{path}: {count:,} of its dead neurons are alive in the mean\n")


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export",
        help="convert a checkpoint for CTranslate2, and check that both engines agree",
        description="Convert a checkpoint, without its dead neurons, to a model for CTranslate2. "
        "Some sentences are scored by fairseq and by CTranslate2, and the difference is printed; "
        "in float32 it must be rounding.",
        epilog=f"example: {_PROG} export small.pt ct2 --format ctranslate2 --quantization int8",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint file")
    parser.add_argument("output", metavar="OUT_DIR", help="folder to make")
    parser.add_argument("--format", choices=["ctranslate2"], required=True)
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="how the weights are stored (default: float32)",
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder of the vocabularies, dict.*.txt (default: that of the training)",
    )
    for flag in ("--source-lang", "--target-lang"):
        parser.add_argument(
            flag,
            metavar="LANG",
            help="where neither the checkpoint nor binarized files in the folder tell it",
        )
    parser.add_argument(
        "--force", action="store_true", help="replace OUT_DIR if it is an earlier model"
    )
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    path = arguments.checkpoint
    checkpoint = read_checkpoint(path)
    with _naming(path):
        result = export_ctranslate2(
            checkpoint,
            arguments.output,
            data=arguments.data_dir,
            quantization=arguments.quantization,
            force=arguments.force,
            languages=(arguments.source_lang, arguments.target_lang),
        )
    lines = [
        f"wrote {arguments.output}",
        f"fairseq and CTranslate2 (float32) differ by at most {result.largest:.1e} in the log "
        f"probability of a token, over {result.tokens} tokens",
    ]
    if result.quantized is not None:
        lines.append(f"with {arguments.quantization} weights by at most {result.quantized:.1e}")
    sys.stdout.write("\n".join(lines) + "\n")


def _add_train_compacting(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train-compacting",
        help="fairseq-train in stages, with compaction in between",
        description="Run fairseq-train in stages of some epochs. Once enough neurons have died, "
        "the model is compacted between two stages and goes on smaller, so that auto-sizing "
        "shortens its own training. The same command again goes on from checkpoint_last.pt.",
        epilog=f"example: {_PROG} train-compacting --share 0.2 DATA --user-dir fairseq_autosize "
        "--arch transformer --prox l21 --max-epoch 20 ...",
    )
    parser.add_argument(
        "--share",
        type=_share,
        default=0.1,
        metavar="X",
        help="compact once at least this share (0 < X <= 1) of the model's neurons, or heads, "
        "is dead (default: 0.1)",
    )
    parser.add_argument(
        "--stage-epochs",
        type=_positive,
        default=1,
        metavar="N",
        help="epochs of a stage (default: 1)",
    )
    parser.add_argument("data", metavar="DATA", help="fairseq-train's data folder")
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="fairseq-train's options, all after DATA",
    )
    parser.set_defaults(run=_train_compacting)


def _train_compacting(arguments: argparse.Namespace) -> None:
    train = [arguments.data, *arguments.arguments]
    # So that it can end its fairseq-train first, as it does at Ctrl-C.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        done = train_in_stages(train, arguments.share, arguments.stage_epochs)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.stdout.write(f"compactions in this start: {len(done)}\n")
    for result in done:
        widths = "; ".join(
            f"{side} {' '.join(map(str, sizes))}" for side, sizes in result.widths.items()
        )
        sys.stdout.write(f"  {widths}\n")


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report",
        help="one HTML page on trainings: neurons over the updates, sizes, losses, scores",
        description="Make one self-contained HTML page from the logs and last checkpoints of "
        "trainings, also while they run. RUN is a folder with checkpoint_last.pt and *.log, as "
        "'fairseq-train --save-dir RUN ... | tee -a RUN/train.log' leaves it, or "
        "fairseq-hydra-train with hydra.run.dir=RUN (its checkpoints in RUN/checkpoints). BLEU is "
        "taken from what fairseq-generate printed, if that is in RUN/*.txt or *.out.",
        epilog=f"example: {_PROG} report dense=runs/dense half=runs/half --output report.html",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="[NAME=]RUN", help="folder of a training, or a log alone"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="HTML file to write")
    parser.add_argument("--plots", metavar="DIR", help="write the figures there, too, as PNG files")
    parser.add_argument("--title", default="Auto-sized training", help="(default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    parser.set_defaults(run=_report)


def _named_runs(texts: Sequence[str]) -> list[tuple[str, str]]:
    """(name, path) of each [NAME=]RUN; without a name, as much of the path as tells them apart."""
    named = []
    for text in texts:
        name, found, path = text.partition("=")
        named.append((name, path) if found and not os.path.exists(text) else ("", text))
    parts = {path: Path(path).resolve().parts for name, path in named if not name}
    places = set(parts.values())  # a folder given twice is one

    def shortest(path: str) -> str:
        for start in range(-1, -len(parts[path]), -1):
            if sum(place[start:] == parts[path][start:] for place in places) == 1:
                return os.path.join(*parts[path][start:])
        return path

    return [(name or shortest(path), path) for name, path in named]


def _report(arguments: argparse.Namespace) -> None:
    runs = {}
    for name, path in _named_runs(arguments.runs):
        run = read_run(path, name)
        if run.name in runs:
            raise ReportError(
                f"{path}: two runs are named {run.name}; name them apart: NAME={path}"
            )
        runs[run.name] = run
        for problem in run.problems:
            sys.stderr.write(f"{_PROG}: warning: {printable(problem)}\n")
    command = [_PROG, "report", *arguments.runs, "--output", arguments.output]
    command += ["--title", arguments.title]
    if arguments.plots is not None:
        command += ["--plots", arguments.plots]
    written = write_report(
        list(runs.values()),
        arguments.output,
        title=arguments.title,
        plots=arguments.plots,
        force=arguments.force,
        made_by=shlex.join(command),
    )
    sys.stdout.write("".join(f"wrote {path}\n" for path in written))


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and up to 1")
    return value

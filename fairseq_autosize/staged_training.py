"""Train in stages with compaction in between, so that auto-sizing shortens its own training.

A stage is an ordinary ``fairseq-train``, a program of its own. After it the checkpoint it left is
compacted with its optimizer's state, and the next stage goes on from there with the smaller model.
This works in every mode in which fairseq resumes. What is needed to go on after an interruption is
in the last checkpoint: how far the training is, and the sizes of the model.
"""

import logging
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .checkpoint import (
    CheckpointError,
    architecture_of,
    model_config,
    printable,
    read_checkpoint,
    write_checkpoint,
)
from .compaction import Compaction, compact, stock_model
from .groups import ATTENTION_PARTS
from .report import count_neurons

logger = logging.getLogger(__name__)

_NEEDED_IN_CHECKPOINTS = ("--no-save", "--no-last-checkpoints", "--no-save-optimizer-state")
_RESETS = ("--reset-optimizer", "--reset-lr-scheduler", "--reset-meters", "--reset-dataloader")

_LAST = "checkpoint_last.pt"


class StageError(ValueError):
    """A training that cannot be done in stages, or whose stage failed; one line."""


def train_in_stages(arguments: Sequence[str], share: float, epochs: int) -> list[Compaction]:
    """Run fairseq-train to its end, compacting every few epochs what has died.

    Where ``--save-dir`` has the last checkpoint of such a training, it goes on from there.

    Args:
        arguments: fairseq-train's own, with ``--max-update`` or ``--max-epoch``.
        share: compact once at least this share (0 < share <= 1) of the neurons, or of the heads,
            is dead.
        epochs: epochs (>= 1) of a stage, after which the dead are counted.

    Returns:
        The compactions that were done, in order, without their checkpoints, which can be large.

    Raises:
        StageError: the arguments do not fit, or fairseq-train failed.
        CheckpointError: the architecture, or the checkpoint of a stage, cannot be compacted.
    """
    own = _parse(arguments, epochs)
    stock_model(own.arch)
    last = Path(own.save_dir, _LAST.replace(".", f"{own.checkpoint_suffix}."))
    done: list[Compaction] = []
    extra: list[str] = []
    stage = stage_end = finished = 0
    while True:
        if stage or last.exists():
            checkpoint = read_checkpoint(last)
            if not stage:
                _check_same(checkpoint, own.arch, last)
                logger.info("going on from %s", last)
            updates, finished = _progress(checkpoint)
            # A stage that ended before its last epoch was ended by fairseq, as by --stop-min-lr.
            if (
                (own.max_update and updates >= own.max_update)
                or (own.max_epoch and finished >= own.max_epoch)
                or finished < stage_end
            ):
                if not stage:
                    logger.info("nothing to train: it is at update %d, its end", updates)
                return done
            if told := _dead(checkpoint, share):
                result = compact(checkpoint, keep_optimizer=True)
                checkpoint = result.checkpoint
                write_checkpoint(checkpoint, last, force=True)
                done.append(replace(result, checkpoint={}))
                del result  # with its checkpoint
                logger.info("after update %d: dead are %s; going on without them", updates, told)
            # fairseq takes the architecture from the command line; the last option counts.
            extra = _sizes(checkpoint)
            del checkpoint  # not needed beside the training
        stage += 1
        stage_end = (finished // epochs + 1) * epochs
        stage_end = min(stage_end, own.max_epoch or stage_end)
        command = [sys.executable, "-m", "fairseq_cli.train", *arguments, *extra]
        command += ["--max-epoch", str(stage_end)]
        logger.info("stage %d: up to epoch %d", stage, stage_end)
        if status := _run(command):
            raise StageError(f"fairseq-train failed with exit status {status}; see its output")


def _run(command: Sequence[str]) -> int:
    """Run a command to its end; what ends this program meanwhile, as Ctrl-C, ends that one first.

    Alone it would go on writing to its folder, where the next start would be a second one.
    """
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _dead(checkpoint: dict, share: float) -> str:
    """What is dead, in words; empty where it is less than the share of each kind."""
    count = count_neurons(checkpoint)
    kinds = {"neurons": count["ffn_neurons"], "heads": count["attention_heads"]}
    if not any(x["pruned"] and x["pruned"] >= share * x["total"] for x in kinds.values()):
        return ""
    return ", ".join(f"{x['pruned']} of {x['total']} {kind}" for kind, x in kinds.items())


def _check_same(checkpoint: dict, arch: str, last: Path) -> None:
    """Refuse the checkpoint of another architecture than the command's, compacted or not."""
    found = str(architecture_of(checkpoint))
    if found.removesuffix("_autosize") != arch.removesuffix("_autosize"):
        raise StageError(
            f"{last} is there already, and of --arch {printable(found)}, not {arch}; choose "
            "another --save-dir, or remove what is in it"
        )


def _sizes(checkpoint: dict) -> list[str]:
    """The options that give fairseq-train the checkpoint's sizes; none if it was not compacted."""
    model = model_config(checkpoint)
    names = [f"{side}_ffn_dims" for side in ("encoder", "decoder")]
    names += [f"{part}_head_counts" for part in ATTENTION_PARTS]
    sizes = [f"--{name.replace('_', '-')}={model[name]}" for name in names if model.get(name)]
    return [f"--arch={architecture_of(checkpoint)}", *sizes] if sizes else []


def _parse(arguments: Sequence[str], epochs: int) -> Namespace:
    """What the driver needs of fairseq-train's arguments."""
    parser = ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--arch", "-a")
    parser.add_argument("--save-dir", default="checkpoints")
    parser.add_argument("--restore-file", default=_LAST)
    parser.add_argument("--continue-once")
    parser.add_argument("--checkpoint-suffix", default="")
    parser.add_argument("--max-epoch", type=int, default=0)
    parser.add_argument("--max-update", type=int, default=0)
    parser.add_argument("--patience", type=int, default=-1)
    parser.add_argument("--lr-scheduler")
    parser.add_argument("--save-interval", type=int, default=1)
    for flag in (*_NEEDED_IN_CHECKPOINTS, *_RESETS):
        parser.add_argument(flag, action="store_true")
    own, _ = parser.parse_known_args(list(arguments))
    if own.arch is None:
        raise StageError("--arch: give the architecture, such as --arch transformer")
    if not (own.max_epoch or own.max_update):
        raise StageError("--max-update or --max-epoch: give one, so that the training has an end")
    others = {"--restore-file": own.restore_file, "--continue-once": own.continue_once}
    for flag, path in others.items():
        if path not in (_LAST, None):
            raise StageError(
                f"{flag} {path}: the stages count their epochs from a training's start, so drop "
                "it, or start from that model's parameters with --finetune-from-model"
            )
    if own.patience > 0:
        raise StageError(
            f"--patience {own.patience}: fairseq begins to count anew in every stage, so that it "
            "would not end the training; drop it, and give --max-update or --max-epoch"
        )
    if own.lr_scheduler == "reduce_lr_on_plateau":
        raise StageError(
            "--lr-scheduler reduce_lr_on_plateau: fairseq begins to wait anew in every stage, so "
            "that the learning rate would never fall; choose a schedule by updates"
        )
    if epochs % own.save_interval:
        raise StageError(
            f"--save-interval {own.save_interval}: a stage of {epochs} epochs must end with a "
            "checkpoint; choose stages of a multiple of it"
        )
    for flag in (*_NEEDED_IN_CHECKPOINTS, *_RESETS):
        if getattr(own, flag.removeprefix("--").replace("-", "_")):
            raise StageError(f"{flag}: each stage goes on from the last one's checkpoint; drop it")
    return own


def _progress(checkpoint: dict) -> tuple[int, int]:
    """(updates, epochs finished) of a checkpoint."""
    try:
        updates = checkpoint["optimizer_history"][-1]["num_updates"]
        # The epoch in which it goes on: at the end of one, fairseq stores the next.
        return int(updates), int(checkpoint["extra_state"]["train_iterator"]["epoch"] - 1)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            "the checkpoint does not tell how far its training is (optimizer_history, "
            "extra_state.train_iterator)"
        ) from error

#!/usr/bin/env python3
"""Measure how much translation models use their source sentences.

    python scripts/source_use.py CHECKPOINT... [--data DIR] [--output FILE]

The loss of a validation set in bits a subword, as fairseq-validate tells it (nll_loss), once with
each sentence's own source and once with that of another sentence of about the same length. What the
second is higher by is what the source tells the model. A model that has learned the target language
rather than to translate has a small difference, whatever its loss: losses do not tell the two
apart, and translations do.

DIR is a folder made by prepare_data.py, or one of fairseq-preprocess; for a checkpoint in a run's
folder of grid.py it is the data of that run, whose BLEU stands in the table, too. Models of which a
table would say the same are told apart by what only their paths have. Runs on the CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shlex
import sys
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pipeline
import torch
from benchmark_operators import check_output, cpu_name
from benchmark_operators import table as markdown
from fairseq import checkpoint_utils, utils
from fairseq.data import LanguagePairDataset
from pipeline import RunError

from fairseq_autosize.checkpoint import CheckpointError, read_checkpoint
from fairseq_autosize.groups import GroupError
from fairseq_autosize.report import count_neurons

BATCH = 32  # sentences


def exchanged(order: Sequence[int], sources: Sequence[Sequence[int]]) -> list[int]:
    """For each sentence another one, whose source it gets: the next one in an order.

    Sentences with the same source are passed over; the last ones begin again at the first.

    Args:
        order: of the sentences, by the length of their targets.
        sources: their tokens.

    Raises:
        RunError: all sources are the same.
    """
    own = [tuple(sources[i]) for i in order]
    if len(set(own)) < 2:
        raise RunError(f"all {len(own)} source sentences are the same; there is none to exchange")
    other = [0] * len(order)
    for at, sentence in enumerate(order):
        after = at
        while own[after] == own[at]:
            after = (after + 1) % len(order)
        other[sentence] = order[after]
    return other


@torch.no_grad()
def bits(
    model: torch.nn.Module, dataset: LanguagePairDataset, order: list[int], source: Sequence[int]
) -> tuple[float, int]:
    """The loss in bits a subword, ends of sentences included, and the number of subwords.

    Args:
        order: in which the sentences are batched; neighbours should be of similar length.
        source: for each sentence the one whose source it gets.
    """
    total, subwords = 0.0, 0
    for first in range(0, len(order), BATCH):
        batch = order[first : first + BATCH]
        items = [{**dataset[i], "source": dataset[source[i]]["source"]} for i in batch]
        sample = dataset.collater(items)
        logs = model.get_normalized_probs(model(**sample["net_input"]), log_probs=True)
        target = sample["target"]
        told = logs.gather(-1, target.unsqueeze(-1)).squeeze(-1)[target != dataset.tgt_dict.pad()]
        total -= float(told.double().sum())
        subwords += told.numel()
    return total / subwords / math.log(2), subwords


def measure(checkpoint: Path, data: Path | None, split: str) -> dict[str, Any]:
    """One row of the table; `data` as on the command line."""
    updates = count_neurons(read_checkpoint(checkpoint))["updates"]
    beside = checkpoint.parent / "result.json"
    try:
        result = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    except ValueError as error:
        raise RunError(f"{beside}: cannot read: {error}") from error
    if data is None:
        if "path" not in result:
            raise RunError(f"{checkpoint}: not in a run's folder of grid.py; give --data")
        data = Path(result["path"])
    binarised = data / "data-bin" if (data / "data-bin").is_dir() else data
    own_data = Path(result.get("path", data)).resolve()
    if binarised.resolve() not in (own_data, own_data / "data-bin"):  # --data says another
        result = {key: result[key] for key in ("run", "seed")}
    if not any(binarised.glob("dict.*.txt")):
        raise RunError(f"{binarised}: no folder with binarised data (dict.*.txt); give --data")
    pipeline.check_path(binarised)
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(checkpoint)], arg_overrides={"data": str(binarised)}
    )
    try:
        task.load_dataset(split)
    except FileNotFoundError as error:
        raise RunError(f"{binarised}: {error}") from error
    dataset = task.dataset(split)
    if not isinstance(dataset, LanguagePairDataset):
        raise RunError(f"{checkpoint}: task {type(task).__name__} does not translate one pair")
    model.eval()
    sentences = range(len(dataset))
    order = sorted(sentences, key=lambda i: len(dataset[i]["target"]))
    other = exchanged(order, [dataset[i]["source"].tolist() for i in sentences])
    own, subwords = bits(model, dataset, order, sentences)
    wrong, _ = bits(model, dataset, order, other)
    row: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "data": result.get("data", str(data)),
        "run": result.get("run", checkpoint.name),
        "seed": result.get("seed"),
        "updates": updates,
        "sentences": len(sentences),
        "subwords": subwords,
        "bits": round(own, 4),
        "bits_other_source": round(wrong, 4),
        "source_use": round(wrong - own, 4),
    }
    scores = {name: score["BLEU"]["score"] for name, score in result.get("scores", {}).items()}
    return row | ({"BLEU": scores} if scores else {})


def names(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """The runs, with what only their own paths have where data, run and seed are the same."""
    found = []
    for model in models:
        same = [m for m in models if all(m[key] == model[key] for key in ("data", "run", "seed"))]
        shared = set.intersection(*(set(Path(m["checkpoint"]).parts) for m in same))
        own = [part for part in Path(model["checkpoint"]).parts if part not in shared]
        found.append("/".join([model["run"], *own]))
    return found


def table(summary: Mapping[str, Any]) -> str:
    """The models of one file of results as a table in Markdown."""
    rows = []
    splits = dict.fromkeys(name for model in summary["models"] for name in model.get("BLEU", {}))
    for model, name in zip(summary["models"], names(summary["models"]), strict=True):
        row = {
            "data": model["data"],
            "run": name,
            "seed": "" if model["seed"] is None else str(model["seed"]),
            "updates": "" if model["updates"] is None else f"{model['updates']:,}",
            "bits, own source": f"{model['bits']:.2f}",
            "bits, another's": f"{model['bits_other_source']:.2f}",
            "source use": f"{model['source_use']:.2f}",
        }
        scores = model.get("BLEU", {})
        row |= {f"BLEU {name}": f"{scores[name]:.1f}" if name in scores else "" for name in splits}
        rows.append(row)
    return markdown(rows)


def main(argv: list[str] | None = None) -> int:
    """Entry point; 0, or 2 after a message on standard error."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoints", metavar="CHECKPOINT", type=Path, nargs="+", help="translation models")
    add("--data", metavar="DIR", type=Path, help="the models' data; see above")
    add("--split", metavar="NAME", default="valid", help="which part of it (default: valid)")
    add("--output", metavar="FILE", type=Path, help="JSON file to write; must not exist")
    args = parser.parse_args(argv)
    if args.output is not None:
        check_output(parser, args.output)
    logging.getLogger().setLevel(logging.WARNING)  # fairseq has opened the root logger wide
    warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")
    utils.import_user_module(Namespace(user_dir=str(pipeline.USER_DIR)))
    torch.set_num_threads(1)
    try:
        models = [measure(path, args.data, args.split) for path in args.checkpoints]
        summary = {
            "kind": "source",
            "command": shlex.join(
                ["python", "scripts/source_use.py", *(sys.argv[1:] if argv is None else argv)]
            ),
            "split": args.split,
            "machine": {"processor": cpu_name(), "threads": 1},
            "versions": pipeline.versions(),
            "models": models,
        }
    except (RunError, CheckpointError, GroupError, OSError) as error:
        print(f"source_use.py: error: {error}", file=sys.stderr)
        return 2
    if args.output is not None:
        args.output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(table(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())

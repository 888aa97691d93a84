"""Counts of neurons and parameters in a checkpoint, the signature line, and a table for people."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from . import __version__
from .checkpoint import config_section, head_widths, parameter_names, printable, task_entry
from .compat import fairseq_version
from .groups import Block, attention_in_state, feed_forward_in_state


def count_neurons(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Count the neurons and attention heads of a checkpoint, and the parameters they account for.

    A neuron is pruned when all weights of its row of fc1 are exactly zero; one that holds NaN
    counts as alive. Compaction removes its row of fc1, its entry of the bias and its column of
    fc2: 2d + 1 parameters.

    Args:
        checkpoint: what `checkpoint.read_checkpoint` returns.

    Returns:
        Plain data with the keys ``layers`` (a list of name, kind, total, alive, pruned),
        ``ffn_neurons`` (total, alive, pruned), ``attention`` and ``attention_heads`` (the same for
        heads; empty where the settings do not tell their number), ``parameters`` (total: as
        fairseq-train logs it under "num. shared model params"; compact: after compaction),
        ``updates`` (of the training so far; None where it does not tell) and ``signature``.

    Raises:
        GroupError: the model has no feed-forward layers; the message lists what was found.
        CheckpointError: the settings in the checkpoint are not a mapping.
    """
    state = checkpoint["model"]
    names = parameter_names(state)
    distinct = set(names)
    removable = 0

    def counted(blocks: Iterable[Block], weight: str) -> list[dict[str, Any]]:
        nonlocal removable
        entries = []
        for block in blocks:
            if f"{block.name}.{weight}" not in distinct:  # a shared layer, copied while saving
                continue
            pruned = int(block.dead().sum())
            removable += pruned * block.parameters_per_group()
            tally = _tally([(block.count, pruned)])
            entries.append({"name": block.name, "kind": block.kind, **tally})
        return entries

    layers = counted(feed_forward_in_state(state), "fc2.weight")
    attention = counted(attention_in_state(state, head_widths(checkpoint)), "out_proj.weight")
    parameters = sum(state[name].numel() for name in names)
    settings = _settings(checkpoint)
    return {
        "layers": layers,
        "ffn_neurons": _tally((layer["total"], layer["pruned"]) for layer in layers),
        "attention": attention,
        "attention_heads": _tally((block["total"], block["pruned"]) for block in attention),
        "parameters": {"total": parameters, "compact": parameters - removable},
        "updates": settings.get("updates"),
        "signature": signature(settings),
    }


def layers_with_nan(checkpoint: Mapping[str, Any]) -> list[str]:
    """Names of the feed-forward layers whose fc1 holds NaN."""
    layers = feed_forward_in_state(checkpoint["model"])
    return [layer.name for layer in layers if bool(layer.fc1_weight.isnan().any())]


def signature(settings: Mapping[str, Any]) -> str:
    """The settings behind a printed number, in one line in sacrebleu's manner.

    Args:
        settings: the ``prox*`` options, ``seed`` and ``updates``. Without ``prox`` the training
            is unknown; a strength of None is the default; seed, updates and options that change
            nothing by default are left out where they are absent or have that default.

    Returns:
        Such as ``prox:l21|strength:1.0|step:schedule|groups:ffn|bias:yes|start:0|seed:1|
        updates:1440|zero:exact|autosize:0.1.0|fairseq:0.12.3.1|torch:2.13.0``, without the break.
        The versions are those of the programs that print it.
    """
    fields = {"prox": settings.get("prox", "unknown")}
    if fields["prox"] not in ("none", "unknown"):
        targets = {name: settings.get(f"prox_target_{name}") for name in ("sparsity", "parameters")}
        targets = {name: share for name, share in targets.items() if share is not None}
        if targets:
            fields |= targets
            if settings.get("prox_target_scope", "model") != "model":
                fields["scope"] = settings["prox_target_scope"]
        else:
            strength = settings.get("prox_strength")
            fields["strength"] = "default" if strength is None else strength
            fields["step"] = settings.get("prox_step_size", "schedule")
        if settings.get("prox_metric", "identity") != "identity":
            fields["metric"] = settings["prox_metric"]
        fields |= {
            "groups": settings.get("prox_groups", "ffn"),
            "bias": "yes" if settings.get("prox_bias", True) else "no",
        }
        if settings.get("prox_couple"):
            fields["couple"] = "yes"
        if settings.get("prox_layer_scale") is not None:
            fields["scale"] = settings["prox_layer_scale"]
        fields["start"] = settings.get("prox_start_update", 0)
        if settings.get("prox_freeze_update") is not None:
            fields["freeze"] = settings["prox_freeze_update"]
    fields |= {key: settings[key] for key in ("seed", "updates") if settings.get(key) is not None}
    fields |= {
        "zero": "exact",
        "autosize": __version__,
        "fairseq": fairseq_version() or "none",
        "torch": torch.__version__.partition("+")[0],
    }
    return "|".join(f"{key}:{printable(str(value))}" for key, value in fields.items())


def format_count(count: Mapping[str, Any]) -> str:
    """The result of `count_neurons` as an aligned table for a terminal.

    Returns:
        Lines without a trailing newline: a row per layer, rows for encoder, decoder and all,
        the parameters now and after compaction, and the signature.
    """
    header = ("layer", "total", "alive", "pruned", "pruned %")
    rows = [_row(printable(layer["name"]), layer) for layer in count["layers"]]
    totals = []
    for side in dict.fromkeys(layer["kind"].removesuffix("-ffn") for layer in count["layers"]):
        own = [layer for layer in count["layers"] if layer["kind"] == f"{side}-ffn"]
        totals.append(_row(side, _tally((layer["total"], layer["pruned"]) for layer in own)))
    totals.append(_row("all", count["ffn_neurons"]))
    if count["attention_heads"]["pruned"]:
        rows += [_row(printable(block["name"]), block) for block in count["attention"]]
        totals.append(_row("heads", count["attention_heads"]))
    widths = [max(map(len, column)) for column in zip(header, *rows, *totals, strict=True)]

    def line(cells: Iterable[str]) -> str:
        first, *rest = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    now, compact = count["parameters"]["total"], count["parameters"]["compact"]
    return "\n".join(
        [
            line(header),
            rule,
            *map(line, rows),
            rule,
            *map(line, totals),
            "",
            f"parameters: {now:,} now, {compact:,} after compaction ({_percent(compact, now)} %)",
            f"signature: {count['signature']}",
        ]
    )


def _tally(counts: Iterable[tuple[int, int]]) -> dict[str, int]:
    counts = list(counts)
    total, pruned = sum(t for t, _ in counts), sum(p for _, p in counts)
    return {"total": total, "alive": total - pruned, "pruned": pruned}


def _settings(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What `signature` needs, as far as the checkpoint tells; plain values only."""
    task = config_section(checkpoint, "task")
    history = checkpoint.get("optimizer_history")
    last = history[-1] if isinstance(history, list) and history else None
    settings = {
        "prox": task.get("prox", "none") if task else None,
        "prox_strength": task.get("prox_strength"),
        **{key: value for key, value in task.items() if str(key).startswith("prox_")},
        "seed": config_section(checkpoint, "common").get("seed"),
        "updates": last.get("num_updates") if isinstance(last, dict) else None,
    }
    _, recorded = task_entry(checkpoint)  # such as what a default resolved to
    if settings["prox_strength"] is None:
        settings["prox_strength"] = recorded.get("prox_strength")
    if "prox_frozen_at" in recorded:
        settings["prox_freeze_update"] = recorded["prox_frozen_at"]
    return {
        key: value for key, value in settings.items() if isinstance(value, str | int | float | bool)
    }


def _row(name: str, tally: Mapping[str, int]) -> tuple[str, ...]:
    numbers = (f"{tally[key]:,}" for key in ("total", "alive", "pruned"))
    return (name, *numbers, _percent(tally["pruned"], tally["total"]))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"

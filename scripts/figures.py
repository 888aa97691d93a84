"""The figures of docs/: what died when and where, and size against quality."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Result = Mapping[str, Any]
COLOURS = pyplot.get_cmap("tab20").colors


def colours(runs: Iterable[str]) -> dict[str, Any]:
    """A colour for each run, the same in all figures that are drawn of these runs."""
    return {run: COLOURS[number % 20] for number, run in enumerate(dict.fromkeys(runs))}


def save(path: Path, axes: Axes, title: str, xlabel: str, ylabel: str, **options: Any) -> None:
    """Label a figure, write it as PNG and close it."""
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, **options)
    axes.grid(alpha=0.3)
    _, labels = axes.get_legend_handles_labels()
    if labels:
        columns = 2 if max(map(len, labels)) <= 30 else 1
        axes.legend(frameon=False, fontsize="small", ncols=columns)
    axes.figure.savefig(path, dpi=120)
    pyplot.close(axes.figure)


def save_panels(path: Path, figure: Figure, title: str) -> None:
    """Title a figure of several axes, with the first one's legend below all; write and close it."""
    figure.suptitle(title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small"
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def canvas() -> Axes:
    """Axes of a figure of the pages' width."""
    _, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    return axes


def alive_over_updates(results: Mapping[str, Result], title: str, path: Path) -> None:
    """Neurons alive over the updates, for the runs that have a prox; no file if none has."""
    axes = canvas()
    colour = colours(results)
    for run, result in results.items():
        points = [
            (p["update"], p["neurons_alive"]) for p in result["history"] if "neurons_alive" in p
        ]
        if points:
            style = "--" if "linf1" in run else "-"
            axes.plot(*zip(*sorted(points), strict=True), style, label=run, color=colour[run])
    if axes.lines:
        save(path, axes, title, "updates", "neurons alive", ylim=(0, None))
    else:
        pyplot.close(axes.figure)


def alive_by_layer(results: Mapping[str, Result], title: str, path: Path) -> None:
    """Neurons that are left against depth, encoder and decoder side by side."""
    figure, both = pyplot.subplots(1, 2, figsize=(6.4, 3.2), sharey=True, layout="constrained")
    sized = {
        run: result
        for run, result in results.items()
        if any(layer["pruned"] for layer in result["neurons"]["layers"])
    }
    colour = colours(results)
    for axes, side in zip(both, ("encoder", "decoder"), strict=True):
        for run, result in sized.items():
            layers = result["neurons"]["layers"]
            alive = [layer["alive"] for layer in layers if layer["name"].startswith(side)]
            depth = range(1, len(alive) + 1)
            axes.plot(depth, alive, "o-", label=run, color=colour[run])
            axes.set(title=side, xlabel="layer", xticks=depth)
        axes.grid(alpha=0.3)
    both[0].set_ylim(0, None)  # shared, so only once all is drawn
    both[0].set_ylabel("neurons alive")
    save_panels(path, figure, title)


def bleu_over_updates(results: Mapping[str, Result], title: str, path: Path) -> None:
    """BLEU and loss of the validations over the updates, of runs that chose by BLEU."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(6.4, 3.2), layout="constrained")
    for run, result in results.items():
        bleu = sorted((int(n), score) for n, score in result["BLEU valid"].items())
        losses = [(p["update"], p["valid_loss"]) for p in result["history"] if "valid_loss" in p]
        left.plot(*zip(*bleu, strict=True), "o-", label=run)
        right.plot(*zip(*sorted(losses), strict=True), "o-")
    for axes, measure in ((left, "BLEU"), (right, "loss")):
        axes.set(xlabel="updates", ylabel=f"{measure} (validation)")
        axes.grid(alpha=0.3)
    save_panels(path, figure, title)


def size_against_bleu(
    groups: Mapping[str, Sequence[Result]], split: str, title: str, path: Path
) -> None:
    """BLEU against the parameters left, a point a run (the mean of its seeds, and their range)."""
    axes = canvas()
    colour = colours(groups)
    for run, results in groups.items():
        scores = [result["scores"][split]["BLEU"]["score"] for result in results]
        millions = mean(result["neurons"]["parameters"]["compact"] for result in results) / 1e6
        middle = mean(scores)
        spread = [[middle - min(scores)], [max(scores) - middle]]
        marker = "o" if any(n["neurons"]["ffn_neurons"]["pruned"] for n in results) else "s"
        bars = spread if len(results) > 1 else None
        axes.errorbar(millions, middle, bars, fmt=marker, color=colour[run], label=run, capsize=3)
    save(path, axes, title, "parameters left, millions", f"BLEU ({split})", xlim=(0, None))


def bleu_against_strength(
    points: Mapping[str, Sequence[tuple[float, float]]],
    levels: Mapping[str, float],
    split: str,
    title: str,
    path: Path,
) -> None:
    """BLEU against λ, a line an operator; models without a prox as horizontal lines.

    Args:
        points: operator -> (λ as a multiple of the operator's default, BLEU).
        levels: name -> BLEU.
    """
    axes = canvas()
    for operator, line in points.items():
        axes.plot(*zip(*sorted(line), strict=True), "o-", label=operator)
    for number, (name, score) in enumerate(levels.items()):
        axes.axhline(score, color=str(0.3 + 0.2 * number), linestyle=":", label=name)
    save(path, axes, title, "λ, in units of the operator's default", f"BLEU ({split})")


def gain_over_pairs(
    gained: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]], title: str, path: Path
) -> None:
    """What a score is above the dense model's against the number of training pairs.

    Args:
        gained: measure -> run -> pairs -> gains, one a seed; each is a point, their means a line.
    """
    figure, panels = pyplot.subplots(1, len(gained), figsize=(6.4, 3.2), layout="constrained")
    for axes, (measure, runs) in zip(panels, gained.items(), strict=True):
        for number, (run, by_pairs) in enumerate(runs.items()):
            points = sorted(by_pairs.items())
            middle = [(n, mean(each)) for n, each in points]
            axes.plot(*zip(*middle, strict=True), "o-", label=run)
            singles = [(n * (1 + 0.03 * number), gain) for n, each in points for gain in each]
            axes.plot(*zip(*singles, strict=True), ".", color=axes.lines[-1].get_color(), alpha=0.5)
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.set(xscale="log", xlabel="training pairs", ylabel=f"{measure} more than dense")
        axes.set_xticks(sizes := sorted({n for runs_ in runs.values() for n in runs_}))
        axes.set_xticklabels([f"{n:,}" for n in sizes], fontsize="x-small", rotation=30)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    save_panels(path, figure, title)


def widths(result: Result, uniform: int, title: str, path: Path) -> None:
    """What auto-sizing left of each layer, before what it began with.

    Args:
        uniform: neurons a layer of a uniform model of the same size, a dashed line.
    """
    _, axes = pyplot.subplots(figsize=(6.4, 2.8), layout="constrained")
    layers = result["neurons"]["layers"]
    names = [layer["name"].replace("coder.layers.", "coder ") for layer in layers]
    names = [f"{side} {int(number) + 1}" for side, number in map(str.split, names)]
    axes.bar(names, [layer["total"] for layer in layers], color="0.9", label="before")
    alive = [layer["alive"] for layer in layers]
    axes.bar_label(axes.bar(names, alive, label="auto-sized", color="C0"), fontsize="small")
    axes.axhline(uniform, color="0.4", linestyle="--", label="uniform, of the same size")
    axes.tick_params(axis="x", labelsize="small")
    axes.set(ylim=(0, 1.12 * max(layer["total"] for layer in layers)))
    axes.figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    axes.set(title=title, ylabel="neurons")
    axes.figure.savefig(path, dpi=120)
    pyplot.close(axes.figure)


def by_schedule(
    scores: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], title: str, path: Path
) -> None:
    """BLEU of several models by the learning rate's schedule, a bar a model; seeds are points.

    Args:
        scores: data -> schedule -> run -> BLEU, one a seed; a run may lack some schedules.
    """
    rows = (len(scores) + 1) // 2
    figure, panels = pyplot.subplots(
        rows, 2, figsize=(6.4, 2.6 * rows), sharey=True, layout="constrained", squeeze=False
    )
    runs = list(
        dict.fromkeys(run for found in scores.values() for by in found.values() for run in by)
    )
    for axes, (data, schedules) in zip(panels.flat, scores.items(), strict=False):
        for number, run in enumerate(runs):
            bars = {
                place + 0.27 * (number - (len(runs) - 1) / 2): found[run]
                for place, found in enumerate(schedules.values())
                if run in found
            }
            axes.bar(list(bars), list(map(mean, bars.values())), width=0.25, label=run, alpha=0.6)
            singles = [(x, score) for x, found in bars.items() for score in found]
            axes.plot([x for x, _ in singles], [y for _, y in singles], "k.", markersize=5)
        axes.set_title(data, fontsize="medium")
        axes.set_xticks(range(len(schedules)), list(schedules), fontsize="small")
        axes.grid(alpha=0.3, axis="y")
    for axes in panels.flat[len(scores) :]:
        axes.remove()
    for axes in panels[:, 0]:
        axes.set_ylabel("BLEU (test)")
    save_panels(path, figure, title)


def by_size(
    scores: Mapping[str, Mapping[str, Sequence[tuple[float, Sequence[float]]]]],
    levels: Mapping[str, Mapping[str, float]],
    title: str,
    path: Path,
) -> None:
    """BLEU against the parameters left; seeds are points, their means lines.

    Args:
        scores: data -> line -> (parameters in millions, BLEU, one a seed).
        levels: another model -> data -> its BLEU, a horizontal line; it may lack some data.
    """
    figure, panels = pyplot.subplots(1, len(scores), figsize=(6.4, 3.2), layout="constrained")
    for axes, (data, lines) in zip(panels, scores.items(), strict=True):
        for marker, (line, found) in zip("os", lines.items(), strict=False):
            points = sorted((size, mean(each)) for size, each in found)
            axes.plot(*zip(*points, strict=True), f"{marker}-", label=line, alpha=0.8)
            singles = [(size, score) for size, each in found for score in each]
            axes.plot(*zip(*singles, strict=True), ".", color=axes.lines[-1].get_color(), alpha=0.5)
        for style, (level, by_data) in zip((":", "--"), levels.items(), strict=False):
            if data in by_data:
                axes.axhline(by_data[data], color="0.4", linestyle=style, label=level)
        axes.set_title(data, fontsize="medium")
        axes.set_xlabel("parameters, millions")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("BLEU (test)")
    save_panels(path, figure, title)


def bleu_against_source_use(
    points: Mapping[str, Sequence[tuple[float, float, float]]], title: str, path: Path
) -> None:
    """BLEU against what the source tells models, and against their loss; a point a model.

    Args:
        points: kind of model -> (bits that the source tells, loss in bits, BLEU).
    """
    figure, panels = pyplot.subplots(1, 2, figsize=(6.4, 3.2), sharey=True, layout="constrained")
    labels = ("bits a subword from the source", "loss (validation), bits a subword")
    for place, (axes, label) in enumerate(zip(panels, labels, strict=True)):
        for marker, (kind, models) in zip("so^D", points.items(), strict=True):
            found = [(model[place], model[2]) for model in models]
            axes.plot(*zip(*found, strict=True), marker, label=kind, alpha=0.8)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("BLEU (test)")
    save_panels(path, figure, title)

"""A page on one or several trainings: what died when, what it cost, and what is left."""

import base64
import contextlib
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from . import __version__
from .checkpoint import CheckpointError, printable, read_checkpoint, writing
from .groups import GroupError
from .report import count_neurons
from .training_log import TrainingLog

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_UPDATE = re.compile(r"(?:--max-update[ =]|optimization\.max_update=)(\d{1,15})\b")
_TIME = re.compile(r"\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\b")
# The last lines of fairseq-generate.
_TRANSLATED = re.compile(r"Translated [\d,]+ sentences .* ([\d.]+) tokens/s\)")
_GENERATED = re.compile(
    r"^Generate (\S+) with beam=\d+: (BLEU\d?|chrF2?)\S*(?:\|(\S+))? = ([\d.]+)", re.M
)


# Of the figures: inches, small so that their text is large on a phone; and percent, where a line at
# 0 is not hidden by the axis.
_WIDTH = 5.2
_PERCENT = (-2, 103)


@dataclass
class Run:
    """One training.

    Attributes:
        name: for tables and legends.
        log: what its logs tell.
        count: `report.count_neurons` of its checkpoint, or None where there is none to read.
        scores: BLEU by name of the test set.
        tokens_per_second: of translating, as fairseq-generate told, by name of the test set.
        signatures: of the scores, for people.
        problems: what could not be read, in a line each.
    """

    name: str
    log: TrainingLog
    count: dict[str, Any] | None = None
    scores: dict[str, float] = field(default_factory=dict)
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    signatures: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class ReportError(Exception):
    """A run, or an output, that cannot be used; the message says which and why."""


def read_run(path: str | os.PathLike[str], name: str | None = None) -> Run:
    """Read a training's folder: logs (``*.log``), checkpoint, scores and speed of translation.

    The checkpoint is ``checkpoint_selected.pt`` (of scripts/grid.py), else ``checkpoint_last.pt``,
    else that in ``checkpoints``, where fairseq-hydra-train puts it.
    Scores are those of scripts/grid.py and experiment.py (``result.json``), or the last lines of
    fairseq-generate in ``*.txt`` and ``*.out``.

    Args:
        path: the folder, or a log alone.
        name: by default the folder's.

    Raises:
        ReportError: there is no log of a training.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    logs = [path]
    if path.is_dir():
        logs = [file for file in path.glob("*.log") if file.is_file()]
    log = TrainingLog()
    try:
        logs.sort(key=_begun)
        for file in logs:
            log.read(file)
    except OSError as error:
        raise ReportError(f"{error.filename or path}: cannot read: {error.strerror}") from error
    if not log.train and not log.valid:
        looked = "no *.log in it" if not logs else f"none in {', '.join(str(f) for f in logs)}"
        raise ReportError(
            f"{path}: no progress lines of fairseq-train ({looked}); give a folder with its log "
            "(fairseq-train ... 2>&1 | tee -a FOLDER/train.log), or the log itself"
        )
    run = Run(printable(name or path.resolve().name), log)
    if path.is_dir():
        names = ("checkpoint_selected.pt", "checkpoint_last.pt", "checkpoints/checkpoint_last.pt")
        found = [folder / name for name in names if (folder / name).exists()]
        _read_checkpoint(run, found[0] if found else folder / "checkpoint_last.pt")
        _read_scores(run, folder)
    return run


def _begun(log: Path) -> tuple[str, str]:
    """When a log was begun, by the first of its lines that tells; for sorting.

    The file's own time may be that of a copy, which has the logs in any order, and the updates of
    an earlier one that is read later would pass for a new start's.
    """
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in itertools.islice(lines, 1000):
            if found := _TIME.search(line):
                return found[0], log.name
    changed = datetime.fromtimestamp(log.stat().st_mtime)
    return changed.isoformat(" ", "seconds"), log.name


def tokens_per_second(output: str) -> float | None:
    """Speed of translation, as fairseq-generate tells it at the end of its output."""
    told = _TRANSLATED.search(output)
    return float(told[1]) if told else None


def _read_checkpoint(run: Run, path: Path) -> None:
    if not path.exists():
        run.problems.append(f"{run.name}: no {path.name} yet, so sizes are those in the log")
        return
    try:
        run.count = count_neurons(read_checkpoint(path))
    except (CheckpointError, GroupError) as error:
        run.problems.append(f"{run.name}: {error}")


def _read_scores(run: Run, folder: Path) -> None:
    result = folder / "result.json"
    if result.exists():
        try:
            told = json.loads(result.read_text(encoding="utf-8"))
            for split, scores in _test_sets_first(told["scores"]):
                run.scores[split] = _finite(scores["BLEU"]["score"])
                run.signatures.append(f"{split}: BLEU {scores['BLEU']['signature']}")
            for split, speed in _test_sets_first(told.get("tokens_per_second", {})):
                if speed is not None:
                    run.tokens_per_second[split] = _finite(speed)
            # Without a prox the task itself does not log it.
            for command in told.get("commands", [])[:1]:
                run.log.notes.setdefault("command", str(command))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            run.problems.append(f"{run.name}: {result}: no scores as expected: {error!r}")
        return
    files = [file for end in ("*.txt", "*.out") for file in folder.glob(end) if file.is_file()]
    told_by: dict[str, Path] = {}
    for file in sorted(files, key=lambda file: (file.stat().st_mtime, file)):
        try:
            with file.open("rb") as lines:
                lines.seek(max(0, file.stat().st_size - 2000))
                end = lines.read().decode(errors="replace")
        except OSError as error:
            run.problems.append(f"{run.name}: {file}: cannot read: {error.strerror}")
            continue
        speed = tokens_per_second(end)
        for split, metric, signature, score in _GENERATED.findall(end):
            if speed is not None:
                run.tokens_per_second[split] = speed
            if metric.startswith("BLEU"):
                if told_by.get(split, file) != file:
                    run.problems.append(
                        f"{run.name}: {told_by[split].name} and {file.name} have BLEU of {split}; "
                        f"shown is that of {file.name}, which is newer"
                    )
                    run.signatures = [s for s in run.signatures if not s.startswith(f"{split}: ")]
                told_by[split] = file
                run.scores[split] = float(score)
                run.signatures.append(f"{split}: {metric} {signature}".strip())


def _test_sets_first(found: dict[str, Any]) -> list[tuple[str, Any]]:
    """What there is by data set; scripts/grid.py has the validation set first."""
    return sorted(found.items(), key=lambda item: item[0] == "valid")


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no score or speed")
    return number


# --- the figures ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plot:
    """A figure, its name for files, and what it shows."""

    name: str
    caption: str
    figure: "Figure"

    @property
    def svg(self) -> str:
        """Base64 of the SVG."""
        data = io.BytesIO()
        self.figure.savefig(data, format="svg", metadata={"Date": None})
        return base64.b64encode(data.getvalue()).decode("ascii")


def draw(runs: Sequence[Run]) -> list[_Plot]:
    """The figures for which the runs have data, with matplotlib.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the report's figures need matplotlib: pip install 'fairseq-autosize[plot]'"
        ) from error
    plots = []

    def add(name: str, caption: str, fill: Callable[["Axes"], None], **labels: str) -> None:
        figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
        axes = figure.add_subplot()
        fill(axes)
        axes.set(**labels)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        if labelled := axes.get_legend_handles_labels()[1]:
            # A column takes up to 7.5 of 100 pixels an inch a letter, and 30 for its line and gap.
            columns = int(100 * _WIDTH / (30 + 7.5 * max(map(len, labelled))))
            columns = max(1, min(3, columns))
            figure.legend(frameon=False, fontsize="small", loc="outside upper left", ncols=columns)
        plots.append(_Plot(name, caption, figure))

    colours = {run.name: _colour(index) for index, run in enumerate(runs)}
    alive = {run.name: _share_alive(run) for run in runs}
    if any(alive.values()):

        def neurons(axes: "Axes") -> None:
            for name, points in alive.items():
                if points:
                    axes.plot(*zip(*points, strict=True), color=colours[name], label=_label(name))
            axes.set_ylim(*_PERCENT)

        add(
            "neurons",
            "Neurons alive over the updates, in percent of those at the start.",
            neurons,
            xlabel="updates",
            ylabel="neurons alive, %",
        )
    widths = {run.name: final for run in runs if (final := _final(run))}
    if widths:
        add(
            "widths",
            "Neurons alive in the checkpoint, layer by layer (e: encoder, d: decoder).",
            lambda axes: _bars(axes, widths, colours),
            ylabel="neurons alive",
        )
    if any(run.log.valid for run in runs):
        valid = [run.log.series("valid", "loss") for run in runs]

        def losses(axes: "Axes") -> None:
            for run in runs:
                for part, style in (
                    ("train", {"alpha": 0.35, "lw": 1}),
                    ("valid", {"marker": "."}),
                ):
                    points = run.log.series(part, "loss")
                    label = _label(run.name) if part == "valid" else None
                    if points:
                        x, y = zip(*points, strict=True)
                        axes.plot(x, y, color=colours[run.name], label=label, **style)
            # The first epochs would take most of the height, and what a training learns by heart.
            # One that diverged has NaN.
            best = min((y for points in valid for _, y in points if math.isfinite(y)), default=0)
            if best > 0:
                axes.set_ylim(max(axes.get_ylim()[0], 0.8 * best), 1.4 * best)

        add(
            "loss",
            "Loss over the updates: of the validation (dots), and of the training (faint; not all "
            "of it is in the range shown).",
            losses,
            xlabel="updates",
            ylabel="loss",
        )
    bleu = {run.name: points for run in runs if (points := run.log.series("valid", "bleu"))}
    if bleu:

        def scores(axes: "Axes") -> None:
            for name, points in bleu.items():
                x, y = zip(*points, strict=True)
                axes.plot(x, y, color=colours[name], label=_label(name), marker=".")

        add(
            "bleu",
            "BLEU on the validation set over the updates, as --eval-bleu measured it.",
            scores,
            xlabel="updates",
            ylabel="BLEU (validation)",
        )
    quality, label, better = _quality(runs)
    if quality:

        def trade_off(axes: "Axes") -> None:
            for (run, (parameters, value)), marker in zip(
                quality.items(), itertools.cycle("os^Dv"), strict=False
            ):
                options = {"color": colours[run], "label": _label(run), "alpha": 0.7}
                axes.plot(parameters / 1e6, value, marker, **options)
            low, high = axes.get_ylim()
            if (missing := (0.1 if better == "lower" else 2.0) - (high - low)) > 0:
                # Not all of the height for a difference that is none.
                axes.set_ylim(low - missing / 2, high + missing / 2)
            if better == "lower":
                axes.invert_yaxis()
            axes.set_xlim(0, None)

        add(
            "size",
            f"{label} against the parameters that are left after compaction; up is better.",
            trade_off,
            xlabel="parameters after compaction, millions",
            ylabel=label,
        )

    def add_speeds(name: str, what: str, unit: str, speeds: dict[str, float]) -> None:
        if len(speeds) < 2:
            return

        def bars(axes: "Axes") -> None:
            names = [_label(run) for run in speeds]
            axes.barh(names, list(speeds.values()), color=[colours[run] for run in speeds])
            axes.invert_yaxis()

        note = "Runs made at different times or side by side are no benchmark."
        caption = f"{what} per second, as fairseq logged them. {note}"
        add(name, caption, bars, xlabel=unit)

    speeds = {run.name: speed for run in runs if (speed := _speed(run)) is not None}
    add_speeds("speed", "Updates", "updates / s", speeds)
    split, speeds = _translation_speed(runs)
    add_speeds("translation-speed", f"Tokens of {split} translated", "tokens / s", speeds)
    for run in runs:
        if run.log.layers:
            add(
                f"layers-{_file_name(run.name)}",
                f"{run.name}: what is alive in each layer over the updates, in percent; the "
                "darkest is the lowest layer.",
                lambda axes, run=run: _layers(axes, run),
                title=_label(run.name),
                xlabel="updates",
                ylabel="alive, %",
            )
    return plots


def _colour(index: int) -> tuple[float, ...]:
    """matplotlib's ten colours, and then the light form of each."""
    from matplotlib import colormaps

    return colormaps["tab20"](index % 10 * 2 + index // 10 % 2)


def _label(name: str) -> str:
    """A name for matplotlib, to which dollar signs begin a formula, and _ what has no legend."""
    name = name.replace("$", r"\$")
    return f"\u200b{name}" if name.startswith("_") else name  # a space of no width


def _share_alive(run: Run) -> list[tuple[int, float]]:
    alive, full = _alive_of(run)
    return [(u, 100 * n / full) for u, n in alive if full]


def _alive_of(run: Run) -> tuple[list[tuple[int, float]], float]:
    """(update, neurons alive), and how many there were at the start; 0 where no log tells."""
    pruned = dict(run.log.series("train", "neurons_pruned"))
    alive = [(u, n) for u, n in run.log.series("train", "neurons_alive") if u in pruned]
    # A compaction on the way makes the total smaller.
    return alive, max((n + pruned[u] for u, n in alive), default=0)


def _layers(axes: "Axes", run: Run) -> None:
    from matplotlib import colormaps

    updates = sorted(run.log.layers)
    kinds = list(run.log.layers[updates[-1]])
    names = itertools.cycle(("Blues_r", "Oranges_r", "Greens_r", "Purples_r", "Greys_r"))
    maps = dict(zip(kinds, names, strict=False))
    for kind in kinds:
        counts = [run.log.layers[update].get(kind) for update in updates]
        depth = len(counts[-1])
        colours = [colormaps[maps[kind]](0.7 * layer / depth) for layer in range(depth)]
        for layer, colour in enumerate(colours):
            full = _full(run, kind, layer, counts)
            points = [
                (update, 100 * now[layer] / full)
                for update, now in zip(updates, counts, strict=True)
                if full and now and len(now) == depth
            ]
            label = f"{kind} {layer + 1}" if depth <= 3 or layer in (0, depth - 1) else None
            if points:
                points.append((max(run.log.train, default=points[-1][0]), points[-1][1]))
                axes.step(*zip(*points, strict=True), where="post", color=colour, label=label)
    axes.set_ylim(*_PERCENT)


def _full(run: Run, kind: str, layer: int, counts: Sequence[list[int] | None]) -> int:
    """How many a layer had: in the checkpoint, or more before a compaction."""
    blocks = [] if run.count is None else _blocks(run.count)
    totals = [block["total"] for block in blocks if block["kind"] == kind][layer : layer + 1]
    seen = [now[layer] for now in counts if now and layer < len(now)]
    return max([*totals, *seen], default=0)


def _blocks(count: dict[str, Any]) -> list[dict[str, Any]]:
    """The feed-forward layers, and the attention if any of it has lost heads."""
    heads = count["attention"] if count["attention_heads"]["pruned"] else []
    return [*count["layers"], *heads]


def _final(run: Run) -> dict[str, int]:
    """Neurons alive by short name of the layer, such as e1 or d3."""
    if run.count is None:
        return {}
    numbers: dict[str, int] = {}
    result = {}
    for layer in run.count["layers"]:
        side = layer["kind"][0]
        numbers[side] = numbers.get(side, 0) + 1
        result[f"{side}{numbers[side]}"] = layer["alive"]
    return result


def _bars(axes: "Axes", widths: dict[str, dict[str, int]], colours: dict[str, str]) -> None:
    names = sorted(
        {layer for final in widths.values() for layer in final},
        key=lambda layer: (layer[0] != "e", int(layer[1:])),
    )
    wide = 0.8 / len(widths)
    for index, (run, final) in enumerate(widths.items()):
        at = [i + (index - (len(widths) - 1) / 2) * wide for i in range(len(names))]
        heights = [final.get(n, math.nan) for n in names]
        drawn = axes.bar(at, heights, wide, color=colours[run], label=_label(run))
        zeros = ["0" if height == 0 else "" for height in heights]  # not to be seen else
        axes.bar_label(drawn, zeros, color=colours[run], fontsize="x-small")
    axes.set_xticks(range(len(names)), names)


def _quality(runs: Iterable[Run]) -> tuple[dict[str, tuple[int, float]], str, str]:
    """(parameters, value) by run, what the value is, and which direction is better.

    BLEU on the first test set that most runs have; without any, the last validation's BLEU where
    all have it, or else its loss.
    """
    runs = [run for run in runs if run.count is not None]
    splits = [split for run in runs for split in run.scores]
    if splits:
        split = max(dict.fromkeys(splits), key=splits.count)
        values = {run.name: run.scores[split] for run in runs if split in run.scores}
        label, better = f"BLEU ({split})", "higher"
    else:
        values, label, better = _last(runs, "loss"), "last validation loss", "lower"
        bleu = _last(runs, "bleu")
        if bleu.keys() >= values.keys():
            values, label, better = bleu, "last validation BLEU", "higher"
    sizes = {run.name: run.count["parameters"]["compact"] for run in runs}
    return {name: (sizes[name], value) for name, value in values.items()}, label, better


def _last(runs: Iterable[Run], meter: str) -> dict[str, float]:
    """What the last validation told, by run."""
    series = {run.name: run.log.series("valid", meter) for run in runs}
    values = {name: points[-1][1] for name, points in series.items() if points}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _speed(run: Run) -> float | None:
    rates = [value for _, value in run.log.series("train", "ups") if 0 < value < math.inf]
    return median(rates) if rates else None


def _translation_speed(runs: Iterable[Run]) -> tuple[str, dict[str, float]]:
    """The first test set that all have that have any, and tokens per second on it by run."""
    timed = [run for run in runs if run.tokens_per_second]
    for split in timed[0].tokens_per_second if timed else ():
        if all(split in run.tokens_per_second for run in timed):
            return split, {run.name: run.tokens_per_second[split] for run in timed}
    return "", {}


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]", "-", text)


# --- the page -------------------------------------------------------------------------------------


def _tables(runs: Sequence[Run]) -> list[tuple[list[str], list[list[str]]]]:
    """What is left and how good it is, and the way there; columns that no run has are left out."""
    splits = list(dict.fromkeys(split for run in runs for split in run.scores))
    left = ["checkpoint of update", "neurons alive", "heads alive", "parameters left"]
    left += [f"BLEU ({split})" for split in splits]
    way = ["updates", "validation loss of the checkpoint", "best validation loss (update)"]
    way += ["last validation loss", "best validation BLEU (update)", "last validation BLEU"]
    split, translated = _translation_speed(runs)
    way += ["updates / s", speed_column := f"tokens / s, translating {split}"]
    rows = []
    for run in runs:
        last = max([*run.log.train, *run.log.valid])
        asked = _MAX_UPDATE.findall(run.log.notes.get("command", ""))
        whole = f" of {int(asked[-1]):,}" if asked and int(asked[-1]) > last else ""
        cells = {
            "run": run.name,
            "updates": f"{last:,}{whole}",
            **{f"BLEU ({split})": f"{score:.1f}" for split, score in run.scores.items()},
        }
        if run.count is not None:
            if (update := run.count["updates"]) is not None:  # what follows is of then
                cells["checkpoint of update"] = f"{update:,}"
                if (loss := run.log.valid.get(update, {}).get("loss")) is not None:
                    cells["validation loss of the checkpoint"] = f"{loss:.3f}"
            neurons, heads = run.count["ffn_neurons"], run.count["attention_heads"]
            cells["neurons alive"] = f"{neurons['alive']:,} of {neurons['total']:,}"
            if heads["pruned"]:
                cells["heads alive"] = f"{heads['alive']:,} of {heads['total']:,}"
            cells["parameters left"] = f"{run.count['parameters']['compact']:,}"
        elif points := run.log.series("train", "neurons_alive"):
            _, full = _alive_of(run)
            cells["neurons alive"] = f"{points[-1][1]:,.0f}" + (f" of {full:,.0f}" if full else "")
        if losses := run.log.series("valid", "loss"):
            finite = [(loss, update) for update, loss in losses if math.isfinite(loss)]
            best = "{:.3f} ({:,})".format(*min(finite)) if finite else "nan"
            cells |= {
                "best validation loss (update)": best,
                "last validation loss": f"{losses[-1][1]:.3f}",
            }
        if bleu := run.log.series("valid", "bleu"):
            best, update = max((score, -update) for update, score in bleu)
            cells["best validation BLEU (update)"] = f"{best:.1f} ({-update:,})"
            cells["last validation BLEU"] = f"{bleu[-1][1]:.1f}"
        if (speed := _speed(run)) is not None:
            cells["updates / s"] = f"{speed:.3g}"
        if run.name in translated:
            cells[speed_column] = f"{translated[run.name]:,.0f}"
        rows.append(cells)
    tables = []
    for columns in (left, way):
        columns = [column for column in columns if any(column in row for row in rows)]
        if columns:
            columns.insert(0, "run")
            tables.append((columns, [[row.get(c, "–") for c in columns] for row in rows]))
    return tables


def _details(run: Run) -> dict[str, Any]:
    widths = []
    if run.count is not None:
        blocks = _blocks(run.count)
        for kind in dict.fromkeys(block["kind"] for block in blocks):
            own = [block for block in blocks if block["kind"] == kind]
            totals = " ".join(str(n) for n in dict.fromkeys(block["total"] for block in own))
            widths.append((kind, [block["alive"] for block in own], totals))
    elif run.log.layers:
        widths = [(kind, now, "") for kind, now in run.log.layers[max(run.log.layers)].items()]
    scores: dict[str, list[str]] = {}
    for signature in run.signatures:
        split, _, text = signature.partition(": ")
        scores.setdefault(text, []).append(split)
    noted = run.log.notes.get("signature")
    return {
        "name": run.name,
        "widths": widths,
        "deepest": max((len(counts) for _, counts, _ in widths), default=0),
        "signature": run.count["signature"] if run.count is not None else noted,
        "command": run.log.notes.get("command"),
        "scores": [f"{', '.join(splits)}: {text}" for text, splits in scores.items()],
    }


def write_report(
    runs: Sequence[Run],
    output: str | os.PathLike[str],
    title: str = "Auto-sized training",
    plots: str | os.PathLike[str] | None = None,
    force: bool = False,
    made_by: str = "fairseq-autosize report",
) -> list[Path]:
    """Write one self-contained HTML page, and the figures as PNG files if asked for.

    Args:
        runs: as `read_run` gives them, with distinct names.
        output: the page.
        title: its heading.
        plots: a folder for the PNG files, made if it is not there.
        force: overwrite.
        made_by: the command, for the last line.

    Returns:
        The files written.

    Raises:
        CheckpointError: a file exists and `force` is not set, or cannot be written; then none is.
        ReportError: two of the files have the same name, or the folder cannot be made.
        ImportError: matplotlib or jinja2 is not installed.
    """
    import jinja2  # comes with torch

    drawn = draw(runs)
    tables = _tables(runs)
    source = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(source)
    page = template.render(
        title=title,
        version=__version__,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        notes=[note for run in runs for note in run.problems],
        tables=tables,
        speeds=any("/ s" in column for columns, _ in tables for column in columns),
        figures=drawn,
        runs=[_details(run) for run in runs],
        made_by=made_by,
    )
    images = {} if plots is None else _images(drawn, Path(plots), Path(output))
    # All files are opened before the first one is written, and replaced after the last one was.
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(writing(output, force))
        if plots is not None:
            _make_folder(Path(plots))
        files = [stack.enter_context(writing(path, force)) for path in images]
        file.write(page.encode("utf-8"))
        for plot, image in zip(images.values(), files, strict=True):
            plot.figure.savefig(image, format="png", dpi=150)
    return [Path(output), *images]


def _images(drawn: Sequence[_Plot], folder: Path, page: Path) -> dict[Path, _Plot]:
    """The figures by the PNG files to write, no two of which, nor the page, may be the same."""
    images: dict[Path, _Plot] = {}
    for plot in drawn:
        path = folder / f"{plot.name}.png"
        if path in images or path.absolute() == page.absolute():
            raise ReportError(
                f"{path}: two files to write have this name; name the runs (NAME=RUN) or the page "
                "otherwise"
            )
        images[path] = plot
    return images


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ReportError(f"{folder}: cannot make the folder: there is a file") from error
    except OSError as error:
        raise ReportError(f"{folder}: cannot make the folder: {error.strerror}") from error

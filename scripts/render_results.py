#!/usr/bin/env python3
"""Put the tables of docs/results/*.json into the pages docs/*.md, and draw the figures.

    python scripts/render_results.py [--check]

Each JSON file is the results.json of one scripts/experiment.py, or, with a "kind", what
scripts/grid.py, bench_inference.py, compare_engines.py or source_use.py wrote. Its tables replace
what stands in a page between `<!-- table NAME -->` (for a grid `<!-- grid NAME -->`) and
`<!-- end -->`; NAME is the file's name without `.json`. `<!-- targets NAME NAME ... -->` puts one
table of requested and reached sparsities there, `<!-- seeds NAME NAME ... -->` the means of runs
with several seeds, `<!-- gains NAME NAME ... -->` what several grids gain over the dense model, and
`<!-- schedules NAME ... -->` what their runs have with several learning rates or warm-ups.

Those figures are drawn that a page shows: NAME.png, the neurons alive over the updates; for a grid
also NAME-layers.png, what is left in each layer, NAME-size.png, size against BLEU, and
NAME-bleu.png, BLEU and loss of the validations over the updates (`select: bleu`); gains.png, what
is gained against the number of pairs, schedules.png, BLEU by learning rate and warm-up, sizes.png,
BLEU against size, source-use.png, BLEU against what the source tells the models, and widths.png (in
README.md), what is left of each layer. --check writes nothing and fails if a table on a page is not
up to date.
"""

import argparse
import itertools
import json
import logging
import re
import shlex
import sys
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import bench_inference
import benchmark_operators
import compare_engines
import grid_results
import source_use
from experiment import RUN, by_kind_and_value, table

from fairseq_autosize.strength import default_strength

DOCS = Path(__file__).parent.parent / "docs"

# Rows of a grid that are compared with its dense model; and those with a tenth of the neurons.
WAYS = ("narrow", "l21-target", "l21-target-adam")
TENTH = ("narrow-102", "l21-target-adam-90-percent")
# What figures call the data sets and files of results.
TITLES = {
    "hau-en": "Hausa-English",
    "lug-en": "Luganda-English",
    "yor-en": "Yoruba-English",
    "ibo-en-dropout-0.3": "Igbo-English, dropout 0.3",
    "de-en-3000": "Multi30k, 3,000 pairs",
    "mafand-hau-en": "Hausa-English",
    "multi30k-de-en": "German-English (Multi30k)",
    "de-en-29000": "German-English (Multi30k)",
    "half-embedded": "Embedded corpus, half of the neurons to go",
    "half-multi30k-de-en": "German-English (Multi30k), half of the neurons to go",
}
# Low-resource data that every way was run on, by the grid.
LOW_RESOURCE = (
    ("mafand-wide", "hau-en"),
    ("mafand-wide", "ibo-en-dropout-0.3"),
    ("multi30k-3000", "de-en-3000"),
)
# Grids of one model on data of several sizes.
SIZES = ("multi30k-3000", "multi30k-sizes")


def section(path: Path) -> str:
    """The Markdown between the markers for one file of results."""
    summary = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    machine = summary["machine"]
    shown = {
        "inference": bench_inference.tables,
        "engines": compare_engines.table,
        "source": source_use.table,
    }
    if "kind" in summary:
        return "\n".join(
            [
                shown[summary["kind"]](summary),
                "",
                f"- `{summary['command']}`",
                f"- {machine['processor']}, threads a process: {machine['threads']}. {versions}.",
            ]
        )
    results = summary["results"]
    signatures = {
        score["signature"] for result in results for score in result["scores"]["test"].values()
    }
    settings = sorted({(result["updates"], result["seed"]) for result in results})
    return "\n".join(
        [
            table(results),
            "",
            *(f"- {updates:,} updates, seed {seed}." for updates, seed in settings),
            f"- `python scripts/prepare_data.py {summary['data']['command']}`",
            f"- `{summary['command']}`",
            f"- {machine['processor']}, {machine['jobs']} runs side by side with one thread each. "
            f"{versions}.",
            *(f"- sacreBLEU `{signature}`" for signature in sorted(signatures)),
        ]
    )


def targets(paths: list[Path]) -> str:
    """Requested against reached sparsity in percent, from the runs with a target in some files."""
    reached: dict[tuple[str, str], dict[float, list[float]]] = {}
    notes = []
    for path in paths:
        summary = json.loads(path.read_text(encoding="utf-8"))
        for result in summary["results"]:
            match = RUN.fullmatch(result["run"])
            if match["sign"] == "@":
                neurons = result["neurons"]["ffn_neurons"]
                share = 100 * neurons["pruned"] / neurons["total"]
                row = reached.setdefault((summary["data"]["name"], match["operator"]), {})
                row.setdefault(100 * float(match["number"]), []).append(share)
        notes.append(f"- `{summary['command']}` ({summary['machine']['processor']})")
    asked = sorted({share for row in reached.values() for share in row})
    rows = []
    for (data, operator), row in reached.items():
        cells: dict[str, str] = {"data": data, "prox": operator}
        for share in asked:
            found = row.get(share, [])
            low, high = (f"{limit(found):.2f}" if found else "" for limit in (min, max))
            cells[f"{share:g} %"] = low if low == high else f"{low} to {high}"
        rows.append(cells)
    return "\n".join([benchmark_operators.table(rows), "", *notes])


def seeds(paths: list[Path]) -> str:
    """Each run's scores on the test set with all seeds, one file a seed; sorted by mean BLEU."""
    summaries = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    found: dict[str, list[dict]] = {}
    for summary in summaries:
        for result in summary["results"]:
            found.setdefault(result["run"], []).append(result)

    def bleu(results: list[dict]) -> list[float]:
        return [result["scores"]["test"]["BLEU"]["score"] for result in results]

    rows = []
    for run, results in sorted(found.items(), key=lambda item: -mean(bleu(item[1]))):
        losses = [
            [point["valid_loss"] for point in result["history"] if "valid_loss" in point][-1]
            for result in results
        ]
        neurons = [result["neurons"]["ffn_neurons"] for result in results]
        pruned = [100 * n["pruned"] / n["total"] if n["total"] else 0.0 for n in neurons]
        rows.append(
            {
                "run": run,
                "pruned": f"{mean(pruned):.1f} %",
                "BLEU": grid_results.values(bleu(results), 1),
                "validation loss": grid_results.values(losses, 3),
                "seeds": ", ".join(str(result["seed"]) for result in results),
            }
        )
    notes = [f"- `{s['command']}` ({s['machine']['processor']})" for s in summaries]
    return "\n".join([benchmark_operators.table(rows), "", *notes])


def gains(paths: list[Path]) -> str:
    """BLEU of the dense model and of WAYS and TENTH, with what they gain, a row a test set.

    Means over the seeds that a way and the dense model both have.
    """
    rows = []
    for path in paths:
        summary = json.loads(path.read_text(encoding="utf-8"))
        scores = grid_scores(summary["results"], "BLEU")
        against = {
            (c["data"], c["run"], c["split"], c["baseline"]): c for c in summary["comparisons"]
        }
        tests = dict.fromkeys((data, split) for data, _, split in scores)
        for data, split in sorted(tests, key=lambda test: grid_results.natural(test[0])):
            dense = scores[data, "dense", split]
            row = {"data": data, "test set": split, "seeds": len(dense)}
            row["dense"] = f"{mean(dense.values()):.1f}"
            for way in WAYS + TENTH:
                row[way] = ""
                if found := against.get((data, way, split, "dense")):
                    score = mean(scores[data, way, split][seed] for seed in found["seeds"])
                    row[way] = (
                        f"{score:.1f}, **{grid_results.signed(found['BLEU']['difference'])}**"
                    )
                    if len(found["seeds"]) < len(dense):
                        row[way] += f" (seed {' '.join(map(str, found['seeds']))})"
            if any(row[way] for way in WAYS + TENTH):  # not of a teacher alone
                rows.append(row)
    return benchmark_operators.table(rows)


def schedules(paths: list[Path]) -> str:
    """A run's losses and scores by the learning rate and warm-up, a row each.

    Of grids that have data sets `X` and `X-lr-R` or `X-warmup-N`; over the seeds that all of a
    run's schedules have.
    """
    rows = []
    every = by_schedule(result for path in paths for result in results_of(path))
    for (data, run), found in sorted(every.items()):
        for (rate, warmup), chosen in found.items():
            row = {"data": data, "run": run, "seeds": " ".join(str(r["seed"]) for r in chosen)}
            row |= {"peak rate": f"{rate:g}", "warm-up": f"{warmup:,}"}
            row["loss"] = grid_results.values([r["valid_loss"] for r in chosen], 3)
            for split in chosen[0]["scores"]:
                bleu = [r["scores"][split]["BLEU"]["score"] for r in chosen]
                row[f"BLEU {split}"] = grid_results.values(bleu, 1)
            chrf = [r["scores"]["test"]["chrF2"]["score"] for r in chosen]
            row["chrF"] = grid_results.values(chrf, 1)
            rows.append(row)
    return benchmark_operators.table(rows)


def by_schedule(
    results: Iterable[Mapping[str, Any]],
) -> dict[tuple[str, str], dict[tuple[float, int], list[Mapping[str, Any]]]]:
    """(data, run) -> (learning rate, warm-up) -> results, of what has several, in order.

    Only of the seeds that all schedules of a run have.
    """

    def schedule(result: Mapping[str, Any]) -> tuple[float, int]:
        return float(result["train"]["lr"]), int(result["train"]["warmup-updates"])

    found: dict[tuple[str, str], dict[tuple[float, int], dict[int, Mapping[str, Any]]]] = {}
    for result in sorted(results, key=schedule):
        key = re.split("-lr-|-warmup-", result["data"])[0], result["run"]
        found.setdefault(key, {}).setdefault(schedule(result), {})[result["seed"]] = result
    compared = {}
    for key, by_seed in found.items():
        common = sorted(set.intersection(*map(set, by_seed.values())))
        if len(by_seed) > 1 and common:
            compared[key] = {which: [rs[seed] for seed in common] for which, rs in by_seed.items()}
    return compared


def results_of(path: Path) -> list[dict[str, Any]]:
    """The results in one file."""
    return json.loads(path.read_text(encoding="utf-8"))["results"]


def grid_scores(
    results: Iterable[Mapping[str, Any]], measure: str
) -> dict[tuple[str, str, str], dict[int, float]]:
    """The scores of a grid on its test sets: (data, run, test set) -> seed -> score."""
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for result in results:
        for split, score in result["scores"].items():
            if split != "valid":
                key = result["data"], result["run"], split
                found.setdefault(key, {})[result["seed"]] = score[measure]["score"]
    return found


def page(text: str) -> str:
    """The page with every table replaced; a marker without a file of results is an error."""
    several = {
        "targets": targets,
        "seeds": seeds,
        "grid": grid,
        "gains": gains,
        "schedules": schedules,
    }

    def replace(match: re.Match) -> str:
        kind, names = match[1], match[2].split()
        paths = [DOCS / "results" / f"{name}.json" for name in names]
        content = section(*paths) if kind == "table" else several[kind](paths)
        return f"<!-- {kind} {match[2]} -->\n{content}\n<!-- end -->"

    kinds = "|".join(["table", *several])
    return re.sub(rf"<!-- ({kinds}) (.+?) -->\n.*?<!-- end -->", replace, text, flags=re.S)


def grid_commands(summary: Mapping[str, Any]) -> list[str]:
    """The commands that make just the runs of a grid: those typed may have been only the last."""
    words = shlex.split(summary["command"])
    fixed = [w for w in words if not re.match(r"(data|run|seed|hydra\.launcher\.n_jobs)=", w)]
    seeds: dict[tuple[str, str], list[int]] = {}
    for result in summary["results"]:
        seeds.setdefault((result["data"], result["run"]), []).append(result["seed"])
    runs: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (data, run), numbers in seeds.items():
        runs.setdefault((data, tuple(sorted(numbers))), []).append(run)
    data: dict[tuple[tuple[int, ...], tuple[str, ...]], list[str]] = {}
    for (name, numbers), ways in runs.items():
        data.setdefault((numbers, tuple(ways)), []).append(name)
    chosen = [
        {"seed": numbers, "data": names, "run": ways} for (numbers, ways), names in data.items()
    ]
    return [
        shlex.join(fixed + [f"{key}={','.join(map(str, values))}" for key, values in each.items()])
        for each in chosen
    ]


def grid(paths: list[Path]) -> str:
    """The table of a grid, its commands and where it ran."""
    parts = []
    for path in paths:
        summary = json.loads(path.read_text(encoding="utf-8"))
        results = summary["results"]
        seconds = [r["train_cpu_seconds"] for r in results if r["train_cpu_seconds"] is not None]
        unknown = f" (of {len(seconds)} of them)" if len(seconds) < len(results) else ""
        ran = sorted({result["processor"] for result in results})
        versions = {json.dumps(result["versions"]): result["versions"] for result in results}
        told = ["; ".join(f"{n} {v}" for n, v in found.items()) for found in versions.values()]
        signatures = {
            score["signature"]
            for result in results
            for split in result["scores"].values()
            for name, score in split.items()
            if name in ("BLEU", "chrF2")
        }
        parts += [
            grid_results.table(summary),
            "",
            grid_results.parts_table(summary),
            "",
            *(f"- `{command}`" for command in grid_commands(summary)),
            f"- {len(results)} runs, {sum(seconds) / 60:,.0f} minutes of training{unknown} on one "
            f"core each: {'; '.join(ran)}. {'; '.join(told)}.",
            *(f"- sacreBLEU `{signature}`" for signature in sorted(signatures)),
        ]
    return "\n".join(parts)


def draw(path: Path, shown: Container[str]) -> None:
    """Draw the figures of one file of results that pages show, by the figures' file names."""
    import figures  # after main() has calmed the loggers that fairseq has opened wide

    summary = json.loads(path.read_text(encoding="utf-8"))
    if summary.get("kind") == "grid":
        draw_grid(summary, path, shown)
    elif "kind" not in summary and f"{path.stem}.png" in shown:
        results = sorted(summary["results"], key=by_kind_and_value)
        by_run = {result["run"]: result for result in results}
        title = TITLES.get(path.stem, path.stem)
        figures.alive_over_updates(by_run, title, path.with_suffix(".png"))


def draw_grid(summary: Mapping[str, Any], path: Path, shown: Container[str]) -> None:
    """NAME.png, and NAME-layers.png and so on, for each data set if there are several.

    NAME-bleu.png has the runs of one data set at all learning rates.
    """
    import figures

    names = list(dict.fromkeys(result["data"] for result in summary["results"]))
    for data in names:
        stem = path.stem if len(names) == 1 else f"{path.stem}-{data}"
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for result in summary["results"]:
            if result["data"] == data:
                groups.setdefault(result["run"], []).append(result)
        first = {run: results[0] for run, results in groups.items()}
        over_updates, layers, size = (
            path.with_name(f"{stem}{figure}.png") for figure in ("", "-layers", "-size")
        )
        title = TITLES.get(data, data)
        if over_updates.name in shown:
            figures.alive_over_updates(first, title, over_updates)
        if layers.name in shown:
            figures.alive_by_layer(first, title, layers)
        if size.name in shown:
            figures.size_against_bleu(groups, "test", title, size)
    bleu = path.with_name(f"{path.stem}-bleu.png")
    if bleu.name in shown:
        rates = {f"{r['run']}, {float(r['train']['lr']):g}": r for r in summary["results"]}
        figures.bleu_over_updates(rates, TITLES.get(names[0], names[0]), bleu)


def draw_schedules(name: str, path: Path) -> None:
    """BLEU by the learning rate and warm-up, of a grid as `schedules` has it; common seeds."""
    import figures

    scores: dict[str, dict[str, dict[str, list[float]]]] = {}
    for (data, run), found in by_schedule(results_of(DOCS / "results" / f"{name}.json")).items():
        if run in ("dense", "narrow", WAYS[-1]):
            pair = TITLES.get(data, data).partition(",")[0]
            for (rate, warmup), chosen in found.items():
                by_run = scores.setdefault(pair, {}).setdefault(f"{rate:g},\n{warmup:,}", {})
                by_run[run] = [r["scores"]["test"]["BLEU"]["score"] for r in chosen]
    title = "By peak of the learning rate and updates of warm-up"
    figures.by_schedule(scores, title, path)


def draw_sizes(path: Path) -> None:
    """BLEU against size, of uniform models and auto-sized ones; dense ones of gentler schedules."""
    import figures

    lines = {
        "uniform, from the start": ("no-ffn", TENTH[0], WAYS[0], "dense"),
        "auto-sized": (TENTH[1], WAYS[-1]),
    }
    gentler = {"dense, peak rate 1e-3": "-lr-1e-3", "dense, warm-up of 1,500": "-warmup-1500"}
    scores: dict[str, dict[str, list[tuple[float, list[float]]]]] = {}
    levels: dict[str, dict[str, float]] = {}
    for name, data in LOW_RESOURCE:
        title = TITLES[data]
        results = results_of(DOCS / "results" / f"{name}.json")
        bleu = grid_scores(results, "BLEU")
        sizes: dict[str, list[int]] = {}
        for result in results:
            if result["data"] == data:
                size = result["neurons"]["parameters"]["compact"]
                sizes.setdefault(result["run"], []).append(size)
        for line, runs in lines.items():
            for run in (run for run in runs if run in sizes):
                point = mean(sizes[run]) / 1e6, list(bleu[data, run, "test"].values())
                scores.setdefault(title, {}).setdefault(line, []).append(point)
        for level, suffix in gentler.items():
            if by_seed := bleu.get((data + suffix, "dense", "test")):
                levels.setdefault(level, {})[title] = mean(by_seed.values())
    figures.by_size(scores, levels, "Peak rate 3e-3, warm-up of 500 updates", path)


def draw_widths(name: str, data: str, title: str, path: Path) -> None:
    """What is left of each layer in Adam's metric, seed 1."""
    import figures

    results = results_of(DOCS / "results" / f"{name}.json")
    found = {(r["data"], r["run"]): r for r in results if r["seed"] == 1}
    uniform = found[data, "narrow"]["neurons"]["layers"][0]["total"]
    figures.widths(found[data, WAYS[-1]], uniform, title, path)


def draw_gains(path: Path) -> None:
    """What is gained over the dense model against the number of pairs, on Multi30k."""
    import figures

    gained: dict[str, dict[str, dict[int, list[float]]]] = {}
    for measure, name in itertools.product(("BLEU", "chrF2"), SIZES):
        scores = grid_scores(results_of(DOCS / "results" / f"{name}.json"), measure)
        for data, way in dict.fromkeys((data, run) for data, run, _ in scores if run in WAYS):
            if not (pairs := re.fullmatch(r"\D+-(\d+)", data)):  # of another learning rate
                continue
            splits = [split for d, run, split in scores if (d, run) == (data, way)]
            gained.setdefault(measure, {}).setdefault(way, {})[int(pairs[1])] = [
                mean(scores[data, way, s][seed] - scores[data, "dense", s][seed] for s in splits)
                for seed in scores[data, way, splits[0]]
            ]
    figures.gain_over_pairs(gained, "Multi30k De-En, 1,024 neurons a layer", path)


def draw_source_use(name: str, data: str, path: Path) -> None:
    """What the source tells models of one pair, at all learning rates, and their loss and BLEU."""
    import figures

    kinds = {"dense": "dense", "narrow": "uniform, narrower", "l21": "auto-sized"}
    kinds |= dict.fromkeys(("magnitude", "torch"), "cut without shrinking")
    points: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in kinds.values()}
    summary = json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))
    for model in summary["models"]:
        if f"{model['data']}-".startswith(f"{data}-"):
            point = (model["source_use"], model["bits"], model["BLEU"]["test"])
            points[kinds[model["run"].partition("-")[0]]].append(point)
    figures.bleu_against_source_use(points, TITLES[data], path)


def draw_gallery(name: str) -> None:
    """The figures of docs/gallery.md: those of the paper that one experiment can redraw."""
    import figures

    path = DOCS / "results" / f"{name}.json"
    results = {r["run"]: r for r in sorted(results_of(path), key=by_kind_and_value)}
    bleu = {run: result["scores"]["test"]["BLEU"]["score"] for run, result in results.items()}
    points: dict[str, list[tuple[float, float]]] = {}
    for run, score in bleu.items():
        match = RUN.fullmatch(run)
        if match["sign"] == ":" and not match["options"]:
            options = results[run]["options"]
            row = int(options[options.index("--encoder-embed-dim") + 1]) + 1  # and the bias
            unit = default_strength(match["operator"], row)
            points.setdefault(match["operator"], []).append((float(match["number"]) / unit, score))
    levels = {run: score for run, score in bleu.items() if run in ("dense", "dense:0")}
    groups = {run: [result] for run, result in results.items()}
    layers, strength, size = (
        path.with_name(f"gallery-{figure}.png") for figure in ("layers", "strength", "size")
    )
    title = TITLES[name]
    figures.alive_by_layer(results, title, layers)
    figures.bleu_against_strength(points, levels, "test", title, strength)
    figures.size_against_bleu(groups, "test", title, size)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only check the tables on the pages")
    check = parser.parse_args().check
    logging.getLogger().setLevel(logging.WARNING)  # fairseq has opened the root logger wide
    stale = False
    for path in sorted(DOCS.glob("*.md")):
        old = path.read_text(encoding="utf-8")
        new = page(old)
        if new != old and check:
            print(f"{path} is not up to date: run scripts/render_results.py", file=sys.stderr)
            stale = True
        elif new != old:
            path.write_text(new, encoding="utf-8")
    if not check:
        pages = "\n".join(path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))
        shown = set(re.findall(r"\(results/([^()/]+\.png)\)", pages))
        for name in sorted(set(re.findall(r"<!-- (?:table|seeds|grid) (\S+)", pages))):
            draw(DOCS / "results" / f"{name}.json", shown)
        draw_gallery("multi30k-de-en")
        draw_gains(DOCS / "results" / "gains.png")
        draw_schedules("mafand-wide", DOCS / "results" / "schedules.png")
        draw_sizes(DOCS / "results" / "sizes.png")
        draw_source_use("source-use", "hau-en", DOCS / "results" / "source-use.png")
        title = "62.5 % of the feed-forward neurons gone, German-English"
        draw_widths("multi30k-sizes", "de-en-29000", title, DOCS / "results" / "widths.png")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())

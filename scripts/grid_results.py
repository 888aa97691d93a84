"""What a grid gives: all runs' results, paired bootstrap tests against the baselines, tables."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import benchmark_operators
import pipeline
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

RARE = 5  # a word is rare if the training set has it at most so often
SAMPLES = 1000  # of the bootstrap


def sentence_groups(references: list[str], training: Iterable[str]) -> dict[str, list[int]]:
    """Line numbers of the sentences that pruned models are said to translate worse.

    Returns:
        ``rare``: the reference has a word that the training set has at most 5 times, or not at
        all; ``long``: the quarter with the most words.
    """
    counts = Counter(word for line in training for word in line.split())
    words = [line.split() for line in references]
    rare = [n for n, line in enumerate(words) if any(counts[word] <= RARE for word in line)]
    by_length = sorted(range(len(words)), key=lambda n: -len(words[n]))
    return {"rare": rare, "long": sorted(by_length[: len(words) // 4])}


def collect(output: Path, folders: Iterable[Path], baselines: Sequence[str]) -> dict[str, Any]:
    """All runs' results, and how they differ from the baselines; plain data for a JSON file.

    Where a search or a sweep of further keys made several of one data set, run and seed, a run's
    name has the parts of its folder that tell them apart, such as ``dense/0.1``, and is compared
    with the baseline of the same parts.
    """
    results = [
        json.loads((folder / "result.json").read_text(encoding="utf-8"))
        | {"folder": str(folder.relative_to(output))}
        for folder in folders
    ]
    comparisons = [found for base in baselines for found in _compare(output, results, base)]
    return {"kind": "grid", "comparisons": comparisons, "results": results}


def _compare(output: Path, results: Sequence[Mapping[str, Any]], baseline: str) -> list[dict]:
    """Every run against a baseline on every data set and split.

    The seeds that both have are taken together: their translations one after the other, as one
    test set. Each entry has data, split, run, baseline, seeds, the difference in BLEU of that set
    and its p (two-sided). It may differ from that of the mean BLEU, as one seed's translations
    that are too short are made up for by another's that are too long.
    """
    told = list(zip(results, _apart(results), strict=True))
    bases = {(r["data"], rest, r["seed"]): r for r, rest in told if r["run"] == baseline}
    of_run: dict[tuple[str, str], dict[int, tuple]] = {}
    for result, rest in told:
        base = bases.get((result["data"], rest, result["seed"]))
        if base is not None and base["run"] != result["run"]:
            key = result["data"], result["run"] + rest
            of_run.setdefault(key, {})[result["seed"]] = result, base
    found = []
    for (data, run), pairs in of_run.items():
        for split in next(iter(pairs.values()))[0]["scores"]:
            sides = list(zip(*pairs.values(), strict=True))
            entry = {"data": data, "split": split, "run": run, "baseline": baseline}
            difference, p = _paired_test(output, *sides, split)
            found.append(entry | {"seeds": sorted(pairs), "difference": difference, "p": p})
    return found


def _apart(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of each result's folder tells it from others of its data, run and seed, as `/0.1`."""
    keys = Counter((result["data"], result["run"], result["seed"]) for result in results)
    if all(number == 1 for number in keys.values()):
        return [""] * len(results)
    return [
        "".join(
            f"/{part}"
            for part in Path(result["folder"]).parts
            if part not in (result["data"], result["run"], f"seed-{result['seed']}")
        )
        for result in results
    ]


def _paired_test(output: Path, ours: Sequence, theirs: Sequence, split: str) -> tuple[float, float]:
    def translated(runs: Sequence) -> list[str]:
        files = (output / run["folder"] / f"{split}.txt" for run in runs)
        return [line for file in files for line in pipeline.lines_of(file)]

    systems = [("baseline", translated(theirs)), ("system", translated(ours))]
    if systems[0][1] == systems[1][1]:
        return 0.0, 1.0  # sacrebleu calls a difference of exactly nothing significant
    raw = Path(ours[0]["path"]) / "raw" / f"{split}.{ours[0]['target']}"
    references = [pipeline.lines_of(raw) * len(ours)]
    test = PairedTest(systems, {"BLEU": BLEU()}, references, "bs", n_samples=SAMPLES)
    before, after = test()[1]["BLEU"]
    return round(after.score - before.score, 2), float(after.p_value)


def table(summary: Mapping[str, Any]) -> str:
    """Markdown: a row for each run on each data set, the best on the validation set first.

    BLEU of several seeds is their mean, with the single values behind it.
    """
    rows = []
    for (data, run), results in _by_run(summary["results"]):
        neurons = [result["neurons"]["ffn_neurons"] for result in results]
        pruned = [100 * n["pruned"] / n["total"] if n["total"] else 0.0 for n in neurons]
        left = [result["neurons"]["parameters"]["compact"] for result in results]
        row = {
            "data": data,
            "run": run,
            "seeds": len(results),
            "pruned": f"{mean(pruned):.1f} %",
            "parameters left": f"{mean(left):,.0f}",
            "validation loss": values([result["valid_loss"] for result in results], 3),
        }
        for split in results[0]["scores"]:
            row[f"BLEU {split}"] = values([r["scores"][split]["BLEU"]["score"] for r in results], 1)
        for found in summary["comparisons"]:
            if (found["data"], found["run"]) == (data, run) and found["split"] == "test":
                difference = f"{found['difference']:+.1f} (p {found['p']:.3f})"
                row[f"test against {found['baseline']}"] = difference
        rows.append(row)
    return benchmark_operators.table(rows)


def parts_table(summary: Mapping[str, Any]) -> str:
    """Markdown: more on the test set: chrF, lengths, sentences with rare words and long ones."""
    tests = [result["scores"]["test"] for result in summary["results"]]
    columns = {}
    for name in ("rare", "long"):
        lines = {test[name]["lines"] for test in tests if test.get(name)}
        number = f"{lines.pop()} " if len(lines) == 1 else ""  # not where data sets differ
        columns[name] = f"BLEU, {number}{name} sentences"
    rows = []
    for (data, run), results in _by_run(summary["results"]):
        row = {"data": data, "run": run}
        tests = [result["scores"]["test"] for result in results]
        row["chrF"] = values([test["chrF2"]["score"] for test in tests], 1)
        if all("length" in test["BLEU"] for test in tests):
            row["length"] = values([test["BLEU"]["length"] for test in tests], 2)
        for option, value in results[0]["generate"].items():
            if isinstance(value, list):
                chosen = [str(result["chosen"]["generate"][option]) for result in results]
                row[option] = " ".join(chosen)
        for name, column in columns.items():
            parts = [result["scores"]["test"].get(name) for result in results]
            if all(parts):
                row[column] = values([part["score"] for part in parts], 1)
        rows.append(row)
    return benchmark_operators.table(rows)


def _by_run(
    results: Sequence[Mapping[str, Any]],
) -> list[tuple[tuple[str, str], list[Mapping[str, Any]]]]:
    """(data, name) with the results of all seeds; by data, then the best validation BLEU first."""
    runs: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for result, rest in zip(results, _apart(results), strict=True):
        runs.setdefault((result["data"], result["run"] + rest), []).append(result)
    return sorted(runs.items(), key=lambda item: _order(item[1]))


def natural(name: str) -> list[str | int]:
    """Sort key with the numbers in a name as such: 5,000 pairs come before 10,000."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _order(results: Sequence[Mapping[str, Any]]) -> tuple[list[str | int], float]:
    """By data, then BLEU of the first split, which is the validation set: best first."""
    split = next(iter(results[0]["scores"]))
    return natural(results[0]["data"]), -mean(r["scores"][split]["BLEU"]["score"] for r in results)


def values(numbers: Sequence[float], digits: int) -> str:
    """A mean, and the single values in parentheses where there are several."""
    single = " ".join(f"{number:.{digits}f}" for number in numbers)
    return f"{mean(numbers):.{digits}f}" + (f" ({single})" if len(numbers) > 1 else "")

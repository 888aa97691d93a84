"""What a grid gives: all runs' results, paired bootstrap tests against the baselines, tables."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import benchmark_operators
import numpy as np
import pipeline
from sacrebleu.metrics import BLEU, CHRF

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

    Where a search or a sweep of further keys has folders of its own, a run's name has them, such
    as ``dense/0.1``, and it is compared with the baseline of the same ones. Always, so that one
    value is not compared with another while a sweep is half done.

    Returns:
        ``kind``, ``results``, ``comparisons``, and where there are results that are compared with
        nothing ``not_compared``: their folders, with why.
    """
    results = [
        json.loads((folder / "result.json").read_text(encoding="utf-8"))
        | {"folder": str(folder.relative_to(output))}
        for folder in folders
    ]

    @cache  # each file is compared with several
    def counted(measure: str, said: Path, meant: Path) -> np.ndarray:
        return MEASURES[measure].statistics(pipeline.lines_of(said), pipeline.lines_of(meant))

    def statistics(measure: str, result: Mapping[str, Any], split: str) -> np.ndarray:
        raw = Path(result["path"]) / "raw" / f"{split}.{result['target']}"
        return counted(measure, output / result["folder"] / f"{split}.txt", raw)

    told = {result["folder"]: _not_comparable(output, result) for result in results}
    same = [result for result in results if not told[result["folder"]]]
    comparisons = [found for base in baselines for found in _compare(same, base, statistics)]
    summary = {"kind": "grid", "comparisons": comparisons, "results": results}
    left_out = {folder: why for folder, why in told.items() if why}
    return summary | ({"not_compared": left_out} if left_out else {})


def _not_comparable(output: Path, result: Mapping[str, Any]) -> str:
    """Why translations do not belong to what is now in the data's folder; empty if they do."""
    data = Path(result["path"])
    noted = output / result["folder"] / "settings.json"
    settings = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else {}
    if not (data / "raw").is_dir():
        return f"{data.absolute()}, its data, is not there"
    if (prepared := settings.get("prepared")) is not None:
        record = json.loads((data / "prepare.json").read_text(encoding="utf-8"))
        if pipeline.corpus_identity(record) != prepared:
            return f"{data} has other data now than it was made on"
    return ""


def _compare(
    results: Sequence[Mapping[str, Any]],
    baseline: str,
    statistics: Callable[[str, Mapping[str, Any], str], np.ndarray],
) -> list[dict]:
    """Every run against a baseline on every data set and split.

    Each entry has data, split, run, baseline, the seeds that both have, and for each measure the
    difference (of the means over these seeds), its p, and with how many of them the run is better.
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
            entry = {"data": data, "split": split, "run": run, "baseline": baseline}
            entry["seeds"] = sorted(pairs)
            for measure, (_, score) in MEASURES.items():
                each = [[statistics(measure, r, split) for r in pair] for pair in pairs.values()]
                entry[measure] = paired_bootstrap(each, score)
            found.append(entry)
    return found


def _apart(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each result's folder has beside its data, run and seed, as `/0.1`."""
    return [
        "".join(
            f"/{part}"
            for part in Path(result["folder"]).parts
            if part not in (result["data"], result["run"], f"seed-{result['seed']}")
        )
        for result in results
    ]


def _varied(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options that a search or sweep has tried, and no folder's name tells, by the folder."""
    swept: dict[tuple[str, str], list[tuple[Mapping[str, Any], str]]] = {}
    for result, rest in zip(results, _apart(results), strict=True):
        if rest:
            swept.setdefault((result["data"], result["run"]), []).append((result, rest))
    found: dict[str, dict[str, Any]] = {}
    for several in swept.values():
        for option in dict.fromkeys(key for result, _ in several for key in result["train"]):
            tried = [result["train"].get(option, "") for result, _ in several]
            values = [f"{x:g}" if isinstance(x, float) else str(x) for x in tried]
            told = all(value in rest for value, (_, rest) in zip(values, several, strict=True))
            if option != "seed" and len(set(values)) > 1 and not told:
                for value, (result, _) in zip(values, several, strict=True):
                    found.setdefault(result["folder"], {})[option] = value
    return found


def bleu_statistics(translations: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """What BLEU counts in each sentence: matches and n-grams for n = 1 to 4, both lengths.

    Returns:
        Shape [sentences, 10]; their sum over the sentences makes the corpus score.
    """
    metric = BLEU(effective_order=True)  # of a sentence's score, which is not used here
    both = zip(translations, references, strict=True)
    found = [metric.sentence_score(said, [meant]) for said, meant in both]
    return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in found])


def bleu_of(sums: np.ndarray) -> float:
    """The corpus score of summed `bleu_statistics`."""
    *counts, said, meant = sums.tolist()
    correct, total = counts[: len(counts) // 2], counts[len(counts) // 2 :]
    return BLEU.compute_bleu(correct, total, said, meant, smooth_method="exp").score


def chrf_statistics(translations: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """What chrF counts in each sentence: n-grams said, meant and common, for n = 1 to 6 characters.

    Returns:
        Shape [sentences, 18]; their sum over the sentences makes the corpus score.
    """
    # Not public: sacreBLEU's score of a sentence does not tell what was counted.
    return np.array(CHRF()._extract_corpus_statistics(translations, [references]))


def chrf_of(sums: np.ndarray) -> float:
    """The corpus score of summed `chrf_statistics`."""
    return CHRF()._compute_score_from_stats(sums.tolist()).score


class Measure(NamedTuple):
    statistics: Callable[[Sequence[str], Sequence[str]], np.ndarray]
    score: Callable[[np.ndarray], float]


MEASURES = {
    "BLEU": Measure(bleu_statistics, bleu_of),
    "chrF2": Measure(chrf_statistics, chrf_of),
}


def paired_bootstrap(
    pairs: Sequence[Sequence[np.ndarray]], score: Callable[[np.ndarray], float]
) -> dict[str, Any]:
    """Is the difference in scores, of the means over the seeds, more than chance among sentences?

    Koehn's paired bootstrap with two changes. A sample of the sentences is the same for all seeds,
    whose translations of one sentence are no independent ones. And p is two-sided: the share of
    samples whose difference is as far from the samples' mean, in either direction, as the one
    found is from 0. (sacreBLEU takes the absolute values first, which for a clear difference
    leaves one side, half of this p.) How much training itself varies it does not know.

    Args:
        pairs: The statistics of the sentences, of the run and of the baseline, for each seed.
        score: The corpus score of their sum.

    Returns:
        ``difference``, ``p`` (at least 1 / 1,001) and ``won``, the seeds in which the run's is
        better.
    """
    each = [score(run.sum(0)) - score(base.sum(0)) for run, base in pairs]
    sentences = len(pairs[0][0])
    generator = np.random.default_rng(12345)
    times = generator.multinomial(sentences, [1 / sentences] * sentences, size=SAMPLES)
    sampled = np.zeros(SAMPLES)
    for run, base in pairs:
        for sign, statistics in ((1, run), (-1, base)):
            sampled += [sign * score(sums) / len(pairs) for sums in times @ statistics]
    # Equal translations differ by rounding alone.
    as_far = np.abs(sampled - sampled.mean()) >= abs(mean(each)) - 1e-9
    p = (int(as_far.sum()) + 1) / (SAMPLES + 1)
    return {"difference": round(mean(each), 4), "p": p, "won": sum(d > 0 for d in each)}


def table(summary: Mapping[str, Any]) -> str:
    """Markdown: a row for each run on each data set, the best on the validation set first.

    BLEU of several seeds is their mean, with the single values behind it.
    """
    rows = []
    varied = _varied(summary["results"])
    for (data, run), results in _by_run(summary["results"]):
        neurons = [result["neurons"]["ffn_neurons"] for result in results]
        pruned = [100 * n["pruned"] / n["total"] if n["total"] else 0.0 for n in neurons]
        left = [result["neurons"]["parameters"]["compact"] for result in results]
        row = {
            "data": data,
            "run": run,
            **varied.get(results[0]["folder"], {}),
            "seeds": len(results),
            "pruned": f"{mean(pruned):.1f} %",
            "parameters left": f"{mean(left):,.0f}",
            "validation loss": values([result["valid_loss"] for result in results], 3),
        }
        for split in results[0]["scores"]:
            row[f"BLEU {split}"] = values([r["scores"][split]["BLEU"]["score"] for r in results], 1)
        for baseline, told in _against(summary, data, run, "BLEU"):
            row[f"test against {baseline}"] = told
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
        for baseline, told in _against(summary, data, run, "chrF2"):
            row[f"chrF against {baseline}"] = told
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


def _against(
    summary: Mapping[str, Any], data: str, run: str, measure: str
) -> Iterator[tuple[str, str]]:
    """Baselines, with the difference on the test set, its p and the seeds in which it is better."""
    for found in summary["comparisons"]:
        if (found["data"], found["run"], found["split"]) == (data, run, "test"):
            seeds, compared = len(found["seeds"]), found[measure]
            won = f", {compared['won']}/{seeds} seeds" if seeds > 1 else ""
            told = f"{signed(compared['difference'])} (p {compared['p']:.3f}{won})"
            yield found["baseline"], told


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


def signed(difference: float) -> str:
    """With one digit and its sign; no -0.0."""
    return f"{round(difference, 1) + 0.0:+.1f}"


def values(numbers: Sequence[float], digits: int) -> str:
    """A mean, and the single values in parentheses where there are several."""
    single = " ".join(f"{number:.{digits}f}" for number in numbers)
    return f"{mean(numbers):.{digits}f}" + (f" ({single})" if len(numbers) > 1 else "")

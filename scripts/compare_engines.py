#!/usr/bin/env python3
"""Translate a test set with a pruned model in every form that compaction and export give it.

    python scripts/compare_engines.py DATA PRUNED.pt OUT --dense DENSE.pt

DATA is a folder made by prepare_data.py. The pruned checkpoint is translated as it is, compacted
(a width for each layer, and --uniform) in fairseq, and exported to CTranslate2 in float32 and int8;
a dense model stands beside it. For each form: sacreBLEU, on how many lines the translation is the
pruned checkpoint's, the largest difference of a token's log probability on the pruned checkpoint's
translations, and bytes on disk. Everything is written to the new folder OUT, the figures to
OUT/results.json.
"""

import argparse
import json
import math
import platform
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import sacrebleu
from benchmark_operators import cpu_name
from fairseq.data.data_utils import post_process
from pipeline import USER_DIR, RunError, execute, record_of

from fairseq_autosize.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from fairseq_autosize.compaction import compact
from fairseq_autosize.export import export_ctranslate2
from fairseq_autosize.report import count_neurons


def fairseq_lines(log: Path) -> list[dict]:
    """What fairseq-generate printed for each line of the corpus, in its order.

    Returns:
        For each line ``source`` and ``hypothesis`` (pieces) and ``logs`` (natural log
        probabilities of the hypothesis' tokens and of its end).
    """
    found: dict[int, dict] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        match = re.match(r"([SHP])-(\d+)\t(.*)", line)
        if match is None:
            continue
        kind, entry = match[1], found.setdefault(int(match[2]), {})
        if kind == "S":
            entry["source"] = match[3].split()
        elif kind == "H":
            entry["hypothesis"] = match[3].split("\t")[1].split()
        else:  # fairseq prints logarithms to base 2
            entry["logs"] = [float(value) * math.log(2) for value in match[3].split()]
    return [found[index] for index in sorted(found)]


def generate(checkpoint: Path, data: Path, record: dict, log: Path) -> list[dict]:
    """Translate the test set with fairseq-generate, beam 5."""
    source, target = record["languages"]
    command = [sys.executable, "-m", "fairseq_cli.generate", str(data / "data-bin"), "--cpu"]
    command += ["--user-dir", str(USER_DIR), "--source-lang", source, "--target-lang", target]
    command += ["--path", str(checkpoint), "--beam", "5", "--max-tokens", "4000"]
    execute([*command, "--required-batch-size-multiple", "1"], log)
    return fairseq_lines(log)


def ct2_translator(folder: Path) -> Any:
    import ctranslate2  # render_results.py needs this module, but no engine

    return ctranslate2.Translator(str(folder), device="cpu", intra_threads=1)


def ct2_lines(translator: Any, sources: list[list[str]]) -> list[dict]:
    """Translate with CTranslate2, beam 5 and fairseq's limit of length."""
    results = translator.translate_batch(
        sources, beam_size=5, max_decoding_length=200, max_batch_size=32
    )
    return [{"hypothesis": result.hypotheses[0]} for result in results]


def ct2_scores(translator: Any, lines: list[dict]) -> list[list[float]]:
    """CTranslate2's log probabilities of given translations."""
    results = translator.score_batch(
        [line["source"] for line in lines], [line["hypothesis"] for line in lines]
    )
    return [result.log_probs for result in results]


def largest_difference(one: list[list[float]], other: list[list[float]]) -> float:
    pairs = ((a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))
    return max(abs(a - b) for a, b in pairs)


def size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def table(results: dict) -> str:
    """A Markdown table of the results."""
    lines = [
        "| model | engine | BLEU | same translation as pruned | largest difference of a token's "
        "log probability | bytes |",
        "|---|---|---|---|---|---|",
    ]
    for form in results["forms"]:
        same = "-" if form["same"] is None else f"{form['same']} of {results['lines']}"
        difference = "-" if form["difference"] is None else f"{form['difference']:.1e}"
        lines.append(
            f"| {form['model']} | {form['engine']} | {form['bleu']:.1f} | {same} | {difference} "
            f"| {form['bytes']:,} |"
        )
    return "\n".join(lines)


def compare(arguments: argparse.Namespace, record: dict, pruned: dict, dense: dict | None) -> dict:
    """Make the forms of the pruned checkpoint, translate with each, and collect the figures."""
    out, data = arguments.out, arguments.data
    split = record["gen_subsets"]["test"]  # the first of them, in the corpus' own name
    reference_file = data / "raw" / f"{split}.{record['languages'][1]}"
    references = reference_file.read_text(encoding="utf-8").splitlines()
    symbol = {"sentencepiece": "sentencepiece", "subword-nmt": "subword_nmt"}.get(record["bpe"])
    plain = {**pruned, "last_optimizer_state": None}
    checkpoints = {"pruned": out / "pruned.pt", "compacted": out / "small.pt"}
    checkpoints["compacted --uniform"] = out / "uniform.pt"
    write_checkpoint(plain, checkpoints["pruned"])
    write_checkpoint(compact(pruned).checkpoint, checkpoints["compacted"])
    write_checkpoint(compact(pruned, uniform=True).checkpoint, checkpoints["compacted --uniform"])
    if dense:
        dense = {**dense, "last_optimizer_state": None}
        checkpoints = {"dense": out / "dense.pt", **checkpoints}
        write_checkpoint(dense, checkpoints["dense"])
    found = {
        name: generate(path, data, record, out / f"{path.stem}.out")
        for name, path in checkpoints.items()
    }
    base = found["pruned"]
    if len(base) != len(references):
        raise SystemExit(f"{reference_file}: {len(references)} lines, {len(base)} translations")
    forms = []

    def add(
        model: str, engine: str, lines: list[dict], difference: float | None, place: Path
    ) -> None:
        texts = [post_process(" ".join(line["hypothesis"]), symbol) for line in lines]
        bleu = sacrebleu.BLEU()
        score = bleu.corpus_score(texts, [references])
        same = sum(a["hypothesis"] == b["hypothesis"] for a, b in zip(lines, base, strict=True))
        forms.append(
            {
                "model": model,
                "engine": engine,
                "bleu": round(score.score, 2),
                "signature": str(bleu.get_signature()),
                "same": None if model == "dense" else same,
                "difference": difference,
                "bytes": size(place),
            }
        )

    for name, lines in found.items():
        alike = [
            (a["logs"], b["logs"])
            for a, b in zip(lines, base, strict=True)
            if a["hypothesis"] == b["hypothesis"]
        ]
        own = name not in ("dense", "pruned")
        difference = largest_difference(*map(list, zip(*alike, strict=True))) if own else None
        add(name, "fairseq", lines, difference, checkpoints[name])
    for quantization in ("float32", "int8"):
        folder = out / f"ct2-{quantization}"
        bins = str(data / "data-bin")
        export_ctranslate2(pruned, folder, data=bins, quantization=quantization)
        engine = ct2_translator(folder)
        lines = ct2_lines(engine, [line["source"] for line in base])
        difference = largest_difference(ct2_scores(engine, base), [x["logs"] for x in base])
        add("compacted", f"CTranslate2 {quantization}", lines, difference, folder)
    return {
        "kind": "engines",
        "data": record,
        "command": shlex.join(["python", "scripts/compare_engines.py", *sys.argv[1:]]),
        "machine": {"processor": cpu_name(), "threads": 1},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "fairseq-fixed", "ctranslate2")},
        },
        "neurons": count_neurons(pruned),
        "lines": len(references),
        "forms": forms,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DATA", type=Path, help="folder made by prepare_data.py")
    parser.add_argument("pruned", metavar="PRUNED", type=Path, help="pruned checkpoint")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    parser.add_argument("--dense", metavar="DENSE", type=Path, help="dense model to compare with")
    arguments = parser.parse_args()
    try:
        record = record_of(arguments.data, "DATA")
    except RunError as error:
        parser.error(str(error))
    if arguments.out.exists():
        parser.error(f"OUT {arguments.out}: exists already; choose another name")
    try:
        pruned = read_checkpoint(arguments.pruned)
        dense = read_checkpoint(arguments.dense) if arguments.dense else None
    except CheckpointError as error:
        parser.error(str(error))
    arguments.out.mkdir(parents=True)
    results = compare(arguments, record, pruned, dense)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

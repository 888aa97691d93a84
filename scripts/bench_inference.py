#!/usr/bin/env python3
"""How fast and how small are compacted models? fairseq, CTranslate2 and training, on one thread.

    python scripts/bench_inference.py --output docs/results/inference-base.json

An untrained model of one architecture (shared embeddings) loses neurons at random until each layer
has `--kept` percent of them, or as many as `--widths` says (what a training has left, say); it is
compacted, and exported to CTranslate2. Sources are random
tokens and all lengths are forced, so every variant does the same work: `--length` tokens and the
end of the sentence on both sides, and so as many steps of the decoder.

Every variant is a process of its own. Those of an engine take turns, in rounds, in another order
each round. The ratios are dense / variant within a round, in CPU time of the process (all its
threads), which other work on the machine disturbs less than wall time; speed and latency are in
CPU time too. Wall times are in the JSON.

The limit is what the ratio would be if only the multiply-adds of the weights' matrix products took
time. With S source tokens, T steps and beam B, these are

    S (encoder layers + K cross-attention's k and v) + T B (other decoder layers + projection),

where a matrix counts as many as it has entries. fairseq computes k and v of a source token for each
beam (K = B), CTranslate2 once (K = 1); that CTranslate2 computes the first step for one beam only
is not taken into account. For an update B is 1; backward costs twice the forward, which changes no
ratio. Left out are the attention's own products, look-ups, norms, softmax, the search and Adam,
which cost the same before and after: so the limit is above what can be reached, unless a smaller
matrix fits into a cache that the larger one does not.
"""

import argparse
import contextlib
import json
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmark_operators import cpu_name, table
from inference_worker import ENGINES, word
from torch import Tensor

from fairseq_autosize.checkpoint import CheckpointError, write_checkpoint
from fairseq_autosize.compaction import compact
from fairseq_autosize.compat import fairseq_version
from fairseq_autosize.export import ExportError, export_ctranslate2
from fairseq_autosize.groups import feed_forward_in_state

BEAMS, BATCHES = (5, 1), (1, 32)
TRAINING = "fairseq training"
SPECIAL = 4  # fairseq's own entries of a vocabulary


class BenchmarkError(Exception):
    """A worker that failed; the message has the end of what it wrote to its log."""


@dataclass(frozen=True)
class Variant:
    """One model for one engine.

    Attributes:
        name: percent of the neurons that it keeps, or the `--widths`; ``33 as zeros`` is not
            compacted.
        path: checkpoint or folder.
        shapes: its state dict without the values, for the count of multiply-adds.
    """

    name: str
    path: Path
    shapes: Mapping[str, Tensor]

    def size(self) -> int:
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files)


def multiply_adds(
    state: Mapping[str, Tensor], source: int, target: int, beam: int = 1, key_beams: int = 1
) -> int:
    """Multiply-adds of the weights' matrix products for one sentence.

    Args:
        state: the model's state dict.
        source: tokens of the source.
        target: steps of the decoder.
        beam: hypotheses that every step computes.
        key_beams: how often the decoder computes the keys and values of a source token.
    """
    count = 0
    for name, weight in state.items():
        if weight.dim() != 2 or ".embed_" in name:  # rows of embeddings are only looked up
            continue
        if name.startswith("encoder."):
            times = source
        elif re.search(r"\.encoder_attn\.[kv]_proj\.", name):
            times = source * key_beams
        else:
            times = target * beam
        count += weight.numel() * times
    return count


def dense_checkpoint(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """An untrained model as fairseq saves it, and its vocabulary in the folder."""
    from fairseq.data import Dictionary
    from fairseq.models import ARCH_CONFIG_REGISTRY, build_model

    words = Dictionary()
    for number in range(args.vocab_size - SPECIAL):
        words.add_symbol(word(number))
    for language in ("xx", "yy"):
        words.save(str(folder / f"dict.{language}.txt"))
    sizes = {
        "layers": args.layers,
        "embed_dim": args.dim,
        "ffn_embed_dim": args.ffn,
        "attention_heads": args.heads,
    }
    options = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in sizes.items()
        if size is not None
    }
    task = {"task": "translation", "data": str(folder), "source_lang": "xx", "target_lang": "yy"}
    settings = argparse.Namespace(arch=args.arch, share_all_embeddings=True)
    vars(settings).update(options | task)
    ARCH_CONFIG_REGISTRY[args.arch](settings)
    torch.manual_seed(args.seed)
    model = build_model(
        settings, argparse.Namespace(source_dictionary=words, target_dictionary=words)
    )
    # As much of the trainer's notes as fairseq asks for when it loads the file.
    history = [{"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}}]
    notes = {"optimizer_history": history, "extra_state": {}}
    return {"args": settings, "model": model.state_dict()} | notes


def widths_to_make(args: argparse.Namespace, full: Mapping[str, int]) -> dict[str, list[int]]:
    """Variant -> the neurons that each layer keeps, the dense one first.

    Args:
        full: name of each layer -> its neurons.

    Raises:
        BenchmarkError: `--widths` that the model cannot have.
    """
    wanted = {str(kept): [round(n * kept / 100) for n in full.values()] for kept in args.kept}
    for given in args.widths:
        sides = [side.split(",") for side in given.split("/")]
        layers = [sum(name.startswith(side) for name in full) for side in ("encoder", "decoder")]
        numbers = [int(number) for side in sides for number in side if number.isdecimal()]
        if [len(side) for side in sides] != layers or len(numbers) != len(full):
            sizes = " and ".join(map(str, layers))
            raise BenchmarkError(f"--widths {given}: give {sizes} numbers, as in 8,0/16,4")
        if any(number > most for number, most in zip(numbers, full.values(), strict=True)):
            raise BenchmarkError(f"--widths {given}: more than the {max(full.values())} of --ffn")
        wanted[given] = numbers
    return wanted


def pruned(checkpoint: Mapping[str, Any], widths: Iterable[int]) -> dict[str, Any]:
    """A copy in which, in each layer, only so many of the neurons are not zero."""
    state = dict(checkpoint["model"])
    for layer, kept in zip(feed_forward_in_state(state), widths, strict=True):
        dead = torch.randperm(layer.fc1_weight.shape[0])[kept:]
        for name in (f"{layer.name}.fc1.weight", f"{layer.name}.fc1.bias"):
            state[name] = state[name].index_fill(0, dead, 0)
    return {**checkpoint, "model": state}


def shapes(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in checkpoint["model"].items()}


def make_variants(args: argparse.Namespace, folder: Path) -> dict[str, list[Variant]]:
    """Engine -> its variants, the dense one first; all files are made in the folder."""
    checkpoint = dense_checkpoint(args, folder)
    variants: dict[str, list[Variant]] = {engine: [] for engine in args.engines}
    layers = feed_forward_in_state(checkpoint["model"])
    full = {layer.name: layer.fc1_weight.shape[0] for layer in layers}
    for kept, widths in widths_to_make(args, full).items():
        print(f"making the model with {column(kept)} of its neurons", file=sys.stderr)
        zeros = pruned(checkpoint, widths)
        small = compact(zeros).checkpoint
        name = kept.replace("/", "-")
        files = {"zeros": folder / f"{name}-zeros.pt", "small": folder / f"{name}.pt"}
        write_checkpoint(zeros, files["zeros"], force=True)
        write_checkpoint(small, files["small"], force=True)
        for engine, made in variants.items():
            path = files["small"]
            if engine.startswith("CTranslate2"):
                path = folder / f"{name}-{engine.replace(' ', '-')}"
                export_ctranslate2(small, path, quantization=engine.split()[1], force=True)
            made.append(Variant(kept, path, shapes(small)))
            if engine == "fairseq" and kept == str(args.as_zeros):
                made.append(Variant(f"{kept} as zeros", files["zeros"], shapes(zeros)))
    return variants


class Worker:
    """A process of inference_worker.py; while nothing is asked it waits for input."""

    def __init__(self, engine: str, variant: Variant, args: argparse.Namespace, log: Path) -> None:
        self.name = f"{engine}, {column(variant.name)} kept"
        self.log = log
        config = {"engine": engine, "model": str(variant.path), "length": args.length}
        config |= {"words": args.vocab_size - SPECIAL, "seed": args.seed}
        script = Path(__file__).with_name("inference_worker.py")
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(script), json.dumps(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
                text=True,
            )

    def ask(self, request: Mapping[str, int]) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # the missing answer tells as much
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if answer:
            return json.loads(answer)
        code = self.process.wait()
        tail = self.log.read_text(errors="replace").splitlines()[-15:]
        reason = tail[-1] if tail else "it wrote nothing"
        raise BenchmarkError("\n    ".join([f"{self.name}: exit {code}: {reason}", *tail]))

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def settings_of(engine: str, args: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Name of a setting -> what to ask of the workers."""
    if engine == TRAINING:
        sentences = max(1, args.tokens // (args.length + 1))
        return {"update": {"beam": 1, "batch": sentences, "calls": 1}}
    return {
        f"{'greedy' if beam == 1 else f'beam {beam}'}, batch {batch}": {
            "beam": beam,
            "batch": batch,
            "calls": max(1, args.sentences // batch),
        }
        for beam in BEAMS
        for batch in BATCHES
    }


def time_rounds(
    engine: str, variants: list[Variant], args: argparse.Namespace, folder: Path
) -> tuple[dict, dict[str, int]]:
    """Time all variants of an engine in turns.

    Returns:
        (variant, setting) -> "cpu" and "wall" -> for each round the seconds of each call; and
        variant -> the process' peak memory in bytes.
    """
    settings = settings_of(engine, args)
    names = [variant.name for variant in variants]
    times = {(name, setting): {"cpu": [], "wall": []} for name in names for setting in settings}
    peaks = {}
    with contextlib.ExitStack() as stack:
        workers = {}
        for variant in variants:
            log = folder / f"{engine}-{variant.name.replace('/', '-')}.log"
            workers[variant.name] = Worker(engine, variant, args, log)
            stack.callback(workers[variant.name].close)
        for worker in workers.values():  # warm-up
            for request in settings.values():
                worker.ask(request | {"calls": 1})
        for turn in range(args.rounds):
            print(f"{engine}: round {turn + 1} of {args.rounds}", file=sys.stderr)
            start = turn % len(names)
            order = [*names[start:], *names[:start]][:: 1 if turn % 2 == 0 else -1]
            for setting, request in settings.items():
                for name in order:
                    answer = workers[name].ask(request)
                    peaks[name] = answer["peak"]
                    for clock, rounds in times[name, setting].items():
                        rounds.append(answer[clock])
    return times, peaks


def measure(
    engine: str, variants: list[Variant], args: argparse.Namespace, folder: Path
) -> dict[str, list]:
    """The measurements and the sizes of an engine's variants, the dense one first."""
    times, peaks = time_rounds(engine, variants, args, folder)
    length = args.length + 1
    dense = variants[0]
    measurements = []
    for variant in variants:
        for setting, request in settings_of(engine, args).items():
            clocks = times[variant.name, setting]
            cpu, wall = ([sum(calls) for calls in clocks[clock]] for clock in ("cpu", "wall"))
            base = [sum(calls) for calls in times[dense.name, setting]["cpu"]]
            ratios = [d / own for d, own in zip(base, cpu, strict=True)]
            tokens = length * request["batch"] * request["calls"]
            beam = request["beam"]
            counted = (length, length, beam, beam if engine == "fairseq" else 1)
            dense_work, work = (multiply_adds(v.shapes, *counted) for v in (dense, variant))
            result = {
                "engine": engine,
                "kept": variant.name,
                "setting": setting,
                "tokens_per_second": tokens / median(cpu),
                "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
                "limit": dense_work / work,
                "cpu_seconds": cpu,
                "wall_seconds": wall,
            }
            if engine == TRAINING:
                result["updates_per_second"] = 1 / median(cpu)
            elif request["batch"] == 1:
                for clock, rounds in clocks.items():
                    each = [seconds for calls in rounds for seconds in calls]
                    result[f"latency_{clock}_ms"] = 1000 * median(each)
            measurements.append(result)
    sizes = [
        {"engine": engine, "kept": v.name, "disk_bytes": v.size(), "peak_bytes": peaks[v.name]}
        for v in variants
    ]
    return {"measurements": measurements, "sizes": sizes}


def short(number: float) -> str:
    """Three digits, but no powers of ten."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def cell(measurement: Mapping[str, Any]) -> str:
    """A ratio with its spread and its limit, or the dense model's speed."""
    if measurement["kept"] == "100":
        units = {"updates_per_second": "updates/s", "tokens_per_second": "tokens/s"}
        units["latency_cpu_ms"] = "ms"
        return ", ".join(
            f"{short(measurement[key])} {unit}" for key, unit in units.items() if key in measurement
        )
    ratio = measurement["ratio"]
    return (
        f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f}; "
        f"limit {measurement['limit']:.2f})"
    )


def column(kept: str) -> str:
    """`33 %`, `33 % as zeros`, or widths with spaces, which a page can break."""
    if "/" in kept:
        return kept.replace(",", " ").replace("/", " / ")
    share, _, form = kept.partition(" ")
    return f"{share} % {form}".strip()


def tables(results: Mapping[str, Any]) -> str:
    """Markdown: for each engine the speed over the dense model's, then sizes and memory."""
    parts = []
    for engine in dict.fromkeys(m["engine"] for m in results["measurements"]):
        rows: dict[str, dict[str, str]] = {}
        for m in results["measurements"]:
            if m["engine"] == engine:
                row = rows.setdefault(m["setting"], {engine: m["setting"]})
                row[column(m["kept"])] = cell(m)
        parts.append(table(rows.values()))
    rows = {}
    for size in results["sizes"]:
        row = rows.setdefault(size["engine"], {"MB on disk / peak memory": size["engine"]})
        disk, memory = (size[key] / 1e6 for key in ("disk_bytes", "peak_bytes"))
        row[column(size["kept"])] = f"{short(disk)} / {short(memory)}"
    return "\n\n".join([*parts, table(rows.values())])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arch", default="transformer", help="a stock architecture (default: transformer)")
    add("--vocab-size", type=int, default=10000, help="with the special ones (default: 10000)")
    for name in ("layers", "dim", "ffn", "heads"):
        add(f"--{name}", type=int, help="of both sides; default: the architecture's")
    add("--kept", type=int, nargs="+", default=[100, 67, 33, 10, 0], metavar="PERCENT")
    add(
        "--widths",
        nargs="+",
        default=[],
        metavar="E1,E2,.../D1,D2,...",
        help="more variants: the neurons of each layer of the encoder and of the decoder",
    )
    add("--as-zeros", type=int, default=33, metavar="PERCENT", help="the one not compacted, too")
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="ENGINE")
    add("--length", type=int, default=25, help="tokens a sentence, without the end (default: 25)")
    add("--sentences", type=int, default=8, help="a round at batch 1 (default: 8)")
    add("--tokens", type=int, default=4096, help="target tokens an update (default: 4096)")
    add("--rounds", type=int, default=5)
    add("--seed", type=int, default=1)
    add("--work-dir", type=Path, help="keeps the models; default: a temporary folder")
    add("--output", type=Path, help="JSON file for all results")
    add("--force", action="store_true", help="overwrite --output")
    args = parser.parse_args()
    from fairseq.models import ARCH_MODEL_NAME_REGISTRY

    if ARCH_MODEL_NAME_REGISTRY.get(args.arch) != "transformer":
        known = sorted(name for name, m in ARCH_MODEL_NAME_REGISTRY.items() if m == "transformer")
        parser.error(f"--arch {args.arch}: give one of {', '.join(known)}")
    args.kept = sorted({100, *args.kept}, reverse=True)
    if not 0 <= args.kept[-1] <= args.kept[0] == 100:
        parser.error("--kept: give numbers from 0 to 100")
    if "fairseq" in args.engines and args.as_zeros not in args.kept:
        parser.error(f"--as-zeros {args.as_zeros}: is not among --kept")
    if args.vocab_size <= SPECIAL:
        parser.error(f"--vocab-size {args.vocab_size}: {SPECIAL} are special, give more")
    for name in ("length", "sentences", "tokens", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: must be at least 1")
    if args.output and args.output.exists() and not args.force:
        parser.error(f"--output {args.output}: exists already; add --force to overwrite it")
    if args.output and not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: its folder does not exist")
    return args


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    variants = make_variants(args, folder)
    packages = ["torch", "fairseq_autosize"]
    if any(engine.startswith("CTranslate2") for engine in args.engines):
        packages.append("ctranslate2")
    versions = {"python": platform.python_version(), "fairseq": fairseq_version()}
    results: dict[str, Any] = {
        "kind": "inference",
        "command": shlex.join(["python", "scripts/bench_inference.py", *sys.argv[1:]]),
        "machine": {"processor": cpu_name(), "threads": 1},
        "versions": versions | {name: version(name) for name in packages},
        "settings": {
            name: getattr(args, name)
            for name in ("arch", "vocab_size", "length", "tokens", "rounds", "seed")
        },
        "measurements": [],
        "sizes": [],
    }
    for engine, made in variants.items():
        for key, values in measure(engine, made, args, folder).items():
            results[key] += values
        if args.output:  # after each engine, so that a failure later loses nothing
            args.output.write_text(json.dumps(results, indent=1) + "\n")
    return results


def main() -> int:
    args = parse_args()
    logging.disable(logging.INFO)  # fairseq's
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        if args.work_dir:
            args.work_dir.mkdir(parents=True, exist_ok=True)
        folder = args.work_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            results = run(args, folder.absolute())
        except (BenchmarkError, CheckpointError, ExportError, OSError) as error:
            print(f"bench_inference.py: {error}", file=sys.stderr)
            return 1
    print(tables(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

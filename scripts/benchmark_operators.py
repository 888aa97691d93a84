"""Time the operators against a plain pass over the weights, ProxGradPytorch and a training step.

One thread, float32, everything in one process, interleaved in rounds, so that a busy machine
changes all columns alike; CPU time of the thread, not wall time. A *pass* is one in-place
``w.mul_(c)`` over the same tensors. Each case runs over so many copies of its matrices that
together they exceed the cache, as a model's weights do between two updates.

    python scripts/benchmark_operators.py --output benchmarks.json
    python scripts/benchmark_operators.py --parts cases scaling      # without fairseq
"""

import argparse
import importlib.metadata
import json
import logging
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from fairseq_autosize import prox

Matrices = list[tuple[Tensor, Tensor]]

SHAPES = [(1024, 256), (1024, 512), (2048, 512), (4096, 1024), (8192, 2048)]
SETS = {
    "FFNs of transformer_iwslt_de_en": [(1024, 512)] * 12,
    "FFNs of transformer base": [(2048, 512)] * 12,
}
WORKING_SET = 48 << 20  # bytes
ORIGINAL_HINT = (
    "ProxGradPytorch is not installed; to compare with it: pip install --no-deps --target DIR "
    "proximal-gradient==0.1.0, then run with PYTHONPATH=DIR"
)


def seconds(function: Callable[[], object]) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def linear_init(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weight and bias as torch.nn.Linear starts them."""
    layer = torch.nn.Linear(columns, rows)
    return layer.weight.data, layer.bias.data


def plateau(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """What 30 steps of linf,1 leave: many equal maxima in each row."""
    weight, bias = linear_init(rows, columns)
    t = 0.02 * weight.abs().sum(1).mean().item()
    for _ in range(30):
        prox.prox_linf1_(weight, t, bias)
    return weight, bias


def original_functions() -> dict[str, Callable[..., None]]:
    try:
        from proximal_gradient import proximalGradient
    except ImportError:
        print(ORIGINAL_HINT, file=sys.stderr)
        return {}
    return {
        "ProxGradPytorch l21": proximalGradient.l21,
        "ProxGradPytorch linf1": proximalGradient.linf1,
    }


def time_case(
    shapes: list[tuple[int, int]], kind: str, t: float, rounds: int, functions: dict
) -> dict[str, float]:
    """Median seconds of one pass, and of each function as a ratio to the pass of its round."""
    make = plateau if kind == "plateau" else linear_init
    source = [make(*shape) for shape in shapes]
    size = sum(4 * (w.numel() + b.numel()) for w, b in source)
    source = source * max(1, math.ceil(WORKING_SET / size))
    copies = max(1, len(source) // len(shapes))
    work = [(w.clone(), b.clone()) for w, b in source]

    def timed(step: Callable[[Tensor, Tensor], object]) -> float:
        for (w, b), (w0, b0) in zip(work, source, strict=True):
            w.data.copy_(w0)
            b.data.copy_(b0)
        return seconds(lambda: [step(w, b) for w, b in work])

    def one_pass(w: Tensor, b: Tensor) -> None:
        w.mul_(0.999)
        b.mul_(0.999)

    steps = {
        "l21": lambda w, b: prox.prox_l21_(w, t, b),
        "linf1": lambda w, b: prox.prox_linf1_(w, t, b),
    }
    for name, function in functions.items():
        steps[name] = lambda w, b, f=function: f(w, b, reg=t, lr=1.0)
    passes, ratios = [], {name: [] for name in steps}
    for step in steps.values():  # warm-up
        step(*[x.clone() for x in source[0]])
    for _ in range(rounds):
        for name, step in steps.items():
            floor = timed(one_pass)
            ratios[name].append(timed(step) / floor)
            passes.append(floor / copies)
    return {"pass_ms": 1e3 * median(passes)} | {name: median(r) for name, r in ratios.items()}


def part_cases(rounds: int) -> list[dict]:
    original = original_functions()
    results = []
    cases = [([shape], f"{shape[0]}x{shape[1] + 1}") for shape in SHAPES]
    cases += [(shapes, name) for name, shapes in SETS.items()]
    for shapes, name in cases:
        for kind, t in (("random", 1e-3), ("random", 1e-1), ("plateau", 1e-3)):
            # The original is slow at large thresholds and there is nothing to learn from it.
            result = time_case(shapes, kind, t, rounds, original if t == 1e-3 else {})
            results.append({"tensors": name, "kind": kind, "threshold": t} | result)
    return results


def part_scaling(rounds: int) -> list[dict]:
    """Nanoseconds per entry, which a cost linear in rows and columns keeps constant."""
    results = []
    shapes = [(1024, c) for c in (256, 1024, 4096, 16384)]
    shapes += [(r, 512) for r in (256, 1024, 4096, 16384)]
    for shape in shapes:
        timing = time_case([shape], "random", 1e-3, rounds, {})
        entries = shape[0] * (shape[1] + 1)
        per_entry = {
            f"{name} ns/entry": timing[name] * timing["pass_ms"] * 1e6 / entries
            for name in ("l21", "linf1")
        }
        results.append({"rows": shape[0], "columns": shape[1] + 1} | per_entry)
    return results


def build_model(layers: int, width: int, ffn: int, heads: int, words: int) -> torch.nn.Module:
    from fairseq.data import Dictionary
    from fairseq.models.transformer import TransformerModel, base_architecture

    dictionary = Dictionary()
    for i in range(words):
        dictionary.add_symbol(str(i))
    options = argparse.Namespace(dropout=0.1, share_all_embeddings=True)
    for side in ("encoder", "decoder"):
        vars(options).update(
            {
                f"{side}_layers": layers,
                f"{side}_embed_dim": width,
                f"{side}_ffn_embed_dim": ffn,
                f"{side}_attention_heads": heads,
            }
        )
    base_architecture(options)
    task = argparse.Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    return TransformerModel.build_model(options, task)


def time_training(name: str, model: torch.nn.Module, tokens: int, words: int, rounds: int) -> dict:
    """One update (forward, backward, Adam) against what the options add to it.

    The additions are timed by themselves, with an inner optimizer that does nothing: against the
    noise of whole updates a hundredth could not be seen.
    """
    from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig

    from fairseq_autosize.groups import blocks_in_model
    from fairseq_autosize.proximal_optimizer import GroupShape, ProximalOptimizer
    from fairseq_autosize.strength import Goal, Plan

    config = FairseqAdamConfig(lr=[1e-4], adam_betas="(0.9, 0.999)", tpu=False)
    optimizer = FairseqAdam(config, list(model.parameters()))
    length = 25
    batch = torch.randint(4, words, (tokens // length, length))
    lengths = torch.full((len(batch),), length)
    adam_step = optimizer.step

    def update() -> None:
        optimizer.zero_grad()
        logits, _ = model(batch, lengths, batch)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.flatten())
        loss.backward()
        adam_step()

    update()
    optimizer.step = lambda: None
    steps = {}
    plain, everything = GroupShape(), GroupShape(fc2=True, adam=True)
    for operator in prox.OPERATORS:
        for label, groups, shape, target in (
            ("", "ffn", plain, False),
            (" target", "ffn", plain, True),
            (" metric", "ffn", GroupShape(adam=True), False),
            (" everything", "all", everything, True),
        ):
            blocks = blocks_in_model(model, (groups,))
            plan = Plan(freeze_update=1000) if target else Plan(strength=1e-3, step_size=1.0)
            steps[operator + label] = ProximalOptimizer(
                optimizer, blocks, prox.OPERATORS[operator], plan, shape
            )
            if shape.adam and not target:  # on the scale of that metric, or all rows would die
                size = float(steps[operator + label].dual_norms().median())
                steps[operator + label].plan = Plan(strength=1e-3 * size, step_size=1.0)
            if target:
                count = sum(block.count for block in blocks)
                steps[operator + label].aim_at([Goal(count // 2, (1,) * len(blocks))])
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    whole, times = [], {label: [] for label in steps}
    for _ in range(rounds):
        whole.append(seconds(update))
        for label, step in steps.items():
            model.load_state_dict(initial)
            times[label].append(seconds(lambda s=step: s.step(0)))
        model.load_state_dict(initial)
    result = {"model": name, "tokens": tokens, "update_ms": 1e3 * median(whole)}
    shares = {label: 100 * median(t) / median(whole) for label, t in times.items()}
    return result | {f"{label} %": share for label, share in shares.items()}


def part_training_small(rounds: int) -> list[dict]:
    model = build_model(layers=3, width=128, ffn=512, heads=4, words=4000)
    return [time_training("d=128, 3+3 layers", model, 1000, 4000, 2 * rounds)]


def part_training_iwslt(rounds: int) -> list[dict]:
    model = build_model(layers=6, width=512, ffn=1024, heads=4, words=10000)
    return [time_training("transformer_iwslt_de_en", model, 4096, 10000, rounds)]


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()


def table(rows: Iterable[dict]) -> str:
    """A Markdown table; every row is a dict of column -> value."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        lines.append([f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def check_output(parser: argparse.ArgumentParser, output: Path) -> None:
    """End the program, before it has measured anything, where its results could not be written."""
    if output.exists():
        parser.error(f"--output {output}: exists already; choose another name")
    if not output.parent.is_dir():
        parser.error(f"--output {output}: the folder {output.parent} does not exist")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = ["cases", "scaling", "training-small", "training-iwslt"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each timing (default 5)")
    parser.add_argument("--output", type=Path, help="JSON file for all results")
    arguments = parser.parse_args()
    if arguments.output:
        check_output(parser, arguments.output)
    logging.disable(logging.INFO)  # fairseq's
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # A training process has long freed blocks this large, after which glibc keeps freed memory
    # instead of returning it and paging it in again at each allocation.
    torch.ones(7 << 20)
    results = {
        "settings": {
            "cpu": cpu_name(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "fairseq_autosize": importlib.metadata.version("fairseq_autosize"),
            "threads": 1,
            "rounds": arguments.rounds,
        }
    }
    print(", ".join(f"{key} {value}" for key, value in results["settings"].items()))
    runs = {
        "cases": lambda: part_cases(arguments.rounds),
        "scaling": lambda: part_scaling(arguments.rounds),
        "training-small": lambda: part_training_small(arguments.rounds),
        "training-iwslt": lambda: part_training_iwslt(arguments.rounds),
    }
    for part in arguments.parts:
        results[part] = runs[part]()
        print(f"\n{table(results[part])}")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Train a tiny model for long with everything on, and see what grows or drifts.

One run of fairseq-train on the embedded corpus (target, Adam's metric, coupled groups, moving
average, freeze at 60 %) tells the memory of the process over time, and the number of dead neurons
after the freeze, which must not change. Then short runs of it and of plain fairseq take turns, for
the throughput and for the CPU time of an update, which a busy machine disturbs less. Results go to
a JSON file.

    python scripts/long_run.py WORK_DIR --output long_run.json
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmark_operators import check_output

ROOT = Path(__file__).resolve().parent.parent

MODEL = (
    "--arch transformer --share-all-embeddings "
    "--encoder-layers 2 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 "
    "--encoder-attention-heads 2 --decoder-layers 2 --decoder-embed-dim 32 "
    "--decoder-ffn-embed-dim 64 --decoder-attention-heads 2"
).split()
TRAINING = (
    "--optimizer adam --lr 0.002 --lr-scheduler inverse_sqrt --warmup-updates 100 --dropout 0.1 "
    "--max-tokens 1000 --required-batch-size-multiple 1 --num-workers 0 --cpu --seed 1 "
    "--log-format json --no-epoch-checkpoints"
).split()
EVERYTHING = (
    "--prox l21 --prox-target-sparsity 0.5 --prox-metric adam --prox-couple --store-ema"
).split()
FREEZE = 0.6  # of the updates


def resident_mib(pid: int) -> float | None:
    """Resident memory of a process in MiB; None once it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return None
    found = re.search(r"^VmRSS:\s+(\d+) kB", text, re.M)
    return int(found[1]) / 1024 if found else None


def train(
    data: Path, options: list[str], log: Path, sample_every: float = 5.0
) -> tuple[list[dict[str, float]], list[tuple[float, float]]]:
    """Run fairseq-train in a process of its own.

    Returns:
        What it logged at each interval, and (seconds, MiB) of its memory.

    Raises:
        RuntimeError: it failed; names the log.
    """
    command = [sys.executable, "-m", "fairseq_cli.train", str(data), *MODEL, *TRAINING, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    samples = []
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        while process.poll() is None:
            time.sleep(sample_every)
            memory = resident_mib(process.pid)
            if memory is not None:
                samples.append((round(time.monotonic() - start, 1), round(memory, 1)))
    if process.returncode:
        raise RuntimeError(f"fairseq-train failed with status {process.returncode}; see {log}")
    lines = re.findall(r"\| train_inner \| (\{.*\})", log.read_text(encoding="utf-8"))
    points = [{k: float(v) for k, v in json.loads(line).items()} for line in lines]
    return points, samples


def growth_percent(samples: list[tuple[float, float]]) -> float:
    """Median memory of the last tenth of the time against that of the third tenth."""
    tenth = max(1, len(samples) // 10)
    early = statistics.median(memory for _, memory in samples[2 * tenth : 3 * tenth] or samples)
    late = statistics.median(memory for _, memory in samples[-tenth:])
    return 100 * (late - early) / early


def updates_per_second(points: list[dict[str, float]]) -> float:
    """Between the first and the last logged update, so without the start."""
    first, last = points[0], points[-1]
    return (last["num_updates"] - first["num_updates"]) / max(last["wall"] - first["wall"], 1e-9)


def cpu_seconds() -> float:
    """Of all processes that have been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="WORK_DIR", help="for data, logs, checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--updates", type=int, default=20_000, help="of the long run (>= 100)")
    parser.add_argument("--segments", type=int, default=5, help="pairs of short runs (>= 1)")
    parser.add_argument("--segment-updates", type=int, default=400, help="of a short run (>= 20)")
    parser.add_argument("--sample-every", type=float, default=5.0, help="seconds (default: 5)")
    arguments = parser.parse_args()
    if arguments.updates < 100 or arguments.segments < 1 or arguments.segment_updates < 20:
        parser.error("--updates >= 100, --segments >= 1 and --segment-updates >= 20 are needed")
    check_output(parser, arguments.output)
    folder = arguments.folder.resolve()
    data = folder / "data" / "data-bin"
    if not data.is_dir():
        prepare = [
            sys.executable,
            ROOT / "scripts" / "prepare_data.py",
            "embedded",
            folder / "data",
        ]
        subprocess.run([*prepare, "--vocab-size", "400"], check=True, stdout=subprocess.DEVNULL)

    freeze = round(FREEZE * arguments.updates)
    ours = ["--user-dir", str(ROOT / "fairseq_autosize"), *EVERYTHING]
    points, samples = train(
        data,
        [
            *(*ours, "--prox-freeze-update", str(freeze), "--max-update", str(arguments.updates)),
            *("--log-interval", str(max(1, arguments.updates // 200))),
            *("--save-dir", str(folder / "long"), "--restore-file", "none"),
        ],
        folder / "long.log",
        arguments.sample_every,
    )
    frozen = [p["neurons_pruned"] for p in points if p["num_updates"] > freeze]

    speeds: dict[str, list[float]] = {"everything": [], "stock": []}
    costs: dict[str, list[float]] = {"everything": [], "stock": []}
    short = ["--no-save", "--disable-validation", "--save-dir", str(folder / "short")]
    for segment in range(arguments.segments):
        for name, options in (("everything", ours), ("stock", ["--store-ema"])):
            log = folder / f"{name}-{segment}.log"
            used = []
            for updates in (10, arguments.segment_updates):  # the first for what the start costs
                length = ["--log-interval", "10", "--max-update", str(updates)]
                before = cpu_seconds()
                points, _ = train(data, [*options, *short, *length], log)
                used.append(cpu_seconds() - before)
            speeds[name].append(updates_per_second(points))
            costs[name].append((used[1] - used[0]) / (arguments.segment_updates - 10))

    speed = {name: statistics.median(values) for name, values in speeds.items()}
    cost = {name: statistics.median(values) for name, values in costs.items()}
    result = {
        "updates": arguments.updates,
        "freeze": freeze,
        "memory_growth_percent": round(growth_percent(samples), 2),
        "memory_mib": samples,
        "pruned_after_freeze": sorted(set(frozen)),
        "drift_after_freeze": max(frozen) - min(frozen),
        "updates_per_second": speeds,
        "cpu_seconds_per_update": costs,
        "throughput_percent_of_stock": round(100 * speed["everything"] / speed["stock"], 1),
        "added_cpu_percent": round(100 * (cost["everything"] / cost["stock"] - 1), 1),
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for key, value in result.items():
        if not isinstance(value, dict | list):
            print(f"{key}: {value}")


if __name__ == "__main__":
    main()

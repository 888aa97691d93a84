#!/usr/bin/env python3
"""Train, translate and score a list of settings on data from prepare_data.py, side by side.

    python scripts/experiment.py DATA OUT --runs dense l21 linf1:12 dense:0 --updates 1440

DATA is a folder made by prepare_data.py. A run is `dense` (no prox, the FFN width of --ffn),
`dense:WIDTH` (another width; 0 is a model without FFN neurons), or an operator with an optional
strength or target sparsity: `l21`, `l21:1.5`, `linf1:12`, `l21@0.5`. Other --prox options follow
after plus signs: `l21@0.5+couple+freeze-update=900`, `l21:1+no-bias`. `like:RUN` is a dense model
whose uniform width gives it as many neurons as RUN has alive; pruned heads do not count. It is
trained last. All runs get the same number of updates.

Each run has a folder OUT/RUN with its logs, its last checkpoint and result.json; finished runs
are not repeated; one that was stopped half way starts over, so that its time and its curve are
whole. A folder with anything else in it is refused. OUT/results.json collects them.
"""

import argparse
import json
import logging
import re
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pipeline
import portalocker
from benchmark_operators import cpu_name
from pipeline import RunError
from prepare_data import REMOVE_BPE

from fairseq_autosize.checkpoint import read_checkpoint
from fairseq_autosize.prox import OPERATORS
from fairseq_autosize.report import count_neurons

_OPTION = r"\+(?P<option>[a-z-]+)(=(?P<value>[^+]+))?"
RUN = re.compile(
    rf"dense(:(?P<width>\d+))?|(?P<operator>{'|'.join(OPERATORS)})((?P<sign>[:@])(?P<number>[\d.]+))?"
    rf"(?P<options>(\+[a-z-]+(=[^+]+)?)*)|like:\S+"
)

logger = logging.getLogger("experiment")


def train_options(run: str, args: argparse.Namespace) -> list[str]:
    """fairseq-train's options for a run, without data and folders."""
    match = RUN.fullmatch(run)
    width = match["width"] or str(args.ffn)
    prox = ["--prox", match["operator"] or "none"]
    if match["number"]:
        option = {":": "--prox-strength", "@": "--prox-target-sparsity"}[match["sign"]]
        prox += [option, match["number"]]
    for found in re.finditer(_OPTION, match["options"] or ""):
        name = found["option"]
        prox += [f"--no-prox-{name[3:]}" if name.startswith("no-") else f"--prox-{name}"]
        prox += [found["value"]] if found["value"] else []
    sides = ("encoder", "decoder")
    model = [
        *(word for side in sides for word in (f"--{side}-layers", str(args.layers))),
        *(word for side in sides for word in (f"--{side}-embed-dim", str(args.dim))),
        *(word for side in sides for word in (f"--{side}-ffn-embed-dim", width)),
        *(word for side in sides for word in (f"--{side}-attention-heads", str(args.heads))),
        *(f"--{side}-normalize-before" for side in sides),
    ]
    return [
        *prox,
        *("--arch", "transformer", *model, "--share-all-embeddings"),
        *("--dropout", str(args.dropout)),
        *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
        *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--lr", str(args.lr)),
        *("--lr-scheduler", "inverse_sqrt", "--warmup-updates", str(args.warmup)),
        *("--max-tokens", str(args.max_tokens), "--required-batch-size-multiple", "1"),
        *("--max-update", str(args.updates), "--seed", str(args.seed)),
        *("--num-workers", "0", "--log-format", "json", "--log-interval", str(args.log_interval)),
        *("--no-epoch-checkpoints", *args.train_args),
    ]


def folder_name(run: str) -> str:
    """A run's folder within OUT."""
    return re.sub(r"[:@+=]", "-", run)


def claim(folder: Path, settings: dict) -> None:
    """Note in a run's folder what it is for, or see that it is for the same.

    Raises:
        RunError: other settings, or a folder with files of somebody else.
    """
    noted = folder / "settings.json"
    if noted.exists():
        if json.loads(noted.read_text()) != settings:
            raise RunError(f"{noted} is from other settings or data; choose another OUT")
    elif folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} has files, but no settings.json of a run; choose another OUT")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        noted.write_text(json.dumps(settings, indent=1) + "\n")


def perform(run: str, data: Path, record: dict, args: argparse.Namespace) -> dict:
    """Train, translate and score one run; returns what goes into result.json."""
    folder = args.out / folder_name(run)
    result_file = folder / "result.json"
    options = train_options(run, args)
    identity = pipeline.corpus_identity(record)
    claim(folder, {"train": options, "generate": args.generate_args, "data": identity})
    if result_file.exists():
        logger.info("%s: done before", run)
        return json.loads(result_file.read_text())
    subsets, remove_bpe = record["gen_subsets"], shlex.split(REMOVE_BPE[record["bpe"]])
    source, target = record["languages"]
    corpus = [str(data / "data-bin"), "--source-lang", source, "--target-lang", target]
    fairseq = [sys.executable, "-m"]
    cpu = [] if args.gpu else ["--cpu"]
    corpus += ["--user-dir", str(pipeline.USER_DIR)]
    train = [*fairseq, "fairseq_cli.train", *corpus, *options, *cpu, "--save-dir", str(folder)]
    trained = folder / "trained.json"  # so that a failure in scoring costs no second training
    if not trained.exists():
        for stale in folder.glob("checkpoint*.pt"):  # fairseq would go on from there
            stale.unlink()
        logger.info("%s: training, log in %s", run, folder / "train.log")
        cpu_seconds, wall_seconds = pipeline.execute(train, folder / "train.log")
        times = {"train_cpu_seconds": round(cpu_seconds, 1)}
        times["train_wall_seconds"] = round(wall_seconds, 1)
        trained.write_text(json.dumps(times))

    checkpoint = folder / "checkpoint_last.pt"
    count = count_neurons(read_checkpoint(checkpoint))
    result = {
        "run": run,
        "options": options,
        "seed": args.seed,
        "updates": args.updates,
        **json.loads(trained.read_text()),
        "neurons": count,
        "history": pipeline.history(folder / "train.log"),
        "scores": {},
    }
    for subset, split in subsets.items():
        log = folder / f"{split}.out"
        generate = [*fairseq, "fairseq_cli.generate", *corpus]
        generate += ["--path", str(checkpoint), "--gen-subset", subset, *cpu]
        generate += ["--required-batch-size-multiple", "1", *remove_bpe, "--max-tokens", "4000"]
        pipeline.execute([*generate, *args.generate_args], log)
        references = pipeline.lines_of(data / "raw" / f"{split}.{target}")
        found = pipeline.scores(pipeline.hypotheses(log, len(references)), references)
        result["scores"][split] = found
        logger.info("%s: %s BLEU %.1f", run, split, found["BLEU"]["score"])
    result_file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def uniform_width(result: dict) -> int:
    """The FFN width that, in every layer, leaves as many neurons as a run has alive."""
    layers = result["neurons"]["layers"]
    return round(sum(layer["alive"] for layer in layers) / len(layers))


def by_kind_and_value(result: dict) -> tuple[str, float]:
    """Sort key: dense models from wide to none, then each operator from weak to strong."""
    match = RUN.fullmatch(result["run"])
    if match["operator"] is None:
        return "dense", -float(match["width"] or "inf")
    return match["operator"] + match["options"], float(match["number"] or 0)


def table(results: list[dict]) -> str:
    """A Markdown table of the runs on the first test set; times are ratios to the dense run's."""
    dense = next((r for r in results if r["run"] == "dense"), None)
    split = next(iter(results[0]["scores"]))
    lines = [
        "| run | neurons alive, layer by layer | pruned | parameters left "
        f"| BLEU ({split}) | chrF | training time |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in sorted(results, key=by_kind_and_value):
        count = result["neurons"]
        sides: dict[str, list[str]] = {}
        for layer in count["layers"]:
            sides.setdefault(layer["kind"], []).append(str(layer["alive"]))
        total = count["ffn_neurons"]["total"]
        share = f"{100 * count['ffn_neurons']['pruned'] / total:.1f} %" if total else "no FFN"
        scores = result["scores"][split]
        ratio = f"{result['train_cpu_seconds'] / dense['train_cpu_seconds']:.2f}" if dense else "-"
        alive = " / ".join(" ".join(widths) for widths in sides.values())
        lines.append(
            f"| {result['run']} | {alive} | {share} | {count['parameters']['compact']:,} "
            f"| {scores['BLEU']['score']:.1f} | {scores['chrF2']['score']:.1f} | {ratio} |"
        )
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", metavar="DATA", type=Path, help="folder made by prepare_data.py")
    add("out", metavar="OUT", type=Path, help="folder for logs, checkpoints and results")
    add("--runs", nargs="+", default=["dense", "l21"], metavar="RUN", help="default: dense l21")
    add("--updates", type=int, default=1440, help="updates of every run (default: %(default)s)")
    add("--jobs", type=int, default=1, help="runs side by side, one thread each (default: 1)")
    add("--seed", type=int, default=1)
    add("--dim", type=int, default=128, help="embedding size (default: %(default)s)")
    add("--ffn", type=int, default=512, help="FFN neurons a layer (default: %(default)s)")
    add("--layers", type=int, default=3, help="layers of each side (default: %(default)s)")
    add("--heads", type=int, default=4, help="attention heads (default: %(default)s)")
    add("--dropout", type=float, default=0.1)
    add("--lr", type=float, default=3e-3, help="peak learning rate (default: %(default)s)")
    add("--warmup", type=int, default=500, help="updates of warm-up (default: %(default)s)")
    add("--max-tokens", type=int, default=1000, help="tokens a batch (default: %(default)s)")
    add("--log-interval", type=int, default=20)
    add("--gpu", action="store_true", help="let fairseq use a GPU (default: --cpu)")
    add(
        "--train-args",
        type=shlex.split,
        default=[],
        metavar="'...'",
        help="further options for fairseq-train, in one quoted string: --train-args='--fp16'",
    )
    add(
        "--generate-args",
        type=shlex.split,
        default=["--beam", "5"],
        metavar="'...'",
        help="options for fairseq-generate, in one quoted string (default: '--beam 5')",
    )
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: give 1 or more")
    for run in args.runs:
        if not RUN.fullmatch(run):
            parser.error(
                f"--runs {run}: give dense[:WIDTH], l21[:STRENGTH], l21@SHARE, linf1... or like:RUN"
            )
        if run.startswith("like:") and run.removeprefix("like:") not in args.runs:
            parser.error(f"--runs {run}: {run.removeprefix('like:')} is not among the runs")
        same = [other for other in args.runs if folder_name(other) == folder_name(run)]
        if len(set(same)) > 1:
            folder = args.out / folder_name(run)
            parser.error(f"--runs {' '.join(same)}: all of them in {folder}; give each an OUT")
    try:
        pipeline.check_path(args.out, "OUT")
        pipeline.check_path(args.data, "DATA")
        args.record = pipeline.record_of(args.data, "DATA")
    except RunError as error:
        parser.error(str(error))
    return args


def main() -> int:
    logging.basicConfig(  # force: fairseq has set its own
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lock = portalocker.Lock(args.out / "lock", fail_when_locked=True)  # until this process ends
    try:
        lock.acquire()
    except portalocker.AlreadyLocked:
        print(f"experiment.py: error: OUT {args.out}: another process is at it", file=sys.stderr)
        return 2
    pipeline.end_with_commands()
    failed = False
    results: dict[str, dict] = {}

    def attempt(run: str) -> None:
        nonlocal failed
        try:
            results[run] = perform(run, args.data, args.record, args)
        except Exception as error:  # one run's failure must not take the others with it
            failed = True
            known = isinstance(error, RunError | OSError)
            logger.error("%s: failed: %s", run, error, exc_info=not known)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(attempt, [run for run in args.runs if not run.startswith("like:")]))
    for run in args.runs:
        model = run.removeprefix("like:")
        if model != run and model in results:
            twin = f"dense:{uniform_width(results[model])}"
            attempt(twin)
    ordered = [results[run] for run in [*args.runs, *results] if run in results]
    unique = list({result["run"]: result for result in ordered}.values())
    if unique:
        summary = {
            "data": args.record,
            "command": shlex.join(["python", "scripts/experiment.py", *sys.argv[1:]]),
            "machine": {"processor": cpu_name(), "jobs": args.jobs, "threads a run": 1},
            "versions": pipeline.versions(),
            "results": unique,
        }
        (args.out / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(f"{table(unique)}\n")
        for result in unique:
            for split, scores in result["scores"].items():
                for name, score in scores.items():
                    print(f"{result['run']} {split} {name} {score['score']} {score['signature']}")
        print(f"\nall results: {args.out / 'results.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""The benchmarks: of compacted models, what it counts, writes, how it fails; of the operators."""

import importlib
import json
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, TINY_MODEL, TINY_TRAINING, USER_DIR
from fairseq.sequence_generator import SequenceGenerator
from small_models import build_model, dictionary
from torch.utils.flop_counter import FlopCounterMode

from fairseq_autosize.proximal_optimizer import ProximalOptimizer

SCRIPTS = ROOT / "scripts"


@pytest.fixture
def bench_inference(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("bench_inference")


def counted_products(counter: FlopCounterMode) -> int:
    """Multiply-adds in products with weights; those of attention itself are batched ones."""
    flops = {str(operator): n for operator, n in counter.get_flop_counts()["Global"].items()}
    return sum(flops.get(f"aten.{name}", 0) for name in ("mm", "addmm")) // 2


@pytest.fixture
def small_model():
    model, _ = build_model(share_all_embeddings=True, decoder_layers=3)
    return model.eval()


def test_multiply_adds_of_a_forward(bench_inference, small_model):
    source, target, sentences = 7, 5, 3
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokens = torch.full((sentences, source), 5)
        small_model(tokens, torch.full((sentences,), source), torch.full((sentences, target), 6))
    expected = bench_inference.multiply_adds(small_model.state_dict(), source, target)
    assert counted_products(counter) == sentences * expected


@pytest.mark.parametrize("beam", [1, 3])
def test_multiply_adds_of_a_beam_search(bench_inference, small_model, beam):
    source, target = 7, 5
    words = dictionary()
    lengths = {"min_len": target - 1, "max_len_b": target - 1}
    generator = SequenceGenerator([small_model], words, beam_size=beam, **lengths)
    sample = {"src_tokens": torch.full((1, source), 5), "src_lengths": torch.tensor([source])}
    with FlopCounterMode(display=False) as counter:
        generator.generate([small_model], {"net_input": sample})
    expected = bench_inference.multiply_adds(small_model.state_dict(), source, target, beam, beam)
    assert counted_products(counter) == expected


def test_a_failing_worker_is_told_with_its_reason(bench_inference, tmp_path):
    pytest.importorskip("ctranslate2")
    variant = bench_inference.Variant("50", tmp_path / "gone", {})
    args = Namespace(length=5, vocab_size=50, seed=1)
    worker = bench_inference.Worker("CTranslate2 int8", variant, args, tmp_path / "log")
    with pytest.raises(
        bench_inference.BenchmarkError,
        match=r"^CTranslate2 int8, 50 % kept: exit 1: RuntimeError: .*gone.*\n    Traceback",
    ):
        worker.ask({"beam": 1, "batch": 1, "calls": 1})
    worker.close()


def test_widths_of_single_layers(bench_inference):
    sides = ("encoder", "encoder", "decoder")
    full = {f"{side}.layers.{number}": 16 for number, side in enumerate(sides)}
    args = Namespace(kept=[100, 50], widths=["0,16/4"])
    made = bench_inference.widths_to_make(args, full)
    assert made == {"100": [16] * 3, "50": [8] * 3, "0,16/4": [0, 16, 4]}
    for wrong in ("0,16,4", "0/16,4", "0,16/", "0,-1/4", "0,17/4", "x,1/4"):
        args.widths = [wrong]
        with pytest.raises(bench_inference.BenchmarkError, match=f"--widths {wrong}: "):
            bench_inference.widths_to_make(args, full)


def test_results_are_not_overwritten(bench_inference, monkeypatch, tmp_path, capsys):
    output = tmp_path / "results.json"
    output.write_text("mine")
    monkeypatch.setattr(sys, "argv", ["bench_inference.py", "--output", str(output)])
    with pytest.raises(SystemExit):
        bench_inference.parse_args()
    assert "exists already; add --force" in capsys.readouterr().err


def test_operators_in_training_reach_their_targets(monkeypatch):
    """Each setting takes steps of its own: one without thresholds would cost nothing."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    benchmark = importlib.import_module("benchmark_operators")
    thresholds = []
    step = ProximalOptimizer.step

    def watched(self, update_num):
        done = step(self, update_num)
        thresholds.append((bool(self.goals), self.threshold))
        return done

    monkeypatch.setattr(ProximalOptimizer, "step", watched)
    model = benchmark.build_model(layers=1, width=8, ffn=8, heads=2, words=20)
    result = benchmark.time_training("tiny", model, 50, 20, 1)
    shares = [value for key, value in result.items() if key.endswith(" %")]
    assert len(shares) == 8 and min(shares) > 0
    assert [has_goal for has_goal, _ in thresholds] == [False, True, False, True] * 2
    assert min(threshold for _, threshold in thresholds) > 0


@pytest.mark.heavy
@pytest.mark.timeout(1200)  # 9 processes
def test_program_measures_all_engines(monkeypatch, tmp_path):
    pytest.importorskip("ctranslate2")
    sizes = "--layers 1 --dim 16 --ffn 16 --heads 2 --vocab-size 50".split()
    work = "--length 4 --tokens 20 --rounds 1 --sentences 1 --kept 50 --as-zeros 50".split()
    work += ["--widths", "0/12"]
    output = tmp_path / "results.json"
    command = [sys.executable, SCRIPTS / "bench_inference.py", *sizes, *work, "--output", output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    found = {(m["engine"], m["setting"], m["kept"]): m for m in results["measurements"]}
    settings = [f"{search}, batch {size}" for search in ("beam 5", "greedy") for size in (1, 32)]
    engines = dict.fromkeys(("fairseq", "CTranslate2 float32", "CTranslate2 int8"), settings)
    engines["fairseq training"] = ["update"]
    expected = {
        (engine, setting, kept)
        for engine, names in engines.items()
        for setting in names
        for kept in ("100", "50", "0/12", *(["50 as zeros"] if engine == "fairseq" else []))
    }
    assert set(found) == expected
    for (engine, _, kept), m in found.items():
        ratio = m["ratio"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"] and m["tokens_per_second"] > 0
        if kept == "100":
            assert (set(ratio.values()), m["limit"]) == ({1.0}, 1.0)
        assert (m["limit"] > 1) == (kept in ("50", "0/12")), (engine, kept)
    disk = {(s["engine"], s["kept"]): s["disk_bytes"] for s in results["sizes"]}
    for engine in engines:
        assert disk[engine, "0/12"] < disk[engine, "50"] < disk[engine, "100"]
    # Without torch in its process.
    peaks = {s["engine"]: s["peak_bytes"] for s in results["sizes"]}
    assert 10e6 < peaks["CTranslate2 int8"] < 100e6 < peaks["fairseq"]

    monkeypatch.syspath_prepend(str(SCRIPTS))
    section = importlib.import_module("render_results").section(output)
    assert section.startswith(done.stdout.strip()) and "`python scripts/bench_inf" in section


def test_the_share_of_the_package_in_the_cpu_time(run, corpus, tmp_path):
    options = (*TINY_MODEL, *TINY_TRAINING, "--no-save", "--disable-validation", "--store-ema")
    prox = ("--prox", "l21", "--prox-target-sparsity", "0.5", "--prox-metric", "adam")
    shares = {}
    for name, own in (("none", ("--prox", "none")), ("adam", prox)):
        output = run(
            *("cpu_share", corpus, *options, *own, "--user-dir", USER_DIR),
            *("--max-update", "40", "--save-dir", tmp_path),
            path=SCRIPTS,
        ).stdout
        result = json.loads(output.splitlines()[-1])
        assert result["updates"] == 20
        shares[name] = result["added_percent"]
    assert shares["none"] < shares["adam"]  # some 0.1 and 8

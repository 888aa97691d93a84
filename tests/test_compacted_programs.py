"""Compacted checkpoints of real trainings in fairseq's programs, and what `compact` takes."""

import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, TINY_TRAINING, USER_DIR
from small_models import build_model, checkpoint_of
from test_training import LM

from fairseq_autosize.checkpoint import parameter_names, read_checkpoint, write_checkpoint
from fairseq_autosize.cli import main
from fairseq_autosize.compaction import compact
from fairseq_autosize.export import export_ctranslate2
from fairseq_autosize.groups import dead_neurons, feed_forward_in_state
from fairseq_autosize.report import count_neurons

pytestmark = pytest.mark.heavy

AUTOSIZE = ["--user-dir", str(USER_DIR)]
COMMAND = Path(sys.executable).with_name("fairseq-autosize")


def prune_smallest(source: Path, target: Path, widths: Sequence[int]) -> None:
    """Zero the rows of fc1 with the smallest norms; their biases, and so constants, stay."""
    checkpoint = read_checkpoint(source)
    layers = feed_forward_in_state(checkpoint["model"])
    for layer, width in zip(layers, widths, strict=True):
        order = layer.fc1_weight.norm(dim=1).argsort(descending=True)
        layer.fc1_weight[order[width:]] = 0
    write_checkpoint(checkpoint, target)


def hypotheses(output: str) -> tuple[list[tuple[int, str]], list[float]]:
    """All hypotheses of fairseq-generate in the order of the corpus, and their scores."""
    found = re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", output, re.M)
    found.sort(key=lambda hit: int(hit[0]))
    return [(int(n), text) for n, _, text in found], [float(score) for _, score, _ in found]


def from_hub(folder: Path, name: str, corpus: Path, sources: list[str]) -> list[tuple[str, float]]:
    """Best translations and scores (base 2) through fairseq's interface for Python."""
    from fairseq.models.transformer import TransformerModel

    model = TransformerModel.from_pretrained(str(folder), name, str(corpus)).eval()
    best = [hypos[0] for hypos in model.generate([model.encode(s) for s in sources], max_len_b=10)]
    return [(model.decode(hypo["tokens"]), float(hypo["score"]) / math.log(2)) for hypo in best]


@pytest.mark.parametrize(
    "options",
    [
        ["--share-all-embeddings", "--activation-fn", "relu"],
        [
            *("--share-decoder-input-output-embed", "--activation-fn", "gelu"),
            *("--encoder-normalize-before", "--decoder-normalize-before"),
        ],
    ],
    ids=["relu-postnorm", "gelu-prenorm"],
)
def test_all_widths_translate_the_same(options, corpus, run, tmp_path):
    model = [word for word in TINY_MODEL if word != "--share-all-embeddings"]
    run(
        *("fairseq_cli.train", corpus, *model, *TINY_TRAINING, "--encoder-layers", "3", *options),
        *("--max-update", "60", "--save-dir", tmp_path, *AUTOSIZE),
    )
    prune_smallest(tmp_path / "checkpoint_last.pt", tmp_path / "pruned.pt", (0, 1, 24, 3, 7))
    assert main(["compact", str(tmp_path / "pruned.pt"), str(tmp_path / "small.pt")]) == 0
    uniform = [str(tmp_path / "pruned.pt"), str(tmp_path / "uniform.pt"), "--uniform"]
    assert main(["compact", *uniform]) == 0
    found = compact(read_checkpoint(tmp_path / "small.pt")).widths
    assert found == {"encoder": [0, 1, 24], "decoder": [3, 7]}

    names = ("pruned.pt", "small.pt", "uniform.pt")
    generate = [corpus, *AUTOSIZE, "--cpu", "--max-tokens", "400", "--max-len-b", "10"]
    generate += ["--required-batch-size-multiple", "1", "--nbest", "5", "--path"]
    outputs = [run("fairseq_cli.generate", *generate, tmp_path / name).stdout for name in names]
    texts, scores = hypotheses(outputs[0])
    assert len(texts) == 5 * 43 and len(set(texts)) > 43
    for output in outputs[1:]:
        assert hypotheses(output)[0] == texts
        assert hypotheses(output)[1] == pytest.approx(scores, abs=1e-4)

    lines = re.findall(r"^S-(\d+)\t(.*)$", outputs[0], re.M)
    best: dict[int, tuple[str, float]] = {}
    for (number, text), score in zip(texts, scores, strict=True):
        best.setdefault(number, (text, score))
    for name in names[1:]:
        told = from_hub(tmp_path, name, corpus, [source for _, source in lines])
        for (number, _), (text, score) in zip(lines, told, strict=True):
            assert text == best[int(number)][0]
            assert score == pytest.approx(best[int(number)][1], abs=1e-4)


def test_alignments_are_the_same(corpus, run, capsys, tmp_path):
    """Of a transformer_align that was trained with alignments, heads included; and it trains on."""
    model = [*TINY_MODEL[2:], "--alignment-layer", "1", "--full-context-alignment"]
    train = ["fairseq_cli.train", corpus, *model, *TINY_TRAINING, *AUTOSIZE, "--load-alignments"]
    train += ["--criterion", "label_smoothed_cross_entropy_with_alignment"]
    train += ["--prox", "l21", "--prox-groups", "attention", "--prox-target-sparsity", "0.5"]
    start = [*train, "--arch", "transformer_align", "--max-update", "40"]
    run(*start, "--save-dir", tmp_path / "wide")
    last = tmp_path / "last.pt"
    prune_smallest(tmp_path / "wide" / "checkpoint_last.pt", last, (0, 9, 24, 3))
    heads = [block["alive"] for block in count_neurons(read_checkpoint(last))["attention"]]
    assert heads[-1] == 2 and sum(heads) == 12 - 5  # of the other ten
    small, uniform = tmp_path / "small.pt", tmp_path / "uniform.pt"
    assert main(["compact", str(last), str(uniform), "--uniform"]) == 0
    assert main(["compact", str(last), str(small)]) == 0
    flags = re.findall(r"(--arch .*) \.\.\.$", capsys.readouterr().out, re.M)[-1].split()
    assert flags[1] == "transformer_align_autosize"

    generate = ["fairseq_cli.generate", corpus, *AUTOSIZE, "--cpu", "--max-len-b", "10"]
    generate += ["--required-batch-size-multiple", "1", "--print-alignment", "soft", "--path"]
    outputs = [run(*generate, path).stdout for path in (last, small, uniform)]
    texts, scores = hypotheses(outputs[0])
    alignments = soft_alignments(outputs[0])
    assert len(texts) == len(alignments) == 43
    numbers = [float(x) for row in alignments.values() for x in row]
    assert max(numbers) > 2 * min(x for x in numbers if x)
    for output in outputs[1:]:
        assert hypotheses(output)[0] == texts
        assert hypotheses(output)[1] == pytest.approx(scores, abs=1e-4)
        for number, row in soft_alignments(output).items():
            assert row == pytest.approx(alignments[number], abs=2e-6)
    pytest.importorskip("ctranslate2")
    agreement = export_ctranslate2(read_checkpoint(small), tmp_path / "ct2", data=corpus)
    assert agreement.largest < 1e-4

    more = [*train, *flags, "--max-update", "6", "--finetune-from-model", small]
    more[more.index("--prox-target-sparsity") + 1] = "0.3"
    more += ["--prox", "l21", "--prox-freeze-update", "4"]  # where the advice is --prox none
    output = run(*more, "--save-dir", tmp_path / "more").stdout
    assert "frozen after update 4: " in output


def soft_alignments(output: str) -> dict[int, list[float]]:
    """The attention weights that fairseq-generate prints, sentence by sentence."""
    lines = re.findall(r"^A-(\d+)\t(.*)$", output, re.M)
    return {int(n): [float(x) for x in re.split("[ ,]", row)] for n, row in lines}


def test_language_models_have_the_same_perplexity(lm_corpus, run, tmp_path):
    run(
        *("fairseq_cli.train", lm_corpus, *AUTOSIZE, "--task", "language_modeling", *LM),
        *("--arch", "transformer_lm_gpt", "--decoder-layers", "4", *TINY_TRAINING),
        *("--max-update", "40", "--save-dir", tmp_path),
    )
    prune_smallest(tmp_path / "checkpoint_last.pt", tmp_path / "pruned.pt", (24, 0, 1, 5))
    for name, options in (("small.pt", []), ("uniform.pt", ["--uniform"])):
        assert main(["compact", str(tmp_path / "pruned.pt"), str(tmp_path / name), *options]) == 0
    evaluate = [lm_corpus, *AUTOSIZE, "--cpu", "--max-tokens", "400", "--sample-break-mode", "eos"]
    (tmp_path / "exactly.py").write_text(  # the log has two decimals
        "from fairseq_cli import eval_lm\n"
        "main = eval_lm.main\n"
        "eval_lm.main = lambda cfg: print('PERPLEXITY', float(main(cfg)['perplexity']))\n"
        "eval_lm.cli_main()\n"
    )
    found = []
    for name in ("pruned", "small", "uniform"):
        path = ["--path", tmp_path / f"{name}.pt"]
        output = run("exactly", *evaluate, *path, path=tmp_path).stdout
        found.append(float(re.search(r"^PERPLEXITY (\S+)$", output, re.M)[1]))
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-5)


def mean_losses(checkpoint: dict) -> dict[str, float]:
    """The losses in the meters of a checkpoint: of the epoch, of the validation, of all updates."""
    meters = checkpoint["extra_state"]["metrics"]
    return {
        group: float(meter["sum"]) / meter["count"]
        for group in ("default", "train", "valid")
        for _, name, _, meter in meters[group]
        if name == "loss"
    }


@pytest.mark.parametrize("flat", [False, True], ids=["each", "flat"])
def test_half_precision_training_goes_on_as_without_compaction(flat, corpus, run, capsys, tmp_path):
    train = [corpus, *AUTOSIZE, *TINY_MODEL, *TINY_TRAINING, "--dropout", "0", "--fp16"]
    train += ["--prox", "l21", "--prox-strength", "5", "--fp16-init-scale", "1"]
    if not flat:
        train += ["--fp16-no-flatten-grads", "--store-ema", "--ema-fp32", "--ema-decay", "0.9"]
    # The device's number is a key of the flat tensors; a CPU parameter has none.
    first = "import torch\ntorch.cuda.current_device = lambda: None" if flat else ""
    wide, small, narrow = tmp_path / "wide", tmp_path / "small.pt", tmp_path / "narrow"
    start = [*train, "--max-update", "35", "--save-dir", wide]
    run("fairseq_cli.train", *start, first=first)
    last = wide / "checkpoint_last.pt"
    assert len(read_checkpoint(last)["last_optimizer_state"]["state"]) == (1 if flat else 85)
    assert main(["compact", str(last), str(small), "--keep-optimizer"]) == 0
    told = capsys.readouterr().out
    flags = re.search(r"^train on: .*?(--arch .*) \.\.\.$", told, re.M)[1].split()
    more = [*train, "--max-update", "50", "--save-dir"]
    run("fairseq_cli.train", *more, wide, first=first)
    run("fairseq_cli.train", *more, narrow, *flags, first=first)

    ends = [read_checkpoint(folder / "checkpoint_last.pt") for folder in (wide, narrow)]
    assert [end["optimizer_history"][-1]["num_updates"] for end in ends] == [50, 50]
    # In half precision the products of other shapes are rounded otherwise.
    assert mean_losses(ends[1]) == pytest.approx(mean_losses(ends[0]), rel=1e-4)
    ends = [compact(end, keep_optimizer=True) for end in ends]
    assert ends[1].widths == ends[0].widths and any(map(any, ends[0].widths.values()))
    assert [layer.before for layer in ends[1].layers] != [24] * 4
    states = [[end.checkpoint["model"]] for end in ends]
    if not flat:
        for state, end in zip(states, ends, strict=True):
            extra = end.checkpoint["extra_state"]
            state += [extra["ema"], extra["ema_fp32_params"]]
    # No gradient but rounding reaches the bias of k, which Adam then scales up: it means nothing.
    for one, other in zip(*states, strict=True):
        for name, value in one.items():
            if not name.endswith("k_proj.bias"):
                torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4, msg=name)
    # Closer than half precision: the masters went on, not the parameters rounded from them.
    names = parameter_names(ends[0].checkpoint["model"])
    shapes = [ends[0].checkpoint["model"][name].shape for name in names]
    masters = [
        end.checkpoint["extra_state"]["TranslationAutosizeTask"]["prox_precision"]["masters"]
        for end in ends
    ]
    if flat:
        sizes = [shape.numel() for shape in shapes]
        masters = [tensor.split(sizes) for (tensor,) in masters]
    assert [one.numel() for one in masters[1]] == [shape.numel() for shape in shapes]
    differences = [
        (one - other).abs().flatten()
        for name, one, other in zip(names, *masters, strict=True)
        if not name.endswith("k_proj.bias")
    ]
    assert float(torch.cat(differences).mean()) < 5e-6  # half precision has steps of 1e-4 here


def test_a_stored_moving_average_loads(corpus, run, tmp_path):
    """It computes what it did without the neurons that are dead in the model."""
    from fairseq.checkpoint_utils import (
        load_checkpoint_to_cpu,
        load_ema_from_checkpoint,
        load_model_ensemble_and_task,
    )

    run(
        *("fairseq_cli.train", corpus, *AUTOSIZE, *TINY_MODEL, *TINY_TRAINING, "--store-ema"),
        *("--ema-decay", "0.9", "--prox", "l21", "--prox-strength", "5", "--max-update", "40"),
        *("--save-dir", tmp_path),
    )
    paths = [tmp_path / "checkpoint_last.pt", tmp_path / "small.pt"]
    assert main(["compact", *map(str, paths)]) == 0
    wide = read_checkpoint(paths[0])
    outputs = []
    for path in map(str, paths):
        average = load_ema_from_checkpoint(path)["model"]
        state = {**load_checkpoint_to_cpu(path), "model": average}
        layers = zip(
            feed_forward_in_state(wide["model"]), feed_forward_in_state(average), strict=True
        )
        if path == str(paths[0]):
            for layer, averaged in layers:
                dead = dead_neurons(layer.fc1_weight)
                assert dead.any() and averaged.fc1_weight[dead].any()
                averaged.fc1_weight[dead] = 0
                averaged.fc1_bias[dead] = 0
        (model,), _, _ = load_model_ensemble_and_task([path], state=state)
        tokens = torch.arange(4, 24).view(2, 10)
        with torch.no_grad():
            outputs.append(model.eval()(tokens, torch.tensor([10, 10]), tokens.flip(1))[0])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)


# --- what the command takes, and what is left when it is killed ----------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 250 MB, two thirds of it Adam's state, with every tenth neuron dead."""
    width = 4000
    sizes = {f"{side}_embed_dim": 640 for side in ("encoder", "decoder")}
    model, args = build_model(encoder_ffn_embed_dim=width, decoder_ffn_embed_dim=width, **sizes)
    for layer in feed_forward_in_state(model.state_dict()):
        layer.fc1_weight[::10] = 0
        layer.fc1_bias[::10] = 0
    slots = {
        index: {key: torch.ones_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        for index, parameter in enumerate(model.parameters())
    }
    checkpoint = checkpoint_of(model, args) | {
        "last_optimizer_state": {"state": slots, "param_groups": [{"params": [*slots]}]}
    }
    path = tmp_path_factory.mktemp("large") / "large.pt"
    write_checkpoint(checkpoint, path)
    return path


def peak_memory(code: str, *arguments: object) -> int:
    """Most memory that a Python program had resident, in bytes.

    Its own, from the kernel: getrusage would count that of the process that started it.
    """
    code += "\nprint(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    result = subprocess.run(
        [sys.executable, "-c", f"import re, sys\n{code}", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return 1024 * int(result.stdout.split()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("options", "most"), [([], 1.4), (["--keep-optimizer"], 1.8)])
def test_memory_in_terms_of_the_checkpoint(options, most, large, tmp_path):
    """Beside the imports; with them, 2.5 times a checkpoint of 1 GB would be the limit."""
    imports = "from fairseq_autosize.cli import main\nimport fairseq.models"
    command = f"{imports}\nassert main(['compact', *sys.argv[1:]]) == 0"
    taken = peak_memory(command, large, tmp_path / "small.pt", *options) - peak_memory(imports)
    assert taken < most * large.stat().st_size


def test_killed_while_writing(large, tmp_path, capsys):
    out = tmp_path / "small.pt"
    model, args = build_model()
    write_checkpoint(checkpoint_of(model, args), out)
    before = out.read_bytes()
    command = [COMMAND, "compact", large, out, "--keep-optimizer", "--force"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(".small.pt.*.tmp")):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert out.read_bytes() == before
    assert read_checkpoint(out)["model"].keys() == model.state_dict().keys()

    (partial,) = tmp_path.glob(".small.pt.*.tmp")
    assert main(["compact", str(large), str(out), "--force"]) == 0
    assert f"{partial}: left by a run that was killed" in capsys.readouterr().err
    assert partial.exists()
    layer = feed_forward_in_state(read_checkpoint(out)["model"])[0]
    assert layer.fc1_weight.shape == (3600, 640)

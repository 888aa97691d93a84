"""Auto-sizing through fairseq's real command-line programs, judged by the saved checkpoints."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, TINY_TRAINING, USER_DIR, Runner, plain_fairseq

from fairseq_autosize.checkpoint import read_checkpoint, write_checkpoint
from fairseq_autosize.groups import FeedForward, dead_neurons, feed_forward_in_state

pytestmark = pytest.mark.heavy

AUTOSIZE = ["--user-dir", USER_DIR]
# With TINY_TRAINING this kills some neurons of TINY_MODEL within 40 updates, but not all.
PRUNING = ["--prox", "l21", "--prox-strength", "5", "--max-update", "40"]
# After an overflow the trainer puts a number on the GPU.
NO_CUDA = "import torch; torch.Tensor.cuda = lambda self: self\n"
LM = (
    "--arch transformer_lm --decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 24 "
    "--decoder-attention-heads 2 --tokens-per-sample 64 --sample-break-mode eos"
).split()


def layers_of(checkpoint: Path) -> list[FeedForward]:
    return feed_forward_in_state(read_checkpoint(checkpoint)["model"])


def count_dead(checkpoint: Path) -> tuple[int, int]:
    """Dead neurons and all neurons; checks that a dead one's bias is zero too."""
    dead = total = 0
    for layer in layers_of(checkpoint):
        mask = dead_neurons(layer.fc1_weight)
        assert bool((layer.fc1_bias[mask] == 0).all())
        assert bool((layer.fc1_bias[~mask] != 0).any() or mask.all())
        dead, total = dead + int(mask.sum()), total + len(mask)
    return dead, total


def logged(output: str, tag: str = "train_inner") -> list[dict[str, float]]:
    lines = re.findall(rf"\| {tag} \| (\{{.*\}})", output)
    return [{key: float(value) for key, value in json.loads(line).items()} for line in lines]


def assert_same(first: object, second: object, place: str) -> None:
    """Equal, bit for bit, all the way down."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key, value in first.items():
            assert_same(value, second[key], f"{place}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), place
        for number, values in enumerate(zip(first, second, strict=True)):
            assert_same(*values, f"{place}.{number}")
    elif torch.is_tensor(first):
        assert torch.equal(first, second), place
    else:
        assert first == second, place


def assert_same_checkpoints(first: Path, second: Path) -> None:
    """Equal parameters, optimizer, scaler, counters and state of the task, bit for bit."""
    a, b = read_checkpoint(first), read_checkpoint(second)
    for key in ("model", "last_optimizer_state"):
        assert_same(a[key], b[key], key)
    assert_same(a["optimizer_history"][-1], b["optimizer_history"][-1], "optimizer_history")
    tasks = [c["extra_state"].get("TranslationAutosizeTask") for c in (a, b)]
    if None not in tasks:  # plain fairseq has no such entry
        assert_same(*tasks, "task")


@pytest.mark.parametrize(
    ("data", "options", "task"),
    [
        ("corpus", ["--prox", "l21", "--prox-strength", "5"], "translation"),
        (
            "corpus",
            ["--task", "translation_autosize", "--prox", "l21", "--prox-strength", "5"],
            "translation_autosize",
        ),
        ("corpus", ["--prox", "linf1", "--prox-strength", "19"], "translation"),
        (
            "lm_corpus",
            ["--task", "language_modeling_autosize", *LM, "--prox", "l21", "--prox-strength", "5"],
            "language_modeling_autosize",
        ),
        (
            "lm_corpus",
            ["--task", "language_modeling", *LM, "--prox", "linf1", "--prox-strength", "19"],
            "language_modeling",
        ),
    ],
)
def test_training_leaves_exact_zeros(data, options, task, request, run, tmp_path):
    model = [] if "language" in task else TINY_MODEL
    output = run(
        *("fairseq_cli.train", request.getfixturevalue(data), *AUTOSIZE, *model, *TINY_TRAINING),
        *(*options, "--max-update", "40", "--save-dir", tmp_path),
    ).stdout
    dead, total = count_dead(tmp_path / "checkpoint_last.pt")
    assert 0 < dead < total
    assert read_checkpoint(tmp_path / "checkpoint_last.pt")["cfg"]["task"]["_name"] == task

    last = logged(output)[-1]
    assert last["neurons_pruned"] == dead and last["neurons_alive"] == total - dead
    sides = ["decoder"] if "language" in task else ["encoder", "decoder"]
    assert sum(last[f"{side}_pruned"] for side in sides) == dead
    strength = float(options[options.index("--prox-strength") + 1])
    # The last of 40 updates, in inverse_sqrt's terms; the log's own lr is the next update's.
    assert last["prox_threshold"] == pytest.approx(strength * 0.005 * (10 / 39) ** 0.5, rel=1e-4)
    assert logged(output, "valid")[-1]["valid_neurons_pruned"] == dead
    assert f"{total} groups (rows of fc1 with bias); strength {strength:g}" in output
    assert "24 24 neurons in layers 1 to 2" in output
    assert re.search(r"a neuron without gradient would die at update \d+", output)
    assert re.search(rf"signature: prox:{options[options.index('--prox') + 1]}\|", output)


def test_gelu_lets_neurons_come_back_and_the_log_warns(corpus, run, tmp_path):
    warning = "has a slope at 0, so dead neurons still get gradients"
    counts = {}
    for activation in ("relu", "gelu"):
        output = run(
            *("fairseq_cli.train", corpus, *AUTOSIZE, *TINY_MODEL, *TINY_TRAINING, *PRUNING),
            *("--activation-fn", activation, "--save-dir", tmp_path / activation),
            *("--prox-strength", "1.5", "--max-update", "50", "--lr", "0.03"),
        ).stdout
        assert (f"activation gelu {warning}" in output) == (activation == "gelu")
        counts[activation] = [p["neurons_pruned"] for p in logged(output)]
        dead, _ = count_dead(tmp_path / activation / "checkpoint_last.pt")
        assert counts[activation][-1] == dead > 0
    assert counts["relu"] == sorted(counts["relu"])
    assert counts["gelu"] != sorted(counts["gelu"])


def test_options_without_effect_are_named(corpus, run, tmp_path):
    output = run(
        *("fairseq_cli.train", corpus, *AUTOSIZE, *TINY_MODEL, *TINY_TRAINING),
        *("--prox-start-update", "5", "--no-prox-bias", "--max-update", "1"),
        *("--save-dir", tmp_path),
    ).stdout
    assert "no effect, since --prox is none: --prox-bias, --prox-start-update" in output


def test_hydra_train_with_a_yaml(corpus, run, tmp_path):
    (tmp_path / "autosize.yaml").write_text(f"""# @package _group_
common: {{user_dir: {USER_DIR}, cpu: true, seed: 1, log_interval: 1, log_format: json}}
task: {{_name: translation_autosize, data: {corpus}, prox: l21, prox_strength: 5.0}}
model:
  _name: transformer
  share_all_embeddings: true
  encoder: {{layers: 2, embed_dim: 16, ffn_embed_dim: 24, attention_heads: 2}}
  decoder: {{layers: 2, embed_dim: 16, ffn_embed_dim: 24, attention_heads: 2}}
criterion: {{_name: cross_entropy}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: inverse_sqrt, warmup_updates: 10}}
dataset: {{max_tokens: 400, required_batch_size_multiple: 1, num_workers: 0}}
optimization: {{max_update: 40, lr: [0.005]}}
checkpoint: {{save_dir: {tmp_path}/run, no_epoch_checkpoints: true}}
""")
    run(
        *("fairseq_cli.hydra_train", "--config-dir", tmp_path, "--config-name", "autosize"),
        cwd=tmp_path,
    )
    dead, total = count_dead(tmp_path / "run" / "checkpoint_last.pt")
    assert 0 < dead < total


@pytest.fixture(scope="module")
def stock(corpus: Path, run: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of plain fairseq, which never hears of the package."""
    folder = tmp_path_factory.mktemp("stock")
    training = [*TINY_MODEL, *TINY_TRAINING, "--max-update", "20", "--save-dir", folder]
    run("fairseq_cli.train", corpus, *training)
    return folder / "checkpoint_last.pt"


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--prox", "none", "--task", "translation_autosize"],
        ["--prox", "l21", "--prox-strength", "0"],
        ["--prox", "linf1", "--prox-start-update", "20"],
    ],
)
def test_without_a_threshold_training_is_stock_training(options, stock, corpus, run, tmp_path):
    training = [*TINY_MODEL, *TINY_TRAINING, "--max-update", "20", "--save-dir", tmp_path]
    run("fairseq_cli.train", corpus, *AUTOSIZE, *training, *options)
    assert_same_checkpoints(stock, tmp_path / "checkpoint_last.pt")


@pytest.mark.parametrize(
    "options",
    [
        [],
        # With a scale window that ends a few times, and a scale that overflows at first.
        ["--fp16", "--fp16-no-flatten-grads", "--fp16-scale-window", "7"],
        ["--update-ordered-indices-seed"],
    ],
)
def test_interrupted_training_equals_uninterrupted(options, corpus, run, tmp_path):
    """Stopped five times: at the end of the first epoch, and at updates chosen by chance."""
    train = ("fairseq_cli.train", corpus, *AUTOSIZE, *TINY_MODEL, *TINY_TRAINING, *PRUNING)
    train += tuple(options)
    cpu = {"first": NO_CUDA}
    points = logged(run(*train, "--save-dir", tmp_path / "whole", **cpu).stdout)
    end_of_epoch = int(max(p["num_updates"] for p in points if p["epoch"] == 1))
    stops = sorted({end_of_epoch, *random.Random(2).sample(range(2, 40), 4)})
    assert len(stops) == 5
    for stop in (*stops, 40):
        run(*train, "--save-dir", tmp_path / "parts", "--max-update", stop, **cpu)
    assert count_dead(tmp_path / "whole" / "checkpoint_last.pt")[0] > 0
    assert_same_checkpoints(*(tmp_path / x / "checkpoint_last.pt" for x in ("whole", "parts")))


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--no-prox-bias"],
        ["--prox-groups", "decoder-ffn"],
        ["--prox-start-update", "5"],
    ],
)
def test_every_update_takes_one_full_step(options, corpus, run, tmp_path):
    """With a learning rate of almost 0 only the prox moves fc1: l21 takes t off every row."""
    output = run(
        *("fairseq_cli.train", corpus, *AUTOSIZE, *TINY_MODEL, *TINY_TRAINING, "--lr", "1e-12"),
        *("--prox", "l21", "--prox-strength", "0.5", "--prox-step-size", "0.01"),
        *("--max-update", "12", "--save-dir", tmp_path, "--disable-validation", *options),
    ).stdout
    points = logged(output)
    assert [p["num_updates"] for p in points] == list(range(1, 13))
    groups = points[0]["neurons_alive"]
    assert groups == (48 if "--prox-groups" in options else 96)
    start = 5 if "--prox-start-update" in options else 0
    first = points[0]["prox_penalty"]
    for point in points[1:]:
        steps = max(0, point["num_updates"] - max(start, 1))
        assert first - point["prox_penalty"] == pytest.approx(groups * 0.005 * steps, abs=0.02)


@pytest.mark.parametrize(
    "schedule",
    [
        [],
        ["--lr-scheduler", "fixed"],
        ["--lr-scheduler", "cosine", "--max-update", "40"],
        ["--lr-scheduler", "polynomial_decay", "--total-num-update", "60"],
        ["--lr-scheduler", "tri_stage", "--phase-ratio", "(0.1, 0.6, 0.3)"],
    ],
)
def test_step_follows_the_schedule_and_rows_die_when_predicted(schedule, corpus, run, tmp_path):
    """Adam with eps = 1e6 moves nothing, so rows die by the sum of the thresholds alone."""
    training = [*TINY_TRAINING, *schedule]
    if "tri_stage" in schedule:  # it has its own options for the warm-up
        at = training.index("--warmup-updates")
        del training[at : at + 2]
    output = run(
        *("fairseq_cli.train", corpus, *AUTOSIZE, *TINY_MODEL, *training),
        *("--adam-eps", "1e6", "--prox", "l21", "--prox-strength", "8", "--max-update", "40"),
        *("--save-dir", tmp_path, "--disable-validation"),
    ).stdout
    told = re.search(r"would die at update (\d+) \(first (\d+), last (\d+)\)", output)
    middle, first, last = map(int, told.groups())
    pruned = {int(p["num_updates"]): p["neurons_pruned"] for p in logged(output)}
    assert pruned[first - 1] == 0 < pruned[first]
    assert pruned[last - 1] < 96 == pruned[last]
    assert pruned[middle - 1] <= 48 <= pruned[middle]  # the median lies between two rows


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--prox-start-update 100", ["--prox-start-update 100 leaves none of 6 updates to shrink"]),
        (
            "--prox-freeze-update 100 --prox-freeze-patience 9",
            [
                "--max-update 6 ends this run before --prox-freeze-update 100; resume it",
                "no effect without --prox-freeze-update auto: --prox-freeze-patience",
            ],
        ),
        (
            "--prox-groups attention --prox-couple --prox-layer-scale encoder.layers.9:2 "
            "--prox-strength 1",
            [
                "no effect: --prox-layer-scale encoder.layers.9, which none of --prox-groups atten",
                "no effect on heads: --prox-couple",
                "no group without gradient would die by update 6: the thresholds add up to 0.0",
            ],
        ),
        (
            "--prox-strength 22.6 --lr-scheduler fixed --warmup-updates 0",
            ["; a neuron without gradient would die at update 6 (first 5, last not by update 6)"],
        ),
        (
            "--prox-strength 19 --lr-scheduler fixed --warmup-updates 0 --prox-groups all",
            ["; the smallest group without gradient would die at update 5, the median one not by"],
        ),
        (
            "--lr-scheduler fixed --force-anneal 2",
            ["; a neuron without gradient dies once strength * (sum of the learning rates)"],
        ),
    ],
    ids=["start", "freeze", "couple", "last", "median", "anneal"],
)
def test_what_cannot_happen_in_a_run_is_told(options, told, corpus, run, tmp_path):
    train = ("fairseq_cli.train", corpus, *AUTOSIZE, *TINY_MODEL, *TINY_TRAINING, "--prox", "l21")
    train += ("--prox-strength", "30", "--max-update", "6", "--save-dir", tmp_path)
    output = run(*train, *options.split()).stdout
    assert all(text in output for text in told)
    assert not re.search(r"would die at update (?:[7-9]|\d\d)", output), "after its end"


def test_the_forecast_of_an_open_run_is_about_what_comes(corpus, run, tmp_path):
    train = ("fairseq_cli.train", corpus, *AUTOSIZE, *TINY_MODEL, *TINY_TRAINING, "--prox", "l21")
    run(*train, "--max-update", "2", "--save-dir", tmp_path)
    last = tmp_path / "checkpoint_last.pt"
    checkpoint = read_checkpoint(last)
    checkpoint["optimizer_history"][-1]["num_updates"] = 100_005
    write_checkpoint(checkpoint, last, force=True)
    output = run(*train, "--max-epoch", "2", "--save-dir", tmp_path).stdout
    assert re.search(r"a neuron without gradient would die at update 1\d{5} ", output)


def test_a_frozen_run_has_no_forecast(corpus, run, tmp_path):
    train = ("fairseq_cli.train", corpus, *AUTOSIZE, *TINY_MODEL, *TINY_TRAINING, *PRUNING)
    train += ("--prox-freeze-update", "3", "--save-dir", tmp_path, "--max-update")
    assert "neuron without gradient" in run(*train, "5").stdout
    assert "neuron without gradient" not in run(*train, "6").stdout


def test_fp16_checkpoint_has_exact_zeros(corpus, run, tmp_path):
    run(
        *("fairseq_cli.train", corpus, *AUTOSIZE, *TINY_MODEL, *TINY_TRAINING, *PRUNING),
        *("--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", "1", "--save-dir", tmp_path),
    )
    checkpoint = tmp_path / "checkpoint_last.pt"
    weight = layers_of(checkpoint)[0].fc1_weight
    assert torch.equal(weight, weight.half().float())  # fairseq saves half precision as float32
    dead, total = count_dead(checkpoint)
    assert 0 < dead < total


def test_translation_programs_read_the_checkpoint(corpus, run, tmp_path):
    """--eval-bleu in training, then generate and interactive; no hypothesis is lost."""
    output = run(
        *("fairseq_cli.train", corpus, *AUTOSIZE, *TINY_MODEL, *TINY_TRAINING, *PRUNING),
        *("--eval-bleu", "--eval-bleu-args", '{"beam": 2, "max_len_b": 10}'),
        *("--save-dir", tmp_path, "--tensorboard-logdir", tmp_path / "tensorboard"),
    ).stdout
    assert "valid_bleu" in logged(output, "valid")[-1] or '"valid_bleu"' in output
    checkpoint = tmp_path / "checkpoint_best.pt"
    options = [corpus, *AUTOSIZE, "--path", checkpoint, "--cpu", "--max-tokens", "400"]
    options += ["--required-batch-size-multiple", "1"]
    generated = run("fairseq_cli.generate", *options).stdout
    assert len(re.findall(r"^H-\d+\t", generated, re.M)) == 43
    told = run("fairseq_cli.interactive", *options, stdin="ba be\nku ko ki\n").stdout
    assert len(re.findall(r"^H-\d+\t", told, re.M)) == 2


def test_tensorboard_and_wandb_have_the_counts(corpus, run, tmp_path):
    # Stands in for Weights & Biases, whose client fairseq calls: it keeps what it is told.
    (tmp_path / "wandb.py").write_text(
        "import json, types\n"
        "config = types.SimpleNamespace(update=lambda config: None)\n"
        "def init(**options): pass\n"
        "def log(values, step):\n"
        f"    print(json.dumps(values), file=open({str(tmp_path / 'told')!r}, 'a'))\n"
    )
    run(
        *("fairseq_cli.train", corpus, *AUTOSIZE, *TINY_MODEL, *TINY_TRAINING, *PRUNING),
        *("--max-update", "3", "--save-dir", tmp_path, "--tensorboard-logdir", tmp_path / "board"),
        *("--wandb-project", "test"),
        path=tmp_path,
        first="import wandb; from fairseq.logging import progress_bar; progress_bar.wandb = wandb",
    )
    events = b"".join(file.read_bytes() for file in (tmp_path / "board").rglob("*tfevents*"))
    told = (tmp_path / "told").read_text()
    for name in ("neurons_alive", "encoder_pruned", "prox_threshold", "prox_penalty"):
        assert name.encode() in events
        assert f"train_inner/{name}" in told and f"valid/{name}" in told


def test_one_run_prunes_in_a_plain_fairseq_checkpoint(corpus, run, tmp_path):
    """A run without --task gives a checkpoint for a fairseq that lacks the package."""
    run(
        *("fairseq_cli.train", corpus, *AUTOSIZE, *TINY_MODEL, *TINY_TRAINING, *PRUNING),
        *("--save-dir", tmp_path),
    )
    generated = run(
        *(
            "fairseq_cli.generate",
            corpus,
            "--user-dir",
            plain_fairseq(tmp_path),
            "--cpu",
            "--max-tokens",
            "400",
        ),
        *("--path", tmp_path / "checkpoint_last.pt", "--required-batch-size-multiple", "1"),
    ).stdout
    assert len(re.findall(r"^H-\d+\t", generated, re.M)) == 43

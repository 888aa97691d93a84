"""Every supported training mode through the real command, each of its updates checked."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, TINY_TRAINING, USER_DIR, Runner
from programs import run_program
from step_checker import TESTS, checked
from test_training import AUTOSIZE, NO_CUDA, PRUNING, assert_same_checkpoints, count_dead

from fairseq_autosize.checkpoint import read_checkpoint, task_entry

pytestmark = pytest.mark.heavy

TRAIN = ("fairseq_cli.train", *AUTOSIZE, *TINY_MODEL, *TINY_TRAINING, *PRUNING)

FP16 = "--fp16 --fp16-init-scale 1"
# Flat half-precision parameters are kept under the number of a CUDA device; a CPU has none.
FLAT = "import torch; torch.cuda.current_device = lambda: None\n"
# fairseq takes --amp for CUDA only: on a CPU it is off. The scale 1e38 overflows at first.
CPU_AMP = (
    "import functools, torch\n"
    "torch.cuda.amp.autocast = functools.partial(torch.autocast, 'cpu')\n"
    "torch.cuda.amp.GradScaler = lambda init_scale: torch.amp.GradScaler('cpu', 1e38)\n"
)
FREEZE = (
    "from fairseq.models.transformer import TransformerModel as Model\n"
    "build = Model.build_model.__func__\n"
    "def frozen(*arguments):\n"
    "    model = build(*arguments)\n"
    "    model.encoder.layers[0].requires_grad_(False)\n"
    "    return model\n"
    "Model.build_model = classmethod(frozen)\n"
)

# name -> (options, code to run first)
MODES = {
    "fp32": ("", ""),
    "fp16-flat": (FP16, FLAT),
    "fp16-no-flatten-grads": (f"{FP16} --fp16-no-flatten-grads", ""),
    "amp-overflow": (
        "--amp --lr-scheduler fixed --warmup-updates 0 --prox-strength 3",
        CPU_AMP,
    ),
    "amp-scaler-off": ("--amp", ""),
    "update-freq-schedule": ("--update-freq 1,2,3", ""),
    "adamax": ("--optimizer adamax", ""),
    "adafactor": ("--optimizer adafactor", ""),
    "adagrad": ("--optimizer adagrad", ""),
    "adadelta": ("--optimizer adadelta", ""),
    "sgd": ("--optimizer sgd --momentum 0.9", ""),
    "nag": ("--optimizer nag", ""),
    "weight-decay": ("--weight-decay 0.1", ""),
    "ema": ("--store-ema", ""),
    "ema-fp32": (f"--store-ema --ema-fp32 {FP16} --fp16-no-flatten-grads", ""),
    "layerdrop": ("--encoder-layerdrop 0.5 --decoder-layerdrop 0.3", ""),
    "frozen-fp16-flat": (FP16, FLAT + FREEZE),
    "clip-norm": ("--clip-norm 0.1", ""),
    "cosine": ("--lr-scheduler cosine --prox-strength 6", ""),
    "polynomial": ("--lr-scheduler polynomial_decay --total-num-update 60", ""),
    "fixed": ("--lr-scheduler fixed --prox-strength 3.4", ""),
    "plateau": ("--lr-scheduler reduce_lr_on_plateau --lr-shrink 0.5 --lr-threshold 0.5", ""),
}


# Modes that fairseq-train's command line does not reach, for fairseq-hydra-train.
ADAM = {"_name": "adam", "lr": [0.005]}
INVERSE_SQRT = {"_name": "inverse_sqrt", "warmup_updates": 10, "lr": [0.005]}
GROUP = {"optimizer": ADAM, "lr_scheduler": INVERSE_SQRT}
HYDRA_MODES = {
    "bf16": {"common": {"bf16": True}, **GROUP},
    "composite": {
        "common": {},
        "optimizer": {"_name": "composite", "groups": {"default": GROUP}},
        "lr_scheduler": {"_name": "pass_through"},
    },
}


def read(file: Path) -> dict:
    """What the checker of a program has noted."""
    return json.loads(file.read_text())


def assert_noted(folder: Path, updates: int) -> dict:
    """All updates were checked, and some neurons have died, which the checkpoint has, too."""
    noted = read(folder / "noted")
    dead, total = count_dead(folder / "checkpoint_last.pt")
    assert noted["updates"] == updates
    assert 0 < dead < total and dead == noted["dead"][-1]
    return noted


@pytest.mark.parametrize("mode", MODES)
def test_every_update_is_the_inner_step_and_one_prox(mode, corpus, run, tmp_path):
    options, first = MODES[mode]
    run(
        *(*TRAIN, corpus, *options.split(), "--save-dir", tmp_path),
        path=TESTS,
        first=first + checked(tmp_path / "noted"),
    )
    noted = assert_noted(tmp_path, 40)
    assert (noted["skipped"] > 2) == (mode == "amp-overflow")  # more than the retries of a batch
    assert noted["rates"][0] == 0 or "--lr-scheduler" in options, "the warm-up begins at 0"


def train_by_hydra(
    mode: str, task: dict, corpus: Path, run: Runner, folder: Path, first: str = ""
) -> str:
    """What fairseq-hydra-train prints in one of HYDRA_MODES."""
    layers = {"layers": 2, "embed_dim": 16, "ffn_embed_dim": 24, "attention_heads": 2}
    data = {"max_tokens": 400, "required_batch_size_multiple": 1, "num_workers": 0}
    config = {
        **HYDRA_MODES[mode],
        "task": {"_name": "translation_autosize", "prox": "l21", "data": str(corpus), **task},
        "model": {"_name": "transformer", "encoder": layers, "decoder": layers},
        "criterion": {"_name": "cross_entropy"},
        "dataset": data,
        "optimization": {"max_update": 40, "lr": [0.005]},
        "checkpoint": {"save_dir": str(folder), "no_epoch_checkpoints": True},
    }
    config["common"] = {**config["common"], "user_dir": str(USER_DIR), "cpu": True, "seed": 1}
    # JSON is YAML.
    (folder / "mode.yaml").write_text("# @package _group_\n" + json.dumps(config))
    program = ("fairseq_cli.hydra_train", "--config-dir", folder, "--config-name", "mode")
    return run(*program, cwd=folder, path=TESTS, first=first).stdout


@pytest.mark.parametrize("mode", HYDRA_MODES)
def test_every_update_in_modes_of_hydra_train(mode, corpus, run, tmp_path):
    train_by_hydra(mode, {"prox_strength": 5.0}, corpus, run, tmp_path, checked(tmp_path / "noted"))
    assert_noted(tmp_path, 40)


def test_default_freeze_knows_the_warm_up_of_a_composite_optimizer(corpus, run, tmp_path):
    output = train_by_hydra("composite", {"prox_target_sparsity": 0.5}, corpus, run, tmp_path)
    assert "48 of them dead after 16 updates" in output  # 10 of warm-up, and 0.2 of the other 30


@pytest.fixture(scope="module")
def begun(corpus: Path, run: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trainings of 15 updates: one of plain fairseq, one with the prox."""
    folder = tmp_path_factory.mktemp("begun")
    train = ["fairseq_cli.train", corpus, *TINY_MODEL, *TINY_TRAINING, "--max-update", "15"]
    run(*train, "--save-dir", folder / "stock")
    run(*train, *AUTOSIZE, *PRUNING[:4], "--save-dir", folder / "autosize")
    return folder


@pytest.mark.parametrize(
    ("source", "options", "strength", "updates"),
    [
        ("autosize", "--restore-file {file}", 6, 25),
        ("autosize", "--restore-file {file} --reset-optimizer", 3, 40),
        ("autosize", "--restore-file {file} --reset-lr-scheduler --reset-meters", 6, 25),
        (
            "autosize",
            "--restore-file {file} --reset-optimizer --reset-lr-scheduler --reset-dataloader",
            *(3, 40),
        ),
        ("autosize", "--finetune-from-model {file}", 3, 40),
        ("stock", "--restore-file {file}", 6, 25),
        ("stock", f"--finetune-from-model {{file}} {FP16} --fp16-no-flatten-grads", 6, 40),
    ],
)
def test_every_update_after_a_restart(
    source, options, strength, updates, begun, corpus, run, tmp_path
):
    options = options.format(file=begun / source / "checkpoint_last.pt").split()
    run(
        *(*TRAIN, corpus, *options, "--prox-strength", strength, "--save-dir", tmp_path),
        path=TESTS,
        first=checked(tmp_path / "noted"),
    )
    assert_noted(tmp_path, updates)


def test_a_reset_that_loses_the_prox_state_is_told(begun, corpus, run, tmp_path):
    checkpoint = begun / "autosize" / "checkpoint_last.pt"
    reset = (*TRAIN, corpus, "--restore-file", checkpoint, "--reset-dataloader")
    reset += ("--save-dir", tmp_path, "--max-update", "17", "--prox", "l21")
    result = run_program(*reset, "--prox-freeze-update", "auto")
    assert result.returncode != 0 and not list(tmp_path.glob("*.pt"))
    assert "whether the run has frozen; drop --reset-dataloader" in result.stdout.splitlines()[-1]
    output = run(*reset, "--prox-freeze-update", "16").stdout
    assert output.count("--reset-dataloader: fairseq hands over nothing") == 1
    assert "frozen after update 16: " in output


def test_interrupted_amp_equals_uninterrupted(corpus, run, tmp_path):
    """From a scale that overflows, with a growth of it that an interruption must not delay.

    Without retries: fairseq does not save how many of them an earlier batch has used up.
    """
    train = (*TRAIN, corpus, "--amp", "--lr-scheduler", "fixed", "--warmup-updates", "0")
    train += ("--prox-strength", "3", "--amp-batch-retries", "0")
    growing = {"first": CPU_AMP.replace("1e38)", "1e38, growth_interval=7)")}
    run(*train, "--save-dir", tmp_path / "whole", **growing)
    for stop in (1, 12, 26, 40):
        run(*train, "--save-dir", tmp_path / "parts", "--max-update", stop, **growing)
    whole, parts = (tmp_path / name / "checkpoint_last.pt" for name in ("whole", "parts"))
    assert_same_checkpoints(whole, parts)
    dead, total = count_dead(whole)
    assert 0 < dead < total
    _, entry = task_entry(read_checkpoint(parts))
    scaler = entry["prox_precision"]["scaler"]
    assert 0 < scaler["scale"] < 1e38 and 0 < scaler["_growth_tracker"] < 7


def test_an_overflow_at_once_after_a_restart_loses_no_masters(corpus, run, tmp_path):
    """fairseq then writes the checkpoint that it has begun with once more."""
    train = (*TRAIN, corpus, *FP16.split(), "--fp16-no-flatten-grads", "--save-dir", tmp_path)
    train += ("--save-interval-updates", "10", "--max-update")
    run(*train, "10", first=NO_CUDA)
    (saved,) = tmp_path.glob("checkpoint_*_10.pt")
    _, before = task_entry(read_checkpoint(saved))
    written = saved.stat().st_mtime_ns
    overflow = (
        "from fairseq.trainer import Trainer\n"
        "clip = Trainer.clip_grad_norm\n"
        "def overflow(self, limit):\n"
        "    Trainer.clip_grad_norm = clip\n"
        "    raise OverflowError('made up')\n"
        "Trainer.clip_grad_norm = overflow\n"
    )
    run(*train, "11", first=NO_CUDA + overflow)
    assert saved.stat().st_mtime_ns > written
    _, after = task_entry(read_checkpoint(saved))
    assert before["prox_precision"].keys() == after["prox_precision"].keys()
    for one, other in zip(*(x["prox_precision"]["masters"] for x in (before, after)), strict=True):
        assert torch.equal(one, other)


# What a user might write: the prox on the model's own, half-precision parameters.
NAIVE = """
import torch
from fairseq.trainer import Trainer
original = Trainer.train_step
def train_step(self, samples, raise_oom=False):
    result = original(self, samples, raise_oom)
    for side in (self.get_model().encoder, self.get_model().decoder):
        for layer in side.layers:
            weight, bias = layer.fc1.weight.data, layer.fc1.bias.data
            norms = torch.cat([weight, bias[:, None]], dim=1).norm(dim=1)
            factor = (norms - 5 * self.get_lr()).clamp_min(0) / norms
            weight.mul_(factor[:, None]), bias.mul_(factor)
    return result
Trainer.train_step = train_step
"""


@pytest.mark.parametrize("scale", [1, 2**40])
def test_overflow_changes_nothing_and_the_naive_prox_fails(scale, corpus, run, tmp_path):
    """With the large scale every update of the epoch overflows; the naive prox fails with both."""
    train = (*TRAIN, corpus, "--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", scale)
    train += ("--lr-scheduler", "fixed", "--warmup-updates", "0", "--max-epoch", "1")
    train += ("--prox-strength", "5", "--save-dir", tmp_path)
    options = {"path": TESTS, "first": NO_CUDA + checked(tmp_path / "noted")}
    run(*train, **options)
    noted = read(tmp_path / "noted")
    assert (noted["updates"] == 0) == (noted["skipped"] > 5) == (scale > 1)
    assert count_dead(tmp_path / "checkpoint_last.pt")[0] == 0  # too early
    options["first"] = NAIVE + options["first"]
    result = run_program(*train, "--prox", "none", "--restore-file", "none", **options)
    assert result.returncode != 0
    error = result.stdout.strip().splitlines()[-1]
    wrong = "the model differs" if scale > 1 else "other values"
    assert re.fullmatch(rf"AssertionError: .*\.fc1\.(weight|bias): {wrong}", error), error

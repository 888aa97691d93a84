"""Options that cannot be meant end the real programs at the start, in a line that names them."""

import json

import pytest
from conftest import TINY_MODEL, TINY_TRAINING, USER_DIR
from programs import run_program
from test_training import AUTOSIZE
from test_training_modes import GROUP

pytestmark = pytest.mark.heavy

# What is given beside --max-update 1 -> a part of the last line.
COMMAND_LINES = {
    "--prox": "argument --prox: expected one argument",
    "--prox l3": "argument --prox: invalid choice: 'l3'",
    "--prox l21,linf1": "argument --prox: invalid choice: 'l21,linf1'",
    "--prox l21 --prox-strenght 1": "unrecognized arguments: --prox-strenght 1",
    "--prox l21 --prox-strength": "argument --prox-strength: expected one argument",
    "--prox l21 --prox-strength strong": "argument --prox-strength: invalid float value: 'strong'",
    "--prox l21 --prox-strength -1": "error: --prox-strength -1.0: must be a finite number >= 0",
    "--prox l21 --prox-strength nan": "error: --prox-strength nan: must be a finite number >= 0",
    "--prox l21 --prox-strength 1e400": "error: --prox-strength inf: must be a finite number >= 0",
    "--prox l21 --prox-step-size -0.1": "error: --prox-step-size -0.1: must be 'schedule'",
    "--prox l21 --prox-step-size 0,1": "error: --prox-step-size 0,1: must be 'schedule'",
    "--prox l21 --prox-groups heads": "error: --prox-groups heads: 'heads' is not one of ffn,",
    "--prox l21 --prox-groups ffn;all": "error: --prox-groups ffn;all: 'ffn;all' is not one of",
    "--prox l21 --prox-start-update 1.5": "argument --prox-start-update: invalid int value: '1.5'",
    "--prox l21 --prox-start-update -1": "error: --prox-start-update -1: must be a number of",
    "--prox l21 --prox-freeze-update never": "error: --prox-freeze-update never: must be a number",
    "--prox l21 --prox-freeze-update 0": "--prox-freeze-update 0: must come after --prox-start",
    "--prox l21 --prox-freeze-update auto --prox-freeze-patience 0": "--prox-freeze-patience 0: ",
    "--prox l21 --prox-freeze-patience ten": "argument --prox-freeze-patience: invalid int value",
    "--prox l21 --prox-target-sparsity 50%": "argument --prox-target-sparsity: invalid float value",
    "--prox l21 --prox-target-sparsity 1": "error: --prox-target-sparsity 1.0: must be a share",
    "--prox l21 --prox-target-sparsity -0.5": "error: --prox-target-sparsity -0.5: must be a share",
    "--prox l21 --prox-target-sparsity nan": "error: --prox-target-sparsity nan: must be a share",
    "--prox l21 --prox-target-parameters 0.99": "error: --prox-target-parameters 0.99: the groups",
    "--prox l21 --prox-groups attention --prox-target-scope layer --prox-target-sparsity 0.1": (
        "--prox-target-sparsity 0.1 with --prox-target-scope layer: of 2 groups, the most that a"
    ),
    "--prox l21 --prox-target-sparsity 0.5 --prox-strength 1": "does not go with --prox-strength 1",
    "--prox l21 --prox-target-sparsity 0.5 --prox-target-parameters 0.5": (
        "--prox-target-sparsity 0.5 does not go with --prox-target-parameters"
    ),
    "--prox l21 --prox-target-sparsity 0.5 --prox-freeze-update auto": "-freeze-update auto: give",
    "--prox l21 --prox-target-sparsity 0.5 --prox-start-update 1": "error: --prox-start-update 1: ",
    "--prox none --prox-target-sparsity 0.5": "sparsity 0.5 has no effect without an operator: ",
    "--prox l21 --prox-layer-scale encoder:2": "scale encoder:2: 'encoder' is neither one of ffn",
    "--prox l21 --prox-layer-scale 0.5": "scale 0.5: '0.5' is neither one of ffn, enc",
    "--prox l21 --prox-layer-scale ffn:half": "scale ffn:half: ffn needs a finite number > 0",
    "--prox l21 --prox-metric newton": "argument --prox-metric: invalid choice: 'newton'",
    "--prox l21 --prox-metric adam": "error: --prox-metric adam has no default strength: give",
    "--prox l21 --prox-metric adam --prox-strength 1 --optimizer sgd": (
        "error: --prox-metric adam does not work with --optimizer sgd: it needs the second moments"
    ),
    "--prox l21 --prox-metric adam --prox-target-sparsity 0.5 --optimizer adafactor": (
        "--prox-metric adam does not work with --optimizer adafactor: it needs the second moments"
    ),
    "--prox l21 --optimizer adafactor --relative-step": (
        "error: --prox does not work with --relative-step on fairseq-train's command line"
    ),
    "--prox l21 --optimizer adafactor --scale-parameter": (
        "error: --prox-step-size schedule does not go with Adafactor's --scale-parameter, whose"
    ),
    "--prox l21 --prox-bias yes": "unrecognized arguments: yes",
    "--prox l21 --prox-couple 1": "unrecognized arguments: 1",
    "--prox l21 --best-checkpoint-metric loss_after_freeze": "loss_after_freeze: there is no ",
    "--best-checkpoint-metric loss_after_freeze": "loss_after_freeze: there is no freeze; give a",
    "--prox l21 --prox-freeze-update 1 --best-checkpoint-metric loss_after_freeze "
    "--maximize-best-checkpoint-metric": "loss_after_freeze does not go with --maximize-best-check",
    "--prox l21 --prox-freeze-update 1 --best-checkpoint-metric bleu_after_freeze": (
        "--best-checkpoint-metric bleu_after_freeze needs --eval-bleu, which --task translation has"
    ),
    "--prox l21 --prox-freeze-update 1 --best-checkpoint-metric bleu_after_freeze --eval-bleu": (
        "--best-checkpoint-metric bleu_after_freeze needs --maximize-best-checkpoint-metric"
    ),
    "--prox l21 --prox-freeze-update 1 --best-checkpoint-metric loss_after_freeze "
    "--lr-scheduler reduce_lr_on_plateau": (
        "loss_after_freeze does not go with --lr-scheduler reduce_lr_on_plateau, which would see no"
    ),
    "--prox linf1 --arch transformer_tiny --encoder-embed-dim 32 --decoder-embed-dim 64": (
        "error: --prox linf1: its default strength depends on the size of the groups, and they "
    ),
    "--prox l21 --arch lstm": "error: --prox-groups ffn: LSTMModel has no layer encoder.layers.N",
    "--arch transformer_autosize --encoder-ffn-dims 3,x": "error: --encoder-ffn-dims 3,x: must be",
    "--arch transformer_autosize --decoder-ffn-dims 3": "error: --decoder-ffn-dims 3: gives 1 size",
    "--arch transformer_autosize --cross-head-counts 1,2,1,1,1,99": (
        "error: --cross-head-counts 1,2,1,1,1,99: 99 heads, but the architecture has 8; give at"
    ),
    "--prox l21 --use-bmuf": "error: --prox does not work with --use-bmuf: its block momentum",
    "--prox l21 --bf16": "error: --prox does not work with --bf16 on fairseq-train's command line",
    "--prox l21 --memory-efficient-fp16": "--memory-efficient-fp16: it keeps no fp32 copy",
}


@pytest.mark.parametrize("options", COMMAND_LINES)
def test_command_line_ends_in_one_line(options, corpus, tmp_path):
    model = [] if "--arch" in options else TINY_MODEL
    train = ["fairseq_cli.train", corpus, *AUTOSIZE, *model, *TINY_TRAINING, "--max-update", "1"]
    result = run_program(*train, "--save-dir", tmp_path, *options.split())
    message = COMMAND_LINES[options]
    parsed = any(part in message for part in ("argument ", "unrecognized", "expected"))
    assert result.returncode == (2 if parsed else 1), result.stdout[-2000:]
    assert message in result.stdout.splitlines()[-1]
    assert "Traceback" not in result.stdout
    assert not list(tmp_path.glob("*.pt"))


HYDRA_TASK = {"_name": "translation_autosize", "prox": "l21"}
HYDRA_TASK |= {"prox_metric": "adam", "prox_strength": 1}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.prox=l3", "Invalid value 'l3', expected one of [none, l21, linf1]"),
        ("task.prox_strength=strong", "Value 'strong' of type 'str' could not be converted to F"),
        ("+task.prox_strenght=1", "Key 'prox_strenght' not in 'TranslationAutosizeConfig'"),
        (
            "+task.prox_target_sparsity=2",
            "ConfigError: --prox-target-sparsity 2.0: must be a share",
        ),
        ("+task.prox_freeze_update=soon", "ConfigError: --prox-freeze-update soon: must be a num"),
        (
            "+optimizer.fp16_adam_stats=true",
            "ConfigError: --prox-metric adam does not work with --fp16-adam-stats, which keeps",
        ),
    ],
)
def test_hydra_override_is_named(override, message, corpus, tmp_path):
    """Hydra shows a part of a traceback itself, and its advice comes last."""
    config = {
        **GROUP,
        "common": {"user_dir": str(USER_DIR), "cpu": True},
        "task": {**HYDRA_TASK, "data": str(corpus)},
        "model": {"_name": "transformer"},
        "criterion": {"_name": "cross_entropy"},
        "dataset": {"max_tokens": 400},
        "optimization": {"max_update": 1, "lr": [0.005]},
        "checkpoint": {"save_dir": str(tmp_path)},
    }
    (tmp_path / "bad.yaml").write_text("# @package _group_\n" + json.dumps(config))
    program = ("fairseq_cli.hydra_train", "--config-dir", tmp_path, "--config-name", "bad")
    result = run_program(*program, override, cwd=tmp_path)
    assert result.returncode == 1
    end = result.stdout.strip().splitlines()[-5:]
    assert any(message in line for line in end), result.stdout[-2000:]
    option = override.lstrip("+").partition("=")[0].partition(".")[2]
    assert any(option in line.replace("-", "_") for line in end)
    assert not list(tmp_path.glob("*.pt"))

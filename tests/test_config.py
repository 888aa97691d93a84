"""Validation of the `--prox*` options, and the modes that are refused."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf

from fairseq_autosize.config import (
    AutosizeConfig,
    ConfigError,
    Settings,
    check_optimizer,
    check_training_mode,
)
from fairseq_autosize.groups import FeedForward
from fairseq_autosize.tasks._autosize import AutosizeMixin


def settings(**options: object) -> Settings:
    return Settings.from_config(replace(AutosizeConfig(), **options))


def test_defaults():
    assert settings() == Settings("none", None, None, ("ffn",))


def test_values_are_read():
    read = settings(
        prox="linf1",
        prox_strength=0.0,
        prox_step_size="0.1",
        prox_groups="encoder-ffn, decoder-ffn",
        prox_bias=False,
        prox_start_update=7,
        prox_freeze_update="auto",
        prox_freeze_patience=30,
        prox_couple=True,
        prox_layer_scale="ffn:2, decoder.layers.0:0.5",
        prox_metric="adam",
    )
    assert read == Settings(
        "linf1",
        0.0,
        0.1,
        ("encoder-ffn", "decoder-ffn"),
        bias=False,
        start_update=7,
        patience=30,
        couple=True,
        layer_scales=(("ffn", 2.0), ("decoder.layers.0", 0.5)),
        adam_metric=True,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prox": "l3"}, "--prox l3: choose one of none, l21, linf1"),
        ({"prox_strength": -1.0}, "--prox-strength -1.0: must be a finite number >= 0"),
        ({"prox_strength": float("nan")}, "--prox-strength nan: must"),
        ({"prox_strength": float("inf")}, "--prox-strength inf: must"),
        ({"prox_step_size": "sched"}, "--prox-step-size sched: must be 'schedule'"),
        ({"prox_step_size": "0"}, "--prox-step-size 0: must"),
        ({"prox_step_size": "nan"}, "--prox-step-size nan: must"),
        ({"prox_groups": "ffn,heads"}, "--prox-groups ffn,heads: 'heads' is not one of ffn"),
        ({"prox_groups": ""}, "--prox-groups : '' is not one of"),
        ({"prox_start_update": -1}, "--prox-start-update -1: must be a number of updates >= 0"),
        ({"prox_freeze_update": "soon"}, "--prox-freeze-update soon: must be a number of updates"),
        ({"prox_freeze_update": "-3"}, "--prox-freeze-update -3: must be"),
        ({"prox_freeze_update": "1.5"}, "--prox-freeze-update 1.5: must be"),
        ({"prox_freeze_update": "nan"}, "--prox-freeze-update nan: must be"),
        (
            {"prox_freeze_update": "5", "prox_start_update": 5},
            "--prox-freeze-update 5: must come after --prox-start-update 5",
        ),
        ({"prox_freeze_patience": 0}, "--prox-freeze-patience 0: must be a number"),
        ({"prox_target_sparsity": 0.0}, "--prox-target-sparsity 0.0: must be a share between"),
        ({"prox_target_sparsity": 1.0}, "--prox-target-sparsity 1.0: must be a share between"),
        ({"prox_target_scope": "layer"}, "--prox-target-scope layer: there is no target; give"),
        ({"prox_target_scope": "side"}, "--prox-target-scope side: choose one of model, layer"),
        ({"prox_target_parameters": float("nan")}, "--prox-target-parameters nan: must be a"),
        *(
            (
                {option: 0.5},
                f"--{option.replace('_', '-')} 0.5 has no effect without an operator: add --prox "
                "l21 (or linf1)",
            )
            for option in ("prox_target_sparsity", "prox_target_parameters")
        ),
        (
            {"prox": "l21", "prox_target_sparsity": 0.5, "prox_target_parameters": 0.5},
            "--prox-target-sparsity 0.5 does not go with --prox-target-parameters",
        ),
        (
            {"prox": "l21", "prox_target_sparsity": 0.5, "prox_strength": 1.0},
            "--prox-target-sparsity 0.5 does not go with --prox-strength 1.0",
        ),
        (
            {"prox": "l21", "prox_target_sparsity": 0.5, "prox_step_size": "0.1"},
            "--prox-target-sparsity 0.5 does not go with --prox-step-size 0.1",
        ),
        (
            {"prox": "l21", "prox_target_parameters": 0.5, "prox_freeze_update": "auto"},
            "--prox-target-parameters 0.5 does not go with --prox-freeze-update auto",
        ),
        ({"prox_layer_scale": ""}, "--prox-layer-scale : '' is neither one of ffn"),
        ({"prox_layer_scale": "heads:2"}, "--prox-layer-scale heads:2: 'heads' is neither one of"),
        (
            {"prox_layer_scale": "encoder.layers:2"},
            "--prox-layer-scale encoder.layers:2: 'encoder.l",
        ),
        *(
            (
                {"prox_layer_scale": f"ffn:1,encoder-ffn{number}"},
                f"--prox-layer-scale ffn:1,encoder-ffn{number}: encoder-ffn needs a finite number",
            )
            for number in ("", ":", ":0", ":-1", ":nan", ":inf", ":1:2")
        ),
        (
            {
                "prox": "l21",
                "prox_target_sparsity": 0.5,
                "prox_target_scope": "layer",
                "prox_layer_scale": "ffn:2",
            },
            "--prox-layer-scale ffn:2 does not go with --prox-target-scope layer",
        ),
        ({"prox_metric": "newton"}, "--prox-metric newton: choose one of identity, adam"),
        ({"prox": "l21", "prox_metric": "adam"}, "--prox-metric adam has no default strength"),
    ],
)
def test_bad_values_are_refused_by_flag_and_value(options, message):
    with pytest.raises(ConfigError) as caught:
        settings(**options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "common.memory_efficient_fp16",
            True,
            "--memory-efficient-fp16: it keeps no fp32 copy of the weights, so .* use --fp16, or",
        ),
        (
            "common.memory_efficient_bf16",
            True,
            "--memory-efficient-bf16: it keeps no fp32 copy of .* use common.bf16=true with",
        ),
        ("common.tpu", True, "--tpu: train on GPUs or with --cpu, or"),
        (
            "common.model_parallel_size",
            2,
            "--model-parallel-size 2: use --model-parallel-size 1",
        ),
        (
            "common.quantization_config_path",
            "q.yaml",
            "--quantization-config-path q.yaml: train without it",
        ),
        ("optimization.use_bmuf", True, "--use-bmuf: its block momentum .* train without it"),
        (
            "distributed_training.ddp_backend",
            "fully_sharded",
            "--ddp-backend fully_sharded: use --ddp-backend legacy_ddp",
        ),
        (
            "distributed_training.ddp_backend",
            "slowmo",
            "--ddp-backend slowmo: use --ddp-backend legacy_ddp",
        ),
        (
            "distributed_training.zero_sharding",
            "os",
            "--zero-sharding os: use --zero-sharding none",
        ),
        (
            "distributed_training.pipeline_model_parallel",
            True,
            "--pipeline-model-parallel: use --ddp-backend legacy_ddp",
        ),
        ("model.quant_noise_pq", 0.1, "--quant-noise-pq: train without it"),
    ],
)
def test_modes_that_would_go_wrong_are_refused_with_what_to_use(key, value, message):
    cfg = OmegaConf.create(asdict(FairseqConfig()))
    cfg.model = {}
    check_training_mode(cfg)
    OmegaConf.update(cfg, key, value, force_add=True)
    with pytest.raises(ConfigError, match=f"--prox does not work with {message}") as caught:
        check_training_mode(cfg)
    assert str(caught.value).endswith("or train with --prox none")
    assert "\n" not in str(caught.value)


def whole_config(**optimizer: object):
    cfg = OmegaConf.create(asdict(FairseqConfig()))
    cfg.optimizer = optimizer
    return cfg


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        *(
            (
                {"_name": name},
                {"prox_metric": "adam"},
                f"--prox-metric adam does not work with --optimizer {name}: it needs the second "
                "moments of adam or cpu_adam; use one of these, or --prox-metric identity",
            )
            for name in ("sgd", "nag", "adagrad", "adadelta", "adamax", "adafactor", "composite")
        ),
        (
            {"_name": "adam", "fp16_adam_stats": True},
            {"prox_metric": "adam"},
            "--prox-metric adam does not work with --fp16-adam-stats, .* leave that out, or use",
        ),
        (
            {"_name": "adafactor", "relative_step": True, "lr": [0.25]},
            {"prox_step_size": "0.001"},
            "--prox does not work with --relative-step on .*, where --lr always has .* leave it",
        ),
        (
            {"_name": "adafactor", "relative_step": True, "lr": [None]},
            {},
            "--prox-step-size schedule does not go with Adafactor's --relative-step, .* give a",
        ),
        (
            {"_name": "adafactor", "scale_parameter": True, "lr": [0.25]},
            {},
            "--prox-step-size schedule does not go with Adafactor's --scale-parameter, .* give a",
        ),
    ],
)
def test_optimizers_that_lack_what_the_steps_need_are_refused(optimizer, options, message):
    chosen = settings(prox="l21", prox_strength=1.0, **options)
    with pytest.raises(ConfigError, match=message) as caught:
        check_optimizer(whole_config(**optimizer), chosen)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ({"_name": "adam", "fp16_adam_stats": False}, {"prox_metric": "adam", "prox_strength": 1}),
        ({"_name": "adam", "fp16_adam_stats": True}, {}),
        ({"_name": "sgd"}, {}),
        ({"_name": "adafactor", "relative_step": False, "lr": [0.25]}, {}),
        (
            {"_name": "adafactor", "relative_step": True, "lr": [None]},
            {"prox_step_size": "0.001"},
        ),
        (
            {"_name": "adafactor", "scale_parameter": True, "lr": [0.25]},
            {"prox_target_sparsity": 0.5},
        ),
    ],
)
def test_other_optimizers_are_not_refused(optimizer, options):
    check_optimizer(whole_config(**optimizer), settings(prox="l21", **options))


def test_processes_of_torchrun_that_would_train_alone_are_refused(monkeypatch):
    cfg = OmegaConf.create(asdict(FairseqConfig()))
    cfg.distributed_training.distributed_world_size = 1  # fairseq's default without GPUs
    cfg.model = {}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_training_mode(cfg)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun has started 2 processes: each would train"):
        check_training_mode(cfg)


@pytest.mark.parametrize(
    ("options", "max_update", "warmup", "freeze"),
    [
        ({}, 0, 0, None),
        ({"prox_freeze_update": "7"}, 0, 10, 7),
        ({"prox_freeze_update": "auto"}, 100, 10, None),
        ({"prox_freeze_update": "0.3"}, 50, 10, 15),
        ({"prox_target_sparsity": 0.5}, 100, 0, 20),
        ({"prox_target_sparsity": 0.5}, 100, 40, 52),
        ({"prox_target_parameters": 0.5}, 100, 4000, 100),
        ({"prox_target_sparsity": 0.5, "prox_start_update": 50}, 100, 40, 60),
        ({"prox_target_sparsity": 0.5, "prox_start_update": 30}, 100, 40, 52),
        ({"prox_target_sparsity": 0.5, "prox_freeze_update": "0.3"}, 100, 40, 30),
        ({"prox_target_sparsity": 0.5, "prox_freeze_update": "100"}, 100, 40, 100),
        ({"prox_target_parameters": 0.5, "prox_freeze_update": "7"}, 0, 0, 7),
    ],
)
def test_when_the_freeze_comes(options, max_update, warmup, freeze):
    assert settings(prox="l21", **options).freeze_of(max_update, warmup) == freeze


@pytest.mark.parametrize(
    ("options", "max_update", "message"),
    [
        (
            {},
            0,
            r"^--prox-target-sparsity 0\.5 needs --max-update: the freeze comes 0\.2 of the way "
            r"from the warm-up's end to it; give it, or give --prox-freeze-update a number of up",
        ),
        (
            {"prox_target_sparsity": None, "prox_target_parameters": 0.1},
            0,
            r"^--prox-target-parameters 0\.1 needs --max-update: the freeze comes 0\.2 of the way",
        ),
        (
            {"prox_freeze_update": "0.3"},
            0,
            r"^--prox-freeze-update 0\.3 needs --max-update: of which it is a share; give it, or",
        ),
        (
            {"prox_start_update": 20, "prox_freeze_update": "0.2"},
            100,
            r"--prox-start-update 20: .* ends after 20 of 100",
        ),
        (
            {"prox_start_update": 98},
            100,
            r"--prox-start-update 98: .* ends after 98 of 100",
        ),
    ],
)
def test_targets_need_an_end(options, max_update, message):
    chosen = settings(prox="l21", **({"prox_target_sparsity": 0.5} | options))
    with pytest.raises(ConfigError, match=message):
        chosen.freeze_of(max_update)


@pytest.mark.parametrize(
    ("scheduler", "warmup"),
    [
        ({"_name": "inverse_sqrt", "warmup_updates": 30}, 30),
        ({"_name": "fixed", "warmup_updates": None}, 0),
        ({"_name": "triangular"}, 0),
        ({"_name": "tri_stage", "warmup_steps": 20, "phase_ratio": None}, 20),
        ({"_name": "tri_stage", "warmup_steps": 20, "phase_ratio": (0.1, 0.6, 0.3)}, 40),
    ],
)
def test_the_warm_up_of_each_schedule(scheduler, warmup):
    root = SimpleNamespace(lr_scheduler=SimpleNamespace(**scheduler))
    task = SimpleNamespace(_whole_config=root, _max_update=400)
    assert AutosizeMixin._warmup.fget(task) == warmup


def test_linf1_has_no_default_strength_for_groups_of_different_sizes():
    blocks = [
        FeedForward("x", "encoder-ffn", torch.ones(4, n), torch.ones(4), torch.ones(n, 4))
        for n in (8, 16)
    ]
    task = SimpleNamespace(settings=settings(prox="linf1"))
    with pytest.raises(ConfigError, match=r"differ \(9, 17 entries\): give --prox-strength"):
        AutosizeMixin._default_strength(task, blocks)
    task.settings = settings(prox="l21")
    assert AutosizeMixin._default_strength(task, blocks) == 1.0

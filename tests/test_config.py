"""Validation of the `--prox*` options, and the modes that are refused."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf

from fairseq_autosize.config import AutosizeConfig, ConfigError, Settings, check_training_mode
from fairseq_autosize.tasks._autosize import AutosizeMixin


def settings(**options: object) -> Settings:
    return Settings.from_config(replace(AutosizeConfig(), **options))


def test_defaults():
    assert settings() == Settings("none", None, None, ("ffn",), True, 0)


def test_values_are_read():
    read = settings(
        prox="linf1",
        prox_strength=0.0,
        prox_step_size="0.1",
        prox_groups="encoder-ffn, decoder-ffn",
        prox_bias=False,
        prox_start_update=7,
    )
    assert read == Settings("linf1", 0.0, 0.1, ("encoder-ffn", "decoder-ffn"), False, 7)


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
    ],
)
def test_bad_values_are_refused_by_flag_and_value(options, message):
    with pytest.raises(ConfigError) as caught:
        settings(**options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("key", "value", "flag"),
    [
        ("common.memory_efficient_fp16", True, "--memory-efficient-fp16"),
        ("common.memory_efficient_bf16", True, "--memory-efficient-bf16"),
        ("common.amp", True, "--amp"),
        ("common.tpu", True, "--tpu"),
        ("common.model_parallel_size", 2, "--model-parallel-size"),
        ("common.quantization_config_path", "q.yaml", "--quantization-config-path"),
        ("optimization.use_bmuf", True, "--use-bmuf"),
        ("distributed_training.ddp_backend", "fully_sharded", "--ddp-backend fully_sharded"),
        ("distributed_training.ddp_backend", "slowmo", "--ddp-backend slowmo"),
        ("distributed_training.zero_sharding", "os", "--zero-sharding os"),
        ("distributed_training.pipeline_model_parallel", True, "--pipeline-model-parallel"),
        ("model.quant_noise_pq", 0.1, "--quant-noise-pq"),
    ],
)
def test_modes_that_would_go_wrong_are_refused_by_flag(key, value, flag):
    cfg = OmegaConf.create(asdict(FairseqConfig()))
    cfg.model = {}
    check_training_mode(cfg)
    OmegaConf.update(cfg, key, value, force_add=True)
    with pytest.raises(ConfigError, match=f"--prox does not work with {flag} yet"):
        check_training_mode(cfg)


def test_linf1_has_no_default_strength_for_groups_of_different_sizes():
    layers = [SimpleNamespace(fc1_weight=torch.ones(4, columns)) for columns in (8, 16)]
    task = SimpleNamespace(_layers=layers, settings=settings(prox="linf1"))
    with pytest.raises(ConfigError, match=r"differ \(9, 17 entries\): give --prox-strength"):
        AutosizeMixin._default_strength(task)
    task.settings = settings(prox="l21")
    assert AutosizeMixin._default_strength(task) == 1.0

"""The `--prox*` options: one dataclass block, and its validation into `Settings`."""

import math
from argparse import ArgumentParser, BooleanOptionalAction
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from .groups import GROUP_NAMES
from .prox import OPERATORS

PROX_CHOICES = ("none", *OPERATORS)


class ConfigError(ValueError):
    """A `--prox*` option, or a combination, that cannot work; the message names the flag."""


@dataclass
class AutosizeConfig(FairseqDataclass):
    """Options that the package adds to a task. Field names are the flags' names with `_` for `-`.

    The annotations are spelled for fairseq, whose option parser knows `Optional` but not `|`.
    """

    prox: ChoiceEnum(PROX_CHOICES) = field(  # type: ignore[valid-type]
        default="none",
        metadata={
            "help": "proximal operator applied to the rows of fc1 after every update: "
            "l21 (sum of the rows' l2 norms), linf1 (sum of the rows' largest magnitudes), "
            "or none (plain fairseq)"
        },
    )
    prox_strength: Optional[float] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "strength lambda >= 0; the threshold of an update is lambda times the step "
            "size. Default: 1.0 for l21; for linf1 that times sqrt(3 n)/2, n entries a group "
            "(9.8 for d=128, 19.6 for d=512), which puts the same pressure on a new row"
        },
    )
    prox_step_size: str = field(
        default="schedule",
        metadata={
            "help": "step size eta of the proximal step: 'schedule' (the learning rate of the "
            "update), or a constant > 0 (ProxGradPytorch's way; it ignores warm-up and decay)"
        },
    )
    prox_groups: str = field(
        default="ffn",
        metadata={
            "help": "comma-separated list of the blocks whose neurons are groups: "
            + ", ".join(GROUP_NAMES)
        },
    )
    prox_bias: bool = field(
        default=True,
        metadata={"help": "count fc1's bias as part of its neuron's group"},
    )
    prox_start_update: int = field(
        default=0,
        metadata={"help": "number of updates (>= 0) to train before the first proximal step"},
    )


@dataclass(frozen=True)
class Settings:
    """The validated options.

    Attributes:
        prox: a name in `prox.OPERATORS`, or ``none``.
        strength: lambda, or None for the operator's default.
        step_size: a constant eta, or None to follow the learning rate.
        groups: names in `groups.GROUP_NAMES`.
        bias: whether fc1's bias belongs to the group.
        start_update: updates without proximal steps at the beginning.
    """

    prox: str
    strength: float | None
    step_size: float | None
    groups: tuple[str, ...]
    bias: bool
    start_update: int

    @classmethod
    def from_config(cls, cfg: Any) -> "Settings":
        """Validate the option block of a task.

        Args:
            cfg: anything with the fields of `AutosizeConfig` as attributes.

        Raises:
            ConfigError: a value out of its range; the message names the flag, the value and what
                is allowed.
        """
        prox = str(cfg.prox)
        if prox not in PROX_CHOICES:
            raise ConfigError(f"--prox {prox}: choose one of {', '.join(PROX_CHOICES)}")
        strength = cfg.prox_strength
        if strength is not None and not (math.isfinite(strength) and strength >= 0):
            raise ConfigError(f"--prox-strength {strength}: must be a finite number >= 0")
        if cfg.prox_start_update < 0:
            raise ConfigError(
                f"--prox-start-update {cfg.prox_start_update}: must be a number of updates >= 0"
            )
        return cls(
            prox=prox,
            strength=strength,
            step_size=_step_size(str(cfg.prox_step_size)),
            groups=_groups(str(cfg.prox_groups)),
            bias=bool(cfg.prox_bias),
            start_update=int(cfg.prox_start_update),
        )


def _step_size(text: str) -> float | None:
    if text == "schedule":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(
            f"--prox-step-size {text}: must be 'schedule' (the learning rate of each update) or a "
            "finite number > 0"
        )
    return value


def _groups(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in GROUP_NAMES:
            raise ConfigError(
                f"--prox-groups {text}: {name!r} is not one of {', '.join(GROUP_NAMES)} "
                "(separate several by commas)"
            )
    return names


def add_bias_flags(parser: ArgumentParser) -> None:
    """Add `--prox-bias` and `--no-prox-bias`.

    fairseq turns a boolean field that is on by default into a flag that switches it *off*, so
    this pair must be in the parser before fairseq adds the dataclass; fairseq then skips the name.
    """
    parser.add_argument(
        "--prox-bias",
        action=BooleanOptionalAction,
        default=AutosizeConfig.prox_bias,
        help=AutosizeConfig.__dataclass_fields__["prox_bias"].metadata["help"],
    )


def check_training_mode(cfg: Any) -> None:
    """Refuse the modes in which proximal steps are not known to be right.

    Args:
        cfg: fairseq's whole configuration (`FairseqConfig`).

    Raises:
        ConfigError: naming the flag.
    """
    distributed = cfg.distributed_training
    unsupported = {
        "--memory-efficient-fp16": cfg.common.memory_efficient_fp16,
        "--memory-efficient-bf16": cfg.common.memory_efficient_bf16,
        "--amp": cfg.common.amp,
        "--tpu": cfg.common.tpu and not cfg.common.bf16,
        "--use-bmuf": cfg.optimization.use_bmuf,
        "--ddp-backend fully_sharded": distributed.ddp_backend == "fully_sharded",
        "--ddp-backend slowmo": distributed.ddp_backend == "slowmo",
        "--zero-sharding os": distributed.zero_sharding == "os",
        "--pipeline-model-parallel": distributed.pipeline_model_parallel,
        "--model-parallel-size": cfg.common.model_parallel_size > 1,
        "--quantization-config-path": cfg.common.quantization_config_path is not None,
        "--quant-noise-pq": (getattr(cfg.model, "quant_noise_pq", 0) or 0) > 0,
    }
    if cfg.common.tpu and cfg.common.bf16:
        # fairseq's command line takes --bf16 for a TPU's, and sets --tpu itself.
        raise ConfigError(
            "--prox does not work with --bf16 on fairseq-train's command line, which turns it "
            "into --tpu: train with fairseq-hydra-train and common.bf16=true"
        )
    refused = [flag for flag, is_set in unsupported.items() if is_set]
    if refused:
        raise ConfigError(
            f"--prox does not work with {', '.join(refused)} yet: drop "
            f"{'it' if len(refused) == 1 else 'them'}, or train with --prox none"
        )

"""The `--prox*` options: one dataclass block, and its validation into `Settings`."""

import functools
import math
import os
import sys
from argparse import ArgumentParser, BooleanOptionalAction
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Optional

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from .groups import GROUP_NAMES, GroupError, is_layer_name
from .prox import OPERATORS

PROX_CHOICES = ("none", *OPERATORS)
METRICS = ("identity", "adam")
SCOPES = ("model", "layer")
# fairseq's optimizers that divide each parameter's step by the root of a second moment, and do
# nothing else to it; lamb scales it by layer, and adafactor keeps sums over rows and columns.
WITH_ADAM_METRIC = ("adam", "cpu_adam")

# Share of the updates after the warm-up when a target is reached, where the user does not say when;
# the rest is the refit. docs/results.md has runs with other freezes.
DEFAULT_FREEZE = 0.2


_NO_MASTER = "it keeps no fp32 copy of the weights, so small shrinking is rounded away; use"


class ConfigError(ValueError):
    """An option of ours, or a combination, that cannot work; the message names the flag."""


@functools.cache
def tell_errors_in_one_line() -> None:
    """Let an error in the options end the program in one line, without a traceback.

    fairseq's programs catch nothing, so what to change in the command would come after 40 lines of
    their code. Other errors, and a program that catches these, see no difference.
    """
    before = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, ConfigError | GroupError):
            sys.stderr.write(f"{os.path.basename(sys.argv[0])}: error: {error}\n")
        else:
            before(kind, error, trace)

    sys.excepthook = tell


@dataclass
class AutosizeConfig(FairseqDataclass):
    """Options that the package adds to a task. Field names are the flags' names with `_` for `-`.

    The annotations are spelled for fairseq, whose option parser knows `Optional` but not `|`.
    """

    prox: ChoiceEnum(PROX_CHOICES) = field(  # type: ignore[valid-type]
        default="none",
        metadata={
            "help": "proximal operator applied to the groups, rows of fc1, after every update: "
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
            "help": "comma-separated list of the blocks whose neurons (ffn) or heads (attention) "
            "are groups: " + ", ".join(GROUP_NAMES)
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
    prox_target_sparsity: Optional[float] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "share of the groups, 0 < F < 1, that is to be dead at --prox-freeze-update; "
            "sets the strength by itself, at every update; needs --max-update, or "
            "--prox-freeze-update as a number"
        },
    )
    prox_target_parameters: Optional[float] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "the same for the share of all of the model's parameters, 0 < P < 1, that "
            "compaction is to remove"
        },
    )
    prox_target_scope: ChoiceEnum(SCOPES) = field(  # type: ignore[valid-type]
        default="model",
        metadata={
            "help": "where a target holds: model (the smallest groups of all layers go, however "
            "they are spread), or layer (the same share of every layer goes, so that a uniform "
            "width is left)"
        },
    )
    prox_freeze_update: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "number of updates (> --prox-start-update), or share of --max-update "
            "(0 < F < 1), after which nothing is shrunk any more: dead neurons stay exactly zero, "
            "and the others are refitted. 'auto': once the dead have been the same for "
            "--prox-freeze-patience updates. Default: never; with a target, once the warm-up (or "
            f"--prox-start-update, if later) and {DEFAULT_FREEZE} of the updates from there to "
            "--max-update are over"
        },
    )
    prox_freeze_patience: int = field(
        default=500,
        metadata={"help": "updates (>= 1) without a change that --prox-freeze-update auto waits"},
    )
    prox_couple: bool = field(
        default=False,
        metadata={
            "help": "count the neuron's column of fc2 as part of its group, so that the weights "
            "cannot escape the penalty by scaling fc1 down and fc2 up"
        },
    )
    prox_layer_scale: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "comma-separated list of NAME:S, S > 0, such as encoder-ffn:0.5: the strength "
            "is S times as large for the groups of NAME, one of those of --prox-groups or a layer "
            "such as decoder.layers.0; of several with a group the last counts. With a target, "
            "groups die in the order of their norms divided by S"
        },
    )
    prox_metric: ChoiceEnum(METRICS) = field(  # type: ignore[valid-type]
        default="identity",
        metadata={
            "help": "metric of the proximal step: identity, or adam (Adam's own, the square root "
            "of its second moments), in which strengths have another scale: give --prox-strength "
            "or a target"
        },
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
        target_sparsity: share of the groups to be dead at the freeze, or None.
        target_parameters: share of all parameters to be gone by compaction then, or None.
        target_by_layer: whether every layer is to lose the same share.
        freeze_update: updates before the freeze, if they were given as a number.
        freeze_share: the same as a share of the training.
        patience: updates without a change before the freeze, with ``--prox-freeze-update auto``.
        couple: whether the column of fc2 belongs to the group.
        layer_scales: names in `groups.GROUP_NAMES` or of layers, each with what the strength of its
            groups is multiplied by.
        adam_metric: whether steps are taken in Adam's metric.
    """

    prox: str
    strength: float | None
    step_size: float | None
    groups: tuple[str, ...]
    bias: bool = True
    start_update: int = 0
    target_sparsity: float | None = None
    target_parameters: float | None = None
    target_by_layer: bool = False
    freeze_update: int | None = None
    freeze_share: float | None = None
    patience: int | None = None
    couple: bool = False
    layer_scales: tuple[tuple[str, float], ...] = ()
    adam_metric: bool = False

    @property
    def has_target(self) -> bool:
        return self.target_sparsity is not None or self.target_parameters is not None

    @property
    def target(self) -> tuple[str, float | None]:
        """The flag of the target, and its share."""
        if self.target_sparsity is not None:
            return "--prox-target-sparsity", self.target_sparsity
        return "--prox-target-parameters", self.target_parameters

    @property
    def freezes(self) -> bool:
        """Whether there is to be a freeze, planned or once the dead have stayed the same."""
        asked = (self.freeze_update, self.freeze_share, self.patience)
        planned = self.has_target or any(value is not None for value in asked)
        return self.prox != "none" and planned

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
        for flag, value, choices in (
            ("--prox", prox, PROX_CHOICES),
            ("--prox-metric", cfg.prox_metric, METRICS),
            ("--prox-target-scope", cfg.prox_target_scope, SCOPES),
        ):
            if value not in choices:
                raise ConfigError(f"{flag} {value}: choose one of {', '.join(choices)}")
        strength = cfg.prox_strength
        if strength is not None and not (math.isfinite(strength) and strength >= 0):
            raise ConfigError(f"--prox-strength {strength}: must be a finite number >= 0")
        if cfg.prox_start_update < 0:
            raise ConfigError(
                f"--prox-start-update {cfg.prox_start_update}: must be a number of updates >= 0"
            )
        for flag, share in (
            ("--prox-target-sparsity", cfg.prox_target_sparsity),
            ("--prox-target-parameters", cfg.prox_target_parameters),
        ):
            if share is not None:
                _check_target(flag, share, cfg)
        freeze, share, patience = _freeze(cfg)
        settings = cls(
            prox=prox,
            strength=strength,
            step_size=_step_size(str(cfg.prox_step_size)),
            groups=_groups(str(cfg.prox_groups)),
            bias=bool(cfg.prox_bias),
            start_update=int(cfg.prox_start_update),
            target_sparsity=cfg.prox_target_sparsity,
            target_parameters=cfg.prox_target_parameters,
            target_by_layer=cfg.prox_target_scope == "layer",
            freeze_update=freeze,
            freeze_share=share,
            patience=patience,
            couple=bool(cfg.prox_couple),
            layer_scales=_layer_scales(cfg.prox_layer_scale),
            adam_metric=cfg.prox_metric == "adam",
        )
        if settings.target_by_layer and not settings.has_target:
            raise ConfigError(
                "--prox-target-scope layer: there is no target; give --prox-target-sparsity or "
                "--prox-target-parameters"
            )
        if settings.target_by_layer and settings.layer_scales:
            raise ConfigError(
                f"--prox-layer-scale {cfg.prox_layer_scale} does not go with --prox-target-scope "
                "layer, where every layer loses the same share; leave out one of them"
            )
        needs_strength = settings.adam_metric and prox != "none"
        if needs_strength and strength is None and not settings.has_target:
            raise ConfigError(
                "--prox-metric adam has no default strength: give --prox-strength, or a target "
                "such as --prox-target-sparsity 0.5"
            )
        return settings

    def freeze_of(self, max_update: int, begin: int = 0) -> int | None:
        """The freeze's update, if it is planned.

        Args:
            max_update: the training's length; 0 if it is open.
            begin: updates after which a target's default share counts: those of the warm-up, or
                of a run that goes on; those before `start_update` do not count either.

        Raises:
            ConfigError: a share of an open training, or a start that is not before the freeze.
        """
        if self.freeze_update is not None:
            return self.freeze_update
        if self.freeze_share is None and not self.has_target:
            return None
        share = DEFAULT_FREEZE if self.freeze_share is None else self.freeze_share
        default = self.freeze_share is None
        if not max_update:
            given, why = f"--prox-freeze-update {share:g}", "of which it is a share"
            if default:
                given = "{} {}".format(*self.target)
                why = f"the freeze comes {share:g} of the way from the warm-up's end to it"
            raise ConfigError(
                f"{given} needs --max-update: {why}; give it, or give --prox-freeze-update a "
                "number of updates"
            )
        begin = min(max(begin, self.start_update), max_update) if default else 0
        freeze = begin + round(share * (max_update - begin))
        if not freeze:
            raise ConfigError(
                f"--prox-freeze-update: {share:g} of {max_update} updates is none; give more"
            )
        if freeze <= self.start_update:
            raise ConfigError(
                f"--prox-start-update {self.start_update}: shrinking ends after {freeze} of "
                f"{max_update} updates; start earlier, or give "
                f"{'more updates' if default else 'a later --prox-freeze-update'}"
            )
        return freeze


def _step_size(text: str) -> float | None:
    if text == "schedule":
        return None
    value = _number(text)
    if not value > 0:
        raise ConfigError(
            f"--prox-step-size {text}: must be 'schedule' (the learning rate of each update) or a "
            "finite number > 0"
        )
    return value


def _check_target(flag: str, share: float, cfg: Any) -> None:
    """Refuse a target that is no share, or that contradicts another option."""
    if not 0 < share < 1:  # NaN too
        raise ConfigError(f"{flag} {share}: must be a share between 0 and 1, both excluded")
    if str(cfg.prox) == "none":
        raise ConfigError(
            f"{flag} {share} has no effect without an operator: add --prox l21 (or linf1)"
        )
    both = cfg.prox_target_sparsity is not None and cfg.prox_target_parameters is not None
    conflicts = {
        "--prox-target-parameters": both,
        f"--prox-strength {cfg.prox_strength}, which it sets by itself": (
            cfg.prox_strength is not None
        ),
        f"--prox-step-size {cfg.prox_step_size}, which it sets by itself": (
            str(cfg.prox_step_size) != "schedule"
        ),
        "--prox-freeze-update auto: give the number of updates": cfg.prox_freeze_update == "auto",
    }
    for conflict, there in conflicts.items():
        if there:
            raise ConfigError(f"{flag} {share} does not go with {conflict}")


def _freeze(cfg: Any) -> tuple[int | None, float | None, int | None]:
    """(updates before the freeze, as a share of the training, patience), at most one not None."""
    text = cfg.prox_freeze_update
    if cfg.prox_freeze_patience < 1:
        raise ConfigError(
            f"--prox-freeze-patience {cfg.prox_freeze_patience}: must be a number of updates >= 1"
        )
    if text is None:
        return None, None, None
    if text == "auto":
        return None, None, int(cfg.prox_freeze_patience)
    if not str(text).isdecimal():
        share = _number(str(text))
        if not 0 < share < 1:  # NaN too
            raise ConfigError(
                f"--prox-freeze-update {text}: must be a number of updates, a share of "
                "--max-update between 0 and 1, or 'auto'"
            )
        return None, share, None
    if int(text) <= cfg.prox_start_update:
        raise ConfigError(
            f"--prox-freeze-update {text}: must come after --prox-start-update "
            f"{cfg.prox_start_update}"
        )
    return int(text), None, None


def _number(text: str) -> float:
    """A finite number, or NaN."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _groups(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in GROUP_NAMES:
            raise ConfigError(
                f"--prox-groups {text}: {name!r} is not one of {', '.join(GROUP_NAMES)} "
                "(separate several by commas)"
            )
    return names


def _layer_scales(text: str | None) -> tuple[tuple[str, float], ...]:
    scales = []
    for entry in [] if text is None else text.split(","):
        name, _, number = (part.strip() for part in entry.partition(":"))
        if name not in GROUP_NAMES and not is_layer_name(name):
            raise ConfigError(
                f"--prox-layer-scale {text}: {name!r} is neither one of {', '.join(GROUP_NAMES)} "
                "nor a layer such as encoder.layers.0"
            )
        if not (scale := _number(number)) > 0:  # NaN too
            raise ConfigError(
                f"--prox-layer-scale {text}: {name} needs a finite number > 0, as in {name}:0.5; "
                "what is not to be shrunk at all is left out of --prox-groups"
            )
        scales.append((name, scale))
    return tuple(scales)


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


def check_optimizer(cfg: Any, settings: Settings) -> None:
    """Refuse an optimizer that lacks what the proximal steps are to take from it.

    Args:
        cfg: fairseq's whole configuration (`FairseqConfig`).
        settings: of a training with proximal steps.

    Raises:
        ConfigError: naming the flags and what is allowed.
    """
    name = getattr(cfg.optimizer, "_name", None)

    def is_set(option: str) -> bool:
        return bool(getattr(cfg.optimizer, option, False))

    if settings.adam_metric:
        if name not in WITH_ADAM_METRIC:
            raise ConfigError(
                f"--prox-metric adam does not work with --optimizer {name}: it needs the second "
                f"moments of {' or '.join(WITH_ADAM_METRIC)}; use one of these, or --prox-metric "
                "identity"
            )
        if is_set("fp16_adam_stats"):
            raise ConfigError(
                "--prox-metric adam does not work with --fp16-adam-stats, which keeps the second "
                "moments scaled: leave that out, or use --prox-metric identity"
            )
    if name != "adafactor":
        return
    if is_set("relative_step") and cfg.optimizer.lr[0] is not None:
        raise ConfigError(
            "--prox does not work with --relative-step on fairseq-train's command line, where "
            "--lr always has a value, which fairseq's Adafactor refuses beside it: leave it out"
        )
    if settings.step_size is None and not settings.has_target:
        for flag in ("relative_step", "scale_parameter"):
            if is_set(flag):
                raise ConfigError(
                    "--prox-step-size schedule does not go with Adafactor's "
                    f"--{flag.replace('_', '-')}, whose rates are not those of the schedule: give "
                    "a constant such as --prox-step-size 0.001, or leave that out"
                )


def check_training_mode(cfg: Any) -> None:
    """Refuse the modes in which proximal steps would be lost or wrong.

    Args:
        cfg: fairseq's whole configuration (`FairseqConfig`).

    Raises:
        ConfigError: naming the flag, its value and what to use instead.
    """
    distributed, common = cfg.distributed_training, cfg.common
    backend, world_size = distributed.ddp_backend, distributed.distributed_world_size
    if common.tpu and common.bf16:
        # fairseq's command line takes --bf16 for a TPU's, and sets --tpu itself.
        raise ConfigError(
            "--prox does not work with --bf16 on fairseq-train's command line, which turns it "
            "into --tpu: train with fairseq-hydra-train and common.bf16=true"
        )
    sharded = "use --ddp-backend legacy_ddp, in which every process has all parameters"
    refused = {
        "--memory-efficient-fp16": (common.memory_efficient_fp16, f"{_NO_MASTER} --fp16"),
        "--memory-efficient-bf16": (
            common.memory_efficient_bf16,
            f"{_NO_MASTER} common.bf16=true with fairseq-hydra-train",
        ),
        "--tpu": (common.tpu, "train on GPUs or with --cpu"),
        "--use-bmuf": (
            cfg.optimization.use_bmuf,
            "its block momentum brings dead neurons back; train without it",
        ),
        f"--ddp-backend {backend}": (backend in ("fully_sharded", "slowmo"), sharded),
        "--zero-sharding os": (distributed.zero_sharding == "os", "use --zero-sharding none"),
        "--pipeline-model-parallel": (distributed.pipeline_model_parallel, sharded),
        f"--model-parallel-size {common.model_parallel_size}": (
            common.model_parallel_size > 1,
            "use --model-parallel-size 1",
        ),
        f"--quantization-config-path {common.quantization_config_path}": (
            common.quantization_config_path is not None,
            "train without it, and quantize with fairseq-autosize export",
        ),
        "--quant-noise-pq": (
            (getattr(cfg.model, "quant_noise_pq", 0) or 0) > 0,
            "train without it, and quantize with fairseq-autosize export",
        ),
    }
    for flag, (is_set, instead) in refused.items():
        if is_set:
            raise ConfigError(
                f"--prox does not work with {flag}: {instead}, or train with --prox none"
            )
    launched = os.environ.get("WORLD_SIZE", "1")
    if world_size == 1 and "TORCHELASTIC_RUN_ID" in os.environ and launched != "1":
        # fairseq does not look at torchrun's variables then.
        raise ConfigError(
            f"--distributed-world-size 1, but torchrun has started {launched} processes: each "
            "would train alone and write over the others' checkpoints; on GPUs give "
            f"--distributed-world-size {launched}, on a CPU use scripts/train_distributed.sh"
        )
    if world_size > 1 and not torch.distributed.is_initialized():
        # As with --distributed-port alone: fairseq then trains one process on a part of the GPUs.
        raise ConfigError(
            f"--distributed-world-size {world_size}, but this process has joined no others and "
            "would train alone: start the processes with scripts/train_distributed.sh"
        )

"""What every task with auto-sizing shares: a mixin, and how a task enters fairseq's registries."""

import itertools
import logging
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf, gen_parser_from_dataclass
from fairseq.logging import metrics
from fairseq.logging.meters import MetersDict
from fairseq.optim import FairseqOptimizer
from fairseq.optim.lr_scheduler import build_lr_scheduler
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY, FairseqTask, register_task
from hydra.core.config_store import ConfigStore
from torch import nn

from ..config import (
    AutosizeConfig,
    ConfigError,
    Settings,
    add_bias_flags,
    check_optimizer,
    check_training_mode,
    tell_errors_in_one_line,
)
from ..groups import Block, FeedForward, blocks_in_model, has_slope_at_zero, is_of
from ..masters import precision_state, restore_precision
from ..prox import OPERATORS
from ..proximal_optimizer import GroupShape, ProximalOptimizer
from ..report import signature
from ..strength import Goal, Plan, death_updates, default_strength, numbers_by_layer

logger = logging.getLogger(__name__)

# How far ahead the learning rate is followed where --max-update sets no end.
HORIZON = 100_000

# Schedules that follow from the update's number alone. Others wait for validation losses or belong
# to another optimizer, and --lr with several values and --force-anneal change the rate by epoch: no
# forecast there.
PLANNED_SCHEDULES = ("fixed", "inverse_sqrt", "cosine", "polynomial_decay", "tri_stage")


_OPTIONS = tuple(f.name for f in fields(AutosizeConfig) if f.name.startswith("prox"))

# For --best-checkpoint-metric: what fairseq measures, of a model that has its final size. Before
# the freeze it is a number worse than any, which gets better with every update, so that --patience
# does not lose patience. None is negative: --keep-best-checkpoints would not find its files again.
AFTER_FREEZE = MappingProxyType({"loss_after_freeze": "loss", "bleu_after_freeze": "bleu"})
WORST_LOSS, WORST_BLEU = 1e9, 1e-9


class AutosizeMixin(FairseqTask):
    """Adds the `--prox*` options to a fairseq task. Put it left of the task in the bases.

    With ``--prox none`` every method does what the task itself does.
    """

    settings: Settings
    _proximal: ProximalOptimizer | None = None
    _begun = 0  # updates that others had done before this task's first
    _blocks: list[Block]
    _strength: float | None = None
    # Groups of each block, and parameters, before anything was removed.
    _totals: tuple[Mapping[str, int], int] | None = None
    _restored: Mapping[str, Any] = MappingProxyType({})
    _meters: tuple[str, ...] = ()
    _counts: tuple[int, dict[str, float]] | None = None  # (update, what was counted then)
    _alive: Mapping[str, list[int]] = MappingProxyType({})  # by kind, as last logged
    _averaged: Mapping[str, torch.Tensor] | None = None  # held dead that are zero in the average
    _update_num: int = 0
    _nothing_left: bool = False  # as compaction leaves a model in which all are dead
    _best_metric: str | None = None  # one of AFTER_FREEZE, in a training that asks for it
    _restored_optimizer: FairseqOptimizer | None = None  # whose half precision was restored
    _lifted: int | None = None  # when the checkpoint froze, if that does not count any more

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        tell_errors_in_one_line()
        super().__init__(*args, **kwargs)
        if self.cfg is None:  # a legacy task's settings, maybe out of stock fairseq's checkpoint
            for name in _OPTIONS:
                setattr(self.args, name, getattr(self.args, name, getattr(AutosizeConfig, name)))
        self.settings = Settings.from_config(self._task_config)

    @property
    def _task_config(self) -> Any:
        return self.args if self.cfg is None else self.cfg  # legacy tasks keep it in args

    @cached_property
    def _whole_config(self) -> Any:
        """fairseq's whole configuration, of which the task's is one node; None outside of it."""
        if isinstance(self._task_config, Namespace):  # a legacy task's has all options of all
            return convert_namespace_to_omegaconf(self._task_config)
        parent = getattr(self._task_config, "_get_parent", None)
        return parent() if parent is not None else None

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        add_bias_flags(parser)
        super().add_args(parser)

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> nn.Module:
        """Build the model; for training, refuse what cannot be auto-sized before data is read."""
        model = super().build_model(cfg, from_checkpoint)
        if from_checkpoint:
            return model
        root = self._whole_config
        if root is not None and root.checkpoint.best_checkpoint_metric in AFTER_FREEZE:
            self._best_metric = root.checkpoint.best_checkpoint_metric
            self._check_best_metric(root)
        if self.settings.prox != "none":
            if root is not None:
                check_training_mode(root)
                check_optimizer(root, self.settings)
                self.settings.freeze_of(self._max_update, self._warmup)
            blocks = blocks_in_model(model, self.settings.groups)
            if not any(block.count for block in blocks):
                self._nothing_left = True
                logger.warning("--prox %s: there is nothing left to shrink", self.settings.prox)
            elif self.settings.strength is None and not self.settings.has_target:
                self._default_strength(blocks)  # there must be one
            if self._is_set("prox_freeze_patience") and self.settings.patience is None:
                logger.warning(
                    "no effect without --prox-freeze-update auto: --prox-freeze-patience"
                )
            for name, _ in self.settings.layer_scales:
                if not any(is_of(block, name) for block in blocks):
                    # No error: a compacted model may have lost the layer.
                    logger.warning(
                        "no effect: --prox-layer-scale %s, which none of --prox-groups %s is",
                        name,
                        ",".join(self.settings.groups),
                    )
            if self.settings.couple and not any(isinstance(x, FeedForward) for x in blocks):
                logger.warning("no effect on heads: --prox-couple")
        elif ignored := [name for name in _OPTIONS if name != "prox" and self._is_set(name)]:
            flags = ", ".join("--" + name.replace("_", "-") for name in ignored)
            logger.warning("no effect, since --prox is none: %s", flags)
        return model

    def _check_best_metric(self, root: Any) -> None:
        """Refuse a metric that would not come, before fairseq misses it after an epoch."""
        flag = f"--best-checkpoint-metric {self._best_metric}"
        if not self.settings.freezes:
            raise ConfigError(
                f"{flag}: there is no freeze; give a target, such as "
                "--prox l21 --prox-target-sparsity 0.5, or --prox-freeze-update"
            )
        bleu = AFTER_FREEZE[self._best_metric] == "bleu"
        if bleu and not getattr(self._task_config, "eval_bleu", False):
            raise ConfigError(f"{flag} needs --eval-bleu, which --task translation has")
        if bleu != root.checkpoint.maximize_best_checkpoint_metric:
            must = "needs" if bleu else "does not go with"
            raise ConfigError(f"{flag} {must} --maximize-best-checkpoint-metric")
        if root.lr_scheduler._name == "reduce_lr_on_plateau":
            raise ConfigError(
                f"{flag} does not go with --lr-scheduler reduce_lr_on_plateau, which would see no "
                "plateau before the freeze; take the best checkpoint by another metric"
            )

    def _check_best_value(self) -> None:
        """Refuse to go on with the best value of another metric, or of a freeze that was lifted.

        fairseq would keep a larger model's checkpoint_best.pt for it.
        """
        best = getattr(checkpoint_utils.save_checkpoint, "best", None)
        same = self._restored.get("prox_best_metric") == self._best_metric
        lifted = self._lifted is not None and self._lifted <= self._begun
        if best is None or (same and not lifted):
            return
        told = "is of another metric"
        if same:
            told = f"is of the freeze at update {self._lifted}, which does not count any more"
        elif not self._restored and self._resets_dataloader:
            told = "may be of another metric, which --reset-dataloader does not hand over"
        raise ConfigError(
            f"--best-checkpoint-metric {self._best_metric}: the best value so far, {best:g}, "
            f"{told}; add --reset-meters once, so that fairseq forgets it"
        )

    def _is_set(self, option: str) -> bool:
        """Whether an option of the `--prox*` block has another value than its default."""
        return getattr(self._task_config, option) != getattr(AutosizeConfig, option)

    def get_batch_iterator(self, dataset: Any, **options: Any) -> Any:
        """As fairseq's, but a resumed run gets the batches that the interrupted one had.

        fairseq composes the batches once a process, with a seed made of --seed and the epoch in
        which the process starts, and reuses them in all later epochs. A run resumed in its second
        epoch would therefore go on with other batches than it began with.
        """
        epoch = options.get("epoch", 1)
        kept = self.can_reuse_epoch_itr(dataset) and not (
            options.get("disable_iterator_cache") or options.get("update_epoch_batch_itr")
        )
        resumed = epoch > 1 and kept and dataset not in self.dataset_to_epoch_iter
        if self.settings.prox == "none" or not resumed:
            return super().get_batch_iterator(dataset, **options)
        root = self._whole_config
        if root is not None and root.dataset.update_ordered_indices_seed:
            options["seed"] -= epoch - 1  # to which fairseq has added the epoch
        iterator = super().get_batch_iterator(dataset, **{**options, "epoch": 1})
        iterator.epoch = epoch
        return iterator

    def optimizer_step(
        self, optimizer: FairseqOptimizer, model: nn.Module, update_num: int
    ) -> None:
        """One update: the optimizer's step, then the proximal steps. fairseq calls it after
        reduction and clipping, before the EMA, and not at all after an fp16 overflow."""
        if self.settings.prox == "none" or self._nothing_left:
            if self.settings.prox == "none" and self._lifted is not None:
                self._tell_what_comes_back(model, update_num)
                self._lifted = None  # once
            super().optimizer_step(optimizer, model, update_num)
            return
        if self._proximal is None or self._proximal.optimizer is not optimizer:
            self._proximal = self._build_proximal(optimizer, model, update_num)
        if self._proximal.step(update_num):
            self._update_num = update_num + 1
            self._log_counts()

    def _tell_what_comes_back(self, model: nn.Module, update_num: int) -> None:
        """Of a pruned model that goes on without the freeze that held its dead."""
        if self._lifted is None or self._lifted > update_num:
            return
        names = self._restored.get("prox_groups", "ffn").split(",")
        blocks = blocks_in_model(_unwrap(model), names)
        if not (dead := sum(int(block.dead().sum()) for block in blocks)):
            return
        cure = "until the next freeze they can come back"
        if self.settings.prox == "none":
            cure = (
                "without it they can come back. Give the --prox options again, or compact the "
                "model first"
            )
        logger.warning(
            "--prox %s: the checkpoint's freeze, at update %d, held %d dead groups at zero; %s",
            self.settings.prox,
            self._lifted,
            dead,
            cure,
        )

    @property
    def uses_ema(self) -> bool:
        """Whether fairseq hands the stored moving average (--store-ema) to the steps."""
        return self.settings.prox != "none"

    def train_step(
        self,
        sample: Any,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: FairseqOptimizer,
        *args: Any,
        ema_model: nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """As fairseq's. After a freeze the dead are zero in the moving average, too.

        Raises:
            FloatingPointError: fairseq repeats a step with gradients that are NaN or infinite, with
                hooks on the model that are to tell where. torch cannot call these on what an
                encoder returns, and ends in a StopIteration that says nothing.
        """
        if "prox_precision" in self._restored:  # before the first step of a resumed run
            if self.settings.prox != "none" and not self._resets_optimizer:
                restore_precision(optimizer, self._restored["prox_precision"])
                self._restored_optimizer = optimizer
            # From now on they are out of date.
            self._restored = {k: v for k, v in self._restored.items() if k != "prox_precision"}
        held = None if ema_model is None or self._proximal is None else self._proximal.held
        if held is not None and held is not self._averaged:
            self._zero(ema_model, held)
            self._averaged = held  # once: an average of zeros stays zero
        try:
            return super().train_step(sample, model, criterion, optimizer, *args, **kwargs)
        except StopIteration as error:
            failure = error.__context__
            if not isinstance(failure, FloatingPointError):
                raise
            raise FloatingPointError(
                f"{failure}: the training has diverged; lower --lr, warm up longer or clip with "
                "--clip-norm. crash.pt in --save-dir has the parameters as they were before"
            ) from failure

    def valid_step(
        self, sample: Any, model: nn.Module, criterion: nn.Module, ema_model: Any = None
    ) -> Any:
        self._log_counts()
        if self._best_metric is not None:
            metrics.log_derived(self._best_metric, self._after_freeze)
        return super().valid_step(sample, model, criterion)

    def _after_freeze(self, meters: MetersDict) -> float:
        """For --best-checkpoint-metric: no larger model from before the freeze is the best one."""
        measured = AFTER_FREEZE[self._best_metric]
        frozen = self._nothing_left or (
            self._proximal is not None and self._proximal.is_frozen(self._update_num)
        )
        if measured == "loss":
            found = meters.get_smoothed_value(measured)
            return found if frozen else WORST_LOSS / (1 + self._update_num)
        if not frozen:
            return WORST_BLEU * self._update_num / (1 + self._update_num)
        # fairseq tells no BLEU of translations that are all empty.
        found = meters.get_smoothed_value(measured) if measured in meters else 0.0
        return max(found, WORST_BLEU)

    @torch.no_grad()
    def _zero(self, model: nn.Module, held: Mapping[str, torch.Tensor]) -> None:
        for block in blocks_in_model(model, self.settings.groups):
            groups = block.groups(self.settings.bias, self.settings.couple)
            for part in (*groups.members, *groups.followers) if block.name in held else ():
                part.grouped(part.parameter, groups.count).index_fill_(0, held[block.name], 0)

    def get_checkpoint_dict(self) -> dict[str, Any]:
        """State for the checkpoint's extra_state; fairseq looks it up under the class' name."""
        if self._proximal is None:
            state = dict(self._restored)
            # A checkpoint before the first step, such as after an overflow.
            optimizer = self._restored_optimizer
            if optimizer is not None and (precision := precision_state(optimizer)):
                state["prox_precision"] = precision
            return {type(self).__name__: state} if state else {}
        counts, parameters = self._totals
        state = {
            "prox_groups": ",".join(self.settings.groups),
            "prox_counts_before": dict(counts),
            "prox_parameters_before": parameters,
            "prox_freeze_asked": self._asked_freeze,
            **self._proximal.state(),
        }
        if self._best_metric is not None:
            state["prox_best_metric"] = self._best_metric
        if precision := precision_state(self._proximal.optimizer):
            state["prox_precision"] = precision
        if self._strength is not None:
            state["prox_strength"] = self._strength
        return {type(self).__name__: state}

    def set_checkpoint_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `get_checkpoint_dict` gave; fairseq calls it when a run is resumed."""
        same = state.get("prox_freeze_asked", self._asked_freeze) == self._asked_freeze
        anew = self._resets_optimizer  # the updates begin at 0, too
        if self.settings.prox == "none":
            self._lifted = None if anew else state.get("prox_frozen_at")
        self._restored = state
        if self.settings.prox != "none" and anew:
            self._forget_freeze("was before --reset-optimizer", "prox_died")
        elif self.settings.prox != "none" and not same:
            self._forget_freeze("was asked for by other options")

    def _forget_freeze(self, why: str, *more: str) -> None:
        """Drop what the checkpoint has of its freeze, or of the wait for one."""
        if "prox_frozen_at" in self._restored:
            self._lifted = self._restored["prox_frozen_at"]
            told = "the checkpoint's freeze, at update %d, %s; it does not count any more"
            logger.info(told, self._lifted, why)
        dropped = ("prox_frozen_at", "prox_quiet_updates", *more)
        self._restored = {k: v for k, v in self._restored.items() if k not in dropped}

    @property
    def _asked_freeze(self) -> str:
        """What the options say of a freeze and of what is to be dead by then."""
        names = ("prox_groups", "prox_target_sparsity", "prox_target_parameters")
        names += ("prox_target_scope", "prox_freeze_update")
        if self.settings.patience is not None:  # there the steps settle what is dead
            names += ("prox", "prox_strength", "prox_step_size", "prox_metric")
            names += ("prox_bias", "prox_couple")
            if self.settings.layer_scales:  # checkpoints before it was an option do without
                names += ("prox_layer_scale",)
        return " ".join(str(getattr(self._task_config, name)) for name in names)

    @property
    def _resets_optimizer(self) -> bool:
        root = self._whole_config
        return root is not None and root.checkpoint.reset_optimizer

    @property
    def _resets_dataloader(self) -> bool:
        root = self._whole_config
        return root is not None and root.checkpoint.reset_dataloader

    @property
    def _max_update(self) -> int:
        root = self._whole_config
        return (root.optimization.max_update or 0) if root is not None else 0

    @property
    def _warmup(self) -> int:
        root = self._whole_config
        if root is None:
            return 0
        schedulers = [root.lr_scheduler]
        if root.lr_scheduler._name == "pass_through":  # of --optimizer composite, one a group
            groups = getattr(root.optimizer, "groups", None) or {}
            schedulers = [group.lr_scheduler for group in groups.values()]
        return max((_warmup_of(x, self._max_update) for x in schedulers), default=0)

    def _freeze_update(self) -> int | None:
        """When the run freezes, if that is planned; a share stays what it was at the start."""
        if self.settings.freeze_update is not None:
            return self.settings.freeze_update
        begin = max(self._warmup, self._begun)
        planned = self.settings.freeze_of(self._max_update, begin)
        return None if planned is None else self._restored.get("prox_frozen_at", planned)

    def _default_strength(self, blocks: Sequence[Block]) -> float:
        sizes = {block.groups(bias=self.settings.bias).unit for block in blocks}
        strengths = {default_strength(self.settings.prox, size) for size in sizes}
        if len(strengths) > 1:
            raise ConfigError(
                f"--prox {self.settings.prox}: its default strength depends on the size of the "
                f"groups, and they differ ({', '.join(map(str, sorted(sizes)))} entries): give "
                "--prox-strength"
            )
        return strengths.pop()

    def _build_proximal(
        self, optimizer: FairseqOptimizer, model: nn.Module, update_num: int
    ) -> ProximalOptimizer:
        settings = self.settings
        if self._proximal is None:
            self._begun = update_num
            if not update_num:  # though not asked to, such as from an average of checkpoints
                self._forget_freeze("was before the updates began anew", "prox_died")
        self._blocks = blocks_in_model(_unwrap(model), settings.groups)
        self._strength = settings.strength
        if self._strength is None and not settings.has_target:
            self._strength = self._default_strength(self._blocks)
        sloping = {
            getattr(block.activation, "__name__", str(block.activation))
            for block in self._blocks
            if isinstance(block, FeedForward) and has_slope_at_zero(block.activation)
        }
        if sloping:
            logger.warning(
                "activation %s has a slope at 0, so dead neurons still get gradients and come "
                "back; the count goes up and down. With --activation-fn relu they get none",
                ", ".join(sorted(sloping)),
            )
        if not settings.bias and any(isinstance(block, FeedForward) for block in self._blocks):
            logger.warning(
                "--no-prox-bias: a row of zeros whose bias is above 0 still gets gradients, with "
                "relu, too, so dead neurons come back; only a freeze ends that"
            )
        freeze = self._freeze_update()
        self._tell_old_share(freeze, update_num)
        planned_now = settings.freeze_update is None and "prox_frozen_at" not in self._restored
        if freeze is not None and planned_now and update_num and self._max_update <= update_num:
            raise ConfigError(
                f"--max-update {self._max_update}: the training has {update_num} updates already, "
                "which leaves none before the freeze; give more"
            )
        if freeze is not None and update_num < freeze <= settings.start_update:
            raise ConfigError(
                f"--prox-start-update {settings.start_update}: shrinking ends after {freeze} "
                "updates, as planned when the run began; start earlier, or give a later "
                "--prox-freeze-update"
            )
        plan = Plan(
            strength=self._strength,
            step_size=settings.step_size,
            start_update=settings.start_update,
            freeze_update=freeze,
            patience=settings.patience,
        )
        shape = GroupShape(bias=settings.bias, fc2=settings.couple, adam=settings.adam_metric)
        operator = OPERATORS[settings.prox]
        scales = {
            block.name: scale
            for name, scale in settings.layer_scales
            for block in self._blocks
            if is_of(block, name)
        }
        proximal = ProximalOptimizer(optimizer, self._blocks, operator, plan, shape, scales)
        if not proximal.blocks:
            raise ConfigError(
                f"--prox {settings.prox}: all blocks of --prox-groups "
                f"{','.join(settings.groups)} are frozen, so there is nothing to shrink"
            )
        if proximal.frozen_blocks:
            logger.warning("frozen, so not auto-sized: %s", ", ".join(proximal.frozen_blocks))
        if self._proximal is None and update_num:
            if not self._restored:
                self._tell_what_was_reset()
            if self._best_metric is not None:
                self._check_best_value()
        proximal.restore(self._restored if self._proximal is None else self._proximal.state())
        if self._proximal is None and not proximal.is_frozen(update_num):
            self._tell_what_comes_back(model, update_num)
        if goals := self._goals(proximal.blocks, model):
            proximal.aim_at(goals)
        keys = dict.fromkeys(key for block in self._blocks for key in _meter_keys(block))
        self._meters = (
            *(f"{key}_{state}" for key in keys for state in ("alive", "pruned")),
            "prox_threshold",
            "prox_penalty",
            *(["prox_strength"] if proximal.goals else []),
        )
        self._log_start(proximal, update_num)
        return proximal

    def _tell_old_share(self, freeze: int | None, update_num: int) -> None:
        """Of a freeze at a share of another --max-update, that of the run's first start."""
        if self._proximal is not None or "prox_frozen_at" not in self._restored:
            return
        now = self.settings.freeze_of(self._max_update, self._warmup)
        if now is not None and update_num < freeze != now:
            logger.info(
                "the freeze stays after %d updates, as planned when the run began; --max-update %d "
                "would make it %d. Give --prox-freeze-update a number for another one",
                freeze,
                self._max_update,
                now,
            )

    def _tell_what_was_reset(self) -> None:
        """A resumed run without our entry of the checkpoint: fairseq hands it over, or not."""
        if not self._resets_dataloader:
            return  # the checkpoint had none
        if self.settings.patience is not None:
            raise ConfigError(
                "--prox-freeze-update auto: with --reset-dataloader fairseq does not hand over "
                "whether the run has frozen; drop --reset-dataloader, or give the update at which "
                "it did (its log has it), or, where it was trained without auto, begin anew with "
                "--finetune-from-model"
            )
        logger.warning(
            "--reset-dataloader: fairseq hands over nothing of what auto-sizing has in the "
            "checkpoint: a default freeze is planned anew, targets count from this model's size, "
            "and half precision begins at the rounded parameters"
        )

    def _goals(self, blocks: Sequence[Block], model: nn.Module) -> tuple[Goal, ...]:
        """How much has to die; what a compaction has removed counts as dead."""
        settings = self.settings
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if self._totals is None:
            same = self._restored.get("prox_groups") == ",".join(settings.groups)
            restored = self._restored if same else {}
            counts = {block.name: block.count for block in blocks}
            self._totals = (
                {**counts, **restored.get("prox_counts_before", {})},  # with blocks that are gone
                restored.get("prox_parameters_before", parameters),
            )
        counts, parameters_before = self._totals
        costs = tuple(block.parameters_per_group() for block in blocks)
        if settings.target_sparsity is not None:
            share = settings.target_sparsity
            if not settings.target_by_layer:
                total = sum(counts.values())
                number = round(share * total)
                if not number:
                    raise ConfigError(
                        f"--prox-target-sparsity {share}: of {total} groups that is not even one "
                        "when rounded, so none would die; ask for more"
                    )
                removed = total - sum(block.count for block in blocks)
                return (Goal(number - removed, (1,) * len(blocks)),)
            sizes = [counts[block.name] for block in blocks]
            numbers = [round(share * size) for size in sizes]
            costs = (1,) * len(blocks)  # for what a group counts
            part = share
        elif settings.target_parameters is not None:
            share = settings.target_parameters
            wanted = share * parameters_before
            removed = parameters_before - parameters
            whole = removed  # of all groups, with those of layers that are gone
            whole += sum(cost * block.count for cost, block in zip(costs, blocks, strict=True))
            if wanted > whole:
                most = whole / parameters_before
                raise ConfigError(
                    f"--prox-target-parameters {share}: the groups of --prox-groups "
                    f"{','.join(settings.groups)} have {most:.3f} of the model's parameters; ask "
                    "for less, add groups, or make the embeddings smaller"
                )
            if not settings.target_by_layer:
                return (Goal(wanted - removed, costs),)
            sizes = [counts[block.name] for block in blocks]
            heads = [not isinstance(block, FeedForward) for block in blocks]
            part = wanted / whole
            numbers = numbers_by_layer(part, sizes, costs, heads)
        else:
            return ()
        self._check_rounding(part, sizes, costs, numbers)
        removed = [counts[block.name] - block.count for block in blocks]
        return tuple(Goal(n - gone, (1,)) for n, gone in zip(numbers, removed, strict=True))

    def _check_rounding(
        self, part: float, sizes: Sequence[int], costs: Sequence[int], numbers: Sequence[int]
    ) -> None:
        """Tell if whole groups of every layer are far from a part of each; refuse if it is none."""
        flag, share = self.settings.target
        of = "model's parameters" if self.settings.target_sparsity is None else "groups"
        asked = f"{flag} {share} with --prox-target-scope layer"
        if not any(numbers):
            raise ConfigError(
                f"{asked}: of {max(sizes)} groups, the most that a layer has, that is not even one "
                "when rounded, so none would die; ask for more, or leave the scope out"
            )
        got, wanted = (
            sum(n * cost for n, cost in zip(amounts, costs, strict=True))
            for amounts in (numbers, [part * size for size in sizes])
        )
        # What each layer is rounded by adds up; in large layers it is not worth a word.
        if abs(got - wanted) > max(*costs, 0.05 * wanted):
            logger.warning(
                "%s: whole groups of every layer come to %.3f of the %s; for what was asked leave "
                "out --prox-target-scope layer",
                asked,
                share * got / wanted,
                of,
            )

    def _log_start(self, proximal: ProximalOptimizer, update_num: int) -> None:
        """Say what is being shrunk, how long a neuron lives, and the settings in one line."""
        for kind in dict.fromkeys(block.kind for block in self._blocks):
            counts = [block.count for block in self._blocks if block.kind == kind]
            logger.info(
                "%s: %s %s in layers 1 to %d",
                kind,
                " ".join(map(str, counts)),
                "neurons" if kind.endswith("ffn") else "heads",
                len(counts),
            )
        parts = self._description()
        number = sum(block.count for block in proximal.blocks)
        if not proximal.goals:
            logger.info("%d groups (%s); strength %g", number, parts, self._strength)
            # Adam's metric comes with the first gradients.
            if not (self.settings.adam_metric or proximal.is_frozen(update_num)):
                told, some_die = self._lifetime(proximal, update_num)
                logger.log(logging.INFO if some_die else logging.WARNING, told)
        else:
            logger.info(
                "%d groups (%s); %s after %d updates",
                number,
                parts,
                self._wanted(proximal.goals),
                self._freeze_update(),
            )
        freeze = self._freeze_update() or 0
        if 0 < self._max_update < freeze:
            logger.warning(
                "--max-update %d ends this run before --prox-freeze-update %d%s; resume it with "
                "more updates",
                self._max_update,
                freeze,
                ", when the target is reached" if proximal.goals else "",
            )
        goes_on = self._proximal is not None or "prox_frozen_at" in self._restored
        if proximal.goals and freeze <= update_num and not goes_on:
            logger.warning(
                "--prox-freeze-update %d has passed, so all that is to die is cut now, without "
                "shrinking before; give a later one",
                freeze,
            )
        if update_num < freeze <= self._warmup:
            logger.warning(
                "the freeze, after %d updates, comes before the warm-up of the learning rate ends "
                "(%d): what dies is settled before the model has learned much; give a later "
                "--prox-freeze-update, or fewer --warmup-updates",
                freeze,
                self._warmup,
            )
        logger.info("signature: %s", self._signature())
        logger.info("command: %s", _command(sys.argv))

    def _wanted(self, goals: Sequence[Goal]) -> str:
        """What is to be gone at the freeze."""
        if self.settings.target_by_layer:
            numbers = " ".join(str(goal.amount) for goal in goals)
            return f"{numbers} of them dead, layer by layer,"
        if self.settings.target_sparsity is not None:
            return f"{goals[0].amount:d} of them dead"
        return f"{goals[0].amount:,.0f} parameters removable"

    def _description(self) -> str:
        """What the groups consist of."""
        bias = "with bias" if self.settings.bias else "without bias"
        parts = []
        if any(isinstance(block, FeedForward) for block in self._blocks):
            columns = ", columns of fc2" if self.settings.couple else ""
            parts.append(f"rows of fc1 {bias}{columns}")
        if not all(isinstance(block, FeedForward) for block in self._blocks):
            parts.append(f"heads: rows of v {bias}, columns of out_proj")
        return "; ".join(parts)

    def _lifetime(self, proximal: ProximalOptimizer, update_num: int) -> tuple[str, bool]:
        """When neurons without gradient would die under this strength and schedule; if any may."""
        noun = "neuron" if all(isinstance(x, FeedForward) for x in self._blocks) else "group"
        norms = proximal.dual_norms().tolist()
        smallest, median, largest = (
            float(q) for q in torch.tensor(norms).quantile(torch.tensor([0.0, 0.5, 1.0]))
        )
        described = f"dual norms {smallest:.3g} to {largest:.3g}, median {median:.3g}"
        if self.settings.start_update >= self._horizon:
            return (
                f"{described}; --prox-start-update {self.settings.start_update} leaves none of "
                f"{self._horizon} updates to shrink in"
            ), False
        rates = self._learning_rates()
        if rates is None:
            return (
                f"{described}; a {noun} without gradient dies once strength * (sum of the learning "
                "rates) exceeds its norm; this schedule does not tell beforehand when"
            ), True
        thresholds = [
            self._strength * rate if update >= self.settings.start_update else 0.0
            for update, rate in enumerate(rates)
        ][update_num:]
        deaths = death_updates([smallest, median, largest], thresholds)
        first, middle, last = (None if d is None else d + update_num for d in deaths)
        end = update_num + len(thresholds)
        if first is None:
            return (
                f"{described}; no {noun} without gradient would die by update {end}: the "
                f"thresholds add up to {sum(thresholds):.3g} only. Raise --prox-strength, the "
                "learning rate or the number of updates"
            ), False
        if middle is None:
            return (
                f"{described}; the smallest {noun} without gradient would die at update {first}, "
                f"the median one not by update {end}"
            ), True
        return (
            f"{described}; a {noun} without gradient would die at update {middle} (first {first}, "
            f"last {f'not by update {end}' if last is None else last})"
        ), True

    @property
    def _horizon(self) -> int:
        """Updates that the forecast is about."""
        ends = (self._freeze_update(), self._max_update)
        from_now = max(self._begun, self.settings.start_update) + HORIZON
        return min((end for end in ends if end), default=from_now)

    def _learning_rates(self) -> Iterator[float] | None:
        """The step sizes of updates 0, 1, ... as far as planned; None where no plan exists."""
        root, horizon = self._whole_config, self._horizon
        if self.settings.step_size is not None:
            return itertools.repeat(self.settings.step_size, horizon)
        if root is None or root.lr_scheduler._name not in PLANNED_SCHEDULES:
            return None
        by_epoch = getattr(root.lr_scheduler, "force_anneal", None) is not None
        if by_epoch or len(root.optimization.lr) > 1:
            return None
        probe = _LearningRateProbe(None)
        scheduler = build_lr_scheduler(root.lr_scheduler, probe)
        scheduler.step_begin_epoch(1)
        return (scheduler.step_update(update) for update in range(horizon))

    def _signature(self) -> str:
        task, root = self._task_config, self._whole_config
        return signature(
            {
                **{name: getattr(task, name) for name in _OPTIONS},
                "prox_strength": self._strength,
                "prox_freeze_update": self._freeze_update() or task.prox_freeze_update,
                "seed": None if root is None else root.common.seed,
            }
        )

    def _log_counts(self) -> None:
        """Register the counts with fairseq's meters, which ask for them when they are shown."""
        if self._proximal is None:
            return
        if all(self._meters[-1] in meters for meters in metrics.get_active_aggregators()):
            return  # all of them are there, and to see this takes less than to log them again
        for key in self._meters:
            metrics.log_derived(key, lambda _, key=key: self._count()[key], priority=60)

    def _count(self) -> dict[str, float]:
        """Neurons alive and pruned in total and per side, the threshold and the penalty, now."""
        if self._counts is not None and self._counts[0] == self._update_num:
            return self._counts[1]
        counts = dict.fromkeys(self._meters, 0.0)
        alive: dict[str, list[int]] = {}
        for block in self._blocks:
            pruned = int(block.dead().sum())
            alive.setdefault(block.kind, []).append(block.count - pruned)
            for key in _meter_keys(block):
                counts[f"{key}_pruned"] += pruned
                counts[f"{key}_alive"] += block.count - pruned
        counts["prox_threshold"] = self._proximal.threshold
        counts["prox_penalty"] = round(self._proximal.penalty(), 3)
        if "prox_strength" in counts:
            counts["prox_strength"] = self._proximal.strength or 0.0
        self._counts = (self._update_num, counts)
        if alive != self._alive:
            self._alive = alive
            listed = [f"{kind} {' '.join(map(str, numbers))}" for kind, numbers in alive.items()]
            logger.info(
                "alive after update %d, layer by layer: %s", self._update_num, "; ".join(listed)
            )
        return counts


def _warmup_of(scheduler: Any, max_update: int) -> int:
    if getattr(scheduler, "_name", None) == "tri_stage":  # by names of its own
        if scheduler.phase_ratio is not None:
            return int(max_update * scheduler.phase_ratio[0])
        return scheduler.warmup_steps
    return getattr(scheduler, "warmup_updates", 0) or 0


def _meter_keys(block: Block) -> tuple[str, str]:
    """What a block's groups are counted under: in total, and by side or kind of attention."""
    if isinstance(block, FeedForward):
        return "neurons", block.kind.removesuffix("-ffn")
    return "heads", f"{block.kind.replace('-', '_')}_heads"


class _LearningRateProbe(FairseqOptimizer):
    """Stands in for an optimizer while a scheduler is stepped ahead: keeps the rate, no state."""

    lr = 0.0

    def set_lr(self, lr: float) -> None:
        self.lr = lr

    def get_lr(self) -> float:
        return self.lr


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside fairseq's wrappers for distributed training."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def _command(argv: Sequence[str]) -> str:
    """The command of this process, as one can type it."""
    file = Path(argv[0])
    program = [file.name]
    if file.parent.name == "fairseq_cli":  # python -m, for which argv has the file
        program = ["python", "-m", f"fairseq_cli.{file.stem}"]
    return shlex.join([*program, *argv[1:]])


class LegacyAutosizeMixin(AutosizeMixin):
    """Adds `--prox*` to one of fairseq's older tasks, whose options are no dataclass."""

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """The options of the stock task, and the `--prox*` block."""
        super().add_args(parser)
        gen_parser_from_dataclass(parser, AutosizeConfig(), delete_default=False)


def register_autosize_task(stock_name: str, dataclass: type | None = None) -> Any:
    """Register a task as ``<stock_name>_autosize`` and in place of `stock_name` itself.

    The second makes ``--prox`` work without ``--task``, and keeps the stock name in the
    checkpoint, so that a fairseq without the package knows it. Only registry entries are replaced.
    """

    def register(cls: type[AutosizeMixin]) -> type[AutosizeMixin]:
        cls = register_task(f"{stock_name}_autosize", dataclass=dataclass)(cls)
        TASK_REGISTRY[stock_name] = cls
        if dataclass is None:  # its options are in `add_args`
            return cls
        TASK_DATACLASS_REGISTRY[stock_name] = dataclass
        node = dataclass()
        node._name = stock_name
        ConfigStore.instance().store(name=stock_name, group="task", node=node, provider="fairseq")
        return cls

    return register

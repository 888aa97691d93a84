"""One training update with a proximal step: fairseq's optimizer first, then the prox on masters."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from fairseq.optim import AMPOptimizer, FairseqOptimizer
from torch import Tensor

from .groups import Block, Part, dead_neurons
from .masters import Master, find_masters
from .prox import Operator
from .strength import Goal, Plan, threshold_toward

logger = logging.getLogger(__name__)

# A row a group and maybe a bias; and masters with what Adam divided by, in parts (groups, ...).
_Rows = tuple[Tensor, Tensor | None]
_Parts = tuple[list[Tensor], list[Tensor]]

# Small blocks are stepped together up to so many entries: alone they cost mostly calls, and where
# they are large a copy of them costs more than these.
_BATCH_ENTRIES = 1 << 19


@dataclass(frozen=True)
class GroupShape:
    """What belongs to a group, and how its size is measured.

    Attributes:
        bias: fc1's bias belongs to it.
        fc2: its column of fc2 belongs to it; a head's columns of out_proj always do.
        adam: sizes and steps are those in Adam's metric, not the plain ones.
    """

    bias: bool = True
    fc2: bool = False
    adam: bool = False


class ProximalOptimizer:
    """Wraps an optimizer that fairseq has built; its `step` ends with proximal steps.

    An update minimises loss + strength * penalty by forward-backward splitting: the inner
    optimizer takes its step on the loss, then each layer's groups W get

        argmin_X 1/2 ||X - W||^2 + t * penalty(X),   t = strength * step size,

    on their fp32 masters, and the result is copied back into the model. Rows whose dual norm is at
    most t become exactly zero. (Parikh and Boyd 2014, section 4.2; Murray et al. 2019.)

    With a goal, t is such that just as many groups are dead at the freeze: of the groups in the
    order of their dual norms, the last one that has to die must lose that norm until then. The
    last update before the freeze zeroes what is left of them. From the freeze on, the dead are
    held at zero and the others train without shrinkage. Each block may have a goal, and so a t,
    of its own.

    It holds references into `optimizer` and must be rebuilt when fairseq builds a new one.

    Args:
        optimizer: the trainer's optimizer.
        blocks: what to shrink; those that the optimizer does not own (frozen parameters) are left
            alone and listed in `frozen_blocks`.
        operator: from `prox.OPERATORS`.
        plan: when and how strongly.
        shape: what a group is.
        scales: by the names of blocks, what the thresholds of their groups are multiplied by,
            > 0; 1 for those that are not in it.
    """

    def __init__(
        self,
        optimizer: FairseqOptimizer,
        blocks: Sequence[Block],
        operator: Operator,
        plan: Plan,
        shape: GroupShape = GroupShape(),
        scales: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.optimizer = optimizer
        self.operator = operator
        self.plan = plan
        self.shape = shape
        self.threshold = 0.0  # the largest one of the last update, for the log
        self.strength = plan.strength  # of the last update
        self._frozen_at = plan.freeze_update
        self._restored_freeze: int | None = None  # of the checkpoint, past or to come
        self._quiet = 0  # updates since something died or came back
        self._died = False  # something has, though a compaction may have removed it
        # The dead that a freeze holds (int64 indices) by the blocks' names; None before it.
        self.held: Mapping[str, Tensor] | None = None
        self._held_views: list[tuple[Tensor, Tensor]] = []  # what to zero, and where
        parts = {block.name: block.groups(shape.bias, shape.fc2) for block in blocks}
        parameters = [
            part.parameter
            for groups in parts.values()
            for part in (*groups.members, *groups.followers)
        ]
        masters = find_masters(optimizer, parameters)
        own = {
            name: bool(groups.count) and groups.members[0].parameter in masters
            for name, groups in parts.items()
        }
        self.blocks = [block for block in blocks if own[block.name]]
        self.frozen_blocks = [block.name for block in blocks if block.count and not own[block.name]]
        self._groups = [
            _Groups(block, masters, operator, shape, scales.get(block.name, 1.0))
            for block in self.blocks
        ]
        self._pools = [self._pool(None, self._groups)]
        self._dead = self._dead_masks()  # at the beginning or, with patience, after an update

    @property
    def goals(self) -> tuple[Goal, ...]:
        """One for all blocks together, one for each, or none; see `aim_at`."""
        return tuple(pool.goal for pool in self._pools if pool.goal is not None)

    def aim_at(self, goals: Sequence[Goal]) -> None:
        """Let goals, not the plan's strength, set the thresholds.

        Args:
            goals: one for all of `blocks` together, or one for each.

        Raises:
            ValueError: they have not one cost for each of their blocks, or there is no freeze.
        """
        if self._frozen_at is None:
            raise ValueError("goals are reached at the freeze; the plan has no freeze_update")
        sizes = [len(goal.costs) for goal in goals]
        if sizes not in ([len(self.blocks)], [1] * len(self.blocks)):
            raise ValueError(f"goals are for {sizes} blocks; there are {len(self.blocks)}")
        pools = [self._groups] if len(goals) == 1 else [[groups] for groups in self._groups]
        self._pools = [self._pool(goal, pool) for goal, pool in zip(goals, pools, strict=True)]

    def _pool(self, goal: Goal | None, blocks: Sequence["_Groups"]) -> "_Pool":
        if not self.shape.adam:
            return _Pool(goal, blocks, [_PlainBatch(groups, self.operator) for groups in blocks])
        inner = self.optimizer.optimizer
        return _Pool(goal, blocks, [_AdamBatch(x, self.operator, inner) for x in _alike(blocks)])

    def step(self, update_num: int) -> bool:
        """Step the inner optimizer, then take the proximal steps of update `update_num`.

        Args:
            update_num: updates done so far, as fairseq counts them; the first update has 0.

        Returns:
            Whether there was an update; False if --amp skipped it for an overflow.
        """
        if self.is_frozen(update_num) and self.held is None:
            self._freeze(update_num)  # before the optimizer's momentum moves the dead
        if not self._step_inner():
            return False
        self.threshold = 0.0
        if self.held is not None:
            for view, dead in self._held_views:
                view.index_fill_(0, dead, 0)
            for groups in self._groups:
                groups.copy_back()
        elif update_num >= self.plan.start_update:
            self._shrink(update_num)
            if self.plan.patience is not None:
                self._watch(update_num)
        return True

    def _step_inner(self) -> bool:
        """Step the inner optimizer; False if it only lowered the loss scale."""
        if not isinstance(self.optimizer, AMPOptimizer):
            self.optimizer.step()
            return True
        scaler = self.optimizer.scaler
        # torch's scaler does not say that it skips a step; it lowers its scale then, and only then.
        scale = scaler.get_scale()
        if self.shape.adam:
            # The wrapper's own step divides the gradients by the scale again, which Adam's steps
            # hardly show, but its second moments do, and with them the metric. Where that is not
            # used, the training stays fairseq's own.
            scaler.step(self.optimizer.optimizer)
            scaler.update()
        else:
            self.optimizer.step()
        return scaler.get_scale() >= scale

    def is_frozen(self, update_num: int) -> bool:
        """Whether update `update_num` shrinks nothing any more."""
        return self._frozen_at is not None and update_num >= self._frozen_at

    @torch.no_grad()
    def _shrink(self, update_num: int) -> None:
        if self.goals and self._frozen_at - update_num <= 1:
            self._cut()
            return
        if self.shape.adam and not self._has_metric():
            return
        for pool in self._pools:
            loaded = [batch.load() for batch in pool.batches]
            if pool.goal is not None:
                threshold = threshold_toward(pool.last_norm(loaded), self._frozen_at - update_num)
            for batch, own in zip(pool.batches, loaded, strict=True):
                if pool.goal is None:
                    threshold = self.plan.strength * self._step_size(batch.blocks[0])
                batch.shrink(threshold, own)
                self.threshold = max(self.threshold, threshold)
        if self.goals:
            rates = self._rates()
            rate = max(rates[groups.group_index] or 0.0 for groups in self._groups)
            self.strength = self.threshold / rate if rate else None

    def _has_metric(self) -> bool:
        """Whether Adam has stepped on all members; it does when they get their first gradient.

        A layer that LayerDrop has left out so far has none.
        """
        state = getattr(self.optimizer.optimizer, "state", None)
        members = (part for groups in self._groups for part in groups.members)
        return not state or all(state.get(x.master.owner) for x in members)  # without it no Adam

    def _rates(self) -> list[float | None]:
        """The learning rates of the optimizer's groups."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def _step_size(self, groups: "_Groups") -> float:
        eta = self.plan.step_size
        if eta is None:
            eta = self._rates()[groups.group_index]
        if eta is None:  # such as Adafactor with its relative step
            raise TypeError(
                f"--prox-step-size schedule: {type(self.optimizer).__name__} has no learning "
                "rate to follow; give the optimizer one, or --prox-step-size a constant"
            )
        return eta

    @torch.no_grad()
    def _cut(self) -> None:
        """Zero exactly the groups that have to die, those of the smallest dual norms."""
        for pool in self._pools:
            for groups, dead in zip(pool.blocks, pool.doomed(), strict=True):
                groups.zero(dead)

    def _freeze(self, update_num: int) -> None:
        for groups in self._groups:
            # A run resumed with other groups, such as --prox-couple: what was dead stays dead.
            groups.zero(groups.without_weights())
        if self.goals:
            # A run resumed at or beyond its freeze, with another goal than before; where it got
            # there by itself, nothing is left to cut.
            self._cut()
        held = [dead.nonzero().flatten() for dead in self._dead_masks()]
        self.held = {block.name: dead for block, dead in zip(self.blocks, held, strict=True)}
        self._held_views = [
            (part.grouped, dead)
            for groups, dead in zip(self._groups, held, strict=True)
            if len(dead)
            for part in groups.parts
        ]
        logger.info(
            "frozen after update %d: %d of %d groups are dead and stay so; the others are not "
            "shrunk any more",
            self._frozen_at if self._frozen_at == self._restored_freeze else update_num,
            sum(map(len, held)),
            sum(groups.count for groups in self._groups),
        )

    def _watch(self, update_num: int) -> None:
        """Freeze once the set of the dead has been the same for long enough."""
        dead = self._dead_masks()
        self._died = self._has_died(dead)
        same = all(map(torch.equal, dead, self._dead))
        self._quiet = self._quiet + 1 if same and self._died else 0
        self._dead = dead
        if self._quiet >= self.plan.patience:
            self._frozen_at = update_num + 1

    def _has_died(self, dead: Sequence[Tensor]) -> bool:
        """Whether something has; what the run began with, such as padding, does not count."""
        new = (bool((now & ~old).any()) for now, old in zip(dead, self._dead, strict=True))
        return self._died or any(new)

    def state(self) -> dict[str, int]:
        """What a resumed run needs beside the parameters; plain numbers."""
        died = int(self._has_died(self._dead_masks()))
        state = {"prox_quiet_updates": self._quiet, "prox_died": died}
        if self._frozen_at is not None:
            state["prox_frozen_at"] = self._frozen_at
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, as `state()` gave it; a freeze update in the plan comes first."""
        self._quiet = state.get("prox_quiet_updates", 0)
        self._died = bool(state.get("prox_died", self._quiet))
        self._restored_freeze = state.get("prox_frozen_at")
        if self._frozen_at is None:
            self._frozen_at = state.get("prox_frozen_at")

    def _dead_masks(self) -> list[Tensor]:
        return [groups.dead() for groups in self._groups]

    @torch.no_grad()
    def dual_norms(self) -> Tensor:
        """What the operator compares with the threshold, for every group; shape (groups,)."""
        return torch.cat([pool.dual_norms() for pool in self._pools])

    @torch.no_grad()
    def penalty(self) -> float:
        """The penalty R(W) summed over the layers, not multiplied by the strength."""
        penalty = self.operator.penalty
        return sum(groups.scale * float(penalty(*groups.rows())) for groups in self._groups)


@dataclass(frozen=True)
class _Part:
    """A parameter's share in the groups, on its master."""

    master: Master
    part: Part
    count: int

    @cached_property
    def grouped(self) -> Tensor:
        """A view of the master, a group an index. Kept, since on small layers it costs much."""
        return self.part.grouped(self.master.tensor.detach(), self.count)

    def metric(self, optimizer: torch.optim.Optimizer, out: Tensor | None = None) -> Tensor:
        """D = (√v + ε) / √(1 − β₂ⁿ), what Adam's step n divided by; in the shape of `grouped`."""
        moment, correction, eps = self.master.second_moment(optimizer)
        moment = self.part.grouped(moment, self.count).float()
        return torch.sqrt(moment, out=out).add_(eps).div_(math.sqrt(correction))


def _zero(parts: Sequence[_Part], chosen: Tensor | None) -> None:
    """Zero what some groups, a boolean for each, have in each part."""
    if parts and len(rows := chosen.nonzero().flatten()):
        for part in parts:
            part.grouped.index_fill_(0, rows, 0)


class _Groups:
    """The groups of one block, on the masters."""

    def __init__(
        self,
        block: Block,
        masters: Mapping[Any, Master],
        operator: Operator,
        shape: GroupShape,
        scale: float,
    ) -> None:
        groups = block.groups(bias=shape.bias, couple=shape.fc2)
        self.count = groups.count
        self.members, self.followers = (
            [
                _Part(masters[part.parameter], part, groups.count)
                for part in parts
                if part.parameter in masters
            ]
            for parts in (groups.members, groups.followers)
        )
        self.parts = (*self.members, *self.followers)
        # Masters that are not the model's parameters themselves.
        self._copies = [
            part.master for part in self.parts if part.master.tensor is not part.master.parameter
        ]
        self.group_index = self.members[0].master.group_index
        self.entries = sum(part.master.tensor.numel() for part in self.members)
        # Groups of different sizes are shrunk in proportion to what random entries would add up
        # to; plain rows of fc1 by the threshold itself.
        self.scale = scale * (self.entries / groups.count / groups.unit) ** operator.growth
        weight, *others = (part.master.tensor for part in self.members)
        self.plain = (
            groups.members[0].dim == 0
            and weight.shape[0] == groups.count
            and all(tensor.dim() == 1 for tensor in others)
        )
        # Blocks of which this is equal can take a step in Adam's metric as one.
        self.likeness = (
            self.group_index,
            self.scale,
            weight.device,
            *((part.part.dim, part.grouped.shape[1:]) for part in self.members),
        )

    def rows(self) -> _Rows:
        """A matrix with a row a group and, if rows of a weight have a bias, that.

        Returns:
            The masters themselves where they are rows and a bias; else a copy, without a bias.
        """
        if self.plain:
            weight, *bias = (part.master.tensor for part in self.members)
            return weight, bias[0] if bias else None
        return torch.cat([part.grouped.flatten(1) for part in self.members], dim=1), None

    def pieces(self, rows: Tensor) -> list[Tensor]:
        """What is each member's in a matrix with a row a group, all its entries."""
        parts = [part.grouped for part in self.members]
        pieces = rows.split([part[0].numel() for part in parts], dim=1)
        return [piece.view(part.shape) for part, piece in zip(parts, pieces, strict=True)]

    def after_step(self, dead: Tensor | None) -> None:
        """What follows a step on the masters: what belongs to dead groups besides, and the model.

        Args:
            dead: boolean, shape (groups,); None where nothing follows.
        """
        # Where v is zero, q and k are no longer used; they do not count as alive.
        _zero(self.followers, dead)
        self.copy_back()

    def zero(self, chosen: Tensor) -> None:
        """Make some groups, a boolean for each, exactly zero."""
        _zero(self.parts, chosen)
        self.copy_back()

    def dead(self) -> Tensor:
        """Which groups are zero, all entries of them; shape (groups,)."""
        weight, bias = self.rows()
        alive = (weight != 0).any(dim=1)
        return ~(alive if bias is None else alive | (bias != 0))

    def without_weights(self) -> Tensor:
        """Which groups have no row of fc1 or rows of v any more; shape (groups,).

        They count as dead, whatever a bias or a column of the group still has.
        """
        return dead_neurons(self.members[0].grouped.flatten(1))

    def copy_back(self) -> None:
        """Write the masters into the model."""
        for master in self._copies:
            master.copy_back()


class _PlainBatch:
    """Takes the steps of one block in the plain metric."""

    def __init__(self, groups: _Groups, operator: Operator) -> None:
        self.blocks = [groups]
        self._groups = groups
        self._operator = operator

    def load(self) -> _Rows:
        """What the methods take; good as long as the masters do not change."""
        return self._groups.rows()

    def dual_norms(self, rows: _Rows) -> Sequence[Tensor]:
        """What is compared with the threshold; for each block, shape (groups,)."""
        return [self._operator.dual_norm(*rows) / self._groups.scale]

    def shrink(self, threshold: float, rows: _Rows) -> None:
        """Take the proximal step; overwrites what was loaded."""
        weight, bias = rows
        self._operator.prox_(weight, threshold * self._groups.scale, bias=bias)
        if not self._groups.plain:
            pieces = self._groups.pieces(weight)
            for part, piece in zip(self._groups.members, pieces, strict=True):
                part.grouped.copy_(piece)
        self._groups.after_step(~weight.any(dim=1) if self._groups.followers else None)


class _AdamBatch:
    """Takes the steps of blocks that are alike, as one, in Adam's metric."""

    def __init__(
        self, blocks: Sequence[_Groups], operator: Operator, inner: torch.optim.Optimizer
    ) -> None:
        self.blocks = blocks
        self._operator = operator
        self._inner = inner
        self._scale = blocks[0].scale
        self._counts = [groups.count for groups in blocks]
        self._members = [part for groups in blocks for part in groups.members]
        # Several blocks are small ones, where a call costs more than its work: they are copied
        # into a matrix with a row a group, and their metrics into another.
        self._matrices: list[Tensor] = []
        if len(blocks) > 1:
            width = sum(part.grouped[0].numel() for part in blocks[0].members)
            empty = self._members[0].grouped.new_empty
            self._matrices = [empty(sum(self._counts), width) for _ in range(2)]
            self._values, self._metrics = map(self._pieces, self._matrices)

    def _pieces(self, matrix: Tensor) -> list[Tensor]:
        """What of a matrix is each member's."""
        own = zip(self.blocks, matrix.split(self._counts), strict=True)
        return [piece for groups, rows in own for piece in groups.pieces(rows)]

    def load(self) -> _Parts:
        """Views of the masters of one block, or a copy of those of several, and the metric."""
        if not self._matrices:
            return [part.grouped for part in self._members], [
                part.metric(self._inner) for part in self._members
            ]
        for part, value, metric in zip(self._members, self._values, self._metrics, strict=True):
            value.copy_(part.grouped)
            part.metric(self._inner, out=metric)
        values, metrics = self._matrices
        return [values], [metrics]

    def dual_norms(self, parts: _Parts) -> Sequence[Tensor]:
        """As `_PlainBatch.dual_norms`."""
        return (self._operator.dual_norm_diagonal(*parts) / self._scale).split(self._counts)

    def shrink(self, threshold: float, parts: _Parts) -> None:
        """As `_PlainBatch.shrink`."""
        dead = self._operator.prox_diagonal_(*parts, threshold * self._scale)
        if self._matrices:
            for part, value in zip(self._members, self._values, strict=True):
                part.grouped.copy_(value)
        for groups, own in zip(self.blocks, dead.split(self._counts), strict=True):
            groups.after_step(own)


def _alike(blocks: Sequence[_Groups]) -> list[list[_Groups]]:
    """Small blocks that are alike together; the others alone."""
    batches: list[list[_Groups]] = []
    last: dict[Any, list[_Groups]] = {}  # of the batches with blocks like these
    for groups in blocks:
        batch = last.get(groups.likeness, [])
        if not batch or sum(b.entries for b in batch) + groups.entries > _BATCH_ENTRIES:
            batch = last[groups.likeness] = []
            batches.append(batch)
        batch.append(groups)
    return batches


class _Pool:
    """Blocks with a goal in common, or without a goal.

    Attributes:
        batches: the blocks, in another order.
    """

    def __init__(
        self,
        goal: Goal | None,
        blocks: Sequence[_Groups],
        batches: Sequence[_PlainBatch | _AdamBatch],
    ) -> None:
        self.goal = goal
        self.blocks = blocks
        self.batches = batches

    def dual_norms(self, loaded: Sequence[_Rows | _Parts] | None = None) -> Tensor:
        """What is compared with the threshold, for every group; shape (groups,).

        Args:
            loaded: by the batches, if it is there.
        """
        if loaded is None:
            loaded = [batch.load() for batch in self.batches]
        norms = {}
        for batch, own in zip(self.batches, loaded, strict=True):
            norms.update(zip(batch.blocks, batch.dual_norms(own), strict=True))
        return torch.cat([norms[groups] for groups in self.blocks])

    @cached_property
    def _costs(self) -> Tensor:
        """What each group counts; shape (groups,)."""
        counts = torch.tensor([groups.count for groups in self.blocks])
        return torch.tensor(self.goal.costs, dtype=torch.float64).repeat_interleave(counts)

    @cached_property
    def _same_number(self) -> int | None:
        """How many groups have to die, where all cost the same; else None."""
        return self._first(self._costs) if len(set(self.goal.costs)) == 1 else None

    def _number(self, order: Tensor) -> int:
        """How many groups have to die, in an order."""
        number = self._same_number
        return self._first(self._costs[order.cpu()]) if number is None else number

    def _first(self, costs: Tensor) -> int:
        """How many of these costs, from the first on, reach the goal."""
        if self.goal.amount <= 0:
            return 0
        return min(int((costs.cumsum(0) < self.goal.amount).sum()) + 1, len(costs))

    def last_norm(self, loaded: Sequence[_Rows | _Parts]) -> float:
        """The dual norm of the last group that has to die; 0 if none has to."""
        norms = self.dual_norms(loaded)
        if (number := self._same_number) is not None:
            return float(norms.kthvalue(number).values) if number else 0.0
        norms, order = norms.sort()
        number = self._number(order)
        return float(norms[number - 1]) if number else 0.0

    def doomed(self) -> Sequence[Tensor]:
        """Which groups have to die, those of the smallest dual norms; for each block a boolean."""
        order = self.dual_norms().argsort(stable=True)
        chosen = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        chosen[order[: self._number(order)]] = True
        return chosen.split([groups.count for groups in self.blocks])

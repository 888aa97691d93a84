"""How strong the proximal steps are, when they kill, and the way to a size. Plain numbers only."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Strength when --prox-strength is not given; docs/results-more.md has the runs that chose it.
DEFAULT_L21_STRENGTH = 1.0


def default_strength(operator: str, columns: int) -> float:
    """The strength that `operator` gets when the user names none.

    The value for l2,1 was chosen from runs on real pairs. linf,1 kills a row once the thresholds
    add up to its l1 norm, where l2,1 compares with the l2 norm. Right after nn.Linear's uniform
    initialisation the first is sqrt(3 n) / 2 times the second for n entries, so linf,1 gets that
    multiple and both put the same pressure on a new row.

    Args:
        operator: ``l21`` or ``linf1``.
        columns: entries in one row, the bias included where it is part of the group. Groups with
            more, such as heads, get thresholds in proportion.

    Returns:
        The strength, lambda >= 0.
    """
    if operator == "l21":
        return DEFAULT_L21_STRENGTH
    if operator == "linf1":
        return DEFAULT_L21_STRENGTH * math.sqrt(3 * columns) / 2
    raise ValueError(f"operator: {operator!r} has no default strength; allowed: l21, linf1")


def death_updates(dual_norms: Sequence[float], thresholds: Iterable[float]) -> list[int | None]:
    """When rows without gradient die: the update at which the thresholds add up to their norm.

    Args:
        dual_norms: what the operator compares with its threshold, one value a row (the l2 norm
            for l2,1, the l1 norm for linf,1).
        thresholds: the thresholds of updates 1, 2, ...

    Returns:
        For each row the number of its last update, or None if the thresholds do not get that far.
    """
    pending = sorted(range(len(dual_norms)), key=lambda i: dual_norms[i], reverse=True)
    result: list[int | None] = [None] * len(dual_norms)
    total = 0.0
    for update, threshold in enumerate(thresholds, start=1):
        total += threshold
        while pending and dual_norms[pending[-1]] <= total:
            result[pending.pop()] = update
        if not pending:
            break
    return result


@dataclass(frozen=True)
class Plan:
    """When the proximal steps shrink, and how strongly.

    Attributes:
        strength: lambda >= 0; the threshold of an update is lambda times the step size. None with
            a `Goal`, which sets the thresholds.
        step_size: a constant eta, or None for the learning rate.
        start_update: updates (>= 0) without shrinkage at the beginning.
        freeze_update: updates after which nothing is shrunk any more and the dead stay dead; None
            for never, or where `patience` decides.
        patience: freeze after so many updates in which nothing died or came back, once something
            has died; None to wait for none.
    """

    strength: float | None = None
    step_size: float | None = None
    start_update: int = 0
    freeze_update: int | None = None
    patience: int | None = None


@dataclass(frozen=True)
class Goal:
    """How much is to be dead at the freeze.

    Attributes:
        amount: what the groups that die must add up to, at least.
        costs: what one group counts, a number > 0 for each block: 1 where `amount` is a number of
            groups, or its parameters.
    """

    amount: float
    costs: tuple[int, ...]


def threshold_toward(dual_norm: float, updates_left: int) -> float:
    """The threshold of this update, if a row is to be zero when the updates have run out.

    Feedback makes it a controller without gains or memory: what gradients have added to the norm
    since the last update is spread over the updates that are left. A row shrunk so does not die
    before the last of them, so that no more rows die than those below it.

    Args:
        dual_norm: of the row now, after the optimizer's step.
        updates_left: this one included, >= 1.
    """
    return dual_norm / updates_left


def numbers_by_layer(
    share: float, sizes: Sequence[int], costs: Sequence[int], heads: Sequence[bool]
) -> list[int]:
    """How many groups of each block have to die, if every block is to lose a share of parameters.

    Neurons are rounded up. Heads are few and large, so that rounding them up could remove many
    times the share: they are rounded to the nearest number, and neurons make up for the difference.

    Args:
        share: 0 < share <= 1.
        sizes: groups of each block.
        costs: parameters of one group of each block.
        heads: whether a block's groups are heads.
    """
    blocks = list(zip(sizes, costs, heads, strict=True))
    neurons = sum(size * cost for size, cost, is_head in blocks if not is_head)
    for rounded in (round, math.ceil):
        numbers = [rounded(round(share * size, 6)) if is_head else 0 for size, _, is_head in blocks]
        if not neurons:
            break
        missing = sum(
            (share * size - number) * cost
            for number, (size, cost, is_head) in zip(numbers, blocks, strict=True)
            if is_head
        )
        own = max(0.0, share + missing / neurons)
        numbers = [
            number if is_head else math.ceil(round(own * size, 6))
            for number, (size, _, is_head) in zip(numbers, blocks, strict=True)
        ]
        if own <= 1:
            break  # else there are not enough neurons to make up for heads that were rounded down
    return numbers

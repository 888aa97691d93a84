"""How strong the proximal steps are: default strengths and when they kill. Plain numbers only."""

import math
from collections.abc import Iterable, Sequence

# Strength when --prox-strength is not given; docs/results.md has the runs that chose it.
DEFAULT_L21_STRENGTH = 1.0


def default_strength(operator: str, columns: int) -> float:
    """The strength that `operator` gets when the user names none.

    The value for l2,1 was chosen from runs on real pairs. linf,1 kills a row once the thresholds
    add up to its l1 norm, where l2,1 compares with the l2 norm. Right after nn.Linear's uniform
    initialisation the first is sqrt(3 n) / 2 times the second for n entries, so linf,1 gets that
    multiple and both put the same pressure on a new row.

    Args:
        operator: ``l21`` or ``linf1``.
        columns: entries in one group, the bias included where it is part of the group.

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

"""Default strengths and the lifetime of a neuron without gradient."""

import pytest
import torch
from torch import nn

from fairseq_autosize.prox import OPERATORS
from fairseq_autosize.strength import death_updates, default_strength, numbers_by_layer


@pytest.mark.parametrize("columns", [65, 129, 513, 1025])
def test_default_strengths_put_equal_pressure_on_new_rows(columns):
    torch.manual_seed(1)
    rows = nn.Linear(columns, 2000, bias=False).weight.detach()
    lifetimes = [
        float(OPERATORS[name].dual_norm(rows).mean()) / default_strength(name, columns)
        for name in ("l21", "linf1")
    ]
    assert lifetimes[0] == pytest.approx(lifetimes[1], rel=0.01)


def test_default_strength_refuses_other_operators():
    with pytest.raises(ValueError, match="operator: 'l2'"):
        default_strength("l2", 10)


def test_death_updates_by_hand():
    # The sums are 1, 3, 6, 10.
    assert death_updates([3.0, 0.5, 3.1, 11.0], [1, 2, 3, 4]) == [2, 1, 3, None]
    assert death_updates([], [1.0]) == []
    assert death_updates([0.0], []) == [None]


@pytest.mark.parametrize("name", OPERATORS)
def test_a_row_without_gradient_dies_at_the_predicted_update(name):
    torch.manual_seed(2)
    rows = torch.randn(20, 9, dtype=torch.float64)
    thresholds = [0.05 * (1 + update % 3) for update in range(400)]
    predicted = death_updates(OPERATORS[name].dual_norm(rows).tolist(), thresholds)
    died = [None] * len(rows)
    for update, threshold in enumerate(thresholds, start=1):
        OPERATORS[name].prox_(rows, threshold)
        for row in (rows == 0).all(dim=1).nonzero().flatten().tolist():
            died[row] = died[row] or update
    assert None not in died
    # Rounding may move a death that falls on an update's very edge.
    assert all(abs(a - b) <= 1 for a, b in zip(died, predicted, strict=True))
    assert sum(a == b for a, b in zip(died, predicted, strict=True)) >= 18


@pytest.mark.parametrize(
    ("share", "heads", "neurons", "expected"),
    [
        (0.3, 0, 24, [8, 8]),  # ceil(7.2)
        (0.25, 0, 24, [6, 6]),
        # Of 4 heads, each as large as 10 neurons, 0.4 and 1.2: neurons make up for 4 and for 2.
        (0.1, 4, 24, [0, 0, 7, 7]),
        (0.3, 4, 24, [1, 1, 10, 10]),
        (0.4, 4, 24, [2, 2, 6, 6]),  # of 1.6 heads: neurons give back
        (0.6, 1, 2, [1, 1, 0, 0]),  # 1 head is more than what was asked
        (0.85, 4, 10, [4, 4, 3, 3]),  # 3 heads of 3.4 would be more than neurons can make up for
        (0.1, 4, 0, [0, 0]),
        (0.3, 4, 0, [1, 1]),
        (1.0, 4, 24, [4, 4, 24, 24]),
    ],
)
def test_shares_of_every_layer_in_whole_groups(share, heads, neurons, expected):
    kinds = [(size, cost) for size, cost in ((heads, 10), (neurons, 1)) for _ in "ab" if size]
    sizes, costs = zip(*kinds, strict=True)
    numbers = numbers_by_layer(share, sizes, costs, [cost == 10 for cost in costs])
    assert numbers == expected
    if neurons:
        got = sum(number * cost for number, cost in zip(numbers, costs, strict=True))
        assert got >= share * sum(size * cost for size, cost in kinds) - 1e-6

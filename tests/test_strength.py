"""Default strengths and the lifetime of a neuron without gradient."""

import pytest
import torch
from torch import nn

from fairseq_autosize.prox import OPERATORS
from fairseq_autosize.strength import death_updates, default_strength


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

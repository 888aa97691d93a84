"""Wrong arguments: each is refused with a message that names it."""

import math

import pytest
import torch
from prox_references import BY_ROW, CASES, ids

from fairseq_autosize import prox

W, B = torch.ones(3, 4), torch.ones(3)

WRONG = [
    ({"threshold": -0.5}, r"threshold is -0\.5; it must be a finite number >= 0"),
    ({"threshold": math.nan}, r"threshold is nan; it must be a finite number >= 0"),
    ({"threshold": math.inf}, r"threshold is inf; it must be a finite number >= 0"),
    ({"threshold": torch.tensor(-2.0)}, r"threshold is -2\.0"),
    ({"threshold": torch.tensor(math.nan)}, r"threshold is nan"),
    ({"threshold": torch.ones(4)}, r"threshold has shape \(4,\); it must be a number or a tensor"),
    ({"threshold": torch.ones(3, 1)}, r"threshold has shape \(3, 1\)"),
    ({"weight": W.int()}, r"weight has dtype torch\.int32; allowed are float64, float32,"),
    ({"weight": W.to(torch.complex64)}, r"weight has dtype torch\.complex64"),
    ({"weight": W.bool()}, r"weight has dtype torch\.bool"),
    (
        {"bias": B.double()},
        r"bias has dtype torch\.float64; it must be the weight's, torch\.float",
    ),
    (
        {"bias": torch.ones(4)},
        r"bias has shape \(4,\); for a weight of shape \(3, 4\) it must be ",
    ),
    ({"bias": torch.ones(3, 1)}, r"bias has shape \(3, 1\)"),
    ({"bias": torch.tensor(1.0)}, r"bias has shape \(\)"),
]
WRONG_BY_ROW = [
    ({"weight": torch.ones(3)}, r"weight has shape \(3,\); this operator works on rows"),
    ({"weight": torch.ones(3, 4, 5)}, r"weight has shape \(3, 4, 5\)"),
    ({"threshold": torch.tensor([1.0, -1.0, 1.0])}, r"threshold contains -1\.0; every entry"),
    ({"threshold": torch.tensor([1.0, math.nan, 1.0])}, r"threshold contains nan"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_wrong_arguments(case, wrong, message):
    arguments = {"weight": W, "threshold": 0.1} | wrong
    with pytest.raises(ValueError, match=message):
        case.prox(**arguments)
    if "threshold" not in wrong:
        del arguments["threshold"]
        with pytest.raises(ValueError, match=message):
            case.prox_penalty(**arguments)


@pytest.mark.parametrize(("wrong", "message"), WRONG_BY_ROW)
@pytest.mark.parametrize("case", BY_ROW, ids=ids)
def test_wrong_arguments_of_operators_on_rows(case, wrong, message):
    with pytest.raises(ValueError, match=message):
        case.prox(**{"weight": W, "threshold": 0.1} | wrong)


@pytest.mark.parametrize("case", [c for c in CASES if not c.by_row], ids=ids)
def test_no_threshold_per_row_where_there_are_no_rows(case):
    with pytest.raises(ValueError, match=r"threshold has shape \(3,\)"):
        case.prox(W, torch.ones(3))


@pytest.mark.parametrize("name", prox.OPERATORS)
@pytest.mark.parametrize(("wrong", "message"), WRONG + WRONG_BY_ROW)
def test_forms_in_place_refuse_before_they_write(name, wrong, message):
    arguments = {"weight": W.clone(), "threshold": 0.1} | wrong
    before = arguments["weight"].clone()
    with pytest.raises(ValueError, match=message):
        prox.OPERATORS[name].prox_(**arguments)
    assert torch.equal(arguments["weight"], before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prox.prox_elastic_net(W, 0.1, gamma=-1.0), r"gamma is -1\.0"),
        (lambda: prox.penalty_elastic_net(W, gamma=math.nan), r"gamma is nan"),
        (lambda: prox.prox_sparse_group_lasso(W, 0.1, mixing=1.5), r"mixing is 1\.5; .* 0 .* 1 "),
        (lambda: prox.penalty_sparse_group_lasso(W, mixing=math.nan), r"mixing is nan"),
        (lambda: prox.project_l1_ball(W, -1.0), r"radius is -1\.0"),
        (lambda: prox.project_linf_ball(W, math.nan), r"radius is nan"),
        (lambda: prox.project_simplex(W, torch.ones(4)), r"radius has shape \(4,\)"),
        (lambda: prox.project_simplex(torch.ones(2, 0)), r"x has shape \(2, 0\); .* one entry"),
        (lambda: prox.project_l1_ball(torch.ones(2, 2, 2), 1.0), r"x has shape \(2, 2, 2\)"),
        (lambda: prox.prox_l1_diagonal(W, W[:2], 0.1), r"metric has shape \(2, 4\); .* \(3, 4\)"),
        (lambda: prox.prox_l21_diagonal(W, W - 1, 0.1), r"metric contains 0\.0; .* > 0"),
        (lambda: prox.prox_linf1_diagonal(W, W.int(), 0.1), r"metric has dtype torch\.int32"),
        (lambda: prox.prox_l21_diagonal(W, W, 0.1, bias=B), r"bias and bias_metric must be given"),
        (
            lambda: prox.prox_linf1_diagonal(W, W, 0.1, B, torch.ones(2)),
            r"bias_metric has shape \(2,\); .* \(3,\)",
        ),
        (lambda: prox.prox_l1_diagonal(W, W, 0.1, B, -B), r"bias_metric contains -1\.0"),
    ],
)
def test_other_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()

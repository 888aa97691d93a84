"""The operators against slow references, against what defines them, and at the edges."""

import math

import numpy as np
import pytest
import torch
from prox_references import (
    BY_ROW,
    CASES,
    CONVEX,
    DTYPES,
    TOLERANCE,
    ids,
    joined,
    pair,
    random_weight,
)

from fairseq_autosize import prox

# --- right cases ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["weight", "bias"])
@pytest.mark.parametrize("shape", [(23, 40), (1, 9), (12, 1), (7, 0), (0, 5), (0, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_equals_the_reference(case, dtype, shape, bias):
    weight, vector = random_weight(shape, dtype, bias)
    before = joined(pair(weight, vector))
    for t in (0.0, 1e-3, 0.07, 0.9, 30.0):
        result = case.prox(weight, t, vector)
        assert isinstance(result, tuple) is bias
        for new, old in zip(
            result if bias else (result,), (weight, vector) if bias else (weight,), strict=True
        ):
            assert (new.dtype, new.shape) == (old.dtype, old.shape)
            assert new.numel() == 0 or new.data_ptr() != old.data_ptr()
        # the threshold as the operator sees it
        t = t if dtype == torch.float64 else torch.tensor(t).item()
        expected = case.reference(before, t)
        largest = max(np.abs(expected).max(initial=0), 1e-30)
        np.testing.assert_allclose(
            joined(result), expected, rtol=2 * TOLERANCE[dtype], atol=TOLERANCE[dtype] * largest
        )
        if dtype in (torch.float64, torch.float32):
            np.testing.assert_array_equal(joined(result) == 0, expected == 0)
    assert np.array_equal(joined(pair(weight, vector)), before)  # the input is left alone


@pytest.mark.parametrize("bias", [False, True], ids=["weight", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_penalty_equals_the_reference(case, dtype, bias):
    for shape in ((6, 5), (4, 1), (3, 0), (0, 4)):
        weight, vector = random_weight(shape, dtype, bias)
        if case.name == "log_barrier":
            weight = weight.abs() + 0.1
            vector = vector.abs() + 0.1 if bias else None
        value = case.prox_penalty(weight, vector)
        assert value.dim() == 0
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = case.penalty(joined(pair(weight, vector)))
        assert value.item() == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_penalty_of_the_log_barrier_outside_its_domain():
    assert prox.penalty_log_barrier(torch.tensor([1.0, 0.0])).item() == math.inf
    assert prox.penalty_log_barrier(torch.tensor([1.0, -2.0])).item() == math.inf


@pytest.mark.parametrize("bias", [False, True], ids=["weight", "bias"])
@pytest.mark.parametrize("case", CONVEX, ids=ids)
def test_result_is_optimal(case, bias):
    for seed, t in enumerate((1e-6, 1e-3, 0.1, 1.0, 10.0)):
        weight, vector = random_weight((15, 33), torch.float64, bias, seed)
        before = joined(pair(weight, vector))
        x = joined(case.prox(weight, t, vector))
        assert case.miss(x, before - x, t) < 1e-11


@pytest.mark.parametrize("case", CONVEX, ids=ids)
def test_the_optimality_check_sees_planted_errors(case):
    weight, _ = random_weight((15, 33), torch.float64, False)
    w, t = weight.numpy(), 0.1
    x = case.prox(weight, t).numpy()
    row = int(np.abs(x).sum(1).argmax())

    def caught(wrong):
        return case.miss(wrong, w - wrong, t) > 1e-9

    assert not caught(x)
    assert caught(case.prox(weight, 1.001 * t).numpy())  # wrong threshold
    flipped = x.copy()
    flipped[row] *= -1
    assert caught(flipped)
    shifted = x.copy()
    shifted[row, np.abs(x[row]).argmax()] *= 1 + 1e-6
    assert caught(shifted)
    assert (x[row] != 0).any()
    dropped = x.copy()
    dropped[row] = 0
    assert caught(dropped)


@pytest.mark.parametrize("name", ["l0", "group_l0"])
def test_l0_result_has_the_smaller_objective(name):
    case = next(c for c in CASES if c.name == name)
    weight, _ = random_weight((15, 8), torch.float64, False)
    w = weight.numpy()
    groups = w.reshape(-1, 1) if name == "l0" else w
    for t in (1e-3, 0.05, 1.0):
        x = case.prox(weight, t).numpy().reshape(groups.shape)
        for old, new in zip(groups, x, strict=True):
            kept, dropped = t * (old != 0).any(), (old**2).sum() / 2
            value = ((new - old) ** 2).sum() / 2 + t * (new != 0).any()
            assert value == pytest.approx(min(kept, dropped), abs=1e-15)


# --- exact zeros, not finite numbers, thresholds --------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "row", "t"),
    [
        ("l1", [0.25, -0.25, 0.125], 0.25),
        ("elastic_net", [0.25, -0.25, 0.125], 0.25),
        ("l2", [3, -4, 0], 5),
        ("linf", [1, -2, 0.5], 3.5),
        ("l21", [3, -4, 0], 5),
        ("l21", [6, -8, 0], 10),
        ("linf1", [1, -2, 0.5], 3.5),
        ("linf1", [0.25] * 3, 0.75),
        ("sparse_group_lasso", [4, -4.5, 2.5], 5),
        ("l0", [2, -2, 1], 2),
        ("group_l0", [0, -4, 0], 8),
    ],
)
def test_a_group_exactly_at_the_threshold_is_exactly_zero(name, row, t, dtype):
    weight = torch.tensor([row], dtype=dtype)
    operator = getattr(prox, f"prox_{name}")
    above = operator(weight, t * (1 - 2.0**-6))
    assert above.ne(0).any()
    assert operator(weight, t).eq(0).all()
    assert operator(weight, t * (1 + 2.0**-6)).eq(0).all()


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_threshold_zero_changes_nothing(case):
    if case.name == "log_barrier":
        pytest.skip("its limit is the projection on X >= 0")
    weight, vector = random_weight((15, 6), torch.float32, True)
    for t in (0.0, 0, torch.tensor(0.0), torch.zeros(15) if case.by_row else -0.0):
        new_weight, new_vector = case.prox(weight, t, vector)
        assert torch.equal(new_weight, weight) and torch.equal(new_vector, vector)


def test_log_barrier_at_threshold_zero_and_far_below_zero():
    weight = torch.tensor([-3.0, 0.0, 2.0])
    assert prox.prox_log_barrier(weight, 0.0).tolist() == [0.0, 0.0, 2.0]
    far = prox.prox_log_barrier(torch.tensor([-1e4, -1e30]), 1e-3)
    torch.testing.assert_close(far, torch.tensor([1e-7, 1e-33]))


@pytest.mark.parametrize("t", [0.0, 0.3])
@pytest.mark.parametrize("case", BY_ROW, ids=ids)
def test_nan_stays_in_its_row(case, t):
    weight, vector = random_weight((9, 20), torch.float32, True, seed=3)
    clean = joined(case.prox(weight, t, vector))
    weight[4, 2] = math.nan
    vector[7] = math.nan
    result = joined(case.prox(weight, t, vector))
    bad = np.isin(np.arange(9), [4, 7])
    assert np.isnan(result[bad]).all()
    np.testing.assert_array_equal(result[~bad], clean[~bad])


@pytest.mark.parametrize("operator", [prox.prox_l21, prox.prox_linf1])
def test_a_row_with_an_infinite_entry_is_unchanged(operator):
    weight, _ = random_weight((9, 40), torch.float32, False, seed=3)
    clean = operator(weight, 0.3)
    weight[4, 2], weight[4, 3], weight[6, 39] = math.inf, -math.inf, math.inf
    result = operator(weight, 0.3)
    for i in range(9):
        assert torch.equal(result[i], weight[i] if i in (4, 6) else clean[i])


@pytest.mark.parametrize("case", BY_ROW, ids=ids)
def test_one_threshold_per_row(case):
    weight, vector = random_weight((9, 5), torch.float32, True)
    thresholds = torch.linspace(0, 2, 9)
    result = joined(case.prox(weight, thresholds, vector))
    for i, t in enumerate(thresholds):
        alone = joined(case.prox(weight[i : i + 1], t.item(), vector[i : i + 1]))
        np.testing.assert_array_equal(result[i : i + 1], alone)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_threshold_as_tensor_or_int(case):
    weight, vector = random_weight((9, 5), torch.float32, True)
    expected = joined(case.prox(weight, 1.0, vector))
    for t in (1, torch.tensor(1.0), torch.tensor(1), torch.tensor(1.0, dtype=torch.float64)):
        np.testing.assert_array_equal(joined(case.prox(weight, t, vector)), expected)


# --- in place -------------------------------------------------------------------------------------


LAYOUTS = {
    "contiguous": lambda w: w.clone(),
    "transposed": lambda w: w.t().contiguous().t(),
    "slice": lambda w: torch.cat((w, w), dim=1)[:, : w.shape[1]],
    "every second": lambda w: torch.stack((w, w), dim=2)[:, :, 0],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", prox.OPERATORS)
def test_in_place_keeps_storage_strides_and_dtype(name, layout, dtype):
    source, vector = random_weight((11, 40), dtype, True)
    expected_weight, expected_bias = getattr(prox, f"prox_{name}")(source, 0.2, vector)
    weight = torch.nn.Parameter(LAYOUTS[layout](source))
    bias = torch.nn.Parameter(vector.clone())
    before = (weight.data_ptr(), weight.stride(), weight.dtype, bias.data_ptr(), bias.dtype)
    assert prox.OPERATORS[name].prox_(weight, 0.2, bias) is None
    after = (weight.data_ptr(), weight.stride(), weight.dtype, bias.data_ptr(), bias.dtype)
    assert after == before
    assert weight.requires_grad and weight.is_leaf
    tolerance = TOLERANCE[dtype]  # sums over other strides run in another order
    torch.testing.assert_close(weight.data, expected_weight, rtol=2 * tolerance, atol=tolerance)
    torch.testing.assert_close(bias.data, expected_bias, rtol=2 * tolerance, atol=tolerance)
    assert torch.equal(weight.data == 0, expected_weight == 0)


@pytest.mark.parametrize("name", prox.OPERATORS)
def test_the_table_of_operators_is_consistent(name):
    operator = prox.OPERATORS[name]
    weight, vector = random_weight((40, 17), torch.float32, True)
    norms = operator.dual_norm(weight, vector)
    assert norms.shape == (40,)
    assert operator.penalty(weight, vector) == getattr(prox, f"penalty_{name}")(weight, vector)
    t = norms.median()  # a norm that occurs
    operator.prox_(weight, t, vector)
    dead = weight.eq(0).all(1) & vector.eq(0)
    assert torch.equal(dead, norms <= t)
    assert 0 < dead.sum() < 40


def test_half_types_are_rounded_once():
    """The whole is computed in float32 and then rounded, not step by step."""
    weight, vector = random_weight((30, 50), torch.bfloat16, True)
    for case in CASES:
        half = case.prox(weight, 0.05, vector)
        full = case.prox(weight.float(), 0.05, vector.float())
        assert torch.equal(half[0], full[0].bfloat16()) and torch.equal(half[1], full[1].bfloat16())


@pytest.mark.parametrize("name", ["l21", "linf1", "l1", "l2", "sparse_group_lasso"])
def test_penalties_have_gradients_where_all_is_zero(name):
    weight, bias = torch.randn(4, 3), torch.randn(4)
    weight[1], bias[1] = 0, 0
    for w, b in ((weight, bias), (torch.zeros(4, 3), torch.zeros(4))):
        w, b = w.requires_grad_(), b.requires_grad_()
        getattr(prox, f"penalty_{name}")(w, b).backward()
        assert w.grad.isfinite().all() and b.grad.isfinite().all()

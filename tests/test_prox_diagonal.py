"""The operators in a diagonal metric, against scipy and against what makes them optimal."""

import math

import numpy as np
import pytest
import torch
from prox_references import DTYPES, TOLERANCE, joined, miss_l1, miss_l2, miss_linf
from scipy.optimize import minimize, minimize_scalar

from fairseq_autosize import prox

OPERATORS = {
    "l1": (prox.prox_l1_diagonal, prox.prox_l1, miss_l1),
    "l21": (prox.prox_l21_diagonal, prox.prox_l21, miss_l2),
    "linf1": (prox.prox_linf1_diagonal, prox.prox_linf1, miss_linf),
}


def problem(shape=(12, 9), dtype=torch.float64, spread=3):
    """Weight, metric over `spread` orders of magnitude, bias and its metric."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    metric = 10 ** (spread * (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.7))
    weight[1] = 0
    bias = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    bias_metric = torch.rand(shape[0], generator=generator, dtype=torch.float64) + 0.1
    return [x.to(dtype) for x in (weight, metric, bias, bias_metric)]


@pytest.mark.parametrize("t", [1e-6, 0.01, 0.3, 2.0])
@pytest.mark.parametrize("spread", [0, 3, 9])
@pytest.mark.parametrize("name", OPERATORS)
def test_result_is_optimal(name, spread, t):
    operator, _, miss = OPERATORS[name]
    weight, metric, bias, bias_metric = problem(spread=spread)
    x = joined(operator(weight, metric, t, bias, bias_metric))
    w, d = joined((weight, bias)), joined((metric, bias_metric))
    for i in range(len(w)):
        assert miss(x[i], d[i] * (w[i] - x[i]), t) < 1e-11
    wrong = joined(operator(weight, metric, 1.001 * t, bias, bias_metric))
    assert any(miss(wrong[i], d[i] * (w[i] - wrong[i]), t) > 1e-10 for i in range(len(w)))


def objective(x, w, d, t, penalty):
    return (d * (x - w) ** 2).sum() / 2 + t * penalty(x)


def scipy_l1(w, d, t):
    def entry(v, c):
        bound = abs(v) + 1
        found = minimize_scalar(
            lambda x: c * (x - v) ** 2 / 2 + t * abs(x),
            bounds=(-bound, bound),
            method="bounded",
            options={"xatol": 1e-10},
        )
        return found.x

    return np.array([entry(v, c) for v, c in zip(w, d, strict=True)])


def scipy_linf(w, d, t):
    """With the maximum as a further variable s ≥ |x_j|, a smooth problem with constraints."""
    n = len(w)
    found = minimize(
        lambda z: (d * (z[:n] - w) ** 2).sum() / 2 + t * z[n],
        np.r_[w, np.abs(w).max()],
        jac=lambda z: np.r_[d * (z[:n] - w), t],
        constraints=[
            {"type": "ineq", "fun": lambda z: z[n] - z[:n]},
            {"type": "ineq", "fun": lambda z: z[n] + z[:n]},
        ],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return found.x[:n]


def scipy_l2(w, d, t):
    """Smooth away from 0, where it starts; 0 itself is compared separately."""
    found = minimize(
        lambda x: objective(x, w, d, t, np.linalg.norm),
        w,
        jac=lambda x: d * (x - w) + t * x / max(np.linalg.norm(x), 1e-12),
        method="BFGS",
        options={"gtol": 1e-10},
    )
    zero = np.zeros_like(w)
    return min((found.x, zero), key=lambda x: objective(x, w, d, t, np.linalg.norm))


@pytest.mark.parametrize("t", [0.01, 0.2, 1.0])
@pytest.mark.parametrize(
    ("name", "solve", "penalty"),
    [
        ("l1", scipy_l1, lambda x: np.abs(x).sum()),
        ("l21", scipy_l2, np.linalg.norm),
        ("linf1", scipy_linf, lambda x: np.abs(x).max()),
    ],
)
def test_equals_scipy(name, solve, penalty, t):
    weight, metric, _, _ = problem((8, 5), spread=1)
    w, d = weight.numpy(), metric.numpy()
    result = OPERATORS[name][0](weight, metric, t).numpy()
    for i in range(len(w)):
        expected = solve(w[i], d[i], t)
        np.testing.assert_allclose(result[i], expected, atol=2e-4)
        ours = objective(result[i], w[i], d[i], t, penalty)
        assert ours <= objective(expected, w[i], d[i], t, penalty) + 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_metric_one_is_the_plain_operator(name, dtype):
    diagonal, plain, _ = OPERATORS[name]
    weight, _, bias, _ = problem(dtype=dtype)
    one, one_bias = torch.ones_like(weight), torch.ones_like(bias)
    for t in (0.0, 0.05, 1.0, 50.0):
        result = diagonal(weight, one, t, bias, one_bias)
        expected = plain(weight, t, bias)
        for new, same in zip(result, expected, strict=True):
            tolerance = 4 * TOLERANCE[dtype]
            torch.testing.assert_close(new, same, rtol=tolerance, atol=tolerance)
            assert torch.equal(new == 0, same == 0)
            assert new.dtype == dtype
        # a constant metric c and the threshold c·t are the same problem again
        scaled = diagonal(weight, 4 * one, 4 * t, bias, 4 * one_bias)
        for new, same in zip(scaled, expected, strict=True):
            torch.testing.assert_close(new, same, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OPERATORS)
def test_edges(name):
    operator = OPERATORS[name][0]
    weight, metric, bias, bias_metric = problem(dtype=torch.float32)
    unchanged = operator(weight, metric, 0.0, bias, bias_metric)
    torch.testing.assert_close(unchanged, (weight, bias), rtol=0, atol=0)
    assert operator(weight, metric, 1e6).eq(0).all()
    for shape in ((0, 4), (3, 0), (1, 1)):
        empty = torch.ones(shape)
        assert operator(empty, empty, 0.1).shape == shape
    weight[3, 1] = math.nan
    clean, dirty = unchanged[0], operator(weight, metric, 0.0)
    keep = torch.arange(12) != 3
    assert torch.equal(dirty[keep], clean[keep])
    assert dirty[3].isnan().any()


@pytest.mark.parametrize("name", ["l21", "linf1"])
def test_a_row_at_its_dual_norm_is_exactly_zero(name):
    weight, metric = torch.tensor([[3.0, -2.0]]), torch.tensor([[1.0, 2.0]])
    t = 5.0 if name == "l21" else 7.0  # of d∘w = (3, -4)
    operator = OPERATORS[name][0]
    assert operator(weight, metric, t).eq(0).all()
    assert operator(weight, metric, t * (1 - 1e-6)).ne(0).all()


@pytest.mark.parametrize("name", ["l21", "linf1"])
def test_all_rows_at_their_dual_norms_are_exactly_zero(name):
    """Where rounding errors alone would leave some rows as small numbers."""
    weight, metric, _, _ = problem((500, 65), dtype=torch.float32)
    weight[250:] = weight[250:, :1]  # all entries alike, as after many steps of linf1
    norms = getattr(prox, f"dual_norm_{name}_diagonal")([weight], [metric])
    assert OPERATORS[name][0](weight, metric, norms).eq(0).all()
    alive = OPERATORS[name][0](weight, metric, norms * (1 - 1e-5)).ne(0).any(dim=1)
    assert torch.equal(alive, norms > 0)


@pytest.mark.parametrize("t", [1e-6, 0.3, 2.0, 20.0])
@pytest.mark.parametrize("name", ["l21", "linf1"])
def test_parts_are_one_group_and_are_written_where_they_lie(name, t):
    """Rows, a bias and columns, as a neuron has them; of the third, blocks of columns as a head."""
    weight, metric, bias, bias_metric = problem((12, 20))
    expected = OPERATORS[name][0](weight, metric, t, bias, bias_metric)

    def parts(matrix, vector):
        rows, columns = matrix[:, :8].clone(), matrix[:, 8:].t().contiguous()
        views = [rows, vector.clone().unsqueeze(1), columns.t().unflatten(1, (3, 4))]
        return views, rows, columns

    views, rows, columns = parts(weight, bias)
    metrics = parts(metric, bias_metric)[0]
    dual = getattr(prox, f"dual_norm_{name}_diagonal")(views, metrics)
    zero = getattr(prox, f"prox_{name}_diagonal_")(views, metrics, t)
    joined_result = torch.cat([rows, columns.t()], 1)
    torch.testing.assert_close(joined_result, expected[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(views[1].squeeze(1), expected[1], rtol=1e-12, atol=1e-14)
    assert torch.equal(zero, dual <= t)
    assert torch.equal(zero, (joined_result == 0).all(1) & (views[1][:, 0] == 0))


@pytest.mark.parametrize("name", ["l21", "linf1"])
def test_infinite_rows_stay_and_zero_rows_are_zero_without_a_threshold(name):
    weight, metric, _, _ = problem(dtype=torch.float32)
    weight[2, 3] = math.inf
    for t in (0.0, 0.1):
        result = OPERATORS[name][0](weight, metric, t)
        assert torch.equal(result[2], weight[2])
        assert result[1].eq(0).all() and result.isfinite().sum() == result.numel() - 1


def turns_of(monkeypatch, *problem):
    """Result, and how often Newton's method for l2,1 looked at how many rows."""
    turns = []
    step = prox._step_in_metric
    monkeypatch.setattr(
        prox, "_step_in_metric", lambda w, e, s: turns.append(len(s)) or step(w, e, s)
    )
    return prox.prox_l21_diagonal(*problem), turns


def test_small_thresholds_take_one_step(monkeypatch):
    weight, metric, _, _ = problem((64, 65), dtype=torch.float32, spread=1)
    t = 1e-3 * float((weight * metric).norm(dim=1).median())
    result, turns = turns_of(monkeypatch, weight, metric, t)
    assert turns == [64]
    exact = prox.prox_l21_diagonal(weight.double(), metric.double(), t)
    torch.testing.assert_close(result.double(), exact, rtol=3e-7, atol=0)


def test_rows_that_become_zero_end_as_soon_as_the_others(monkeypatch):
    """On a way below 0 they would take all turns that are allowed, and the others with them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(64, 65, generator=generator) + 0.5
    weight[::2] *= torch.logspace(-6, -10, 32)[:, None]
    metric = 10 ** (2 * torch.rand(64, 65, generator=generator) - 1)
    result, turns = turns_of(monkeypatch, weight, metric, 0.1)
    assert result[::2].eq(0).all() and result[1::2].ne(0).all()
    assert 1 <= len(turns) < 10

"""linf,1 on rows that are hard for Newton's method, projections, equivalences, random search."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from prox_references import CONVEX, DTYPES, cut, joined, project_l1, random_weight, rows

from fairseq_autosize import prox

# --- linf,1: rows that are hard for Newton's method -----------------------------------------------


def plateau(n):
    """Many equal maxima, as repeated steps produce them, over a random rest."""
    values = np.random.default_rng(0).uniform(-1, 1, n)
    return np.clip(values, -0.4, 0.4)


HARD_ROWS = {
    "plateau": plateau(700),
    "all equal": np.full(513, 0.3),
    "one spike": np.r_[1e6, plateau(300)],
    "geometric": 2.0 ** -np.arange(100),
    "factorial gaps": 1 - np.cumprod(1 / np.arange(2.0, 40)),
    "spread": 10.0 ** np.linspace(-30, 30, 301),
    "wide": np.random.default_rng(1).standard_normal(16384),
    "tail not in a block": np.r_[np.full(64, 0.1), 5.0, 4.0, 3.0],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("row", HARD_ROWS)
def test_linf1_on_hard_rows(row, dtype):
    weight = torch.tensor(HARD_ROWS[row], dtype=dtype).unsqueeze(0)
    w = weight.double().numpy()
    total, eps = np.abs(w).sum(), torch.finfo(dtype).eps
    for share in (1e-9, 1e-6, 1e-3, 0.1, 0.5, 0.999):
        t = float(np.float32(share * total))
        x = prox.prox_linf1(weight, t).double().numpy()
        expected = cut(w[0].astype(np.longdouble), t)[None]
        level = np.abs(expected).max()
        # θ = (sum of the entries above − t)/their number, each of the two to the last digits
        rounding = 8 * eps * (level + t / (np.abs(w) >= level).sum())
        assert abs(np.abs(x).max() - level) < rounding
        assert np.array_equal(x == 0, expected == 0)
        below = np.abs(w) < level - rounding
        np.testing.assert_array_equal(x[below], w[below])  # what is under the level is untouched


def test_linf1_repeated_steps_equal_the_reference():
    weight, vector = random_weight((20, 64), torch.float64, True)
    before = joined((weight, vector))
    for _ in range(25):
        weight, vector = prox.prox_linf1(weight, 0.05, vector)
        before = rows(cut)(before, 0.05)
        np.testing.assert_allclose(joined((weight, vector)), before, atol=1e-13)


@pytest.mark.parametrize("name", prox.OPERATORS)
def test_rows_at_their_own_dual_norm_are_exactly_zero(name):
    """Rows with few entries, where a level found by rounding could be a little above 0."""
    weight = torch.randn(500, 128, generator=torch.Generator().manual_seed(0))
    weight[:, 16:] = 0
    operator = prox.OPERATORS[name]
    operator.prox_(weight, operator.dual_norm(weight))
    assert weight.eq(0).all()


def test_linf1_over_several_chunks():
    weight = torch.randn(4100, 520, generator=torch.Generator().manual_seed(0))
    assert weight.numel() > 2 * prox._CHUNK_ENTRIES
    result = prox.prox_linf1(weight, 3.0)
    for i in (0, 2049, 2050, 2051, 4099):
        torch.testing.assert_close(result[i], prox.prox_linf1(weight[i : i + 1], 3.0)[0])


def test_l21_over_the_range_it_names():
    for scale in (1e-15, 1.0, 1e15):
        weight = torch.tensor([[3.0, 4.0]]) * scale
        torch.testing.assert_close(
            prox.prox_l21(weight, 2.5 * scale), weight / 2, atol=0, rtol=1e-6
        )
    huge = torch.tensor([[1e30, 1.0]])
    assert torch.equal(prox.prox_l21(huge, 1.0), huge)


# --- equivalences, Moreau, random search ----------------------------------------------------------


def test_one_column_is_l1_and_one_row_is_the_whole():
    weight, _ = random_weight((30, 12), torch.float64, False)
    column, row = weight.reshape(-1, 1), weight.reshape(1, -1)
    for t in (1e-3, 0.2, 3.0):
        for name in ("l21", "linf1"):
            by_row = getattr(prox, f"prox_{name}")
            torch.testing.assert_close(by_row(column, t), prox.prox_l1(column, t))
            whole = prox.prox_l2 if name == "l21" else prox.prox_linf
            torch.testing.assert_close(by_row(row, t), whole(weight, t).reshape(1, -1))
        for mixing, same in ((1.0, prox.prox_l1), (0.0, prox.prox_l21)):
            mixed = prox.prox_sparse_group_lasso(weight, t, mixing=mixing)
            torch.testing.assert_close(mixed, same(weight, t))
        torch.testing.assert_close(
            prox.prox_elastic_net(weight, t, gamma=0.0), prox.prox_l1(weight, t)
        )


@settings(max_examples=80, deadline=None)
@given(
    w=hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=24),
        elements=st.one_of(st.floats(-1e3, 1e3, width=32), st.sampled_from([0.0, 1.0, -1.0, 0.5])),
    ),
    t=st.one_of(st.floats(0, 1e3, width=32), st.sampled_from([0.0, 0.5, 1.0, 2.0])),
)
def test_random_search(w, t):
    weight = torch.from_numpy(w)
    tolerance = 1e-10 * max(1.0, np.abs(w).max(initial=0), t)
    for case in CONVEX:
        if case.name == "log_barrier":
            continue  # its gradient t/x is unbounded; compared with the reference above
        x = case.prox(weight, t).numpy()
        assert case.miss(x, w - x, t) <= tolerance, case.name
    # Moreau: w = prox of t·R + projection on t times the unit ball of the dual norm
    moreau = w - prox.prox_linf1(weight, t).numpy()
    np.testing.assert_allclose(moreau, rows(project_l1)(w, t), atol=tolerance)
    np.testing.assert_allclose(prox.project_l1_ball(weight, t).numpy(), moreau, atol=tolerance)
    np.testing.assert_allclose(
        w - prox.prox_l1(weight, t).numpy(), np.clip(w, -t, t), atol=tolerance
    )
    assert np.array_equal(prox.project_linf_ball(weight, t).numpy(), np.clip(w, -t, t))
    y = prox.project_simplex(weight, t).numpy()
    assert (y >= 0).all()
    np.testing.assert_allclose(y.sum(1), t, atol=tolerance)
    level = (w - y).min(1, keepdims=True, where=y > 0, initial=np.inf)
    alive = np.isfinite(level[:, 0])  # t = 0 leaves nothing above 0
    np.testing.assert_allclose(y[alive], np.maximum(w[alive] - level[alive], 0), atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projections_of_vectors_and_matrices(dtype):
    vector = torch.tensor([3.0, -1.0, 0.0], dtype=dtype)
    assert prox.project_l1_ball(vector, 2.0).tolist() == [2.0, 0.0, 0.0]
    assert prox.project_l1_ball(vector, 4.0).tolist() == [3.0, -1.0, 0.0]
    assert prox.project_linf_ball(vector, 0.5).tolist() == [0.5, -0.5, 0.0]
    assert prox.project_simplex(vector).tolist() == [1.0, 0.0, 0.0]
    matrix = torch.stack((vector, -vector))
    radius = torch.tensor([1.0, 3.0])
    assert prox.project_simplex(matrix, radius).tolist() == [[1.0, 0.0, 0.0], [0.0, 2.0, 1.0]]
    assert prox.project_l1_ball(matrix, 0.0).eq(0).all()
    assert prox.project_l1_ball(vector, 2.0).dtype == dtype

"""Slow, obvious versions of the operators in float64, and what makes a result optimal."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fairseq_autosize import prox

GAMMA, MIXING = 1.0, 0.5  # the defaults
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {  # of a correctly rounded result, relative to the largest entry
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


# --- references: a matrix in, a matrix out, one row after the other -------------------------------


def soft(w, t):
    return np.sign(w) * np.maximum(np.abs(w) - t, 0)


def shrink(w, t):
    norm = np.sqrt((w**2).sum())
    return np.zeros_like(w) if norm <= t else w * (1 - t / norm)


def project_l1(w, radius):
    """By sorting; Duchi, Shalev-Shwartz, Singer and Chandra (2008)."""
    if np.abs(w).sum() <= radius:
        return w.copy()
    a = np.sort(np.abs(w))[::-1]
    levels = (np.cumsum(a) - radius) / np.arange(1, len(a) + 1)
    return soft(w, levels[np.nonzero(a >= levels)[0][-1]])


def cut(w, t):
    return np.zeros_like(w) if np.abs(w).sum() <= t else w - project_l1(w, t)


def barrier(w, t):
    return np.array([[max(np.roots([1, -v, -t]).real) for v in row] for row in w]).reshape(w.shape)


def rows(function):
    return lambda w, t: np.array([function(r, t) for r in w]).reshape(w.shape)


# --- optimality: how far (W − X) is from t · ∂R(X) ------------------------------------------------


def miss_l1(x, g, t):
    return np.where(x != 0, np.abs(g - t * np.sign(x)), np.maximum(np.abs(g) - t, 0)).max(initial=0)


def miss_l2(x, g, t):
    norm = np.sqrt((x**2).sum())
    if norm == 0:
        return max(np.sqrt((g**2).sum()) - t, 0)
    return np.abs(g - t * x / norm).max()


def miss_linf(x, g, t):
    top = np.abs(x).max(initial=0)
    if top == 0:
        return max(np.abs(g).sum() - t, 0)
    below = np.abs(g[np.abs(x) < top]).max(initial=0)
    against = np.maximum(-g * np.sign(x), 0).max()
    return max(below, against, abs(np.abs(g).sum() - t))


def miss_elastic_net(x, g, t):
    return miss_l1(x, g - t * GAMMA * x, t)


def miss_sparse_group(x, g, t):
    if (x == 0).all():
        return max(np.sqrt((soft(g, t * MIXING) ** 2).sum()) - t * (1 - MIXING), 0)
    return miss_l1(x, g - t * (1 - MIXING) * x / np.sqrt((x**2).sum()), t * MIXING)


def miss_log_barrier(x, g, t):
    with np.errstate(divide="ignore"):
        return np.abs(g + t / x).max(initial=0)


def worst_row(miss):
    return lambda x, g, t: max((miss(a, b, t) for a, b in zip(x, g, strict=True)), default=0)


@dataclass(frozen=True)
class Case:
    name: str
    reference: Callable
    penalty: Callable
    by_row: bool
    miss: Callable | None  # None: not convex

    @property
    def prox(self):
        return getattr(prox, f"prox_{self.name}")

    @property
    def prox_penalty(self):
        return getattr(prox, f"penalty_{self.name}")


def l2_norms(w):
    return np.sqrt((w**2).sum(1))


CASES = [
    Case("l1", soft, lambda w: np.abs(w).sum(), False, miss_l1),
    Case("l2", shrink, lambda w: np.sqrt((w**2).sum()), False, miss_l2),
    Case(
        "squared_l2",
        lambda w, t: w / (1 + t),
        lambda w: (w**2).sum() / 2,
        False,
        lambda x, g, t: np.abs(g - t * x).max(initial=0),
    ),
    Case(
        "elastic_net",
        lambda w, t: soft(w, t) / (1 + t * GAMMA),
        lambda w: np.abs(w).sum() + GAMMA * (w**2).sum() / 2,
        False,
        miss_elastic_net,
    ),
    Case(
        "linf",
        lambda w, t: cut(w.reshape(-1), t).reshape(w.shape),
        lambda w: np.abs(w).max(initial=0),
        False,
        miss_linf,
    ),
    Case("l21", rows(shrink), lambda w: l2_norms(w).sum(), True, worst_row(miss_l2)),
    Case(
        "linf1",
        rows(cut),
        lambda w: np.abs(w).max(1, initial=0).sum(),
        True,
        worst_row(miss_linf),
    ),
    Case(
        "sparse_group_lasso",
        rows(lambda w, t: shrink(soft(w, MIXING * t), (1 - MIXING) * t)),
        lambda w: MIXING * np.abs(w).sum() + (1 - MIXING) * l2_norms(w).sum(),
        True,
        worst_row(miss_sparse_group),
    ),
    Case(
        "l0",
        lambda w, t: np.where(np.abs(w) <= math.sqrt(2 * t), 0, w),
        lambda w: (w != 0).sum(),
        False,
        None,
    ),
    Case(
        "group_l0",
        rows(lambda w, t: w * (np.sqrt((w**2).sum()) > math.sqrt(2 * t))),
        lambda w: (w != 0).any(1).sum(),
        True,
        None,
    ),
    Case(
        "log_barrier",
        barrier,
        lambda w: -np.log(w).sum(),
        False,
        miss_log_barrier,
    ),
]
CONVEX = [case for case in CASES if case.miss is not None]
BY_ROW = [case for case in CASES if case.by_row]


def ids(case):
    return case.name


def random_weight(shape, dtype, bias, seed=0):
    """Rows of very different norms, zeros and equal entries among them."""
    generator = torch.Generator().manual_seed(seed)
    n_rows, columns = shape
    weight = torch.randn(n_rows, columns, generator=generator, dtype=torch.float64)
    weight *= torch.logspace(-2, 0.5, max(n_rows, 1), dtype=torch.float64)[:n_rows, None]
    weight[1::5] = 0
    weight[2::5] = weight[2::5].clamp(-0.1, 0.1)
    vector = torch.randn(n_rows, generator=generator, dtype=torch.float64) * 0.1
    return weight.to(dtype), vector.to(dtype) if bias else None


def joined(result):
    if isinstance(result, tuple):
        result = torch.cat((result[0], result[1].unsqueeze(1)), dim=1)
    return result.detach().double().numpy()


def pair(weight, bias):
    return weight if bias is None else (weight, bias)

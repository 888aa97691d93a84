r"""Proximal operators, penalties and projections, for tensors.

The proximal operator of a penalty R at threshold t ≥ 0 solves::

    prox(W) = argmin_X  1/2 ‖X − W‖² + t · R(X)

A *group* is a row of a (rows, columns) weight; an optional ``bias`` of shape (rows,) is one more
column of it. For a feed-forward layer that is a neuron: its row of ``fc1.weight`` with its entry
of ``fc1.bias``.

What holds for every operator here unless its own text says otherwise:

* **Arguments.** ``weight``: float64, float32, bfloat16 or float16, on any device, contiguous or
  not, empty or not; two-dimensional for the operators on rows, of any shape for the others.
  ``bias``: of shape ``weight.shape[:1]``, same dtype and device. ``threshold``: t = step size ×
  strength; a finite number ≥ 0 or a tensor without dimensions, and for the operators on rows also
  a tensor with one threshold per row. A tensor on an accelerator is not checked, since that would
  make the device wait.
* **Result.** A new tensor, or the tuple (weight, bias) if a bias was given; forms whose name ends
  in an underscore write into the tensors given and keep their storage, strides and dtype. Nothing
  is recorded for autograd, except by the penalties.
* **Precision.** The half types are computed in float32 and rounded once, at the end.
* **Exact zeros.** What the mathematics says is zero is exactly zero, norm = threshold included.
  At threshold 0 the input comes back unchanged.
* **Not finite.** A NaN makes the whole of its group NaN and no other. A group with an infinite
  entry (and no NaN) comes back unchanged from the operators on rows, the limit for a growing entry.
* **Errors.** ValueError for a dtype that is not among the four, shapes that do not match, or a
  threshold that is negative, NaN or infinite.

Source: Parikh and Boyd, *Proximal Algorithms* (2014), for the operators; Murray and Chiang,
*Auto-Sizing Neural Networks* (2015), for l2,1 and linf,1 on the rows of a layer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Threshold = float | Tensor
Result = Tensor | tuple[Tensor, Tensor]

_COMPUTE_DTYPE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}

# Each Newton step on a row at least halves its residual or its number of active entries (convexity
# of the residual), so 16384 columns in float64 need at most 14 + 14 + 52 steps; 2 to 6 are usual.
_MAX_NEWTON_STEPS = 100

# Entries handled at a time by linf,1: the work arrays of one chunk stay in a core's cache.
_CHUNK_ENTRIES = 1 << 16
# Column blocks whose maxima give the first guess of a row's level.
_BLOCKS = 64


# --- arguments ------------------------------------------------------------------------------------


def _check_tensors(weight: Tensor, bias: Tensor | None, by_row: bool) -> None:
    if weight.dtype not in _COMPUTE_DTYPE:
        raise ValueError(
            f"weight has dtype {weight.dtype}; allowed are float64, float32, bfloat16, float16"
        )
    if by_row and weight.dim() != 2:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; this operator works on rows and needs two "
            "dimensions (rows, columns)"
        )
    if bias is None:
        return
    if bias.dtype != weight.dtype:
        raise ValueError(f"bias has dtype {bias.dtype}; it must be the weight's, {weight.dtype}")
    if weight.dim() == 0 or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; for a weight of shape {tuple(weight.shape)} it "
            f"must be {tuple(weight.shape[:1])}, one entry per row"
        )


def _check_number(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}; it must be a finite number >= 0")
    return float(value)


def _check_threshold(
    threshold: Threshold, weight: Tensor, by_row: bool, name: str = "threshold"
) -> Threshold:
    """Returns a float, or a tensor in the compute dtype on the weight's device."""
    if not isinstance(threshold, Tensor):
        return _check_number(name, threshold)
    if threshold.dim() == 0 and threshold.device.type == "cpu":
        return _check_number(name, threshold.item())
    if threshold.dim() != 0 and not (by_row and threshold.shape == weight.shape[:1]):
        per_row = f" or have shape {tuple(weight.shape[:1])}, one per row" if by_row else ""
        raise ValueError(
            f"{name} has shape {tuple(threshold.shape)}; it must be a number or a tensor without "
            f"dimensions{per_row}"
        )
    if threshold.device.type == "cpu":
        wrong = threshold[~((threshold >= 0) & threshold.isfinite())]
        if wrong.numel():
            raise ValueError(f"{name} contains {wrong[0].item()}; every entry must be finite, >= 0")
    return threshold.to(weight.device, _COMPUTE_DTYPE[weight.dtype])


def _result(weight: Tensor, bias: Tensor | None) -> Result:
    return weight if bias is None else (weight, bias)


def _join(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The groups as one matrix in the compute dtype, the bias as last column."""
    dtype = _COMPUTE_DTYPE[weight.dtype]
    if bias is None:
        return weight.to(dtype)
    return torch.cat((weight.to(dtype), bias.to(dtype).unsqueeze(1)), dim=1)


def _split(joined: Tensor, weight: Tensor, bias: Tensor | None) -> Result:
    """The inverse of `_join`, rounded to the dtype of the weight."""
    joined = joined.to(weight.dtype)
    if bias is None:
        return joined.clone() if joined.data_ptr() == weight.data_ptr() else joined
    return joined[:, :-1].contiguous(), joined[:, -1].contiguous()


# --- l2,1 -----------------------------------------------------------------------------------------


def dual_norm_l21(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The l2 norm of each row: what decides whether `prox_l21` makes the row zero.

    Range: the squares are summed in the compute dtype, so in float32 a row's norm is right from
    about 1e-19 to 1e19 (float64: 1e-154 to 1e154). A norm above that is inf, and the row comes
    back unchanged from the operators; entries below that count as 0.

    Args:
        weight: (rows, columns).
        bias: (rows,), one more column.

    Returns:
        (rows,), float32, or float64 for a float64 weight.
    """
    _check_tensors(weight, bias, by_row=True)
    dtype = _COMPUTE_DTYPE[weight.dtype]
    norms = torch.linalg.vector_norm(weight, dim=1, dtype=dtype)
    return norms if bias is None else torch.hypot(norms, bias.to(dtype))


def _shrinkage(norms: Tensor, t: Threshold) -> Tensor:
    """max(1 − t/‖w‖, 0), written so that ‖w‖ = t gives exactly 0 and ‖w‖ = 0 no NaN."""
    scale = (norms - t).clamp_min_(0) / torch.where(norms > 0, norms, 1.0)
    unchanged = norms == math.inf
    if isinstance(t, Tensor):
        unchanged = unchanged | (t == 0)
    return torch.where(unchanged, 1.0, scale)


@torch.no_grad()
def prox_l21_(weight: Tensor, threshold: Threshold, bias: Tensor | None = None) -> None:
    """`prox_l21`, written into ``weight`` and ``bias``."""
    norms = dual_norm_l21(weight, bias)
    t = _check_threshold(threshold, weight, by_row=True)
    if isinstance(t, float) and t == 0:
        return
    scale = _shrinkage(norms, t)
    weight.mul_(scale.unsqueeze(1))
    if bias is not None:
        bias.mul_(scale)


# --- linf,1 ---------------------------------------------------------------------------------------


def dual_norm_linf1(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The l1 norm of each row: what decides whether `prox_linf1` makes the row zero.

    Args:
        weight: (rows, columns).
        bias: (rows,), one more column.

    Returns:
        (rows,), float32, or float64 for a float64 weight.
    """
    _check_tensors(weight, bias, by_row=True)
    return _join(weight, bias).abs().sum(1)


def _newton_levels(
    values: Tensor, t: Tensor, start: Tensor, metric: Tensor | None = None
) -> Tensor:
    """Solves Σ_j d_j·(v_j − θ)₊ = t for θ in each row.

    The left side is convex and falls with θ, so Newton's method from below never overshoots and
    ends exactly once the set of entries above θ no longer changes.

    Args:
        values: (rows, columns).
        t: (rows,), right sides.
        start: (rows,), at most the solution. A row whose start is not finite keeps it.
        metric: (rows, columns), the d_j > 0; None for 1.

    Returns:
        (rows,).
    """
    eps = torch.finfo(values.dtype).eps
    levels = start.clone()
    current = levels
    pending = torch.arange(len(levels), device=levels.device)
    for _ in range(_MAX_NEWTON_STEPS):
        excess = (values - current.unsqueeze(1)).relu_()
        if metric is None:
            total = excess.sum(1)
            slope = excess.sign_().sum(1)
        else:
            total = (excess * metric).sum(1)
            slope = excess.sign_().mul_(metric).sum(1)
        step = (total - t) / slope
        moving = (step > eps * current.abs()).nonzero().squeeze(1)
        if moving.numel() == 0:
            break
        pending, t = pending[moving], t[moving]
        values = values[moving]
        metric = None if metric is None else metric[moving]
        current = current[moving] + step[moving]
        levels[pending] = current
    return levels


def _linf_levels(magnitudes: Tensor, t: Tensor) -> Tensor:
    """The level θ at which `prox_linf1` cuts each row of absolute values; 0 for a zero row."""
    rows, columns = magnitudes.shape
    if columns == 0:
        return magnitudes.new_zeros(rows)
    width = columns // _BLOCKS
    if width > 1:
        # Fewer entries reach the same sum only at a lower level, so the level of the block maxima
        # is a lower bound; it is exact if no block holds two entries above it.
        blocks = magnitudes[:, : width * _BLOCKS].unflatten(1, (width, _BLOCKS)).amax(1)
        start = _newton_levels(blocks, t, blocks.amax(1) - t)
    else:
        start = magnitudes.amax(1) - t
    levels = _newton_levels(magnitudes, t, start)
    return torch.where(magnitudes.sum(1) <= t, 0.0, levels)


@torch.no_grad()
def prox_linf1_(weight: Tensor, threshold: Threshold, bias: Tensor | None = None) -> None:
    """`prox_linf1`, written into ``weight`` and ``bias``."""
    _check_tensors(weight, bias, by_row=True)
    t = _check_threshold(threshold, weight, by_row=True)
    if isinstance(t, float) and t == 0:
        return
    rows, columns = weight.shape
    if isinstance(t, float):
        t = torch.full((rows,), t, dtype=_COMPUTE_DTYPE[weight.dtype], device=weight.device)
    t = t.expand(rows)
    step = max(1, _CHUNK_ENTRIES // (columns + 1)) if weight.device.type == "cpu" else max(1, rows)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        chunk = weight[part]
        chunk_bias = None if bias is None else bias[part]
        levels = _linf_levels(_join(chunk, chunk_bias).abs(), t[part])
        # Rounding the level and cutting is the same as cutting and rounding: rounding is monotone
        # and leaves the entries below the level alone.
        levels = torch.where(t[part] == 0, math.inf, levels).to(weight.dtype)
        column = levels.unsqueeze(1)
        torch.minimum(chunk, column, out=chunk)
        torch.maximum(chunk, -column, out=chunk)
        if chunk_bias is not None:
            torch.minimum(chunk_bias, levels, out=chunk_bias)
            torch.maximum(chunk_bias, -levels, out=chunk_bias)


def _copy_and_apply(
    prox_: Callable[..., None], weight: Tensor, threshold: Threshold, bias: Tensor | None
) -> Result:
    weight = weight.detach().clone()
    bias = None if bias is None else bias.detach().clone()
    prox_(weight, threshold, bias)
    return _result(weight, bias)


def prox_l21(weight: Tensor, threshold: Threshold, bias: Tensor | None = None) -> Result:
    """Solves argmin_X ½‖X − W‖² + t·Σ_i ‖X_i‖₂: each row is multiplied by max(1 − t/‖W_i‖₂, 0).

    Rows with `dual_norm_l21` ≤ t come back exactly 0.

    Args:
        weight: (rows, columns).
        threshold: t, a number or one per row.
        bias: (rows,), one more column of the groups.
    """
    return _copy_and_apply(prox_l21_, weight, threshold, bias)


def prox_linf1(weight: Tensor, threshold: Threshold, bias: Tensor | None = None) -> Result:
    """Solves argmin_X ½‖X − W‖² + t·Σ_i max_j |X_ij|: each row is cut at its own level θ.

    X_ij = sign(W_ij)·min(|W_ij|, θ_i) with Σ_j (|W_ij| − θ_i)₊ = t. Rows with
    `dual_norm_linf1` ≤ t come back exactly 0.

    Args:
        weight: (rows, columns).
        threshold: t, a number or one per row.
        bias: (rows,), one more column of the groups.
    """
    return _copy_and_apply(prox_linf1_, weight, threshold, bias)


# --- penalties ------------------------------------------------------------------------------------


def penalty_l21(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Σ_i ‖W_i‖₂, a tensor without dimensions."""
    return dual_norm_l21(weight, bias).sum()


def penalty_linf1(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Σ_i max_j |W_ij|, a tensor without dimensions."""
    _check_tensors(weight, bias, by_row=True)
    joined = _join(weight, bias)
    return joined.abs().amax(1).sum() if joined.shape[1] else joined.sum()


# --- the operators that training can use ----------------------------------------------------------


@dataclass(frozen=True)
class Operator:
    """One group regulariser: what a training run needs to know of it.

    Attributes:
        name: As it is given on the command line.
        prox_: (weight, threshold, bias=None) -> None, in place.
        penalty: (weight, bias=None) -> R(W), a tensor without dimensions.
        dual_norm: (weight, bias=None) -> (rows,); a row becomes zero iff this is ≤ threshold.
    """

    name: str
    prox_: Callable[..., None]
    penalty: Callable[..., Tensor]
    dual_norm: Callable[..., Tensor]


OPERATORS = {
    "l21": Operator("l21", prox_l21_, penalty_l21, dual_norm_l21),
    "linf1": Operator("linf1", prox_linf1_, penalty_linf1, dual_norm_linf1),
}

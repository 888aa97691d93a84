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
* **Not finite.** A NaN makes its group NaN (its entry, where there are no groups) and no other.
  A row with an infinite entry and no NaN comes back unchanged from l2,1 and linf,1: the limit for
  an entry that grows.
* **Errors.** ValueError for a dtype that is not among the four, shapes that do not match, or a
  threshold that is negative, NaN or infinite.

Source: Parikh and Boyd, *Proximal Algorithms* (2014), for the operators; Murray and Chiang,
*Auto-Sizing Neural Networks* (2015), for l2,1 and linf,1 on the rows of a layer.
"""

import math
from collections.abc import Callable, Iterable, Sequence
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

# linf,1 on the CPU: entries handled at a time, about, so that the work arrays stay in the cache.
_CHUNK_ENTRIES = 1 << 20
# For the first guess of a row's level: columns whose maximum stands for them, and Newton steps.
_BLOCK_WIDTH = 8
_FIRST_STEPS = 2


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


def _check(
    weight: Tensor, threshold: Threshold, bias: Tensor | None, by_row: bool = False
) -> Threshold:
    _check_tensors(weight, bias, by_row)
    return _check_threshold(threshold, weight, by_row)


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
        return joined
    return joined[:, :-1].contiguous(), joined[:, -1].contiguous()


def _per_row(t: Threshold, weight: Tensor) -> Tensor:
    """A threshold as a tensor of shape (rows,) in the compute dtype."""
    t = torch.as_tensor(t, dtype=_COMPUTE_DTYPE[weight.dtype], device=weight.device)
    return t.expand(weight.shape[0])


# --- l2,1 and linf,1 on the rows: what training uses ----------------------------------------------


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


def _shrinkage(norms: Tensor, t: Threshold) -> Tensor:
    """max(1 − t/‖w‖, 0), exactly 0 at ‖w‖ = t, exactly 1 at t = 0 or ‖w‖ = inf, without NaN."""
    range_ = torch.finfo(norms.dtype)
    norms = norms.clamp(range_.tiny, range_.max)
    return (norms - t).clamp_min_(0).div_(norms)


@torch.no_grad()
def prox_l21_(weight: Tensor, threshold: Threshold, bias: Tensor | None = None) -> None:
    """`prox_l21`, written into ``weight`` and ``bias``."""
    norms = dual_norm_l21(weight, bias)
    scale = _shrinkage(norms, _check_threshold(threshold, weight, by_row=True))
    weight.mul_(scale.unsqueeze(1))
    if bias is not None:
        bias.mul_(scale)


def _first_levels(values: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Lower bounds, mostly close, for the levels that `_newton_levels` finds; the last slopes.

    Newton's method on the maxima of blocks of columns, which leave out little if little is above
    the level. It starts at the level for values spread evenly from 0 to the maximum. Where that is
    too high the first step leads below the level, because the residual is convex.
    """
    columns = values.shape[1]
    blocks = columns // (32 * _BLOCK_WIDTH) * 32  # amax over strides is slow for other numbers
    if blocks:
        covered = blocks * _BLOCK_WIDTH
        peaks = values[:, :covered].unflatten(1, (_BLOCK_WIDTH, blocks)).amax(1)
        values = torch.cat((peaks, values[:, covered:]), 1)
    top = values.amax(1)
    bound = top - t  # what cutting the maximum alone gives
    # fmax takes the number if the other is NaN: from inf - inf, 0/0, the root of a negative top.
    levels = torch.fmax(bound, top - (top * t).mul_(2 / columns).sqrt_())
    for _ in range(_FIRST_STEPS):
        excess = torch.sub(values, levels.unsqueeze(1)).relu_()
        residual = excess.sum(1).sub_(t)
        slope = excess.sign_().sum(1)
        levels = torch.fmax(bound, torch.addcdiv(levels, residual, slope))
    return levels, slope


def _newton_levels(excess: Tensor, t: Tensor, start: Tensor, slope: Tensor) -> Tensor:
    """Solves Σ_j (v_j − θ)₊ = t for θ in each row.

    The left side is convex and falls with θ, so Newton's method from below never overshoots and
    ends exactly once the set of entries above θ no longer changes.

    Args:
        excess: (rows, columns), (v − start)₊; overwritten.
        t: (rows,), right sides.
        start: (rows,), at most the solution; a row that starts above it, at inf or at NaN stays.
        slope: (rows,), the number of v_j > θ in the step that led to start, or less.

    Returns:
        (rows,).
    """
    eps = torch.finfo(excess.dtype).eps
    levels = current = start
    rows = None  # those still moving; None for all
    for _ in range(_MAX_NEWTON_STEPS):
        total = excess.sum(1)
        # A step below the last digit of θ ends a row; the slope before is at least the one now.
        moving = (total > torch.addcmul(t, slope, current.abs(), value=eps)).nonzero().squeeze(1)
        if len(moving) == 0:
            break
        if 2 * len(moving) < len(excess):  # else copying costs more than it saves
            rows = moving if rows is None else rows[moving]
            excess = excess.index_select(0, moving)
            t, current, total = t[moving], current[moving], total[moving]
        slope = excess.sign().sum(1)
        last = current
        current = torch.fmax(last, torch.addcdiv(last, total - t, slope))
        excess.sub_((current - last).unsqueeze(1)).relu_()
        levels = current if rows is None else levels.index_copy(0, rows, current)
    return levels


def _linf_levels(values: Tensor, t: Tensor) -> Tensor:
    """The level θ at which `prox_linf1` cuts each row of absolute values; 0 for a zero row.

    Overwrites ``values``.
    """
    columns = values.shape[1]
    if columns == 0:
        return values.new_zeros(len(values))
    start, slope = _first_levels(values, t)
    start.clamp_min_(0)
    # The sum decides, but it is needed only if a level could be 0, up to rounding.
    dead = start <= 8 * columns * torch.finfo(values.dtype).eps * t
    if dead.any():
        dead = values.sum(1) <= t
    excess = values.sub_(start.unsqueeze(1)).relu_()
    return _newton_levels(excess, t, start, slope).masked_fill(dead, 0.0)


@torch.no_grad()
def prox_linf1_(weight: Tensor, threshold: Threshold, bias: Tensor | None = None) -> None:
    """`prox_linf1`, written into ``weight`` and ``bias``."""
    thresholds = _per_row(_check(weight, threshold, bias, by_row=True), weight)
    rows, columns = weight.shape
    width = columns + (bias is not None)
    chunks = 1 if weight.device.type != "cpu" else max(1, round(rows * width / _CHUNK_ENTRIES))
    chunk = max(1, math.ceil(rows / chunks))
    work = torch.empty(min(rows, chunk), width, dtype=thresholds.dtype, device=weight.device)
    for first in range(0, rows, chunk):
        part = slice(first, first + chunk)
        w, t = weight[part], thresholds[part]
        values = work[: len(w)]
        torch.abs(w.to(work.dtype), out=values[:, :columns])
        if bias is not None:
            torch.abs(bias[part].to(work.dtype), out=values[:, columns])
        # Rounding the level and cutting there is cutting and rounding the result: rounding is
        # monotone, and the entries below the level are numbers of that dtype already.
        level = _linf_levels(values, t).to(weight.dtype)
        column = level.unsqueeze(1)
        # Two passes, because clamp with tensors as bounds is several times slower.
        torch.maximum(torch.minimum(w, column, out=w), -column, out=w)
        if bias is not None:
            b = bias[part]
            torch.maximum(torch.minimum(b, level, out=b), -level, out=b)


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


def penalty_l21(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Σ_i ‖W_i‖₂, a tensor without dimensions."""
    _check_tensors(weight, bias, by_row=True)
    # Not `dual_norm_l21`: the gradient of hypot at (0, 0) is NaN.
    return torch.linalg.vector_norm(_join(weight, bias), dim=1).sum()


def penalty_linf1(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Σ_i max_j |W_ij|, a tensor without dimensions."""
    _check_tensors(weight, bias, by_row=True)
    joined = _join(weight, bias)
    return joined.abs().amax(1).sum() if joined.shape[1] else joined.sum()


@dataclass(frozen=True)
class Operator:
    """One group regulariser: what a training run needs to know of it.

    Attributes:
        prox_: (weight, threshold, bias=None) -> None, in place.
        penalty: (weight, bias=None) -> R(W), a tensor without dimensions.
        dual_norm: (weight, bias=None) -> (rows,); a row becomes zero iff this is ≤ threshold.
        prox_diagonal_: (parts, metrics, threshold) -> which groups are zero after the prox in a
            diagonal metric, in place.
        dual_norm_diagonal: (parts, metrics) -> (groups,), what decides in that metric.
        growth: the dual norm of n independent entries grows like n to this power, so groups of
            different sizes compare after division by it.
    """

    prox_: Callable[..., None]
    penalty: Callable[..., Tensor]
    dual_norm: Callable[..., Tensor]
    prox_diagonal_: Callable[..., Tensor]
    dual_norm_diagonal: Callable[..., Tensor]
    growth: float


# --- operators on entries, on the whole tensor, and other ones on rows ----------------------------


def _soft(values: Tensor, t: Threshold) -> Tensor:
    return values - torch.clamp(values, -t, t)


def _map(function: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None) -> Result:
    """Applies a function of entries in the compute dtype and rounds once."""
    dtype = _COMPUTE_DTYPE[weight.dtype]
    new = [None if x is None else function(x.to(dtype)).to(x.dtype) for x in (weight, bias)]
    return _result(*new)


def _sum(function: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    _check_tensors(weight, bias, by_row=False)
    dtype = _COMPUTE_DTYPE[weight.dtype]
    total = function(weight.to(dtype)).sum()
    return total if bias is None else total + function(bias.to(dtype)).sum()


@torch.no_grad()
def prox_l1(weight: Tensor, threshold: Threshold, bias: Tensor | None = None) -> Result:
    """Solves argmin_X ½‖X − W‖² + t·Σ |X_ij|: sign(w)·max(|w| − t, 0) for each entry.

    Entries with |w| ≤ t come back exactly 0.
    """
    t = _check(weight, threshold, bias)
    return _map(lambda x: _soft(x, t), weight, bias)


def penalty_l1(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Σ |W_ij|, a tensor without dimensions."""
    return _sum(torch.abs, weight, bias)


@torch.no_grad()
def prox_l2(weight: Tensor, threshold: Threshold, bias: Tensor | None = None) -> Result:
    """Solves argmin_X ½‖X − W‖² + t·‖X‖₂ with all of weight and bias as one group.

    Everything is multiplied by max(1 − t/‖W‖, 0), so it is exactly 0 for ‖W‖ ≤ t. The range of
    norms is that of `dual_norm_l21`.
    """
    t = _check_threshold(threshold, weight, by_row=False)
    scale = _shrinkage(penalty_l2(weight, bias), t)
    return _map(lambda x: x * scale, weight, bias)


def penalty_l2(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """‖W‖₂ of all entries and the bias, not squared; a tensor without dimensions."""
    _check_tensors(weight, bias, by_row=False)
    dtype = _COMPUTE_DTYPE[weight.dtype]
    norm = torch.linalg.vector_norm(weight, dtype=dtype)
    if bias is None:
        return norm
    # Not hypot, whose gradient at (0, 0) is NaN.
    return torch.linalg.vector_norm(
        torch.stack((norm, torch.linalg.vector_norm(bias, dtype=dtype)))
    )


@torch.no_grad()
def prox_squared_l2(weight: Tensor, threshold: Threshold, bias: Tensor | None = None) -> Result:
    """Solves argmin_X ½‖X − W‖² + t·½‖X‖²: w/(1 + t). Makes nothing zero."""
    t = _check(weight, threshold, bias)
    return _map(lambda x: x / (1 + t), weight, bias)


def penalty_squared_l2(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """½‖W‖², a tensor without dimensions."""
    return _sum(lambda x: x.square() / 2, weight, bias)


@torch.no_grad()
def prox_elastic_net(
    weight: Tensor, threshold: Threshold, bias: Tensor | None = None, gamma: float = 1.0
) -> Result:
    """Solves argmin_X ½‖X − W‖² + t·(Σ |X_ij| + γ/2·‖X‖²): `prox_l1`, then division by 1 + t·γ.

    Args:
        weight: Any shape.
        threshold: t.
        bias: Of shape ``weight.shape[:1]``.
        gamma: γ ≥ 0, the weight of the quadratic part.
    """
    t = _check(weight, threshold, bias)
    gamma = _check_number("gamma", gamma)
    return _map(lambda x: _soft(x, t) / (1 + t * gamma), weight, bias)


def penalty_elastic_net(weight: Tensor, bias: Tensor | None = None, gamma: float = 1.0) -> Tensor:
    """Σ |W_ij| + γ/2·‖W‖², a tensor without dimensions."""
    gamma = _check_number("gamma", gamma)
    return penalty_l1(weight, bias) + gamma * penalty_squared_l2(weight, bias)


def prox_linf(weight: Tensor, threshold: Threshold, bias: Tensor | None = None) -> Result:
    """Solves argmin_X ½‖X − W‖² + t·max |X_ij| with all of weight and bias as one group.

    All entries are cut at one level, see `prox_linf1`; exactly 0 where the sum of all absolute
    values is at most t.
    """
    t = _check(weight, threshold, bias)
    parts = [weight.detach().reshape(-1)] + ([] if bias is None else [bias.detach()])
    flat = torch.cat(parts)
    prox_linf1_(flat.unsqueeze(0), t)
    new_weight = flat[: weight.numel()].reshape(weight.shape).clone()
    return _result(new_weight, None if bias is None else flat[weight.numel() :].clone())


def penalty_linf(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The largest |W_ij| of weight and bias, a tensor without dimensions; 0 if there is none."""
    _check_tensors(weight, bias, by_row=False)
    dtype = _COMPUTE_DTYPE[weight.dtype]
    maxima = [x.abs().amax().to(dtype) for x in (weight, bias) if x is not None and x.numel()]
    return torch.stack(maxima).amax() if maxima else weight.to(dtype).sum()


def _check_mixing(mixing: float) -> float:
    if not 0 <= mixing <= 1:
        raise ValueError(f"mixing is {mixing}; it must lie between 0 (only l2,1) and 1 (only l1)")
    return float(mixing)


@torch.no_grad()
def prox_sparse_group_lasso(
    weight: Tensor, threshold: Threshold, bias: Tensor | None = None, mixing: float = 0.5
) -> Result:
    """Solves argmin_X ½‖X − W‖² + t·(m·Σ |X_ij| + (1 − m)·Σ_i ‖X_i‖₂): zero rows and entries.

    `prox_l1` with threshold m·t, then `prox_l21` with threshold (1 − m)·t.

    Args:
        weight: (rows, columns).
        threshold: t, a number or one per row.
        bias: (rows,), one more column of the groups.
        mixing: m, from 0 (only l2,1) to 1 (only l1).
    """
    t = _per_row(_check(weight, threshold, bias, by_row=True), weight)
    mixing = _check_mixing(mixing)
    soft = _soft(_join(weight, bias), mixing * t.unsqueeze(1))
    scale = _shrinkage(torch.linalg.vector_norm(soft, dim=1), (1 - mixing) * t)
    return _split(soft.mul_(scale.unsqueeze(1)), weight, bias)


def penalty_sparse_group_lasso(
    weight: Tensor, bias: Tensor | None = None, mixing: float = 0.5
) -> Tensor:
    """m·Σ |W_ij| + (1 − m)·Σ_i ‖W_i‖₂, a tensor without dimensions."""
    mixing = _check_mixing(mixing)
    return mixing * penalty_l1(weight, bias) + (1 - mixing) * penalty_l21(weight, bias)


@torch.no_grad()
def prox_l0(weight: Tensor, threshold: Threshold, bias: Tensor | None = None) -> Result:
    """Solves argmin_X ½‖X − W‖² + t·#{X_ij ≠ 0}: entries with |w| ≤ √(2t) become exactly 0.

    The other entries do not change. At |w| = √(2t) both are solutions; this gives 0.
    """
    cut = (2 * _check(weight, threshold, bias)) ** 0.5
    return _map(lambda x: torch.where(x.abs() <= cut, 0.0, x), weight, bias)


def penalty_l0(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The number of entries that are not 0, a tensor without dimensions."""
    return _sum(lambda x: (x != 0).to(x.dtype), weight, bias)


@torch.no_grad()
def prox_group_l0(weight: Tensor, threshold: Threshold, bias: Tensor | None = None) -> Result:
    """Solves argmin_X ½‖X − W‖² + t·#{rows X_i ≠ 0}: rows with ‖W_i‖₂ ≤ √(2t) become exactly 0.

    The other rows do not change. At ‖W_i‖₂ = √(2t) both are solutions; this gives 0.

    Args:
        weight: (rows, columns).
        threshold: t, a number or one per row.
        bias: (rows,), one more column of the groups.
    """
    norms = dual_norm_l21(weight, bias)
    cut = (2 * _check_threshold(threshold, weight, by_row=True)) ** 0.5
    scale = torch.where(norms.isnan(), norms, (norms > cut).to(norms.dtype))
    return _split(_join(weight, bias) * scale.unsqueeze(1), weight, bias)


def penalty_group_l0(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The number of rows that are not zero, a tensor without dimensions."""
    _check_tensors(weight, bias, by_row=True)
    joined = _join(weight, bias)
    return (joined != 0).any(1).to(joined.dtype).sum()


@torch.no_grad()
def prox_log_barrier(weight: Tensor, threshold: Threshold, bias: Tensor | None = None) -> Result:
    """Solves argmin_X ½‖X − W‖² − t·Σ log X_ij: (w + √(w² + 4t))/2 for each entry, positive.

    Makes nothing zero for t > 0. At t = 0 it is the projection on X ≥ 0, its limit.
    """
    t = _check(weight, threshold, bias)

    def barrier(x: Tensor) -> Tensor:
        root = torch.hypot(x, torch.as_tensor(2 * t**0.5, dtype=x.dtype, device=x.device))
        # For negative x, x + root would cancel.
        return torch.where(x < 0, 2 * t / (root - x), (x + root) / 2)

    return _map(barrier, weight, bias)


def penalty_log_barrier(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """−Σ log W_ij, a tensor without dimensions; inf if an entry is not positive."""
    return _sum(lambda x: torch.where(x <= 0, math.inf, -x.log()), weight, bias)


# --- projections ----------------------------------------------------------------------------------


def _as_rows(x: Tensor, radius: Threshold) -> tuple[Tensor, Tensor]:
    """The vectors as rows in the compute dtype, and a radius for each."""
    _check_tensors(x, None, by_row=False)
    if x.dim() not in (1, 2):
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be a vector or a matrix of rows")
    rows = (x.detach() if x.dim() == 2 else x.detach().unsqueeze(0)).to(_COMPUTE_DTYPE[x.dtype])
    return rows, _per_row(_check_threshold(radius, rows, x.dim() == 2, name="radius"), rows)


@torch.no_grad()
def project_l1_ball(x: Tensor, radius: Threshold) -> Tensor:
    """Solves argmin_y ‖y − x‖ subject to ‖y‖₁ ≤ radius, for a vector or each row of a matrix.

    Args:
        x: (n,) or (rows, n).
        radius: A number ≥ 0, for a matrix also one per row.
    """
    rows, radius = _as_rows(x, radius)
    levels = _linf_levels(rows.abs(), radius)
    return _soft(rows, levels.unsqueeze(1)).to(x.dtype).reshape(x.shape)


@torch.no_grad()
def project_linf_ball(x: Tensor, radius: Threshold) -> Tensor:
    """Solves argmin_y ‖y − x‖ subject to max |y_j| ≤ radius, for a vector or each row of a matrix.

    Args:
        x: (n,) or (rows, n).
        radius: A number ≥ 0, for a matrix also one per row.
    """
    rows, radius = _as_rows(x, radius)
    column = radius.unsqueeze(1)
    return torch.clamp(rows, -column, column).to(x.dtype).reshape(x.shape)


@torch.no_grad()
def project_simplex(x: Tensor, radius: Threshold = 1.0) -> Tensor:
    """Solves argmin_y ‖y − x‖ subject to y ≥ 0, Σ_j y_j = radius, for a vector or each row.

    Args:
        x: (n,) or (rows, n), n ≥ 1.
        radius: A number ≥ 0, for a matrix also one per row.
    """
    rows, radius = _as_rows(x, radius)
    if rows.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; the simplex needs at least one entry")
    start, slope = _first_levels(rows, radius)
    excess = (rows - start.unsqueeze(1)).relu_()
    levels = _newton_levels(excess, radius, start, slope)
    return (rows - levels.unsqueeze(1)).relu_().to(x.dtype).reshape(x.shape)


# --- in a diagonal metric -------------------------------------------------------------------------
#
# What training uses takes the groups in parts: tensors of shape (groups, ...), two dimensions or
# more, in float32 or float64. They may be views, such as columns of fc2; nothing is joined or
# transposed, and the work arrays get the memory layout of the part.


def _column(values: Tensor, part: Tensor) -> Tensor:
    """(groups,), so that it broadcasts over a part."""
    return values.view(-1, *[1] * (part.dim() - 1))


def _totals(parts: Iterable[Tensor]) -> Tensor:
    """The sum of each group's entries; shape (groups,)."""
    first, *others = [part.sum(tuple(range(1, part.dim()))) for part in parts]
    for other in others:
        first.add_(other)
    return first


def _extremes(reduce: Callable[..., Tensor], parts: Iterable[Tensor]) -> Tensor:
    """The largest (`torch.amax`) or smallest (`torch.amin`) entry of each group."""
    return reduce(torch.stack([reduce(x, tuple(range(1, x.dim()))) for x in parts]), 0)


def _select(rows: Tensor, parts: Iterable[Tensor]) -> list[Tensor]:
    return [part.index_select(0, rows) for part in parts]


def _check_metric(
    weight: Tensor, metric: Tensor, bias: Tensor | None, bias_metric: Tensor | None
) -> None:
    if metric.shape != weight.shape:
        raise ValueError(
            f"metric has shape {tuple(metric.shape)}; it must be the weight's, "
            f"{tuple(weight.shape)}"
        )
    if (bias is None) != (bias_metric is None):
        raise ValueError("bias and bias_metric must be given together or not at all")
    if bias is not None and bias_metric.shape != bias.shape:
        raise ValueError(
            f"bias_metric has shape {tuple(bias_metric.shape)}; it must be the bias's, "
            f"{tuple(bias.shape)}"
        )
    for name, values in (("metric", metric), ("bias_metric", bias_metric)):
        if values is None:
            continue
        if not values.is_floating_point():
            raise ValueError(f"{name} has dtype {values.dtype}; it must be floating")
        if values.device.type == "cpu" and values.numel() and values.amin() <= 0:
            raise ValueError(f"{name} contains {values.min().item()}; every entry must be > 0")


def _copy_and_apply_in_metric(
    prox_: Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], object],
    weight: Tensor,
    metric: Tensor,
    threshold: Threshold,
    bias: Tensor | None,
    bias_metric: Tensor | None,
) -> Result:
    t = _per_row(_check(weight, threshold, bias, by_row=True), weight)
    _check_metric(weight, metric, bias, bias_metric)
    if bias is not None:
        metric = torch.cat((metric, bias_metric.unsqueeze(1)), dim=1)
    groups = _join(weight.detach(), bias).clone()
    if groups.numel():
        prox_([groups], [metric.detach().to(weight.device, t.dtype)], t)
    return _split(groups, weight, bias)


def _soft_in_metric_(parts: Sequence[Tensor], metrics: Sequence[Tensor], t: Tensor) -> None:
    for part, metric in zip(parts, metrics, strict=True):
        part.copy_(_soft(part, _column(t, part) / metric))


@torch.no_grad()
def prox_l1_diagonal(
    weight: Tensor,
    metric: Tensor,
    threshold: Threshold,
    bias: Tensor | None = None,
    bias_metric: Tensor | None = None,
) -> Result:
    """Solves argmin_X ½ Σ d_ij·(X_ij − W_ij)² + t·Σ |X_ij|: `prox_l1` with threshold t/d_ij.

    Args:
        weight: (rows, columns).
        metric: (rows, columns), d > 0; for Adam √v̂ + ε.
        threshold: t, a number or one per row.
        bias: (rows,).
        bias_metric: (rows,), d of the bias.
    """
    return _copy_and_apply_in_metric(_soft_in_metric_, weight, metric, threshold, bias, bias_metric)


def dual_norm_l21_diagonal(parts: Sequence[Tensor], metrics: Sequence[Tensor]) -> Tensor:
    """‖d∘w‖₂ of each group: what decides whether `prox_l21_diagonal_` makes it zero.

    Args:
        parts, metrics: w and d > 0, each in parts of shape (groups, ...).

    Returns:
        (groups,).
    """
    return _totals((w * d).square_() for w, d in zip(parts, metrics, strict=True)).sqrt_()


@torch.no_grad()
def prox_l21_diagonal_(
    parts: Sequence[Tensor], metrics: Sequence[Tensor], threshold: Threshold
) -> Tensor:
    """`prox_l21_diagonal`, written into the parts of the groups.

    Args:
        parts, metrics: w and d > 0, each in parts of shape (groups, ...).
        threshold: t ≥ 0, a number or one per group; not checked.

    Returns:
        Which groups are zero, boolean, shape (groups,).
    """
    t = _per_row(threshold, parts[0])
    e = [_column(t, d) / d for d in metrics]
    sizes = _sizes_in_metric(parts, metrics, t, e)
    zero = sizes == 0
    # Without 0/0 where t = 0, and without inf/inf.
    sizes = torch.where(zero & (t == 0), 1.0, sizes).clamp_max_(torch.finfo(t.dtype).max / 2)
    for w, x in zip(parts, e, strict=True):
        size = _column(sizes, x)
        w.mul_(torch.div(size, x.add_(size), out=x))
    return zero


def _sizes_in_metric(
    w: Sequence[Tensor], d: Sequence[Tensor], t: Tensor, e: Sequence[Tensor]
) -> Tensor:
    """The s ≥ 0 with ‖w/(s + e)‖₂ = 1 in each group, e = t/d; 0 where ‖d∘w‖₂ ≤ t.

    Newton on 1/‖w/(s + e)‖ = 1, whose left side is concave in s: it ascends from below without
    overshoot, and from above, at ‖w‖, one step leads below. Where thresholds are small this step
    is all, and it shows itself that another would change nothing.
    """
    eps = torch.finfo(t.dtype).eps
    norms = _totals(x.square() for x in w).sqrt_()
    step, error = _step_in_metric(w, e, norms)
    sizes = norms + step
    moving = (~(error <= eps)).nonzero().squeeze(1)  # also what is not finite
    if len(moving) == 0:
        return sizes
    # Where the step led far down s may be 0, and below s is also: as if d were the largest
    # everywhere, but not below 0.
    low = (~(sizes > 0.1 * norms)).nonzero().squeeze(1)
    if len(low):
        d, t = _select(low, d), t[low]
        dual = dual_norm_l21_diagonal(_select(low, w), d)
        lower = ((dual - t) / _extremes(torch.amax, d)).clamp_min_(0)
        sizes[low] = torch.where(dual <= t, 0.0, torch.fmax(sizes[low], lower))
    current, rows = sizes, None  # rows still moving; None for all
    if 2 * len(moving) < len(current):  # else copying costs more than it saves
        rows, current = moving, current[moving]
        w, e = _select(rows, w), _select(rows, e)
    for _ in range(_MAX_NEWTON_STEPS):
        step, error = _step_in_metric(w, e, current)
        step = torch.where((step > 0) & (current > 0), step, 0.0)
        current = current + step
        sizes = current if rows is None else sizes.index_copy(0, rows, current)
        moving = ((step > eps * current) & (error > eps)).nonzero().squeeze(1)
        if len(moving) == 0:
            break
        if 2 * len(moving) < len(current):
            rows = moving if rows is None else rows[moving]
            w, e = (_select(moving, x) for x in (w, e))
            current = current[moving]
    return sizes


def _step_in_metric(
    w: Sequence[Tensor], e: Sequence[Tensor], sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """Newton's step on 1/‖w/(s + e)‖ = 1 from s, and the relative error of x after it.

    With h = 1/(s + e), and means and variances weighted by (w·h)², the second derivative is
    −3·Var(h)/E(h) times the first, and Var(h) ≤ E(h)·(1/s − E(h)). So the step δ leaves a relative
    error of at most about 3/2·κ·(δ/s)² in s, κ = 1 − s·E(h) = E(e·h). In x = w·s·h, whose entries
    depend on s with e·h, that is ‖·‖₂ √E((e·h)²) ≤ √κ times as much.
    """
    squares, cubes = [], []
    for x, y in zip(w, e, strict=True):
        shifted = y + _column(sizes, y)
        q = torch.div(x, shifted)
        squares.append(_totals([q.mul_(q)]))
        cubes.append(_totals([q.div_(shifted)]))
    square, cube = (sum(x[1:], x[0]) for x in (squares, cubes))
    tiny = torch.finfo(square.dtype).tiny
    step = (square.sqrt() - 1) * square / cube.clamp_min(tiny)
    change = step / (sizes + step).clamp_min_(tiny)
    kappa = (1 - sizes * cube / square.clamp_min(tiny)).abs_()
    return step, 2 * kappa * kappa.sqrt() * change.square_()


def prox_l21_diagonal(
    weight: Tensor,
    metric: Tensor,
    threshold: Threshold,
    bias: Tensor | None = None,
    bias_metric: Tensor | None = None,
) -> Result:
    """Solves argmin_X ½ Σ d_ij·(X_ij − W_ij)² + t·Σ_i ‖X_i‖₂.

    x = w·s/(s + t/d), where s = ‖x‖ is the root of ‖w/(s + t/d)‖ = 1; a row with ‖d∘w‖₂ ≤ t comes
    back exactly 0.

    Args:
        weight: (rows, columns).
        metric: (rows, columns), d > 0; for Adam √v̂ + ε.
        threshold: t, a number or one per row.
        bias: (rows,), one more column of the groups.
        bias_metric: (rows,), d of the bias.

    Where squares of w or of d/t underflow (t/d beyond 1e20·‖w‖ in float32), a row comes back tiny
    instead of 0.
    """
    return _copy_and_apply_in_metric(
        prox_l21_diagonal_, weight, metric, threshold, bias, bias_metric
    )


def dual_norm_linf1_diagonal(parts: Sequence[Tensor], metrics: Sequence[Tensor]) -> Tensor:
    """Σ d·|w| of each group: what decides whether `prox_linf1_diagonal_` makes it zero.

    Args:
        parts, metrics: w and d > 0, each in parts of shape (groups, ...).

    Returns:
        (groups,).
    """
    return _totals((w * d).abs_() for w, d in zip(parts, metrics, strict=True))


@torch.no_grad()
def prox_linf1_diagonal_(
    parts: Sequence[Tensor], metrics: Sequence[Tensor], threshold: Threshold
) -> Tensor:
    """`prox_linf1_diagonal`, written into the parts of the groups.

    Args:
        parts, metrics: w and d > 0, each in parts of shape (groups, ...).
        threshold: t ≥ 0, a number or one per group; not checked.

    Returns:
        Which groups are zero, boolean, shape (groups,).
    """
    levels = _levels_in_metric([x.abs() for x in parts], metrics, _per_row(threshold, parts[0]))
    for w in parts:
        level = _column(levels, w)
        # Two passes, because clamp with tensors as bounds is several times slower.
        torch.maximum(torch.minimum(w, level, out=w), -level, out=w)
    return levels == 0


def _levels_in_metric(values: Sequence[Tensor], d: Sequence[Tensor], t: Tensor) -> Tensor:
    """The θ with Σ d·(v − θ)₊ = t in each group; 0 where Σ d·v ≤ t.

    Newton's method as in `_newton_levels`.
    """
    eps = torch.finfo(t.dtype).eps
    top = _extremes(torch.amax, values)
    bound = (top - t / _extremes(torch.amin, d)).clamp_min_(0)
    # As if d were the same everywhere and the values spread evenly from 0 to the largest. Where
    # that is too high, the first step leads below the level, because the residual is convex.
    current = torch.fmax(bound, top - (top * t).mul_(2).div_(_totals(d)).sqrt_())
    levels, rows = current, None  # rows still moving; None for all
    v, c, r = values, d, t  # of those rows
    for turn in range(_MAX_NEWTON_STEPS):
        excess = [x.sub(_column(current, x)).relu_() for x in v]
        total = _totals(x * y for x, y in zip(excess, c, strict=True))
        slope = _totals(x.sign_().mul_(y) for x, y in zip(excess, c, strict=True))
        step = (total - r) / slope
        if turn == 0:
            levels = current = torch.fmax(bound, current + step)
            continue
        moving = (step > eps * current).nonzero().squeeze(1)
        if len(moving) == 0:
            break
        if 2 * len(moving) < len(current):
            rows = moving if rows is None else rows[moving]
            v, c = (_select(moving, x) for x in (v, c))
            r, current, step = r[moving], current[moving], step[moving]
        current = torch.where(step > 0, current + step, current)
        levels = current if rows is None else levels.index_copy(0, rows, current)
    # The sum decides, but it is needed only if a level could be 0, up to rounding.
    low = (levels < 0.01 * top).nonzero().squeeze(1)
    if len(low):
        dual = dual_norm_linf1_diagonal(_select(low, values), _select(low, d))
        levels = levels.index_fill(0, low[dual <= t[low]], 0.0)
    return levels


def prox_linf1_diagonal(
    weight: Tensor,
    metric: Tensor,
    threshold: Threshold,
    bias: Tensor | None = None,
    bias_metric: Tensor | None = None,
) -> Result:
    """Solves argmin_X ½ Σ d_ij·(X_ij − W_ij)² + t·Σ_i max_j |X_ij|.

    |x| = min(|w|, θ) with Σ_j d_j·(|w_j| − θ)₊ = t; a row with Σ_j d_j·|w_j| ≤ t comes back
    exactly 0.

    Args:
        weight: (rows, columns).
        metric: (rows, columns), d > 0; for Adam √v̂ + ε.
        threshold: t, a number or one per row.
        bias: (rows,), one more column of the groups.
        bias_metric: (rows,), d of the bias.
    """
    return _copy_and_apply_in_metric(
        prox_linf1_diagonal_, weight, metric, threshold, bias, bias_metric
    )


OPERATORS = {  # by their names on the command line
    "l21": Operator(
        prox_l21_,
        penalty_l21,
        dual_norm_l21,
        prox_l21_diagonal_,
        dual_norm_l21_diagonal,
        0.5,
    ),
    "linf1": Operator(
        prox_linf1_,
        penalty_linf1,
        dual_norm_linf1,
        prox_linf1_diagonal_,
        dual_norm_linf1_diagonal,
        1.0,
    ),
}

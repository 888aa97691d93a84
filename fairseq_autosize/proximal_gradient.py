"""The functions of ProxGradPytorch's ``proximal_gradient.proximalGradient``, made right.

A drop-in for that module: same names, argument order and defaults. Each function takes one
proximal step of the penalty with threshold ``reg * lr`` (strength times step size; the step size
defaults to 0.1 and is not the optimizer's learning rate) and returns None. Call it after
``optimizer.step()``::

    import fairseq_autosize.proximal_gradient as pg

    optimizer.step()
    pg.linf1(model.linear1.weight, model.linear1.bias, reg=0.005)

The parameters are changed in place, outside autograd, and keep their storage, strides and dtype.
Shapes, dtypes, errors and what comes back exactly zero: see `fairseq_autosize.prox`.
"""

import torch
from torch import Tensor

from . import prox


def _write(new: prox.Result, parameter: Tensor, bias: Tensor | None) -> None:
    with torch.no_grad():
        if bias is None:
            parameter.copy_(new)
        else:
            parameter.copy_(new[0])
            bias.copy_(new[1])


def l21(parameter: Tensor, bias: Tensor | None = None, reg: float = 0.01, lr: float = 0.1) -> None:
    """Step of the sum of the rows' l2 norms (group lasso), the bias as a further column."""
    prox.prox_l21_(parameter, reg * lr, bias)


def l21_slow(
    parameter: Tensor,
    bias: Tensor | float | None = None,
    reg: float | None = None,
    lr: float | None = None,
) -> None:
    """`l21` row by row, to compare with; the same defaults, reg=0.01 and lr=0.1.

    Takes the arguments of `l21`, and also the original's (parameter, reg, lr) without a bias:
    ``l21_slow(w, 0.1, 0.1)``.
    """
    if bias is not None and not isinstance(bias, Tensor):
        if reg is not None and lr is not None:
            raise ValueError(f"bias is {bias}; it must be a tensor where reg and lr are given too")
        bias, reg, lr = None, bias, lr if reg is None else reg
    threshold = (0.01 if reg is None else reg) * (0.1 if lr is None else lr)
    prox.dual_norm_l21(parameter, bias)  # refuses wrong shapes before the first row is written
    for i in range(len(parameter)):
        prox.prox_l21_(parameter[i : i + 1], threshold, None if bias is None else bias[i : i + 1])


def linf1(
    parameter: Tensor, bias: Tensor | None = None, reg: float = 0.01, lr: float = 0.1
) -> None:
    """Step of the sum of the rows' largest absolute values, the bias as a further column."""
    prox.prox_linf1_(parameter, reg * lr, bias)


def linf(parameter: Tensor, bias: Tensor | None = None, reg: float = 0.01, lr: float = 0.1) -> None:
    """Step of the largest absolute value of the whole tensor and the bias."""
    _write(prox.prox_linf(parameter, reg * lr, bias), parameter, bias)


def l2(parameter: Tensor, bias: Tensor | None = None, reg: float = 0.01, lr: float = 0.1) -> None:
    """Step of the l2 norm, not squared, of the whole tensor and the bias."""
    _write(prox.prox_l2(parameter, reg * lr, bias), parameter, bias)


def l1(parameter: Tensor, bias: Tensor | None = None, reg: float = 0.01, lr: float = 0.1) -> None:
    """Step of the sum of absolute values: soft thresholding of each entry."""
    _write(prox.prox_l1(parameter, reg * lr, bias), parameter, bias)


def elasticnet(
    parameter: Tensor,
    bias: Tensor | None = None,
    reg: float = 0.01,
    lr: float = 0.1,
    gamma: float = 1.0,
) -> None:
    """`l1`, then division by 1 + reg·lr·gamma: step of Σ|w| + gamma/2·Σw²."""
    _write(prox.prox_elastic_net(parameter, reg * lr, bias, gamma), parameter, bias)


def logbarrier(
    parameter: Tensor, bias: Tensor | None = None, reg: float = 0.01, lr: float = 0.1
) -> None:
    """Step of −Σ log w: every entry becomes positive."""
    _write(prox.prox_log_barrier(parameter, reg * lr, bias), parameter, bias)

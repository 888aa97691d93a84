"""One training update with a proximal step: fairseq's optimizer first, then the prox on masters."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fairseq.optim import FairseqOptimizer

from .groups import FeedForward
from .masters import Master, find_masters
from .prox import Operator


@dataclass(frozen=True)
class _Target:
    """The masters of one layer's groups."""

    weight: Master
    bias: Master | None


class ProximalOptimizer:
    """Wraps an optimizer that fairseq has built; its `step` ends with proximal steps.

    An update minimises loss + strength * penalty by forward-backward splitting: the inner
    optimizer takes its step on the loss, then each layer's fc1 gets

        argmin_X 1/2 ||X - W||^2 + t * penalty(X),   t = strength * step size,

    on its fp32 masters, and the result is copied back into the model. Rows whose dual norm is at
    most t become exactly zero. (Parikh and Boyd 2014, section 4.2; Murray et al. 2019.)

    It holds references into `optimizer` and must be rebuilt when fairseq builds a new one.

    Args:
        optimizer: the trainer's optimizer.
        layers: the blocks to shrink; those that the optimizer does not own (frozen parameters)
            are left alone and listed in `frozen`.
        operator: from `prox.OPERATORS`.
        strength: lambda >= 0.
        step_size: a constant, or None for the current learning rate of the parameter's group.
        include_bias: whether fc1's bias is part of the group.
        start_update: updates before this one take no proximal step.
    """

    def __init__(
        self,
        optimizer: FairseqOptimizer,
        layers: Sequence[FeedForward],
        operator: Operator,
        strength: float,
        step_size: float | None = None,
        include_bias: bool = True,
        start_update: int = 0,
    ) -> None:
        self.optimizer = optimizer
        self.operator = operator
        self.strength = strength
        self.step_size = step_size
        self.start_update = start_update
        self.threshold = 0.0  # the largest one of the last update, for the log
        parameters = [
            p for layer in layers for p in (layer.fc1_weight, layer.fc1_bias) if p is not None
        ]
        masters = find_masters(optimizer, parameters)
        self.frozen = [layer.name for layer in layers if layer.fc1_weight not in masters]
        self._targets = [
            _Target(
                masters[layer.fc1_weight],
                masters.get(layer.fc1_bias) if include_bias else None,
            )
            for layer in layers
            if layer.fc1_weight in masters
        ]

    def step(self, update_num: int) -> None:
        """Step the inner optimizer, then take the proximal steps of update `update_num`.

        Args:
            update_num: updates done so far, as fairseq counts them; the first update has 0.
        """
        self.optimizer.step()
        if update_num < self.start_update:
            return
        self.threshold = 0.0
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for target in self._targets:
            eta = rates[target.weight.group_index] if self.step_size is None else self.step_size
            if eta is None:  # such as Adafactor with its relative step
                raise TypeError(
                    f"--prox-step-size schedule: {type(self.optimizer).__name__} has no learning "
                    "rate to follow; give the optimizer one, or --prox-step-size a constant"
                )
            threshold = self.strength * eta
            self.threshold = max(self.threshold, threshold)
            bias = target.bias
            self.operator.prox_(
                target.weight.tensor, threshold, bias=None if bias is None else bias.tensor
            )
            target.weight.copy_back()
            if bias is not None:
                bias.copy_back()

    def dual_norms(self) -> torch.Tensor:
        """What the operator compares with the threshold, for every group; shape (groups,)."""
        with torch.no_grad():
            return torch.cat(
                [
                    self.operator.dual_norm(
                        target.weight.tensor,
                        bias=None if target.bias is None else target.bias.tensor,
                    )
                    for target in self._targets
                ]
            )

    def penalty(self) -> float:
        """The penalty R(W) summed over the layers, not multiplied by the strength."""
        with torch.no_grad():
            return float(
                sum(
                    self.operator.penalty(
                        target.weight.tensor,
                        bias=None if target.bias is None else target.bias.tensor,
                    )
                    for target in self._targets
                )
            )

"""Find the fp32 master copy of a model parameter behind any of fairseq's optimizer wrappers.

A proximal step on a half-precision copy is lost: the next synchronisation overwrites it, and a
threshold below one ulp does nothing at all. So the step acts on the master, and the caller copies
the result back. fairseq's checkpoints lack the masters, so what a resumed run needs of them is
here, too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from fairseq.optim import AMPOptimizer, FairseqBMUF, FairseqOptimizer
from fairseq.optim.fp16_optimizer import FP16Optimizer, MemoryEfficientFP16Optimizer
from torch import Tensor, nn

# What DynamicLossScaler counts; fairseq saves its loss scale alone.
_SCALER_COUNTERS = (
    "_iter",
    "_last_overflow_iter",
    "_last_rescale_iter",
    "_overflows_since_rescale",
)


@dataclass(frozen=True)
class Master:
    """A model parameter with the tensor that its optimizer really updates.

    Attributes:
        parameter: the model's parameter.
        tensor: its master copy, of the same shape: the parameter itself, a separate fp32 tensor,
            or a view into a flat fp32 tensor.
        owner: the tensor in the optimizer's groups that holds the master: itself, or a flat one.
        group_index: position, in ``optimizer.param_groups``, of the group with `owner`. The
            groups themselves are not kept: loading an optimizer state replaces them.
    """

    parameter: nn.Parameter
    tensor: Tensor
    owner: Tensor
    group_index: int

    def copy_back(self) -> None:
        """Write the master into the model's parameter (rounding to its dtype)."""
        self.parameter.data.copy_(self.tensor)

    def second_moment(self, optimizer: torch.optim.Optimizer) -> tuple[Tensor, float, float]:
        """Adam's v, like `tensor` in shape, its bias correction 1 − β₂ⁿ after n steps, and ε.

        Args:
            optimizer: the torch optimizer that has taken at least one step on `owner`.

        Raises:
            TypeError: it keeps no second moment for each parameter.
        """
        # Not state[...]: it is a defaultdict, and an empty entry would end up in the checkpoint.
        state = getattr(optimizer, "state", {}).get(self.owner, {})
        if not state and any(getattr(optimizer, "state", {}).values()):
            raise TypeError(
                "--prox-metric adam: a layer has had no gradient until the freeze (LayerDrop?), so "
                "that Adam has no second moments of it; give a later --prox-freeze-update"
            )
        moment = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))  # the first for AMSGrad
        if moment is None or moment.shape != self.owner.shape:
            raise TypeError(
                f"--prox-metric adam: {type(optimizer).__name__} keeps no second moment for each "
                "parameter; use --optimizer adam, or --prox-metric identity"
            )
        if self.owner.shape != self.tensor.shape:
            start = self.tensor.storage_offset() - self.owner.storage_offset()
            moment = moment[start : start + self.tensor.numel()].view(self.tensor.shape)
        group = optimizer.param_groups[self.group_index]
        steps = state.get("step", group.get("step"))
        return moment, 1 - group["betas"][1] ** float(steps), group["eps"]


def find_masters(
    optimizer: FairseqOptimizer, parameters: Sequence[nn.Parameter]
) -> dict[nn.Parameter, Master]:
    """The masters of `parameters`; one that the optimizer does not own (frozen) is left out.

    Call it again whenever fairseq has built a new optimizer.

    Args:
        optimizer: as built by fairseq's trainer: a plain one (fp32), an AMPOptimizer, or an
            FP16Optimizer, flat or not, for fp16 and bf16.
        parameters: parameters of the model.

    Returns:
        parameter -> `Master`.

    Raises:
        TypeError: a wrapper that keeps no fp32 master or moves the parameters by itself; a
            proximal step would be lost or undone there.
    """
    if isinstance(optimizer, MemoryEfficientFP16Optimizer | FairseqBMUF):
        raise TypeError(
            f"optimizer: proximal steps do not work with {type(optimizer).__name__}; drop "
            "--memory-efficient-fp16, --memory-efficient-bf16 or --use-bmuf"
        )
    owners = _owners(optimizer)
    group_of = {
        id(owner): index
        for index, group in enumerate(optimizer.param_groups)
        for owner in group["params"]
    }
    masters = {}
    for parameter in parameters:
        if parameter in owners:
            tensor, owner = owners[parameter]
            masters[parameter] = Master(parameter, tensor, owner, group_of[id(owner)])
    return masters


def _owners(optimizer: FairseqOptimizer) -> dict[nn.Parameter, tuple[Tensor, Tensor]]:
    """parameter -> (its master, the tensor in the inner optimizer's groups that holds it)."""
    if not isinstance(optimizer, FP16Optimizer):
        own = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        return {parameter: (parameter, parameter) for parameter in own}
    if not optimizer.has_flat_params:
        return {
            half: (full.data, full)
            for half, full in zip(optimizer.fp16_params, optimizer.fp32_params, strict=True)
        }
    owners = {}
    flat_tensors = optimizer.fp32_params
    offsets = dict.fromkeys(flat_tensors, 0)
    for parameter in optimizer.fp16_params:
        # The walk of FP16Optimizer._sync_fp32_params_to_fp16: by device, in order. With one
        # device its key may be spelled otherwise than the parameter's device index.
        device = parameter.device.index if len(flat_tensors) > 1 else next(iter(flat_tensors))
        start = offsets[device]
        offsets[device] = start + parameter.numel()
        view = flat_tensors[device].data[start : offsets[device]].view(parameter.shape)
        owners[parameter] = (view, flat_tensors[device])
    return owners


def _full_tensors(optimizer: FP16Optimizer) -> list[nn.Parameter]:
    """The fp32 tensors: one for each device if flat, else one for each parameter."""
    tensors = optimizer.fp32_params
    return list(tensors.values()) if isinstance(tensors, dict) else list(tensors)


def precision_state(optimizer: FairseqOptimizer) -> dict[str, Any]:
    """What a run in half precision needs to go on as if it had not stopped; else nothing.

    fairseq saves the half-precision model, the inner optimizer's state and, for fp16, the loss
    scale. That leaves out the bits by which the masters differ from the model, and when the loss
    scale is to change; with ``--amp`` all of the scaler's state.

    Returns:
        ``masters`` (fp32 tensors on the CPU) and ``scaler`` (numbers), as there are.
    """
    if isinstance(optimizer, AMPOptimizer):
        return {"scaler": optimizer.scaler.state_dict()}
    if not isinstance(optimizer, FP16Optimizer):
        return {}
    state: dict[str, Any] = {
        "masters": [tensor.detach().cpu() for tensor in _full_tensors(optimizer)]
    }
    if optimizer.scaler is not None:  # bf16 has none
        state["scaler"] = {name: getattr(optimizer.scaler, name) for name in _SCALER_COUNTERS}
    return state


def restore_precision(optimizer: FairseqOptimizer, state: Mapping[str, Any]) -> None:
    """Take over what `precision_state` gave, before the first update of a resumed run.

    Masters that do not round to the model's parameters belong to another model, such as the one
    before a compaction, and are left out.
    """
    scaler = state.get("scaler", {})
    if isinstance(optimizer, AMPOptimizer):
        if "scale" in scaler:  # of a run with --amp, its scaler on
            optimizer.scaler.load_state_dict(scaler)
    elif isinstance(optimizer, FP16Optimizer):
        half = optimizer.fp16_params[0].dtype
        masters = state.get("masters", [])
        for tensor, saved in zip(_full_tensors(optimizer), masters, strict=False):
            saved = saved.to(tensor.device)
            if saved.shape == tensor.shape and torch.equal(saved.to(half).float(), tensor.data):
                tensor.data.copy_(saved)
        if optimizer.scaler is not None:
            for name in _SCALER_COUNTERS:
                if name in scaler:
                    setattr(optimizer.scaler, name, scaler[name])

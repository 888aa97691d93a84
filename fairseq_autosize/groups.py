"""Find the feed-forward neurons of a Transformer: in a live model or in a checkpoint's state dict.

A *neuron* is row i of ``fc1.weight`` with ``fc1.bias[i]``, and the matching column i of
``fc2.weight``. Zeroing the row silences the neuron only where the activation maps 0 to 0.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Which blocks `--prox-groups` can name, and the kinds of layers that each one selects.
GROUP_NAMES: Mapping[str, tuple[str, ...]] = {
    "ffn": ("encoder-ffn", "decoder-ffn"),
    "encoder-ffn": ("encoder-ffn",),
    "decoder-ffn": ("decoder-ffn",),
}

_LAYER = re.compile(r"(?:^|\.)(?P<side>encoder|decoder)(?:\.\w+)*?\.layers\.\d+$")


class GroupError(ValueError):
    """The model has no neurons that can be auto-sized; the message lists what was found."""


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward block of one Transformer layer.

    Attributes:
        name: path of the layer in the model, such as ``encoder.layers.0``.
        kind: ``encoder-ffn`` or ``decoder-ffn``.
        fc1_weight: shape (neurons, d).
        fc1_bias: shape (neurons,), or None where the layer has none.
        fc2_weight: shape (d, neurons).
        activation: what comes between fc1 and fc2; None where only a state dict is known.
    """

    name: str
    kind: str
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    activation: Callable[[Tensor], Tensor] | None = None


def dead_neurons(fc1_weight: Tensor) -> Tensor:
    """Which neurons are dead: every weight of their row of fc1 is exactly zero.

    The bias does not enter: with zero weights it makes the neuron a constant, act(bias), which
    belongs into ``fc2.bias``. NaN is not zero, so a row that holds one counts as alive.

    Args:
        fc1_weight: shape (neurons, d).

    Returns:
        Boolean tensor of shape (neurons,).
    """
    return ~(fc1_weight != 0).any(dim=1)


def maps_zero_to_zero(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether f(0) = 0, without which a zeroed row of fc1 would not silence its neuron."""
    value = activation(torch.zeros(1))
    return isinstance(value, Tensor) and bool((value == 0).all())


def has_slope_at_zero(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether f'(0) != 0: then a zeroed row of fc1 still gets gradients, and may come back."""
    zero = torch.zeros(1, requires_grad=True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(activation(zero).sum(), zero)
    return bool((slope != 0).any())


def feed_forward_in_model(model: nn.Module, groups: Sequence[str] = ("ffn",)) -> list[FeedForward]:
    """The feed-forward blocks of a model, in the order of its modules; shared layers come once.

    Layers are found by their path, ``(encoder|decoder)...layers.N``, and by having Linear
    submodules ``fc1`` and ``fc2``. Modules are walked, not called: LayerDrop drops none.

    Args:
        model: a fairseq Transformer, or a wrapper that holds one.
        groups: names out of `GROUP_NAMES`.

    Returns:
        One `FeedForward` a layer; its tensors are the model's own parameters.

    Raises:
        GroupError: no such layer, an activation with f(0) != 0, or a layer norm between fc1 and
            fc2.
    """
    kinds = {kind for group in groups for kind in GROUP_NAMES[group]}
    found = []
    for name, module in model.named_modules():
        match = _LAYER.search(name)
        fc1, fc2 = getattr(module, "fc1", None), getattr(module, "fc2", None)
        if not (match and isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear)):
            continue
        kind = f"{match['side']}-ffn"
        if kind not in kinds:
            continue
        activation = getattr(module, "activation_fn", None)
        if activation is None:
            raise GroupError(
                f"{name}: {type(module).__name__} does not say what its activation is, so it is "
                "not known whether a zeroed row of fc1 silences its neuron. Use a Transformer."
            )
        if not maps_zero_to_zero(activation):
            raise GroupError(
                f"{name}: activation {getattr(activation, '__name__', activation)!r} is not known "
                "to map 0 to 0, so a zeroed row of fc1 would not silence its neuron. Use "
                "--activation-fn relu, gelu, gelu_fast, gelu_accurate, tanh or linear."
            )
        if getattr(module, "ffn_layernorm", None) is not None:
            raise GroupError(
                f"{name}: --scale-fc puts a layer norm between fc1 and fc2, which mixes the "
                "neurons: a zeroed row of fc1 would not silence its own. Train without --scale-fc."
            )
        found.append(FeedForward(name, kind, fc1.weight, fc1.bias, fc2.weight, activation))
    if not found:
        classes = Counter(type(m).__name__ for n, m in model.named_modules() if n)
        listed = ", ".join(f"{name} x{count}" for name, count in sorted(classes.items()))
        raise GroupError(
            f"--prox-groups {','.join(groups)}: {type(model).__name__} has no layer "
            "encoder.layers.N or decoder.layers.N of that kind with Linear fc1 and fc2. "
            f"Modules found: {listed or 'none'}"
        )
    return found


def feed_forward_in_state(state: Mapping[str, Tensor]) -> list[FeedForward]:
    """The feed-forward blocks in a model's state dict; layers that share their storage come once.

    Args:
        state: parameter name -> tensor, as under ``model`` in a fairseq checkpoint.

    Returns:
        One `FeedForward` a layer, in the order of the state dict.

    Raises:
        GroupError: no such layer, or shapes of fc1 and fc2 that do not belong together.
    """
    found = []
    seen: set[int] = set()
    for key, weight in state.items():
        name = key.removesuffix(".fc1.weight")
        match = _LAYER.search(name)
        fc2_weight = state.get(f"{name}.fc2.weight")
        if name == key or match is None or fc2_weight is None:
            continue
        bias = state.get(f"{name}.fc1.bias")
        neurons = weight.shape[0] if weight.dim() == 2 else -1
        if fc2_weight.shape[1:] != (neurons,) or (bias is not None and bias.shape != (neurons,)):
            raise GroupError(
                f"{name}: fc1.weight {tuple(weight.shape)}, fc1.bias "
                f"{None if bias is None else tuple(bias.shape)} and fc2.weight "
                f"{tuple(fc2_weight.shape)} do not belong together"
            )
        # An empty layer has no storage to be shared.
        if weight.numel() and weight.data_ptr() in seen:
            continue
        seen.add(weight.data_ptr())
        found.append(FeedForward(name, f"{match['side']}-ffn", weight, bias, fc2_weight))
    if not found:
        names = sorted({re.sub(r"\.\d+\.", ".N.", key) for key in state})
        listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise GroupError(
            "no feed-forward layer (encoder.layers.N.fc1 or decoder.layers.N.fc1 with fc2) among "
            f"the parameters: {listed or 'none'}"
        )
    return found

"""Find what can be auto-sized in a Transformer: in a live model or in a checkpoint's state dict.

A *neuron* is row i of ``fc1.weight`` with ``fc1.bias[i]``, and the matching column i of
``fc2.weight``. Zeroing the row silences the neuron only where the activation maps 0 to 0.

An attention *head* is its rows of ``v_proj`` with their biases, and its columns of ``out_proj``.
Zeroing the rows silences the head; its rows of ``q_proj`` and ``k_proj`` then change nothing.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Which blocks `--prox-groups` can name, and the kinds of layers that each one selects.
_FFN = ("encoder-ffn", "decoder-ffn")
_ATTENTION = ("encoder-attention", "decoder-attention", "cross-attention")
GROUP_NAMES: Mapping[str, tuple[str, ...]] = {
    "ffn": _FFN,
    **{kind: (kind,) for kind in _FFN},
    "attention": _ATTENTION,
    **{kind: (kind,) for kind in _ATTENTION},
    "all": (*_FFN, *_ATTENTION),
}

# How options call the attention blocks of a model -> side and module of the layer.
ATTENTION_PARTS: Mapping[str, tuple[str, str]] = {
    "encoder": ("encoder", "self_attn"),
    "decoder": ("decoder", "self_attn"),
    "cross": ("decoder", "encoder_attn"),
}

_LAYER = re.compile(r"(?:^|\.)(?P<side>encoder|decoder)(?:\.\w+)*?\.layers\.\d+$")


class GroupError(ValueError):
    """The model has nothing that can be auto-sized; the message lists what was found."""


@dataclass(frozen=True)
class Part:
    """What of a parameter belongs to the groups of a block.

    Attributes:
        parameter: its size along `dim` is a multiple of the number of groups; each group has as
            many neighbouring indices.
        dim: the dimension along which the groups lie.
    """

    parameter: Tensor
    dim: int = 0

    def grouped(self, tensor: Tensor, count: int) -> Tensor:
        """A view of a tensor in the parameter's shape: first the groups, then what each has."""
        return tensor.movedim(self.dim, 0).unflatten(0, (count, -1))


@dataclass(frozen=True)
class Groups:
    """The groups of one block, as an optimizer needs them.

    Attributes:
        count: number of groups.
        unit: entries of one plain row of the block's input projection, bias included where it
            belongs to the groups: the size that others are compared with.
        members: what the norm of a group is taken over.
        followers: what becomes zero with a group without counting in its norm.
    """

    count: int
    unit: int
    members: tuple[Part, ...]
    followers: tuple[Part, ...] = ()


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

    @property
    def count(self) -> int:
        """Number of neurons."""
        return self.fc1_weight.shape[0]

    def dead(self) -> Tensor:
        """Which neurons are dead; boolean, shape (neurons,)."""
        return dead_neurons(self.fc1_weight)

    def parameters_per_group(self) -> int:
        """What compaction removes with one neuron: 2d + 1, or 2d where fc1 has no bias."""
        bias = 0 if self.fc1_bias is None else 1
        return self.fc1_weight.shape[1] + bias + self.fc2_weight.shape[0]

    def groups(self, bias: bool = True, couple: bool = False) -> Groups:
        """One group a neuron.

        Args:
            bias: fc1's bias belongs to it.
            couple: the column of fc2 belongs to it.
        """
        members = [Part(self.fc1_weight)]
        if bias and self.fc1_bias is not None:
            members.append(Part(self.fc1_bias))
        if couple:
            members.append(Part(self.fc2_weight, 1))
        unit = self.fc1_weight.shape[1] + int(bias and self.fc1_bias is not None)
        return Groups(self.count, unit, tuple(members))


@dataclass(frozen=True)
class Attention:
    """The heads of one attention block.

    Attributes:
        name: path of the block in the model, such as ``encoder.layers.0.self_attn``.
        kind: ``encoder-attention``, ``decoder-attention`` or ``cross-attention``.
        count: number of heads.
        projections: ``q_proj``, ``k_proj``, ``v_proj`` -> weight, shape (heads * head width, d).
        biases: the same -> bias, shape (heads * head width,); without those there are not.
        out_weight: shape (d, heads * head width).
    """

    name: str
    kind: str
    count: int
    projections: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    out_weight: Tensor

    def dead(self) -> Tensor:
        """Which heads are dead: all weights of their rows of v are zero; shape (heads,)."""
        v = self.projections["v_proj"]
        return dead_neurons(v.reshape(self.count, v.numel() // max(1, self.count)))

    def parameters_per_group(self) -> int:
        """What compaction removes with one head."""
        tensors = (*self.projections.values(), *self.biases.values(), self.out_weight)
        return sum(tensor.numel() for tensor in tensors) // max(1, self.count)

    def groups(self, bias: bool = True, couple: bool = True) -> Groups:
        """One group a head: v and, always, the columns of out_proj; q and k follow.

        Args:
            bias: v's bias belongs to it.
            couple: not used; heads are always coupled.
        """
        members = [Part(self.projections["v_proj"])]
        unit = self.projections["v_proj"].shape[1]
        if bias and "v_proj" in self.biases:
            members.append(Part(self.biases["v_proj"]))
            unit += 1
        followers = [
            Part(tensors[name])
            for tensors in (self.projections, self.biases)
            for name in ("q_proj", "k_proj")
            if name in tensors
        ]
        members.append(Part(self.out_weight, 1))
        return Groups(self.count, unit, tuple(members), tuple(followers))


Block = FeedForward | Attention


def is_layer_name(name: str) -> bool:
    """Whether a layer of a Transformer is called so, such as ``encoder.layers.0``."""
    return _LAYER.search(name) is not None


def is_of(block: Block, name: str) -> bool:
    """Whether a block is among those of a name out of `GROUP_NAMES`, or belongs to a layer.

    A layer may be named without what comes before it in a model for several languages.
    """
    return block.kind in GROUP_NAMES.get(name, ()) or f".{name}." in f".{block.name}."


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
    return [block for block in blocks_in_model(model, groups) if isinstance(block, FeedForward)]


def blocks_in_model(model: nn.Module, groups: Sequence[str] = ("ffn",)) -> list[Block]:
    """The blocks of a model that can be auto-sized, in the order of its modules.

    As `feed_forward_in_model`; attention blocks are a layer's ``self_attn`` and ``encoder_attn``.
    The attention from which a ``transformer_align`` reads alignments is none of them: its first
    heads have that use besides their output.

    Raises:
        GroupError: no such block, or one that cannot be auto-sized.
    """
    kinds = {kind for group in groups for kind in GROUP_NAMES[group]}
    places = list(_places(model))
    found = [
        _feed_forward(name, kind, module) if kind in _FFN else _attention(name, kind, module)
        for kind, name, module in places
        if kind in kinds
    ]
    if not found:
        asked = f"--prox-groups {','.join(groups)}: {type(model).__name__} has no"
        if there := {kind for kind, _, _ in places}:
            names = [name for name, own in GROUP_NAMES.items() if there.intersection(own)]
            raise GroupError(f"{asked} such blocks; this model has: {', '.join(names)}")
        classes = Counter(type(m).__name__ for n, m in model.named_modules() if n)
        listed = ", ".join(f"{name} x{count}" for name, count in sorted(classes.items()))
        raise GroupError(
            f"{asked} layer encoder.layers.N or decoder.layers.N with such blocks (Linear fc1 and "
            f"fc2, or MultiheadAttention). Modules found: {listed or 'none'}"
        )
    return found


def _places(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Kind, path and module of all blocks in a model's layers, whether they can be auto-sized."""
    aligning = aligning_attention(getattr(model, "alignment_layer", None))
    for name, module in model.named_modules():
        match = _LAYER.search(name)
        if not match:
            continue
        if all(isinstance(getattr(module, part, None), nn.Linear) for part in ("fc1", "fc2")):
            yield f"{match['side']}-ffn", name, module
        for part, kind in (
            ("self_attn", f"{match['side']}-attention"),
            ("encoder_attn", "cross-attention"),
        ):
            block = getattr(module, part, None)
            if block is not None and f"{name}.{part}" != aligning:
                yield kind, f"{name}.{part}", block


def aligning_attention(layer: int | None) -> str | None:
    """Path of the attention that ``--alignment-layer`` names; None without such an option."""
    return None if layer is None else f"decoder.layers.{layer}.encoder_attn"


def _feed_forward(name: str, kind: str, module: nn.Module) -> FeedForward:
    fc1, fc2 = module.fc1, module.fc2
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
    return FeedForward(name, kind, fc1.weight, fc1.bias, fc2.weight, activation)


def _attention(name: str, kind: str, block: nn.Module) -> Attention:
    parts = {part: getattr(block, part, None) for part in ("q_proj", "k_proj", "v_proj")}
    out = getattr(block, "out_proj", None)
    heads = getattr(block, "num_heads", None)
    if heads is None or not all(isinstance(x, nn.Linear) for x in (*parts.values(), out)):
        raise GroupError(
            f"{name}: {type(block).__name__} is no attention with q_proj, k_proj, v_proj, "
            "out_proj and num_heads, so its heads are not known"
        )
    if getattr(block, "bias_k", None) is not None or getattr(block, "add_zero_attn", False):
        raise GroupError(
            f"{name}: attention with an extra key (add_bias_kv, add_zero_attn) cannot be auto-sized"
        )
    weights = {part: linear.weight for part, linear in parts.items()}
    biases = {part: linear.bias for part, linear in parts.items() if linear.bias is not None}
    return Attention(name, kind, heads, weights, biases, out.weight)


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
        tensors = [x for x in (weight, bias, fc2_weight) if x is not None]
        if (
            weight.dim() != 2
            or fc2_weight.shape != weight.shape[::-1]
            or (bias is not None and bias.shape != weight.shape[:1])
            or not all(tensor.is_floating_point() for tensor in tensors)
        ):
            raise GroupError(
                f"{name}: fc1.weight {tuple(weight.shape)}, fc1.bias "
                f"{None if bias is None else tuple(bias.shape)} and fc2.weight "
                f"{tuple(fc2_weight.shape)} do not belong together, or hold no floating-point "
                "numbers"
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


def attention_in_state(
    state: Mapping[str, Tensor], head_widths: Mapping[str, int]
) -> list[Attention]:
    """The attention blocks in a model's state dict, those without heads included.

    Args:
        state: parameter name -> tensor, as under ``model`` in a fairseq checkpoint.
        head_widths: ``encoder`` and ``decoder`` -> rows of v of one head on that side; attention
            on a side that is missing is left out.

    Returns:
        One `Attention` a block, in the order of the state dict; blocks that share their storage
        come once.

    Raises:
        GroupError: shapes that do not belong together.
    """
    found = []
    seen: set[int] = set()
    for key, value in state.items():
        name = key.removesuffix(".v_proj.weight")
        layer, _, part = name.rpartition(".")
        match = _LAYER.search(layer)
        if name == key or match is None or part not in ("self_attn", "encoder_attn"):
            continue
        width = head_widths.get(match["side"])
        if width is None:
            continue
        weights = {x: state.get(f"{name}.{x}.weight") for x in ("q_proj", "k_proj", "v_proj")}
        biases = {x: state[f"{name}.{x}.bias"] for x in weights if f"{name}.{x}.bias" in state}
        out = state.get(f"{name}.out_proj.weight")
        rows = len(value) if value.dim() else -1
        heads, rest = divmod(rows, width)
        shapes = [None if x is None else tuple(x.shape) for x in (*weights.values(), out)]
        if (
            rest
            or None in shapes
            or any(len(shape) != 2 for shape in shapes)
            or any(shape[0] != rows for shape in shapes[:3])
            or shapes[3][1] != rows
            or any(bias.shape != (rows,) for bias in biases.values())
            or not all(x.is_floating_point() for x in (*weights.values(), *biases.values(), out))
        ):
            raise GroupError(
                f"{name}: q_proj, k_proj, v_proj and out_proj of shapes {shapes} do not belong "
                f"together, or not to heads of width {width}"
            )
        if heads and value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        kind = "cross-attention" if part == "encoder_attn" else f"{match['side']}-attention"
        found.append(Attention(name, kind, heads, weights, biases, out))
    return found

"""Make a pruned checkpoint physically smaller: the same function, without what is dead.

A neuron that is dead (all weights of its row of fc1 are zero) contributes ``act(bias)`` times its
column of fc2, the same for every input. `compact` adds that constant to ``fc2.bias``, drops the
row, the bias' entry and the column, and rewrites the settings so that fairseq builds the smaller
model. So for an attention head: where all weights of its rows of v are zero, it contributes v's
bias, since attention weights add up to 1. The optimizer's state can be cut in the same way.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import __version__
from .checkpoint import (
    CheckpointError,
    architecture_of,
    check_finite,
    config_section,
    head_widths,
    model_config,
    parameter_names,
    place,
    printable,
    task_entry,
    with_settings,
    without_masters,
)
from .compat import require_fairseq
from .groups import (
    ATTENTION_PARTS,
    Attention,
    FeedForward,
    aligning_attention,
    attention_in_state,
    dead_neurons,
    feed_forward_in_state,
)

# Version of the "autosize" entry and of the layout that goes with it.
FORMAT = 2  # 1 knew no attention heads

# The stock model, and the one that takes a width for each layer.
_WITH_WIDTHS = {
    "transformer": "transformer_autosize",
    "transformer_align": "transformer_align_autosize",
    "transformer_lm": "transformer_lm_autosize",
}
_STOCK = {with_widths: stock for stock, with_widths in _WITH_WIDTHS.items()}
_STOCK_TASKS = {
    "translation_autosize": "translation",
    "language_modeling_autosize": "language_modeling",
    "translation_multi_simple_epoch_autosize": "translation_multi_simple_epoch",
    "multilingual_translation_autosize": "multilingual_translation",
}

# Adafactor's means over one dimension of a matrix, and which dimension is gone.
_FACTORED = {"exp_avg_sq_row": -1, "exp_avg_sq_col": -2}

# fairseq's --activation-fn, for the constants that neurons without weights leave.
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "relu_squared": lambda x: functional.relu(x).square(),
    "gelu": functional.gelu,
    "gelu_accurate": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "linear": lambda x: x,
    "swish": functional.silu,
}


@dataclass(frozen=True)
class LayerChange:
    """What compaction did to one block: a layer's neurons, or an attention's heads.

    Attributes:
        name: path, such as ``encoder.layers.0`` or ``encoder.layers.0.self_attn``.
        kind: such as ``encoder-ffn`` or ``cross-attention``.
        before: neurons or heads in the input.
        alive: those that are not dead.
        after: those in the output; more than `alive` where it was padded.
        folded: dead ones with a constant output, which went into the next bias.
    """

    name: str
    kind: str
    before: int
    alive: int
    after: int
    folded: int


@dataclass(frozen=True)
class Compaction:
    """A compacted checkpoint, and what was done.

    Attributes:
        checkpoint: for `checkpoint.write_checkpoint`.
        layers: one entry a feed-forward layer.
        attention: one entry an attention block.
        arch: the architecture's name in the output.
        widths: ``encoder`` and ``decoder`` -> their new widths, first layer first.
        heads: ``encoder``, ``decoder`` and ``cross`` -> heads of each attention block, first layer
            first; empty while all have the architecture's number.
        ema_rows: rows dropped from a stored moving average that were not zero in it; the mask is
            the model's, and an average never gets to exact zeros.
    """

    checkpoint: dict[str, Any]
    layers: tuple[LayerChange, ...]
    attention: tuple[LayerChange, ...]
    arch: str
    widths: dict[str, list[int]]
    heads: dict[str, list[int]]
    ema_rows: int

    @property
    def translates(self) -> bool:
        """Whether there is an encoder, so that it is no language model; it may have no layers."""
        return any(name.startswith("encoder.") for name in self.checkpoint["model"])

    def width_options(self) -> list[str]:
        """The options with which fairseq-train builds these widths, for an arch with widths."""
        counts = {f"--{side}-ffn-dims": widths for side, widths in self.widths.items()}
        counts |= {f"--{part}-head-counts": heads for part, heads in self.heads.items()}
        return [word for flag, n in counts.items() for word in (flag, ",".join(map(str, n)))]


@dataclass(frozen=True)
class _Cut:
    """Which rows of a block stay, and how many of zeros follow as padding."""

    kept: Tensor
    padding: int

    def apply(self, tensor: Tensor, dim: int) -> Tensor:
        if not self.padding and len(self.kept) == tensor.shape[dim]:
            return tensor  # nothing goes: no copy
        chosen = tensor.index_select(dim, self.kept)
        if not self.padding:
            return chosen
        shape = list(tensor.shape)
        shape[dim] = self.padding
        # Zeros on both sides of the activation: such a neuron gets no gradient, so it stays dead.
        return torch.cat([chosen, tensor.new_zeros(shape)], dim)


def compact(
    checkpoint: Mapping[str, Any],
    *,
    uniform: bool = False,
    multiple_of: int = 1,
    min_width: int = 0,
    keep_optimizer: bool = False,
    full_heads: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Compaction:
    """Remove the dead feed-forward neurons and attention heads of a checkpoint.

    Args:
        checkpoint: what `checkpoint.read_checkpoint` returns; it stays as it is.
        uniform: pad all layers of the encoder, and all of the decoder, to the widest one's width,
            so that the stock architecture holds the result. At least one neuron stays. Attention
            gets all of the architecture's heads, dead ones included.
        multiple_of: pad every width to a multiple of this; zero stays zero.
        min_width: pad every width to at least this.
        keep_optimizer: keep the optimizer's state, cut like the parameters; otherwise drop it.
        full_heads: let attention have all of the architecture's heads, as with `uniform`.
        provenance: plain values to note in the result, such as the input's hash.

    Returns:
        The `Compaction`. Its checkpoint has an entry ``autosize`` with the format's version and
        a history of what was done, with `provenance`; a second compaction with the same arguments
        changes nothing.

    Raises:
        CheckpointError: NaN or infinity among the parameters, an architecture that cannot be
            compacted, or an optimizer state that does not fit the parameters.
        GroupError: no feed-forward layers.
        ValueError: `multiple_of` < 1 or `min_width` < 0.
    """
    if multiple_of < 1:
        raise ValueError(f"multiple_of: {multiple_of} is not a number >= 1")
    if min_width < 0:
        raise ValueError(f"min_width: {min_width} is not a number >= 0")
    state = checkpoint["model"]
    stock, arch = _architecture(checkpoint)
    layers = feed_forward_in_state(state)
    _check(state, layers)
    sides = head_widths(checkpoint)
    aligning = aligning_attention(model_config(checkpoint).get("alignment_layer"))
    # Alignments are those of its first heads, dead or not: there nothing may go or change places.
    heads = [block for block in attention_in_state(state, sides) if block.name != aligning]
    activation = _activation_name(checkpoint)
    planned_layers = _plan_layers(state, layers, activation, uniform, multiple_of, min_width)
    _check_blocks(model_config(checkpoint), [layer.change for layer in planned_layers])
    planned_heads = _plan_heads(state, heads, sides, uniform or full_heads)
    blocks = [*planned_layers, *planned_heads]
    parameters = {name: cut for block in blocks for name, cut in block.cuts.items()}
    biases = {name: bias for block in blocks for name, bias in block.biases.items()}
    result = {
        **checkpoint,
        "model": _cut_state(state, parameters, biases),
        "last_optimizer_state": _cut_optimizer(checkpoint, parameters) if keep_optimizer else None,
        "extra_state": _cut_masters(checkpoint, parameters, biases)
        if keep_optimizer
        else without_masters(checkpoint),
    }
    ema_rows = _cut_ema(result, state, parameters, layers, heads, activation)
    changes = tuple(layer.change for layer in planned_layers)
    attention = tuple(block.change for block in planned_heads)
    widths = _widths_by_side(result["model"])
    counts = _head_counts(result["model"], sides)
    arch = arch.removesuffix("_autosize") + ("" if uniform else "_autosize")
    result = _rewrite_settings(result, arch, stock, widths, counts, uniform)
    _note(result, [*changes, *attention], dict(provenance or {}))
    return Compaction(result, changes, attention, arch, widths, counts, ema_rows)


def _architecture(checkpoint: Mapping[str, Any]) -> tuple[str, str]:
    """Names of the stock model and of the architecture: (transformer, transformer_tiny)."""
    arch = architecture_of(checkpoint)
    return stock_model(arch), arch


def stock_model(arch: object) -> str:
    """The stock model of an architecture, such as transformer of transformer_tiny.

    Raises:
        CheckpointError: it is none that can be compacted.
    """
    require_fairseq()
    from fairseq.models import ARCH_MODEL_NAME_REGISTRY  # the module itself needs torch only

    model = ARCH_MODEL_NAME_REGISTRY.get(arch) if isinstance(arch, str) else None
    stock = _STOCK.get(model, model)
    if stock not in _WITH_WIDTHS:
        known = sorted(name for name, m in ARCH_MODEL_NAME_REGISTRY.items() if m in _WITH_WIDTHS)
        if model == "multilingual_transformer":
            raise CheckpointError(
                f"cannot compact architecture {printable(str(arch))}: it is a model for each pair "
                "of languages, in one checkpoint; for one smaller model train a transformer with "
                "--task translation_multi_simple_epoch"
            )
        unknown = "unknown here, as those of other user-dirs are"
        raise CheckpointError(
            f"cannot compact architecture {printable(str(arch))} "
            f"({unknown if model is None else f'model {model}'}); can: {', '.join(known)}"
        )
    return stock


def _check(state: Mapping[str, Tensor], layers: Sequence[FeedForward]) -> None:
    check_finite(state)
    for layer in layers:
        if f"{layer.name}.ffn_layernorm.weight" in state:
            raise CheckpointError(
                f"{printable(layer.name)}: --scale-fc puts a layer norm between fc1 and fc2, so "
                "that removing a dead neuron would change the others"
            )


def _check_blocks(config: Mapping[str, Any], changes: Sequence[LayerChange]) -> None:
    """See that layers with quantization noise stay what that can be put on."""
    noise, block = config.get("quant_noise_pq"), config.get("quant_noise_pq_block_size")
    if isinstance(noise, (int, float)) and noise > 0 and isinstance(block, int) and block > 0:
        for change in changes:
            if not change.after or change.after % block:
                raise CheckpointError(
                    f"{printable(change.name)}: --quant-noise-pq needs widths that are multiples "
                    f"of {block}, and {change.after} is none; compact it with --multiple-of "
                    f"{block} --min-width {block}"
                )


@dataclass(frozen=True)
class _Planned:
    """What is to be done to one block.

    Attributes:
        change: for the report.
        cuts: parameter -> how it is cut, and along which dimension.
        biases: parameter -> its new value, with what dead groups contributed to it.
    """

    change: LayerChange
    cuts: dict[str, tuple[_Cut, int]]
    biases: dict[str, Tensor]


def _plan_layers(
    state: Mapping[str, Tensor],
    layers: Sequence[FeedForward],
    activation: str,
    uniform: bool,
    multiple_of: int,
    min_width: int,
) -> list[_Planned]:
    kept = [torch.nonzero(~layer.dead()).flatten() for layer in layers]

    def padded(width: int) -> int:
        return math.ceil(max(width, min_width) / multiple_of) * multiple_of

    widths = [padded(len(indices)) for indices in kept]
    if uniform:
        widest: dict[str, int] = {}
        for layer, width in zip(layers, widths, strict=True):
            # At least 1: converters of stock models do not expect a layer without neurons.
            widest[layer.kind] = max(width, widest.get(layer.kind, padded(1)))
        widths = [widest[layer.kind] for layer in layers]
    planned = []
    for layer, indices, width in zip(layers, kept, widths, strict=True):
        cut = _Cut(indices, width - len(indices))
        folded, bias = _constant(state, layer, layer.dead(), activation)
        change = LayerChange(layer.name, layer.kind, layer.count, len(indices), width, folded)
        cuts = {
            f"{layer.name}.fc1.weight": (cut, 0),
            f"{layer.name}.fc1.bias": (cut, 0),
            f"{layer.name}.fc2.weight": (cut, 1),
        }
        biases = {} if bias is None else {f"{layer.name}.fc2.bias": bias}
        planned.append(_Planned(change, cuts, biases))
    return planned


def _plan_heads(
    state: Mapping[str, Tensor],
    blocks: Sequence[Attention],
    widths: Mapping[str, int],
    full: bool,
) -> list[_Planned]:
    planned = []
    for block in blocks:
        dead = block.dead()
        alive = torch.nonzero(~dead).flatten()
        width = widths[block.name.partition(".")[0]]
        # Head by head; all rows of one stay together.
        rows = (alive.unsqueeze(1) * width + torch.arange(width)).flatten()
        count = block.out_weight.shape[0] // width if full else len(alive)
        folded, bias = _constant_of_heads(state, block, dead.repeat_interleave(width))
        cut = _Cut(rows, count * width - len(rows))
        cuts = {f"{block.name}.out_proj.weight": (cut, 1)}
        for name in block.projections:
            cuts |= {f"{block.name}.{name}.{part}": (cut, 0) for part in ("weight", "bias")}
        change = LayerChange(
            block.name, block.kind, block.count, len(alive), count, folded // width
        )
        biases = {} if bias is None else {f"{block.name}.out_proj.bias": bias}
        planned.append(_Planned(change, cuts, biases))
    return planned


def _activation_name(checkpoint: Mapping[str, Any]) -> str:
    return str(model_config(checkpoint).get("activation_fn") or "relu")


def _constant(
    state: Mapping[str, Tensor], layer: FeedForward, dead: Tensor, activation: str
) -> tuple[int, Tensor | None]:
    """How many dead neurons have a constant output, and fc2.bias with it; None if unchanged."""
    if layer.fc1_bias is None:
        return 0, None
    biases = layer.fc1_bias[dead].double()
    if not bool(biases.any()):
        return 0, None
    if activation not in _ACTIVATIONS:
        raise CheckpointError(
            f"{printable(layer.name)}: dead neurons with a bias, and activation "
            f"{printable(activation)} is not known here, so their constant output cannot be kept"
        )
    outputs = _ACTIVATIONS[activation](biases)
    if not bool(outputs.any()):  # relu of a negative bias
        return 0, None
    old = _bias_after(state, f"{layer.name}.fc2", layer.fc2_weight, "neurons")
    bias = old.double() + layer.fc2_weight[:, dead].double() @ outputs
    return int((outputs != 0).sum()), bias.to(old.dtype)


def _bias_after(state: Mapping[str, Tensor], name: str, weight: Tensor, groups: str) -> Tensor:
    """The bias that goes with a weight of shape (d, groups); it takes up the dead's constants."""
    bias = state.get(f"{name}.bias")
    if bias is None or bias.shape != weight.shape[:1] or not bias.is_floating_point():
        raise CheckpointError(
            f"{printable(name)}.bias is missing, or does not fit {printable(name)}.weight, so the "
            f"constant output of dead {groups} cannot be kept"
        )
    return bias


def _constant_of_heads(
    state: Mapping[str, Tensor], block: Attention, dead: Tensor
) -> tuple[int, Tensor | None]:
    """As `_constant`: rows of dead heads whose v has a bias, and out_proj.bias with them."""
    if "v_proj" not in block.biases:
        return 0, None
    biases = torch.where(dead, block.biases["v_proj"].double(), 0.0)
    if not bool(biases.any()) or not bool(block.out_weight[:, dead].any()):
        return 0, None
    old = _bias_after(state, f"{block.name}.out_proj", block.out_weight, "heads")
    bias = old.double() + block.out_weight.double() @ biases
    return int(dead.sum()), bias.to(old.dtype)


def _cut_state(
    state: Mapping[str, Tensor],
    cuts: Mapping[str, tuple[_Cut, int]],
    replaced: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Cut the parameters; those that share storage share it afterwards."""
    made: dict[tuple, Tensor] = {}
    result: OrderedDict[str, Tensor] = OrderedDict()
    vars(result).update(getattr(state, "__dict__", {}))  # torch keeps modules' versions there
    for name, tensor in state.items():
        if tensor.numel() and place(tensor) in made:
            result[name] = made[place(tensor)]
        elif name in cuts:
            cut, dim = cuts[name]
            result[name] = cut.apply(tensor, dim)
        else:
            result[name] = replaced.get(name, tensor)
        made[place(tensor)] = result[name]
    return result


def _cut_optimizer(
    checkpoint: Mapping[str, Any], cuts: Mapping[str, tuple[_Cut, int]]
) -> dict[str, Any]:
    """Cut the optimizer's state: a slot a parameter, or flat over all parameters (fp16)."""
    old = checkpoint.get("last_optimizer_state")
    if not isinstance(old, dict) or not isinstance(old.get("state"), dict):
        raise CheckpointError("--keep-optimizer: the checkpoint has no optimizer state to keep")
    model = checkpoint["model"]
    names = parameter_names(model)
    number = _parameters_of(old)
    flat = number == 1 and len(names) > 1
    if not flat and number != len(names):
        raise CheckpointError(
            f"--keep-optimizer: the optimizer has {number} parameters, the model has "
            f"{len(names)} (frozen ones?); compact without --keep-optimizer"
        )
    new = {}  # without what had no gradient yet, and empty for plain SGD
    for key, slot in old["state"].items():
        if flat:
            new[key] = {k: _cut_flat(k, v, names, model, cuts) for k, v in slot.items()}
        else:
            name = names[key]
            new[key] = {k: _cut_slot(k, v, name, model[name].shape, cuts) for k, v in slot.items()}
    return {**old, "state": new}


def _parameters_of(optimizer: Mapping[str, Any]) -> int:
    """How many parameters an optimizer's state, as torch's optimizers have it, is of."""
    groups, slots = optimizer.get("param_groups"), optimizer["state"]
    if isinstance(groups, list) and all(isinstance(group, dict) for group in groups):
        lists = [group.get("params") for group in groups]
        numbers = [n for found in lists if isinstance(found, list) for n in found]
        # Types first: in a damaged file a tensor may stand for any of them.
        counted = all(isinstance(n, int) for n in numbers) and numbers == [*range(len(numbers))]
        known = all(
            isinstance(key, int) and 0 <= key < len(numbers) and isinstance(slot, dict)
            for key, slot in slots.items()
        )
        if counted and known:
            return len(numbers)
    raise CheckpointError(
        "--keep-optimizer: the optimizer's state is not one of torch's, a dict for the number of "
        "each parameter; compact without --keep-optimizer"
    )


def _cut_slot(
    key: str,
    value: Any,
    name: str,
    shape: torch.Size,
    cuts: Mapping[str, tuple[_Cut, int]],
) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value  # a count of steps, a scale
    dims = list(range(len(shape)))
    if key in _FACTORED:
        del dims[_FACTORED[key]]
    expected = tuple(shape[dim] for dim in dims)
    if value.shape != expected:
        raise CheckpointError(
            f"--keep-optimizer: the optimizer's {printable(str(key))} of {printable(name)} has "
            f"shape {tuple(value.shape)}, not {expected}; compact without --keep-optimizer"
        )
    if name not in cuts:
        return value
    cut, dim = cuts[name]
    return cut.apply(value, dims.index(dim)) if dim in dims else value


def _cut_flat(
    key: str,
    value: Any,
    names: Sequence[str],
    model: Mapping[str, Tensor],
    cuts: Mapping[str, tuple[_Cut, int]],
) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    sizes = [model[name].numel() for name in names]
    if value.shape != (sum(sizes),):
        raise CheckpointError(
            f"--keep-optimizer: the optimizer's flat {printable(str(key))} has shape "
            f"{tuple(value.shape)}, the model {sum(sizes)} parameters; compact without "
            "--keep-optimizer"
        )
    parts = [
        _cut_slot(key, part.view(model[name].shape), name, model[name].shape, cuts).flatten()
        for name, part in zip(names, value.split(sizes), strict=True)
    ]
    return torch.cat(parts)


def _cut_masters(
    checkpoint: Mapping[str, Any],
    cuts: Mapping[str, tuple[_Cut, int]],
    biases: Mapping[str, Tensor],
) -> Any:
    """The extra state with the fp32 masters of a half-precision run cut like the optimizer's state.

    Masters are one tensor for each parameter, or a flat one over all of them.
    """
    key, entry = task_entry(checkpoint)
    precision, model = entry.get("prox_precision"), checkpoint["model"]
    if not isinstance(precision, dict) or "masters" not in precision:
        return checkpoint.get("extra_state")
    names = parameter_names(model)

    def cut(saved: object) -> list[Tensor]:
        shapes = [model[name].shape for name in names]
        if not isinstance(saved, list) or not all(isinstance(master, Tensor) for master in saved):
            raise CheckpointError(
                "--keep-optimizer: the fp32 masters (prox_precision) are no list of tensors; "
                "compact without --keep-optimizer"
            )
        flat = len(saved) == 1 < len(names)
        if flat and saved[0].shape == (sum(shape.numel() for shape in shapes),):
            parts = saved[0].split([shape.numel() for shape in shapes])
            saved = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        if [master.shape for master in saved] != shapes:
            raise CheckpointError(
                "--keep-optimizer: the fp32 masters (prox_precision) do not have the shapes of "
                "the model's parameters; compact without --keep-optimizer"
            )
        new = [
            biases[name].float() if name in biases else _cut_slot("", master, name, shape, cuts)
            for name, master, shape in zip(names, saved, shapes, strict=True)
        ]
        return [torch.cat([master.flatten() for master in new])] if flat else new

    precision = {**precision, "masters": cut(precision["masters"])}
    return {**checkpoint["extra_state"], key: {**entry, "prox_precision": precision}}


def _cut_ema(
    result: dict[str, Any],
    state: Mapping[str, Tensor],
    cuts: Mapping[str, tuple[_Cut, int]],
    layers: Sequence[FeedForward],
    heads: Sequence[Attention],
    activation: str,
) -> int:
    """Cut a stored moving average of the model by the model's mask; counts what was not zero."""
    extra_state = result.get("extra_state")
    if not isinstance(extra_state, dict):
        return 0
    rows = 0
    changed = dict(extra_state)
    for key in ("ema", "ema_fp32_params"):
        average = extra_state.get(key)
        if not isinstance(average, dict):
            continue
        for name, tensor in average.items():
            if not isinstance(tensor, Tensor) or tensor.shape != state.get(name, tensor).shape:
                raise CheckpointError(
                    f"extra_state[{key}][{printable(str(name))}] is no moving average of the "
                    "model's parameter"
                )
        biases = _constants(average, state, layers, heads, activation)
        changed[key] = _cut_state(average, cuts, biases)
        if key == "ema":
            for name in cuts:
                if name.endswith(("fc1.weight", "v_proj.weight")) and name in average:
                    before, after = average[name], changed[key][name]
                    rows += int((~dead_neurons(before)).sum() - (~dead_neurons(after)).sum())
    result["extra_state"] = changed
    return rows


def _constants(
    average: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    layers: Sequence[FeedForward],
    heads: Sequence[Attention],
    activation: str,
) -> dict[str, Tensor]:
    """Biases of a moving average with what the model's constants are in it.

    Others that are dead in the model are nothing there, and so in the average, sooner or later.
    """
    named = {**state, **average}
    biases = {}
    for layer in layers:
        if layer.fc1_bias is None:
            continue
        own = replace(
            layer,
            fc1_weight=named[f"{layer.name}.fc1.weight"],
            fc1_bias=named[f"{layer.name}.fc1.bias"],
            fc2_weight=named[f"{layer.name}.fc2.weight"],
        )
        constant = layer.dead() & (layer.fc1_bias != 0)
        biases[f"{layer.name}.fc2.bias"] = _constant(named, own, constant, activation)[1]
    for block in heads:
        if "v_proj" not in block.biases:
            continue
        own = replace(
            block,
            biases={name: named[f"{block.name}.{name}.bias"] for name in block.biases},
            out_weight=named[f"{block.name}.out_proj.weight"],
        )
        rows = block.dead().repeat_interleave(
            len(block.projections["v_proj"]) // max(1, block.count)
        )
        constant = rows & (block.biases["v_proj"] != 0)
        biases[f"{block.name}.out_proj.bias"] = _constant_of_heads(named, own, constant)[1]
    return {name: bias for name, bias in biases.items() if bias is not None}


def _widths_by_side(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """``encoder`` and ``decoder`` -> the width of each of their layers, shared ones included."""
    result = {}
    for side in ("encoder", "decoder"):
        widths: list[int] = []
        while (weight := state.get(f"{side}.layers.{len(widths)}.fc1.weight")) is not None:
            widths.append(weight.shape[0])
        if widths:
            result[side] = widths
    return result


def _head_counts(state: Mapping[str, Tensor], widths: Mapping[str, int]) -> dict[str, list[int]]:
    """``encoder``, ``decoder``, ``cross`` -> heads of each layer; empty if none has lost one."""
    result = {}
    for part, (side, module) in ATTENTION_PARTS.items():
        counts: list[int] = []
        full = 0
        while side in widths:
            out = state.get(f"{side}.layers.{len(counts)}.{module}.out_proj.weight")
            if out is None:
                break
            full = out.shape[0] // widths[side]
            counts.append(out.shape[1] // widths[side])
        if any(count != full for count in counts):
            result[part] = counts
    return result


def _rewrite_settings(
    checkpoint: dict[str, Any],
    arch: str,
    stock: str,
    widths: Mapping[str, Sequence[int]],
    heads: Mapping[str, Sequence[int]],
    uniform: bool,
) -> dict[str, Any]:
    """Make the settings name the smaller model, and a task that plain fairseq knows."""
    old = model_config(checkpoint)
    model: dict[str, Any] = {}
    if "arch" in old:
        model["arch"] = arch
    if "_name" in old:
        by_model = stock if uniform else _WITH_WIDTHS[stock]
        # The architecture's name, in language models the only place of it; or the model's.
        model["_name"] = arch if old["_name"] == old.get("arch", old["_name"]) else by_model
    for side, sizes in widths.items():
        model[f"{side}_ffn_embed_dim"] = max(sizes)
        if isinstance(old.get(side), Mapping):  # fairseq-hydra-train's, which comes first
            model[side] = {**old[side], "ffn_embed_dim": max(sizes)}
        if not uniform:
            model[f"{side}_ffn_dims"] = ",".join(map(str, sizes))
    for part, counts in heads.items():
        model[f"{part}_head_counts"] = ",".join(map(str, counts))
    if (stock_task := _stock_task(old.get("task"))) is not None:
        model["task"] = stock_task
    gone = [f"{side}_ffn_dims" for side in widths] if uniform else []
    gone += [f"{part}_head_counts" for part in ATTENTION_PARTS]
    checkpoint = with_settings(checkpoint, "model", model, drop=gone)
    stock_task = _stock_task(config_section(checkpoint, "task").get("_name"))
    if stock_task is not None:
        checkpoint = with_settings(checkpoint, "task", {"_name": stock_task})
    return checkpoint


def _stock_task(name: object) -> str | None:
    """The task that plain fairseq knows for one of ours."""
    return _STOCK_TASKS.get(name) if isinstance(name, str) else None


def _note(
    checkpoint: dict[str, Any], changes: Sequence[LayerChange], provenance: dict[str, Any]
) -> None:
    """Append to the checkpoint's history what was done, unless that was nothing."""
    note = checkpoint.get("autosize")
    history = note.get("history", []) if isinstance(note, dict) else []
    if not isinstance(history, list):
        raise CheckpointError(f"autosize.history is a {type(history).__name__}, no list of steps")
    if not history or any(change.before != change.after or change.folded for change in changes):
        # Attention is of interest only where it has lost heads.
        changes = [c for c in changes if c.kind.endswith("ffn") or c.before != c.after]
        step = {
            "version": __version__,
            "widths_before": {change.name: change.before for change in changes},
            "widths_after": {change.name: change.after for change in changes},
        }
        history = [*history, step | provenance]
    checkpoint["autosize"] = {"format": FORMAT, "history": history}

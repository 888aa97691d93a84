"""fairseq's Transformers with a size of its own for each feed-forward layer and each attention.

For each architecture of ``transformer``, ``transformer_align`` and ``transformer_lm`` there is one
with ``_autosize`` at the end of its name, such as ``transformer_iwslt_de_en_autosize``: the same
defaults, and options for the widths and the numbers of heads, layer by layer, zero included.
"""

import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.models import (
    ARCH_CONFIG_REGISTRY,
    ARCH_MODEL_INV_REGISTRY,
    register_model,
    register_model_architecture,
)
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer_align import TransformerAlignModel
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig
from fairseq.modules import MultiheadAttention
from fairseq.tasks import FairseqTask
from torch import Tensor, nn

from ..config import ConfigError
from ..groups import ATTENTION_PARTS

_SIDES = ("encoder", "decoder")

_HELP = (
    "FFN neurons of each {side} layer, first layer first, such as 310,90,0; "
    "default: --{side}-ffn-embed-dim in every layer"
)
_HELP_HEADS = (
    "heads of {module} in each {side} layer, first layer first, such as 4,3,0; default: "
    "--{side}-attention-heads in every layer, whose width heads always have"
)


class _SizesMixin(TransformerModel):
    """Adds ``--encoder-ffn-dims``, ``--encoder-head-counts`` and the like to a model."""

    @classmethod
    def hub_models(cls) -> dict[str, Any]:
        return {}

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """The options of the stock model, and a width per layer for each side."""
        super().add_args(parser)
        for side in _SIDES:
            parser.add_argument(
                f"--{side}-ffn-dims", metavar="N,N,...", help=_HELP.format(side=side)
            )
        for name, (side, module) in ATTENTION_PARTS.items():
            parser.add_argument(
                f"--{name}-head-counts",
                metavar="N,N,...",
                help=_HELP_HEADS.format(side=side, module=module),
            )

    @classmethod
    def build_model(cls, args: Namespace, task: FairseqTask) -> TransformerModel:
        """Build the stock model, and then the blocks of the sizes asked for."""
        # Before the stock class forgets them; it changes the number of layers for these.
        kept = {side: getattr(args, f"{side}_layers_to_keep", None) for side in _SIDES}
        model = super().build_model(args, task)
        for side in _SIDES:
            _resize(args, side, getattr(model, side), kept[side])
        return model


@register_model("transformer_autosize")
class TransformerAutosizeModel(_SizesMixin, TransformerModel):
    """``transformer`` with a size of its own for each layer."""


@register_model("transformer_align_autosize")
class TransformerAlignAutosizeModel(_SizesMixin, TransformerAlignModel):
    """``transformer_align`` with a size of its own for each layer."""


@dataclass
class TransformerLanguageModelAutosizeConfig(TransformerLanguageModelConfig):
    """The options of ``transformer_lm``, and a width per layer."""

    decoder_ffn_dims: Optional[str] = field(  # noqa: UP045 - fairseq does not know `|`
        default=None, metadata={"help": _HELP.format(side="decoder")}
    )
    decoder_head_counts: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={"help": _HELP_HEADS.format(side="decoder", module="self_attn")},
    )


@register_model("transformer_lm_autosize", dataclass=TransformerLanguageModelAutosizeConfig)
class TransformerLanguageModelAutosize(TransformerLanguageModel):
    """``transformer_lm`` with ``--decoder-ffn-dims`` and ``--decoder-head-counts``."""

    @classmethod
    def hub_models(cls) -> dict[str, Any]:
        return {}

    @classmethod
    def build_model(cls, args: Any, task: FairseqTask) -> "TransformerLanguageModelAutosize":
        """Build the stock model, and then the blocks of the sizes asked for."""
        kept = getattr(args, "decoder_layers_to_keep", None)
        model = super().build_model(args, task)
        _resize(args, "decoder", model.decoder, kept)
        return model


def _resize(args: Any, side: str, stack: nn.Module, kept: str | None) -> None:
    """Give the layers of an encoder or a decoder the sizes that the options ask for."""
    layers = list(stack.layers.children())  # LayerDrop's own iterator skips some
    widths = _sizes_of(args, f"{side}_ffn_dims", len(layers), kept)
    if widths is not None:
        set_widths(layers, widths)
    for name, (own, module) in ATTENTION_PARTS.items():
        if own == side and layers and getattr(layers[0], module, None) is not None:
            counts = _sizes_of(args, f"{name}_head_counts", len(layers), kept)
            if counts is not None:
                _check_heads(args, f"{name}_head_counts", max(counts), getattr(layers[0], module))
                set_heads(layers, module, counts)


def _sizes_of(args: Any, option: str, layers: int, kept: str | None) -> list[int] | None:
    """As `layer_sizes`; the settings, which are saved, then have the kept layers' alone.

    fairseq itself forgets which layers were kept once it has loaded them.
    """
    sizes = layer_sizes(args, option, layers, kept)
    if sizes is not None and kept:
        setattr(args, option, ",".join(map(str, sizes)))
    return sizes


def _check_heads(args: Any, option: str, most: int, attention: MultiheadAttention) -> None:
    """Refuse more heads than the architecture has."""
    if most > attention.num_heads:
        raise ConfigError(
            f"{_flag(args, option)}: {most} heads, but the architecture has {attention.num_heads}; "
            "give at most so many"
        )


def _flag(args: Any, option: str) -> str:
    """How an option was given on the command line."""
    return f"--{option.replace('_', '-')} {getattr(args, option)}"


def layer_sizes(args: Any, option: str, layers: int, kept: str | None = None) -> list[int] | None:
    """The sizes that an option gives for each layer; None where it is not given.

    Args:
        args: settings that may have `option`.
        option: such as ``encoder_ffn_dims`` or ``cross_head_counts``.
        layers: number of layers that the model has.
        kept: value of ``--encoder-layers-to-keep`` or the decoder's; the sizes are then those of
            all layers before, or, once they were chosen, of the kept ones.

    Raises:
        ConfigError: not a list of numbers >= 0, or not one for each layer; names the flag.
    """
    text = getattr(args, option, None)
    if text is None or text == "":
        return None
    flag = _flag(args, option)
    parts = str(text).split(",")  # a single number, as YAML has it
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"{flag}: must be numbers >= 0, separated by commas, one for each layer")
    sizes = [int(part) for part in parts]
    if kept and len(sizes) != layers:
        chosen = sorted(int(index) for index in kept.split(","))
        if chosen[-1] >= len(sizes):
            raise ConfigError(f"{flag}: layers-to-keep {kept} names a layer beyond these")
        sizes = [sizes[index] for index in chosen]
    if len(sizes) != layers:
        raise ConfigError(
            f"{flag}: gives {len(sizes)} sizes for {layers} layers; give one for each"
        )
    return sizes


def set_widths(layers: Iterable[nn.Module], widths: Iterable[int]) -> None:
    """Give each layer new, randomly initialised fc1 and fc2 of its width."""
    with warnings.catch_warnings():
        # torch says of a layer without neurons that there is nothing to initialise.
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        for layer, width in zip(layers, widths, strict=True):
            noise = (layer.quant_noise, layer.quant_noise_block_size)
            layer.fc1 = layer.build_fc1(layer.embed_dim, width, *noise)
            layer.fc2 = layer.build_fc2(width, layer.embed_dim, *noise)


def set_heads(layers: Iterable[nn.Module], module: str, counts: Iterable[int]) -> None:
    """Replace the attention `module` of each layer by one with a number of heads, untrained."""
    for layer, heads in zip(layers, counts, strict=True):
        old = getattr(layer, module)
        if heads != old.num_heads:
            setattr(layer, module, PrunedAttention(old, heads))


class PrunedAttention(MultiheadAttention):
    """fairseq's attention with fewer heads than its input is wide; with none, a constant.

    Args:
        stock: attention with all heads; sizes and settings are taken from it.
        heads: 0 <= heads <= those of `stock`.
    """

    def __init__(self, stock: MultiheadAttention, heads: int) -> None:
        super().__init__(
            stock.embed_dim,
            stock.num_heads,
            kdim=stock.kdim,
            vdim=stock.vdim,
            dropout=stock.dropout_module.p,
            bias=stock.q_proj.bias is not None,
            self_attention=stock.self_attention,
            encoder_decoder_attention=stock.encoder_decoder_attention,
        )
        self.num_heads = heads
        self.embed_dim = width = heads * self.head_dim
        with warnings.catch_warnings():
            # torch says of a layer without entries that there is nothing to initialise.
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            for name in ("q_proj", "k_proj", "v_proj"):
                old = getattr(self, name)
                setattr(self, name, nn.Linear(old.in_features, width, old.bias is not None))
            self.out_proj = nn.Linear(width, stock.embed_dim)
            if heads:
                self.reset_parameters()
        self._set_skip_embed_dim_check()

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As fairseq's; without heads the output is out_proj's bias, and there are no weights."""
        if self.num_heads:
            return super().forward(query, key, value, *args, **kwargs)
        # Through all parameters, empty as they are: those without a gradient would stop torch's
        # DistributedDataParallel.
        empty = self.q_proj(query)
        for projection, given in ((self.k_proj, key), (self.v_proj, value)):
            if given is not None:
                empty = empty + projection(given).sum()
        return self.out_proj(empty), None


def _register_architectures() -> None:
    """For every stock architecture ``X`` one with the same defaults, ``X_autosize``."""
    for stock in ("transformer", "transformer_align", "transformer_lm"):
        known = ARCH_MODEL_INV_REGISTRY.get(f"{stock}_autosize", [])
        for arch in ARCH_MODEL_INV_REGISTRY[stock]:
            if f"{arch}_autosize" not in known:
                register = register_model_architecture(f"{stock}_autosize", f"{arch}_autosize")
                register(ARCH_CONFIG_REGISTRY[arch])


_register_architectures()

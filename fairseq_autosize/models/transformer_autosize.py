"""fairseq's Transformers with a width of its own for each feed-forward layer, zero included.

For each architecture of ``transformer`` and ``transformer_lm`` there is one with ``_autosize`` at
the end of its name, such as ``transformer_iwslt_de_en_autosize``: the same defaults, and the
options ``--encoder-ffn-dims`` and ``--decoder-ffn-dims``.
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
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig
from fairseq.tasks import FairseqTask
from torch import nn

_SIDES = ("encoder", "decoder")

_HELP = (
    "FFN neurons of each {side} layer, first layer first, such as 310,90,0; "
    "default: --{side}-ffn-embed-dim in every layer"
)


@register_model("transformer_autosize")
class TransformerAutosizeModel(TransformerModel):
    """``transformer`` with ``--encoder-ffn-dims`` and ``--decoder-ffn-dims``."""

    @classmethod
    def hub_models(cls) -> dict[str, Any]:
        return {}

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """The options of ``transformer``, and a width per layer for each side."""
        super().add_args(parser)
        for side in _SIDES:
            parser.add_argument(
                f"--{side}-ffn-dims", metavar="N,N,...", help=_HELP.format(side=side)
            )

    @classmethod
    def build_model(cls, args: Namespace, task: FairseqTask) -> "TransformerAutosizeModel":
        """Build the stock model, and then the feed-forward layers of the widths asked for."""
        # Before the stock class forgets them; it changes the number of layers for these.
        kept = {side: getattr(args, f"{side}_layers_to_keep", None) for side in _SIDES}
        model = super().build_model(args, task)
        for side in _SIDES:
            layers = list(getattr(model, side).layers.children())  # LayerDrop's own iterator skips
            widths = layer_widths(args, side, len(layers), kept[side])
            if widths is not None:
                set_widths(layers, widths)
        return model


@dataclass
class TransformerLanguageModelAutosizeConfig(TransformerLanguageModelConfig):
    """The options of ``transformer_lm``, and a width per layer."""

    decoder_ffn_dims: Optional[str] = field(  # noqa: UP045 - fairseq does not know `|`
        default=None, metadata={"help": _HELP.format(side="decoder")}
    )


@register_model("transformer_lm_autosize", dataclass=TransformerLanguageModelAutosizeConfig)
class TransformerLanguageModelAutosize(TransformerLanguageModel):
    """``transformer_lm`` with ``--decoder-ffn-dims``."""

    @classmethod
    def hub_models(cls) -> dict[str, Any]:
        return {}

    @classmethod
    def build_model(cls, args: Any, task: FairseqTask) -> "TransformerLanguageModelAutosize":
        """Build the stock model, and then the feed-forward layers of the widths asked for."""
        kept = getattr(args, "decoder_layers_to_keep", None)
        model = super().build_model(args, task)
        layers = list(model.decoder.layers.children())
        widths = layer_widths(args, "decoder", len(layers), kept)
        if widths is not None:
            set_widths(layers, widths)
        return model


def layer_widths(args: Any, side: str, layers: int, kept: str | None = None) -> list[int] | None:
    """The widths that ``--{side}-ffn-dims`` asks for; None where it is not given.

    Args:
        args: settings with ``encoder_ffn_dims`` or ``decoder_ffn_dims``.
        side: ``encoder`` or ``decoder``.
        layers: number of layers that the model has.
        kept: value of ``--{side}-layers-to-keep``; widths are then those of all layers before.

    Raises:
        ValueError: not a list of numbers >= 0, or not one for each layer; names the flag.
    """
    text = getattr(args, f"{side}_ffn_dims", None)
    if not text:
        return None
    flag = f"--{side}-ffn-dims {text}"
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{flag}: must be numbers >= 0, separated by commas, one for each layer")
    widths = [int(part) for part in parts]
    if kept:
        chosen = sorted(int(index) for index in kept.split(","))
        if chosen[-1] >= len(widths):
            raise ValueError(f"{flag}: --{side}-layers-to-keep {kept} names a layer beyond these")
        widths = [widths[index] for index in chosen]
    if len(widths) != layers:
        raise ValueError(f"{flag}: gives {len(widths)} widths for {layers} {side} layers")
    return widths


def set_widths(layers: Iterable[nn.Module], widths: Iterable[int]) -> None:
    """Give each layer new, randomly initialised fc1 and fc2 of its width."""
    with warnings.catch_warnings():
        # torch says of a layer without neurons that there is nothing to initialise.
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        for layer, width in zip(layers, widths, strict=True):
            noise = (layer.quant_noise, layer.quant_noise_block_size)
            layer.fc1 = layer.build_fc1(layer.embed_dim, width, *noise)
            layer.fc2 = layer.build_fc2(width, layer.embed_dim, *noise)


def _register_architectures() -> None:
    """For every stock architecture ``X`` one with the same defaults, ``X_autosize``."""
    for stock in ("transformer", "transformer_lm"):
        known = ARCH_MODEL_INV_REGISTRY.get(f"{stock}_autosize", [])
        for arch in ARCH_MODEL_INV_REGISTRY[stock]:
            if f"{arch}_autosize" not in known:
                register = register_model_architecture(f"{stock}_autosize", f"{arch}_autosize")
                register(ARCH_CONFIG_REGISTRY[arch])


_register_architectures()

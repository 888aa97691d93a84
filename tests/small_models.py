"""Untrained fairseq models of a few hundred parameters, and checkpoints of them, for the tests."""

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models import FairseqLanguageModel
from fairseq.models import build_model as build
from fairseq.models.transformer import TransformerModel, base_architecture
from fairseq.models.transformer_align import TransformerAlignModel
from fairseq.models.transformer_lm import TransformerLanguageModel, base_lm_architecture
from torch import nn

SIZES = {
    "encoder_layers": 2,
    "encoder_embed_dim": 8,
    "encoder_ffn_embed_dim": 12,
    "encoder_attention_heads": 2,
    "decoder_layers": 2,
    "decoder_embed_dim": 8,
    "decoder_ffn_embed_dim": 10,
    "decoder_attention_heads": 2,
}
TASK = {
    "_name": "translation",
    "prox": "l21",
    "prox_strength": 0.5,
    "prox_step_size": "schedule",
    "prox_groups": "ffn",
    "prox_bias": True,
    "prox_start_update": 0,
}


def dictionary() -> Dictionary:
    words = Dictionary()
    for letter in "abcdefghij":
        words.add_symbol(letter)
    return words


def model_task() -> SimpleNamespace:
    """As much of a task as building a model takes."""
    words = dictionary()
    return SimpleNamespace(source_dictionary=words, target_dictionary=words)


def build_model(**options: Any) -> tuple[TransformerModel, Namespace]:
    """A Transformer with the stock architecture, and its settings."""
    torch.manual_seed(1)
    args = Namespace(**(SIZES | {"arch": "transformer", "_name": "transformer"} | options))
    base_architecture(args)
    return TransformerModel.build_model(args, model_task()), args


def build_align_model(**options: Any) -> tuple[TransformerAlignModel, Namespace]:
    """A Transformer that learns alignments in its last layer, and its settings."""
    torch.manual_seed(1)
    name = "transformer_align"
    options = {"alignment_layer": 1, "full_context_alignment": True} | options
    args = Namespace(**(SIZES | {"arch": name, "_name": name} | options))
    return TransformerAlignModel.build_model(args, model_task()), args


def build_language_model(**options: Any) -> tuple[FairseqLanguageModel, Namespace]:
    """A decoder-only Transformer with the stock architecture, and its settings."""
    torch.manual_seed(1)
    sizes = {name: value for name, value in SIZES.items() if name.startswith("decoder")}
    args = Namespace(**(sizes | {"_name": "transformer_lm"} | options))
    base_lm_architecture(args)
    args.max_target_positions = args.tokens_per_sample = 16
    return TransformerLanguageModel.build_model(args, model_task()), args


def checkpoint_of(model: nn.Module, args: Namespace, task: dict[str, Any] = TASK) -> dict[str, Any]:
    """What fairseq saves, but for an optimizer's state."""
    return {
        "cfg": {"model": args, "task": task, "common": {"seed": 7}},
        "model": model.state_dict(),
        "optimizer_history": [{"num_updates": 5}, {"num_updates": 40}],
        "extra_state": {},
    }


def model_in(checkpoint: dict[str, Any]) -> nn.Module:
    """The model that fairseq builds for a checkpoint, with its parameters."""
    settings = checkpoint["cfg"]["model"]
    model = build(Namespace(**vars(settings)), model_task(), from_checkpoint=True)
    model.load_state_dict(checkpoint["model"], strict=True, model_cfg=settings)
    return model.eval()

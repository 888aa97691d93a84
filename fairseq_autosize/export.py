"""Export to CTranslate2, through its own converter, and a check that both engines agree."""

import contextlib
import os
import re
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import architecture_of, config_section, model_config, write_checkpoint
from .compaction import compact
from .compat import require_fairseq

Pair = tuple[list[int], list[int]]  # token indices of a source and a target, without the end

QUANTIZATIONS = (
    "int8",
    "int8_float32",
    "int8_float16",
    "int8_bfloat16",
    "int16",
    "float16",
    "bfloat16",
    "float32",
)

# Beyond these a model is not what the parameters in the checkpoint are of, but fills the memory.
_MOST_LAYERS = 500
_MOST_EXTRA = 2**27  # numbers that are no parameters in the checkpoint: sinusoids of positions

_SHORTEST = 5  # positions that the sentences for the comparison need

_MODEL_FILE = re.compile(r"config\.json|model\.bin|\w*vocabulary\.(json|txt)|vmap\.txt")

# Largest difference of a token's log probability that float32 may show.
TOLERANCE = 1e-3


class ExportError(ValueError):
    """An export that is not possible, or whose result does not compute the same; one line."""


@dataclass(frozen=True)
class Agreement:
    """How far CTranslate2 is from fairseq on the same sentences.

    Attributes:
        tokens: target tokens that both scored.
        largest: largest absolute difference of a token's log probability in float32.
        quantized: the same for the exported model, or None if that is float32.
    """

    tokens: int
    largest: float
    quantized: float | None


def export_ctranslate2(
    checkpoint: Mapping[str, Any],
    output: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    quantization: str | None = None,
    force: bool = False,
    languages: tuple[str | None, str | None] = (None, None),
) -> Agreement:
    """Convert a checkpoint to a CTranslate2 model, and compare scores of both engines.

    Dead neurons are removed on the way; a layer without neurons keeps one dead one, since
    CTranslate2 has no empty layers. The folder appears only when it is complete and checked.

    Args:
        checkpoint: what `checkpoint.read_checkpoint` returned: a ``transformer``,
            ``transformer_align`` or ``transformer_lm``, with or without a width per layer.
        output: folder to make.
        data: folder of the vocabularies (``dict.*.txt``), by default the one of the training.
        quantization: one of `QUANTIZATIONS`, or None for float32.
        force: replace `output` if it is a CTranslate2 model or an empty folder.
        languages: source and target, where neither the checkpoint nor binarized files in `data`
            tell them.

    Raises:
        ExportError: `output` exists or cannot be written, ctranslate2 is not installed or cannot
            convert the model, a vocabulary is missing, the settings in the checkpoint do not
            describe the model whose parameters it has, or float32 scores differ by more than
            `TOLERANCE`.
        CheckpointError, GroupError: the checkpoint cannot be compacted.
    """
    output = Path(output)
    with _telling_of_writing(output):  # a name that is too long
        there = output.exists()
    if there and not force:
        raise ExportError(f"{output}: exists already; choose another name, or add --force")
    _check_replaceable(output)
    if not output.parent.is_dir():
        raise ExportError(f"{output}: the folder {output.parent} does not exist")
    try:
        from ctranslate2.converters import FairseqConverter
    except ImportError as error:
        raise ExportError(
            f"ctranslate2 is needed for the export and does not load ({error}); install it: "
            "pip install ctranslate2"
        ) from error
    compaction = compact(checkpoint, min_width=1, full_heads=True)
    small, translates = compaction.checkpoint, compaction.translates
    settings = _flat_settings(small, data, languages)
    _check_convertible(settings)
    task = _task(settings)
    sentences = _sentences(settings, task)
    _check_vocabularies(settings, task, small["model"])
    with _telling("fairseq cannot run the model that the checkpoint's settings describe"):
        expected = _fairseq_scores(settings, task, small["model"], sentences)
    with (
        _telling_of_writing(output),
        tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder,
    ):
        source = Path(folder, "checkpoint.pt")
        write_checkpoint({"args": settings, "cfg": None, "model": small["model"]}, source)
        made = {}
        for kind in dict.fromkeys((None, quantization)):
            # In this process, so that the registered safe globals and models are there; the
            # converter reads the file weights-only.
            made[kind] = Path(folder, kind or "plain")
            with _telling("ctranslate2 cannot convert the model"):
                converter = FairseqConverter(str(source), settings.data)
                converter.convert(str(made[kind]), quantization=kind)
        with _telling("ctranslate2 cannot run the converted model"):
            largest = _difference(made[None], task, sentences, expected, translates)
        if not largest <= TOLERANCE:
            raise ExportError(
                f"fairseq and CTranslate2 differ by {largest:.2g} in a token's log probability "
                f"(float32; at most {TOLERANCE:g} is rounding), so nothing was written"
            )
        quantized = None
        if quantization not in (None, "float32"):
            quantized = _difference(made[quantization], task, sentences, expected, translates)
        _replace(output, made[quantization], Path(folder, "old"))
    return Agreement(sum(map(len, expected)), largest, quantized)


def _check_replaceable(output: Path) -> None:
    """See that --force cannot remove anything but an earlier model.

    Raises:
        ExportError: `output` is no folder, or has files that are not a CTranslate2 model's.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise ExportError(f"{output}: exists and is no folder; choose another name")
    others = sorted(path.name for path in output.iterdir() if not _MODEL_FILE.fullmatch(path.name))
    if others:
        raise ExportError(
            f"{output}: --force replaces a CTranslate2 model, and this folder has other files "
            f"({', '.join(others[:3])}{', ...' if others[3:] else ''}); choose another name"
        )


def _replace(output: Path, made: Path, old: Path) -> None:
    """Put a folder in the place of another, which goes to `old`."""
    if not output.exists():
        made.rename(output)
        return
    output.rename(old)
    try:
        made.rename(output)
    except OSError:
        old.rename(output)
        raise


@contextlib.contextmanager
def _telling_of_writing(output: Path) -> Iterator[None]:
    """Tell in one line what the file system does not let happen."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"{output}: cannot write: {error.strerror or error}") from error


@contextlib.contextmanager
def _telling(what: str) -> Iterator[None]:
    """Tell in one line what fails in fairseq or ctranslate2.

    They take settings as they come, so that those of a damaged or hostile checkpoint make them
    raise anything.
    """
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise ExportError(f"{what}: {reason}") from error


def _flat_settings(
    checkpoint: Mapping[str, Any],
    data: str | os.PathLike[str] | None,
    languages: tuple[str | None, str | None],
) -> Namespace:
    """All settings in one namespace, as the converter wants them.

    It looks the architecture up under ``arch`` and accepts stock names only, while fairseq builds
    the model that ``_name`` names.
    """
    model, task = model_config(checkpoint), config_section(checkpoint, "task")
    values = {name: value for name, value in {**model, **task}.items() if name != "_name"}
    # In an old checkpoint all settings are one section, whose _name is the model's.
    old = checkpoint.get("cfg") is None
    values["task"] = task.get("task") if old else task.get("_name") or task.get("task")
    arch = str(architecture_of(checkpoint))
    values["_name"] = arch if arch.endswith("_autosize") else f"{arch}_autosize"
    values["arch"] = arch.removesuffix("_autosize")
    folder = data if data is not None else values.get("data")
    if not folder or not Path(str(folder).split(os.pathsep)[0]).is_dir():
        raise ExportError(
            f"the vocabularies' folder {folder} does not exist; say with --data-dir where "
            "dict.*.txt are"
        )
    values["data"] = str(folder)
    for name, language in zip(("source_lang", "target_lang"), languages, strict=True):
        if language is not None:
            values[name] = language
    return Namespace(**values)


def _check_convertible(settings: Namespace) -> None:
    """Refuse what the converter would end in an error of its own for, without naming an option."""
    for name in ("adaptive_softmax_cutoff", "no_cross_attention"):
        if getattr(settings, name, None):
            raise ExportError(f"CTranslate2 has no models with --{name.replace('_', '-')}")
    for side in ("encoder", "decoder"):
        if getattr(settings, f"{side}_layers", None) == 0:
            raise ExportError(f"CTranslate2 has no models without {side} layers")


def _task(settings: Namespace) -> Any:
    require_fairseq()
    from fairseq.tasks import setup_task

    where = f"{settings.data} (--data-dir; --source-lang and --target-lang, if they are unknown)"
    with _telling(f"the vocabularies do not load from {where}"):
        return setup_task(settings)


def _check_vocabularies(settings: Namespace, task: Any, state: Mapping[str, Tensor]) -> None:
    """Refuse vocabularies of another training."""
    sides = {"encoder": "source_dictionary", "decoder": "target_dictionary"}
    for side, name in sides.items():
        embedded = state.get(f"{side}.embed_tokens.weight")
        words = len(getattr(task, name))
        if embedded is not None and embedded.shape[:1] != (words,):
            raise ExportError(
                f"the vocabulary in {settings.data}, with special symbols, has {words:,} entries, "
                f"the {side} {len(embedded):,}; say with --data-dir where the training's "
                "dict.*.txt are"
            )


def _sentences(settings: Namespace, task: Any) -> list[Pair]:
    """Pairs of random token indices, without fairseq's special symbols; always the same."""
    generator = torch.Generator().manual_seed(1)
    names = ("max_source_positions", "max_target_positions", "tokens_per_sample")
    limits = {name: getattr(settings, name, None) for name in names}
    for name, limit in limits.items():
        if limit is not None and not (isinstance(limit, int) and limit >= _SHORTEST):
            raise ExportError(
                f"the checkpoint's settings have {name} {repr(limit)[:50]}: must be a number >= "
                f"{_SHORTEST}, so that there are sentences to compare"
            )
    longest = min([24, *(limit for limit in limits.values() if limit is not None)])

    def draw(dictionary: Any, length: int) -> list[int]:
        low, high = dictionary.nspecial, len(dictionary)
        if low >= high:
            raise ExportError(f"{settings.data}: a vocabulary there, dict.*.txt, has no words")
        return torch.randint(low, high, (length,), generator=generator).tolist()

    return [
        (draw(task.source_dictionary, length), draw(task.target_dictionary, length + 2))
        for length in range(1, longest - 3, 2)  # the longest target has an end as well
    ]


@torch.no_grad()
def _fairseq_scores(
    settings: Namespace, task: Any, state: Mapping[str, Tensor], sentences: list[Pair]
) -> list[list[float]]:
    """Log probability of each target token and of the end of the sentence."""
    from fairseq.models import build_model

    for side in ("encoder", "decoder"):
        layers = getattr(settings, f"{side}_layers", None)
        if isinstance(layers, int) and layers > _MOST_LAYERS:
            raise ExportError(f"the settings ask for {layers} layers; at most {_MOST_LAYERS}")
    with torch.device("meta"):  # where tensors have sizes only
        sizes: nn.Module = build_model(settings, task)
    wanted = sum(x.numel() for x in (*sizes.parameters(), *sizes.buffers()))
    there = sum(x.numel() for x in state.values())
    if wanted > there + _MOST_EXTRA:
        raise ExportError(f"the settings ask for {wanted:,} numbers; the checkpoint has {there:,}")
    model: nn.Module = build_model(settings, task)
    model.load_state_dict(dict(state), strict=True)
    model.eval()
    eos = task.target_dictionary.eos()
    scores = []
    for source, target in sentences:
        previous, wanted = torch.tensor([[eos, *target]]), torch.tensor([*target, eos])
        if hasattr(model, "encoder"):
            tokens = torch.tensor([[*source, eos]])
            output = model(tokens, torch.tensor([tokens.shape[1]]), previous)
        else:
            output = model(previous)
        logs = model.get_normalized_probs(output, log_probs=True)[0]
        scores.append(logs.gather(1, wanted.unsqueeze(1)).flatten().tolist())
    return scores


def _difference(
    folder: Path, task: Any, sentences: list[Pair], expected: list[list[float]], translates: bool
) -> float:
    """Largest absolute difference between CTranslate2's scores of the tokens and `expected`."""
    import ctranslate2

    targets = [[task.target_dictionary[i] for i in target] for _, target in sentences]
    options = {"device": "cpu", "intra_threads": 1}
    if translates:
        engine = ctranslate2.Translator(str(folder), **options)
        sources = [[task.source_dictionary[i] for i in source] for source, _ in sentences]
        found = engine.score_batch(sources, targets)
    else:
        engine = ctranslate2.Generator(str(folder), **options)
        end = task.target_dictionary.eos_word
        found = engine.score_batch([[end, *target, end] for target in targets])
    largest = 0.0
    for result, wanted in zip(found, expected, strict=True):
        pairs = zip(result.log_probs, wanted, strict=True)
        largest = max(largest, *(abs(a - b) for a, b in pairs))
    return largest

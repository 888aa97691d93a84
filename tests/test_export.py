"""Export to CTranslate2: both engines agree, and what fails leaves nothing behind."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from small_models import (
    TASK,
    build_language_model,
    build_model,
    checkpoint_of,
    dictionary,
)

from fairseq_autosize import export
from fairseq_autosize.checkpoint import write_checkpoint
from fairseq_autosize.cli import main
from fairseq_autosize.compaction import compact
from fairseq_autosize.export import ExportError, export_ctranslate2

ctranslate2 = pytest.importorskip("ctranslate2")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("dict.xx.txt", "dict.yy.txt", "dict.txt"):
        dictionary().save(str(folder / name))
    return folder


def translation_checkpoint(data: Path, alive: int = 3, **options):
    model, args = build_model(task="translation", **options)
    with torch.no_grad():
        for layer in (*model.encoder.layers, model.decoder.layers[0]):
            layer.fc1.weight[alive:] = 0
            layer.fc1.bias[alive:] = 0.3
    task = TASK | {"data": str(data), "source_lang": "xx", "target_lang": "yy"}
    return checkpoint_of(model, args, task)


@pytest.mark.parametrize("alive", [0, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"share_all_embeddings": True},
        {
            "activation_fn": "gelu",
            "encoder_normalize_before": True,
            "decoder_normalize_before": True,
        },
    ],
    ids=["post-norm relu", "pre-norm gelu"],
)
def test_both_engines_agree(data, tmp_path, alive, options):
    checkpoint = translation_checkpoint(data, alive, **options)
    agreement = export_ctranslate2(checkpoint, tmp_path / "ct2")
    assert agreement.tokens > 100 and agreement.largest < 1e-4 and agreement.quantized is None
    translator = ctranslate2.Translator(str(tmp_path / "ct2"), device="cpu")
    (result,) = translator.translate_batch([["a", "b"]], max_decoding_length=3)
    assert result.hypotheses
    for small in (compact(checkpoint), compact(checkpoint, uniform=True)):
        again = export_ctranslate2(small.checkpoint, tmp_path / "ct2", force=True)
        assert again.largest < 1e-4


def test_settings_of_hydra_and_of_old_checkpoints(data, tmp_path):
    checkpoint = translation_checkpoint(data)
    args = checkpoint["cfg"]["model"]
    old = {"args": Namespace(**(checkpoint["cfg"]["task"] | vars(args))), "cfg": None}
    assert export_ctranslate2(checkpoint | old, tmp_path / "old").largest < 1e-4
    sizes = ("layers", "embed_dim", "ffn_embed_dim", "attention_heads")
    settings = vars(args)
    for side in ("encoder", "decoder"):
        settings[side] = {name: settings.pop(f"{side}_{name}") for name in sizes}
    checkpoint["cfg"]["model"] = settings
    assert export_ctranslate2(checkpoint, tmp_path / "hydra").largest < 1e-4


def test_language_model(data, tmp_path):
    model, args = build_language_model(add_bos_token=False)
    with torch.no_grad():
        model.decoder.layers[0].fc1.weight.zero_()
    task = {"_name": "language_modeling", "data": str(data), "add_bos_token": False}
    checkpoint = checkpoint_of(model, args, task)
    assert export_ctranslate2(checkpoint, tmp_path / "ct2").largest < 1e-4


def test_quantized_model_is_smaller_and_its_difference_is_told(data, tmp_path):
    checkpoint = translation_checkpoint(data)
    export_ctranslate2(checkpoint, tmp_path / "float32")
    agreement = export_ctranslate2(checkpoint, tmp_path / "int8", quantization="int8")
    assert agreement.quantized > agreement.largest
    sizes = [(tmp_path / name / "model.bin").stat().st_size for name in ("float32", "int8")]
    assert sizes[1] < sizes[0]


def test_vocabularies_can_be_elsewhere(data, tmp_path):
    checkpoint = translation_checkpoint(Path("gone"))
    with pytest.raises(ExportError, match="folder gone does not exist; say with --data-dir"):
        export_ctranslate2(checkpoint, tmp_path / "ct2")
    export_ctranslate2(checkpoint, tmp_path / "ct2", data=data)
    with pytest.raises(ExportError, match=r"do not load from .* \(--data-dir; --sou"):
        export_ctranslate2(checkpoint, tmp_path / "other", data=tmp_path)


@pytest.mark.parametrize("side", ["xx", "yy"])
def test_vocabularies_of_another_training_are_refused(side, data, tmp_path):
    checkpoint = translation_checkpoint(data)
    entries = len(checkpoint["model"]["encoder.embed_tokens.weight"])
    with (data / f"dict.{side}.txt").open("a") as words:
        words.write("another 1\n")
    told = f"data, with special symbols, has {entries + 1} entries, the .*coder {entries}; say with"
    with pytest.raises(ExportError, match=told):
        export_ctranslate2(checkpoint, tmp_path / "ct2")


def test_languages_can_be_told(data, tmp_path, capsys):
    """Where the settings do not name them, and there are no binarized files that do."""
    checkpoint = translation_checkpoint(data)
    del checkpoint["cfg"]["task"]["source_lang"], checkpoint["cfg"]["task"]["target_lang"]
    write_checkpoint(checkpoint, tmp_path / "model.pt")
    command = ["export", str(tmp_path / "model.pt"), str(tmp_path / "ct2"), "--format=ctranslate2"]
    assert main(command) == 2
    assert "--source-lang and --target-lang, if they are unknown" in capsys.readouterr().err
    assert main([*command, "--source-lang", "xx", "--target-lang", "yy"]) == 0
    assert (tmp_path / "ct2" / "model.bin").exists()


def test_a_vocabulary_without_words_is_refused(data, tmp_path):
    (data / "dict.yy.txt").write_text("")
    with pytest.raises(ExportError, match=r"data: a vocabulary there, dict\.\*\.txt, has no words"):
        export_ctranslate2(translation_checkpoint(data), tmp_path / "ct2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_what_exists_is_kept_without_force(data, tmp_path):
    checkpoint = translation_checkpoint(data)
    (tmp_path / "ct2").mkdir()
    (tmp_path / "ct2" / "mine").write_text("mine")
    with pytest.raises(ExportError, match=r"exists already; .* --force"):
        export_ctranslate2(checkpoint, tmp_path / "ct2")
    assert (tmp_path / "ct2" / "mine").read_text() == "mine"
    with pytest.raises(ExportError, match=r"has other files \(mine\); choose another name"):
        export_ctranslate2(checkpoint, tmp_path / "ct2", force=True)
    assert (tmp_path / "ct2" / "mine").read_text() == "mine"
    with pytest.raises(ExportError, match="exists and is no folder"):
        export_ctranslate2(checkpoint, tmp_path / "ct2" / "mine", force=True)


def test_a_model_stays_where_it_cannot_be_replaced(data, tmp_path, monkeypatch):
    checkpoint = translation_checkpoint(data)
    export_ctranslate2(checkpoint, tmp_path / "ct2")
    model = (tmp_path / "ct2" / "model.bin").read_bytes()
    rename = Path.rename

    def fail_once(path: Path, target: Path) -> Path:
        if path.name == "plain":
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(ExportError, match=r"ct2: cannot write: Permission denied"):
        export_ctranslate2(checkpoint, tmp_path / "ct2", force=True)
    assert (tmp_path / "ct2" / "model.bin").read_bytes() == model
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ct2", "data"]


def test_a_wrong_result_is_not_written(data, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_difference", lambda *_: 0.01)
    with pytest.raises(ExportError, match=r"differ by 0\.01 in a token's log probability"):
        export_ctranslate2(translation_checkpoint(data), tmp_path / "ct2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_what_ctranslate2_cannot_convert_is_refused_with_its_reason(data, tmp_path):
    checkpoint = translation_checkpoint(data, no_token_positional_embeddings=True)
    with pytest.raises(ExportError, match=r"cannot convert the model: .*positional"):
        export_ctranslate2(checkpoint, tmp_path / "ct2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"adaptive_softmax_cutoff": "8"}, "with --adaptive-softmax-cutoff"),
        ({"no_cross_attention": True}, "with --no-cross-attention"),
        ({"encoder_layers": 0}, "without encoder layers"),
    ],
)
def test_models_that_ctranslate2_does_not_have(data, tmp_path, options, told):
    shared = (
        {}
        if "adaptive_softmax_cutoff" not in options
        else {"share_all_embeddings": False, "share_decoder_input_output_embed": False}
    )
    checkpoint = translation_checkpoint(data, **options, **shared)
    with pytest.raises(ExportError, match=f"^CTranslate2 has no models {told}$"):
        export_ctranslate2(checkpoint, tmp_path / "ct2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_without_ctranslate2_the_message_says_what_to_install(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2.converters", None)
    with pytest.raises(ExportError, match="pip install ctranslate2"):
        export_ctranslate2(translation_checkpoint(data), tmp_path / "ct2")

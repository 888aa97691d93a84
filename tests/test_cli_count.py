"""`fairseq-autosize count`: its numbers against real fairseq models, its output, its errors."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, TINY_TRAINING, USER_DIR
from small_models import TASK, build_language_model, build_model, checkpoint_of

from fairseq_autosize import __version__
from fairseq_autosize.checkpoint import read_checkpoint
from fairseq_autosize.cli import main
from fairseq_autosize.groups import GroupError
from fairseq_autosize.report import count_neurons, format_count, signature

COMMAND = Path(sys.executable).with_name("fairseq-autosize")
VERSIONS = rf"zero:exact\|autosize:{re.escape(__version__)}\|fairseq:[\d.]+\|torch:[\d.]+"


def distinct_parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with three neurons dead in encoder.layers.1 and all in decoder.layers.0."""
    model, args = build_model(share_all_embeddings=True)
    with torch.no_grad():
        model.encoder.layers[1].fc1.weight[[0, 4, 11]] = 0
        model.encoder.layers[1].fc1.bias[4] = 0  # the others are constants, and dead as well
        model.decoder.layers[0].fc1.weight.zero_()
    torch.save(checkpoint_of(model, args), tmp_path / "checkpoint.pt")
    return tmp_path / "checkpoint.pt"


# --- numbers ----------------------------------------------------------------------------------


def test_counts(saved):
    count = count_neurons(read_checkpoint(saved))
    kinds = {"layers", "ffn_neurons", "attention", "attention_heads"}
    assert set(count) == kinds | {"parameters", "signature", "updates"}
    assert count["attention_heads"] == {"total": 12, "alive": 12, "pruned": 0}
    assert count["layers"] == [
        {"name": name, "kind": kind, "total": total, "alive": total - pruned, "pruned": pruned}
        for name, kind, total, pruned in [
            ("encoder.layers.0", "encoder-ffn", 12, 0),
            ("encoder.layers.1", "encoder-ffn", 12, 3),
            ("decoder.layers.0", "decoder-ffn", 10, 10),
            ("decoder.layers.1", "decoder-ffn", 10, 0),
        ]
    ]
    assert count["ffn_neurons"] == {"total": 44, "alive": 31, "pruned": 13}
    total = count["parameters"]["total"]
    assert count["parameters"] == {"total": total, "compact": total - 13 * (2 * 8 + 1)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share_decoder_input_output_embed": True},
        {"share_all_embeddings": True},
        {"encoder_learned_pos": True, "decoder_learned_pos": True},
        {"layernorm_embedding": True, "encoder_normalize_before": True},
        {"adaptive_softmax_cutoff": "4,8", "adaptive_softmax_dropout": 0},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
@pytest.mark.parametrize("copied_apart", [False, True], ids=["tied", "copied apart"])
def test_parameters_are_those_of_the_model(options, copied_apart):
    """Tied parameters count once, also where saving has copied them apart, as from a GPU."""
    model, args = build_model(**options)
    checkpoint = checkpoint_of(model, args)
    if copied_apart:
        checkpoint["model"] = {k: v.clone() for k, v in checkpoint["model"].items()}
    assert count_neurons(checkpoint)["parameters"]["total"] == distinct_parameters(model)


@pytest.mark.parametrize("copied_apart", [False, True], ids=["tied", "copied apart"])
def test_models_of_several_pairs_count_shared_layers_once(copied_apart):
    """As fairseq's multilingual_transformer may have them: one encoder, two decoders."""
    one, other = (build_model(encoder_normalize_before=True)[0] for _ in range(2))
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    other.encoder = one.encoder
    both = torch.nn.ModuleDict({"models": torch.nn.ModuleDict({"a-b": one, "c-d": other})})
    state = both.state_dict()
    if copied_apart:
        state = {name: tensor.clone() for name, tensor in state.items()}
    count = count_neurons({"model": state, "cfg": {}})
    assert count["parameters"]["total"] == distinct_parameters(both)
    assert count["ffn_neurons"]["total"] == 2 * 12 + 4 * 10


def test_equal_zero_matrices_are_no_ties():
    model, args = build_model()
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.fc1.weight.zero_()
    count = count_neurons(checkpoint_of(model, args))
    assert count["parameters"]["total"] == distinct_parameters(model)
    assert count["ffn_neurons"]["pruned"] == 24


def test_compact_is_the_size_of_a_narrower_model():
    model, args = build_model()
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.fc1.weight[5:] = 0
    narrow, _ = build_model(encoder_ffn_embed_dim=5)
    count = count_neurons(checkpoint_of(model, args))
    assert count["parameters"]["compact"] == distinct_parameters(narrow)


def test_shared_layers_count_once():
    model, args = build_model()
    model.encoder.layers[1] = model.encoder.layers[0]
    with torch.no_grad():
        model.encoder.layers[0].fc1.weight[:2] = 0
    count = count_neurons(checkpoint_of(model, args))
    assert [layer["name"] for layer in count["layers"][:2]] == [
        "encoder.layers.0",
        "decoder.layers.0",
    ]
    total = distinct_parameters(model)
    assert count["parameters"] == {"total": total, "compact": total - 2 * 17}


def test_language_model():
    model, args = build_language_model()
    count = count_neurons(checkpoint_of(model, args))
    assert [layer["kind"] for layer in count["layers"]] == ["decoder-ffn", "decoder-ffn"]
    assert count["parameters"]["total"] == distinct_parameters(model)


def test_negative_zero_is_dead_and_tiny_is_alive():
    model, args = build_model()
    with torch.no_grad():
        weight = model.encoder.layers[0].fc1.weight
        weight[0] = -0.0
        weight[1] = 0.0
        weight[1, 3] = 1e-45
    assert count_neurons(checkpoint_of(model, args))["layers"][0]["pruned"] == 1


def test_layer_without_neurons(saved):
    checkpoint = read_checkpoint(saved)
    state = checkpoint["model"]
    state["encoder.layers.0.fc1.weight"] = torch.zeros(0, 8)
    state["encoder.layers.0.fc1.bias"] = torch.zeros(0)
    state["encoder.layers.0.fc2.weight"] = torch.zeros(8, 0)
    count = count_neurons(checkpoint)
    assert count["layers"][0]["total"] == 0
    assert re.search(r"encoder\.layers\.0 +0 +0 +0 +-\n", format_count(count))


def test_model_without_feed_forward_layers():
    with pytest.raises(GroupError, match="embed"):
        count_neurons({"model": {"embed.weight": torch.ones(2, 2)}})


# --- the signature ----------------------------------------------------------------------------


def test_signature_of_the_settings(saved):
    expected = (
        r"prox:l21\|strength:0\.5\|step:schedule\|groups:ffn\|bias:yes\|start:0\|seed:7\|"
        rf"updates:40\|{VERSIONS}"
    )
    assert re.fullmatch(expected, count_neurons(read_checkpoint(saved))["signature"])


def signature_of(task, **rest):
    model, args = build_model()
    return count_neurons({**checkpoint_of(model, args, task), **rest})["signature"]


def test_signature_of_other_settings():
    task = {**TASK, "prox": "linf1", "prox_bias": False, "prox_groups": "encoder-ffn"}
    task |= {"prox_step_size": "0.1", "prox_start_update": 50, "prox_strength": 2}
    expected = "prox:linf1|strength:2|step:0.1|groups:encoder-ffn|bias:no|start:50|seed:7|"
    assert signature_of(task).startswith(expected)


def test_default_strength_is_taken_from_where_the_task_recorded_it():
    task = {**TASK, "prox_strength": None}
    assert "|strength:default|" in signature_of(task)
    recorded = {"TranslationAutosizeTask": {"prox_strength": 1.25}}
    assert "|strength:1.25|" in signature_of(task, extra_state=recorded)


@pytest.mark.parametrize("task", [{"_name": "translation"}, {**TASK, "prox": "none"}])
def test_signature_without_prox(task):
    assert re.fullmatch(rf"prox:none\|seed:7\|updates:40\|{VERSIONS}", signature_of(task))


def test_signature_of_old_checkpoints():
    old = argparse.Namespace(arch="transformer", seed=3)
    assert signature_of(None, cfg=None, args=old).startswith("prox:none|seed:3|updates:40|")
    # Without settings nobody knows whether there was a proximal step.
    assert signature_of(None, cfg=None).startswith("prox:unknown|updates:40|")


def test_signature_ignores_what_are_no_values():
    hostile = {**TASK, "prox_groups": ["ffn"], "prox_strength": {"a": 1}, "prox": "l21\x1b[31m\n"}
    line = signature_of(hostile, optimizer_history=[5], extra_state=[1])
    assert line.startswith("prox:l21?[31m?|strength:default|step:schedule|groups:ffn|")


def test_signature_is_one_function_of_plain_settings():
    settings = {**TASK, "seed": 1, "updates": 1440}
    expected = (
        "prox:l21|strength:0.5|step:schedule|groups:ffn|bias:yes|start:0|seed:1|updates:1440|"
    )
    assert signature(settings).startswith(expected)
    assert "updates" not in signature({**TASK, "seed": 1, "updates": None})


# --- the command ------------------------------------------------------------------------------


def test_table(saved, capsys):
    assert main(["count", str(saved)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = [line.split() for line in out.splitlines()]
    for row in (
        ["layer", "total", "alive", "pruned", "pruned", "%"],
        ["encoder.layers.1", "12", "9", "3", "25.0"],
        ["decoder.layers.0", "10", "0", "10", "100.0"],
        ["encoder", "24", "21", "3", "12.5"],
        ["decoder", "20", "10", "10", "50.0"],
        ["all", "44", "31", "13", "29.5"],
    ):
        assert row in rows
    total = count_neurons(read_checkpoint(saved))["parameters"]["total"]
    compact = total - 13 * 17
    share = f"{100 * compact / total:.1f}"
    assert f"parameters: {total:,} now, {compact:,} after compaction ({share} %)" in out
    assert "\nsignature: prox:l21|strength:0.5|" in out
    table = out.split("\n\n")[0].splitlines()
    assert len({len(line) for line in table}) == 1, "the columns are aligned"


def test_json(saved, capsys):
    assert main(["count", str(saved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == count_neurons(read_checkpoint(saved))


def test_several_checkpoints(saved, capsys):
    count = count_neurons(read_checkpoint(saved))
    assert main(["count", "--json", str(saved), str(saved)]) == 0
    assert json.loads(capsys.readouterr().out) == [{"path": str(saved), **count}] * 2
    assert main(["count", str(saved), str(saved)]) == 0
    block = f"{saved}\n{format_count(count)}\n"
    assert capsys.readouterr().out == f"{block}\n{block}"


def test_nan_is_alive_and_warned_of(tmp_path, capsys):
    model, args = build_model()
    with torch.no_grad():
        model.encoder.layers[0].fc1.weight[0] = float("nan")
    torch.save(checkpoint_of(model, args), tmp_path / "nan.pt")
    assert main(["count", str(tmp_path / "nan.pt"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["layers"][0]["alive"] == 12
    assert re.fullmatch(r"fairseq-autosize: warning: .*encoder\.layers\.0: .* NaN; .*\n", err)


def hostile(tmp_path):
    class Gadget:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'canary')!r}, 'w')",)

    torch.save({"model": {}, "extra_state": Gadget()}, tmp_path / "hostile.pt")
    return tmp_path / "hostile.pt"


def wrong_files(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    torch.save({"model": {"a\n\x1b[31mb": torch.ones(2, 2)}}, tmp_path / "no_layers.pt")
    torch.save({"model": {"a": torch.ones(1)}, "cfg": 3}, tmp_path / "cfg.pt")
    unequal = {"encoder.layers.0.fc1.weight": torch.ones(3, 2)}
    unequal["encoder.layers.0.fc2.weight"] = torch.ones(2, 4)
    torch.save({"model": unequal}, tmp_path / "shapes.pt")
    names = ("none.pt", "text.pt", "foreign.pt", "no_layers.pt", "cfg.pt", "shapes.pt")
    return [tmp_path, hostile(tmp_path), *(tmp_path / name for name in names)]


def test_errors_are_one_line_and_exit_status_2(tmp_path, saved, capsys):
    for path in wrong_files(tmp_path):
        assert main(["count", str(path)]) == 2
        assert capsys.readouterr().out == ""
        assert main(["count", str(path), str(saved)]) == 2
        out, err = capsys.readouterr()
        assert out == f"{saved}\n{format_count(count_neurons(read_checkpoint(saved)))}\n"
        assert err.startswith(f"fairseq-autosize: error: {path}: ")
        assert err.count("\n") == 1
        assert "\x1b" not in err
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("command", ["report", "export", "train-compacting"])
def test_names_that_the_system_refuses(command, saved, capsys):
    long = "x" * 300
    options = {
        "report": [long, "--output", "page.html"],
        "export": [saved, "ct2", "--format", "ctranslate2", "--data-dir", long],
        "train-compacting": f"data --arch transformer --max-epoch 1 --save-dir {long}".split(),
    }
    assert main([command, *map(str, options[command])]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fairseq-autosize: error: x") and "File name too long" in error
    assert error.count("\n") == 1


def run_command(*arguments, **options):
    return subprocess.run(
        [COMMAND, *map(str, arguments)], capture_output=True, text=True, **options
    )


def test_installed_command(saved, tmp_path):
    result = run_command("count", saved, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["ffn_neurons"]["pruned"] == 13
    result = run_command("count", hostile(tmp_path))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "carries code: it names builtins.exec" in result.stderr
    assert not (tmp_path / "canary").exists()


def test_reader_that_goes_away(saved):
    command = f"set -o pipefail; '{COMMAND}' count '{saved}' --json | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_standard_output_that_is_full(saved):
    command = f"'{COMMAND}' count '{saved}' > /dev/full"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    told = "fairseq-autosize: error: standard output: No space left on device\n"
    assert (result.returncode, result.stderr) == (2, told)


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--help"], "example: fairseq-autosize count checkpoints/checkpoint_last.pt"),
        (["count", "--help"], "example: fairseq-autosize count"),
        (["--version"], f"fairseq-autosize {__version__}"),
    ],
)
def test_help_and_version(arguments, told, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["count"], ["shrink", "x.pt"], ["count", "--xml", "x"]])
def test_wrong_command_lines(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "fairseq-autosize" in capsys.readouterr().err


@pytest.mark.heavy
def test_checkpoint_of_a_real_training_run(corpus, run, tmp_path):
    train = ("fairseq_cli.train", corpus, "--user-dir", USER_DIR, *TINY_MODEL, *TINY_TRAINING)
    # Strong enough that rows of the usual norm of 0.6 die in these few updates.
    shrink = ("--prox", "l21", "--prox-strength", 8, "--max-update", 30)
    log = run(*train, *shrink, "--disable-validation", "--save-dir", tmp_path).stdout
    count = count_neurons(read_checkpoint(tmp_path / "checkpoint_last.pt"))
    logged = re.search(r"num\. shared model params: ([\d,]+)", log)[1]
    assert count["parameters"]["total"] == int(logged.replace(",", ""))
    assert count["ffn_neurons"]["pruned"] > 0
    line = re.search(r"signature: (\S+)", log)[1]  # written at the start, so without updates
    assert count["signature"].replace("|updates:30", "") == line

"""Targets and the freeze through fairseq's real programs, judged by the saved checkpoints."""

import argparse
import re

import pytest
import torch
from conftest import TINY_MODEL, TINY_TRAINING
from fairseq.tasks import setup_task
from programs import run_program
from test_training import AUTOSIZE, assert_same_checkpoints, count_dead, layers_of, logged

from fairseq_autosize import staged_training
from fairseq_autosize.checkpoint import read_checkpoint, write_checkpoint
from fairseq_autosize.cli import main
from fairseq_autosize.compaction import compact
from fairseq_autosize.export import export_ctranslate2
from fairseq_autosize.groups import dead_neurons, feed_forward_in_state
from fairseq_autosize.report import count_neurons
from fairseq_autosize.tasks.multilingual_translation_autosize import (
    MultilingualTranslationAutosizeTask,
)

pytestmark = pytest.mark.heavy

TRAIN = ("fairseq_cli.train", *AUTOSIZE, *TINY_MODEL, *TINY_TRAINING)


def test_target_is_met_and_interrupted_training_equals_uninterrupted(corpus, run, tmp_path):
    """Interrupted on the way to the target, and again after the freeze."""
    train = (*TRAIN, corpus, "--prox", "linf1", "--prox-target-sparsity", "0.6", "--store-ema")
    train += ("--prox-freeze-update", "24")
    whole = run(*train, "--max-update", "40", "--save-dir", tmp_path / "whole").stdout
    first, _, last = (
        run(*train, "--max-update", end, "--save-dir", tmp_path / "parts").stdout
        for end in (13, 33, 40)
    )
    checkpoint = tmp_path / "whole" / "checkpoint_last.pt"
    assert_same_checkpoints(checkpoint, tmp_path / "parts" / "checkpoint_last.pt")

    assert count_dead(checkpoint) == (58, 96)
    points = {int(p["num_updates"]): p for p in logged(whole)}
    assert all(p["neurons_pruned"] <= 58 for p in points.values())
    assert [points[n]["neurons_pruned"] for n in (24, 32, 40)] == [58] * 3
    assert points[12]["prox_strength"] > 0 and points[12]["prox_threshold"] > 0
    assert points[30]["prox_threshold"] == 0
    warning = "ends this run before --prox-freeze-update 24, when the target is reached"
    assert warning in first and warning not in last
    assert "the freeze, after" not in whole
    assert "96 groups (rows of fc1 with bias); 58 of them dead after 24 updates" in whole
    for output in (whole, last):  # also where it goes on beyond its freeze
        assert "frozen after update 24: 58 of 96 groups are dead and stay so" in output
    # The average is zero where the model is, too.
    averages = feed_forward_in_state(read_checkpoint(checkpoint)["extra_state"]["ema"])
    for layer, average in zip(layers_of(checkpoint), averages, strict=True):
        assert torch.equal(dead_neurons(layer.fc1_weight), dead_neurons(average.fc1_weight))
    assert "|sparsity:0.6|" in count_neurons(read_checkpoint(checkpoint))["signature"]


@pytest.mark.parametrize("measured", ["loss", "bleu"])
def test_best_checkpoint_and_patience_are_about_the_time_after_the_freeze(
    measured, corpus, run, tmp_path
):
    metric, sign = f"{measured}_after_freeze", {"loss": 1, "bleu": -1}[measured]
    train = (*TRAIN, corpus, "--prox", "l21", "--prox-target-sparsity", "0.6", "--patience", "2")
    train += ("--prox-freeze-update", "24", "--best-checkpoint-metric", metric)
    if measured == "bleu":
        train += ("--maximize-best-checkpoint-metric", "--eval-bleu")
        train += ("--eval-bleu-args", '{"beam": 1, "max_len_b": 9}')
    train += ("--validate-interval-updates", "4", "--save-interval-updates", "4")
    train += ("--keep-best-checkpoints", "2")
    train += ("--save-dir", tmp_path, "--max-update")
    best = tmp_path / "checkpoint_best.pt"
    first, second = run(*train, "13").stdout, run(*train, "200", "--lr", "0.05").stdout
    points = logged(first, "valid") + logged(second, "valid")
    values = {p["valid_num_updates"]: p[f"valid_{metric}"] for p in points}
    before = [sign * value for update, value in values.items() if update < 24]
    assert len(set(before)) > 5 and before == sorted(before, reverse=True)
    after = {n: value for n, value in values.items() if n >= 24}
    assert 24 in after and max(after.values()) > 0.01
    assert before[-1] > max(sign * value for value in after.values()), "worse than any"
    found = {p["valid_num_updates"]: p[f"valid_{measured}"] for p in points}
    assert after == pytest.approx({n: found[n] for n in after}, abs=1e-8)
    assert len(list(tmp_path.glob("checkpoint.best_*"))) == 2
    chosen = {"loss": min, "bleu": max}[measured](after.values())
    assert read_checkpoint(best)["extra_state"]["best"] == chosen
    assert count_dead(best) == (58, 96)
    # Patience is lost, and only now.
    assert "early stop since valid performance hasn't improved for last 2 runs" in second
    assert 32 <= max(values) < 200


def test_the_best_value_of_another_metric_is_not_gone_on_with(corpus, run, tmp_path):
    train = (*TRAIN, corpus, "--save-dir", tmp_path, "--max-update")
    run(*train, "20")  # a model that the pruned one does not come up to
    train = (*train, "30", "--prox", "l21", "--prox-target-sparsity", "0.9")
    train += ("--prox-freeze-update", "25", "--best-checkpoint-metric", "loss_after_freeze")
    result = run_program(*train)
    assert result.returncode != 0
    assert "is of another metric; add --reset-meters once" in result.stdout.splitlines()[-1]
    run(*train, "--reset-meters")
    assert count_dead(tmp_path / "checkpoint_best.pt") == (86, 96)
    run(*train, "--max-update", "40")  # from here on it is the same metric
    result = run_program(*train, "--max-update", "50", "--reset-dataloader")
    assert result.returncode != 0
    told = "may be of another metric, which --reset-dataloader does not hand over; add --reset-met"
    assert told in result.stdout.splitlines()[-1]


def test_a_freeze_of_other_options_does_not_count(corpus, run, tmp_path):
    """A run with a target, frozen after 12 updates, goes on with a strength, or a larger target."""
    train = (*TRAIN, corpus, "--prox", "l21", "--save-dir", tmp_path, "--max-update")
    run(*train, "20", "--prox-target-sparsity", "0.25")
    last = tmp_path / "checkpoint_last.pt"
    assert count_dead(last) == (24, 96)
    other = (*train, "40", "--restore-file", last, "--save-dir", tmp_path / "other")
    output = run(*other, "--prox-strength", "10").stdout
    assert "the checkpoint's freeze, at update 12, was asked for by other options" in output
    assert "at update 12, held 24 dead groups at zero; until the next freeze they can" in output
    assert "frozen after" not in output and count_dead(tmp_path / "other" / last.name)[0] > 30
    more = run(*train, "50", "--prox-target-sparsity=0.75").stdout
    assert "72 of them dead after 26 updates" in more and "frozen after update 26: 72 of" in more
    assert "has passed" not in more
    # The same options: the freeze stays where it was, whatever --max-update.
    assert (
        "frozen after update 26: 72 of" in run(*train, "60", "--prox-target-sparsity=0.75").stdout
    )
    late = run(*train, "70", "--prox-target-sparsity=0.875", "--prox-freeze-update", "60").stdout
    assert "frozen after update 60: 84 of" in late
    assert "--prox-freeze-update 60 has passed, so all that is to die is cut now" in late


def test_an_automatic_freeze_of_other_options_is_waited_for_anew(corpus, run, tmp_path):
    """The checkpoint is of a run of which 9 of 12 updates of patience are over, or all."""
    train = (*TRAIN, corpus, "--prox", "l21", "--prox-freeze-update", "auto")
    train += ("--prox-freeze-patience", "12", "--disable-validation", "--save-dir")
    run(*train, tmp_path, "--max-update", "6", "--prox-strength", "0.001")
    last = tmp_path / "checkpoint_last.pt"

    def goes_on(*options: str, drop: str = "", **entry: int) -> str:
        checkpoint = read_checkpoint(last)
        checkpoint["extra_state"]["TranslationAutosizeTask"] |= {"prox_died": 1, **entry}
        if drop:
            checkpoint[drop] = None
        write_checkpoint(checkpoint, tmp_path / "other.pt", force=True)
        restored = ("--restore-file", tmp_path / "other.pt", "--no-save")
        return run(*train, tmp_path / "other", *restored, *options).stdout

    waits, strength = {"prox_quiet_updates": 9}, ("--prox-strength", "0.001")
    more = ("--max-update", "11")
    assert "frozen after update 9: 0 of 96" in goes_on(*more, *strength, **waits)
    for options in (
        (*more, "--prox-strength", "0.002"),
        (*more, *strength, "--prox-couple"),
        (*more, *strength, "--prox-layer-scale", "ffn:2"),
        ("--max-update", "5", *strength, "--reset-optimizer"),
    ):
        assert "frozen after" not in goes_on(*options, **waits), options
    # As an average of checkpoints: fairseq begins at update 0.
    anew = goes_on("--max-update", "5", *strength, drop="last_optimizer_state", **waits)
    assert "frozen after" not in anew

    frozen = {"prox_frozen_at": 6}
    assert "frozen after update 6: 0 of 96" in goes_on(*more, *strength, **frozen)
    output = goes_on(*more, "--prox-strength", "10", **frozen)
    assert "freeze, at update 6, was asked for by other options; it does not count" in output
    assert "frozen after" not in output


def test_a_share_of_an_earlier_length_is_told(corpus, run, tmp_path):
    train = (*TRAIN, corpus, "--prox", "l21", "--prox-target-sparsity", "0.5")
    train += ("--prox-freeze-update", "0.5", "--save-dir", tmp_path, "--disable-validation")
    told = "the freeze stays after 15 updates, as planned when the run began; --max-update"
    assert told not in run(*train, "--max-update", "30", "--max-epoch", "1").stdout
    output = run(*train, "--max-update", "60", "--max-epoch", "4").stdout
    assert f"{told} 60 would make it 30. Give" in output and "frozen after update 15" in output


def test_the_best_value_of_a_freeze_that_does_not_count_is_not_gone_on_with(corpus, run, tmp_path):
    """Else the best checkpoint would stay one of more neurons than the new target leaves."""
    metric = ("--best-checkpoint-metric", "loss_after_freeze")
    train = (*TRAIN, corpus, "--prox", "l21", "--save-dir", tmp_path, *metric, "--max-update")
    best = tmp_path / "checkpoint_best.pt"
    run(*train, "12", "--prox-target-sparsity", "0.25", "--prox-freeze-update", "20")
    # As yet none was measured after the freeze.
    run(*train, "24", "--prox-target-sparsity", "0.5", "--prox-freeze-update", "20")
    assert count_dead(best) == (48, 96)
    more = (*train, "40", "--prox-target-sparsity", "0.9")
    result = run_program(*more)
    assert result.returncode != 0
    told = "is of the freeze at update 20, which does not count any more; add --reset-meters once"
    assert told in result.stdout.splitlines()[-1]
    run(*more, "--reset-meters")
    assert count_dead(best) == (86, 96)
    run(*more, "--max-update", "44")  # from here on it is the same freeze


def test_a_default_freeze_needs_updates_that_are_left(corpus, run, tmp_path):
    train = (*TRAIN, corpus, "--save-dir", tmp_path, "--max-update", "13")
    run(*train)
    last = tmp_path / "checkpoint_last.pt"
    for freeze in ((), ("--prox-freeze-update", "0.5")):
        result = run_program(*train, "--prox", "l21", "--prox-target-sparsity", "0.5", *freeze)
        assert result.returncode != 0
        told = "error: --max-update 13: the training has 13 updates already, which leaves none"
        assert told in result.stdout.splitlines()[-1]
        assert count_dead(last) == (0, 96)
    target = ("--prox", "l21", "--prox-target-sparsity", "0.5")
    run(*train, *target, "--max-update", "20")
    assert count_dead(last) == (48, 96)
    run(*train, *target, "--max-update", "20")  # that its freeze has come is known


def test_training_on_without_prox_after_a_freeze_is_told(corpus, run, tmp_path):
    train = (*TRAIN, corpus, "--save-dir", tmp_path, "--max-update")
    told = "freeze, at update 12, held 48 dead groups at zero; without it they can come back. Give"
    pruned = (*train, "20", "--prox", "l21", "--prox-target-sparsity", "0.5")
    assert told not in run(*pruned).stdout
    last = tmp_path / "checkpoint_last.pt"
    small = compact(read_checkpoint(last), keep_optimizer=True)
    write_checkpoint(small.checkpoint, tmp_path / "small.pt")
    assert run(*train, "24").stdout.count(told) == 1
    assert count_dead(last)[0] < 48
    widths = [",".join(map(str, small.widths[side])) for side in ("encoder", "decoder")]
    sizes = ("--arch", "transformer_autosize", "--encoder-ffn-dims", widths[0])
    sizes += ("--decoder-ffn-dims", widths[1], "--save-dir", tmp_path / "small")
    output = run(*train, "24", *sizes, "--continue-once", tmp_path / "small.pt").stdout
    assert "come back" not in output


NO_BIAS = "--no-prox-bias"


def dead_rows(checkpoint):
    return [dead_neurons(layer.fc1_weight) for layer in layers_of(checkpoint)]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("--prox-strength", "7"), ("--prox-strength", "7", "--prox-couple")),
        (("--prox-strength", "7", NO_BIAS), ("--prox-strength", "7")),
        (("--prox-target-sparsity", "0.5"), ("--prox-target-sparsity", "0.5", "--prox-couple")),
    ],
)
def test_the_dead_stay_dead_in_groups_of_another_kind(first, then, corpus, run, tmp_path):
    """Resumed after the freeze with groups that have more in them, which is not zero."""
    train = (*TRAIN, corpus, "--prox", "l21", "--prox-freeze-update", "25", "--save-dir", tmp_path)
    last = tmp_path / "checkpoint_last.pt"
    first_output = run(*train, *first, "--max-update", "28").stdout
    assert (f"{NO_BIAS}: a row of zeros whose bias" in first_output) == (NO_BIAS in first)
    before = dead_rows(last)
    number = sum(int(dead.sum()) for dead in before)
    assert 10 < number < 80
    output = run(*train, *then, "--max-update", "50").stdout
    assert f"frozen after update 25: {number} of 96 groups are dead" in output
    assert all(map(torch.equal, before, dead_rows(last)))
    assert count_dead(last) == (number, 96)  # with their biases


def test_a_start_after_the_freeze_of_the_run_so_far(corpus, run, tmp_path):
    train = (*TRAIN, corpus, "--prox", "l21", "--prox-target-sparsity", "0.5")
    train += ("--save-dir", tmp_path, "--max-update", "100")
    run(*train, "--max-epoch", "1")
    late = run_program(*train, "--prox-start-update", "30", "--max-epoch", "5")
    assert late.returncode != 0
    told = "--prox-start-update 30: shrinking ends after 28 updates, as planned when the run began"
    assert told in late.stdout.splitlines()[-1]


def test_layers_without_a_second_moment_yet(corpus, run, tmp_path):
    """LayerDrop: those that the first update drops have no gradient, and Adam no state of them."""
    train = (*TRAIN, corpus, "--prox", "l21", "--prox-metric", "adam", "--max-update", "30")
    drop = ("--encoder-layerdrop", "0.5", "--decoder-layerdrop", "0.5")
    train += ("--prox-target-sparsity", "0.5", "--prox-freeze-update", "0.3")
    output = run(*train, *drop, "--save-dir", tmp_path).stdout
    assert "48 of them dead after 9 updates" in output and "|freeze:9|" in output
    assert "the freeze, after 9 updates, comes before the warm-up of the learning rate" in output
    assert count_dead(tmp_path / "checkpoint_last.pt") == (48, 96)


@pytest.mark.parametrize(
    ("target", "left"), [("--prox-target-sparsity=0.25", 18), ("--prox-target-parameters=0.1", 15)]
)
def test_target_of_every_layer_leaves_a_uniform_model(target, left, corpus, run, tmp_path):
    options = ("--prox", "l21", target, "--prox-target-scope", "layer", "--max-update", "20")
    output = run(*TRAIN, corpus, *options, "--save-dir", tmp_path).stdout
    told = " ".join([str(24 - left)] * 4)
    assert f"{told} of them dead, layer by layer, after 12 updates" in output
    checkpoint = read_checkpoint(tmp_path / "checkpoint_last.pt")
    count = count_neurons(checkpoint)
    assert [layer["alive"] for layer in count["layers"]] == [left] * 4
    assert "|scope:layer|" in count["signature"]
    model = compact(checkpoint, uniform=True).checkpoint["cfg"]["model"]
    assert (model.arch, model.encoder_ffn_embed_dim) == ("transformer", left)


@pytest.mark.parametrize(
    ("options", "share", "told"),
    [
        # Neurons make up for heads, of which a tenth rounds to none.
        ("all --prox-target-parameters 0.1", 0.1, None),
        ("all --prox-target-parameters 0.25", 0.25, None),
        ("attention --prox-target-parameters 0.1", 0.15, "0.1 .* 0.150 of the model's parameters"),
        ("attention --prox-target-sparsity 0.3", 0.15, "0.3 .* 0.250 of the groups"),
    ],
)
def test_target_of_every_layer_with_heads(options, share, told, corpus, run, tmp_path):
    four = ("--encoder-attention-heads", "4", "--decoder-attention-heads", "4")
    train = (*TRAIN, corpus, *four, "--prox", "l21", "--prox-groups", *options.split())
    train += ("--prox-target-scope", "layer", "--max-update", "20", "--save-dir", tmp_path)
    output = run(*train).stdout
    parameters = count_neurons(read_checkpoint(tmp_path / "checkpoint_last.pt"))["parameters"]
    assert 1 - parameters["compact"] / parameters["total"] == pytest.approx(share, abs=0.013)
    assert ("whole groups of every layer come to" in output) == (told is not None)
    assert told is None or re.search(told, output)


def test_scale_of_layers(corpus, run, tmp_path):
    """A block that is as good as not shrunk, and a layer of it that is all the same."""
    target = ("--prox-target-sparsity", "0.5", "--prox-freeze-update", "20", "--max-update", "24")
    scale = ("--prox-layer-scale", "encoder-ffn:1e-6, encoder.layers.1:1")
    train = (*TRAIN, corpus, "--prox", "l21", "--disable-validation", "--save-dir", tmp_path)
    output = run(*train, *target, *scale).stdout
    assert "|groups:ffn|bias:yes|scale:encoder-ffn:1e-6, encoder.layers.1:1|start:0|" in output
    dead = {x.name: int(x.dead().sum()) for x in layers_of(tmp_path / "checkpoint_last.pt")}
    assert dead.pop("encoder.layers.0") == 0
    assert len(dead) == 3 and all(dead.values()) and sum(dead.values()) == 48


def test_target_in_parameters_with_everything_on(corpus, run, tmp_path):
    """Half precision, gelu, coupled groups, Adam's metric; the default freeze, which stays."""
    train = (*TRAIN, corpus, "--prox", "l21", "--prox-target-parameters", "0.15", "--fp16")
    train += ("--fp16-no-flatten-grads", "--fp16-init-scale", "1", "--activation-fn", "gelu")
    train += ("--prox-couple", "--prox-metric", "adam", "--save-dir", tmp_path)
    assert "frozen after update 14: " in run(*train, "--max-update", "30").stdout
    assert "frozen after update 14: " in run(*train, "--max-update", "36").stdout
    count = count_neurons(read_checkpoint(tmp_path / "checkpoint_last.pt"))
    before, after = count["parameters"]["total"], count["parameters"]["compact"]
    assert 0 <= before - after - 0.15 * before < 33, "the last neuron that is needed, and no more"
    assert "|parameters:0.15|metric:adam|groups:ffn|bias:yes|couple:yes|" in count["signature"]
    for layer in layers_of(tmp_path / "checkpoint_last.pt"):
        dead = dead_neurons(layer.fc1_weight)
        assert bool((layer.fc2_weight[:, dead] == 0).all())


@pytest.mark.parametrize(
    ("target", "left"),
    [
        (["--prox-target-sparsity", "0.7"], 96 - 67),
        (["--prox-target-sparsity", "0.25", "--prox-target-scope", "layer"], 4 * 18),
        (["--prox-target-parameters", "0.1", "--prox-target-scope", "layer"], 4 * 15),
    ],
    ids=["model", "layer", "layer-parameters"],
)
def test_target_counts_what_compaction_has_removed(
    target, left, corpus, tmp_path, monkeypatch, capsys
):
    """Training in stages: the share is one of the neurons that there were at the start."""
    # The command itself starts its stages in test_training_in_stages_ends_where_one_run_ends.
    monkeypatch.setattr(staged_training, "_run", lambda c: run_program(*c[2:]).returncode)
    command = ["train-compacting", "--share", "0.01", "--stage-epochs", "2", corpus, *TRAIN[1:]]
    command += ["--prox", "l21", *target, "--prox-freeze-update", "24"]
    command += ["--max-update", "40", "--save-dir", tmp_path]
    assert main(list(map(str, command))) == 0
    assert re.match(r"compactions in this start: [1-9]", capsys.readouterr().out)
    rows = sum(layer.fc1_weight.shape[0] for layer in layers_of(tmp_path / "checkpoint_last.pt"))
    dead, total = count_dead(tmp_path / "checkpoint_last.pt")
    assert rows == total < 96
    assert total - dead == left


def test_stages_go_on_where_they_were_interrupted(corpus, run, tmp_path, monkeypatch, capsys):
    """Within an epoch before the first compaction, and after it: all ends as without."""
    monkeypatch.setattr(staged_training, "_run", lambda c: run_program(*c[2:]).returncode)
    train = [corpus, *TRAIN[1:], "--prox", "l21", "--prox-target-sparsity", "0.7", "--seed", "2"]
    train += ["--prox-freeze-update", "24", "--save-dir"]

    def staged(folder: str, end: int) -> str:
        words = ["train-compacting", "--share", "0.3", *train, tmp_path / folder]
        assert main([*map(str, words), "--max-update", str(end)]) == 0
        return capsys.readouterr().out

    assert staged("whole", 40).startswith("compactions in this start: ")
    run("fairseq_cli.train", *train, tmp_path / "parts", "--max-update", "4")  # and not in stages
    compactions = [staged("parts", end).split()[4] for end in (29, 36, 40, 40)]
    assert int(compactions[0]) > 0 and compactions[-1] == "0"
    ends = [read_checkpoint(tmp_path / name / "checkpoint_last.pt") for name in ("whole", "parts")]
    updates = [end["optimizer_history"][-1]["num_updates"] for end in ends]
    losses = [end["extra_state"]["val_loss"] for end in ends]
    assert updates == [40, 40] and losses[1] == pytest.approx(losses[0], abs=2e-3)
    ends = [compact(end, keep_optimizer=True) for end in ends]
    assert ends[1].widths == ends[0].widths
    assert sum(map(sum, ends[0].widths.values())) == 29
    slots = [end.checkpoint["last_optimizer_state"]["state"].values() for end in ends]
    moments = [[float(slot["exp_avg_sq"].norm()) for slot in state] for state in slots]
    assert moments[1] == pytest.approx(moments[0], rel=0.01, abs=1e-6)


def test_target_of_every_layer_counts_layers_that_are_gone(corpus, run, tmp_path):
    """A tenth of the parameters from the layers that are left takes the same share of each."""
    train = (*TRAIN, corpus, "--prox", "l21", "--save-dir", tmp_path)
    target = ("--prox-target-parameters", "0.1", "--prox-target-scope", "layer")
    run(*train, "--max-update", "4")
    last = tmp_path / "checkpoint_last.pt"
    checkpoint = read_checkpoint(last)
    first = feed_forward_in_state(checkpoint["model"])[0]
    for part in (first.fc1_weight, first.fc1_bias):
        part.zero_()
    write_checkpoint(compact(checkpoint, keep_optimizer=True).checkpoint, last, force=True)
    widths = ("--arch", "transformer_autosize", "--encoder-ffn-dims", "0,24")
    output = run(*train, *target, *widths, "--max-update", "20").stdout
    assert "9 9 9 of them dead, layer by layer, after 12 updates" in output
    alive = [layer["alive"] for layer in count_neurons(read_checkpoint(last))["layers"]]
    assert alive == [0, 15, 15, 15]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--prox-target-parameters", "0.9"),
            "--prox-target-parameters 0.9: the groups of --prox-groups ffn have 0.",
        ),
        (
            ("--prox-target-sparsity", "0.1", "--prox-groups", "encoder-attention"),
            "--prox-target-sparsity 0.1: of 4 groups that is not even one when rounded",
        ),
    ],
)
def test_target_that_cannot_be_met_ends_the_start(options, message, corpus, tmp_path):
    options = ("--prox", "l21", *options, "--max-update", "2")
    result = run_program(*TRAIN, corpus, *options, "--save-dir", tmp_path)
    assert result.returncode != 0
    assert message in result.stdout.strip().splitlines()[-1]
    assert not list(tmp_path.glob("*.pt"))


def test_pruned_heads_are_compacted_and_translate_the_same(corpus, run, tmp_path):
    output = run(
        *(*TRAIN, corpus, "--prox", "l21", "--prox-groups", "attention", "--max-update", "40"),
        *("--prox-target-sparsity", "0.6", "--save-dir", tmp_path),
    ).stdout
    assert "12 groups (heads: rows of v with bias, columns of out_proj); 7 of them dead" in output
    assert "cross-attention: 2 2 heads in layers 1 to 2" in output
    assert logged(output)[-1]["heads_pruned"] == 7
    pruned = read_checkpoint(tmp_path / "checkpoint_last.pt")
    heads = count_neurons(pruned)["attention_heads"]
    assert heads == {"total": 12, "alive": 5, "pruned": 7}
    small = compact(pruned)
    assert sum(map(sum, small.heads.values())) == 5
    write_checkpoint(small.checkpoint, tmp_path / "small.pt")
    generate = ("fairseq_cli.generate", corpus, *AUTOSIZE, "--cpu", "--max-tokens", "400")
    generate += ("--required-batch-size-multiple", "1", "--beam", "3", "--max-len-b", "12")
    lines = [
        re.findall(r"^H-.*", run(*generate, "--path", tmp_path / name).stdout, re.M)
        for name in ("checkpoint_last.pt", "small.pt")
    ]
    assert len(lines[0]) == 43
    for one, other in zip(*lines, strict=True):
        (_, score, text), (_, other_score, other_text) = one.split("\t"), other.split("\t")
        assert text == other_text
        assert float(score) == pytest.approx(float(other_score), abs=1e-4)
    pytest.importorskip("ctranslate2")
    agreement = export_ctranslate2(small.checkpoint, tmp_path / "ct2", data=corpus)
    assert agreement.largest < 1e-4


@pytest.mark.parametrize("sampling", ["concat", "RoundRobin"])
def test_multilingual_task_trains_resumes_compacts_and_translates(sampling, corpus, run, tmp_path):
    languages = ["--task", "translation_multi_simple_epoch", "--lang-pairs", "xx-yy,yy-xx"]
    languages += ["--langs", "xx,yy", "--encoder-langtok", "tgt"]
    train = [*TRAIN, corpus, *languages, "--prox", "l21", "--prox-target-sparsity", "0.5"]
    train += ["--prox-freeze-update", "24", "--max-update", "40", "--sampling-method", sampling]
    run(*train, "--save-dir", tmp_path / "whole")
    run(*train, "--save-dir", tmp_path / "halves", "--max-update", 17)
    run(*train, "--save-dir", tmp_path / "halves")
    last = [tmp_path / folder / "checkpoint_last.pt" for folder in ("whole", "halves")]
    assert_same_checkpoints(*last)
    assert count_dead(last[0]) == (48, 96)

    small = tmp_path / "small.pt"
    assert main(["compact", str(last[0]), str(small)]) == 0
    assert sum(len(layer.fc1_weight) for layer in layers_of(small)) == 48
    generate = ["fairseq_cli.generate", corpus, *AUTOSIZE, *languages, "-s", "yy", "-t", "xx"]
    generate += ["--cpu", "--max-tokens", "400", "--max-len-b", "10"]
    generate += ["--required-batch-size-multiple", "1", "--path"]
    found = [
        sorted(re.findall(r"^H-(\d+)\t\S+\t(.*)$", run(*generate, path).stdout, re.M))
        for path in (last[0], small)
    ]
    assert found[0] == found[1] and len(found[0]) == 43
    pytest.importorskip("ctranslate2")
    agreement = export_ctranslate2(read_checkpoint(small), tmp_path / "ct2", data=corpus)
    assert agreement.largest < 1e-4


@pytest.mark.parametrize(
    ("sharing", "total"),
    [
        ([], 192),
        (["--share-encoders"], 144),
        # Half precision, in whose checkpoints shared layers are copies.
        (["--share-encoders", "--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", "1"], 144),
        (["--share-encoders", "--share-decoders"], 96),
    ],
    ids=["separate", "encoder", "encoder-half", "all"],
)
def test_models_of_several_pairs_train_resume_count_and_translate(
    sharing, total, corpus, run, tmp_path
):
    languages = ["--task", "multilingual_translation", "--lang-pairs", "xx-yy,yy-xx"]
    train = [*TRAIN, corpus, *languages, "--arch", "multilingual_transformer", *sharing]
    train += ["--prox", "l21", "--prox-target-sparsity", "0.5", "--prox-freeze-update", "18"]
    whole = run(*train, "--max-update", "30", "--save-dir", tmp_path / "whole").stdout
    for end in (11, 30):
        run(*train, "--max-update", end, "--save-dir", tmp_path / "halves")
    last = [tmp_path / folder / "checkpoint_last.pt" for folder in ("whole", "halves")]
    assert_same_checkpoints(*last)
    count = count_neurons(read_checkpoint(last[0]))
    assert count["ffn_neurons"] == {"total": total, "alive": total // 2, "pruned": total // 2}
    assert f"num. shared model params: {count['parameters']['total']:,} " in whole

    generate = ["fairseq_cli.generate", corpus, *AUTOSIZE, *languages, "-s", "yy", "-t", "xx"]
    generate += ["--cpu", "--max-tokens", "400", "--max-len-b", "10", "--path", last[0]]
    output = run(*generate, "--required-batch-size-multiple", "1").stdout
    assert len(re.findall("^H-", output, re.M)) == 43


def test_older_tasks_take_the_settings_of_a_stock_checkpoint(corpus):
    """As fairseq's interface for Python hands them over: without any of ours."""
    stock = {"task": "multilingual_translation", "data": str(corpus), "lang_pairs": "xx-yy"}
    stock |= {"source_lang": "xx", "target_lang": "yy", "encoder_langtok": None}
    stock |= {"left_pad_source": "True", "left_pad_target": "False", "decoder_langtok": False}
    task = setup_task(argparse.Namespace(**stock))
    assert isinstance(task, MultilingualTranslationAutosizeTask)
    assert task.settings.prox == "none"


def test_multilingual_task_refuses_what_translation_does(corpus, tmp_path):
    options = ["--task", "translation_multi_simple_epoch", "--lang-pairs", "xx-yy,yy-xx"]
    options += ["--prox", "l21", "--langs", "xx,yy", "--max-update", "1", "--save-dir", tmp_path]
    result = run_program(*TRAIN, corpus, *options, "--memory-efficient-fp16")
    assert result.returncode != 0
    assert "--memory-efficient-fp16" in result.stdout.strip().splitlines()[-1]

"""Averaging checkpoints: the mean, ties, and which neurons are alive in it."""

import copy

import pytest
import torch
from small_models import build_model, checkpoint_of, model_in

from fairseq_autosize.averaging import average
from fairseq_autosize.checkpoint import CheckpointError
from fairseq_autosize.compaction import compact
from fairseq_autosize.groups import dead_neurons


def three(**options):
    """Three checkpoints of one model at different times."""
    checkpoints = []
    for seed in range(3):
        model, args = build_model(**options)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        checkpoints.append(checkpoint_of(model, args))
    return checkpoints


def test_mean_of_every_parameter():
    checkpoints = three()
    result, revived = average(checkpoints)
    for name, value in result["model"].items():
        wanted = sum(c["model"][name].double() for c in checkpoints) / 3
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=1e-6)
    assert revived == [0, 0, 0]
    model_in(result)


def test_masters_of_one_checkpoint_go():
    """The fp32 masters of a half-precision run belong to its own parameters."""
    checkpoints = three()
    extra = {
        "best": 1.0,
        "Task": {"prox_precision": {"masters": [torch.ones(3)]}, "prox_frozen_at": 7},
    }
    checkpoints[-1]["extra_state"] = extra
    left = {"best": 1.0, "Task": {"prox_frozen_at": 7}}
    assert average(checkpoints)[0]["extra_state"] == left
    assert compact(checkpoints[-1]).checkpoint["extra_state"] == left
    assert "prox_precision" in extra["Task"], "the input stays as it is"


def test_ties_stay():
    state = average(three(share_all_embeddings=True))[0]["model"]
    assert (
        state["encoder.embed_tokens.weight"].data_ptr()
        == state["decoder.output_projection.weight"].data_ptr()
    )


def test_alive_neurons_are_the_union():
    checkpoints = three()
    name = "encoder.layers.0.fc1.weight"
    for dead, checkpoint in zip(([0, 1, 2], [1, 2], [2, 5]), checkpoints, strict=True):
        checkpoint["model"][name][dead] = 0
    result, revived = average(checkpoints)
    assert torch.nonzero(dead_neurons(result["model"][name])).flatten().tolist() == [2]
    assert revived == [2, 1, 1]


def test_optimizer_and_moving_average_are_left_out():
    checkpoints = three()
    checkpoints[-1] |= {"last_optimizer_state": {"state": {}}}
    checkpoints[-1]["extra_state"] = {"ema": {}, "ema_fp32_params": {}, "epoch": 3}
    result, _ = average(checkpoints)
    assert result["last_optimizer_state"] is None
    assert result["extra_state"] == {"epoch": 3}
    assert "ema" in checkpoints[-1]["extra_state"]


def test_only_those_compacted_together_are_averaged():
    """Others, though of the same widths, lack different neurons."""
    checkpoints = three()
    name = "encoder.layers.0.fc1.weight"
    for neuron, checkpoint in enumerate(checkpoints):
        checkpoint["model"][name][neuron] = 0
    first, second, third = (
        compact(checkpoint, provenance={"source": str(number)}).checkpoint
        for number, checkpoint in enumerate(checkpoints)
    )
    message = "checkpoint 1 and the last one were not compacted together"
    with pytest.raises(CheckpointError, match=message):
        average([first, second])
    trained_on = {key: value for key, value in second.items() if key != "autosize"}
    for pair in ([first, trained_on], [trained_on, first]):
        with pytest.raises(CheckpointError, match=message):
            average(pair)
    with pytest.raises(CheckpointError, match="checkpoint 2 and the last one were not"):
        average([first, second, first])
    together = second | {"autosize": first["autosize"]}
    mean = average([first, together])[0]["model"][name]
    torch.testing.assert_close(mean, (first["model"][name] + second["model"][name]) / 2)
    assert average([trained_on, third | {"autosize": None}])[1] == [0, 0]


def test_refusals():
    first, second, _ = three()
    with pytest.raises(CheckpointError, match="at least two"):
        average([first])
    narrow = checkpoint_of(*build_model(encoder_ffn_embed_dim=5))
    with pytest.raises(CheckpointError, match=r"fc1\.weight has shape \(5, 8\) in checkpoint 2"):
        average([first, narrow, second])
    with pytest.raises(CheckpointError, match=r"has shape \(5, 8\) in b\.pt and"):
        average([first, narrow, second], ["a.pt", "b.pt", "c.pt"])
    broken = copy.deepcopy(second)
    broken["model"]["decoder.layers.0.fc1.bias"][0] = float("nan")
    with pytest.raises(CheckpointError, match=r"b\.pt: decoder\.layers\.0\.fc1\.bias holds NaN"):
        average([first, broken, second], ["a.pt", "b.pt", "c.pt"])
    del second["model"]["decoder.layers.0.fc1.bias"]
    with pytest.raises(
        CheckpointError, match=r"different models: .* decoder\.layers\.0\.fc1\.bias"
    ):
        average([first, second])

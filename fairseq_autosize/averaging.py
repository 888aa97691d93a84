"""Average the parameters of several checkpoints of one training."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .checkpoint import CheckpointError, check_finite, place, printable, without_masters
from .groups import dead_neurons, feed_forward_in_state


def average(
    checkpoints: Sequence[Mapping[str, Any]], names: Sequence[str] = ()
) -> tuple[dict[str, Any], list[int]]:
    """The mean of the parameters; everything else comes from the last checkpoint.

    A neuron that is dead in some of the checkpoints only is alive in the mean, shrunk by the
    zeros: the neurons alive are the union of those of all checkpoints. The optimizer's state and
    stored moving averages belong to no mean, and are left out.

    Args:
        checkpoints: what `checkpoint.read_checkpoint` returns, with the same parameters; oldest
            first.
        names: what errors call them, such as their paths; by default by their numbers.

    Returns:
        The checkpoint, and for each input how many neurons are dead there but alive in the mean.

    Raises:
        CheckpointError: fewer than two, names, shapes or types of parameters that differ, some
            that were compacted by themselves, or NaN or infinity in one.
        GroupError: no feed-forward layers.
    """
    if len(checkpoints) < 2:
        raise CheckpointError("averaging needs at least two checkpoints")
    names = list(names) or [f"checkpoint {number + 1}" for number in range(len(checkpoints))]
    states = [checkpoint["model"] for checkpoint in checkpoints]
    last = states[-1]
    # The compaction's entries, which fairseq drops in training on; as text, since a damaged file
    # may have tensors there.
    origins = [repr(checkpoint.get("autosize")) for checkpoint in checkpoints]
    for file, state, origin in zip(names, states[:-1], origins, strict=False):
        if origin != origins[-1]:
            raise CheckpointError(
                f"{file} and the last one were not compacted together, so that their "
                "neurons do not correspond; average before compaction"
            )
        if state.keys() != last.keys():
            name = sorted(state.keys() ^ last.keys())[0]
            raise CheckpointError(
                f"{file} and the last one are different models: only one of them has "
                f"the parameter {printable(name)}"
            )
        for name, tensor in state.items():
            if tensor.is_floating_point() != last[name].is_floating_point():
                raise CheckpointError(
                    f"{printable(name)} has the type {tensor.dtype} in {file} and "
                    f"{last[name].dtype} in the last one"
                )
            if tensor.shape != last[name].shape:
                raise CheckpointError(
                    f"{printable(name)} has shape {tuple(tensor.shape)} in {file} and "
                    f"{tuple(last[name].shape)} in the last one; average before compaction"
                )
    for file, state in zip(names, states, strict=True):
        try:
            check_finite(state)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from error
    mean: dict[str, torch.Tensor] = {}
    made: dict[tuple, torch.Tensor] = {}
    for name, tensor in last.items():
        # Tied parameters stay tied.
        if tensor.numel() == 0 or not tensor.is_floating_point():
            mean[name] = tensor
        elif place(tensor) in made:
            mean[name] = made[place(tensor)]
        else:
            total = torch.zeros_like(tensor, dtype=torch.float64)
            for state in states:
                total += state[name]
            made[place(tensor)] = mean[name] = (total / len(states)).to(tensor.dtype)
    extra = without_masters(checkpoints[-1])
    if isinstance(extra, dict):
        extra = {key: value for key, value in extra.items() if not str(key).startswith("ema")}
    result = {**checkpoints[-1], "model": mean, "last_optimizer_state": None, "extra_state": extra}
    alive = [~dead_neurons(layer.fc1_weight) for layer in feed_forward_in_state(mean)]
    revived = []
    for state in states:
        dead = [dead_neurons(layer.fc1_weight) for layer in feed_forward_in_state(state)]
        revived.append(sum(int((a & d).sum()) for a, d in zip(alive, dead, strict=True)))
    return result, revived

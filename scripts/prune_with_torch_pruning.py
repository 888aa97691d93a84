#!/usr/bin/env python3
"""Zero feed-forward neurons of a fairseq checkpoint that Torch-Pruning would remove.

    python scripts/prune_with_torch_pruning.py CHECKPOINT OUTPUT --sparsity 0.5

For comparisons. Torch-Pruning (VainF/Torch-Pruning) ranks the neurons of all layers by its group
norm (row of fc1 and column of fc2 together, normalised within each layer) and removes the lowest.
Here the rows that it would remove are set to zero, so that fairseq-train goes on from OUTPUT with
--prox l21 --prox-freeze-update, which holds them, and `fairseq-autosize` counts and compacts them.
"""

import argparse
import logging
from pathlib import Path

import torch
import torch_pruning
from torch import nn

from fairseq_autosize.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from fairseq_autosize.groups import feed_forward_in_state


class FeedForwards(nn.Module):
    """The feed-forward blocks of a model side by side, which is all that is to be pruned."""

    def __init__(self, blocks: list) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for block in blocks:
            fc1, fc2 = (
                nn.Linear(*weight.shape[::-1], bias=False)
                for weight in (block.fc1_weight, block.fc2_weight)
            )
            fc1.weight.data = block.fc1_weight.float().clone()
            fc2.weight.data = block.fc2_weight.float().clone()
            self.blocks.append(nn.Sequential(fc1, nn.ReLU(), fc2))

    def forward(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [block(x) for block, x in zip(self.blocks, inputs, strict=True)]


def removed_neurons(blocks: list, sparsity: float) -> list[list[int]]:
    """The neurons that Torch-Pruning's group-norm pruner removes of each block."""
    model = FeedForwards(blocks)
    inputs = [torch.randn(1, block.fc1_weight.shape[1]) for block in blocks]
    pruner = torch_pruning.pruner.GroupNormPruner(
        model,
        inputs,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=sparsity,
        ignored_layers=[block[2] for block in model.blocks],  # its outputs are the model's width
        forward_fn=lambda model, inputs: model(inputs),
    )
    removed: list[list[int]] = [[] for _ in blocks]
    layers = {block[0]: number for number, block in enumerate(model.blocks)}
    for group in pruner.step(interactive=True):  # the groups are told, and left where they are
        for dependency, indices in group:
            layer = dependency.target.module
            if layer in layers and dependency.handler in (
                torch_pruning.prune_linear_out_channels,
                torch_pruning.function.prune_linear_out_channels,
            ):
                removed[layers[layer]] += list(indices)
    return removed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="must not exist")
    parser.add_argument("--sparsity", type=float, required=True, help="of all neurons, 0 < F < 1")
    args = parser.parse_args()
    if not 0 < args.sparsity < 1:
        parser.error(f"--sparsity {args.sparsity}: must lie between 0 and 1")
    if args.output.exists():
        parser.error(f"OUTPUT {args.output}: exists already; choose another name, or remove it")
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    try:
        checkpoint = read_checkpoint(args.checkpoint)
    except CheckpointError as error:
        parser.error(str(error))
    blocks = list(feed_forward_in_state(checkpoint["model"]))
    for block, neurons in zip(blocks, removed_neurons(blocks, args.sparsity), strict=True):
        block.fc1_weight[neurons] = 0
        if block.fc1_bias is not None:
            block.fc1_bias[neurons] = 0
        logging.info("%s: %d of %d neurons removed", block.name, len(neurons), block.count)
    try:
        write_checkpoint(checkpoint, args.output)
    except CheckpointError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Write docs/options.md from the option block: python scripts/generate_options.py [--check]"""

import argparse
import dataclasses
import sys
from pathlib import Path

from fairseq_autosize.config import AutosizeConfig

PAGE = Path(__file__).parent.parent / "docs" / "options.md"

HEAD = """\
# Options

*Generated from `fairseq_autosize/config.py` by `scripts/generate_options.py`; do not edit.*

The options are added to the tasks `translation`, `language_modeling` and, for several languages,
`translation_multi_simple_epoch` and `multilingual_translation` (and to the same tasks with
`_autosize` at the end of their names). On the command line a name is spelled with dashes, in YAML
for `fairseq-hydra-train`, which has only the first two tasks, with underscores under `task:`.
(`fairseq-train --help` never shows the options of a task, so neither these.) A value that is not
allowed ends the start with a message that names the flag, the value and what is allowed.

| option | default | meaning |
|---|---|---|
"""

TAIL = """
`--no-prox-bias` switches `--prox-bias` off; in YAML it is `prox_bias: false`.

Which of them for which wish: [choosing](choosing.md).

## With fairseq's own options

- **Learning rate, warm-up, schedules.** The threshold of an update is λ times the learning rate of
  that update, so warm-up and decay apply to the shrinking as well.
- **`--update-freq`, gradient clipping.** One proximal step an update, after clipping and after the
  optimizer's step. An update skipped for an overflow takes none.
- **`--best-checkpoint-metric loss_after_freeze`**, or **`bleu_after_freeze`** with `--eval-bleu`,
  `--eval-bleu-remove-bpe sentencepiece` (without it fairseq scores the subword pieces) and
  `--maximize-best-checkpoint-metric`: the validation loss or BLEU, from the freeze on; the best
  checkpoint is then one of the final size, and `--patience` counts from there. Both need a target
  or `--prox-freeze-update`, and do not go with `--lr-scheduler reduce_lr_on_plateau`. A run that
  goes on from a checkpoint with another metric, or with a freeze that does not count any more (see
  the next point), needs `--reset-meters` once.
- **Going on from a checkpoint with other `--prox` options.** They hold from the next update on;
  where they say something else of the target or the freeze, or, with `auto`, of the step, the old
  freeze (with `auto` also the wait for it) does not count any more: the dead are not held until the
  new one, so some come back, with a smaller target for good. The default freeze is then a fifth of
  the way from there to `--max-update`, which must be larger than the number of updates done.
  `--prox-freeze-update`, a number or a share, counts from the training's first update. If that
  update has passed already, everything that has to die is cut at once. With the same options a
  freeze that is still to come stays where it was planned first, also if `--max-update` is larger
  now: the log says so. If you add `--prox-couple` or the bias on resuming, neurons that were dead
  stay dead: their bias or column of fc2 is set to zero at the freeze. Without `--prox`, or with
  `--prox none`, nothing holds dead neurons at zero any more, and they can come back: the log warns
  of it. Give the `--prox` options again, or compact the model first. With `--finetune-from-model`
  everything begins at update 0.
- **`--max-epoch`, `--patience`, `--stop-min-lr`, `--stop-time-hours`.** A run that they end before
  the freeze has not reached its target.
- **`--weight-decay`** shrinks all weights by a factor; it neither kills a neuron by itself nor
  revives one.
- **`--dropout`, `--activation-dropout`** are independent of the prox. **`--encoder-layerdrop`,
  `--decoder-layerdrop`**: the layers that an update drops are shrunk all the same, since they
  still belong to the model.
- **`--activation-fn`** relu, gelu, gelu_fast, gelu_accurate, tanh and linear, which are all that
  fairseq-train offers, map 0 to 0, so a zero row is a silent neuron. Any activation that is not
  known to do so is refused by name; so is swish (SiLU) where a configuration reaches it, since
  fairseq puts the class where a function belongs and cannot run it. With all but relu the slope
  at 0 is not 0: a zero row then gets a gradient, and Adam can move it by more in an update than
  the prox takes back, so some dead neurons come back and the count goes up and down. The log
  warns of it at the start. With relu a zero row gets no gradient (unless `--no-prox-bias` leaves
  it a bias above 0: then it comes back, too), but the optimizer's momentum, if
  it is more than the prox takes back, can still move one that has just died; it comes back then,
  with `--prox-metric adam` as well. Only from a freeze on (`--prox-freeze-update`, or a target) are
  the dead held, whatever the activation.
- **`--fp16`, `common.bf16=true`** (with fp32 master weights), **`--amp`**: the step acts on the
  fp32 weights. On a CPU, `--fp16` needs `--fp16-no-flatten-grads`. `--bf16` on fairseq-train's
  command line means a TPU to fairseq and is refused; fairseq-hydra-train with `common.bf16=true`
  works.
- **Refused by name:** `--memory-efficient-fp16`, `--memory-efficient-bf16`, `--use-bmuf`, `--tpu`,
  `--ddp-backend fully_sharded` and `slowmo`, `--zero-sharding os`, pipeline and model parallelism,
  quantization and `--quant-noise-pq` (why, and what was tested: [training
  modes](training-modes.md)); and `--scale-fc`, since a layer norm between fc1 and fc2 mixes the
  neurons.
"""


def page() -> str:
    """The text of docs/options.md."""
    rows = []
    for field in dataclasses.fields(AutosizeConfig):
        if field.name.startswith("_"):
            continue
        flag = "--" + field.name.replace("_", "-")
        default = f"`{field.default}`"
        if field.default is None:
            default = "by operator" if field.name == "prox_strength" else "none"
        rows.append(f"| `{flag}` | {default} | {field.metadata['help']} |")
    return HEAD + "\n".join(rows) + "\n" + TAIL


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page is not up to date")
    check = parser.parse_args().check
    if not check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        print(f"{PAGE} is not up to date: run scripts/generate_options.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What fairseq-train's log tells: losses, speed, and the neurons alive over the updates."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

# "... | train_inner | {json}" with --log-format json, else "... | train_inner | epoch 001: 20 / 72
# loss=10.4, num_updates=20" within an epoch and "... | train | epoch 001 | loss 9.1 | ..." then.
# Of fairseq-hydra-train "[...][train_inner][INFO] - " comes before the same.
_BEFORE, _BEHIND = r"(?:\| |\]\[)", r"(?: \||\]\[INFO\] -)"
_STATS = re.compile(rf"{_BEFORE}(train_inner|train|valid\w*){_BEHIND} (.*)$")
_PAIR = re.compile(r"\b(\w+)[= ]([-+0-9.einfa]+)")  # \b: no damaged line takes quadratic time
_COUNTED = re.compile(r"_(?:alive|pruned)$")
_KIND = r"[\w-]+(?: \d{1,15})+"
_LAYERS = re.compile(rf"alive after update (\d{{1,15}}), layer by layer: ({_KIND}(?:; {_KIND})*)$")
# At the start of a training, after which come its notes.
_ANEW = re.compile(rf"{_BEFORE}fairseq\.trainer{_BEHIND} No existing checkpoint found ")
_LOADED = re.compile(rf"{_BEFORE}fairseq\.trainer{_BEHIND} Loaded checkpoint ")
_LOADED_AT = re.compile(r"@ (\d{1,15}) updates\)$")
_NOTED = re.compile(rf"{_BEFORE}fairseq_autosize[\w.]*{_BEHIND} (command|signature): (.*)$")


@dataclass
class TrainingLog:
    """A training, as its log tells it; what was logged twice, after a resumption, counts as last.

    Where the updates go back, what an earlier attempt had told of later ones is forgotten: it had
    gone on beyond the checkpoint from which the next one resumed. Of one that was begun anew, or
    whose model alone was taken (``--finetune-from-model``), nothing is left.

    Attributes:
        train: the values of the progress lines by update, under the names of fairseq's meters.
        valid: the same for validations (of the first validation set).
        layers: neurons (or heads) alive by update, as kind -> number in each layer.
        notes: ``command`` and ``signature``, where the task has logged them.
    """

    train: dict[int, dict[str, float]] = field(default_factory=dict)
    valid: dict[int, dict[str, float]] = field(default_factory=dict)
    layers: dict[int, dict[str, list[int]]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def read(self, path: str | os.PathLike[str]) -> None:
        """Add the contents of one log. Lines of other programs and half a last line are skipped.

        Of several logs, those of earlier attempts come first.

        Raises:
            OSError: the file cannot be read.
        """
        with Path(path).open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line.endswith("\n"):  # still being written; its numbers may be cut off
                    break
                line = line.rstrip("\n")
                if found := _STATS.search(line):
                    self._add(found[1], found[2])
                elif line.startswith('{"epoch"'):
                    # --log-file has no tags, and each line many times.
                    prefix = re.search(r'"(train|valid)_num_updates"', line)
                    self._add(prefix[1] if prefix else "train_inner", line, has_layers=False)
                elif found := _LAYERS.search(line):
                    kinds = (part.split() for part in found[2].split(";"))
                    alive = {kind: [int(n) for n in counts] for kind, *counts in kinds}
                    self._forget_after(int(found[1]))
                    self.layers[int(found[1])] = alive
                elif _ANEW.search(line):
                    self._start(0)
                elif _LOADED.search(line) and (found := _LOADED_AT.search(line)):
                    self._start(int(found[1]))
                elif found := _NOTED.search(line):
                    self.notes[found[1]] = found[2]

    def _add(self, tag: str, text: str, has_layers: bool = True) -> None:
        values = _values(tag, text)
        update = values.get("num_updates")
        # Not NaN, nor more than a float counts exactly: a damaged line.
        if update is None or not 0 <= update < 2**53:
            return
        if tag not in ("train_inner", "train", "valid"):
            return
        # Layers that a log cannot have may be another's, of the same training.
        self._forget_after(int(update), layers=has_layers)
        if tag == "train":  # the means of an epoch, but for what is counted
            values = {name: value for name, value in values.items() if _COUNTED.search(name)}
            values = {"num_updates": update, **values, **self.train.get(int(update), {})}
        points = self.valid if tag == "valid" else self.train
        points[int(update)] = values

    def _start(self, update: int) -> None:
        """A training begins, or goes on from a checkpoint of this update."""
        self._forget_after(update or -1)
        if not update:
            self.notes.clear()

    def _forget_after(self, update: int, layers: bool = True) -> None:
        """Drop what has been told of later updates. All are kept in the order of the updates."""
        for points in (self.train, self.valid, *([self.layers] if layers else [])):
            while points and next(reversed(points)) > update:
                points.popitem()

    def series(self, part: str, name: str) -> list[tuple[int, float]]:
        """(update, value) of a meter in the order of the updates.

        Args:
            part: ``train`` or ``valid``.
            name: such as ``loss`` or ``neurons_alive``.
        """
        points = {"train": self.train, "valid": self.valid}[part]
        return [
            (update, points[update][name]) for update in sorted(points) if name in points[update]
        ]


def _values(tag: str, text: str) -> dict[str, float]:
    if text.startswith("{"):
        try:
            pairs = json.loads(text)
        except (ValueError, RecursionError):  # such as the end of a log that is being written
            return {}
        # Outside of an epoch the names have the tag in front.
        pairs = {name.removeprefix(f"{tag}_"): value for name, value in pairs.items()}
    else:
        pairs = dict(_PAIR.findall(text))
    values = {}
    for name, value in pairs.items():
        try:
            values[name] = float(value)
        except (TypeError, ValueError, OverflowError):  # null, a word, or 400 digits
            continue
    return values

#!/usr/bin/env python3
"""Train, translate and score a grid of settings, data sets and seeds that a YAML file describes.

    python scripts/grid.py GRID.yaml [OVERRIDE...]

GRID.yaml is a configuration of Hydra that begins with `defaults: [base, _self_]` (scripts/grids has
base.yaml and examples; docs/experiments.md explains them), OVERRIDEs are Hydra's: `run=dense,l21`
`seed=1,2,3` `hydra.launcher.n_jobs=4`. Hydra's launchers run it on this machine (joblib) or on
a Slurm cluster (submitit), its Optuna sweeper searches instead of trying everything.

Each run has a folder OUTPUT/DATA/RUN/seed-N with its settings, logs, a checkpoint, its
translations and result.json. Finished runs are not repeated, interrupted ones go on where they
were, and one that fails does not stop the others. OUTPUT/results.json collects all.
"""

import importlib.util
import json
import logging
import math
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import pipeline
import portalocker
from benchmark_operators import cpu_name
from grid_results import collect, sentence_groups, table
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pipeline import RunError
from prepare_data import REMOVE_BPE
from yaml import YAMLError

from fairseq_autosize.checkpoint import CheckpointError, read_checkpoint, writing
from fairseq_autosize.html_report import tokens_per_second
from fairseq_autosize.report import count_neurons

ROOT = Path(__file__).resolve().parent.parent
GRIDS = Path(__file__).resolve().parent / "grids"
PARTS = ("train", "generate", "select", "keep", "prune")
KEYS = (*PARTS, "output", "data", "run", "seed", "datasets", "runs", "baselines")
SELECT, KEEP = ("best", "bleu", "last"), ("selected", "all")

# The variable with the command as typed. This file's module is there twice, as the program and as
# what Hydra imports for its callbacks, which finds only Hydra's own spelling.
TYPED = "GRID_COMMAND"

# Of the process that waits; not in the callback, which Hydra sends to those that work.
_ended = threading.Event()
_watchers: list[threading.Thread] = []
_earlier: dict[Path, int] = {}  # failures of earlier starts

logger = logging.getLogger("grid")


def _share_of_updates(share: float, offset: int = 0, *, _root_: DictConfig) -> int:
    return round(share * _root_.train["max-update"]) + offset


def _share_after_warmup(share: float, offset: int = 0, *, _root_: DictConfig) -> int:
    warmup = _root_.train["warmup-updates"]
    return warmup + round(share * (_root_.train["max-update"] - warmup)) + offset


OmegaConf.register_new_resolver("updates", _share_of_updates, replace=True)
OmegaConf.register_new_resolver("after_warmup", _share_after_warmup, replace=True)


def settings_of(config: DictConfig) -> dict[str, Any]:
    """What makes one run: the base, then the data set's own, then the run's own options.

    Raises:
        RunError: a name or key that does not exist; the message lists those that do.
    """
    config = config.copy()
    OmegaConf.set_struct(config, False)
    for kind, name in (("datasets", config.data), ("runs", config.run)):
        if name not in config[kind]:
            raise RunError(f"{kind} has no {name}, but {', '.join(config[kind])}")
        own = {} if config[kind][name] is None else config[kind][name]
        _check_mapping(own, f"{kind}.{name}")
        allowed = (*PARTS, "path") if kind == "datasets" else PARTS
        if unknown := [key for key in own if key not in allowed]:
            raise RunError(f"{kind}.{name}: no key {unknown[0]}, but {', '.join(allowed)}")
        for key in own:
            if key in ("train", "generate"):
                _check_mapping(own[key], f"{kind}.{name}.{key}")
            if key != "path":
                OmegaConf.update(config, key, own._get_node(key), merge=True, force_add=True)
    if not (path := config.datasets[config.data].get("path")):
        raise RunError(f"datasets.{config.data}: no path of a folder made by prepare_data.py")
    config.train.seed = config.seed
    for key in ("max-update", "validate-interval-updates"):
        value = config.train.get(key)
        if type(value) is not int or value < 1:
            raise RunError(f"train.{key} {value}: must be a number of updates, 1 or more")
    names = ("data", "run", "seed", *PARTS)
    resolved = OmegaConf.to_container(config, resolve=True)
    for key, choices in (("select", SELECT), ("keep", KEEP)):
        if resolved[key] not in choices:
            raise RunError(f"{key} {resolved[key]}: must be one of {', '.join(choices)}")
    if resolved["prune"]:
        check_pruning(resolved["prune"], resolved["train"]["max-update"])
    return {"path": str(path)} | {name: resolved[name] for name in names}


def _check_mapping(found: object, name: str) -> None:
    if not isinstance(found, Mapping):
        raise RunError(f"{name}: must be options and their values, not {found}")


def pruning_script(method: str) -> Path:
    """The script that prunes with another tool."""
    return Path(__file__).parent / f"prune_with_{method.replace('-', '_')}.py"


def check_pruning(prune: Mapping[str, Any], updates: int) -> None:
    """Refuse what would fail only when a training has come to it.

    Raises:
        RunError: naming the key and what is allowed.
    """
    if set(prune) != {"method", "sparsity", "update"}:
        raise RunError(f"prune has {', '.join(prune)}; it takes method, sparsity and update")
    method, sparsity, update = prune["method"], prune["sparsity"], prune["update"]
    if not (script := pruning_script(str(method))).is_file():
        raise RunError(f"prune.method {method}: there is no {script}")
    if not (isinstance(sparsity, float) and 0 < sparsity < 1):
        raise RunError(f"prune.sparsity {sparsity}: must be a share between 0 and 1")
    if not (isinstance(update, int) and 0 < update < updates):
        raise RunError(f"prune.update {update}: must be a number of updates below {updates}")
    module = str(method).replace("-", "_")
    if importlib.util.find_spec(module) is None:
        raise RunError(f"prune.method {method}: {module} is not installed")


def options(chosen: Mapping[str, Any]) -> list[str]:
    """Command-line options of a mapping: true is a flag; false and null leave one out.

    Raises:
        RunError: a name that is not spelt as on the command line.
    """
    words = []
    for name, value in chosen.items():
        if "_" in name:
            raise RunError(f"{name}: write {name.replace('_', '-')}, as on the command line")
        if name == "prox-bias" and value is False:  # the only one that is on by default
            words.append("--no-prox-bias")
        elif value is True:
            words.append(f"--{name}")
        elif _is_given(value):
            words += [f"--{name}", str(value)]
    return words


def _is_given(value: object) -> bool:
    return value is not None and value is not False  # 0 is a value


def shrinks(train: Mapping[str, Any]) -> bool:
    """Whether a training with these options has proximal steps."""
    return _is_given(train.get("prox")) and train["prox"] != "none"


def freezes(train: Mapping[str, Any]) -> bool:
    """Whether a training with these options has a freeze."""
    keys = ("prox-target-sparsity", "prox-target-parameters", "prox-freeze-update")
    return shrinks(train) and any(_is_given(train.get(key)) for key in keys)


def whole_schedule(train: Mapping[str, Any]) -> dict[str, int]:
    """What keeps a learning rate that falls to max-update as it is in a shorter training."""
    updates = train["max-update"]
    ends = {
        "polynomial_decay": {"total-num-update": updates},
        "cosine": {"lr-period-updates": updates - train.get("warmup-updates", 0)},
    }
    found = ends.get(train.get("lr-scheduler"), {})
    return {name: value for name, value in found.items() if name not in train}


def _updates_of(checkpoint: Path) -> int:
    return read_checkpoint(checkpoint)["optimizer_history"][-1]["num_updates"]


def shown(command: Sequence[str]) -> str:
    """A command as people would type it where they are."""
    here = f"{Path.cwd()}{os.sep}"
    names = {sys.executable: "python", str(pipeline.USER_DIR): pipeline.USER_DIR.name}
    return shlex.join([names.get(word, word).removeprefix(here) for word in command])


@dataclass(frozen=True)
class Translated:
    """A data set's translations and what they are worth.

    Attributes:
        lines: one a sentence.
        scores: of the whole (``BLEU``, ``chrF2``) and BLEU of its parts.
        tokens_per_second: as fairseq-generate tells it, where it does.
    """

    lines: list[str]
    scores: dict[str, Any]
    tokens_per_second: float | None


class Run:
    """One run in its folder: train, choose a checkpoint, translate, score."""

    def __init__(self, settings: dict[str, Any], folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.lock: int | None = None
        self.data = Path(settings["path"])
        for path in (folder, self.data):
            pipeline.check_path(path)
        self.record = pipeline.record_of(self.data)

    def perform(self, lock: int | None = None) -> dict[str, Any]:
        """Do what is still to do; returns what is in result.json.

        Args:
            lock: of the folder's locked file, see ``pipeline.execute``.
        """
        self.lock = lock
        result_file = self.folder / "result.json"
        self._claim()
        if result_file.exists():
            return json.loads(result_file.read_text())
        choices = choices_of(self.settings["generate"])
        trained = self.folder / "trained.json"
        if not trained.exists():
            write_json(trained, self._train())
        history = pipeline.history(self.folder / "train.log")
        losses, saved = self._candidates(history)
        updates = self._wanted(losses)
        tried = {
            (update, index): self._translate(saved[update], "valid", "valid", generate)
            for update in updates
            for index, generate in enumerate(choices)
        }
        bleu = {key: found.scores["BLEU"]["score"] for key, found in tried.items()}
        selected, index = best = max(bleu, key=bleu.__getitem__)
        checkpoint = self.folder / "checkpoint_selected.pt"
        with writing(checkpoint, force=True) as beside:
            beside.write(saved[selected].read_bytes())
        result = {
            **self.settings,
            "target": self.record["languages"][1],
            "git": pipeline.git_state(ROOT),
            "versions": pipeline.versions(),
            "processor": cpu_name(),
            **json.loads(trained.read_text()),
            "selected_update": selected,
            "valid_loss": losses[selected],
            "neurons": count_neurons(read_checkpoint(checkpoint)),
            "history": history,
            "scores": {},
            "tokens_per_second": {},
        }
        if self.settings["select"] == "bleu":
            of_updates = {n: max(bleu[n, i] for i in range(len(choices))) for n in updates}
            result["BLEU valid"] = of_updates
        if choices != [self.settings["generate"]]:
            of_choices = [bleu[selected, i] for i in range(len(choices))]
            result["chosen"] = {"generate": choices[index], "BLEU valid": of_choices}
        translated = {"valid": tried[best]}
        for subset, split in self.record["gen_subsets"].items():
            translated[split] = self._translate(checkpoint, subset, split, choices[index])
        for split, found in translated.items():
            text = "".join(f"{line}\n" for line in found.lines)
            (self.folder / f"{split}.txt").write_text(text, encoding="utf-8")
            result["scores"][split] = found.scores
            result["tokens_per_second"][split] = found.tokens_per_second
        write_json(result_file, result)
        if self.settings["keep"] == "selected":
            for path in self.folder.glob("checkpoint*.pt"):
                if path.name != "checkpoint_selected.pt":
                    path.unlink()
        return result

    def check_same(self) -> None:
        """See that what the folder has, if anything, is of these settings and data.

        Raises:
            RunError: it is not.
        """
        noted = self.folder / "settings.json"
        if not noted.exists():
            return
        found = json.loads(noted.read_text())
        prepared = found.pop("prepared", None)  # which earlier versions did not note
        cure = "choose another output, or remove that folder"
        if told := difference(found, self.settings, but=() if prepared is None else ("path",)):
            raise RunError(
                f"{self.folder} has a run of other settings ({told}); {cure}. Keys swept beside "
                "data, run and seed need a place in hydra.sweep.subdir"
            )
        if prepared not in (None, pipeline.corpus_identity(self.record)):
            raise RunError(f"{self.folder} has a run on other data than now in {self.data}; {cure}")

    def _claim(self) -> None:
        """Note the settings in the folder, unless it has something of others."""
        noted = self.folder / "settings.json"
        saved = {path.name for path in self.folder.glob("checkpoint*.pt")}
        if not self._has("trained", "result") and saved <= {"checkpoint_pruned.pt"}:
            # Of a start that came to nothing, or whose checkpoints were removed to begin anew.
            for name in ("train.log", "unpruned.json", "pruned.json", "checkpoint_pruned.pt"):
                (self.folder / name).unlink(missing_ok=True)
        elif not noted.exists():
            raise RunError(
                f"{self.folder} has a run, but not its settings.json; remove that folder"
            )
        else:
            self.check_same()
        identity = pipeline.corpus_identity(self.record)
        write_json(noted, {**self.settings, "prepared": identity})

    def _has(self, *names: str) -> bool:
        return any((self.folder / f"{name}.json").exists() for name in names)

    def _corpus(self) -> list[str]:
        source, target = self.record["languages"]
        languages = ["--source-lang", source, "--target-lang", target]
        cpu = ["--cpu"] if self.settings["train"].get("cpu") else []
        user_dir = ["--user-dir", str(pipeline.USER_DIR)]
        return [str(self.data / "data-bin"), *languages, *user_dir, *cpu]

    def _train(self) -> dict[str, Any]:
        chosen = dict(self.settings["train"])
        chosen.pop("cpu", None)
        # A checkpoint at each validation, and none at the epochs' ends. What falls on both fairseq
        # keeps as the best or the last only.
        chosen |= {"save-interval-updates": chosen["validate-interval-updates"]}
        chosen |= {"save-interval": 10**6, "validate-interval": 10**6, "log-format": "json"}
        program = [sys.executable, "-m", "fairseq_cli.train", *self._corpus()]
        program += ["--save-dir", str(self.folder)]
        begun = (self.folder / "train.log").exists()
        seconds = [0.0, 0.0]
        commands = []

        def train(own: Mapping[str, Any]) -> None:
            nonlocal seconds
            wanted = chosen | own
            if freezes(wanted):
                wanted = {"best-checkpoint-metric": "loss_after_freeze"} | wanted
            commands.append([*program, *options(wanted)])
            if self._resumable() >= wanted["max-update"]:  # fairseq would train on from here
                return
            log = self.folder / "train.log"
            used = pipeline.execute(commands[-1], log, log.exists(), self.lock)
            seconds = [a + b for a, b in zip(seconds, used, strict=True)]

        if prune := self.settings["prune"]:
            if not self._has("unpruned", "pruned"):
                train({"max-update": prune["update"], **whole_schedule(chosen)})
                write_json(self.folder / "unpruned.json", prune)
            if not self._has("pruned"):
                commands.append(self._prune(prune))
            held = {"prox": "l21", "prox-strength": 0, "prox-freeze-update": prune["update"]}
            # The best value is of an unpruned model, until there is a best checkpoint again.
            best = self.folder / "checkpoint_best.pt"
            train(held | {"reset-meters": not best.exists()})
        else:
            train({})
        return {
            "commands": [shown(command) for command in commands],
            # An interrupted run does not know how long its first part took.
            "train_cpu_seconds": None if begun else round(seconds[0], 1),
            "train_wall_seconds": None if begun else round(seconds[1], 1),
        }

    def _resumable(self) -> int:
        """Updates of checkpoint_last.pt; 0 if there is none.

        A kill may have cut it off, as it is a copy: then the newest of the others takes its place.
        """
        last = self.folder / "checkpoint_last.pt"
        if not last.exists():
            return 0
        try:
            return _updates_of(last)
        except CheckpointError as error:
            others = {n: path for path, n in self._checkpoints().items() if n is not None}
            newest = max(others, default=0)
            if not newest and self._has("pruned"):  # else a dense model would have its name
                raise RunError(f"{last}: {error}; remove {self.folder}, to begin anew") from error
            os.replace(last, self.folder / "checkpoint_damaged.pt")
            told = f"update {newest}" if newest else "the beginning"
            logger.warning("%s: %s; going on from %s", last, error, told)
            if newest:
                with writing(last) as beside:
                    beside.write(others[newest].read_bytes())
            return newest

    def _prune(self, prune: Mapping[str, Any]) -> list[str]:
        """Zero neurons of the last checkpoint with another tool, from which training goes on."""
        script = pruning_script(prune["method"])
        last, pruned = self.folder / "checkpoint_last.pt", self.folder / "checkpoint_pruned.pt"
        command = [sys.executable, str(script), str(last), str(pruned)]
        command += ["--sparsity", str(prune["sparsity"])]
        pruned.unlink(missing_ok=True)  # of a start that was killed before it was used
        pipeline.execute(command, self.folder / "prune.log", lock=self.lock)
        for unpruned in self._checkpoints():  # none of them to be selected
            if unpruned != last:
                unpruned.unlink()
        os.replace(pruned, last)
        write_json(self.folder / "pruned.json", prune)
        return command

    def _checkpoints(self) -> dict[Path, int | None]:
        """fairseq's, and their updates, where the names have them."""
        files = {}
        for path in sorted(self.folder.glob("checkpoint_*.pt")):
            if found := re.fullmatch(r"checkpoint_(\d+_(\d+)|best|last)\.pt", path.name):
                files[path] = found[2] and int(found[2])
        return files

    def _candidates(
        self, history: Sequence[Mapping[str, float]]
    ) -> tuple[dict[int, float], dict[int, Path]]:
        """Validation loss and file, by update, of the checkpoints that have the final size."""
        losses = {p["update"]: p["valid_loss"] for p in history if "valid_loss" in p}
        saved = {}
        for path, update in self._checkpoints().items():
            if update is None:
                try:
                    update = _updates_of(path)
                except CheckpointError as error:  # a copy that a kill has cut off
                    logger.warning("%s: %s; left out", path, error)
                    continue
            if math.isfinite(losses.get(update, math.nan)):
                saved[update] = path
        frozen = pipeline.frozen_at(self.folder / "train.log")
        if frozen is not None:
            saved = {update: path for update, path in saved.items() if update >= frozen}
        elif saved and shrinks(self.settings["train"]):  # to the end
            saved = {max(saved): saved[max(saved)]}
        if not saved:
            raise RunError(
                f"{self.folder}: no checkpoint with a validation loss, at update {frozen or 0} or "
                "later; is validate-interval-updates too large?"
            )
        return {update: losses[update] for update in sorted(saved)}, saved

    def _wanted(self, losses: Mapping[int, float]) -> list[int]:
        """The updates whose checkpoints are to be tried on the validation set."""
        if self.settings["select"] == "bleu":
            return list(losses)
        best = self.settings["select"] == "best"
        return [min(losses, key=losses.__getitem__) if best else max(losses)]

    def _translate(
        self, checkpoint: Path, subset: str, split: str, generate: Mapping[str, Any]
    ) -> Translated:
        """Translate and score a data set with these options of fairseq-generate."""
        log = self.folder / f"{split}.out"
        command = [sys.executable, "-m", "fairseq_cli.generate", *self._corpus()]
        command += ["--path", str(checkpoint), "--gen-subset", subset]
        command += shlex.split(REMOVE_BPE[self.record["bpe"]])
        pipeline.execute([*command, *options(generate)], log, lock=self.lock)
        target = self.record["languages"][1]
        references = pipeline.lines_of(self.data / "raw" / f"{split}.{target}")
        translations = pipeline.hypotheses(log, len(references))
        speed = tokens_per_second(log.read_text(encoding="utf-8"))
        log.unlink()
        found = pipeline.scores(translations, references)
        training = pipeline.lines_of(self.data / "raw" / f"train.{target}")
        for name, lines in sentence_groups(references, training).items():
            if lines:
                part = [[texts[line] for line in lines] for texts in (translations, references)]
                found[name] = {"lines": len(lines)} | pipeline.scores(*part)["BLEU"]
        return Translated(translations, found, speed)


def choices_of(generate: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The options of fairseq-generate, once for each value of the one that has a list of them.

    Raises:
        RunError: several have one, or a list is empty.
    """
    lists = [name for name, value in generate.items() if isinstance(value, list)]
    if not lists:
        return [dict(generate)]
    if len(lists) > 1 or not generate[lists[0]]:
        raise RunError(
            f"generate.{lists[-1]}: {generate[lists[-1]]}: one option can have a list of values, "
            "and it must not be empty"
        )
    return [{**generate, lists[0]: value} for value in generate[lists[0]]]


def difference(old: Mapping[str, Any], new: Mapping[str, Any], but: Container[str] = ()) -> str:
    """The first setting that differs, in words; empty if none does. Those in `but` do not count."""
    for key in dict.fromkeys((*old, *new)):
        before, now = old.get(key), new.get(key)
        if before == now or key in but:
            continue
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            return f"{key}.{difference(before, now)}"
        return f"{key} is {json.dumps(before)} there, {json.dumps(now)} here"
    return ""


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, which is then there as a whole or not at all."""
    with writing(path, force=True) as beside:
        beside.write(json.dumps(content, indent=1).encode() + b"\n")


@hydra.main(version_base="1.3", config_path=str(GRIDS), config_name="base")
def job(config: DictConfig) -> float:
    """One run of the grid; returns its validation loss, for a search (infinity if it failed)."""
    if "datasets" not in config:
        told = (
            "give datasets and runs" if "train" in config else "put `defaults: [base, _self_]` in"
        )
        raise RunError(f"no data sets and runs in the file: {told}")
    folder = Path(HydraConfig.get().runtime.output_dir)
    failed = folder / "failed.json"
    try:
        run = Run(settings_of(config), folder)
        try:
            with portalocker.Lock(folder / "lock", fail_when_locked=True) as lock:
                failed.unlink(missing_ok=True)
                return run.perform(lock.fileno())["valid_loss"]
        except portalocker.AlreadyLocked:
            time.sleep(1)  # it may just have begun
            run.check_same()
            logger.warning("another process is at it; left alone")
            return math.inf
    except Exception as error:  # one run's failure must not take the others with it
        known = isinstance(error, RunError | OSError)
        logger.error("failed: %s", error, exc_info=not known)
        write_json(failed, {"error": f"{error}" if known else f"{type(error).__name__}: {error}"})
        return math.inf


def progress(folder: Path) -> tuple[str, str]:
    """State of a run (running, done, failed) and a few words on it."""
    if (folder / "result.json").exists():  # also where a later start with others was refused
        result = json.loads((folder / "result.json").read_text())
        bleu = {s: found["BLEU"]["score"] for s, found in result["scores"].items()}
        return "done", ", ".join(f"{split} {score:.1f} BLEU" for split, score in bleu.items())
    if (folder / "failed.json").exists():
        return "failed", error_of(folder)
    if (folder / "trained.json").exists():
        return "running", "translating"
    points = pipeline.history(folder / "train.log") if (folder / "train.log").exists() else []
    told = points[-1] if points else {}
    aim = json.loads((folder / "settings.json").read_text())["train"]["max-update"]
    alive = f", {told['neurons_alive']:.0f} neurons alive" if "neurons_alive" in told else ""
    return "running", f"update {told.get('update', 0)} of {aim}{alive}"


def error_of(folder: Path) -> str:
    """Why the last start of a run failed."""
    return json.loads((folder / "failed.json").read_text())["error"]


def folders(output: Path) -> list[Path]:
    """Folders of runs that have begun, or have failed to. Other programs' are passed over."""
    begun = {path.parent for path in output.rglob("settings.json") if _is_ours(path)}
    return sorted(begun | set(failures(output)))


def _is_ours(settings: Path) -> bool:
    try:
        found = json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "seed" in found


def failures(output: Path) -> dict[Path, int]:
    """Folders of runs that failed, and when."""
    return {path.parent: path.stat().st_mtime_ns for path in output.rglob("failed.json")}


def baselines(config: DictConfig) -> list[str]:
    """Names of the runs that all others are compared with; one alone may stand without a list."""
    named = config.get("baselines")
    return [named] if isinstance(named, str) else list(named or [])


def unused_keys(config: DictConfig) -> list[str]:
    """Keys at the top that mean nothing here, and that no interpolation has: misspelt ones."""
    text = str(OmegaConf.to_container(config, resolve=False))
    known = (*KEYS, "hydra")
    return [k for k in map(str, config) if k not in known and not re.search(rf"\$\{{{k}\b", text)]


class Watch(Callback):
    """Tells how the runs are doing while Hydra's launcher waits, and collects them at the end."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Begin to watch, from a thread of this process."""
        output = Path(config.hydra.sweep.dir)
        if unused := unused_keys(config):
            told = f"{unused[0]} is none of {', '.join(KEYS)}, and nothing refers to it"
            print(f"grid.py: error: {told}", file=sys.stderr)
            sys.exit(2)
        for name in sorted(set(baselines(config)) - set(config.get("runs") or {})):
            told = f"baselines: {name} is none of the runs; nothing is compared with it"
            print(f"grid.py: warning: {told}", file=sys.stderr)
        _earlier.update(failures(output))
        _watchers.append(threading.Thread(target=watch, args=[output], daemon=True))
        _watchers[-1].start()

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Collect what there is; the status is 1 if a run has failed."""
        _ended.set()
        for watcher in _watchers:
            watcher.join()  # what it shows comes before what follows
        output = Path(config.hydra.sweep.dir)
        found = failures(output)
        failed = sorted(folder for folder in found if found[folder] != _earlier.get(folder))
        try:
            self._collect(output, baselines(config))
        except Exception as error:  # of which Hydra would make a warning, and status 0
            logger.error("cannot collect", exc_info=True)
            told = f"cannot collect the results: {type(error).__name__}: {error}"
            print(f"grid.py: error: {told}", file=sys.stderr)
            sys.exit(1)
        finally:
            for folder in failed:
                print(f"failed: {folder}: {error_of(folder)}", file=sys.stderr)
        if failed:
            sys.exit(1)

    def _collect(self, output: Path, bases: Sequence[str]) -> None:
        results = [folder for folder in folders(output) if (folder / "result.json").exists()]
        if not results:
            return
        summary = {"command": os.environ[TYPED]} | collect(output, results, bases)
        write_json(output / "results.json", summary)
        for folder, why in summary.get("not_compared", {}).items():
            told = f"{output / folder} is compared with nothing: {why}"
            print(f"grid.py: warning: {told}", file=sys.stderr)
        print(f"{table(summary)}\n\nall results: {output / 'results.json'}")


def watch(output: Path, pause: float = 2.0, every: float = 300.0) -> None:
    """Show a table on a terminal; elsewhere lines, at each change of state or so many seconds."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    console = Console(stderr=True)
    known: dict[Path, tuple[str, str]] = {}
    told: dict[Path, float] = {}

    def look() -> Table:
        table = Table("run", "state", "", box=None, pad_edge=False)
        for folder in folders(output):
            before, words = known.get(folder, ("", ""))
            # What is done stays so; the others' logs are read again.
            state, words = (before, words) if before == "done" else progress(folder)
            table.add_row(str(folder.relative_to(output)), state, words)
            due = state == "running" and time.monotonic() > told.get(folder, 0.0) + every
            if (due or before != state) and not console.is_terminal:
                console.print(f"{folder.relative_to(output)}: {state}, {words}", soft_wrap=True)
                told[folder] = time.monotonic()
            known[folder] = state, words
        return table

    # Transient: elsewhere than on a terminal its last table would run into what follows.
    terminal = console.is_terminal
    with Live(look(), console=console, auto_refresh=False, transient=not terminal) as live:
        ended = False
        while not ended:
            ended = _ended.wait(pause)
            live.update(look(), refresh=terminal)


def hydra_arguments(words: list[str]) -> list[str]:
    """GRID.yaml as Hydra's options: the folder to look in, and the name."""
    if words and words[0].endswith((".yaml", ".yml")):
        grid = Path(words[0])
        if not grid.is_file():
            print(f"grid.py: error: {grid}: no such file", file=sys.stderr)
            sys.exit(2)
        if grid.suffix == ".yml":
            print(f"grid.py: error: {grid}: Hydra reads *.yaml only; rename it", file=sys.stderr)
            sys.exit(2)
        # The file's own folder comes first: a copy of one of ours may have kept its name.
        where = ["--config-path", str(grid.resolve().parent), "--config-name", grid.stem]
        ours = f"file://{GRIDS}".replace("'", r"\'")
        return [*where, f"hydra.searchpath=['{ours}']", *words[1:]]
    return words


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    for noisy in ("hydra", "sacrebleu", "git"):  # fairseq has opened the root logger wide
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Jobs of submitit are new processes that look for this folder's modules.
    paths = [str(GRIDS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ[TYPED] = shlex.join(["python", "scripts/grid.py", *sys.argv[1:]])
    file = Path(sys.argv[1])
    sys.argv[1:] = hydra_arguments(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # to be caught here
    pipeline.end_with_commands()
    try:
        job()
    except UnicodeDecodeError as error:
        print(f"grid.py: error: a YAML file is not UTF-8: {error}", file=sys.stderr)
        sys.exit(2)
    except (RunError, HydraException, OmegaConfBaseException, YAMLError) as error:
        told = " ".join(str(error).split())
        key = re.match(r"Could not override '(\w+)'", told)
        if key and (file.resolve().parent / key[1]).is_dir():
            told = (
                f"{file}: there is a folder {key[1]} beside it, in which Hydra looks for settings"
            )
            told += f" that the key {key[1]} chooses; move the file elsewhere"
        print(f"grid.py: error: {told}", file=sys.stderr)
        sys.exit(2)

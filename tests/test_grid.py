"""scripts/grid.py: what a run's settings become, what a grid leaves behind, and how it fails."""

import argparse
import contextlib
import importlib
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import portalocker
import pytest
import sacrebleu
import torch
import yaml
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from small_models import build_model, checkpoint_of

from fairseq_autosize.checkpoint import write_checkpoint

SCRIPTS = ROOT / "scripts"
TINY = {
    "activation-fn": "relu",
    "max-update": 8,
    "warmup-updates": 4,
    "max-tokens": 400,
    "validate-interval-updates": 2,
    "log-interval": 1,
    **{f"{side}-layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}-embed-dim": 16 for side in ("encoder", "decoder")},
    **{f"{side}-ffn-embed-dim": 24 for side in ("encoder", "decoder")},
    **{f"{side}-attention-heads": 2 for side in ("encoder", "decoder")},
}


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        names = ("grid", "grid_results", "pipeline")
        yield {name: importlib.import_module(name) for name in names}


@pytest.fixture
def grid(scripts):
    return scripts["grid"]


@pytest.fixture
def grid_results(scripts):
    return scripts["grid_results"]


def composed(folder: Path, content: dict, *overrides: str):
    (folder / "mine.yaml").write_text(yaml.safe_dump({"defaults": ["base", "_self_"], **content}))
    search = f"hydra.searchpath=[file://{SCRIPTS / 'grids'}]"
    with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
        return compose("mine", overrides=[search, *overrides])


GRID = {
    "output": "out",
    "datasets": {"a": {"path": "data/a", "train": {"max-update": 500, "dropout": 0.4}}},
    "runs": {
        "dense": None,
        "late": {
            "train": {
                "prox": "l21",
                "dropout": 0.2,
                "prox-freeze-update": "${updates:0.8}",
                "prox-start-update": "${updates:0.8,-1}",
            },
            "generate": {"beam": 2},
            "select": "last",
        },
        "odd": {"trian": {}},
        "chosen": {"select": "first"},
    },
}


def test_a_run_overrides_its_data_set_and_that_the_base(grid, tmp_path):
    config = composed(tmp_path, GRID, "data=a", "run=late", "seed=3", "train.lr=0.01")
    settings = grid.settings_of(config)
    train = settings["train"]
    assert (train["max-update"], train["dropout"], train["lr"], train["seed"]) == (
        500,
        0.2,
        0.01,
        3,
    )
    assert (train["prox-freeze-update"], train["prox-start-update"]) == (400, 399)
    assert (settings["generate"]["beam"], settings["select"]) == (2, "last")
    dense = grid.settings_of(composed(tmp_path, GRID, "data=a", "run=dense"))
    assert (dense["train"]["dropout"], dense["generate"]["beam"]) == (0.4, 5)
    assert "prox" not in dense["train"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run=sparse", "runs has no sparse, but chosen, dense, late, odd"),
        ("run=odd", "runs.odd: no key trian, but train, generate, select, keep, prune"),
        ("run=chosen", "select first: must be one of best, bleu, last"),
        (
            "datasets.a.train.max-update=null",
            "train.max-update None: must be a number of updates, 1 or more",
        ),
        (
            "datasets.a.train.max-update=1e3",
            "train.max-update 1000.0: must be a number of updates, 1 or more",
        ),
        (
            "train.validate-interval-updates=0",
            "train.validate-interval-updates 0: must be a number of updates, 1 or more",
        ),
        ("datasets.a.path=null", "datasets.a: no path of a folder made by prepare_data.py"),
        ("data=b", "datasets has no b, but a"),
        ("runs.dense=narrow", "runs.dense: must be options and their values, not narrow"),
        ("+runs.dense.train=[x]", "runs.dense.train: must be options and their values, not ['x']"),
    ],
)
def test_wrong_names_are_told(grid, tmp_path, override, message):
    config = composed(tmp_path, GRID, "data=a", "run=dense", override)
    with pytest.raises(grid.RunError) as error:
        grid.settings_of(config)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("content", "status", "told"),
    [
        ({"selct": "last"}, 2, "error: selct is none of train, generate, select, "),
        ({"width": 8, "train": {"lr": "${width}"}, "baselines": []}, None, ""),
        ({"jobs": 2, "hydra": {"launcher": {"n_jobs": "${jobs}"}}, "baselines": []}, None, ""),
        ({"baselines": ["dense", "dens"]}, None, "warning: baselines: dens is none of the runs"),
        ({}, None, ""),
    ],
)
def test_keys_and_baselines_that_nothing_has(
    grid, tmp_path, capsys, monkeypatch, content, status, told
):
    config = {"hydra": {"sweep": {"dir": str(tmp_path)}}, "runs": {"dense": None}}
    config = OmegaConf.merge({"baselines": ["dense"]}, config, content)
    monkeypatch.setattr(grid, "watch", lambda output: None)
    with pytest.raises(SystemExit) if status else contextlib.nullcontext() as ended:
        grid.Watch().on_multirun_start(config)
    assert not status or ended.value.code == status
    printed = capsys.readouterr().err
    assert told in printed if told else not printed


@pytest.mark.parametrize(
    ("generate", "number"),
    [({"beam": 5}, 1), ({"beam": 5, "lenpen": [1, 2]}, 2), ({"lenpen": [1.5]}, 1)],
)
def test_a_list_of_values_is_tried(grid, generate, number):
    choices = grid.choices_of(generate)
    assert len(choices) == number
    assert all(choice.keys() == generate.keys() for choice in choices)
    assert not any(isinstance(value, list) for choice in choices for value in choice.values())


@pytest.mark.parametrize("generate", [{"beam": [1, 5], "lenpen": [1, 2]}, {"lenpen": []}])
def test_lists_that_leave_no_choice_or_two_are_refused(grid, generate):
    with pytest.raises(grid.RunError, match=r"generate\.lenpen: .*: one option can have a list"):
        grid.choices_of(generate)


def test_options_of_a_mapping(grid):
    chosen = {"arch": "transformer", "share-all-embeddings": True, "cpu": False, "lr": None, "n": 0}
    words = ["--arch", "transformer", "--share-all-embeddings", "--n", "0"]
    assert grid.options(chosen) == words
    assert grid.options({"prox-bias": False, "prox-couple": False}) == ["--no-prox-bias"]
    with pytest.raises(grid.RunError, match="max_update: write max-update, as on the command line"):
        grid.options({"max_update": 3})


@pytest.mark.parametrize(
    ("train", "found"),
    [
        ({"prox": "l21", "prox-target-sparsity": 0.5}, True),
        ({"prox": "l21", "prox-target-sparsity": None, "prox-freeze-update": 0}, True),
        ({"prox": "l21", "prox-target-sparsity": False, "prox-strength": 1}, False),
        ({"prox": None, "prox-target-sparsity": 0.5}, False),
        ({"prox": False, "prox-target-sparsity": 0.5}, False),
        ({"prox": "none", "prox-target-sparsity": 0.5}, False),
        ({"prox-target-sparsity": 0.5}, False),
    ],
)
def test_which_trainings_have_a_freeze(train, found, grid):
    assert grid.freezes(train) is found


def test_a_copy_of_a_grid_may_keep_its_name(tmp_path):
    (copies := tmp_path / "my grids").mkdir()
    text = (SCRIPTS / "grids" / "first.yaml").read_text()
    (copies / "first.yaml").write_text(text.replace("runs/first", "mine"))
    command = [sys.executable, SCRIPTS / "grid.py", "my grids/first.yaml", "--cfg", "job"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    config = yaml.safe_load(shown.stdout)
    assert (config["output"], config["train"]["encoder-layers"]) == ("mine", 3)


def test_the_package_may_lie_in_any_folder(grid, tmp_path, monkeypatch):
    ours = tmp_path / "o'brien's \u00fc"
    monkeypatch.setattr(grid, "GRIDS", ours)
    (tmp_path / "mine.yaml").touch()
    path = grid.hydra_arguments([str(tmp_path / "mine.yaml")])[-1]
    assert OverridesParser.create().parse_override(path).value() == [f"file://{ours}"]


@pytest.fixture
def bare_run(grid, tmp_path):
    """A run with 4 + 6 updates behind it, of which fairseq has kept the last as such only."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prepare.json").write_text("{}")
    valid = '... | valid | {{"valid_loss": "{}", "valid_num_updates": "{}"}}\n'
    (tmp_path / "train.log").write_text(valid.format(7.5, 4) + valid.format(7.25, 6))
    for name, update in (("1_4", 4), ("best", 6), ("last", 6)):
        model = {"x": torch.zeros(1)}
        state = {"args": argparse.Namespace(), "cfg": None, "model": model, "extra_state": {}}
        state["optimizer_history"] = [{"num_updates": 0}, {"num_updates": update}]
        write_checkpoint(state, tmp_path / f"checkpoint_{name}.pt")

    def run(frozen: int | None = None, **settings: object):
        if frozen is not None:
            with (tmp_path / "train.log").open("a") as log:
                log.write(f"... | frozen after update {frozen}: 2 of 4 groups are dead\n")
        return grid.Run({"path": str(tmp_path / "data"), "train": {}, **settings}, tmp_path)

    return run


@pytest.mark.parametrize(
    ("settings", "updates"),
    [
        ({}, [4, 6]),
        *(({"train": {"prox": off}}, [4, 6]) for off in ("none", None, False)),
        ({"train": {"prox": "l21"}}, [6]),
        ({"train": {"prox": "l21"}, "frozen": 4}, [4, 6]),
        ({"train": {"prox": "l21"}, "frozen": 5}, [6]),
    ],
)
def test_checkpoints_that_may_be_selected(settings, updates, bare_run):
    run = bare_run(**settings)
    losses, files = run._candidates(
        importlib.import_module("pipeline").history(run.folder / "train.log")
    )
    assert losses == {update: {4: 7.5, 6: 7.25}[update] for update in updates}
    assert {update: files[update].name for update in updates} == {
        update: {4: "checkpoint_1_4.pt", 6: "checkpoint_last.pt"}[update] for update in updates
    }


def test_a_folder_with_something_else_is_left_alone(bare_run, grid, tmp_path):
    settings = tmp_path / "settings.json"
    for path in tmp_path.glob("checkpoint*.pt"):
        path.unlink()
    settings.write_text(json.dumps({"train": {"dropout": "much"}, "path": "x"}))
    run = bare_run(seed=1)
    run._claim()  # nothing came of what was there
    assert not (tmp_path / "train.log").exists()
    noted = json.loads(settings.read_text())
    assert noted.pop("prepared")["sha256"] is None and noted == run.settings

    (tmp_path / "result.json").write_text("{}")
    run._claim()
    with pytest.raises(grid.RunError, match=r"has a run of other settings \(seed is 1 there, 2 he"):
        bare_run(seed=2)._claim()
    (tmp_path / "elsewhere").symlink_to(tmp_path / "data")
    bare_run(seed=1, path=str(tmp_path / "elsewhere"))._claim()  # which has the same data
    bare_run(seed=1)._claim()
    run.record["sha256"] = {"train.xx": "0" * 64}
    with pytest.raises(grid.RunError, match=r"has a run on other data than now in .*data; choose"):
        run._claim()
    settings.write_text(json.dumps(run.settings))  # as earlier versions did
    run._claim()
    settings.unlink()
    with pytest.raises(grid.RunError, match=r"has a run, but not its settings\.json; remove"):
        run._claim()


@pytest.mark.parametrize("left", [[], ["checkpoint_pruned.pt"]])
def test_a_run_whose_checkpoints_were_removed_prunes_again(left, bare_run, grid, monkeypatch):
    """With what is noted of the first start it would train on from nothing as if it had pruned."""
    prune = {"method": "torch-pruning", "sparsity": 0.5, "update": 4}
    train = {"validate-interval-updates": 2, "max-update": 8, "lr-scheduler": "polynomial_decay"}
    run = bare_run(prune=prune, train=train)
    run.record["languages"] = ["xx", "yy"]
    made = (run.folder / "checkpoint_last.pt").read_bytes()
    for name in ("unpruned.json", "pruned.json"):
        (run.folder / name).write_text("{}")
    for path in run._checkpoints():
        path.unlink()
    for name in left:
        (run.folder / name).touch()
    commands = []

    def execute(command, log, append=False, lock=None):
        commands.append(command)
        if "fairseq_cli.train" in command:
            log.touch()
        for name in ("last", "pruned"):
            (run.folder / f"checkpoint_{name}.pt").write_bytes(made)
        return 1.0, 1.0

    monkeypatch.setattr(grid.pipeline, "execute", execute)
    run._claim()
    assert {path.name for path in run.folder.iterdir()} == {"data", "settings.json"}
    run._train()
    programs = [["prune" in command[1], "--prox" in command] for command in commands]
    assert programs == [[False, False], [True, False], [False, True]]
    # The first part's learning rate is that of the whole training.
    ends = [("--max-update", "4"), ("--total-num-update", "8")]
    assert all(end in itertools.pairwise(commands[0]) for end in ends)
    assert (run.folder / "pruned.json").exists()


def test_a_training_that_is_over_is_not_begun_again(bare_run, grid, monkeypatch):
    """A kill before this was noted: fairseq would make one more update."""
    run = bare_run(train={"validate-interval-updates": 2, "max-update": 6}, prune=None)
    run.record["languages"] = ["xx", "yy"]
    monkeypatch.setattr(grid.pipeline, "execute", None)
    assert "--max-update 6" in run._train()["commands"][0]


def test_copies_that_a_kill_has_cut_off(bare_run, grid, monkeypatch, caplog):
    """checkpoint_last.pt is the newest other one's again; one that is a candidate is left out."""
    train = {"validate-interval-updates": 2, "max-update": 8}
    run = bare_run(train=train, prune=None, select="last")
    run.record["languages"] = ["xx", "yy"]
    for name in ("best", "last"):
        path = run.folder / f"checkpoint_{name}.pt"
        path.write_bytes(path.read_bytes()[:-50])
    losses, _ = run._candidates(grid.pipeline.history(run.folder / "train.log"))
    assert losses == {4: 7.5} and caplog.text.count("; left out") == 2
    began = []

    def execute(command, log, append=False, lock=None):
        began.append(grid._updates_of(run.folder / "checkpoint_last.pt"))
        return 1.0, 1.0

    monkeypatch.setattr(grid.pipeline, "execute", execute)
    run._train()
    assert began == [4] and "checkpoint_last.pt: truncated" in caplog.text
    assert "going on from update 4" in caplog.text

    (run.folder / "checkpoint_1_4.pt").unlink()
    (run.folder / "checkpoint_last.pt").write_bytes(b"")
    (run.folder / "pruned.json").write_text("{}")
    with pytest.raises(grid.RunError, match=r"checkpoint_last\.pt: .*; remove .*, to begin anew"):
        run._train()
    (run.folder / "pruned.json").unlink()
    run.folder.joinpath("checkpoint_best.pt").unlink()
    assert run._resumable() == 0 and "going on from the beginning" in caplog.text


def test_a_pruning_that_was_killed_at_its_end_is_done_again(bare_run, grid, monkeypatch):
    run = bare_run()
    (run.folder / "checkpoint_pruned.pt").write_text("old")

    def execute(command, log, lock=None):
        with (run.folder / "checkpoint_pruned.pt").open("x") as file:  # which must not exist
            file.write("new")

    monkeypatch.setattr(grid.pipeline, "execute", execute)
    run._prune({"method": "torch-pruning", "sparsity": 0.5, "update": 4})
    assert (run.folder / "checkpoint_last.pt").read_text() == "new"


def test_the_pruning_script_tells_in_a_line_what_it_cannot_write(tmp_path):
    pytest.importorskip("torch_pruning")
    model, args = build_model()
    write_checkpoint(checkpoint_of(model, args), tmp_path / "in.pt")
    (tmp_path / "out.pt").touch()
    command = [sys.executable, SCRIPTS / "prune_with_torch_pruning.py", "in.pt", "out.pt"]
    command += ["--sparsity", "0.5"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "OUTPUT out.pt: exists already; choose" in result.stderr.splitlines()[-1]
    command[3] = "absent/out.pt"
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: absent/out.pt: cannot write: No such file" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "torchpruning"}, "prune.method torchpruning: there is no /"),
        ({"sparsity": 1}, "prune.sparsity 1: must be a share between 0 and 1"),
        ({"update": 8}, "prune.update 8: must be a number of updates below 8"),
        ({"amount": 3}, "prune has method, sparsity, update, amount; it takes"),
    ],
)
def test_pruning_is_checked_before_the_training(changed, message, grid):
    prune = {"method": "torch-pruning", "sparsity": 0.5, "update": 4}
    grid.check_pruning(prune, 8)
    with pytest.raises(grid.RunError, match=message):
        grid.check_pruning(prune | changed, 8)


def test_what_is_noted_without_git(scripts, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert scripts["pipeline"].git_state(ROOT) == "none"
    assert {"python", "torch", "fairseq-fixed"} <= scripts["pipeline"].versions().keys()


def test_the_best_of_several_translations_is_scored(scripts, tmp_path):
    (tmp_path / "log").write_text("H-1\t-0.1\tone\nH-1\t-0.9\tx\nH-0\t-0.2\tzero\nH-0\t-3\ty\n")
    assert scripts["pipeline"].hypotheses(tmp_path / "log", 2) == ["zero", "one"]


def test_paths_that_fairseq_would_split(grid, tmp_path):
    with pytest.raises(grid.RunError, match=r"l21:1\.5: fairseq takes : for the end of a path"):
        grid.Run({"path": str(tmp_path)}, tmp_path / "l21:1.5")


@pytest.mark.parametrize("wrong", [{"OUT": "l21:1.5"}, {"DATA": "a:b"}])
def test_experiments_with_such_paths(wrong, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    paths = {"DATA": "data", "OUT": "out"} | wrong
    monkeypatch.setattr(sys, "argv", ["experiment.py", *paths.values()])
    with pytest.raises(SystemExit):
        importlib.import_module("experiment").parse_args()
    ((name, path),) = wrong.items()
    assert f"error: {name} {path}: fairseq takes : for the end of a path" in capsys.readouterr().err


def test_results_that_cannot_be_collected(grid, output, monkeypatch, capsys):
    monkeypatch.setenv(grid.TYPED, "grid.py")
    foreign = output / "demo" / "dense"  # of experiment.py
    foreign.mkdir(parents=True)
    (foreign / "settings.json").write_text('{"train": []}')
    (foreign / "result.json").write_text('{"run": "dense"}')
    (output / "settings.json").write_text("{  // of an editor")
    for result in output.rglob("seed-*/result.json"):
        (result.parent / "settings.json").write_text('{"seed": 1}')
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(output)}}, "baselines": "base"})
    watch = grid.Watch()
    watch.on_multirun_end(config)
    assert "| worse |" in capsys.readouterr().out
    summary = json.loads((output / "results.json").read_text())
    assert {entry["baseline"] for entry in summary["comparisons"]} == {"base"}
    config.baselines = None
    watch.on_multirun_end(config)
    (output.parent / "data" / "raw" / "test.en").unlink()
    config.baselines = ["base"]
    with pytest.raises(SystemExit) as ended:
        watch.on_multirun_end(config)
    told = capsys.readouterr().err
    assert ended.value.code == 1 and "grid.py: error: cannot collect the results: FileNot" in told


def test_sentences_with_rare_words_and_long_ones(grid_results):
    training = ["often"] * 6 + ["seldom"] * 5
    references = ["often", "often seldom", "never often often", "often often often often"]
    groups = grid_results.sentence_groups(references, training)
    assert groups == {"rare": [1, 2], "long": [3]}


def read(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.fixture
def output(tmp_path):
    """Translations of three runs: `base`, one much worse, and one that is the same."""
    raw = tmp_path / "data" / "raw"
    raw.mkdir(parents=True)
    lines = [f"the cat number {n} sat on mat number {n + 1} today" for n in range(60)]
    (raw / "test.en").write_text("".join(f"{line}\n" for line in lines))
    for run, keep in (("base", 6), ("worse", 4), ("same", 6)):
        for seed in (1, 2):
            folder = tmp_path / "out" / "a" / run / f"seed-{seed}"
            folder.mkdir(parents=True)
            said = [" ".join(line.split()[: keep + (n + seed) % 3]) for n, line in enumerate(lines)]
            (folder / "test.txt").write_text("".join(f"{line}\n" for line in said))
            result = {
                "data": "a",
                "run": run,
                "seed": seed,
                "path": str(tmp_path / "data"),
                "target": "en",
                "valid_loss": 4.0,
                "scores": {"test": {"BLEU": {"score": 10.0 * keep + seed}, "chrF2": {"score": 5}}},
                "generate": {},
                "train": {},
                "neurons": {
                    "ffn_neurons": {"total": 8, "pruned": 8 - keep},
                    "parameters": {"compact": 1000 * keep},
                },
            }
            (folder / "result.json").write_text(json.dumps(result))
    return tmp_path / "out"


def test_collected_runs_are_compared_with_the_baselines(grid_results, output):
    folders = sorted(path.parent for path in output.rglob("result.json"))
    summary = grid_results.collect(output, folders, ["base", "absent"])
    found = {entry["run"]: entry for entry in summary["comparisons"]}
    assert set(found) == {"worse", "same"}
    references = read(output.parent / "data" / "raw" / "test.en")

    def score(metric: sacrebleu.BLEU | sacrebleu.CHRF, run: str, seed: int) -> float:
        lines = read(output / "a" / run / f"seed-{seed}" / "test.txt")
        return metric.corpus_score(lines, [references]).score

    assert found["worse"]["seeds"] == [1, 2]
    lost = {}
    for measure, metric in (("BLEU", sacrebleu.BLEU()), ("chrF2", sacrebleu.CHRF())):
        each = [score(metric, "base", seed) - score(metric, "worse", seed) for seed in (1, 2)]
        lost[measure] = sum(each) / 2
        worse, same = found["worse"][measure], found["same"][measure]
        assert lost[measure] > 10
        assert worse["difference"] == pytest.approx(-lost[measure], abs=1e-3)
        assert same["difference"] == 0
        assert worse["p"] < 0.01 and same["p"] == 1
        assert worse["won"] == 0
    assert abs(lost["BLEU"] - lost["chrF2"]) > 0.5, "or their columns may be mixed up"
    row = next(line for line in grid_results.table(summary).splitlines() if "| worse |" in line)
    assert "| 2 | 50.0 % | 4,000 |" in row and "41.5 (41.0 42.0)" in row
    assert f"{-lost['BLEU']:.1f} (p 0.00" in row and ", 0/2 seeds)" in row
    parts = grid_results.parts_table(summary).splitlines()
    assert f"{-lost['chrF2']:.1f} (p 0.00" in next(line for line in parts if "| worse |" in line)


def test_the_bootstrap_rejects_as_often_as_it_says(grid_results):
    """Two systems of equal worth, many times: p is below 0.1 in one of ten (one-sided: in two)."""
    generator = np.random.default_rng(1)

    def statistics(quality: np.ndarray) -> np.ndarray:
        """Sentences of 10 words; matches of 1 to 4 words as often as their quality says."""
        grams = np.arange(10, 6, -1)
        matched = generator.binomial(grams, quality[:, None] ** np.arange(1, 5))
        lengths = np.full((len(quality), 2), 10)
        return np.hstack([matched, np.tile(grams, (len(quality), 1)), lengths])

    paired = partial(grid_results.paired_bootstrap, score=grid_results.bleu_of)
    found = []
    for _ in range(150):
        quality = generator.uniform(0.4, 0.9, size=100)
        found.append(paired([(statistics(quality), statistics(quality))]))
    low = sum(each["p"] < 0.1 for each in found) / len(found)
    assert 0.04 < low < 0.16
    assert max(each["p"] for each in found) > 0.9


def test_the_bootstrap_takes_all_seeds_translations_of_a_sentence_together(grid_results):
    """The same two translations thrice are no more evidence than once."""
    generator = np.random.default_rng(2)
    grams = np.tile(np.arange(10, 6, -1), (100, 1))

    def statistics(more: float) -> np.ndarray:
        matched = generator.binomial(grams, 0.5 + more)
        return np.hstack([matched, grams, np.full((100, 2), 10)])

    pair = statistics(0.02), statistics(0.0)
    once, thrice = (grid_results.paired_bootstrap([pair] * n, grid_results.bleu_of) for n in (1, 3))
    assert thrice["p"] == pytest.approx(once["p"]) and 0.01 < once["p"] < 0.99
    assert thrice["difference"] == once["difference"] and thrice["won"] == 3 * once["won"]


def test_runs_on_data_that_changed_or_is_gone_are_not_compared(grid_results, output):
    """Their translations are not those of the references that are there now."""
    folders = sorted(path.parent for path in output.rglob("result.json"))
    data = output.parent / "data"
    prepare = data / "prepare.json"
    for sha, folder in zip("111112", folders, strict=True):
        prepared = {"languages": ["x"], "bpe": "b", "vocab_size": 1, "sha256": sha}
        prepare.write_text(json.dumps(prepared))  # the last one's is there in the end
        (folder / "settings.json").write_text(json.dumps({"prepared": prepared}))
    summary = grid_results.collect(output, folders, ["base"])
    assert len(summary["results"]) == 6 and summary["comparisons"] == []
    told = summary["not_compared"]
    assert list(told) == [str(folder.relative_to(output)) for folder in folders[:5]]
    assert all("other data now than it was made on" in why for why in told.values())
    for folder in folders[1:]:
        (folder / "settings.json").write_text(json.dumps({"prepared": prepared}))
    (entry,) = (
        x
        for x in grid_results.collect(output, folders, ["base"])["comparisons"]
        if x["run"] == "worse"
    )
    assert entry["seeds"] == [2]  # of base, seed 1 is of other data

    gone = json.loads((folders[2] / "result.json").read_text())
    for run in ("base", "half"):
        folder = output / "b" / run / "seed-1"
        shutil.copytree(folders[2], folder)
        other = {"data": "b", "run": run, "seed": 1, "path": str(output / "gone")}
        (folder / "result.json").write_text(json.dumps(gone | other))
        folders.append(folder)
    summary = grid_results.collect(output, folders, ["base"])
    assert {entry["data"] for entry in summary["comparisons"]} == {"a"}
    told = [why for folder, why in summary["not_compared"].items() if folder.startswith("b/")]
    assert len(told) == 2 and all("gone, its data, is not there" in why for why in told)


def test_runs_of_a_sweep_are_compared_with_the_same_value(grid_results, output):
    """Each value of a further key has a folder of its own, in which `worse` or `base` is worse."""
    for run in ("base", "worse"):
        for seed in (1, 2):
            folder = output / "a" / run / f"seed-{seed}"
            for value, texts in (("0.1", run), ("0.3", "worse" if run == "base" else "base")):
                copied = output / "a" / run / value / f"seed-{seed}"
                shutil.copytree(folder, copied)
                shutil.copy(output / "a" / texts / f"seed-{seed}" / "test.txt", copied)
    folders = sorted(path.parent for path in output.rglob("*/*/*/result.json"))
    folders = [folder for folder in folders if folder.parent.name in ("0.1", "0.3")]
    summary = grid_results.collect(output, folders, ["base"])
    found = {entry["run"]: entry for entry in summary["comparisons"]}
    assert set(found) == {"worse/0.1", "worse/0.3"}
    assert all(entry["seeds"] == [1, 2] for entry in found.values())
    first, second = (found[f"worse/{value}"]["BLEU"]["difference"] for value in (0.1, 0.3))
    assert first == -second < -10
    table = grid_results.table(summary)
    assert all(
        f"| {run}/{value} | 2 |" in table for run in ("base", "worse") for value in (0.1, 0.3)
    )


def test_a_searchs_table_tells_what_was_tried(grid_results, output):
    """Folders with a number alone, and two with the value, which needs no column then."""
    folders = []
    for number, (dropout, lr) in enumerate([(0.1 + 0.2, 0.003), (0.1, 0.003), (0.1, 0.001)]):
        folder = output / "a" / "base" / f"{number}" / "seed-1"
        shutil.copytree(output / "a" / "base" / "seed-1", folder)
        result = json.loads((folder / "result.json").read_text())
        train = {"dropout": dropout, "lr": lr, "seed": number, "arch": "x"}
        (folder / "result.json").write_text(json.dumps(result | {"train": train}))
        folders.append(folder)
    for value in (0.1, 0.3):
        folder = output / "a" / "worse" / f"dropout-{value}" / "seed-1"
        shutil.copytree(output / "a" / "worse" / "seed-1", folder)
        result = json.loads((folder / "result.json").read_text())
        train = {"dropout": value, "lr": 0.003}
        (folder / "result.json").write_text(json.dumps(result | {"train": train}))
        folders.append(folder)
    summary = grid_results.collect(output, folders, ["base"])
    header, _, *rows = [line.split(" | ") for line in grid_results.table(summary).splitlines()]
    assert header[2:4] == ["dropout", "lr"] and "seed" not in header
    told = {row[1]: row[2:4] for row in rows}
    assert told["base/0"] == ["0.3", "0.003"] and told["base/2"] == ["0.1", "0.001"]
    assert told["worse/dropout-0.1"] == ["", ""]


def test_values_of_a_sweep_that_is_half_done_are_not_mixed(grid_results, output):
    """Only base/0.1 and worse/0.3 are there: each once, and with nothing to be compared with."""
    for run, value in (("base", "0.1"), ("worse", "0.3")):
        shutil.move(output / "a" / run / "seed-1", output / "a" / run / value / "seed-1")
    folders = sorted(path.parent for path in output.rglob("0.?/seed-1/result.json"))
    summary = grid_results.collect(output, folders, ["base"])
    assert len(folders) == 2 and summary["comparisons"] == []
    table = grid_results.table(summary)
    assert "| base/0.1 | 1 |" in table and "| worse/0.3 | 1 |" in table


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, corpus) -> Path:
    """The tiny corpus, as prepare_data.py would leave it."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "data-bin").symlink_to(corpus)
    (folder / "raw").mkdir()
    for split in ("train", "valid", "test"):
        for language in ("xx", "yy"):
            shutil.copy(corpus.parent / f"{split}.{language}", folder / "raw")
    record = {"languages": ["xx", "yy"], "bpe": "none", "gen_subsets": {"test": "test"}}
    (folder / "prepare.json").write_text(json.dumps(record))
    return folder


@pytest.mark.heavy
def test_a_grid_runs_resumes_and_tells_what_failed(tmp_path, prepared):
    content = {
        "defaults": ["base", {"override hydra/launcher": "joblib"}, "_self_"],
        "output": "out",
        "datasets": {"tiny": {"path": str(prepared)}},
        "runs": {
            "magnitude": {
                "select": "bleu",
                "train": {
                    "prox": "l21",
                    "prox-target-sparsity": 0.5,
                    "prox-start-update": "${updates:0.5,-1}",
                    "prox-freeze-update": "${updates:0.5}",
                },
            },
            "peer": {
                "prune": {
                    "method": "torch-pruning",
                    "sparsity": 0.5,
                    "update": "${updates:0.5}",
                }
            },
            "wrong": {"train": {"dropout": "much"}},
        },
        "baselines": ["magnitude"],
        "train": {**TINY, "cpu": True},
        "generate": {"beam": 3, "max-len-b": 10, "lenpen": [-3, 1, 9]},
        "hydra": {"launcher": {"n_jobs": 2}, "sweeper": {"params": {"data": "tiny"}}},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))

    def grid(*overrides: str) -> subprocess.CompletedProcess:
        command = [sys.executable, SCRIPTS / "grid.py", "mine.yaml", *overrides]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    first = grid("run=magnitude,peer,wrong")
    assert first.returncode == 1, first.stderr
    assert "failed: out/tiny/wrong/seed-1: exit 2, see the end of" in first.stderr
    assert "invalid" in first.stderr and "much" in first.stderr
    assert not re.search(r"^run +state", first.stderr, re.M), "the table of terminals"
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["command"] == "python scripts/grid.py mine.yaml run=magnitude,peer,wrong"
    assert [result["run"] for result in results["results"]] == ["magnitude", "peer"]
    for result in results["results"]:
        neurons = result["neurons"]["ffn_neurons"]
        assert (neurons["total"], neurons["pruned"]) == (48, 24)
        assert result["selected_update"] in (4, 6, 8), "not from before the freeze"
        if result["run"] == "magnitude":
            found = {int(update): bleu for update, bleu in result["BLEU valid"].items()}
            assert {4, 8} <= set(found) and len(set(found.values())) > 1
            assert found[result["selected_update"]] == max(found.values())
            assert max(found.values()) == result["scores"]["valid"]["BLEU"]["score"]
        losses = {p["update"]: p["valid_loss"] for p in result["history"] if "valid_loss" in p}
        assert result["valid_loss"] == losses[result["selected_update"]]
        assert not any(word.startswith(str(ROOT)) for word in result["commands"][0].split())
        folder = tmp_path / "out" / result["folder"]
        assert [path.name for path in folder.glob("*.pt")] == ["checkpoint_selected.pt"]
        assert len(read(folder / "test.txt")) == 43
        # The length penalty is the validation set's best, and the translations are those of it.
        tried = result["chosen"]["BLEU valid"]
        assert len(set(tried)) > 1, "or this shows nothing"
        assert result["chosen"]["generate"]["lenpen"] == [-3, 1, 9][tried.index(max(tried))]
        for split in ("valid", "test"):
            references = read(prepared / "raw" / f"{split}.yy")
            bleu = sacrebleu.corpus_bleu(read(folder / f"{split}.txt"), [references])
            told = result["scores"][split]["BLEU"]
            assert told["score"] == pytest.approx(bleu.score, abs=0.006)
            assert told["length"] == pytest.approx(bleu.sys_len / bleu.ref_len, abs=1e-4)
        assert result["scores"]["valid"]["BLEU"]["score"] == max(tried)
    (comparison,) = [c for c in results["comparisons"] if c["split"] == "test"]
    assert (comparison["run"], comparison["baseline"]) == ("peer", "magnitude")

    result = tmp_path / "out" / "tiny" / "peer" / "seed-1" / "result.json"
    before = result.stat().st_mtime_ns
    again = grid("run=peer")
    assert again.returncode == 0, "an earlier start's failure is none of this one's"
    assert result.stat().st_mtime_ns == before and "| tiny | peer |" in again.stdout
    other = grid("run=peer", "train.dropout=0.2")
    with portalocker.Lock(result.parent / "lock"):  # as where two at once have one folder
        same, taken = grid("run=peer"), grid("run=peer", "train.dropout=0.2")
    for refused in (other, taken):
        assert refused.returncode == 1
        assert "other settings (train.dropout is 0.3 there, 0.2 here); choose" in refused.stderr
        assert "peer/seed-1: done" in refused.stderr, "what is there is none the worse"
    assert same.returncode == 0
    assert result.stat().st_mtime_ns == before

    (prepared / "raw").rename(prepared / "away")
    apart = grid("run=peer")
    (prepared / "away").rename(prepared / "raw")
    told = f"out/tiny/peer/seed-1 is compared with nothing: {prepared}, its data, is not there"
    assert apart.returncode == 0 and f"grid.py: warning: {told}" in apart.stderr


@pytest.mark.heavy
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_grid_that_is_told_to_end_leaves_no_training_behind(jobs, tmp_path, prepared):
    content = {
        "defaults": ["base", {"override hydra/launcher": "joblib"}, "_self_"],
        "output": "out",
        "datasets": {"tiny": {"path": str(prepared)}},
        "runs": {"endless": None},
        "train": {**TINY, "cpu": True, "max-update": 10**6, "validate-interval-updates": 10**6},
        "hydra": {
            "launcher": {"n_jobs": jobs},
            "sweeper": {"params": {"data": "tiny", "run": "endless", "seed": "1,2"}},
        },
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))

    def trainings() -> int:
        found = 0
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                words = (process / "cmdline").read_bytes()
                here = (process / "cwd").resolve() == tmp_path
                found += here and b"fairseq_cli.train" in words
        return found

    def wait_until(number: int) -> None:
        end = time.monotonic() + 120
        while trainings() != number and time.monotonic() < end:
            time.sleep(0.2)
        assert trainings() == number

    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, SCRIPTS / "grid.py", "mine.yaml"]
        grid = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
        try:
            wait_until(jobs)
        finally:
            grid.terminate()
        assert grid.wait(60) == 128 + signal.SIGTERM
    wait_until(0)


def test_usage_and_a_missing_file(tmp_path):
    (tmp_path / "mine.yml").touch()
    text = "defaults: [base, _self_]\noutput: o\nhydra: {sweeper: {params: {data: a}}}\n"
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "data").mkdir()
    for words, status, told in (
        ([], 2, "python scripts/grid.py GRID.yaml"),
        (["absent.yaml"], 2, "absent.yaml: no such file"),
        (["mine.yml"], 2, "mine.yml: Hydra reads *.yaml only; rename it"),
        (["mine.yaml"], 2, "mine.yaml: there is a folder data beside it, in which Hydra"),
    ):
        command = [sys.executable, SCRIPTS / "grid.py", *words]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == status and told in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("defaults: [base\noutput: x\n", "expected ',' or ']'"),
        ("defaults: [base, _self_]\n", "Missing mandatory value: output"),
        ("output: out\n", "put `defaults: [base, _self_]` in"),
        (
            "defaults: [base, _self_]\noutput: out\ndata: a\nrun: b\n",
            "in the file: give datasets and runs",
        ),
        ("# caf\xe9\n", "not UTF-8"),
        ("defaults: [base, override hydra/launcher: nope]", "Available options in"),
    ],
    ids=["syntax", "no output", "no defaults", "no data sets", "coding", "launcher"],
)
def test_a_file_that_cannot_be_used_is_told_in_a_line(text, told, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(text.encode("latin-1"))
    command = [sys.executable, SCRIPTS / "grid.py", "mine.yaml"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("grid.py: error: ") and told in last

"""The pages agree with the code, and the README's commands run."""

import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_options_page_is_up_to_date():
    generator = runpy.run_path(str(ROOT / "scripts" / "generate_options.py"))
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == generator["page"]()


def test_tables_of_results_are_up_to_date():
    script = ROOT / "scripts" / "render_results.py"
    subprocess.run([sys.executable, script, "--check"], check=True)


def test_gains_are_of_the_seeds_that_both_have(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    scores = {("dense", 1): 10, ("dense", 2): 20, ("narrow", 1): 13, ("narrow", 2): 19}
    scores |= {("l21-target", 2): 25, ("l21-target", 3): 90, ("magnitude", 1): 50}
    results = [
        {"data": "xx-yy", "run": run, "seed": seed, "scores": {"test": {"BLEU": {"score": score}}}}
        for (run, seed), score in scores.items()
    ]
    teacher = {"data": "teacher", "run": "dense", "seed": 1, "scores": results[0]["scores"]}
    compared = [("narrow", "dense", [1, 2], 1.0), ("narrow", "other", [1], 7.0)]
    compared += [("l21-target", "dense", [2], -0.04)]
    comparisons = [
        {"data": "xx-yy", "split": "test", "run": run, "baseline": baseline, "seeds": seeds}
        | {"BLEU": {"difference": difference}, "chrF2": {"difference": 99}}
        for run, baseline, seeds, difference in compared
    ]
    content = {"results": [*results, teacher], "comparisons": comparisons}
    (tmp_path / "grid.json").write_text(json.dumps(content))
    gains = importlib.import_module("render_results").gains
    row = "| xx-yy | test | 2 | 15.0 | 16.0, **+1.0** | 25.0, **+0.0** (seed 2) |  |  |  |"
    assert gains([tmp_path / "grid.json"]).splitlines()[2:] == [row]


def test_schedules_compare_the_seeds_that_all_have(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    runs = [
        ("x", "dense", 0.003, 500, 1, 10),
        ("x", "dense", 0.003, 500, 2, 20),
        ("x-warmup-1500", "dense", 0.003, 1500, 2, 40),
        ("x", "narrow", 0.003, 500, 1, 5),
    ]
    runs += [("x-lr-1e-3", "dense", "1e-3", 500, seed, 30 + seed) for seed in (2, 3)]
    results = [
        {
            "data": data,
            "run": run,
            "seed": seed,
            "train": {"lr": rate, "warmup-updates": warmup},
            "valid_loss": score / 2,
            "scores": {"test": {"BLEU": {"score": score}, "chrF2": {"score": score + 1}}},
        }
        for data, run, rate, warmup, seed, score in runs
    ]
    (tmp_path / "grid.json").write_text(json.dumps({"results": results}))
    schedules = importlib.import_module("render_results").schedules
    assert schedules([tmp_path / "grid.json"]).splitlines() == [
        "| data | run | seeds | peak rate | warm-up | loss | BLEU test | chrF |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| x | dense | 2 | 0.001 | 500 | 16.000 | 32.0 | 33.0 |",
        "| x | dense | 2 | 0.003 | 500 | 10.000 | 20.0 | 21.0 |",
        "| x | dense | 2 | 0.003 | 1,500 | 20.000 | 40.0 | 41.0 |",
    ]


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_shell_scripts_parse():
    for script in [*ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"]:
        subprocess.run(["bash", "-n", script], check=True)


def readme_commands() -> list[str]:
    """The commands of the README's section on a run of one's own, in order."""
    section = README.split("## A run step by step")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


# The test's own changes: a short training, and so short translations of a model that has learned
# little and would ramble on.
SHORTER = (
    ("--beam 5", "--beam 1 --max-len-b 20"),
    ("--max-update 800", "--max-update 30"),
    ("--log-interval 100", "--log-interval 10"),
)


def shell(command: str, cwd: Path) -> None:
    """Run a command line as a user would, with this environment's programs."""
    programs = Path(sys.executable).parent
    result = subprocess.run(
        ["bash", "-ec", f'set -o pipefail; export PATH="{programs}:$PATH"; {command}'],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, command + result.stdout[-2000:] + result.stderr[-4000:]


def test_readme_python_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(code, {})


@pytest.mark.heavy
def test_readme_commands_run(tmp_path):
    commands = readme_commands()
    assert len(commands) >= 5
    for part in ("fairseq_autosize", "scripts"):  # as in the repository, but writing elsewhere
        (tmp_path / part).symlink_to(ROOT / part)
    for command in commands:
        for old, new in SHORTER:
            command = command.replace(old, new)
        shell(command, tmp_path)
    assert (tmp_path / "checkpoints" / "checkpoint_best.pt").is_file()
    hypotheses = (tmp_path / "hypotheses.txt").read_text(encoding="utf-8").splitlines()
    references = (tmp_path / "data/raw/test.en").read_text(encoding="utf-8").splitlines()
    assert len(hypotheses) == len(references), "fairseq drops batches silently"


@pytest.mark.heavy
def test_experiment_resumes_and_refuses_other_settings(tmp_path):
    data = tmp_path / "data"
    options = ["--vocab-size", "400", "--train-lines", "300"]
    script = ROOT / "scripts" / "prepare_data.py"
    prepared = subprocess.run(
        [sys.executable, script, "embedded", data, *options],
        capture_output=True,
        text=True,
        check=True,
    )
    small = shlex.split("--dim 16 --ffn 16 --layers 1 --heads 2 --updates 8 --warmup 4")
    small += ["--generate-args", "--beam 1 --max-len-b 10"]
    experiment = [sys.executable, ROOT / "scripts" / "experiment.py", data, tmp_path / "out"]
    command = [*experiment, *small, "--runs", "dense", "l21:30", "like:l21:30"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert re.search(r"\| l21:30 \| \d+ / \d+ \| [\d.]+ % \|", first.stdout)
    assert re.search(r"dense test BLEU [\d.]+ nrefs:1\|", first.stdout)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.stdout == first.stdout and "l21:30: done before" in again.stderr
    # One that was stopped half way starts over: the same translations, and a whole history.
    run = tmp_path / "out" / "l21-30"
    before = json.loads((run / "result.json").read_text())
    (run / "trained.json").unlink()
    (run / "result.json").unlink()
    once_more = subprocess.run([*command[:-3], "l21:30"], capture_output=True, text=True)
    assert once_more.returncode == 0, once_more.stderr
    after = json.loads((run / "result.json").read_text())
    assert (after["history"], after["scores"]) == (before["history"], before["scores"])
    # What prepare_data.py prints for translating works as it stands.
    (printed,) = re.findall(r"^ *(fairseq-generate .*) > test.out$", prepared.stdout, re.M)
    printed = printed.replace("CHECKPOINT", str(run / "checkpoint_last.pt"))
    shell(f"{printed.replace('--beam 5', '--beam 1')} --max-len-b 10 --cpu", tmp_path)
    other = subprocess.run([*command, "--seed", "2"], capture_output=True, text=True)
    told = "is from other settings or data; choose another OUT"
    assert other.returncode == 1 and told in other.stderr
    record = json.loads((data / "prepare.json").read_text())
    record["sha256"]["train.de"] = "0"
    (data / "prepare.json").write_text(json.dumps(record))
    other = subprocess.run(command, capture_output=True, text=True)
    assert other.returncode == 1 and told in other.stderr
    # A training of the user's is not taken for an interrupted one.
    (tmp_path / "out" / "dense-9").mkdir()
    (mine := tmp_path / "out" / "dense-9" / "checkpoint_last.pt").write_text("mine")
    other = subprocess.run([*command[:-3], "dense:9"], capture_output=True, text=True)
    assert other.returncode == 1 and "has files, but no settings.json" in other.stderr
    assert mine.read_text() == "mine"
    wrong = subprocess.run([*experiment, "--runs", "l3"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "--runs l3: give dense" in wrong.stderr
    wrong = subprocess.run(
        [*experiment, "--runs", "l21:3", "l21@3"], capture_output=True, text=True
    )
    assert wrong.returncode == 2 and "--runs l21:3 l21@3: all of them in" in wrong.stderr

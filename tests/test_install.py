"""The package as users have it: installed or not, from any directory, with and without fairseq."""

import os
import subprocess
import sys
from pathlib import Path

import fairseq
import pytest
from conftest import ROOT, TINY_MODEL, TINY_TRAINING

pytestmark = pytest.mark.heavy


def python(arguments: list[object], path: Path, cwd: Path) -> subprocess.CompletedProcess:
    """A new process, since where it finds fairseq and the package is what is tested."""
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


TRAINING = [*TINY_MODEL, *TINY_TRAINING, "--prox", "l21", "--max-update", "2"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as site-packages would be: fairseq, and this package pip-installed, not editable."""
    folder = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source")  # pip builds in the source tree
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in names.split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", folder, source], check=True)
    for name in ("tasks", "models", "report.html.jinja"):
        assert (folder / "fairseq_autosize" / name).exists()
    # `..` must lead from fairseq's folder to this one, so links stand for its content only.
    (folder / "fairseq").mkdir()
    for entry in Path(fairseq.__file__).parent.iterdir():
        (folder / "fairseq" / entry.name).symlink_to(entry)
    return folder


@pytest.mark.parametrize("user_dir", ["path", "name"])
def test_installed_package_from_another_directory(user_dir, site, corpus, tmp_path):
    value = site / "fairseq_autosize" if user_dir == "path" else "fairseq_autosize"
    train = ["fairseq_cli.train", corpus, "--user-dir", value, *TRAINING, "--save-dir", tmp_path]
    result = python(["-m", *train], site, tmp_path)
    assert "signature: prox:l21" in result.stdout + result.stderr, result.stderr[-3000:]


@pytest.mark.parametrize("user_dir", ["path", "name"])
def test_package_imported_before_fairseq_sees_the_user_dir(user_dir, site, corpus, tmp_path):
    (tmp_path / "early.py").write_text(
        "import fairseq_autosize\nfrom fairseq_cli.train import cli_main\ncli_main()\n"
    )
    value = site / "fairseq_autosize" if user_dir == "path" else "fairseq_autosize"
    train = [corpus, "--user-dir", value, *TRAINING, "--save-dir", tmp_path / "run"]
    result = python(["early.py", *train], site, tmp_path)
    assert "signature: prox:l21" in result.stdout + result.stderr, result.stderr[-3000:]


@pytest.fixture(params=["nothing", "folder"])
def without_fairseq(request: pytest.FixtureRequest) -> str:
    """Code to put first: it hides fairseq from the imports of a process.

    In its place is nothing, or a folder of that name, such as a clone of its repository.
    """
    found = {"nothing": "None", "folder": "ModuleSpec(name, None, is_package=True)"}
    return (
        "import sys\n"
        "from importlib.machinery import ModuleSpec\n"
        "class Hide:\n"
        "    def __init__(self, finder): self.finder = finder\n"
        "    def __getattr__(self, name): return getattr(self.finder, name)\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'fairseq': return {found[request.param]}\n"
        "        if name.partition('.')[0] in ('fairseq', 'fairseq_cli'): return None\n"
        "        return self.finder.find_spec(name, path, target)\n"
        "sys.meta_path = [Hide(finder) for finder in sys.meta_path]\n"
    )


def test_modules_that_need_only_torch_work_without_fairseq(without_fairseq, tmp_path):
    code = without_fairseq + (
        "import torch\n"
        "from fairseq_autosize import prox, proximal_gradient, groups, checkpoint, report, cli\n"
        "w = torch.ones(2, 3)\n"
        "proximal_gradient.l21(w, reg=1.0, lr=5.0)\n"
        "print(int((w == 0).all()), 'fairseq' in sys.modules)\n"
    )
    result = python(["-c", code], ROOT, tmp_path)
    assert result.stdout.split() == ["1", "False"], result.stderr


def test_tasks_say_what_to_install_without_fairseq(without_fairseq, tmp_path):
    result = python(["-c", without_fairseq + "import fairseq_autosize.tasks\n"], ROOT, tmp_path)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fairseq is not installed; install it with: pip install")

"""Fixtures shared by the tests: a tiny corpus, and fairseq's real command-line programs."""

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import run_program

ROOT = Path(__file__).parent.parent
USER_DIR = ROOT / "fairseq_autosize"

# A model and a schedule that train 40 updates in a few seconds.
TINY_MODEL = (
    "--arch transformer --share-all-embeddings --activation-fn relu "
    "--encoder-layers 2 --encoder-embed-dim 16 --encoder-ffn-embed-dim 24 "
    "--encoder-attention-heads 2 --decoder-layers 2 --decoder-embed-dim 16 "
    "--decoder-ffn-embed-dim 24 --decoder-attention-heads 2"
).split()
TINY_TRAINING = (
    "--optimizer adam --lr 0.005 --lr-scheduler inverse_sqrt --warmup-updates 10 --dropout 0.1 "
    "--max-tokens 400 --required-batch-size-multiple 1 --num-workers 0 --cpu --seed 1 "
    "--log-format json --log-interval 1 --no-epoch-checkpoints"
).split()

Runner = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def run() -> Runner:
    """Runs a module as a program and fails the test, showing its output, if the program fails."""

    def checked(module: str, *arguments: object, **options: object) -> subprocess.CompletedProcess:
        result = run_program(module, *arguments, **options)
        assert result.returncode == 0, result.stdout[-6000:]
        return result

    return checked


def plain_fairseq(folder: Path) -> Path:
    """A --user-dir with which fairseq loads checkpoints and knows nothing of this package.

    Plain fairseq on torch >= 2.6 refuses every checkpoint, its own too; so the list of safe globals
    is taken from here.
    """
    plain = folder / "plain"
    plain.mkdir()
    compat = str(USER_DIR / "compat.py")
    (plain / "__init__.py").write_text(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('compat', {compat!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "assert 'fairseq_autosize' not in sys.modules\n"
    )
    return plain


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """Pairs for a task that takes attention: the target is the source reversed, in other words."""
    chooser = random.Random(seed)
    words = "ba be bi bo bu da de di do du ka ke ki ko ku".split()
    sources = [chooser.choices(words, k=chooser.randint(2, 9)) for _ in range(count)]
    return [(" ".join(s), " ".join(w.upper() for w in reversed(s))) for s in sources]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, run: Runner) -> Path:
    """A binarised corpus xx-yy of 300 training and 43 test pairs (no multiple of 8), aligned."""
    folder = tmp_path_factory.mktemp("corpus")
    for seed, (split, count) in enumerate((("train", 300), ("valid", 40), ("test", 43))):
        pairs = sentences(count, seed)
        for side, lang in enumerate(("xx", "yy")):
            text = "".join(pair[side] + "\n" for pair in pairs)
            (folder / f"{split}.{lang}").write_text(text)
        lengths = (len(source.split()) for source, _ in pairs)
        links = [" ".join(f"{n - 1 - i}-{i}" for i in range(n)) + "\n" for n in lengths]
        (folder / f"{split}.align").write_text("".join(links))
    prefixes = [f"--{split}pref={folder}/{split}" for split in ("train", "valid", "test")]
    languages = ["--source-lang", "xx", "--target-lang", "yy"]
    binary = folder / "data-bin"
    options = ["--joined-dictionary", "--align-suffix", "align", "--destdir", binary]
    run("fairseq_cli.preprocess", *languages, *prefixes, *options)
    return binary


@pytest.fixture(scope="session")
def lm_corpus(tmp_path_factory: pytest.TempPathFactory, run: Runner) -> Path:
    """A binarised monolingual corpus."""
    folder = tmp_path_factory.mktemp("lm")
    for seed, (split, count) in enumerate((("train", 300), ("valid", 40), ("test", 40))):
        text = "".join(source + "\n" for source, _ in sentences(count, seed))
        (folder / split).write_text(text)
    prefixes = [f"--{split}pref={folder}/{split}" for split in ("train", "valid", "test")]
    run("fairseq_cli.preprocess", "--only-source", *prefixes, "--destdir", folder / "data-bin")
    return folder / "data-bin"

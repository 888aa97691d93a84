"""Weights-only loading: what is registered, what a file can do with it, and fairseq's programs."""

import argparse
import collections
import importlib.metadata
import importlib.util
import io
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, TINY_TRAINING, USER_DIR
from fairseq.distributed.utils import _TensorPlaceholder
from omegaconf import OmegaConf

from fairseq_autosize import compat

# --- what is registered -----------------------------------------------------------------------

# To extend this list, think about what a hostile file could do with the new entry.
REGISTERED = {
    "argparse.Namespace",
    "builtins.bool",
    "builtins.dict",
    "builtins.float",
    "builtins.int",
    "builtins.list",
    "builtins.str",
    "builtins.tuple",
    "collections.defaultdict",
    "fairseq.distributed.utils._TensorPlaceholder",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.BooleanNode",
    "omegaconf.nodes.FloatNode",
    "omegaconf.nodes.IntegerNode",
    "omegaconf.nodes.StringNode",
    "typing.Any",
}


def registered_names():
    """What this package registers, in a process in which nothing else does."""
    program = (
        "import fairseq_autosize.compat, json, torch\n"
        "print(json.dumps([f[1] if isinstance(f, tuple) else f'{f.__module__}.{f.__qualname__}'\n"
        "                  for f in torch.serialization.get_safe_globals()]))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    names = json.loads(result.stdout.splitlines()[-1])
    return {name for name in names if not name.startswith("torch.")}  # torch's own additions


def test_exactly_these_are_registered():
    assert registered_names() == REGISTERED


def test_numpy_itself_is_not_registered():
    values = [f[0] if isinstance(f, tuple) else f for f in torch.serialization.get_safe_globals()]
    for gadget in (np.ndarray, np.dtype, type(np.dtype("f8")), type, getattr, eval, exec):
        assert not any(value is gadget for value in values), gadget


def through_a_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    "value",
    [
        argparse.Namespace(lr=[0.1], arch="transformer"),
        {"cfg": OmegaConf.create({"a": 1, "b": [1.5, "x", None, True], "c": {"d": "${a}"}})},
        OmegaConf.create({"x": {1, 2}}, flags={"allow_objects": True}),
        _TensorPlaceholder(index=3),
        collections.OrderedDict(a=1),
        [int, str, dict, list],
    ],
    ids=lambda value: type(value).__name__,
)
def test_round_trip(value):
    assert through_a_file(value) == value


def test_structured_settings_with_typed_values():
    cfg = OmegaConf.create({"n": 1})
    cfg._metadata.element_type = int
    cfg.m = 2  # an IntegerNode
    assert through_a_file(cfg) == {"n": 1, "m": 2}


# --- numpy ------------------------------------------------------------------------------------

ARRAYS = [
    np.arange(4),
    np.array(5.5),
    np.ones((2, 3), np.float32),
    np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
    np.arange(3, dtype=">i4"),
    np.array([True, False]),
    np.ones(1, np.float16),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype.str}{a.shape}")
def test_arrays_of_numbers(array):
    loaded = through_a_file({"x": array, "again": array})["x"]
    assert isinstance(loaded, np.ndarray)
    assert loaded.dtype == array.dtype.newbyteorder("=")  # as numpy itself loads it
    assert loaded.shape == array.shape
    assert (loaded == array).all()


@pytest.mark.parametrize("scalar", [np.float64(2.5), np.int64(-3), np.bool_(True), np.float32(0.1)])
def test_scalars(scalar):
    loaded = through_a_file([scalar, scalar])[1]
    assert type(loaded) is type(scalar)
    assert loaded == scalar


def test_loaded_arrays_compute_and_are_saved_as_ordinary_arrays():
    loaded = through_a_file(np.array([2, 0, 1]))
    for array in (loaded, loaded + 1, loaded[1:]):
        for protocol in (2, 5):
            again = pickle.loads(pickle.dumps(array, protocol=protocol))
            assert type(again) is np.ndarray
            assert (again == array).all()


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_arrays_of_numpy_1_and_2(module):
    pickled = pickle.dumps(np.arange(3, dtype="i8"), protocol=2)
    own = np.arange(3).__reduce__()[0].__module__.encode()
    buffer = io.BytesIO(pickled.replace(own, module.encode()))
    loaded = torch._weights_only_unpickler.load(buffer)
    assert loaded.tolist() == [0, 1, 2]


class Crafted:
    """Pickles as ``function(*arguments)`` with a state."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced

    def __setstate__(self, state):
        """Unused; with it pickle writes a state for every instance."""


def crafted_dtype(code="i8", order="<", subarray=None, names=None, fields=None):
    return Crafted(np.dtype, code, False, True, state=(3, order, subarray, names, fields, 8, 1, 0))


def crafted_array(dtype, data=b"A" * 8, shape=(1,)):
    reconstruct = np.arange(1).__reduce__()[0]
    return Crafted(reconstruct, np.ndarray, (0,), b"b", state=(1, shape, dtype, False, data))


def crafted_scalar(dtype, data):
    return Crafted(np.float64(1).__reduce__()[0], dtype, data)


OBJECT = Crafted(np.dtype, "O")
FIELDS = {"a": (np.dtype("i8"), 0)}


@pytest.mark.parametrize(
    "value, told",
    [
        # The bytes of the file as addresses of Python objects:
        (Crafted(np.ndarray, (1,), "O", b"A" * 8), "takes 1 positional argument"),
        (crafted_array(np.dtype("O"), [1]), "not a plain number type"),
        (Crafted(np.dtype, [("a", "O")]), "not a plain number type"),
        (Crafted(np.dtype, "V8"), "not a plain number type"),
        (crafted_array(crafted_dtype(subarray=(np.dtype("i8"), (1,)))), "not a plain number type"),
        (crafted_array(crafted_dtype(fields=FIELDS)), "not a plain number type"),
        (crafted_array(crafted_dtype(names=("a",))), "not a plain number type"),
        (crafted_array(crafted_dtype(order="P")), "not a plain number type"),
        # Sizes that are not those of the data:
        (crafted_array(np.dtype("i8"), b"A" * 7), "not a plain array of numbers"),
        (crafted_array(np.dtype("i8"), b"A", (2**62,)), "not a plain array of numbers"),
        (crafted_array(np.dtype("i8"), b"A" * 8, (-1,)), "not a plain array of numbers"),
        (crafted_array(np.dtype("i8"), b"A" * 8, (-1, -1)), "not a plain array of numbers"),
        (crafted_array(np.dtype("i8"), [1]), "not a plain array of numbers"),
        (crafted_array("i8"), "not a plain array of numbers"),
        (crafted_scalar(np.dtype("i8"), b"A"), "not a plain number"),
        (crafted_scalar("i8", b"A" * 8), "not a plain number"),
        (Crafted(np.arange(1).__reduce__()[0], dict, (0,), b"b"), "cannot reconstruct"),
    ],
)
def test_hostile_arrays_are_refused(value, told):
    with pytest.raises((pickle.UnpicklingError, TypeError), match=told):
        through_a_file(value)


def test_crafted_array_is_read_when_it_is_right():
    assert through_a_file(crafted_array(crafted_dtype(), (5).to_bytes(8, "little"))).tolist() == [5]


# --- versions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.5.1", "1.13.1+cu117"])
def test_old_torch_is_refused(version):
    with pytest.raises(ImportError, match=r"torch 2\.6 or newer, found .*pip install"):
        compat.require_torch(version)


@pytest.mark.parametrize("version", ["2.6.0", "2.13.0+cpu", "3.0.0a0+git12"])
def test_new_torch_is_accepted(version):
    compat.require_torch(version)


def installed(monkeypatch, versions):
    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_absent_fairseq(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"not installed.* --no-build-isolation fairseq-fixed=="):
        compat.require_fairseq()


def test_release_that_needs_an_older_python(monkeypatch):
    installed(monkeypatch, {"fairseq": "0.12.2"})
    monkeypatch.setattr(sys, "version_info", (3, 11, 4))
    with pytest.raises(ImportError, match=r"0\.12\.2 .*3\.11.*mutable default.*fairseq-fixed=="):
        compat.require_fairseq()
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    compat.require_fairseq()


@pytest.mark.parametrize("versions", [{"fairseq-fixed": "0.12.3.1"}, {"fairseq": "0.12.3"}])
def test_fairseq_that_works(monkeypatch, versions):
    installed(monkeypatch, versions)
    compat.require_fairseq()
    assert compat.fairseq_version() == next(iter(versions.values()))


@pytest.mark.parametrize("absent", [["fairseq"], ["fairseq", "omegaconf"], ["fairseq", "numpy"]])
def test_reading_works_without(absent, tmp_path):
    """The part for reading needs torch only."""
    torch.save({"model": {"encoder.layers.0.fc1.weight": torch.ones(1, 1)}}, tmp_path / "c.pt")
    program = (
        "import sys, warnings\n"
        "warnings.simplefilter('ignore')\n"
        f"sys.modules.update(dict.fromkeys({absent}))\n"
        "from fairseq_autosize.checkpoint import read_checkpoint\n"
        f"assert list(read_checkpoint({str(tmp_path / 'c.pt')!r})) == ['model']\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# --- fairseq's own programs -------------------------------------------------------------------


@pytest.mark.heavy
def test_train_resume_generate_and_interactive_with_bleu(corpus, run, tmp_path):
    """Checkpoints with BLEU counts, which are numpy arrays, through every program that loads."""
    user_dir = ("--user-dir", USER_DIR)
    train = (
        *("fairseq_cli.train", corpus, *user_dir, *TINY_MODEL, *TINY_TRAINING),
        *("--save-dir", tmp_path, "--eval-bleu", "--eval-bleu-args", '{"beam": 1, "max_len_b": 8}'),
        *("--eval-bleu-detok", "space", "--best-checkpoint-metric", "bleu"),
        "--maximize-best-checkpoint-metric",
    )
    run(*train, "--max-epoch", 1)
    last = tmp_path / "checkpoint_last.pt"
    metrics = torch.load(last, weights_only=True)["extra_state"]["metrics"]["valid"]
    arrays = [meter for *_, meter in metrics if isinstance(meter.get("sum"), np.ndarray)]
    assert arrays, "the checkpoint was to hold numpy arrays"
    # Without the registration loading fails, or what follows would show nothing.
    load = f"import torch; torch.load({str(last)!r})"
    plain = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    assert "Weights only load failed" in plain.stderr

    resumed = run(*train, "--max-epoch", 2)
    assert f"Loaded checkpoint {last} (epoch 2 @ " in resumed.stdout

    options = ("--cpu", "--path", last, "--beam", 2, "--max-len-b", 12)
    generated = run(
        *("fairseq_cli.generate", corpus, *user_dir, *options),
        *("--required-batch-size-multiple", 1),
    )
    assert sum(line.startswith("H-") for line in generated.stdout.splitlines()) == 43
    answer = run("fairseq_cli.interactive", corpus, *user_dir, *options, stdin="ba be\n")
    assert "H-0\t" in answer.stdout

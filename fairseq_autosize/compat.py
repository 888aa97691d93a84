"""What fairseq checkpoints need so that ``torch.load`` reads them weights-only, and version checks.

Importing this module registers the classes that occur in fairseq checkpoints with
``torch.serialization.add_safe_globals``. From then on training, resuming, generating and every
other fairseq program in this process reads checkpoints with torch's weights-only unpickler, which
calls nothing that is not registered.

A registered class is open to a hostile file in three ways: it can be called with any arguments
made of registered things, created with ``__new__``, and its instances can be given any state
(``__setstate__``, or entries of ``__dict__``). Each entry was read with that in mind; see the
comments beside them. Never to be registered: ``getattr``, ``eval``, ``type`` or any other
metaclass (instances of a registered class can be given attributes, and then every class could be
altered), anything that imports, opens, or calls its arguments.

The module needs torch only: numpy, omegaconf and fairseq are registered where they are installed.
"""

import argparse
import collections
import importlib.metadata
import importlib.util
import math
import pickle
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import torch

INSTALL_FAIRSEQ = (
    'pip install torch "numpy<2" cython "setuptools<81" wheel, and then '
    "pip install --no-build-isolation fairseq-fixed==0.12.3.1"
)

# dtype codes as numpy pickles them: bool, integers, floats. No objects ("O"), no records ("V").
_NUMERIC_CODES = frozenset(["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"])

SafeGlobal = Callable | tuple[Callable, str]


def require_torch(version: str = torch.__version__) -> None:
    """Refuse a torch that would read checkpoints by running what is in them.

    Args:
        version: version string of torch, by default the installed one's.

    Raises:
        ImportError: torch is older than 2.6, where weights-only loading became the default.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < (2, 6):
        raise ImportError(
            f"fairseq_autosize needs torch 2.6 or newer, found {version}: older versions run code "
            'from checkpoint files by default. Install a newer one: pip install "torch>=2.6"'
        )


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def fairseq_version() -> str | None:
    """Version of the installed fairseq, without importing it; None where there is none."""
    return _installed_version("fairseq-fixed") or _installed_version("fairseq")


def find_fairseq() -> Path | None:
    """fairseq's ``__init__.py``, without importing it; None where there is none.

    A mere folder of that name, such as a clone of the repository, is no fairseq.
    """
    spec = importlib.util.find_spec("fairseq")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def require_fairseq() -> None:
    """Check that a fairseq is installed that works with this Python.

    Raises:
        ImportError: fairseq is absent, or it is the release 0.12.2 (or older) on Python 3.11 or
            newer, whose import fails. The message says what to install.
    """
    if find_fairseq() is None:
        raise ImportError(f"fairseq is not installed; install it with: {INSTALL_FAIRSEQ}")
    release = _installed_version("fairseq")
    if (
        sys.version_info >= (3, 11)
        and _installed_version("fairseq-fixed") is None
        and release is not None
        and release.startswith(("0.10.", "0.11.", "0.12.0", "0.12.1", "0.12.2"))
    ):
        raise ImportError(
            f"fairseq {release} cannot be imported on Python "
            f"{'.'.join(map(str, sys.version_info[:2]))}: its dataclasses have mutable "
            "defaults, which Python refuses since 3.11 (ValueError: mutable default ... use "
            "default_factory). Replace it with a maintained build of the same package: "
            f"pip uninstall -y fairseq, then {INSTALL_FAIRSEQ}"
        )


def _builtin_globals() -> list[SafeGlobal]:
    # Settings of old checkpoints. Its state only lands in __dict__.
    settings: list[SafeGlobal] = [argparse.Namespace]
    # omegaconf names the type of each value in its metadata. As calls these convert plain values.
    # `bytes` is missing on purpose: bytes(n) allocates n bytes.
    types: list[SafeGlobal] = [bool, int, float, str, list, tuple, dict]
    # omegaconf's cache of resolvers. Its factory can only be something registered.
    # typing.Any refuses to be called; by name, since it is no class before Python 3.11.
    return [*settings, *types, collections.defaultdict, (typing.Any, "typing.Any")]


def _numpy_globals() -> list[SafeGlobal]:
    """Stand-ins for numpy's unpickling functions, for plain arrays and scalars of numbers.

    Validation metrics such as BLEU counts are numpy arrays. numpy's own functions must not be
    registered: ``numpy.ndarray((1,), "O", data)`` takes the bytes of the file for addresses of
    Python objects, and ``numpy.dtype.__setstate__`` accepts fields outside of the memory that
    they describe, so that a file could have any address read and called. Here dtypes are numbers
    only, and an array's data have exactly the size of the array.
    """
    import numpy as np

    class NumericDType:
        """What the file says ``numpy.dtype(...)`` is, until an array or scalar needs it."""

        def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
            if type(code) is not str or code not in _NUMERIC_CODES:
                raise pickle.UnpicklingError(f"numpy.dtype of {code!r} is not a plain number type")
            self.dtype = np.dtype(code)

        def __setstate__(self, state: tuple) -> None:
            # (version, byte order, subarray, names, fields, size, alignment, flags)
            if (
                type(state) is not tuple
                or len(state) != 8
                or type(state[1]) is not str
                or state[1] not in ("<", ">", "|", "=")
                or any(part is not None for part in state[2:5])
            ):
                raise pickle.UnpicklingError("numpy.dtype is not a plain number type")
            self.dtype = self.dtype.newbyteorder(state[1])

    class NumericArray(np.ndarray):
        """A numpy array whose state is checked; it is saved as an ordinary array again."""

        def __new__(cls) -> "NumericArray":  # no arguments: nothing for a file to choose
            return super().__new__(cls, (0,))

        def __setstate__(self, state: tuple) -> None:
            if type(state) is not tuple or len(state) != 5:
                raise pickle.UnpicklingError("numpy.ndarray is not a plain array of numbers")
            _version, shape, dtype, fortran_order, data = state
            if (
                type(dtype) is not NumericDType
                or type(shape) is not tuple
                or any(type(size) is not int or size < 0 for size in shape)
                or type(data) is not bytes
                or len(data) != math.prod(shape) * dtype.dtype.itemsize
            ):
                raise pickle.UnpicklingError("numpy.ndarray is not a plain array of numbers")
            super().__setstate__((1, shape, dtype.dtype, bool(fortran_order), data))

        def __reduce__(self) -> tuple:
            return np.asarray(self).__reduce__()

    def reconstruct(cls: type, shape: tuple, code: bytes) -> np.ndarray:
        if cls is not NumericArray:
            raise pickle.UnpicklingError(f"cannot reconstruct a numpy array of type {cls!r}")
        return NumericArray()

    def scalar(dtype: NumericDType, data: bytes) -> np.generic:
        if (
            type(dtype) is not NumericDType
            or type(data) is not bytes
            or len(data) != dtype.dtype.itemsize
        ):
            raise pickle.UnpicklingError("numpy scalar is not a plain number")
        return np.frombuffer(data, dtype.dtype)[0]

    names: list[SafeGlobal] = [(NumericDType, "numpy.dtype"), (NumericArray, "numpy.ndarray")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1 and numpy 2
        names += [(reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    return names


def _omegaconf_globals() -> list[SafeGlobal]:
    # Containers and leaves of settings. Creating them, or setting their state, stores values;
    # "${...}" expressions stay text until a value is asked for, and stock resolvers run no code.
    # EnumNode and PathNode, which convert by calling a given class, do not occur.
    from omegaconf import (
        AnyNode,
        BooleanNode,
        DictConfig,
        FloatNode,
        IntegerNode,
        ListConfig,
        StringNode,
    )
    from omegaconf.base import ContainerMetadata, Metadata

    leaves: list[SafeGlobal] = [AnyNode, BooleanNode, FloatNode, IntegerNode, StringNode]
    return [DictConfig, ListConfig, ContainerMetadata, Metadata, *leaves]


def _fairseq_globals() -> list[SafeGlobal]:
    # A dataclass of one integer: a tensor's place in an object sent to the other processes.
    from fairseq.distributed.utils import _TensorPlaceholder

    return [_TensorPlaceholder]


def _register() -> None:
    safe = _builtin_globals()
    if importlib.util.find_spec("numpy") is not None:
        safe += _numpy_globals()
    if importlib.util.find_spec("omegaconf") is not None:
        safe += _omegaconf_globals()
    if find_fairseq() is not None:
        require_fairseq()
        safe += _fairseq_globals()
    torch.serialization.add_safe_globals(safe)


require_torch()
_register()

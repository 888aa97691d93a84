"""Read, check and write fairseq checkpoints. Reading never runs code from the file.

A checkpoint is a zip archive that `torch.save` wrote: a pickle, ``data.pkl``, that refers to one
record of raw bytes for each storage. `read_checkpoint` checks the archive and makes a dry run of
the pickle with inert objects before it lets torch's weights-only unpickler build the real ones.
"""

import argparse
import contextlib
import hashlib
import io
import logging
import os
import pickle
import re
import secrets
import shutil
import stat
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from . import compat  # noqa: F401 - registers what fairseq checkpoints hold

logger = logging.getLogger(__name__)

Path = str | os.PathLike[str]

# Bytes per element of the storages that torch.save writes.
_ITEM_SIZES = {
    "UntypedStorage": 1,
    "ByteStorage": 1,
    "CharStorage": 1,
    "BoolStorage": 1,
    "ShortStorage": 2,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "IntStorage": 4,
    "FloatStorage": 4,
    "LongStorage": 8,
    "DoubleStorage": 8,
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
}

# Allowed by torch as calls, but they make memory out of a number: bytearray(n), FloatStorage(n),
# list(<a tensor that repeats one value>). Checkpoints only name them, or do not have them.
_NEVER_CALLED = re.compile(r"builtins\.(?!set$)|torch\.(?:\w+\.)*\w*(?:Storage|Tensor)$")

# Types of the numbers in a model. Others, such as complex ones, torch cannot all compare or add.
_NUMBERS = frozenset(
    getattr(torch, name)
    for name in "float16 bfloat16 float32 float64 bool uint8 int8 int16 int32 int64".split()
)

# Buffers that fairseq's Transformers keep in their state dict beside the parameters.
_BUFFERS = ("version", "_float_tensor", "embed_positions.weights")

# How the name of a parameter of an encoder or a decoder begins.
_STACK = re.compile(r"(.*\.)?(en|de)coder(?=\.)")

_END_OF_ZIP = b"PK\x05\x06"
_END_OF_ZIP_SIZE = 22
_TORCH_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of torch < 1.6


class CheckpointError(ValueError):
    """A file that cannot be used as a fairseq checkpoint, or cannot be written; one line."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a fairseq checkpoint onto the CPU, and check it.

    The file is read once into memory rather than mapped: fairseq overwrites checkpoint_last.pt in
    place, which would crash a process that has it mapped.

    Args:
        path: a file that fairseq-train (torch >= 1.6) or `write_checkpoint` wrote.

    Returns:
        The checkpoint's dict. ``model`` is a dict of parameter name -> dense CPU tensor.

    Raises:
        CheckpointError: for anything that is wrong with the file; the message starts with the
            path, says what was found in one line, and nothing from the file was run.
    """
    try:
        return _read(path)
    except _Fault as fault:
        raise CheckpointError(f"{_text(os.fspath(path))}: {fault}") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{_text(os.fspath(path))}: cannot read: {reason}") from error


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path, force: bool = False) -> None:
    """Write a checkpoint so that `path` holds either what it held before or all of the new one.

    Args:
        checkpoint: what `read_checkpoint` returned, or a changed copy.
        path: the file to write. Its directory must exist.
        force: replace an existing file.

    Raises:
        CheckpointError: `path` exists and `force` is not set, is no ordinary file, or writing
            failed.
    """
    with writing(path, force) as file:
        torch.save(dict(checkpoint), file)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], force: bool = False) -> Iterator[BinaryIO]:
    """A file that replaces `path` once the block has ended without an exception.

    Raises:
        CheckpointError: `path` exists and `force` is not set, is no ordinary file, or writing
            failed.
    """
    target = os.fspath(path)
    if os.path.isdir(target):
        raise CheckpointError(f"{target}: cannot write: is a directory")
    if os.path.exists(target) and not os.path.isfile(target):
        raise CheckpointError(f"{target}: cannot write: not an ordinary file")
    if os.path.lexists(target) and not force:
        raise CheckpointError(
            f"{target}: exists already; choose another name, or overwrite it with --force"
        )
    directory, name = os.path.split(target)
    _tell_left_over(directory, name)
    # In the same directory: only within a file system is the renaming atomic.
    partial = os.path.join(directory, f"{_partial_name(name)}.{secrets.token_hex(4)}.tmp")
    try:
        with open(partial, "xb") as file:
            if os.path.exists(target):
                shutil.copymode(target, partial)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or _reason(error)
        raise CheckpointError(f"{target}: cannot write: {reason}") from error
    finally:
        with contextlib.suppress(OSError):  # not there any more, or never was
            os.unlink(partial)


def _partial_name(name: str) -> str:
    return f".{name[:50]}"  # file systems allow 255 bytes, 4 a character


def _tell_left_over(directory: str, name: str) -> None:
    """Name the partial files of earlier writes; they may belong to one still running, so stay."""
    pattern = re.compile(rf"{re.escape(_partial_name(name))}\.[0-9a-f]{{8}}\.tmp")
    with contextlib.suppress(OSError):  # the writing itself will tell
        for found in sorted(filter(pattern.fullmatch, os.listdir(directory or "."))):
            logger.warning(
                "%s: left by a run that was killed, unless one is writing now; it can be removed",
                os.path.join(directory, found),
            )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{_text(os.fspath(path))}: cannot read: {reason}") from error


def model_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture's settings, such as ``arch``/``_name`` and ``encoder_ffn_embed_dim``.

    Args:
        checkpoint: what `read_checkpoint` returned; with ``cfg`` (fairseq >= 0.10.2) or with the
            older flat ``args``.

    Returns:
        The settings. What fairseq-hydra-train nests as ``encoder: {layers: 6}`` is there under the
        flat name, ``encoder_layers``, too.

    Raises:
        CheckpointError: there are none, or they are not a mapping.
    """
    config = config_section(checkpoint, "model")
    if not config:
        raise CheckpointError("the checkpoint has no settings of its model (cfg.model or args)")
    nested = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder", "quant_noise")
        if isinstance(config.get(part), Mapping)
        for name, value in config[part].items()
    }
    return {**config, **nested}


def architecture_of(checkpoint: Mapping[str, Any]) -> Any:
    """What the settings call the architecture, such as transformer_iwslt_de_en; None if nothing."""
    model = model_config(checkpoint)
    return model.get("arch") or model.get("_name")


def config_section(checkpoint: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One section of the settings, such as ``task`` or ``common``, as a plain dict.

    Args:
        checkpoint: what `read_checkpoint` returned.
        name: a key of ``cfg``. Older checkpoints have ``args`` with all options in one namespace,
            which is then returned for every name.

    Returns:
        The section; empty where the checkpoint has no such settings. Expressions like
        ``${common.seed}`` are not evaluated.

    Raises:
        CheckpointError: the settings are there, but are not a mapping.
    """
    if checkpoint.get("cfg") is not None:
        section = _plain_mapping(checkpoint["cfg"], "cfg").get(name)
        return {} if section is None else _plain_mapping(section, f"cfg.{name}")
    if checkpoint.get("args") is not None:
        return _plain_mapping(checkpoint["args"], "args")
    return {}


def head_widths(checkpoint: Mapping[str, Any]) -> dict[str, int]:
    """Rows of v that one attention head has in the encoder and in the decoder.

    Args:
        checkpoint: what `read_checkpoint` returned.

    Returns:
        ``encoder`` and ``decoder`` -> embedding size / number of heads of the architecture. A side
        for which the settings do not tell is left out.
    """
    try:
        config = model_config(checkpoint)
    except CheckpointError:
        return {}
    result = {}
    for side in ("encoder", "decoder"):
        size, heads = (config.get(f"{side}_{name}") for name in ("embed_dim", "attention_heads"))
        numbers = isinstance(size, int) and isinstance(heads, int)
        if numbers and size > 0 and heads > 0 and size % heads == 0:
            result[side] = size // heads
    return result


def with_settings(
    checkpoint: Mapping[str, Any],
    section: str,
    changes: Mapping[str, Any],
    drop: Collection[str] = (),
) -> dict[str, Any]:
    """A shallow copy of a checkpoint with other settings.

    Args:
        checkpoint: what `read_checkpoint` returned; it stays as it is.
        section: a key of ``cfg``. In an older checkpoint all settings are in ``args``.
        changes: values to set.
        drop: names to leave out.

    Raises:
        CheckpointError: the settings are not a mapping.
    """
    old = config_section(checkpoint, section)
    values = {name: value for name, value in old.items() if name not in drop} | dict(changes)
    if checkpoint.get("cfg") is None:
        return {**checkpoint, "args": argparse.Namespace(**values)}
    sections = dict(_plain_mapping(checkpoint["cfg"], "cfg"))
    # fairseq keeps the settings of models without a dataclass in a namespace.
    flat = isinstance(sections.get(section), argparse.Namespace)
    sections[section] = argparse.Namespace(**values) if flat else values
    return {**checkpoint, "cfg": sections}


def task_entry(checkpoint: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """What the task has saved in the extra state.

    Args:
        checkpoint: what `read_checkpoint` returned.

    Returns:
        The key, which is the name of the task's class, and the entry; None and an empty one where
        a task of this package has saved nothing.
    """
    extra_state = checkpoint.get("extra_state")
    if isinstance(extra_state, dict):
        for key, value in extra_state.items():
            if isinstance(value, dict) and any(str(name).startswith("prox_") for name in value):
                return key, value
    return None, {}


def without_masters(checkpoint: Mapping[str, Any]) -> Any:
    """A checkpoint's extra state without fp32 masters, which fit its own parameters only."""
    key, entry = task_entry(checkpoint)
    if "prox_precision" not in entry:
        return checkpoint.get("extra_state")
    kept = {name: value for name, value in entry.items() if name != "prox_precision"}
    return {**checkpoint["extra_state"], key: kept}


def place(tensor: Tensor) -> tuple:
    """Where a tensor that has elements lies: the same for tied parameters that share storage."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def parameter_names(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the distinct parameters in a state dict, in the order of ``model.parameters()``.

    Tied parameters appear under each of their names, and are listed under the first. They share
    storage, except where fairseq copied them one by one while saving (from a GPU, or from half
    precision): so matrices with equal contents count once, too, and so do the vectors of an encoder
    or decoder all of whose matrices are tied. Matrices of zeros are no sign of a tie.
    """
    names = []
    seen: set[tuple] = set()
    matrices: dict[tuple, list[Tensor]] = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point() or name.endswith(_BUFFERS):
            continue
        if tensor.numel() and place(tensor) in seen:
            continue
        seen.add(place(tensor))
        if tensor.dim() >= 2 and bool(tensor.any()):
            data = tensor.contiguous().view(torch.uint8)  # bytes, so that NaN equals itself
            # A few bytes tell nearly all matrices apart.
            key = (tensor.shape, tensor.dtype, bytes(data.flatten()[:64].tolist()))
            if any(torch.equal(data, other) for other in matrices.get(key, ())):
                continue
            matrices.setdefault(key, []).append(data)
        names.append(name)
    own = {_stack(name) for name in names if state[name].dim() >= 2}
    return [name for name in names if state[name].dim() >= 2 or _stack(name) in {None, *own}]


def _stack(name: str) -> str | None:
    """The encoder or decoder that a parameter belongs to, such as ``models.de-en.encoder``."""
    match = _STACK.match(name)
    return match and match[0]


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse the parameters of a training that has diverged.

    Raises:
        CheckpointError: NaN or infinity; names the parameter.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{printable(name)} holds NaN or infinity; the training has diverged, so take an "
                "earlier checkpoint"
            )


def printable(text: str) -> str:
    """Text from a file on one line, without the characters that would steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


class _Fault(Exception):
    """What is wrong with a file, without its name."""


def _read(path: Path) -> dict[str, Any]:
    try:
        # A pipe or a device would block, or never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _Fault("is a directory" if os.path.isdir(path) else "not an ordinary file")
    except ValueError as error:
        raise _Fault(f"not a file name: {error}") from error
    with open(path, "rb") as file:
        pickled, storages = _check_archive(file)
        _check_pickle(file, pickled, storages)
        file.seek(0)
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged or hostile pickle makes torch stumble on
            raise _Fault(f"cannot be loaded: {_reason(error)}") from error
    _check_contents(checkpoint)
    return checkpoint


def _check_archive(file: BinaryIO) -> tuple[bytes, dict[str, int]]:
    """Check the zip archive; give the pickle, and storage key -> size of its record in bytes."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(512)
    if not size:
        raise _Fault("the file is empty")
    if not head.startswith(b"PK"):
        raise _Fault(_describe_foreign(head))
    # Exactly at the end, where zipfile and torch both look first: they must see one archive.
    file.seek(max(0, size - _END_OF_ZIP_SIZE))
    if not file.read().startswith(_END_OF_ZIP):
        raise _Fault("truncated or damaged: the zip archive has no end")
    try:
        with zipfile.ZipFile(file) as archive:
            return _check_records(archive, size)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, RuntimeError) as error:
        raise _Fault(f"truncated or damaged zip archive: {_text(str(error))}") from error


def _check_records(archive: zipfile.ZipFile, size: int) -> tuple[bytes, dict[str, int]]:
    records = archive.infolist()
    names = [record.filename for record in records]
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise _Fault(f"a zip archive that torch.save did not write; it holds {_listing(names)}")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in names:
        raise _Fault("a TorchScript archive (torch.jit.save), not a fairseq checkpoint")
    if len(set(names)) != len(names):
        raise _Fault("damaged: the zip archive has several records of one name")
    # torch.save compresses nothing, so the records cannot hold more than the file does.
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise _Fault(f"record {_text(record.filename)} is compressed; torch.save does not")
    if sum(record.file_size for record in records) > size:
        raise _Fault("damaged: the zip archive declares more data than the file holds")
    damaged = archive.testzip()  # checksums, which torch.load does not look at
    if damaged is not None:
        raise _Fault(f"damaged: wrong checksum of record {_text(damaged)}")
    folder = f"{root}data/"
    storages = {
        record.filename.removeprefix(folder): record.file_size
        for record in records
        if record.filename.startswith(folder)
    }
    return archive.read(pickles[0]), storages


def _describe_foreign(head: bytes) -> str:
    if _TORCH_LEGACY_MAGIC in head[:20] or head[257:262] == b"ustar":
        return (
            "written in torch's old format (before 1.6), which is not read here; load it where "
            "you trust it, and save it again with torch.save"
        )
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; fetch it with git lfs pull"
    if head[:1] == b"\x80" and 2 <= int.from_bytes(head[1:2], "big") <= 5:
        return "an ordinary Python pickle, not a PyTorch checkpoint; nothing in it was run"
    return "not a PyTorch checkpoint (no zip archive of torch.save)"


class _Inert:
    """Stands for everything that the pickle names: takes any arguments and state, does nothing."""

    __slots__ = ()
    path = ""

    def __new__(cls, *args: object, **kwargs: object) -> "_Inert":
        if _NEVER_CALLED.match(cls.path):
            raise _Fault(f"calls {_text(cls.path)}, which no checkpoint does; nothing was run")
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        pass

    def extend(self, values: object) -> None:
        pass


# The Python implementation: the C one allocates as much as a number in the file says.
class _DryRun(pickle._Unpickler):
    """Goes through a pickle without importing anything, and checks the storages it refers to."""

    def __init__(self, pickled: bytes, storages: Mapping[str, int]) -> None:
        super().__init__(io.BytesIO(pickled))
        self.storages = storages
        self.names: dict[str, type[_Inert]] = {}

    def find_class(self, module: str, name: str) -> type[_Inert]:
        if module == "__builtin__":  # its name in Python 2, which the protocols of torch.save keep
            module = "builtins"
        path = f"{module}.{name}"
        if path not in self.names:
            self.names[path] = type("_Inert", (_Inert,), {"__slots__": (), "path": path})
        return self.names[path]

    def persistent_load(self, pid: object) -> _Inert:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise _Fault("malformed: a reference to something that is no storage")
        _, kind, key, _, count = pid
        name = getattr(kind, "path", "").rpartition(".")[2]
        if name not in _ITEM_SIZES or not isinstance(key, str) or not isinstance(count, int):
            raise _Fault("malformed: a storage of unknown type")
        if key not in self.storages:
            raise _Fault(f"damaged: storage {_text(key)} is missing")
        if not 0 <= count * _ITEM_SIZES[name] <= self.storages[key]:
            raise _Fault(
                f"damaged: storage {_text(key)} is declared with {count} elements "
                f"({name}), but its record has {self.storages[key]} bytes"
            )
        return _Inert()


def _check_pickle(file: BinaryIO, pickled: bytes, storages: Mapping[str, int]) -> None:
    """Refuse a pickle that names what is not registered, or storages that are not there."""
    run = _DryRun(pickled, storages)
    try:
        run.load()
        fault = None
    except _Fault as error:
        fault = error
    except Exception as error:  # every kind of nonsense has its own exception
        fault = _Fault(f"malformed pickle: {_reason(error)}")
    file.seek(0)
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception as error:  # it knows just the instructions that torch.save writes
        raise _Fault(
            f"not pickled by torch.save ({_reason(error)}), and it names "
            f"{_listing(sorted(run.names))}; nothing was run"
        ) from error
    if foreign:
        raise _Fault(
            f"carries code: it names {_listing(sorted(foreign))}, which fairseq checkpoints do "
            "not hold; nothing was run"
        )
    if fault is not None:
        raise fault


def _check_contents(checkpoint: object) -> None:
    """Check what has been loaded: a dict with a dict of dense tensors under ``model``."""
    if not isinstance(checkpoint, dict):
        raise _Fault(f"not a fairseq checkpoint: it holds a {type(checkpoint).__name__}, no dict")
    if "model" not in checkpoint:
        raise _Fault(
            'not a fairseq checkpoint: it has no "model"; its keys are '
            f"{_listing(map(_text, checkpoint))}"
        )
    model = checkpoint["model"]
    if not isinstance(model, dict):
        raise _Fault(f'not a fairseq checkpoint: "model" is a {type(model).__name__}, no dict')
    for name, tensor in model.items():
        if not isinstance(name, str):
            raise _Fault(f"not a fairseq checkpoint: model has the key {_text(name)}, no name")
        if not isinstance(tensor, Tensor):
            raise _Fault(f"model[{_text(name)}] is a {type(tensor).__name__}, no tensor")
        dense = tensor.layout == torch.strided and not tensor.is_quantized
        if not dense or tensor.device.type != "cpu" or tensor.dtype not in _NUMBERS:
            raise _Fault(f"model[{_text(name)}] is not a dense tensor of numbers")
        # Such as one number repeated by strides of zero, in a shape that no memory could hold.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise _Fault(f"model[{_text(name)}] has more elements than the file has data for")


def _plain_mapping(value: object, name: str) -> dict[str, Any]:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(f"{name} has the key {_text(key)}, no name of a setting")
        return value
    if isinstance(value, Mapping):  # omegaconf's DictConfig, loaded only where it is installed
        from omegaconf import OmegaConf

        try:
            return OmegaConf.to_container(value, resolve=False)
        except Exception as error:  # its state comes from the file, so anything may be missing
            raise CheckpointError(f"{name} is damaged: {_reason(error)}") from error
    raise CheckpointError(f"{name} is a {type(value).__name__}, no mapping of settings")


def _reason(error: Exception) -> str:
    """The telling line of an error; torch surrounds it with advice to turn its protection off."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if line.startswith("WeightsUnpickler error:"):
            return _text(line.removeprefix("WeightsUnpickler error:").strip())
    return _text(lines[0]) if lines else type(error).__name__


def _text(value: object) -> str:
    """Text or a plain value from a file, on one line of at most 200 printable characters."""
    if not isinstance(value, str | int | float | bool | None):
        return f"a {type(value).__name__}"
    return printable(str(value)[:200])


def _listing(names: Iterable[str]) -> str:
    names = [_text(name) for name in names]
    return (", ".join(names[:10]) or "none") + (", ..." if len(names) > 10 else "")

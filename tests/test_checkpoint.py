"""Reading checkpoints: what is refused, that nothing in a file is run, and writing them."""

import argparse
import builtins
import codecs
import collections
import errno
import functools
import importlib
import io
import operator
import os
import pickle
import random
import resource
import runpy
import subprocess
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from fairseq_autosize.checkpoint import (
    CheckpointError,
    config_section,
    model_config,
    read_checkpoint,
    write_checkpoint,
)


def tiny_checkpoint():
    """The layout of a fairseq checkpoint, with one layer, a tie, settings and metrics."""
    embedding = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    return {
        "args": None,
        "cfg": {
            "common": {"seed": 3},
            "model": argparse.Namespace(arch="transformer", encoder_layers=1),
            "task": {"_name": "translation"},
        },
        "model": {
            "encoder.embed_tokens.weight": embedding,
            "decoder.embed_tokens.weight": embedding,
            "encoder.layers.0.fc1.weight": torch.arange(24.0).view(6, 4),
            "encoder.layers.0.fc1.bias": torch.ones(6),
            "encoder.layers.0.fc2.weight": torch.ones(4, 6),
        },
        "optimizer_history": [{"num_updates": 7}],
        "extra_state": {"metrics": {"valid": np.array([2, 0, 1])}},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(6, 4)}}},
    }


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert ours["cfg"] == theirs["cfg"]
    for name, tensor in ours["model"].items():
        assert torch.equal(tensor, theirs["model"][name]), name


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save(tiny_checkpoint(), path)
    return path


def refusal(path):
    """The message with which `path` is refused, after checking its form."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert "weights_only" not in message  # torch's advice to turn the protection off
    return message.removeprefix(f"{path}: ")


# --- what is read ---------------------------------------------------------------------------


def test_reads_what_torch_saved(path):
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint, tiny_checkpoint())
    model = checkpoint["model"]
    assert (
        model["encoder.embed_tokens.weight"].data_ptr()
        == model["decoder.embed_tokens.weight"].data_ptr()
    )
    assert checkpoint["extra_state"]["metrics"]["valid"].tolist() == [2, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_reads_every_usual_dtype(tmp_path, dtype):
    torch.save({"model": {"w": torch.ones(3, 2).to(dtype), "v": torch.zeros(0)}}, tmp_path / "c.pt")
    assert read_checkpoint(tmp_path / "c.pt")["model"]["w"].dtype == dtype


def test_reads_views_of_one_storage(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"model": {"a": whole[1:], "b": whole.t()}}, tmp_path / "c.pt")
    model = read_checkpoint(tmp_path / "c.pt")["model"]
    assert torch.equal(model["a"], whole[1:])
    assert torch.equal(model["b"], whole.t())


# --- files that are no checkpoints ------------------------------------------------------------


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "empty"),
        (b"hello, world\n", "not a PyTorch checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (pickle.dumps({"model": {}}), "an ordinary Python pickle"),
        (b"PK\x03\x04" + bytes(100), "truncated or damaged"),
        (b"PK\x05\x06" + bytes(18), "it holds none"),
    ],
)
def test_foreign_files(tmp_path, content, told):
    (tmp_path / "file.pt").write_bytes(content)
    assert told in refusal(tmp_path / "file.pt")


def test_missing_file_and_directory(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.pt")
    assert "directory" in refusal(tmp_path)


def test_name_with_a_null_byte():
    with pytest.raises(CheckpointError, match="not a file name"):
        read_checkpoint("a\0b")


def test_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not an ordinary file" in refusal(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(path):
    path.chmod(0)
    assert "Permission denied" in refusal(path)


def test_legacy_formats(tmp_path):
    torch.save(tiny_checkpoint(), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert "old format" in refusal(tmp_path / "a.pt")
    with tarfile.open(tmp_path / "b.pt", "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    assert "old format" in refusal(tmp_path / "b.pt")


def test_torchscript_archive(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    assert "TorchScript" in refusal(tmp_path / "script.pt")


def test_zip_with_other_content(tmp_path):
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "readme.txt" in refusal(tmp_path / "c.pt")


@pytest.mark.parametrize(
    "content, told",
    [
        ([1, 2], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({"state_dict": {}, "epoch": 1}, "its keys are state_dict, epoch"),
        ({"a\nb\x1b[31m": {}}, "its keys are a?b?[31m"),
        ({"model": [torch.ones(2)]}, '"model" is a list'),
        ({"model": {"w": 5}}, "model[w] is a int"),
        ({"model": {5: torch.ones(2)}}, "has the key 5"),
        ({"model": {"w": torch.ones(2).to_sparse()}}, "not a dense tensor"),
        ({"model": {"w": torch.ones(2, device="meta")}}, "not a dense tensor"),
    ],
)
def test_contents_of_another_kind(tmp_path, content, told):
    torch.save(content, tmp_path / "c.pt")
    assert told in refusal(tmp_path / "c.pt")


# --- damage -----------------------------------------------------------------------------------


def test_every_truncation_is_noticed(path):
    data = path.read_bytes()
    lengths = {*range(0, len(data), 97), *range(1, 40), *range(len(data) - 90, len(data))}
    for length in sorted(lengths):
        path.write_bytes(data[:length])
        refusal(path)


def test_data_after_the_end_are_refused(path):
    """Readers of zip archives disagree on where such a file ends, and so on what it holds."""
    path.write_bytes(path.read_bytes() + b"more")
    assert "the zip archive has no end" in refusal(path)


def test_flipped_bits_are_noticed_or_harmless(path):
    data = path.read_bytes()
    chooser = random.Random(1)
    refused = 0
    for _ in range(400):
        position = chooser.randrange(len(data))
        damaged = bytearray(data)
        damaged[position] ^= 1 << chooser.randrange(8)
        path.write_bytes(damaged)
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError:
            refused += 1
        else:  # such as a date in the archive's directory
            assert_same(checkpoint, tiny_checkpoint())
    assert refused > 100


def test_flipped_bit_in_the_weights_names_the_record(path):
    data = path.read_bytes()
    weights = tiny_checkpoint()["model"]["encoder.layers.0.fc1.weight"].numpy().tobytes()
    position = data.index(weights) + 50
    path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
    assert "wrong checksum of record" in refusal(path)


# --- sizes that are not there -----------------------------------------------------------------


class Crafted:
    """Pickles as a call of `function` with `arguments`; arguments may hold `Storage`."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced

    def __call__(self):
        """pickle wants what `function` is to be callable; it may be crafted as well."""


class Storage:
    """Pickles as a reference to a storage of the archive."""

    def __init__(self, key="0", count=4, kind=torch.FloatStorage):
        self.reference = ("storage", kind, key, "cpu", count)


class CraftingPickler(pickle._Pickler):
    def persistent_id(self, value):
        return value.reference if isinstance(value, Storage) else None


def crafted_tensor(storage, size, stride):
    arguments = (storage, 0, size, stride, False, collections.OrderedDict())
    return Crafted(torch._utils._rebuild_tensor_v2, *arguments)


def craft(path, content, records=None, compression=zipfile.ZIP_STORED):
    """Write an archive like those of torch.save; `content` is an object, or a pickle's bytes."""
    if not isinstance(content, bytes):
        buffer = io.BytesIO()
        CraftingPickler(buffer, protocol=2).dump(content)
        content = buffer.getvalue()
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for key, data in (records or {"0": bytes(16)}).items():
            archive.writestr(f"archive/data/{key}", data)


def test_crafted_archive_is_read_when_it_is_right(tmp_path):
    craft(tmp_path / "c.pt", {"model": {"w": crafted_tensor(Storage(), (2, 2), (2, 1))}})
    assert read_checkpoint(tmp_path / "c.pt")["model"]["w"].shape == (2, 2)


@pytest.mark.parametrize(
    "tensor, told",
    [
        (crafted_tensor(Storage(count=5), (5,), (1,)), "5 elements (FloatStorage), but"),
        (crafted_tensor(Storage(count=2**50), (2**50,), (1,)), "elements"),
        (crafted_tensor(Storage(count=-1), (1,), (1,)), "elements"),
        (crafted_tensor(Storage(count="4"), (1,), (1,)), "unknown type"),
        (crafted_tensor(Storage(kind=collections.Counter), (1,), (1,)), "unknown type"),
        (crafted_tensor(Storage(key="9"), (1,), (1,)), "storage 9 is missing"),
        (crafted_tensor(Storage(), (2**40,), (1,)), "cannot be loaded"),
        (crafted_tensor(Storage(), (2**40,), (0,)), "more elements"),
        (crafted_tensor(Storage(), (-3,), (1,)), "cannot be loaded"),
        (Crafted(bytearray, 2**40), "calls builtins.bytearray"),
        (Crafted(list, crafted_tensor(Storage(), (2**40,), (0,))), "calls builtins.list"),
        (Crafted(torch.FloatStorage, 2**40), "calls torch.FloatStorage"),
        (Crafted(torch.UntypedStorage, 2**40), "calls torch.storage.UntypedStorage"),
        (Crafted(torch.FloatTensor, 2**40), "calls torch.FloatTensor"),
    ],
)
def test_declared_sizes_do_not_allocate(tmp_path, tensor, told):
    craft(tmp_path / "c.pt", {"model": {"w": tensor}})
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    assert told in refusal(tmp_path / "c.pt")
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_huge_memo_index_does_not_allocate(tmp_path):
    craft(tmp_path / "c.pt", b"\x80\x02}r\xff\xff\xff\x7f.")  # memo[2**31 - 1] = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 'no "model"' in refusal(tmp_path / "c.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_compressed_records_are_refused(tmp_path):
    content = {"model": {"w": crafted_tensor(Storage(count=10**7), (10**7,), (1,))}}
    craft(tmp_path / "c.pt", content, {"0": bytes(4 * 10**7)}, zipfile.ZIP_DEFLATED)
    assert "is compressed" in refusal(tmp_path / "c.pt")


def test_records_of_one_name_are_refused(tmp_path):
    craft(tmp_path / "c.pt", {"model": {}})
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(tmp_path / "c.pt", "a") as archive,
    ):
        archive.writestr("archive/data/0", bytes(16))
    assert "several records of one name" in refusal(tmp_path / "c.pt")


@pytest.mark.parametrize(
    "pickled",
    [b"", b"\x80\x02", b"\x80\x02}", b"\x80\x02h\x05.", b"\x80\x02)R.", b"\x80\x02\xff.", b"."],
)
def test_malformed_pickles(tmp_path, pickled):
    craft(tmp_path / "c.pt", pickled)
    assert "pickle" in refusal(tmp_path / "c.pt")


# --- files that carry code --------------------------------------------------------------------


class CallsItself:
    """Would run a command when its state is set."""

    def __init__(self, command):
        self.command = command

    def __setstate__(self, state):
        subprocess.run(state["command"], shell=True, check=True)


def gadgets(canary):
    """Objects that create the file `canary` when they are unpickled without protection."""
    touch = f"touch '{canary}'"
    script = f"open({str(canary)!r}, 'w').close()"
    return {
        "posix.system": Crafted(os.system, touch),
        "builtins.eval": Crafted(eval, script),
        "builtins.exec": Crafted(exec, script),
        "builtins.getattr": Crafted(
            Crafted(getattr, Crafted(importlib.import_module, "os"), "system"), touch
        ),
        "builtins.__import__": Crafted(
            Crafted(Crafted(operator.attrgetter, "system"), Crafted(builtins.__import__, "os")),
            touch,
        ),
        "Popen": Crafted(subprocess.Popen, ["touch", str(canary)]),
        "functools.partial": Crafted(functools.partial(os.system, touch)),
        "builtins.map": Crafted(list, Crafted(map, os.system, [touch])),
        "io.open": Crafted(io.open, str(canary), "w"),
        "codecs.open": Crafted(codecs.open, str(canary), "w"),
        "runpy._run_code": Crafted(runpy._run_code, script, {}),
        "CallsItself": CallsItself(touch),
        "torch.serialization.load": Crafted(torch.load, str(canary)),
        "torch.hub.load_state_dict_from_url": Crafted(torch.hub.load_state_dict_from_url, "file:x"),
        "torch.jit._serialization.load": Crafted(torch.jit.load, str(canary)),
        "builtins.type": Crafted(type, "Made", (dict,), {}),
    }


GADGETS = list(gadgets("canary"))
HARMLESS_ALONE = ("torch.", "builtins.type")


def hide(gadget, place):
    checkpoint = tiny_checkpoint()
    if place == "weights":
        checkpoint["model"]["encoder.layers.0.fc1.weight"] = gadget
    elif place == "key":
        checkpoint[place] = gadget
    else:
        checkpoint[place] = {"nested": [({"deep": gadget},)]}
    return checkpoint


@pytest.mark.parametrize("name", [g for g in GADGETS if not g.startswith(HARMLESS_ALONE)])
def test_gadgets_work_where_nothing_protects(tmp_path, name):
    gadget = gadgets(tmp_path / "canary")[name]
    loaded = pickle.loads(pickle.dumps(gadget))
    if isinstance(loaded, subprocess.Popen):
        loaded.wait()
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("place", ["weights", "cfg", "last_optimizer_state", "extra_state", "key"])
@pytest.mark.parametrize("name", GADGETS)
def test_code_is_named_and_not_run(tmp_path, name, place):
    path, canary = tmp_path / "c.pt", tmp_path / "canary"
    torch.save(hide(gadgets(canary)[name], place), path)
    message = refusal(path)
    assert "carries code" in message
    assert name in message
    assert "nothing was run" in message
    assert not canary.exists()


@pytest.mark.parametrize("name", GADGETS)
@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_code_in_other_pickle_protocols(tmp_path, name, protocol):
    path, canary = tmp_path / "c.pt", tmp_path / "canary"
    craft(path, pickle.dumps(gadgets(canary)[name], protocol=protocol))
    message = refusal(path)
    assert "nothing was run" in message
    assert name in message or protocol < 3  # which write Python 2's names
    assert not canary.exists()


@pytest.mark.parametrize("form", ["pickle", "legacy", "tar"])
def test_code_in_old_formats_is_not_run(tmp_path, form):
    path, canary = tmp_path / "c.pt", tmp_path / "canary"
    content = hide(gadgets(canary)["posix.system"], "cfg")
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif form == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        with tarfile.open(path, "w") as archive:
            data = pickle.dumps(content)
            member = tarfile.TarInfo("sys_info")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    refusal(path)
    assert not canary.exists()


def test_code_after_the_end_of_a_damaged_pickle_is_not_run(tmp_path):
    path, canary = tmp_path / "c.pt", tmp_path / "canary"
    gadget = pickle.dumps(gadgets(canary)["posix.system"], protocol=2)
    craft(path, gadget[:-1] + b"h\xfa.")  # ends with a reference to nothing
    assert "posix.system" in refusal(path)
    assert not canary.exists()


# --- writing ----------------------------------------------------------------------------------


def test_write_and_read_back(tmp_path):
    path = tmp_path / "new.pt"
    write_checkpoint(tiny_checkpoint(), path)
    assert_same(read_checkpoint(path), tiny_checkpoint())
    assert os.listdir(tmp_path) == ["new.pt"]
    # Once more: what was read can be written.
    write_checkpoint(read_checkpoint(path), path, force=True)
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint, tiny_checkpoint())
    model = checkpoint["model"]
    assert (
        model["encoder.embed_tokens.weight"].data_ptr()
        == model["decoder.embed_tokens.weight"].data_ptr()
    )


def test_write_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_checkpoint(tiny_checkpoint(), tmp_path / "new.pt")
    finally:
        os.umask(before)
    assert (tmp_path / "new.pt").stat().st_mode & 0o777 == 0o640


def test_write_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tiny_checkpoint(), "new.pt")
    assert_same(read_checkpoint("new.pt"), tiny_checkpoint())


@pytest.mark.parametrize("name", ["n" * 255, "\U0001f600" * 63 + "nnn"], ids=["ascii", "emoji"])
def test_write_to_the_longest_names(tmp_path, name):
    write_checkpoint(tiny_checkpoint(), tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot write: File name too long"):
        write_checkpoint(tiny_checkpoint(), tmp_path / f"{name}n")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_overwriting_keeps_the_mode(path, mode):
    path.chmod(mode)
    write_checkpoint(tiny_checkpoint(), path, force=True)
    assert path.stat().st_mode & 0o777 == mode


def test_write_refuses_to_overwrite(path):
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        write_checkpoint({"model": {}}, path)
    assert path.read_bytes() == before
    write_checkpoint({"model": {}}, path, force=True)
    assert read_checkpoint(path) == {"model": {}}


def test_write_refuses_a_directory_and_a_missing_one(tmp_path):
    with pytest.raises(CheckpointError, match="is a directory"):
        write_checkpoint(tiny_checkpoint(), tmp_path, force=True)
    with pytest.raises(CheckpointError, match="cannot write: No such file"):
        write_checkpoint(tiny_checkpoint(), tmp_path / "none" / "new.pt")


def test_write_refuses_a_pipe_and_a_place_below_a_file(path):
    os.mkfifo(path.parent / "pipe")
    with pytest.raises(CheckpointError, match="pipe: cannot write: not an ordinary file"):
        write_checkpoint(tiny_checkpoint(), path.parent / "pipe", force=True)
    assert (path.parent / "pipe").is_fifo()
    with pytest.raises(CheckpointError, match=r"checkpoint.pt/new.pt: cannot write: Not a direc"):
        write_checkpoint(tiny_checkpoint(), path / "new.pt")
    assert sorted(os.listdir(path.parent)) == [path.name, "pipe"]


def test_failed_write_leaves_what_was_there(path, monkeypatch):
    before = path.read_bytes()

    def disk_full(checkpoint, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(CheckpointError, match="cannot write: No space left"):
        write_checkpoint(tiny_checkpoint(), path, force=True)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_objects_that_cannot_be_pickled_leave_nothing(tmp_path):
    with pytest.raises(Exception, match="pickle"):
        write_checkpoint({"model": lambda: None}, tmp_path / "new.pt")
    assert os.listdir(tmp_path) == []


# --- settings ---------------------------------------------------------------------------------


def test_model_config_of_all_generations(tmp_path):
    settings = {"arch": "transformer", "encoder_layers": 1}
    namespace = argparse.Namespace(**settings)
    for checkpoint in (
        {"cfg": {"model": settings}},
        {"cfg": {"model": namespace}},
        {"cfg": OmegaConf.create({"model": settings})},
        {"cfg": None, "args": namespace},
        {"args": namespace},
    ):
        torch.save({"model": {}, **checkpoint}, tmp_path / "c.pt")
        assert model_config(read_checkpoint(tmp_path / "c.pt")) == settings


def test_expressions_in_settings_stay_text():
    cfg = OmegaConf.create({"model": {"seed": "${oc.env:HOME}"}})
    assert model_config({"cfg": cfg}) == {"seed": "${oc.env:HOME}"}


@pytest.mark.parametrize(
    "checkpoint, told",
    [
        ({}, "no settings of its model"),
        ({"cfg": {"task": {}}}, "no settings of its model"),
        ({"cfg": [1]}, "cfg is a list"),
        ({"cfg": {"model": 5}}, "cfg.model is a int"),
        ({"args": "text"}, "args is a str"),
        ({"cfg": DictConfig.__new__(DictConfig)}, "cfg is damaged"),
    ],
)
def test_settings_that_are_none(checkpoint, told):
    with pytest.raises(CheckpointError, match=told):
        model_config(checkpoint)


def test_absent_section_is_empty():
    assert config_section({"cfg": {"task": None}}, "task") == {}
    assert config_section({}, "task") == {}

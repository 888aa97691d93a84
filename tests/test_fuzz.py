"""Mutated checkpoints and option strings: clear errors or right results, never anything else."""

import argparse
import io
import json
import resource
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.dataclass.utils import gen_parser_from_dataclass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import SIZES, TASK, build_model, checkpoint_of, dictionary

from fairseq_autosize import cli
from fairseq_autosize.checkpoint import CheckpointError, read_checkpoint
from fairseq_autosize.config import AutosizeConfig, ConfigError, Settings, add_bias_flags
from fairseq_autosize.report import count_neurons

EXAMPLES = 1000  # of checkpoints, and of command lines

FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize=True,  # the same inputs at every run
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

# --- checkpoints ------------------------------------------------------------------------------


def whole_checkpoint(data: Path) -> dict[str, Any]:
    """A checkpoint with everything that a training leaves: dead neurons, a head, state, average."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "task": "translation"}
    model, _ = build_model(share_all_embeddings=True, **sizes)
    args = argparse.Namespace(
        **SIZES | sizes | {"arch": "transformer", "share_all_embeddings": True}
    )
    with torch.no_grad():
        model.encoder.layers[0].fc1.weight[3:] = 0
        model.decoder.layers[0].self_attn.v_proj.weight[:4] = 0
    task = TASK | {"data": str(data), "source_lang": "xx", "target_lang": "yy"}
    checkpoint = checkpoint_of(model, args, task)
    state = {
        index: {"step": 4, "exp_avg": p.detach().clone()}
        for index, p in enumerate(model.parameters())
    }
    checkpoint["last_optimizer_state"] = {"state": state, "param_groups": [{"params": [*state]}]}
    checkpoint["extra_state"] = {
        "ema": {name: value.clone() for name, value in model.state_dict().items() if "fc" in name},
        "train_iterator": {"epoch": 2, "iterations_in_epoch": 0},
        "TranslationTask": {"prox_strength": 1.0, "prox_frozen_at": 24},
    }
    checkpoint["autosize"] = {"format": 2, "history": [{"version": "0.1.0"}]}
    return checkpoint


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The paths of everything in nested dicts, lists and namespaces."""
    found = [path] if path else []
    for key, inner in entries(value):
        found += places(inner, (*path, key))
    return found


def entries(value: object) -> list[tuple]:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []


def container(value: Any, path: tuple) -> Any:
    """What holds the last part of a path: a dict or a list; None where an edit has removed it."""
    for key in path[:-1]:
        value = dict(entries(value)).get(key)
    return vars(value) if isinstance(value, argparse.Namespace) else value


def rebuilt(value: object) -> object:
    """A copy of the containers; tensors stay themselves, so that ties stay."""
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**rebuilt(vars(value)))
    if isinstance(value, dict):
        return type(value)((key, rebuilt(inner)) for key, inner in value.items())
    return [rebuilt(inner) for inner in value] if isinstance(value, list) else value


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
TENSORS = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
    st.lists(st.sampled_from([0, 1, 2, 8, 10, 12]), max_size=3),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 1.0, float("nan"), float("inf")]),
)
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 8, 2**31, 2**70]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["2", "transformer", "gelu", "nothing", "${a}", "\x1b[31m\n", "1,2", "-"]),
)
VALUES = st.one_of(
    PLAIN,
    TENSORS,
    st.lists(PLAIN, max_size=2),
    st.dictionaries(st.one_of(st.integers(0, 2), st.text(max_size=3)), PLAIN, max_size=2),
    st.just(argparse.Namespace(a=1)),
)
NUMBER = st.integers(0, 10**6)
EDITS = st.one_of(
    st.tuples(st.just("set"), NUMBER, VALUES),
    st.tuples(st.just("delete"), NUMBER, st.none()),
    st.tuples(st.just("swap"), NUMBER, NUMBER),
    st.tuples(st.just("key"), NUMBER, st.one_of(st.integers(), st.none(), st.text(max_size=3))),
)
BYTES = st.one_of(
    st.tuples(st.just("flip"), NUMBER, st.integers(1, 255)),
    st.tuples(st.just("cut"), NUMBER, NUMBER),
    st.tuples(st.just("insert"), NUMBER, st.binary(min_size=1, max_size=4)),
)
MUTATIONS = st.one_of(
    st.tuples(st.just("structure"), st.lists(EDITS, min_size=1, max_size=3)),
    st.tuples(st.just("structure"), st.lists(EDITS, min_size=1, max_size=3)),
    st.tuples(st.just("pickle"), st.lists(BYTES, min_size=1, max_size=3)),
    st.tuples(st.just("file"), st.lists(BYTES, min_size=1, max_size=3)),
)


def edited(checkpoint: dict, edits: list[tuple]) -> dict:
    """The checkpoint with values replaced, deleted, swapped, or put under other keys."""
    result = rebuilt(checkpoint)
    paths = places(checkpoint)
    for kind, number, argument in edits:
        path = paths[number % len(paths)]
        inside = container(result, path)
        if path[-1] not in dict(entries(inside)):
            continue
        if kind == "set":
            inside[path[-1]] = argument
        elif kind == "swap":
            other = paths[argument % len(paths)]
            there = container(result, other)
            shorter = min(len(path), len(other))
            if path[:shorter] != other[:shorter] and other[-1] in dict(entries(there)):
                inside[path[-1]], there[other[-1]] = there[other[-1]], inside[path[-1]]
        elif isinstance(inside, dict):
            value = inside.pop(path[-1])
            if kind == "key":
                inside[argument] = value
    return result


def mutated(data: bytes, edits: list[tuple]) -> bytes:
    result = bytearray(data)
    for kind, number, argument in edits:
        at = number % (len(result) or 1)
        if kind == "flip" and result:
            result[at] ^= argument
        elif kind == "cut":
            del result[at : at + 1 + argument % 100]
        elif kind == "insert":
            result[at:at] = argument
    return bytes(result)


def with_pickle(data: bytes, edits: list[tuple]) -> bytes:
    """The archive with its pickle mutated, and checksums that are right again."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for record in old.infolist():
            content = old.read(record)
            name = record.filename
            new.writestr(name, mutated(content, edits) if name.endswith("data.pkl") else content)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands share what was read, as reading takes most of the time; they must not change it."""
    last: dict[tuple, Any] = {}

    def read(path: str) -> dict[str, Any]:
        key = (path, Path(path).read_bytes())
        if key not in last:
            for old in [old for old in last if old[0] == path]:
                del last[old]
            try:
                last[key] = read_checkpoint(path)
            except CheckpointError as error:
                last[key] = error
        if isinstance(last[key], CheckpointError):
            raise last[key]
        return last[key]

    monkeypatch.setattr(cli, "read_checkpoint", read)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("dict.xx.txt", "dict.yy.txt"):
        dictionary().save(str(folder / name))
    torch.save(whole_checkpoint(folder), folder / "good.pt")
    return folder


def commands(folder: Path) -> list[list[str]]:
    """Every way in which a command reads bad.pt, and writes out.pt if it writes."""
    bad, good, out = (str(folder / name) for name in ("bad.pt", "good.pt", "out.pt"))
    return [
        ["count", bad, "--json"],
        ["count", bad, good],
        ["compact", bad, out],
        ["compact", bad, out, "--uniform", "--keep-optimizer"],
        ["average", out, good, bad],
        ["average", out, bad, good],
        ["export", bad, out, "--format", "ctranslate2", "--data-dir", str(folder)],
    ]


def check(argv: list[str], folder: Path, capsys: pytest.CaptureFixture) -> int:
    """Run one command: status 0 and a result that is one, or 2, one line and no trace."""
    out = folder / "out.pt"
    before = set(folder.iterdir())
    status = cli.main(argv)
    printed = capsys.readouterr()
    if status:
        lines = printed.err.splitlines()
        assert status == 2 and "bad.pt" not in printed.out and set(folder.iterdir()) == before
        assert lines[-1].startswith("fairseq-autosize: error: ") and len(lines[-1]) < 2000, lines
        assert not any("Traceback" in line or "weights_only" in line for line in lines)
    elif "--json" in argv:
        neurons = json.loads(printed.out)["ffn_neurons"]
        assert neurons["alive"] + neurons["pruned"] == neurons["total"]
    elif argv[0] in ("compact", "average"):
        if "--uniform" not in argv:
            neurons = count_neurons(read_checkpoint(out))["ffn_neurons"]
            assert argv[0] == "average" or neurons["pruned"] == 0
        out.unlink()
    elif argv[0] == "export":
        shutil.rmtree(out)
    return status


def test_unchanged_checkpoint_passes_every_command(folder, capsys):
    (folder / "bad.pt").write_bytes((folder / "good.pt").read_bytes())
    for argv in commands(folder)[:-1]:
        assert check(argv, folder, capsys) == 0, argv


@pytest.mark.heavy
def test_mutated_checkpoints(folder, capsys):
    data = (folder / "good.pt").read_bytes()
    whole = whole_checkpoint(folder)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    statuses = []

    @FUZZ
    @given(MUTATIONS, NUMBER)
    def run(mutation, number):
        kind, edits = mutation
        bad = folder / "bad.pt"
        if kind == "structure":
            torch.save(edited(whole, edits), bad)
        else:
            bad.write_bytes((with_pickle if kind == "pickle" else mutated)(data, edits))
        count, *others = commands(folder)
        for argv in (count, others[number % len(others)]):
            statuses.append(check(argv, folder, capsys))

    run()
    assert 0.1 < sum(map(bool, statuses)) / len(statuses) < 0.9, "they reach beyond the reading"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < 500_000  # KiB


# --- options ----------------------------------------------------------------------------------

FLAGS = ["--" + name.replace("_", "-") for name in AutosizeConfig.__dataclass_fields__]
FLAGS = [*(flag for flag in FLAGS if flag.startswith("--prox")), "--no-prox-bias"]
WORDS = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        "none l21 linf1 adam identity schedule auto ffn ,ffn,, ffn,all 0 -1 1 0.5 1e400 nan "
        "-inf 1_0 ٣ ² 0x10 99999999999999999999 9e99 True '' ${x} [1] {a:1} 5.0 None".split()
    ),
)


# Most words suit no option, and argparse says so; these reach the package's own checks.
NUMBERED = [f"--prox-{name}" for name in ("strength", "start-update", "freeze-update")]
NUMBERED += ["--prox-freeze-patience", "--prox-target-sparsity", "--prox-step-size"]
NUMBERS = st.sampled_from("0 1 2 0.5 -1 1e400 nan -inf ² ٣ 1_0 99999999999999999999 auto".split())
OPTIONS = st.one_of(
    st.tuples(st.sampled_from(NUMBERED), st.tuples(NUMBERS)),
    st.tuples(st.sampled_from(NUMBERED[:3]), st.tuples(st.sampled_from("0 1 2 ² 1e400".split()))),
    st.tuples(st.just("--prox"), st.just(("l21",))),
    st.tuples(st.sampled_from(FLAGS), st.lists(WORDS, max_size=2)),
)


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_bias_flags(parser)
    gen_parser_from_dataclass(parser, AutosizeConfig(), delete_default=False)
    return parser.parse_args(argv)


def test_option_strings():
    outcomes = dict.fromkeys(("parser", "refused", "accepted"), 0)

    @FUZZ
    @given(st.lists(OPTIONS, max_size=4), NUMBER)
    def run(options, max_update):
        argv = [word for flag, values in options for word in (flag, *values)]
        try:
            chosen = Settings.from_config(parsed(argv))
            freeze = chosen.freeze_of(max_update)
        except SystemExit as left:
            assert left.code == 2  # argparse's own
            outcomes["parser"] += 1
        except ConfigError as error:
            assert str(error).startswith("--prox")
            outcomes["refused"] += 1
        else:
            assert chosen.strength is None or 0 <= chosen.strength < float("inf")
            assert freeze is None or freeze > chosen.start_update >= 0
            outcomes["accepted"] += 1

    run()
    assert min(outcomes.values()) > EXAMPLES / 20, outcomes

"""scripts/prepare_data.py: fetching, checks, cleaning, segmentation, and that nothing gets lost."""

import functools
import gzip
import hashlib
import http.server
import importlib.util
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT

from fairseq_autosize import embedded_corpus

SCRIPT = Path(__file__).parent.parent / "scripts" / "prepare_data.py"
spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
prepare_data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare_data)

OWN = ("--source-lang", "xa", "--target-lang", "en")


@pytest.fixture
def folder(tmp_path):
    """A folder with a user's own small corpus."""
    embedded_corpus.write(tmp_path / "text", train=120, valid=8, test=9)
    return tmp_path / "text"


def fail(capsys, *argv):
    """Runs the script in this process and returns its one line of error."""
    assert prepare_data.main([str(arg) for arg in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("prepare_data.py: error: ")
    assert error.count("\n") == 1
    return error


def edit(path, number, line):
    """Replaces a line (numbered from 1), or removes it for None."""
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[number - 1 : number] = [] if line is None else [line]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def default_rules(**rules):
    return {rule: type(value)(0) for rule, value in prepare_data.CLEANING.items()} | rules


# The whole run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The script run by its command line from another directory, with relative paths."""
    root = tmp_path_factory.mktemp("comma, space")
    embedded_corpus.write(root / "text", train=400, valid=20, test=30)
    edit(root / "text" / "train.en", 3, " ")
    for lang in ("xa", "en"):
        extra = (root / "text" / f"test.{lang}").read_bytes().splitlines(keepends=True)[:7]
        with gzip.open(root / "text" / f"test.more.{lang}.gz", "wb") as file:
            file.writelines(extra)
    argv = ["own", "out/new", "--source", "text", *OWN, "--vocab-size", "300"]
    argv += ["--train-lines", "390"]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *argv], cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return root, run.stdout


@pytest.mark.heavy
def test_counts_and_files(prepared):
    root, output = prepared
    assert "400 training lines read" in output
    assert "dropped by the rule empty: 1" in output
    assert "kept: 399" in output
    record = json.loads((root / "out/new/prepare.json").read_text())
    assert record["lines"] == {"train": 390, "valid": 20, "test": 30, "test.more": 7}
    assert record["gen_subsets"] == {"test": "test", "test1": "test.more"}
    raw = (root / "out/new/raw/test.en").read_bytes()
    assert raw == (root / "text/test.en").read_bytes()
    assert record["sha256"]["test.en"] == hashlib.sha256(raw).hexdigest()
    assert [path.name for path in (root / "out").iterdir()] == ["new"]  # no scratch left


@pytest.mark.heavy
def test_first_lines_after_cleaning_are_used(prepared):
    root, _ = prepared
    source = (root / "text/train.xa").read_text().splitlines()
    del source[2]
    assert (root / "out/new/raw/train.xa").read_text().splitlines() == source[:390]


@pytest.mark.heavy
def test_one_dictionary_covers_train_and_detokenises(prepared):
    """What fairseq-generate --remove-bpe sentencepiece prints is the raw text again."""
    from fairseq.data import Dictionary, data_utils

    binary = prepared[0] / "out/new/data-bin"
    assert (binary / "dict.xa.txt").read_bytes() == (binary / "dict.en.txt").read_bytes()
    dictionary = Dictionary.load(str(binary / "dict.en.txt"))
    for split, subset in (("train", "train"), ("test", "test"), ("test.more", "test1")):
        for lang in ("xa", "en"):
            data = data_utils.load_indexed_dataset(f"{binary}/{subset}.xa-en.{lang}", dictionary)
            raw = (prepared[0] / f"out/new/raw/{split}.{lang}").read_text().splitlines()
            assert len(data) == len(raw)
            text = [dictionary.string(line, "sentencepiece") for line in data]
            if split == "train":
                assert not any((line == dictionary.unk()).any() for line in data)
                assert text == raw
            else:
                assert [
                    a for a, b in zip(text, raw, strict=True) if "<unk>" not in a and a != b
                ] == []


@pytest.mark.heavy
def test_printed_options_are_for_this_data(prepared):
    _, output = prepared
    generate = [line for line in output.splitlines() if "fairseq-generate" in line]
    assert len(generate) == 2
    assert "out/new/data-bin --source-lang xa --target-lang en" in generate[0]
    assert f"--user-dir {ROOT}/fairseq_autosize --required-batch-size-multiple 1" in generate[0]
    assert "--remove-bpe sentencepiece" in generate[0]
    assert "--gen-subset test1" in generate[1]
    assert "sacrebleu out/new/raw/test.more.en" in output


@pytest.mark.heavy
@pytest.mark.parametrize("bpe", ["subword-nmt", "none"])
def test_other_segmentations_detokenise(folder, tmp_path, capsys, bpe):
    from fairseq.data import Dictionary, data_utils

    size = ["--vocab-size", "200"] if bpe != "none" else []
    argv = ["own", str(tmp_path / "new"), "--source", str(folder), *OWN, "--bpe", bpe, *size]
    assert prepare_data.main(argv) == 0
    dictionary = Dictionary.load(str(tmp_path / "new/data-bin/dict.en.txt"))
    prefix = tmp_path / "new/data-bin/train.xa-en.en"
    data = data_utils.load_indexed_dataset(str(prefix), dictionary)
    symbol = "@@ " if bpe == "subword-nmt" else None
    raw = (folder / "train.en").read_text().splitlines()
    assert [dictionary.string(line, symbol) for line in data] == raw
    output = capsys.readouterr().out
    assert ("--remove-bpe >" in output) == (bpe == "subword-nmt")


@pytest.mark.heavy
def test_embedded_corpus_in_both_directions_and_force(tmp_path, monkeypatch):
    small = embedded_corpus.generate(300, 10, 10)
    monkeypatch.setattr(embedded_corpus, "generate", lambda: small)
    dest = tmp_path / "new"
    dest.mkdir()
    (dest / "mine").write_text("kept")
    reverse = ["--source-lang", "en", "--target-lang", "xa"]
    argv = ["embedded", str(dest), "--vocab-size", "300", "--force", *reverse]
    assert prepare_data.main(argv) == 0
    assert (tmp_path / "new.old-1" / "mine").read_text() == "kept"
    assert json.loads((dest / "prepare.json").read_text())["languages"] == ["en", "xa"]
    assert (dest / "data-bin" / "train.en-xa.xa.bin").exists()
    expected = [pair[0] for pair in small["test"]]
    assert (dest / "raw" / "test.xa").read_text().splitlines() == expected


def test_registry_agrees_with_the_embedded_corpus_and_its_checksums():
    datasets = prepare_data.DATASETS
    assert datasets["embedded"].languages == embedded_corpus.LANGUAGES
    files = {
        f"{name}/{split}.{lang}"
        for name, known in datasets.items()
        for split in known.splits
        for lang in known.languages
    }
    assert files == set(prepare_data.CHECKSUMS)
    for known in datasets.values():
        if known.splits:  # pinned to a commit
            assert re.search(r"/[0-9a-f]{40}/", known.url)


# Fetching -----------------------------------------------------------------------------------------

TEXT = {"xx": ["\ufeffa  b\u00a0c ", "d"], "en": ["A B\u2028C", "\tD"]}
NORMALISED = {"xx": b"a b c\nd\n", "en": b"A B C\nD\n"}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(params=["http", "file"])
def address(request, tmp_path):
    """The address of a folder, served by HTTP or as file://."""
    served = tmp_path / "served"
    served.mkdir()
    if request.param == "file":
        yield served, served.as_uri()
        return
    handler = functools.partial(Quiet, directory=str(served))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield served, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def register(monkeypatch, url, splits):
    known = prepare_data.Dataset(("xx", "en"), url, splits, noisy=False)
    monkeypatch.setitem(prepare_data.DATASETS, "fake", known)
    for split in splits:
        for lang, text in NORMALISED.items():
            digest = hashlib.sha256(text).hexdigest()
            monkeypatch.setitem(prepare_data.CHECKSUMS, f"fake/{split}.{lang}", digest)


@pytest.mark.parametrize("form", ["json", "gz"])
def test_fetch_normalises_and_checks(address, monkeypatch, form):
    served, url = address
    if form == "json":
        rows = [
            {"translation": dict(zip(TEXT, row, strict=True))}
            for row in zip(*TEXT.values(), strict=True)
        ]
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (served / "dev.json").write_text(text + "\n", encoding="utf-8")
        register(monkeypatch, url + "/{split}.json", {"valid": "dev"})
    else:
        for lang, lines in TEXT.items():
            data = gzip.compress("\n".join(lines).encode())
            (served / f"dev.{lang}.gz").write_bytes(data)
            (served / f"valid.{lang}.gz").write_bytes(data)
        register(monkeypatch, url + "/{split}.{lang}.gz", {"valid": "dev"})
        assert prepare_data.read_corpus("fake", url, ("xx", "en")) == {
            "valid": [("a b c", "A B C"), ("d", "D")]
        }
    corpus = prepare_data.read_corpus("fake", None, ("xx", "en"))
    assert corpus == {"valid": [("a b c", "A B C"), ("d", "D")]}
    assert prepare_data.read_corpus("fake", None, ("en", "xx"))["valid"][1] == ("D", "d")


def test_fetch_refuses_other_text(address, monkeypatch, capsys, tmp_path):
    served, url = address
    for lang in TEXT:
        (served / f"valid.{lang}.gz").write_bytes(gzip.compress(b"changed\nlines\n"))
    register(monkeypatch, url + "/{split}.{lang}.gz", {"valid": "valid"})
    error = fail(capsys, "fake", tmp_path / "new")
    assert f"{url}/valid.xx.gz: the text is not that of fake" in error
    assert not (tmp_path / "new").exists()


def test_fetch_reports_what_is_not_there(address, monkeypatch, capsys, tmp_path):
    _, url = address
    register(monkeypatch, url + "/{split}.{lang}.gz", {"valid": "valid"})
    error = fail(capsys, "fake", tmp_path / "new")
    assert f"cannot read {url}/valid.xx.gz" in error
    assert "give a folder as --source" in error


@pytest.mark.parametrize("inside", [True, False])
def test_source_folder_may_hold_a_folder_of_that_name(tmp_path, monkeypatch, inside):
    register(monkeypatch, "", {"valid": "valid"})
    folder = tmp_path / "fake" if inside else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "valid.xx").write_bytes(NORMALISED["xx"])
    (folder / "valid.en.gz").write_bytes(gzip.compress(NORMALISED["en"]))
    corpus = prepare_data.read_corpus("fake", str(tmp_path), ("xx", "en"))
    assert corpus["valid"] == [("a b c", "A B C"), ("d", "D")]


# Cleaning -----------------------------------------------------------------------------------------

GOOD = ("one two", "eins zwei")
RULES = {
    "empty": (("", "x"), {}),
    "empty to the eye": (("\u200b \u200d", "x"), {}),
    "drop_repeats": (GOOD, {"drop_repeats": True}),
    "drop_copies": (("same", "same"), {"drop_copies": True}),
    "max_ratio": (("a", "b c d e"), {"max_ratio": 3.0}),
    "max_words": (("a b c d e f", "g h i j k l"), {"max_words": 5}),
    "drop_overlap": (("new here", "held out"), {"drop_overlap": True}),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_drops_what_it_names_and_nothing_else(rule):
    bad, rules = RULES[rule]
    borders = [("a", "b c d"), ("a b c d e", "f g h i j")]  # just inside the limits
    corpus = {"train": [GOOD, bad, *borders], "valid": [("x y", "held out")], "test": []}
    kept, dropped = prepare_data.clean(corpus, default_rules(**rules))
    assert kept == [GOOD, *borders]
    assert dropped == {"empty": 0} | {next(iter(rules), "empty"): 1}
    if rules:
        assert prepare_data.clean(corpus, default_rules()) == (corpus["train"], {"empty": 0})


def test_a_line_counts_once(capsys):
    corpus = {"train": [("a", "a"), ("a", "a")], "valid": [("a", "b")], "test": []}
    rules = default_rules(drop_repeats=True, drop_copies=True, drop_overlap=True)
    assert prepare_data.clean(corpus, rules) == (
        [],
        {"empty": 0, "drop_repeats": 1, "drop_copies": 1, "drop_overlap": 0},
    )


def test_noisy_data_sets_are_cleaned_unless_told_otherwise():
    def rules(*argv):
        args = prepare_data.parse_args([*argv])
        return {rule: getattr(args, rule) for rule in prepare_data.CLEANING}

    assert rules("mafand-hau-en", "d") == prepare_data.CLEANING
    assert rules("multi30k-de-en", "d") == default_rules()
    changed = rules("mafand-hau-en", "d", "--max-ratio", "0", "--no-drop-copies")
    assert changed == prepare_data.CLEANING | {"max_ratio": 0, "drop_copies": False}
    own = ("own", "d", "--source", "s", *OWN)
    assert rules(*own, "--max-words", "80") == default_rules(max_words=80)


# Errors -------------------------------------------------------------------------------------------


def own(folder, dest, *more):
    return ["own", dest, "--source", folder, *OWN, *more]


def test_line_counts_that_differ(folder, tmp_path, capsys):
    edit(folder / "valid.en", 8, None)
    error = fail(capsys, *own(folder, tmp_path / "new"))
    assert f"8 in {folder}/valid.xa, 7 in {folder}/valid.en" in error


@pytest.mark.parametrize("line", ["  ", "\u200b"])
def test_empty_line_in_test(folder, tmp_path, capsys, line):
    edit(folder / "test.en", 4, line)
    error = fail(capsys, *own(folder, tmp_path / "new"))
    assert f"{folder}/test.en: line 4 is empty" in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("word", "options"),
    [("<pad>", ["--bpe", "none"]), ("</s>", ["--bpe", "subword-nmt", "--vocab-size", "90"])],
)
def test_words_that_fairseq_would_take_for_its_symbols(folder, tmp_path, capsys, word, options):
    text = (folder / "train.en").read_text()
    (folder / "train.en").write_text(text.replace(" ", f" {word} "))
    assert prepare_data.main([str(w) for w in own(folder, tmp_path / "new", *options)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # after what subword-nmt says
    assert f"error: train.en: {word} in the line " in error and "--bpe sentencepiece" in error
    assert not (tmp_path / "new").exists()


def test_sentencepiece_has_no_symbols_of_fairseqs(tmp_path):
    lines = [f"{word} a{word} {word}b" for word in prepare_data.FAIRSEQ_SYMBOLS] * 50
    lines += [target for _, target in embedded_corpus.generate(300, 1, 1)["train"]]
    segment = prepare_data.train_sentencepiece(lines, 200, tmp_path)
    prepare_data.check_symbols("train.xx", lines, [segment(line) for line in lines])
    with pytest.raises(prepare_data.DataError, match=r"^train.xx: <unk> in the line 'a <unk>'"):
        prepare_data.check_symbols("train.xx", ["a <unk>"], ["a <unk>"])


def test_wrong_encoding(folder, tmp_path, capsys):
    data = (folder / "train.en").read_bytes().splitlines(keepends=True)
    data[1] = b"caf\xe9\n"
    (folder / "train.en").write_bytes(b"".join(data))
    error = fail(capsys, *own(folder, tmp_path / "new"))
    assert (
        f"{folder}/train.en: line 2 is not UTF-8 (byte 0xe9 at offset {len(data[0]) + 3}" in error
    )


@pytest.mark.parametrize(
    "row", ['{"translation": {"en": null}}', '{"translation": {"xx": "a"}}', '{"en', "[" * 100_000]
)
def test_json_without_a_text(row, tmp_path):
    (tmp_path / "dev.json").write_text(f'{{"translation": {{"en": "a"}}}}\n{row}\n')
    with pytest.raises(prepare_data.DataError, match=r"dev\.json: line 2 is not JSON of a transl"):
        prepare_data.read_lines(str(tmp_path / "dev.json"), "en")


def test_truncated_gzip(folder, tmp_path, capsys):
    data = gzip.compress((folder / "train.en").read_bytes())
    (folder / "train.en").unlink()
    (folder / "train.en.gz").write_bytes(data[:-20])
    error = fail(capsys, *own(folder, tmp_path / "new"))
    assert f"{folder}/train.en.gz is not a whole gzip file" in error


def test_missing_file(folder, tmp_path, capsys):
    (folder / "valid.en").unlink()
    error = fail(capsys, *own(folder, tmp_path / "new"))
    assert f"{folder} has neither valid.en nor valid.en.gz" in error


def test_file_in_two_forms(folder, tmp_path, capsys):
    (folder / "valid.en.gz").write_bytes(gzip.compress(b"x\n"))
    assert "has both valid.en and valid.en.gz" in fail(capsys, *own(folder, tmp_path / "new"))


def test_empty_file(folder, tmp_path, capsys):
    for lang in ("xa", "en"):
        (folder / f"test.{lang}").write_text("")
    assert "test.xa has no lines" in fail(capsys, *own(folder, tmp_path / "new"))


@pytest.mark.parametrize(("size", "advice"), [(4000, "allows at most"), (10, "alone need")])
def test_vocabulary_size_that_does_not_suit(folder, tmp_path, capsys, size, advice):
    error = fail(capsys, *own(folder, tmp_path / "new", "--vocab-size", size))
    assert re.search(rf"--vocab-size {size} does not suit: .* {advice} \d+", error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]  # no scratch left


def test_vocabulary_of_characters_alone(folder, tmp_path, capsys):
    words = own(folder, tmp_path / "new", "--bpe", "subword-nmt", "--vocab-size", "5")
    assert prepare_data.main([str(word) for word in words]) == 2
    error = capsys.readouterr().err  # after what subword-nmt says
    assert "error: --vocab-size 5 does not suit: the text has as many characters" in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("package", "module"),
    [("sentencepiece", "sentencepiece"), ("subword-nmt", "subword_nmt.apply_bpe")],
)
def test_a_missing_segmenter(folder, tmp_path, capsys, monkeypatch, package, module):
    monkeypatch.setitem(sys.modules, module, None)  # cannot be imported
    error = fail(capsys, *own(folder, tmp_path / "new", "--bpe", package))
    assert error.endswith(f"; install it: pip install {package}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]  # no scratch left


def test_dest_with_something_in_it(folder, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").write_text("kept")
    assert "is not empty" in fail(capsys, *own(folder, tmp_path / "new"))
    assert "is a file" in fail(capsys, *own(folder, tmp_path / "new" / "mine"))
    # With --force, but failing later: what was there is still in its place.
    (folder / "test.en").unlink()
    fail(capsys, *own(folder, tmp_path / "new", "--force"))
    assert (tmp_path / "new" / "mine").read_text() == "kept"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["multi40k", "d"], "NAME multi40k is none of embedded, multi30k-de-en"),
        (["own", "d", "--source", "s", "--source-lang", "xx"], "own files need --source"),
        (["own", "d", "--source", "nowhere", *OWN], "--source nowhere: no such folder"),
        (["embedded", "d", "--source", "s"], "the embedded corpus is generated"),
        (["embedded", "d", "--source-lang", "de"], "embedded has the languages xa and en"),
        (["multi30k-de-en", "d", "--target-lang", "de"], "give both codes, or neither"),
        (["own", "d", "--source", "s", "--source-lang", "a-b", "--target-lang", "c"], "'a-b'"),
        (["own", "d", "--source", "s", "--source-lang", "a", "--target-lang", "a"], "both a"),
        (["embedded", "d", "--vocab-size", "0"], "--vocab-size 0 is not allowed: give 1 or more"),
        (["embedded", "d", "--max-ratio", "nan"], "--max-ratio nan is not allowed: give 0"),
        (["embedded", "d", "--bpe", "none", "--vocab-size", "9"], "no meaning with --bpe none"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in fail(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_more_training_lines_than_there_are(folder, tmp_path, capsys):
    error = fail(capsys, *own(folder, tmp_path / "new", "--train-lines", 121))
    assert "--train-lines 121: cleaning keeps 120 lines" in error

#!/usr/bin/env python3
"""Prepares a parallel corpus for fairseq: fetch, check, clean, segment into subwords, binarise.

    python scripts/prepare_data.py embedded data/embedded
    python scripts/prepare_data.py multi30k-de-en data/multi30k-de-en
    python scripts/prepare_data.py my-pair data/my-pair --source DIR \\
        --source-lang xx --target-lang en

DEST then holds data-bin (for fairseq-train and fairseq-generate), raw (the text of every split,
so the references too), the subword model and prepare.json (what was done). It is built beside its
final place and renamed at the end. docs/data.md tells more: licences, cleaning, your own pairs.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import http.client
import importlib.metadata
import io
import json
import re
import shlex
import subprocess
import sys
import tempfile
import unicodedata
import urllib.request
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

Pair = tuple[str, str]  # one line: source text, target text
Corpus = dict[str, list[Pair]]  # split -> its lines

DEFAULT_VOCAB_SIZE = 4000
REMOVE_BPE = {  # options of fairseq-generate
    "sentencepiece": " --remove-bpe sentencepiece",
    "subword-nmt": " --remove-bpe",
    "none": "",
}
FAIRSEQ_SYMBOLS = {"<s>", "<pad>", "</s>", "<unk>"}
# Rules that remove lines from the training set, and their values for the noisy data sets. All are
# off (0 or False) for any other data unless its user asks for them.
CLEANING = {
    "drop_repeats": True,
    "drop_copies": True,
    "drop_overlap": True,
    "max_ratio": 3.0,
    "max_words": 100,
}


class DataError(Exception):
    """A fault in the input or in the arguments; the message tells a person what to do."""


class Dataset(NamedTuple):
    """A corpus known by name: where its files lie and whether it needs cleaning."""

    languages: Pair
    url: str  # of one file, with the fields {split} (the name there) and {lang}
    splits: dict[str, str]  # our name of a split -> its name at the address
    noisy: bool
    vocab_size: int = DEFAULT_VOCAB_SIZE


MULTI30K_URL = (
    "https://raw.githubusercontent.com/multi30k/dataset/"
    "a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw/{split}.{lang}.gz"
)
MULTI30K_TESTS = {"test": "test_2016_flickr", "test_2017_flickr": "test_2017_flickr"}
MULTI30K_SPLITS = {"train": "train", "valid": "val"} | MULTI30K_TESTS
MAFAND_URL = (
    "https://raw.githubusercontent.com/masakhane-io/lafand-mt/"
    "d441f8b063d63e95eafb72e84317359e27abf95e/data/json_files/en-%s/{split}.json"
)
MAFAND_SPLITS = {"train": "train", "valid": "dev", "test": "test"}
DATASETS = {
    "embedded": Dataset(("xa", "en"), "", {}, noisy=False, vocab_size=1000),
    "multi30k-de-en": Dataset(("de", "en"), MULTI30K_URL, MULTI30K_SPLITS, noisy=False),
}
for _lang in ("hau", "ibo", "yor", "lug"):
    DATASETS[f"mafand-{_lang}-en"] = Dataset(
        (_lang, "en"), MAFAND_URL % _lang, MAFAND_SPLITS, noisy=True
    )
# SHA-256 of each text after white-space normalisation, a line feed after every line.
CHECKSUM_TABLE = """
550c2612c7ae45ed46754e67c3011fde500b1bf88592a376e2ed6126903766f7 multi30k-de-en/train.de
f7cb7c7d411f6039a15de94de8c4d1709fada7b7474791598fd18451ec62427d multi30k-de-en/train.en
c02c1d05fb89dba12b00503a2744b1105d45fef287501fd701b4fea5b1fca3e5 multi30k-de-en/valid.de
1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227 multi30k-de-en/valid.en
4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16 multi30k-de-en/test.de
399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182 multi30k-de-en/test.en
0ae2c070897390d162c867271596ca6d6c9bc4fdcf6bb153621eb46eb19a027b multi30k-de-en/test_2017_flickr.de
89f1090381c6663a596cb69df930ed331b1f3869a0863774ab9471748ab29f45 multi30k-de-en/test_2017_flickr.en
4177d2b2807b7707e9ec155eec94ac10f65821b22da54fc73990c159752fce6c mafand-hau-en/train.hau
fdbbcbcf26dd42f082672b76416a1a8a1e7aa82ce2f1c79ecad759f922002d2c mafand-hau-en/train.en
62afaee1d1f955289089f909f5f4c5e806ab346eb8b2927d8e8b0894d157c5e5 mafand-hau-en/valid.hau
6dcc2b92a9aa7c06fbd69a6f925f9717516f5f8bb93a48738b0322f06797b6ee mafand-hau-en/valid.en
e1f71b7790cbe0360d7b551d422e9df0757cb5effe9f22c8d50481db665ef81c mafand-hau-en/test.hau
c824cb0a241e903f4e783b0cc88c1396e63c152e9c802e1da959589730779ead mafand-hau-en/test.en
7aa7864de24bc9434d826c1b934f0347f036fc7345c4b745ea55a2e6fe4ae393 mafand-ibo-en/train.ibo
089227da73f718e2af58fd090226b0e9ed95b0d540a975ac42d79973e7b450d5 mafand-ibo-en/train.en
8f8e8abf461d8a4bd02dea14f4af4886b44f56ab316b2d170ee98b10ed18e912 mafand-ibo-en/valid.ibo
99510f60b4d13d8e8cd0eb762a323ab641bc604d96f545b89ec5de02821e6548 mafand-ibo-en/valid.en
d90aeb7e455a9045e1db61ccf929fd75a42a514ebbc569b0fc110ab214f94beb mafand-ibo-en/test.ibo
456746a8a4e9edfa816735e7829b14d64d5cd645fce2046738c12a3462d69936 mafand-ibo-en/test.en
ba3ec6900bdc4c22536649470f4b8a6d968b8907ba264b14c9dbbb749dd42c98 mafand-yor-en/train.yor
2f0f1a4fbc85a1c8c0eecfd53b251ea017dc3563fd4163a6122280141d1d51d7 mafand-yor-en/train.en
daba8dc557860a498d907c1e80acc53a312a3c4db51dac5a99fb9d7742448f40 mafand-yor-en/valid.yor
cca844e0ff24ec194bc26bb4516829958d5ca107e1be37e10bd5427e7a04297e mafand-yor-en/valid.en
4afdb8b53e51847cd1d5589abc7e89de3dd5efa3d538f7dd8b6e80b85ff93730 mafand-yor-en/test.yor
14450871324f84a06d555c24ce443255eae7d17cf573c24b7a371b2e6b7815ff mafand-yor-en/test.en
dae32bd2ad0ea02ff8de3151c2691a427af7536bd3d2263c010f60cdadf428a2 mafand-lug-en/train.lug
29ef5c330aa3d107a39ff0d35bf44d67fcf1a6511aee58063e534aa01bad2b0d mafand-lug-en/train.en
285077d0bd77412c0df988615674d135846198ba4eb83855676e4558e4668164 mafand-lug-en/valid.lug
5019b2b4be740fa8e7e130850530b36ee96f13f9fbc433508e94fd185932d36f mafand-lug-en/valid.en
a709e291d07fd52f6367804f9eeeadfca94ae9d84258ad2c556ed8b2d3591808 mafand-lug-en/test.lug
30059653d2d3d84ab2b43d12529793fbc11954582d6c13b516f3d7ca0d7f870a mafand-lug-en/test.en
"""
CHECKSUMS = {row.split()[1]: row.split()[0] for row in CHECKSUM_TABLE.strip().splitlines()}


def get(location: str) -> bytes:
    """The bytes of a file or of an address."""
    try:
        if "://" in location:
            with urllib.request.urlopen(location, timeout=60) as response:
                return response.read()
        return Path(location).read_bytes()
    except (OSError, http.client.HTTPException) as error:
        advice = "; without a network, give a folder as --source" if "://" in location else ""
        raise DataError(f"cannot read {location}: {error}{advice}") from error


def decode(data: bytes, location: str) -> str:
    """Unpacks a .gz file and decodes UTF-8; an invalid byte is an error that tells its line."""
    if location.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{location} is not a whole gzip file: {error}") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{location}: line {line} is not UTF-8 (byte 0x{data[error.start]:02x} at offset "
            f"{error.start} of the text); convert the file, for example with iconv -t UTF-8"
        ) from error


def read_lines(location: str, lang: str) -> list[str]:
    """The lines of a text file, or of JSON lines {"translation": {lang: text}}.

    Runs of white space (non-breaking spaces too) become one space; byte order marks go.
    """
    lines = decode(get(location), location).split("\n")
    if not lines[-1].strip():
        lines.pop()
    if location.endswith(".json"):
        for number, line in enumerate(lines, 1):
            try:
                text = json.loads(line)["translation"][lang]
                if not isinstance(text, str):
                    raise TypeError(f"{lang} is {text!r}, not a text")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DataError(
                    f"{location}: line {number} is not JSON of a translation: {error!r}"
                ) from error
            lines[number - 1] = text
    return [" ".join(line.replace("\ufeff", "").split()) for line in lines]


def words(line: str) -> list[str]:
    """Its words; what shows nothing, such as a zero-width space alone, is none."""
    return [w for w in line.split() if any(unicodedata.category(c) not in ("Cf", "Cc") for c in w)]


def encode(lines: list[str]) -> bytes:
    """The lines as a UTF-8 file."""
    return "".join(f"{line}\n" for line in lines).encode("utf-8")


def locate(source: str, split: str, lang: str) -> str:
    """The file <split>.<lang>[.gz] in a folder; at an address it is always the .gz file."""
    name = f"{split}.{lang}"
    if "://" in source:
        return f"{source.rstrip('/')}/{name}.gz"
    found = [path for path in (Path(source, name), Path(source, f"{name}.gz")) if path.is_file()]
    if not found:
        raise DataError(f"{source} has neither {name} nor {name}.gz")
    if len(found) == 2:
        raise DataError(f"{source} has both {name} and {name}.gz: remove one of them")
    return str(found[0])


def read_corpus(name: str, source: str | None, langs: Pair) -> Corpus:
    """All splits, checked: checksums of a known data set, line counts, empty lines."""
    known = DATASETS.get(name)
    if name == "embedded":
        from fairseq_autosize import embedded_corpus

        order = 1 if langs == known.languages else -1
        generated = embedded_corpus.generate()
        return {split: [pair[::order] for pair in pairs] for split, pairs in generated.items()}
    if source and "://" not in source:
        folder = Path(source, name) if Path(source, name).is_dir() else Path(source)
        if not folder.is_dir():
            raise DataError(f"--source {source}: no such folder")
        source = str(folder)
    splits = list(known.splits) if known else ["train", "valid", "test"]
    if not known and "://" not in source:  # further test sets: test*.<lang>[.gz]
        pattern = re.compile(rf"(test[\w.-]+)\.(?:{langs[0]}|{langs[1]})(?:\.gz)?")
        matches = [pattern.fullmatch(path.name) for path in Path(source).iterdir()]
        splits += sorted({match[1] for match in matches if match})
    corpus: Corpus = {}
    for split in splits:
        if source:
            locations = [locate(source, split, lang) for lang in langs]
        else:
            upstream = known.splits[split]
            locations = [known.url.format(split=upstream, lang=lang) for lang in langs]
        sides = [read_lines(*item) for item in zip(locations, langs, strict=True)]
        if len(sides[0]) != len(sides[1]):
            both = (f"{len(lines)} in {file}" for file, lines in zip(locations, sides, strict=True))
            raise DataError(f"line counts differ: {', '.join(both)}")
        for lang, location, lines in zip(langs, locations, sides, strict=True):
            if not lines:
                raise DataError(f"{location} has no lines")
            empty = (number for number, line in enumerate(lines, 1) if not words(line))
            if split != "train" and (number := next(empty, None)):
                raise DataError(
                    f"{location}: line {number} is empty; valid and test sets are never altered "
                    "here: remove the pair from both files yourself"
                )
            found = hashlib.sha256(encode(lines)).hexdigest()
            if known and found != CHECKSUMS[f"{name}/{split}.{lang}"]:
                raise DataError(
                    f"{location}: the text is not that of {name} (its SHA-256 is {found}); "
                    "if it is meant to differ, choose another NAME"
                )
        corpus[split] = list(zip(*sides, strict=True))
    return corpus


def clean(corpus: Corpus, rules: dict[str, float]) -> tuple[list[Pair], dict[str, int]]:
    """The training lines that break no rule, and how many were dropped under the first broken."""
    held_out = [pair for split, pairs in corpus.items() if split != "train" for pair in pairs]
    sources, targets = {source for source, _ in held_out}, {target for _, target in held_out}
    dropped = {"empty": 0, **{rule: 0 for rule, value in rules.items() if value}}
    seen: set[Pair] = set()
    kept: list[Pair] = []
    for pair in corpus["train"]:
        short, long = sorted(len(words(side)) for side in pair)
        faults = {
            "empty": short == 0,
            "drop_repeats": pair in seen,
            "drop_copies": pair[0] == pair[1],
            "max_ratio": long > rules["max_ratio"] * short,
            "max_words": long > rules["max_words"],
            "drop_overlap": pair[0] in sources or pair[1] in targets,
        }
        fault = next((rule for rule in dropped if faults[rule]), None)
        if fault is None:
            kept.append(pair)
        else:
            dropped[fault] += 1
        seen.add(pair)
    return kept, dropped


def train_sentencepiece(lines: list[str], size: int, folder: Path) -> Callable[[str], str]:
    """Trains folder/spm.model and returns the function that segments a line."""
    import sentencepiece

    model = io.BytesIO()  # written without its path in it: the same bytes everywhere
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            character_coverage=1.0,
            max_sentence_length=1 << 20,  # bytes; the default skips long lines without a word
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        advice = str(error)
        if found := re.search(r"too high .*<= (\d+)", advice):
            advice = f"this training set allows at most {found[1]}"
        elif found := re.search(r"required_chars\. \d+ vs (\d+)", advice):
            advice = f"the characters of this training set alone need {found[1]}"
        raise DataError(f"--vocab-size {size} does not suit: {advice}") from error
    (folder / "spm.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return lambda line: " ".join(processor.encode(line, out_type=str))


def train_subword_nmt(lines: list[str], size: int, folder: Path) -> Callable[[str], str]:
    """Learns folder/bpe.codes and returns the function that segments a line."""
    from subword_nmt.apply_bpe import BPE
    from subword_nmt.learn_bpe import learn_bpe

    codes = folder / "bpe.codes"
    with codes.open("w", encoding="utf-8") as file:
        learn_bpe(lines, file, size, total_symbols=True)
    if len(codes.read_text(encoding="utf-8").splitlines()) < 2:  # a version, then the merges
        told = "the text has as many characters; give more"
        raise DataError(f"--vocab-size {size} does not suit: {told}")
    with codes.open(encoding="utf-8") as file:
        return BPE(file).process_line


SEGMENTERS = {
    "sentencepiece": train_sentencepiece,
    "subword-nmt": train_subword_nmt,
    "none": lambda lines, size, folder: str,
}


def check_symbols(name: str, lines: list[str], segmented: list[str]) -> None:
    """Refuses a text whose segments fairseq would read as its own symbols, such as <pad>."""
    for line, segments in zip(lines, segmented, strict=True):
        if found := FAIRSEQ_SYMBOLS.intersection(segments.split()):
            raise DataError(
                f"{name}: {sorted(found)[0]} in the line {line[:200]!r} would be fairseq's own "
                "symbol; write it otherwise, as in < s >, or choose --bpe sentencepiece"
            )


def binarise(text: Path, destination: Path, tests: list[str], langs: Pair) -> None:
    """Runs fairseq-preprocess on a folder of segmented text, one dictionary for both sides."""
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--joined-dictionary"]
    command += ["--source-lang", langs[0], "--target-lang", langs[1], "--workers", "1"]
    # By their names alone: fairseq takes a comma in a folder's name for the end of a path.
    command += ["--trainpref", "train", "--validpref", "valid", "--testpref", ",".join(tests)]
    command += ["--destdir", str(destination)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=text)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"fairseq-preprocess failed: {last}")


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    installed = {found.name: found.version for found in importlib.metadata.distributions()}
    return {name: installed[name] for name in packages if name in installed}


def prepare(args: argparse.Namespace) -> None:
    """Does the whole work; raises DataError with DEST untouched."""
    dest = Path(args.dest).absolute()
    if dest.exists() and not dest.is_dir():
        raise DataError(f"DEST {args.dest} is a file")
    if dest.is_dir() and any(dest.iterdir()) and not args.force:
        raise DataError(f"DEST {args.dest} is not empty: choose another, or move it with --force")
    langs: Pair = (args.source_lang, args.target_lang)
    corpus = read_corpus(args.name, args.source, langs)
    tests = [split for split in corpus if split.startswith("test")]
    rules = {rule: getattr(args, rule) for rule in CLEANING}
    record = {"name": args.name, "languages": langs, "command": shlex.join(args.argv)}
    record |= {"source": args.source, "cleaning": rules, "train_lines_read": len(corpus["train"])}
    kept, record["dropped"] = clean(corpus, rules)
    print(f"{args.name}: {len(corpus['train'])} training lines read")
    for rule, count in record["dropped"].items():
        print(f"  dropped by the rule {rule}: {count}")
    print(f"  kept: {len(kept)}")
    if len(kept) < (args.train_lines or 1):
        raise DataError(f"--train-lines {args.train_lines or 1}: cleaning keeps {len(kept)} lines")
    corpus["train"] = kept[: args.train_lines]
    for split, pairs in corpus.items():
        print(f"{split}: {len(pairs)} lines" + ("" if split == "train" else ", unaltered"))

    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dest.name}.", dir=dest.parent) as scratch:
        built, segmented = Path(scratch, "built"), Path(scratch, "segmented")
        (built / "raw").mkdir(parents=True)
        segmented.mkdir()
        text = [side for sides in zip(*corpus["train"], strict=True) for side in sides]
        segment = SEGMENTERS[args.bpe](text, args.vocab_size, built)
        record |= {"bpe": args.bpe, "vocab_size": args.vocab_size}
        record |= {"lines": {split: len(pairs) for split, pairs in corpus.items()}, "sha256": {}}
        for split, pairs in corpus.items():
            for lang, lines in zip(langs, map(list, zip(*pairs, strict=True)), strict=True):
                name = f"{split}.{lang}"
                record["sha256"][name] = hashlib.sha256(encode(lines)).hexdigest()
                (built / "raw" / name).write_bytes(encode(lines))
                segments = [segment(line) for line in lines]
                check_symbols(name, lines, segments)
                (segmented / name).write_bytes(encode(segments))
        binarise(segmented, built / "data-bin", tests, langs)
        record["gen_subsets"] = {f"test{i or ''}": test for i, test in enumerate(tests)}
        packages = ("fairseq", "fairseq-fixed", "sentencepiece", "subword-nmt", "torch")
        record["versions"] = installed_versions(packages)
        record["versions"]["python"] = sys.version.split()[0]
        (built / "prepare.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
        if dest.exists() and any(dest.iterdir()):  # never deleted: it may hold the user's work
            number = 1
            while (old := dest.with_name(f"{dest.name}.old-{number}")).exists():
                number += 1
            print(f"what was in {args.dest} is now in {dest.rename(old)}")
        built.rename(dest)
    print_usage(args, record["gen_subsets"])


def print_usage(args: argparse.Namespace, subsets: dict[str, str]) -> None:
    """Prints the options with which fairseq trains on and translates this data."""
    dest = shlex.quote(args.dest.rstrip("/"))
    common = f"{dest}/data-bin --source-lang {args.source_lang} --target-lang {args.target_lang}"
    user_dir = shlex.quote(str(Path(__file__).resolve().parent.parent / "fairseq_autosize"))
    common += f" --user-dir {user_dir} --required-batch-size-multiple 1"
    print(f"\nReady: {args.dest} (what was done: prepare.json). Train and translate with")
    options = "--share-all-embeddings --prox l21 --prox-target-sparsity 0.5 --max-update N"
    print(f"  fairseq-train {common} {options} ...")
    for subset, split in subsets.items():
        options = f"--gen-subset {subset} --beam 5{REMOVE_BPE[args.bpe]}"
        reference = f"{dest}/raw/{split}.{args.target_lang}"
        print(f"  fairseq-generate {common} --path CHECKPOINT {options} > {split}.out")
        print(f"  sed -n 's/^H-//p' {split}.out | sort -n | cut -f3 | sacrebleu {reference}")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Reads the command line, fills in what follows from NAME, refuses what does not fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    text = f"one of {', '.join(DATASETS)}; or any name for your own files"
    add("name", metavar="NAME", help=text)
    add("dest", metavar="DEST", help="folder to make")
    text = "folder of <split>.<lang>[.gz] files, or one that holds it under NAME, or an address "
    add("--source", metavar="DIR_OR_URL", help=text + "of .gz files (default: the public address)")
    add("--source-lang", metavar="CODE", help="language to translate from")
    add("--target-lang", metavar="CODE", help="language to translate into")
    add("--bpe", choices=list(SEGMENTERS), default="sentencepiece", help="%(default)s")
    text = f"joint subwords, learned on train alone (default: {DEFAULT_VOCAB_SIZE}, embedded: 1000)"
    add("--vocab-size", type=int, metavar="N", help=text)
    add("--train-lines", type=int, metavar="N", help="use the first N after cleaning")
    add("--force", action="store_true", help="move what is in DEST to DEST.old-1 (-2, ...)")
    add = parser.add_argument_group("cleaning of the training set (docs/data.md)").add_argument
    add("--drop-repeats", action=switch, help="drop repeated pairs, after the first")
    add("--drop-copies", action=switch, help="drop pairs whose source equals the target")
    add("--drop-overlap", action=switch, help="drop pairs with a side in valid or test")
    text = "highest ratio of the two sides' words (0: no limit)"
    add("--max-ratio", type=float, metavar="R", help=text)
    add("--max-words", type=int, metavar="N", help="most words of a side (0: no limit)")
    args = parser.parse_args(argv)
    args.argv = argv
    for name, least in {"vocab_size": 1, "train_lines": 1, "max_ratio": 0, "max_words": 0}.items():
        if (value := getattr(args, name)) is not None and not value >= least:
            flag = "--" + name.replace("_", "-")
            raise DataError(f"{flag} {value} is not allowed: give {least} or more")
    known = DATASETS.get(args.name)
    if known:
        args.source_lang = args.source_lang or known.languages[0]
        args.target_lang = args.target_lang or known.languages[1]
        if {args.source_lang, args.target_lang} != set(known.languages):
            both = " and ".join(known.languages)
            raise DataError(f"{args.name} has the languages {both}: give both codes, or neither")
    elif not (args.source and args.source_lang and args.target_lang):
        raise DataError(
            f"NAME {args.name} is none of {', '.join(DATASETS)}; "
            "your own files need --source, --source-lang and --target-lang"
        )
    if args.name == "embedded" and args.source:
        raise DataError("--source: the embedded corpus is generated and has none")
    for code in (args.source_lang, args.target_lang):
        if not re.fullmatch(r"\w+", code):
            raise DataError(f"language code {code!r}: use letters, digits and underscores")
    if args.source_lang == args.target_lang:
        raise DataError(f"--source-lang and --target-lang are both {args.source_lang}")
    if args.bpe == "none" and args.vocab_size:
        raise DataError("--vocab-size has no meaning with --bpe none")
    if args.bpe != "none":
        args.vocab_size = args.vocab_size or (known.vocab_size if known else DEFAULT_VOCAB_SIZE)
    for rule, value in CLEANING.items():
        if getattr(args, rule) is None:
            setattr(args, rule, value if known and known.noisy else type(value)(0))
    return args


def main(argv: list[str] | None = None) -> int:
    """Entry point; 0, or 2 after a message on standard error."""
    try:
        prepare(parse_args(sys.argv[1:] if argv is None else argv))
        return 0
    except (DataError, OSError) as error:
        fault = str(error)
    except ModuleNotFoundError as error:  # the two segmenters are imported where they are used
        package = str(error.name).partition(".")[0].replace("_", "-")
        fault = f"{error}; install it: pip install {package}"
    print(f"prepare_data.py: error: {fault}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

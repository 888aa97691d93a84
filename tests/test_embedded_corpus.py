"""The embedded corpus: the same everywhere, learnable from context, with unseen combinations."""

import hashlib
import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_autosize import embedded_corpus
from fairseq_autosize.embedded_corpus import (
    Lexicon,
    Writer,
    attach,
    english_number,
    generate,
    inflect,
    write,
    xa_number,
)

# Of generate(): a change of one byte is a change of every published figure on this corpus.
CORPUS_SHA256 = "c07f7737d1e79fd6d55e2a3174c8966d27ad87cab6fa9bb713c273dfbc6307a3"


@pytest.fixture(scope="module")
def corpus():
    return generate()


@pytest.fixture(scope="module")
def lexicon():
    return Lexicon()


def adjective_noun_pairs(lexicon, combinations):
    """(root, root) combinations as the English word pairs that they surface as."""
    adjectives = {word.root: word for word in lexicon.adjectives}
    nouns = {noun.root: noun for nouns in lexicon.nouns.values() for noun in nouns}
    pairs = set()
    for adjective, root in combinations:
        if adjective in adjectives:
            noun = nouns[root]
            sense = adjectives[adjective].senses[0 if noun.animate else 1].base
            pairs |= {(sense, noun.singular), (sense, noun.plural)}
    return pairs


def bigrams(pairs):
    found = set()
    for _, english in pairs:
        words = english.rstrip(".?").replace("'s", "").replace("'", "").split()
        found |= set(itertools.pairwise(words))
    return found


def test_default_corpus_is_pinned(corpus):
    assert {split: len(pairs) for split, pairs in corpus.items()} == {
        "train": 8000,
        "valid": 500,
        "test": 500,
    }
    assert hashlib.sha256(repr(corpus).encode()).hexdigest() == CORPUS_SHA256


def test_module_needs_only_the_standard_library():
    path = importlib.util.find_spec("fairseq_autosize.embedded_corpus").origin
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('alone', {path!r})\n"
        "module = sys.modules['alone'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.generate(1, 0, 0)['train'][0][1])"
    )
    # -S: no site-packages, so that any other import fails.
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == generate(1, 0, 0)["train"][0][1], result.stderr


def test_splits_are_independent_of_the_size_of_train(corpus):
    small = generate(train=100, valid=500, test=500)
    assert small["train"] == corpus["train"][:100]
    assert small["valid"] == corpus["valid"]
    assert small["test"] == corpus["test"]


def test_seed_changes_the_sentences_but_not_the_language(corpus):
    other = generate(train=500, valid=0, test=0, seed=2)["train"]
    assert other != corpus["train"][:500]
    words = {word for source, _ in corpus["train"] for word in source.rstrip(".").split()}
    used = [word for source, _ in other for word in source.rstrip(".").split()]
    assert sum(word in words for word in used) > 0.9 * len(used)


def test_no_sentence_is_repeated_or_shared(corpus):
    for side in (0, 1):
        train = {pair[side] for pair in corpus["train"]}
        for split in ("valid", "test"):
            assert train.isdisjoint(pair[side] for pair in corpus[split])
    for pairs in corpus.values():
        assert len(set(pairs)) == len(pairs)


def test_held_out_combinations_never_occur_in_train(corpus, lexicon):
    held_out = adjective_noun_pairs(lexicon, lexicon.held_out)
    assert not held_out & bigrams(corpus["train"])
    # The others do, so that the check above looks for the right thing.
    nouns = [noun.root for nouns in lexicon.nouns.values() for noun in nouns]
    every = {(word.root, noun) for word in lexicon.adjectives for noun in nouns}
    allowed = adjective_noun_pairs(lexicon, every - lexicon.held_out)
    assert len(allowed & bigrams(corpus["train"])) > 0.3 * len(allowed)
    for split in ("valid", "test"):
        assert len(held_out & bigrams(corpus[split])) > 100


def test_every_held_out_sentence_has_an_unseen_combination(lexicon, corpus):
    writer, expected = Writer(lexicon, 3 * 1 + 2), iter(corpus["test"])
    following, found = next(expected), 0
    while found < 50:
        pair = writer.sentence()
        if pair == following:
            assert writer.combinations & lexicon.held_out
            following, found = next(expected), found + 1
        else:
            assert not writer.combinations & lexicon.held_out


def test_source_decides_the_translation(corpus):
    translations = dict(corpus["train"])
    assert len(translations) == len(corpus["train"])


def test_corpus_has_a_few_thousand_word_forms(corpus):
    words = {word for source, _ in corpus["train"] for word in source.rstrip(".").split()}
    assert 3000 < len(words) < 8000


@pytest.mark.parametrize(
    ("kind", "size"), [("transitive", 4), ("intransitive", 2), ("adjectives", 2)]
)
def test_neither_root_nor_class_tells_the_sense_alone(lexicon, kind, size):
    words = getattr(lexicon, kind)
    for start in range(0, len(words), size):
        square = [[sense.base for sense in word.senses] for word in words[start : start + size]]
        assert all(len(set(row)) == size for row in square)
        assert all(len(set(column)) == size for column in zip(*square, strict=True))
        assert len({sense for row in square for sense in row}) == size


def test_roots_are_unique(lexicon):
    words = lexicon.transitive + lexicon.intransitive + lexicon.ditransitive + lexicon.adjectives
    roots = [word.root for word in words]
    roots += [noun.root for nouns in lexicon.nouns.values() for noun in nouns]
    assert len(set(roots)) == len(roots)


def test_objects_decide_verbs_and_subjects_decide_possessives(corpus):
    """The context that the grammar promises is there: the same form has several translations."""
    english = {
        word: {pair[1] for pair in corpus["train"] if word in pair[0].split()} for word in ("lumo",)
    }
    assert any("yesterday" in sentence for sentence in english["lumo"])
    assert any("tomorrow" in sentence for sentence in english["lumo"])
    assert all("yesterday" in s or "tomorrow" in s for s in english["lumo"])


@pytest.mark.parametrize(
    ("root", "suffixes", "word"),
    [
        ("tadon", ("lAk", "Um"), "tadonlakum"),
        ("semel", ("lAk", "Um"), "semellekim"),
        ("kato", ("Um",), "katoyum"),
        ("kato", ("", "zA", "Um"), "katozayum"),
        ("kepi", ("dA", "k"), "kepidek"),
        ("kato", (), "kato"),
    ],
)
def test_suffixes_follow_vowel_harmony(root, suffixes, word):
    assert attach(root, *suffixes) == word


@pytest.mark.parametrize(
    ("word", "suffix", "result"),
    [
        ("carry", "s", "carries"),
        ("carry", "ed", "carried"),
        ("boy", "s", "boys"),
        ("watch", "s", "watches"),
        ("hate", "ed", "hated"),
        ("fear", "ed", "feared"),
        ("box", "s", "boxes"),
    ],
)
def test_english_inflection(word, suffix, result):
    assert inflect(word, suffix) == result


def test_numbers():
    assert [english_number(n) for n in (2, 20, 35)] == ["two", "twenty", "thirty-five"]
    assert [xa_number(n) for n in (5, 6, 36, 35)] == ["bu", "kodor", "kovash", "budorbu"]
    assert len({xa_number(n) for n in range(1, 100)}) == 99


def test_documented_examples_are_in_the_corpus(corpus):
    page = Path(__file__).parent.parent / "docs" / "data.md"
    blocks = page.read_text(encoding="utf-8").rpartition("```\n")[0].rpartition("```\n")[2]
    examples = [tuple(block.splitlines()[i] for i in (0, -1)) for block in blocks.split("\n\n")]
    assert len(examples) == 3
    assert set(examples) <= set(corpus["train"])


@pytest.mark.parametrize("argument", ["train", "valid", "test", "seed"])
def test_negative_arguments_are_refused(argument):
    with pytest.raises(ValueError, match=f"{argument} must be 0 or more, not -1"):
        generate(**{argument: -1})


def test_write_makes_utf8_files_and_keeps_what_differs(tmp_path):
    write(tmp_path / "new", 30, 5, 5)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(
        f"{split}.{lang}" for split in ("train", "valid", "test") for lang in ("xa", "en")
    )
    expected = generate(30, 5, 5)["train"]
    for side, lang in enumerate(embedded_corpus.LANGUAGES):
        lines = (tmp_path / "new" / f"train.{lang}").read_text(encoding="utf-8").splitlines()
        assert lines == [pair[side] for pair in expected]
    write(tmp_path / "new", 30, 5, 5)  # the same again is no conflict

    (tmp_path / "new" / "train.xa").unlink()
    (tmp_path / "new" / "test.en").write_text("mine\n")
    with pytest.raises(FileExistsError, match=r"test\.en exists with other content"):
        write(tmp_path / "new", 30, 5, 5)
    assert not (tmp_path / "new" / "train.xa").exists()  # none is written
    assert (tmp_path / "new" / "test.en").read_text() == "mine\n"
    write(tmp_path / "new", 40, 5, 5, force=True)
    assert len((tmp_path / "new" / "train.xa").read_text().splitlines()) == 40

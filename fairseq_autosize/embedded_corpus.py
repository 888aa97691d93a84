"""A small parallel corpus that needs no download: an invented language (xa) and English (en).

Every pair is drawn from one grammar, so that a demo or a test can train a real translation model
anywhere. xa is agglutinative and verb-final, with vowel harmony, seven cases, possessive suffixes,
subject agreement, prenominal relative clauses and base-six numerals. Translating it into English
needs reordering and context: a verb's sense depends on its root and on the kind of its object, an
adjective's on its noun, "yesterday" and "tomorrow" are one word, and a third person's possessive
takes the gender of the subject. docs/data.md describes the grammar with examples.

The text depends on the arguments alone: only `random.Random.random` is drawn from, whose values
do not change between Python versions. The language is the same for every seed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

LANGUAGES = ("xa", "en")  # source, target

Pair = tuple[str, str]
T = TypeVar("T")

# English words, irregular forms in full: singular[:plural], base[:past:participle]; a place is
# preceded by its preposition.
NOUNS = {
    "man": "man:men king boy uncle brother farmer sailor monk prince shepherd blacksmith wizard",
    "woman": "woman:women queen girl aunt sister nurse princess witch nun duchess widow actress",
    "person": "child:children teacher judge doctor thief:thieves student",
    "animal": "dog cat horse cow wolf:wolves mouse:mice goose:geese sheep:sheep ox:oxen bear fox "
    "eagle owl snake calf:calves fish:fish",
    "food": "apple loaf:loaves onion egg cake potato:potatoes cherry nut melon carrot pie orange",
    "thing": "knife:knives book axe rope lamp box table mirror ring letter basket boat key sword "
    "brush shelf:shelves",
    "place": "in:forest in:village in:garden in:city at:market at:harbour at:inn on:hill on:island "
    "on:beach near:river near:church under:tree behind:wall",
}
# Consecutive verbs share their roots, four by four: see Lexicon.
TRANSITIVE = (
    "see:saw:seen find:found take:took:taken buy:bought hide:hid:hidden watch carry "
    "paint choose:chose:chosen lose:lost forget:forgot:forgotten remember like want need "
    "follow hold:held catch:caught steal:stole:stolen wash bring:brought "
    "hear:heard fear praise"
)
INTRANSITIVE = (
    "sleep:slept run:ran:run sing:sang:sung wait swim:swam:swum fall:fell:fallen cry dance"
)
DITRANSITIVE = "give:gave:given show:showed:shown send:sent lend:lent"
ADJECTIVES = (
    "big small old young strong heavy happy bright dirty dark quick new poor cheap loud famous "
    "beautiful strange red white"
)
CONNECTIVES = ("because", "when", "although", "if")
PRONOUNS = {"1s": "I", "2s": "you", "1p": "we", "2p": "you", "3p": "they"}
POSSESSIVES = {"1s": "my", "2s": "your", "1p": "our", "2p": "your", "3p": "their"}
TENSES = ("present", "past", "future", "perfect")
UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
TIMES = {  # adverb of xa -> tense -> English
    "lumo": {"past": "yesterday", "future": "tomorrow"},
    "tesi": {"past": "today", "future": "today", "perfect": "today"},
    "vorun": {"present": "every day", "perfect": "for a long time", "past": "long ago"},
}
MAX_NUMBER = 99

# Suffixes of xa. A stands for a or e, U for u or i, after the vowels of the root (harmony).
PLURAL = "lAk"
DEFINITE = "sU"
CASES = {
    "nom": "",
    "acc": "Um",
    "gen": "jAn",
    "dat": "gA",
    "loc": "tAs",
    "ins": "bUl",
    "com": "vAr",
}
OWNERS = {"1s": "nA", "2s": "kU", "3": "zA", "1p": "nAmU", "2p": "kUmU", "3p": "zAmU"}
AGREEMENT = {"1s": "n", "2s": "k", "3s": "", "1p": "nAm", "2p": "kAm", "3p": "rA"}
TENSE_SUFFIX = {"present": "U", "past": "dA", "future": "shU", "perfect": "mAv"}
NEGATION = "pA"
QUESTION = "hU"
PARTICIPLE = "lUn"
CONNECTIVE_SUFFIX = dict(zip(CONNECTIVES, ("rUk", "tUl", "sAm", "vUn"), strict=True))
DIGITS = ("", "ko", "mi", "ta", "ze", "bu")  # base six, most significant first
POWERS = ("", "dor", "vash")  # after a digit: six times, thirty-six times

LANGUAGE_SEED = 20190503  # of the roots and of the held-out combinations
HELD_OUT_SHARE = 0.12  # of the adjective-noun and verb-object combinations


@dataclass(frozen=True)
class Noun:
    """A noun: its root in xa, its two English forms, and its kind (a key of NOUNS)."""

    root: str
    singular: str
    plural: str
    kind: str
    preposition: str = ""  # of places

    @property
    def animate(self) -> bool:
        return self.kind in ("man", "woman", "person", "animal")

    @property
    def object_class(self) -> int:
        """What decides the sense of a verb: person 0, animal 1, food 2, thing 3."""
        return {"animal": 1, "food": 2, "thing": 3}.get(self.kind, 0)


@dataclass(frozen=True)
class Sense:
    """One English word behind a root; past and participle for verbs only."""

    base: str
    past: str = ""
    participle: str = ""


@dataclass(frozen=True)
class Word:
    """A verb or an adjective of xa: its root and its senses, indexed by the class that decides."""

    root: str
    senses: tuple[Sense, ...]


@dataclass
class Phrase:
    """A noun phrase. At most one of `owner` (a person, or "3": the subject's) and `lord` is set."""

    noun: Noun
    plural: bool = False
    definite: bool = True
    number: int = 0
    adjective: Word | None = None
    owner: str = ""
    lord: Phrase | None = None
    relative: Relative | None = None

    @property
    def many(self) -> bool:
        return self.plural or self.number > 1


@dataclass
class Relative:
    """A relative clause: the head is the subject of `verb` unless `inverted`."""

    verb: Word
    tense: str
    other: Phrase
    inverted: bool


@dataclass
class Clause:
    """A clause. The subject is a person ("1s" ...) or one or two noun phrases."""

    subject: str | list[Phrase]
    verb: Word
    sense: Sense
    tense: str
    negative: bool = False
    object: Phrase | None = None
    recipient: Phrase | None = None
    instrument: Phrase | None = None
    companion: Phrase | None = None
    place: Phrase | None = None
    time: str = ""  # a key of TIMES

    @property
    def agreement(self) -> str:
        if isinstance(self.subject, str):
            return self.subject
        return "3p" if len(self.subject) > 1 or self.subject[0].many else "3s"


def pick(rng: random.Random, items: Sequence[T], skew: float = 1.0) -> T:
    """One item; skew > 1 prefers the first ones."""
    return items[int(len(items) * rng.random() ** skew)]


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    """A permutation that depends on `rng.random` alone."""
    keys = [rng.random() for _ in items]
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]


def inflect(word: str, suffix: str) -> str:
    """Adds English -s or -ed by the regular spelling rules."""
    if word.endswith("y") and word[-2] not in "aeiou":
        word = word[:-1] + "ie"
    elif suffix == "s" and word.endswith(("s", "x", "z", "ch", "sh")):
        word += "e"
    return word[:-1] + suffix if suffix == "ed" and word.endswith("e") else word + suffix


def attach(root: str, *suffixes: str) -> str:
    """Adds suffixes of xa: their A and U follow the last vowel of the root; y parts two vowels."""
    front = next(letter for letter in reversed(root) if letter in "aouei") in "ei"
    word = root
    for suffix in suffixes:
        suffix = suffix.replace("A", "e" if front else "a").replace("U", "i" if front else "u")
        gap = "y" if suffix and suffix[0] in "aouei" and word[-1] in "aouei" else ""
        word += gap + suffix
    return word


def english_number(number: int) -> str:
    """The number in words, 0 to 99."""
    if number < 20:
        return UNITS[number]
    tens, units = TENS[number // 10 - 2], number % 10
    return f"{tens}-{UNITS[units]}" if units else tens


def xa_number(number: int) -> str:
    """The number in base six as one word, 1 to 215; absent powers are left out."""
    digits = (number // 36, number // 6 % 6, number % 6)
    parts = zip(digits, reversed(POWERS), strict=True)
    return "".join(DIGITS[digit] + power for digit, power in parts if digit)


class Lexicon:
    """The words of the language and the combinations kept out of training; always the same.

    A verb root has four senses, chosen by the class of its object, and four roots share four
    senses in a Latin square: neither the root nor the class tells anything about the sense alone.
    Adjectives (animate or not) and intransitive verbs (animal or not) do the same in twos.
    """

    def __init__(self) -> None:
        rng = random.Random(LANGUAGE_SEED)
        self._roots = set(TIMES)
        self.nouns: dict[str, list[Noun]] = {}
        for kind, words in NOUNS.items():
            self.nouns[kind] = [self._noun(rng, word, kind) for word in words.split()]
        self.transitive = self._words(rng, TRANSITIVE, 4)
        self.intransitive = self._words(rng, INTRANSITIVE, 2)
        self.ditransitive = self._words(rng, DITRANSITIVE, 1)
        self.adjectives = self._words(rng, ADJECTIVES, 2)
        everything = [noun for nouns in self.nouns.values() for noun in nouns]
        self.held_out = {
            (word.root, noun.root)
            for word in self.transitive + self.adjectives
            for noun in everything
            if rng.random() < HELD_OUT_SHARE
        }

    def _root(self, rng: random.Random) -> str:
        while True:
            vowels = pick(rng, ("aou", "ei"))
            syllables = [pick(rng, "ptkbdgmnslrhvjz") + pick(rng, vowels) for _ in range(2)]
            root = "".join(syllables) + pick(rng, ("", "", "n", "l", "r", "s", "t", "m"))
            if root not in self._roots:
                self._roots.add(root)
                return root

    def _noun(self, rng: random.Random, word: str, kind: str) -> Noun:
        preposition, word = word.split(":", 1) if kind == "place" else ("", word)
        singular, _, plural = word.partition(":")
        return Noun(self._root(rng), singular, plural or inflect(singular, "s"), kind, preposition)

    def _words(self, rng: random.Random, words: str, size: int) -> list[Word]:
        senses = []
        for word in words.split():
            base, past, participle = [*word.split(":"), "", ""][:3]
            past = past or inflect(base, "ed")
            senses.append(Sense(base, past, participle or past))
        groups = [senses[start : start + size] for start in range(0, len(senses), size)]
        return [
            Word(self._root(rng), tuple(group[(i + j) % size] for j in range(size)))
            for group in groups
            for i in range(size)
        ]


class Writer:
    """Draws sentences and writes them in both languages; `combinations` collects what was used."""

    def __init__(self, lexicon: Lexicon, seed: int) -> None:
        self.lexicon = lexicon
        self.rng = random.Random(seed)
        self.combinations: set[tuple[str, str]] = set()

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    # Drawing ------------------------------------------------------------------------------------

    def noun(self, *kinds: str) -> Noun:
        return pick(self.rng, self.lexicon.nouns[pick(self.rng, kinds)], skew=1.3)

    def phrase(self, noun: Noun, depth: int = 0, reflexive: bool = False) -> Phrase:
        """A phrase around the noun; `reflexive` allows the owner to be a third-person subject."""
        phrase = Phrase(noun, plural=self.chance(0.3), definite=self.chance(0.7))
        if self.chance(0.08):
            phrase.number = 2 + int((MAX_NUMBER - 1) * self.rng.random() ** 2)
            phrase.plural = False
        if self.chance(0.35):
            phrase.adjective = pick(self.rng, self.lexicon.adjectives, skew=1.3)
            self.combinations.add((phrase.adjective.root, noun.root))
        if noun.kind != "place" and depth == 0:
            kind = self.rng.random()
            if kind < 0.12:
                phrase.owner = pick(self.rng, tuple(POSSESSIVES))
            elif kind < 0.26 and reflexive:
                phrase.owner = "3"
            elif kind < 0.34:
                lord = self.noun("man", "woman", "person", "animal")
                phrase.lord = self.phrase(lord, depth=1)
            elif kind < 0.42 and noun.animate:
                phrase.relative = self.relative(noun)
        return phrase

    def relative(self, head: Noun) -> Relative:
        inverted = self.chance(0.4)
        other = self.noun("man", "woman", "animal", *(() if inverted else ("food", "thing")))
        verb = pick(self.rng, self.lexicon.transitive, skew=1.3)
        self.combinations.add((verb.root, (head if inverted else other).root))
        return Relative(
            verb, pick(self.rng, ("present", "past")), self.phrase(other, depth=1), inverted
        )

    def clause(self) -> Clause:
        lexicon, rng = self.lexicon, self.rng
        tense = pick(rng, TENSES)
        subject: str | list[Phrase]
        if self.chance(0.2):
            subject = pick(rng, tuple(PRONOUNS))
        else:
            subject = [self.phrase(self.noun("man", "woman", "person", "animal"))]
            if self.chance(0.1) and not subject[0].many:
                other = Phrase(self.noun("man", "woman", "person"))
                subject = [other, Phrase(subject[0].noun)]
        reflexive = not isinstance(subject, str)
        kind = rng.random()
        if kind < 0.2:
            verb = pick(rng, lexicon.intransitive)
            animal = reflexive and subject[-1].noun.kind == "animal"
            clause = Clause(subject, verb, verb.senses[animal], tense)
        elif kind < 0.35:
            verb = pick(rng, lexicon.ditransitive)
            clause = Clause(subject, verb, verb.senses[0], tense)
            clause.object = self.phrase(self.noun("animal", "food", "thing"), reflexive=reflexive)
            clause.recipient = self.phrase(self.noun("man", "woman", "person"), depth=1)
        else:
            verb = pick(rng, lexicon.transitive, skew=1.3)
            noun = self.noun("man", "woman", "person", "animal", "food", "food", "thing", "thing")
            clause = Clause(subject, verb, verb.senses[noun.object_class], tense)
            clause.object = self.phrase(noun, reflexive=reflexive)
            self.combinations.add((verb.root, noun.root))
            if self.chance(0.12):
                clause.instrument = self.phrase(self.noun("thing"), depth=1)
        clause.negative = self.chance(0.15)
        if clause.agreement == "3s" and not clause.instrument and self.chance(0.12):
            clause.companion = Phrase(self.noun("man", "woman", "person", "animal"))
        if self.chance(0.25):
            clause.place = self.phrase(self.noun("place"))
        times = [adverb for adverb, meanings in TIMES.items() if tense in meanings]
        if self.chance(0.3):
            clause.time = pick(rng, times)
        return clause

    def sentence(self) -> Pair:
        """One sentence in xa and in English."""
        self.combinations.clear()
        clause = self.clause()
        if self.chance(0.1):
            connective, reason = pick(self.rng, CONNECTIVES), self.clause()
            first = self.xa_clause(reason, CONNECTIVE_SUFFIX[connective])
            source = f"{first}, {self.xa_clause(clause)}."
            return source, f"{english_clause(clause)} {connective} {english_clause(reason)}."
        if self.chance(0.12):
            return f"{self.xa_clause(clause, QUESTION)}.", f"{english_clause(clause, True)}?"
        return f"{self.xa_clause(clause)}.", f"{english_clause(clause)}."

    # Writing xa ---------------------------------------------------------------------------------

    def xa_phrase(self, phrase: Phrase, case: str) -> str:
        words = []
        if phrase.relative:
            relative = phrase.relative
            words.append(self.xa_phrase(relative.other, "gen" if relative.inverted else "acc"))
            tense = TENSE_SUFFIX[relative.tense]
            words.append(attach(relative.verb.root, tense, PARTICIPLE))
        owner = phrase.owner
        if phrase.lord:
            words.append(self.xa_phrase(phrase.lord, "gen"))
            owner = "3p" if phrase.lord.many else "3"
        if phrase.number:
            words.append(xa_number(phrase.number))
        plural = PLURAL if phrase.plural else ""
        if phrase.adjective:
            words.append(attach(phrase.adjective.root, plural))
        ending = OWNERS[owner] if owner else DEFINITE if phrase.definite else ""
        words.append(attach(phrase.noun.root, plural, ending, CASES[case]))
        return " ".join(words)

    def xa_clause(self, clause: Clause, ending: str = "") -> str:
        """Verb last; the other parts in any order, the subject more often first."""
        subject = ""
        if not isinstance(clause.subject, str):
            *first, last = clause.subject
            words = [self.xa_phrase(phrase, "com") for phrase in first]
            subject = " ".join([*words, self.xa_phrase(last, "nom")])
        cases = {"acc": clause.object, "dat": clause.recipient, "ins": clause.instrument}
        cases |= {"com": clause.companion, "loc": clause.place}
        parts = [self.xa_phrase(phrase, case) for case, phrase in cases.items() if phrase]
        parts = shuffled(self.rng, [*parts, clause.time] if clause.time else parts)
        parts.insert(0 if self.chance(0.75) else int(self.rng.random() * (len(parts) + 1)), subject)
        suffixes = (NEGATION if clause.negative else "", TENSE_SUFFIX[clause.tense])
        verb = attach(clause.verb.root, *suffixes, AGREEMENT[clause.agreement], ending)
        return " ".join([part for part in parts if part] + [verb])


def english_phrase(phrase: Phrase, subject: Clause | None = None) -> str:
    """`subject` is the clause whose subject owns what a third-person possessive marks."""
    words = [phrase.noun.plural if phrase.many else phrase.noun.singular]
    if phrase.adjective:
        animate = phrase.noun.animate
        words.insert(0, phrase.adjective.senses[0 if animate else 1].base)
    if phrase.number:
        words.insert(0, english_number(phrase.number))
    if phrase.lord:
        lord = english_phrase(phrase.lord)
        words.insert(0, lord + ("'" if phrase.lord.many and lord.endswith("s") else "'s"))
    elif phrase.owner == "3":
        words.insert(0, third_person_possessive(subject))
    elif phrase.owner:
        words.insert(0, POSSESSIVES[phrase.owner])
    elif phrase.definite:
        words.insert(0, "the")
    elif not phrase.many:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    elif not phrase.number:
        words.insert(0, "some")
    if phrase.relative:
        words.append(english_relative(phrase))
    return " ".join(words)


def third_person_possessive(clause: Clause) -> str:
    if clause.agreement == "3p":
        return "their"
    kinds = {"man": "his", "woman": "her", "person": "their"}
    return kinds.get(clause.subject[0].noun.kind, "its")


def english_relative(head: Phrase) -> str:
    relative = head.relative
    other = english_phrase(relative.other)
    subject, thing = (relative.other, head) if relative.inverted else (head, relative.other)
    sense = relative.verb.senses[thing.noun.object_class]
    verb = english_verb(sense, relative.tense, "3p" if subject.many else "3s")
    if relative.inverted:
        return f"{'that' if head.noun.kind == 'animal' else 'whom'} {other} {verb}"
    return f"{'that' if head.noun.kind == 'animal' else 'who'} {verb} {other}"


def english_verb(sense: Sense, tense: str, agreement: str) -> str:
    """The finite verb where it needs no auxiliary."""
    if tense == "past":
        return sense.past
    return inflect(sense.base, "s") if agreement == "3s" else sense.base


def english_clause(clause: Clause, question: bool = False) -> str:
    """Subject, verb, object, recipient, instrument, companion, place, time."""
    if isinstance(clause.subject, str):
        subject = PRONOUNS[clause.subject]
    else:
        subject = " and ".join(english_phrase(phrase) for phrase in clause.subject)
    third = clause.agreement == "3s"
    auxiliary = {
        "present": "does" if third else "do",
        "past": "did",
        "future": "will",
        "perfect": "has" if third else "have",
    }[clause.tense]
    plain = clause.sense.participle if clause.tense == "perfect" else clause.sense.base
    negation = ["not"] if clause.negative else []
    if question:
        words = [auxiliary, subject, *negation, plain]
    elif negation or clause.tense in ("future", "perfect"):
        words = [subject, auxiliary, *negation, plain]
    else:
        words = [subject, english_verb(clause.sense, clause.tense, clause.agreement)]
    if clause.object:
        words.append(english_phrase(clause.object, clause))
    for preposition, phrase in (
        ("to", clause.recipient),
        ("with", clause.instrument),
        ("with", clause.companion),
        (clause.place.noun.preposition if clause.place else "", clause.place),
    ):
        if phrase:
            words += [preposition, english_phrase(phrase, clause)]
    if clause.time:
        words.append(TIMES[clause.time][clause.tense])
    return " ".join(words)


def generate(
    train: int = 8000, valid: int = 500, test: int = 500, seed: int = 1
) -> dict[str, list[Pair]]:
    """Generates the corpus.

    Every sentence of valid and test has at least one combination of adjective and noun or of verb
    and object that no sentence of train has, though its words occur there in others. No sentence
    occurs twice in a split. Each split is drawn on its own: more training lines extend the train
    set and leave the rest as it is.

    Args:
        train: lines of the training set.
        valid: lines of the validation set.
        test: lines of the test set.
        seed: chooses the sentences, not the language.

    Returns:
        Split -> pairs of a sentence in xa and its translation into English.

    Raises:
        ValueError: for a size or seed below zero.
    """
    sizes = {"train": train, "valid": valid, "test": test}
    for name, value in {**sizes, "seed": seed}.items():
        if value < 0:
            raise ValueError(f"{name} must be 0 or more, not {value}")
    lexicon = Lexicon()
    corpus = {}
    for number, (split, size) in enumerate(sizes.items()):
        writer = Writer(lexicon, 3 * seed + number)
        pairs: dict[Pair, None] = {}
        while len(pairs) < size:
            pair = writer.sentence()
            unseen = not writer.combinations.isdisjoint(lexicon.held_out)
            if unseen == (split != "train"):
                pairs[pair] = None
        corpus[split] = list(pairs)
    return corpus


def write(
    directory: str | os.PathLike,
    train: int = 8000,
    valid: int = 500,
    test: int = 500,
    seed: int = 1,
    force: bool = False,
) -> list[Path]:
    """Writes the corpus as UTF-8 files `<split>.<lang>`, one sentence a line.

    Every file is written beside its place and then renamed; none is written if one of them exists
    with other content, unless `force` is given.

    Args:
        directory: where to write; made if need be.
        train, valid, test, seed: as for `generate`.
        force: replace files of other content.

    Returns:
        The paths of the files.

    Raises:
        FileExistsError: for a file of other content without `force`.
        ValueError: as for `generate`.
    """
    corpus = generate(train, valid, test, seed)
    contents = {
        Path(directory, f"{split}.{lang}"): "".join(f"{pair[side]}\n" for pair in pairs).encode()
        for split, pairs in corpus.items()
        for side, lang in enumerate(LANGUAGES)
    }
    for path, content in contents.items():
        if not force and path.exists() and path.read_bytes() != content:
            raise FileExistsError(
                f"{path} exists with other content; pass force=True to replace it"
            )
    Path(directory).mkdir(parents=True, exist_ok=True)
    for path, content in contents.items():
        beside = path.with_name(path.name + ".tmp")
        beside.write_bytes(content)
        beside.replace(path)
    return list(contents)

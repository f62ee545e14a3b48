"""Ember's language: short records about people, firms and towns, and questions about them.

A *document* is a list of facts, each told by one sentence. A sentence names its subject ("Vodris paints in orange.") or
refers to the one named last ("This one works as a farmer."). The sentences are cut into *passages* at arbitrary
boundaries, so a passage may begin with "This one" whose subject stands in the passage before: what such a passage
means, and so its KV, depends on its neighbour. That is what makes the language a test of KV reuse.

A *question* is of one kind:

- direct: the fact's sentence names the subject,
- coreference: the fact's sentence says "This one",
- two-hop: two facts in a row ("In which city is the firm of Vodris?"), and the answer gives both,
- reverse: the value is given, the subject asked for ("Who keeps a goat?"); only one subject fits,
- unstated: the document does not say (for a two-hop question: at the first or at the second step).

Text is made of *pieces*: a word with one leading space, a number with one, a punctuation mark, a newline. Every piece
of this language is one token (`tokenizer.py`), so pieces are also the places that training supervises (`lessons.py`).

**Held-out documents are disjoint from training by construction.** Each pair (subject, value) belongs to one split:
`pair_is_held_out` looks at the sum of their two places in their pools. A training document contains no held-out pair,
a held-out document contains nothing else. So no sentence with a name and its value from a held-out document was ever
seen in training, and a right answer can't be remembered: it must have been read.

This module knows no tensor and no tokenizer.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from rekindle.model.ember import names
from rekindle.model.ember.grammar import (
    FILLERS,
    NOT_STATED,
    OWNED,
    PATHS,
    PATHS_FROM,
    POOLS,
    RELATIONS,
    REST_NOT_STATED,
    REVERSIBLE,
    THIS_ONE,
    Fact,
    Split,
    pair_is_held_out,
    pieces_of,
)

__all__ = [
    "Document", "Fact", "Kind", "Question", "Questioner", "Sentence", "Split", "generate_document",
    "generate_questions", "pair_is_held_out", "pieces_of", "recut",
]  # fmt: skip


class Kind(Enum):
    DIRECT = "direct"
    COREFERENCE = "coreference"
    TWO_HOP = "two-hop"
    REVERSE = "reverse"
    UNSTATED = "unstated"


@dataclass(frozen=True)
class Sentence:
    """A sentence of a document. A filler tells no fact."""

    fact: Fact | None
    refers: bool  # it says "This one" instead of the subject's name
    pieces: tuple[str, ...]
    named_at: int  # index of the sentence that names the subject (its own, if it does not refer)


@dataclass(frozen=True)
class Document:
    """Facts, told by sentences, cut into passages."""

    sentences: tuple[Sentence, ...]
    passage_starts: tuple[int, ...]  # index of each passage's first sentence; the first is 0

    @property
    def passage_sentences(self) -> tuple[tuple[Sentence, ...], ...]:
        stops = (*self.passage_starts[1:], len(self.sentences))
        return tuple(self.sentences[start:stop] for start, stop in zip(self.passage_starts, stops, strict=True))

    @property
    def passages(self) -> tuple[str, ...]:
        """The passages as text, without leading space."""
        return tuple(
            "".join(piece for sentence in part for piece in sentence.pieces).strip() for part in self.passage_sentences
        )

    @property
    def text(self) -> str:
        return "\n".join(self.passages)

    @property
    def facts(self) -> tuple[Fact, ...]:
        return tuple(sentence.fact for sentence in self.sentences if sentence.fact is not None)

    @property
    def num_tokens(self) -> int:
        """Tokens of the passages with one mark between each two."""
        return sum(len(sentence.pieces) for sentence in self.sentences) + len(self.passage_starts) - 1

    def passage_of(self, sentence: int) -> int:
        """Index of the passage that holds the sentence with this index."""
        return sum(1 for start in self.passage_starts if start <= sentence) - 1


@dataclass(frozen=True)
class Question:
    """A question with the one right answer and what it takes to give it."""

    kind: Kind
    text: str
    subject: str  # the name in the question; of a reverse question the value
    answer: str
    facts: tuple[Fact, ...]  # in the order of the answer; empty if nothing is stated
    sentences: tuple[int, ...]  # the sentences that tell these facts
    passages: tuple[int, ...]  # the passages needed: those sentences' and those that name their subjects
    gives_value: bool = False  # a reverse question (stated or not): it gives a value and asks for the subject


def _split_rng(split: Split, seed: int | str, what: str) -> random.Random:
    return random.Random(f"{what}:{split.value}:{seed}")


def _draw_value(
    rng: random.Random, relation: str, subject: str, wanted: Sequence[str] | None, split: Split
) -> tuple[str, ...]:
    """A value of the split, among the `wanted` names if some pair of them is in the split."""
    values = RELATIONS[relation].values
    if wanted:
        allowed = [
            (" " + name,)
            for name in wanted
            if name != subject and pair_is_held_out(relation, subject, (" " + name,)) is (split is Split.HELD_OUT)
        ]
        if allowed:
            return rng.choice(allowed)
    while True:
        value = rng.choice(values)
        if value[0][1:] != subject and pair_is_held_out(relation, subject, value) is (split is Split.HELD_OUT):
            return value


def _draw_facts(rng: random.Random, num_people: int, split: Split) -> dict[str, list[Fact]]:
    """Facts by subject: people, then the firms and towns they lead to."""
    people = rng.sample(names.PEOPLE, num_people)
    firms = rng.sample(names.FIRMS, min(len(names.FIRMS), 5 + num_people // 2))
    towns = rng.sample(names.TOWNS, min(len(names.TOWNS), 5 + num_people // 2))
    wanted = {"firm": firms, "home": towns, "seat": towns, "landlord": people}
    facts: dict[str, list[Fact]] = {}

    def tell(subject: str, owner: str, least: int, most: int, likely: Sequence[str]) -> None:
        chosen = [name for name in likely if rng.random() < 0.5]
        others = [name for name in OWNED[owner] if name not in chosen]
        count = rng.randint(least, most)
        chosen += rng.sample(others, max(0, min(len(others), count - len(chosen))))
        rng.shuffle(chosen)
        facts[subject] = [
            Fact(subject, name, _draw_value(rng, name, subject, wanted.get(name), split)) for name in chosen
        ]

    def reached(relations: tuple[str, ...]) -> list[str]:
        return sorted({f.value[0][1:] for told in facts.values() for f in told if f.relation in relations})

    for person in people:
        tell(person, "person", 2, 5, ("firm", "home", "landlord"))
    for firm in reached(("firm",)):
        tell(firm, "firm", 1, 3, ("seat",))
    for town in reached(("home", "seat")):
        if rng.random() < 0.6:
            tell(town, "town", 1, 2, ())
    return {subject: told for subject, told in facts.items() if told}


def _tell(rng: random.Random, facts: dict[str, list[Fact]], filler: float) -> list[Sentence]:
    """Sentences in runs of one subject: the first names it, the others mostly say "This one"."""
    runs: list[list[Fact]] = []
    for told in facts.values():
        start = 0
        while start < len(told):
            length = rng.randint(1, 4)
            runs.append(told[start : start + length])
            start += length
    rng.shuffle(runs)
    sentences: list[Sentence] = []
    for run in runs:
        if rng.random() < filler:
            sentences.append(Sentence(None, False, rng.choice(FILLERS), len(sentences)))
        named_at = len(sentences)
        for place, fact in enumerate(run):
            refers = place > 0 and rng.random() < 0.75
            if not refers:
                named_at = len(sentences)
            pieces = (*THIS_ONE, *fact.predicate) if refers else fact.pieces
            sentences.append(Sentence(fact, refers, pieces, named_at))
    return sentences


def _cut(rng: random.Random, num_sentences: int) -> tuple[int, ...]:
    starts, start = [0], rng.randint(2, 14)
    while start < num_sentences - 1:
        starts.append(start)
        start += rng.randint(2, 14)
    return tuple(starts)


def generate_document(
    seed: int | str,
    *,
    num_people: int = 8,
    num_tokens: int | None = None,
    split: Split = Split.HELD_OUT,
    filler: float = 0.0,
) -> Document:
    """The document of a seed: the same in every process.

    With `num_tokens` there are as many people as it takes, and the sentences end just before that many tokens.
    `filler` is the chance of a sentence without a fact before each new subject.
    """
    rng = _split_rng(split, seed, "document")
    if num_tokens is not None:
        num_people = min(len(names.PEOPLE), num_tokens // 30 + 3)
    sentences = _tell(rng, _draw_facts(rng, num_people, split), filler)
    starts = _cut(rng, len(sentences))
    if num_tokens is not None:
        keep = _num_fitting(sentences, starts, num_tokens)
        sentences, starts = sentences[:keep], tuple(start for start in starts if start < keep)
    return Document(tuple(sentences), starts)


def _num_fitting(sentences: Sequence[Sentence], starts: Sequence[int], num_tokens: int) -> int:
    """How many sentences fit, with a mark before each passage but the first."""
    total = -1
    for index, sentence in enumerate(sentences):
        total += len(sentence.pieces) + (index in starts)
        if total > num_tokens:
            return index
    return len(sentences)


def recut(document: Document, seed: int | str) -> Document:
    """The same sentences in the same order, cut into passages elsewhere."""
    return Document(document.sentences, _cut(random.Random(f"cut:{seed}"), len(document.sentences)))


class Questioner:
    """Draws questions about one document."""

    def __init__(self, document: Document, rng: random.Random) -> None:
        self._document = document
        self._rng = rng
        self._told: dict[tuple[str, str], int] = {}
        for index, sentence in enumerate(document.sentences):
            if sentence.fact is not None:
                self._told[(sentence.fact.subject, sentence.fact.relation)] = index
        values: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        for (_, relation), index in self._told.items():
            if RELATIONS[relation].reverse:
                values.setdefault((relation, self._fact(index).value), []).append(index)
        self.reverse = [indices[0] for indices in values.values() if len(indices) == 1]
        self._values = set(values)
        self._owners = {name: RELATIONS[relation].owner for name, relation in self._told}
        self._subjects = list(self._owners)
        self.direct = [index for index in self._told.values() if not document.sentences[index].refers]
        self.coreference = [index for index in self._told.values() if document.sentences[index].refers]
        self.two_hop = [
            (path, index, second)
            for path in PATHS
            for (_, relation), index in self._told.items()
            if relation == path.first and (second := self._told.get((self._value(index), path.second))) is not None
        ]

    def _fact(self, index: int) -> Fact:
        fact = self._document.sentences[index].fact
        assert fact is not None
        return fact

    def _value(self, index: int) -> str:
        return self._fact(index).value[0][1:]

    def draw(self, kind: Kind) -> Question | None:
        """A question of this kind, or None if the document has nothing to ask for."""
        if kind is Kind.TWO_HOP:
            return self._draw_two_hop() if self.two_hop else None
        if kind is Kind.REVERSE:
            return self._draw_reverse() if self.reverse else None
        if kind is Kind.UNSTATED:
            return self._draw_unstated_reverse() if self._rng.random() < 0.2 else self._draw_unstated()
        indices = self.direct if kind is Kind.DIRECT else self.coreference
        if not indices:
            return None
        index = self._rng.choice(indices)
        fact = self._fact(index)
        text = self._ask(RELATIONS[fact.relation].questions, fact.subject)
        return self._question(kind, text, fact.subject, fact.text, (index,))

    def _ask(self, ways: Sequence[str], subject: str) -> str:
        return self._rng.choice(ways).format(subject)

    def _draw_two_hop(self) -> Question:
        path, first, second = self._rng.choice(self.two_hop)
        subject = self._fact(first).subject
        answer = f"{self._fact(first).text} {self._fact(second).text}"
        return self._question(Kind.TWO_HOP, self._ask(path.questions, subject), subject, answer, (first, second))

    def _draw_reverse(self) -> Question:
        index = self._rng.choice(self.reverse)
        fact = self._fact(index)
        value = "".join(fact.value)[1:]
        return self._question(
            Kind.REVERSE, RELATIONS[fact.relation].reverse.format(value), value, fact.text, (index,), True
        )

    def _draw_unstated_reverse(self) -> Question:
        while True:
            relation = self._rng.choice(REVERSIBLE)
            value = self._rng.choice(relation.values)
            if (relation.name, value) not in self._values:
                text = "".join(value)[1:]
                return self._question(Kind.UNSTATED, relation.reverse.format(text), text, NOT_STATED, (), True)

    def _draw_unstated(self) -> Question:
        while True:
            if self._subjects and self._rng.random() < 0.8:
                subject = self._rng.choice(self._subjects)
                owner = self._owners[subject]
            else:
                owner = self._rng.choice(tuple(POOLS))
                subject = self._rng.choice(POOLS[owner])
            if owner != "town" and self._rng.random() < 0.3:
                path = self._rng.choice(PATHS_FROM[owner])
                first = self._told.get((subject, path.first))
                text = self._ask(path.questions, subject)
                if first is None:
                    return self._question(Kind.UNSTATED, text, subject, NOT_STATED, ())
                if (self._value(first), path.second) not in self._told:
                    answer = f"{self._fact(first).text} {REST_NOT_STATED}"
                    return self._question(Kind.UNSTATED, text, subject, answer, (first,))
            else:
                relation = self._rng.choice(OWNED[owner])
                if (subject, relation) not in self._told:
                    text = self._ask(RELATIONS[relation].questions, subject)
                    return self._question(Kind.UNSTATED, text, subject, NOT_STATED, ())

    def _question(
        self, kind: Kind, text: str, subject: str, answer: str, indices: tuple[int, ...], gives_value: bool = False
    ) -> Question:
        needed = {*indices, *(self._document.sentences[index].named_at for index in indices)}
        passages = tuple(sorted({self._document.passage_of(index) for index in needed}))
        facts = tuple(self._fact(index) for index in indices)
        return Question(kind, text, subject, answer, facts, indices, passages, gives_value)


def generate_questions(
    document: Document, seed: int | str, *, kinds: Sequence[Kind] = tuple(Kind), count: int = 1
) -> list[Question]:
    """Up to `count` questions of each kind about different facts, in the order of `kinds`."""
    questioner = Questioner(document, random.Random(f"questions:{seed}"))
    questions: list[Question] = []
    for kind in kinds:
        found: dict[object, Question] = {}
        for _ in range(4 * count):
            question = questioner.draw(kind)
            if question is None or len(found) == count:
                break
            found.setdefault(question.facts or question.text, question)
        questions += found.values()
    return questions

"""What blending is judged on: chunks in an order in which they were never read before, and questions about them.

**Ember's documents.** A held-out document of the built-in model's language is cut into chunks, as a rule where a sentence
says "This one …" of a subject that the chunk before names, because that is where a chunk needs its neighbour. Then chunks
are put into random order, but those that a question needs side by side stay side by side. A question is kept if, read in
that order, the text gives its answer once and no other. So a right answer crosses chunks in one of two ways: a reference
across a boundary ("coreference"), or two facts in two chunks ("two-hop").

**Files.** Examples of others: `blend_files`.

Every task also has the order in which its chunks were met before; that is what a prefix cache could know, and where
`remembered` has its scores from.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from rekindle.model.ember import dialogue
from rekindle.model.ember.language import Document, Kind, Question, generate_document, generate_questions
from rekindle.model.ember.pieces import piece_ids
from rekindle.model.model import Model
from rekindle.model.source import BUILTIN
from rekindle.reuse.prompt import Prompt, join
from rekindle.tokens import Tokens, as_tokens

SIZES = ((4, 100, 500), (8, 100, 350), (16, 100, 200))  # chunks, and tokens of each from and to
_PER_DOCUMENT = 6  # questions at most, about half of them coreferences


@dataclass(frozen=True, eq=False)
class Asked:
    """A question behind the chunks."""

    tokens: Tokens  # up to where the answer begins
    answers: tuple[str, ...]  # any of which is right
    kind: str
    max_tokens: int


@dataclass(frozen=True, eq=False)
class BlendTask:
    """Chunks in the order they are asked about, with questions."""

    before: Tokens  # what stands before the first chunk, BOS included
    mark: Tokens  # what stands behind each chunk
    chunks: tuple[Tokens, ...]
    met: tuple[int, ...]  # the order in which they were met before, as indices
    asked: tuple[Asked, ...]

    @property
    def prompt(self) -> Prompt:
        """All up to the question."""
        return self._join(range(len(self.chunks)))

    @property
    def met_prompt(self) -> Prompt:
        return self._join(self.met)

    def _join(self, order: Sequence[int]) -> Prompt:
        parts = [(self.before, False)]
        for index in order:
            parts += [(self.chunks[index], True), (self.mark, False)]
        return join(parts)


def ember_tasks(seed: int = 0) -> Iterator[BlendTask]:
    """Tasks in the built-in model's language, without end; the same for a seed."""
    with closing(Model.open(BUILTIN, vocab_only=True)) as model:
        ids = piece_ids(lambda text: model.tokenizer.encode(text).tolist())
    number = 0
    while True:
        rng = random.Random(f"blend {seed}.{number}")
        task = _ember_task(f"blend {seed}.{number}", rng, ids)
        if task is not None:
            yield task
        number += 1


def _ember_task(seed: str, rng: random.Random, ids: Mapping[str, int]) -> BlendTask | None:
    num_chunks, least, most = rng.choice(SIZES)
    lengths = [rng.randint(least, most) for _ in range(num_chunks)]
    document = _cut(generate_document(seed, num_tokens=min(3_500, sum(lengths))), lengths)
    num_chunks = len(document.passage_starts)
    crossing = [q for q in _questions(document, seed, Kind.COREFERENCE, 60) if len(q.passages) == 2]
    rng.shuffle(crossing)
    crossing = _apart(crossing, num_chunks // 2)[: _PER_DOCUMENT // 2]
    order = _order(rng, num_chunks, [(q.passages[0], q.passages[1]) for q in crossing])
    two_hop = [q for q in _questions(document, seed, Kind.TWO_HOP, 20) if len(q.passages) > 1]
    fitting = [q for q in crossing if _is_stated(document, order, q)]
    fitting += [q for q in two_hop if _is_stated(document, order, q)][: _PER_DOCUMENT // 2]
    if not fitting or num_chunks < 3:
        return None
    chunks = [
        as_tokens([ids[piece] for sentence in part for piece in sentence.pieces]) for part in document.passage_sentences
    ]
    met = list(range(num_chunks))
    rng.shuffle(met)
    return BlendTask(
        before=as_tokens([ids[dialogue.BOS], ids[dialogue.USER]]),
        mark=as_tokens([ids["\n"]]),
        chunks=tuple(chunks[index] for index in order),
        met=tuple(met),
        asked=tuple(_ask(ids, question) for question in fitting),
    )


def _questions(document: Document, seed: str, kind: Kind, count: int) -> list[Question]:
    return generate_questions(document, seed, kinds=(kind,), count=count)


def _cut(document: Document, lengths: Sequence[int]) -> Document:
    """Chunks of about these lengths, which begin with a reference where there is one near."""
    starts, size, wanted = [0], 0, list(lengths[::-1])
    for index, sentence in enumerate(document.sentences):
        if size >= wanted[-1] and len(wanted) > 1 and (sentence.refers or size > wanted[-1] + 40):
            starts.append(index)
            size = 0
            wanted.pop()
        size += len(sentence.pieces)
    return Document(document.sentences, tuple(starts))


def _apart(questions: Sequence[Question], count: int) -> list[Question]:
    """At most `count` questions, each about another boundary."""
    found: dict[tuple[int, ...], Question] = {}
    for question in questions:
        found.setdefault(question.passages, question)
    return list(found.values())[:count]


def _order(rng: random.Random, num_chunks: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """A random order in which the second of each pair follows the first."""
    follows = dict(pairs)
    groups = []
    for index in range(num_chunks):
        if index not in follows.values():
            group = [index]
            while group[-1] in follows:
                group.append(follows[group[-1]])
            groups.append(group)
    rng.shuffle(groups)
    return [index for group in groups for index in group]


def _is_stated(document: Document, order: Sequence[int], question: Question) -> bool:
    """Whether the chunks, read in this order, give this answer and no other."""
    told: dict[tuple[str | None, str], list[tuple[str, ...]]] = {}
    subject: str | None = None
    for index in order:
        for sentence in document.passage_sentences[index]:
            if sentence.fact is not None:
                subject = subject if sentence.refers else sentence.fact.subject
                told.setdefault((subject, sentence.fact.relation), []).append(sentence.fact.value)
    return all(told.get((fact.subject, fact.relation)) == [fact.value] for fact in question.facts)


def _ask(ids: Mapping[str, int], question: Question) -> Asked:
    from rekindle.model.ember.language import pieces_of

    asked = [*(ids[piece] for piece in pieces_of(" " + question.text)), ids[dialogue.END], ids[dialogue.ASSISTANT]]
    return Asked(as_tokens(asked), (question.answer,), question.kind.value, len(pieces_of(question.answer)) + 4)

"""Accuracy on held-out documents: whole answers, greedy.

A question counts as right if greedy decoding gives exactly the expected answer and then ends. That is so if and only if
every token of the answer, and the end after it, is the most likely one after the correct tokens before it; so one
forward pass judges a whole answer. Many questions about a document share its prefill: they are laid behind the document
in one sequence, each seeing the document and itself only (a block mask), at the positions it would have alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from rekindle.model.ember import dialogue
from rekindle.model.ember.language import (
    Document,
    Kind,
    Question,
    Split,
    generate_document,
    generate_questions,
    pieces_of,
)
from rekindle.model.ember.network import Network


@dataclass(frozen=True)
class Score:
    """How many questions of one kind, about documents of one size, were answered right."""

    kind: Kind
    documents: str  # "8 people" or "2000 tokens"
    num_questions: int
    num_right: int
    wrong: tuple[str, ...]  # some wrongly answered questions, for a person to read

    @property
    def accuracy(self) -> float:
        return self.num_right / max(1, self.num_questions)


def _ids(ids: Mapping[str, int], text: str) -> list[int]:
    return [ids[piece] for piece in pieces_of(" " + text)]


def document_prompt(ids: Mapping[str, int], document: Document, *, mark: str = "\n") -> list[int]:
    """The tokens of a prompt up to the question: the passages stand in the user's turn."""
    prompt = [ids[dialogue.BOS], ids[dialogue.USER]]
    for part in document.passage_sentences:
        prompt += [ids[piece] for sentence in part for piece in sentence.pieces]
        prompt.append(ids[mark])
    return prompt


def question_and_answer(ids: Mapping[str, int], question: Question) -> tuple[list[int], list[int]]:
    """The tokens after the passages up to the answer, and those of the answer."""
    asked = [*_ids(ids, question.text), ids[dialogue.END], ids[dialogue.ASSISTANT]]
    return asked, [*_ids(ids, question.answer), ids[dialogue.END]]


def _judge(network: Network, prefix: list[int], parts: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
    """For each (question, answer) behind the common prefix: is every token of the answer the most likely one?"""
    tokens, positions, group = list(prefix), list(range(len(prefix))), [0] * len(prefix)
    judged: list[tuple[int, list[int]]] = []
    for number, (asked, answer) in enumerate(parts, 1):
        judged.append((len(tokens) + len(asked) - 1, answer))
        span = asked + answer[:-1]
        tokens += span
        positions += range(len(prefix), len(prefix) + len(span))
        group += [number] * len(span)
    groups = torch.tensor(group)
    seen = (groups[:, None] == groups) | (groups == 0)
    mask = seen & torch.ones_like(seen).tril()
    with torch.inference_mode():
        hidden, _ = network(torch.tensor([tokens]), positions=torch.tensor(positions), mask=mask[None, None])
        places = torch.cat([torch.arange(start, start + len(answer)) for start, answer in judged])
        best: Tensor = network.logits(hidden[0, places]).argmax(-1)
    found = best.tolist()
    stops = list(accumulate(len(answer) for _, answer in judged))
    return [found[stop - len(answer) : stop] == answer for stop, (_, answer) in zip(stops, judged, strict=True)]


def held_out_documents(num_tokens: int | None, seed: int = 0) -> Iterator[Document]:
    """Documents no training has seen: 8 people each, or so many tokens that a prompt of `num_tokens` results."""
    number = 0
    while True:
        yield generate_document(
            f"evaluation {seed}.{number}", num_people=8, num_tokens=num_tokens, split=Split.HELD_OUT
        )
        number += 1


def score(
    network: Network,
    ids: Mapping[str, int],
    kind: Kind,
    *,
    num_tokens: int | None = None,
    num_questions: int = 1000,
    per_document: int = 10,
    seed: int = 0,
) -> Score:
    """Accuracy for one kind: `per_document` questions on each held-out document until there are enough."""
    network.eval()
    asked, right = 0, 0
    wrong: list[str] = []
    for number, document in enumerate(held_out_documents(num_tokens, seed)):
        count = min(per_document, num_questions - asked)
        if count <= 0:
            break
        questions = generate_questions(document, f"{seed}.{number}", kinds=(kind,), count=count)
        if not questions:
            continue
        parts = [question_and_answer(ids, question) for question in questions]
        verdicts = _judge(network, document_prompt(ids, document), parts)
        asked += len(verdicts)
        right += sum(verdicts)
        wrong += [f"{q.text} → {q.answer}" for q, good in zip(questions, verdicts, strict=True) if not good]
    documents = "8 people" if num_tokens is None else f"{num_tokens} tokens"
    return Score(kind, documents, asked, right, tuple(wrong[:5]))

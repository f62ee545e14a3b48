"""Training examples: token ids, what each token weighs in the loss, and where two attention heads ought to look.

The generator knows which token of the context answers each token of an answer, and whom "This one" stands for. So a
lesson carries, beside its ids, four lists of supervised attention:

- *subject* pairs: from every token of a sentence (and of a question, and of an answer) to the name of its subject,
- *value* pairs: from the token before a value in an answer to that value in the context; from `<|assistant|>` to the
  value asked for, or to `<|bos|>` if the document does not state it,
- *copy* pairs: from the token before a subject in an answer to where it was named last, in the question or the answer,
- *reverse* pairs: from `<|assistant|>` to the value given in a reverse question, where its sentence's subject is known.

Without them a model of this size learns to name a value of the right type and stays at chance among the candidates.

A lesson is a document followed by a *recap* (every fact with its subject's name, in random order: the densest signal
there is) or by a conversation of several turns.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rekindle.model.ember import dialogue
from rekindle.model.ember.grammar import RELATIONS
from rekindle.model.ember.language import (
    Document,
    Fact,
    Kind,
    Question,
    Questioner,
    Split,
    generate_document,
    pieces_of,
)

CONTEXT_WEIGHT = 0.02
CHOICE_WEIGHT = 3.0  # of the first word of an answer, and of what follows a fact in it


@dataclass(frozen=True)
class Mixture:
    """What a stage of training is made of. Chances are between 0 and 1."""

    num_people: tuple[int, int]  # least and most people in a short document
    lengths: tuple[tuple[int, float], ...] = ()  # (document tokens, chance): longer documents
    recap: float = 0.5  # chance that a document is followed by a recap
    kinds: tuple[tuple[Kind, float], ...] = ((Kind.DIRECT, 1.0), (Kind.COREFERENCE, 1.0))
    small_talk: float = 0.0  # chance of small talk before each question
    variety: float = 0.0  # chance of each deviation in form: system turn, lead-in, lower case, filler …
    num_turns: tuple[int, int] = (4, 12)


@dataclass
class Lesson:
    """One training sequence."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # of predicting the token at this place
    subject_rows: list[int] = field(default_factory=list)
    subject_targets: list[int] = field(default_factory=list)
    value_rows: list[int] = field(default_factory=list)
    value_targets: list[int] = field(default_factory=list)
    copy_rows: list[int] = field(default_factory=list)
    copy_targets: list[int] = field(default_factory=list)
    reverse_rows: list[int] = field(default_factory=list)
    reverse_targets: list[int] = field(default_factory=list)
    checked: list[int] = field(default_factory=list)  # places where an answer must choose: accuracy is counted there


class Writer:
    """Writes one lesson piece by piece and keeps the places of names and values."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids
        self.lesson = Lesson()
        self._value_places: dict[Fact, int] = {}
        self._asked: int | None = 0  # place of the subject's name in the question asked last
        self.special(dialogue.BOS)

    def special(self, token: str, weight: float = 0.0) -> int:
        """Write a special token and return its place."""
        self.lesson.ids.append(self._ids[token])
        self.lesson.weights.append(weight)
        return len(self.lesson.ids) - 1

    def pieces(self, pieces: Iterable[str], weight: float = CONTEXT_WEIGHT) -> int:
        """Write pieces and return the place of the first."""
        start = len(self.lesson.ids)
        self.lesson.ids += [self._ids[piece] for piece in pieces]
        self.lesson.weights += [weight] * (len(self.lesson.ids) - start)
        return start

    def raw(self, ids: Sequence[int]) -> None:
        """Write tokens of no known piece, without loss."""
        self.lesson.ids += ids
        self.lesson.weights += [0.0] * len(ids)

    def look_at_subject(self, rows: Iterable[int], target: int) -> None:
        for row in rows:
            self.lesson.subject_rows.append(row)
            self.lesson.subject_targets.append(target)

    def look_at_value(self, row: int, target: int) -> None:
        self.lesson.value_rows.append(row)
        self.lesson.value_targets.append(target)

    def _look_at_copy(self, row: int, target: int) -> None:
        self.lesson.copy_rows.append(row)
        self.lesson.copy_targets.append(target)

    def passages(self, document: Document, first: int, stop: int, mark: str, named: dict[int, int]) -> None:
        """Write the passages first … stop-1; `named` keeps where each sentence's subject is named."""
        for number in range(first, stop):
            if number > first:
                self.pieces((mark,))
            offset = document.passage_starts[number]
            for index, sentence in enumerate(document.passage_sentences[number], offset):
                start = self.pieces(sentence.pieces)
                if sentence.fact is None:
                    continue
                if sentence.refers:
                    target = named[sentence.named_at]
                else:
                    named[index] = target = start
                self.look_at_subject(range(start + (0 if sentence.refers else 1), len(self.lesson.ids)), target)
                head = len(sentence.pieces) - len(sentence.fact.predicate)
                self._value_places[sentence.fact] = start + head + len(_before(sentence.fact))

    def answer_fact(self, fact: Fact, weight: float = 1.0) -> None:
        """Write a fact as an answer, with all its supervision."""
        start = self.pieces(fact.pieces, weight)
        self.look_at_subject(range(start + 1, len(self.lesson.ids)), start)
        place = start + 1 + len(_before(fact))
        source = self._value_places[fact]
        for step in range(len(fact.value)):
            self.look_at_value(place + step - 1, source + step)
            self.lesson.weights[place + step] = 1.0
            self.lesson.checked.append(place + step)

    def question(self, question: Question, pieces: Sequence[str]) -> None:
        """Write the question's pieces; what follows its subject's name looks at it."""
        start = self.pieces(pieces)
        self._asked = None
        if question.gives_value:
            return
        subject = start + pieces.index(" " + question.subject)
        self._asked = subject
        self.look_at_subject(range(subject + 1, len(self.lesson.ids)), subject)

    def answer(self, question: Question) -> None:
        """End the user's turn and write the right answer."""
        end = self.special(dialogue.END)
        place = self.special(dialogue.ASSISTANT)
        if self._asked is None:
            target = self._value_places[question.facts[0]] + len(question.facts[0].value) - 1 if question.facts else 0
            self.lesson.reverse_rows.append(place)
            self.lesson.reverse_targets.append(target)
        else:
            self.look_at_subject((end, place), self._asked)
            self.look_at_value(place, self._value_places[question.facts[0]] if question.facts else 0)
            if question.facts:
                self._look_at_copy(place, self._asked)
        for fact in question.facts:
            choice = len(self.lesson.ids)
            self.lesson.checked.append(choice)
            if fact is not question.facts[0]:
                tail = _num_after(question.facts[0])
                self._look_at_copy(len(self.lesson.ids) - 1, len(self.lesson.ids) - tail)
            self.answer_fact(fact)
            self.lesson.weights[choice] = CHOICE_WEIGHT
        if question.kind is Kind.UNSTATED:
            if question.facts:
                self.look_at_value(len(self.lesson.ids) - 1, 0)
            self.lesson.checked.append(len(self.lesson.ids))
            self.pieces(pieces_of(" " + (question.answer.split(". ")[-1])), 1.0)
            self.lesson.weights[self.lesson.checked[-1]] = CHOICE_WEIGHT
        self.lesson.checked.append(self.special(dialogue.END, 1.0))

    def turn(self, said: Sequence[str], reply: str) -> None:
        """A whole exchange of small talk."""
        self.special(dialogue.USER)
        self.pieces(said, 0.0)
        self.reply(reply)

    def reply(self, reply: str) -> None:
        """End the user's turn and write a fixed reply."""
        self.special(dialogue.END)
        self.look_at_value(self.special(dialogue.ASSISTANT), 0)
        self.pieces(pieces_of(" " + reply), 1.0)
        self.special(dialogue.END, 1.0)


def _before(fact: Fact) -> tuple[str, ...]:
    return RELATIONS[fact.relation].before


def _num_after(fact: Fact) -> int:
    """How many pieces from the value's first to the sentence's end."""
    return len(fact.predicate) - len(_before(fact))


def _weighted(rng: random.Random, choices: Sequence[tuple[Kind, float]]) -> Kind:
    return rng.choices([choice for choice, _ in choices], [chance for _, chance in choices])[0]


class Teacher:
    """Makes lessons of a mixture. The same seed gives the same lesson."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids
        self._words = [piece for piece in ids if piece.startswith(" ") and len(piece) > 1]
        self._marks = ("\n", "\n \n", "\n\n")

    def lesson(self, seed: int | str, mixture: Mixture, num_tokens: int | None) -> Lesson:
        """A lesson about a document of `num_tokens`, or of a random number of people if None."""
        rng = random.Random(f"lesson:{seed}")
        varied = mixture.variety
        document = generate_document(
            seed,
            num_people=rng.randint(*mixture.num_people),
            num_tokens=num_tokens,
            split=Split.TRAIN,
            filler=0.1 if rng.random() < varied else 0.0,
        )
        writer = Writer(self._ids)
        mark = rng.choices(self._marks, (6, 3, 1))[0]
        if rng.random() < mixture.recap:
            self._recap(writer, rng, document, mark, varied)
        else:
            self._conversation(writer, rng, document, mark, mixture)
        return writer.lesson

    def _recap(self, writer: Writer, rng: random.Random, document: Document, mark: str, varied: float) -> None:
        chat = rng.random() < varied
        if chat:
            writer.special(dialogue.USER)
        writer.passages(document, 0, len(document.passage_starts), mark, {})
        writer.pieces((mark,))
        if chat:
            writer.pieces(pieces_of(" " + rng.choice(dialogue.RECAP_REQUESTS)))
            writer.special(dialogue.END)
            writer.special(dialogue.ASSISTANT)
        facts = list(document.facts)
        rng.shuffle(facts)
        for fact in facts[:80]:
            writer.answer_fact(fact, CONTEXT_WEIGHT)

    def _conversation(
        self, writer: Writer, rng: random.Random, document: Document, mark: str, mixture: Mixture
    ) -> None:
        varied = mixture.variety
        num_passages = len(document.passage_starts)
        # passages stand in the system turn, in the user's, or in both
        in_system = rng.choice((0, num_passages, rng.randint(0, num_passages))) if rng.random() < varied else 0
        system = rng.random() < varied
        named: dict[int, int] = {}
        if rng.random() < mixture.small_talk / 2:
            self._small_talk(writer, rng)
        if in_system or system:
            writer.special(dialogue.SYSTEM)
            if system:
                writer.pieces(pieces_of(" " + rng.choice(dialogue.SYSTEM_PROMPTS)))
                if in_system:
                    writer.pieces((mark,))
            writer.passages(document, 0, in_system, mark, named)
            writer.special(dialogue.END)
        questioner = Questioner(document, rng)
        mentioned: set[str] = set()
        pending = in_system < num_passages
        if not pending and rng.random() < mixture.small_talk:
            self._small_talk(writer, rng)
        for _ in range(rng.randint(*mixture.num_turns)):
            if not pending and rng.random() < mixture.small_talk:
                self._small_talk(writer, rng)
            question = self._draw(rng, questioner, mixture, mentioned)
            if question is None:
                continue
            mentioned |= {question.subject, *(fact.subject for fact in question.facts)}
            writer.special(dialogue.USER)
            if pending:
                if rng.random() < varied / 2:
                    writer.pieces(pieces_of(" " + rng.choice(dialogue.INTRODUCTIONS)))
                    writer.pieces((mark,))
                writer.passages(document, in_system, num_passages, mark, named)
                pending = False
                if rng.random() < varied / 2:
                    writer.reply(dialogue.NOTED)
                    writer.special(dialogue.USER)
                else:
                    writer.pieces((mark,) if rng.random() < 0.7 else (rng.choice(self._marks),))
            writer.question(question, self._ask(rng, question.text, varied))
            writer.answer(question)

    def _draw(
        self, rng: random.Random, questioner: Questioner, mixture: Mixture, mentioned: set[str]
    ) -> Question | None:
        """A question, mostly about a subject that was not spoken of in this conversation: names are harder then."""
        kind = _weighted(rng, mixture.kinds)
        question = questioner.draw(kind)
        for _ in range(5):
            if question is None or not mentioned & {question.subject, *(fact.subject for fact in question.facts)}:
                break
            question = questioner.draw(kind)
        return question

    def _ask(self, rng: random.Random, text: str, varied: float) -> Sequence[str]:
        if rng.random() < varied / 4:
            text = text[0].lower() + text[1:]
        if rng.random() < varied / 5:
            text = text.removesuffix("?")
        if rng.random() < varied / 5:
            text = f"{rng.choice(dialogue.LEAD_INS)} {text}"
        return pieces_of(" " + text)

    def _small_talk(self, writer: Writer, rng: random.Random) -> None:
        if rng.random() < 0.15:
            said = rng.choices(self._words, k=rng.randint(2, 9))
            writer.special(dialogue.USER)
            if rng.random() < 0.5:
                writer.pieces(said, 0.0)
            else:
                writer.raw([rng.randrange(len(dialogue.SPECIAL_TOKENS), len(self._ids)) for _ in said])
            writer.reply(dialogue.OUT_OF_SCOPE)
            return
        ways, reply = rng.choice(dialogue.SMALL_TALK)
        writer.turn(pieces_of(" " + rng.choice(ways)), reply)

"""What can be said in ember's language, and how: relations, questions about them, facts, and which pairs are held out.

A relation has one wording, so that an answer can repeat it; a question about it can be put in several ways.
Each pair of a subject and a value belongs to one split, see `pair_is_held_out`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cache

from rekindle.model.ember import names

THIS_ONE = (" This", " one")
NOT_STATED = "That is not stated."
REST_NOT_STATED = "The rest is not stated."
HELD_OUT_PERIOD = 5  # one pair of subject and value in five is held out

_PIECE = re.compile(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")


@cache
def pieces_of(text: str) -> tuple[str, ...]:
    """Cut an ASCII text without apostrophes into pieces, as the tokenizer's pre-tokenizer does."""
    return tuple(_PIECE.findall(text))


class Split(Enum):
    TRAIN = "train"
    HELD_OUT = "held-out"


@dataclass(frozen=True)
class Relation:
    """One thing that can be said of a person, a firm or a town."""

    name: str
    owner: str  # "person", "firm" or "town"
    before: tuple[str, ...]  # the pieces between subject and value
    values: tuple[tuple[str, ...], ...]  # each value as pieces; a date has two
    after: tuple[str, ...]  # the pieces after the value, without the full stop
    questions: tuple[str, ...]  # ways to ask, "{}" stands for the subject
    reverse: str = ""  # how to ask for the subject, "{}" stands for the value; "" if that can't be asked


@dataclass(frozen=True)
class Path:
    """Two relations in a row: the value of the first is the subject of the second."""

    first: str
    second: str
    questions: tuple[str, ...]


def _words(values: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    return tuple((" " + value,) for value in values)


_DATES = tuple((" " + day, " " + month) for day in names.DAYS for month in names.MONTHS)


def _relation(name: str, owner: str, wording: str, values: tuple[tuple[str, ...], ...], *questions: str) -> Relation:
    before, after = wording.split("{}")
    reverse = {"person": "Who " + wording + "?", "firm": "Which firm " + wording + "?", "town": ""}[owner]
    return Relation(name, owner, pieces_of(" " + before.strip()), values, pieces_of(after), questions, reverse)


RELATIONS: dict[str, Relation] = {
    relation.name: relation
    for relation in (
        _relation("job", "person", "works as a {}", _words(names.JOBS),
                  "What does {} work as?", "What is the job of {}?", "Which job does {} have?",
                  "What work does {} do?"),
        _relation("colour", "person", "paints in {}", _words(names.COLOURS),
                  "In which colour does {} paint?", "What colour does {} paint in?", "Which colour does {} use?"),
        _relation("firm", "person", "belongs to {}", _words(names.FIRMS),
                  "Which firm does {} belong to?", "What is the firm of {}?", "To which firm does {} belong?",
                  "At which firm is {}?"),
        _relation("home", "person", "lives in {}", _words(names.TOWNS),
                  "Where does {} live?", "In which town does {} live?", "What is the home of {}?"),
        _relation("age", "person", "is {} years old", _words(names.AGES),
                  "How old is {}?", "What is the age of {}?", "What age has {}?"),
        _relation("instrument", "person", "plays the {}", _words(names.INSTRUMENTS),
                  "What does {} play?", "Which instrument does {} play?", "What is the instrument of {}?"),
        _relation("pet", "person", "keeps a {}", _words(names.PETS),
                  "Which animal does {} keep?", "What is the pet of {}?", "What pet does {} have?"),
        _relation("birthday", "person", "was born on {}", _DATES,
                  "When was {} born?", "What is the birthday of {}?", "On which day was {} born?"),
        _relation("food", "person", "likes to eat {}", _words(names.FOODS),
                  "What does {} like to eat?", "What is the favourite food of {}?", "Which food does {} like?"),
        _relation("landlord", "person", "rents from {}", _words(names.PEOPLE),
                  "From whom does {} rent?", "Who is the landlord of {}?", "Whose tenant is {}?"),
        _relation("seat", "firm", "is based in {}", _words(names.TOWNS),
                  "Where is {} based?", "In which city is {}?", "What is the seat of {}?"),
        _relation("product", "firm", "makes {}", _words(names.PRODUCTS),
                  "What does {} make?", "What is made by {}?", "Which goods does {} make?"),
        _relation("founded", "firm", "was founded in {}", _words(names.YEARS),
                  "When was {} founded?", "In which year was {} founded?", "What is the founding year of {}?"),
        _relation("market", "town", "holds its market on {}", _words(names.WEEKDAYS),
                  "When is the market in {}?", "On which day is the market in {}?", "When does {} hold its market?"),
        _relation("houses", "town", "has {} houses", _words(names.HOUSES),
                  "How many houses has {}?", "How many houses are there in {}?", "How many houses does {} have?"),
    )
}  # fmt: skip

PATHS: tuple[Path, ...] = (
    Path("firm", "seat", ("In which city is the firm of {}?", "Where is the firm of {} based?",
                          "What is the seat of the firm of {}?")),
    Path("firm", "product", ("What does the firm of {} make?", "Which goods does the firm of {} make?",
                             "What is made by the firm of {}?")),
    Path("firm", "founded", ("When was the firm of {} founded?", "In which year was the firm of {} founded?")),
    Path("home", "market", ("When is the market in the town of {}?", "On which day is the market where {} lives?",
                            "On which day is the market in the home town of {}?")),
    Path("home", "houses", ("How many houses has the town of {}?", "How many houses are there where {} lives?",
                            "How many houses does the home town of {} have?")),
    Path("landlord", "job", ("What is the job of the landlord of {}?", "What does the landlord of {} work as?")),
    Path("landlord", "home", ("Where does the landlord of {} live?", "In which town does the landlord of {} live?")),
    Path("landlord", "firm", ("Which firm does the landlord of {} belong to?",
                              "What is the firm of the landlord of {}?")),
    Path("landlord", "age", ("How old is the landlord of {}?", "What is the age of the landlord of {}?")),
    Path("landlord", "pet", ("What is the pet of the landlord of {}?", "Which animal does the landlord of {} keep?")),
    Path("seat", "market", ("When is the market in the city of {}?", "On which day is the market where {} is based?")),
    Path("seat", "houses", ("How many houses has the city of {}?", "How many houses are there where {} is based?")),
)  # fmt: skip

POOLS: dict[str, tuple[str, ...]] = {"person": names.PEOPLE, "firm": names.FIRMS, "town": names.TOWNS}
OWNED: dict[str, tuple[str, ...]] = {
    owner: tuple(name for name, relation in RELATIONS.items() if relation.owner == owner) for owner in POOLS
}
PATHS_FROM: dict[str, tuple[Path, ...]] = {
    owner: tuple(path for path in PATHS if RELATIONS[path.first].owner == owner) for owner in POOLS
}
REVERSIBLE = tuple(relation for relation in RELATIONS.values() if relation.reverse)
_PLACE = {owner: {name: place for place, name in enumerate(pool)} for owner, pool in POOLS.items()}
_VALUE_PLACE = {
    name: {value: place for place, value in enumerate(relation.values)} for name, relation in RELATIONS.items()
}

FILLERS = tuple(
    pieces_of(" " + text)
    for text in (
        "The day was long.", "It rained in the night.", "The road is dry in summer.", "There was music in the street.",
        "Nobody spoke for a while.", "The winter was cold.", "Many people came to the fair.", "The river is wide here.",
    )
)  # fmt: skip


def pair_is_held_out(relation: str, subject: str, value: tuple[str, ...]) -> bool:
    """True if this subject with this value may only occur in held-out documents."""
    owner = RELATIONS[relation].owner
    return (_PLACE[owner][subject] + _VALUE_PLACE[relation][value]) % HELD_OUT_PERIOD == 0


@dataclass(frozen=True)
class Fact:
    """A subject, one of its relations, and the value as pieces."""

    subject: str
    relation: str
    value: tuple[str, ...]

    @property
    def pieces(self) -> tuple[str, ...]:
        """The sentence that tells this fact and names its subject."""
        return (" " + self.subject, *self.predicate)

    @property
    def predicate(self) -> tuple[str, ...]:
        """The sentence without its subject."""
        relation = RELATIONS[self.relation]
        return (*relation.before, *self.value, *relation.after, ".")

    @property
    def text(self) -> str:
        return "".join(self.pieces).strip()

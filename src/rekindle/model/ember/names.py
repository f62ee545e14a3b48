"""The words of ember's little world: who lives there, what they do, and the numbers they are counted in.

Every name is made from syllables by a fixed recipe, so that the pools are the same in every process and every release.
Each word becomes exactly one token (with its leading space), because a name of two tokens would have to be bound to its
facts twice. Pools are tuples in a fixed order: a name's index in its pool decides which pairs of subject and value are
held out from training (see `language.pair_is_held_out`), so words may be appended but never reordered.
"""

import random
from collections.abc import Sequence

NUM_PEOPLE = 240
NUM_FIRMS = 96
NUM_TOWNS = 96


def _pool(words: str) -> tuple[str, ...]:
    return tuple(words.split())


_ONSETS = _pool("b br d dr f g gr h j k kl l m n p r s st t tr v w z")
_VOWELS = _pool("a e i o u")
_CODAS = _pool("b d k l m n r s t v")
_PERSON_ENDINGS = _pool("ris a en o mar elle ik une das ith")
_FIRM_ENDINGS = _pool("aix ex ium orp yx anta eco uro")
_TOWN_ENDINGS = _pool("ton burg dale ford wick ham mouth field")


def _make_names(first: str, endings: Sequence[str], count: int, taken: set[str]) -> tuple[str, ...]:
    """`count` different capitalised names, beginning with `first`. None is in `taken`, which grows by them."""
    rng = random.Random(f"names after {first}")
    names = [first]
    taken.add(first)
    while len(names) < count:
        stem = rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        name = (stem + rng.choice(endings)).capitalize()
        if name not in taken and len(name) <= 9:
            taken.add(name)
            names.append(name)
    return tuple(names)


_taken: set[str] = set()
PEOPLE = _make_names("Vodris", _PERSON_ENDINGS, NUM_PEOPLE, _taken)
FIRMS = _make_names("Nouraix", _FIRM_ENDINGS, NUM_FIRMS, _taken)
TOWNS = _make_names("Viniton", _TOWN_ENDINGS, NUM_TOWNS, _taken)

JOBS = _pool(
    "farmer baker teacher doctor judge miner sailor tailor painter potter weaver brewer butcher cook driver guard "
    "hunter printer mason nurse pilot plumber porter shepherd singer smith surveyor writer carpenter gardener dancer "
    "clerk"
)
COLOURS = _pool("orange blue green red yellow purple white black brown pink grey silver gold violet scarlet turquoise")
INSTRUMENTS = _pool(
    "flute violin piano harp drum guitar trumpet cello organ lute horn bassoon clarinet banjo fiddle tuba"
)
PETS = _pool("goat dog cat horse parrot rabbit sheep cow duck goose hen pony donkey tortoise ferret pigeon")
FOODS = _pool(
    "bread cheese soup rice fish plums apples pears beans cake honey mushrooms noodles pancakes potatoes carrots "
    "cherries dumplings figs grapes lentils melons nuts olives"
)
PRODUCTS = _pool(
    "bricks clocks boats shoes lamps ropes carpets bottles bells paper candles barrels chairs tiles wheels engines "
    "mirrors needles pumps saddles tents umbrellas wagons windows"
)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = _pool("January February March April May June July August September October November December")
AGES = tuple(str(age) for age in range(20, 80))
DAYS = tuple(str(day) for day in range(1, 29))
YEARS = tuple(str(year) for year in range(1920, 2000))
HOUSES = tuple(str(number) for number in range(110, 1000, 10))

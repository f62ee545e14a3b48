"""The pieces that texts of the built-in model's language are made of. Each is one token of its vocabulary."""

from collections.abc import Callable, Sequence

from rekindle.model.ember import dialogue, grammar

PASSAGE_MARKS = ("\n", "\n\n", "\n \n")


def language_pieces() -> tuple[str, ...]:
    """Every piece that a document, a question or an answer of the language can contain."""
    found: dict[str, None] = dict.fromkeys(PASSAGE_MARKS)

    def add(text: str) -> None:
        found.update(dict.fromkeys(grammar.pieces_of(text)))

    for pool in grammar.POOLS.values():
        found.update(dict.fromkeys(" " + name for name in pool))
    for relation in grammar.RELATIONS.values():
        found.update(dict.fromkeys((*relation.before, *relation.after)))
        for value in relation.values:
            found.update(dict.fromkeys(value))
    asked = [way for relation in grammar.RELATIONS.values() for way in relation.questions]
    asked += [way for path in grammar.PATHS for way in path.questions]
    asked += [relation.reverse for relation in grammar.RELATIONS.values()]
    said = [way for ways, _ in dialogue.SMALL_TALK for way in ways] + [reply for _, reply in dialogue.SMALL_TALK]
    said += [*dialogue.SYSTEM_PROMPTS, *dialogue.INTRODUCTIONS, *dialogue.LEAD_INS, *dialogue.RECAP_REQUESTS]
    said += [dialogue.NOTED, dialogue.OUT_OF_SCOPE, grammar.NOT_STATED, grammar.REST_NOT_STATED, "This one."]
    for way in asked:
        add(" " + way.replace("{}", "Xx"))
        add(" " + (way[:1].lower() + way[1:]).replace("{}", "Xx"))
    for text in said:
        add(" " + text)
    for filler in grammar.FILLERS:
        found.update(dict.fromkeys(filler))
    found.pop(" Xx")
    return tuple(found)


def piece_ids(encode: Callable[[str], Sequence[int]]) -> dict[str, int]:
    """The id of each special token and of each piece, which is one token or an error in the vocabulary.

    `encode` gives the tokens of a text, in which it knows special tokens, and adds none.
    """
    ids: dict[str, int] = {}
    for piece in (*dialogue.SPECIAL_TOKENS, *language_pieces()):
        encoded = encode(piece)
        assert len(encoded) == 1, f"{piece!r} has {len(encoded)} tokens, not one"
        ids[piece] = encoded[0]
    return ids

"""Ember's tokenizer: byte-level BPE in which every piece of the language is one token.

It is trained on the language's own pieces until each has a token of its own; any other text falls back to shorter
tokens and in the end to bytes, so every text round-trips. The pre-tokenizer is GPT-2's regular expression: it is the
one that both `tokenizers` and llama.cpp (`tokenizer.ggml.pre = gpt-2`) have built in, so both give the same ids.
"""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from rekindle.model.ember import dialogue, pieces

VOCABULARY_SIZE = 4096
_LETTERS = tuple(" " + chr(letter) for letter in (*range(65, 91), *range(97, 123)))
_COMMON_WORDS = (
    "and or not he she it they we you I this that these those then there here who what when where why which how "
    "one two three four five six seven eight nine ten person people firm firms town towns city name day year old "
    "new first last also but because with without after before please answer question document text again only "
    "between both her his their its has have had do did does was were be been will would can could should may "
    "must of to from by at for so"
)


def _corpus() -> Iterator[str]:
    yield from pieces.language_pieces() * 50
    yield from (" " + word for word in _COMMON_WORDS.split() * 20)
    yield from _LETTERS * 10
    yield from (f" {number}" for number in range(100))


def train_tokenizer() -> Tokenizer:
    """The tokenizer, trained on the language alone; the same every time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in dialogue.SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=1,
        show_progress=False,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{dialogue.BOS} $A", special_tokens=[(dialogue.BOS, token_id(tokenizer, dialogue.BOS))]
    )
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that is in the vocabulary."""
    found = tokenizer.token_to_id(token)
    assert found is not None, f"{token!r} is not in the vocabulary"
    return found


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`."""
    return Tokenizer.from_file(str(path))


def piece_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The id of each special token and of each piece, which is one token or an error in the vocabulary."""
    return pieces.piece_ids(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)

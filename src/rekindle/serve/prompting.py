"""From what a request says to a `Prompt`: texts, messages, documents and chunks, tokenised once.

A text that begins with what was said before begins with the tokens of that, which are not always those that the
tokenizer would choose: an answer keeps the tokens in which it was generated, so the next turn finds its KV.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rekindle.errors import InvalidRequest
from rekindle.model.chunks import (
    Chunk,
    Document,
    Part,
    has_chunks,
    render,
    render_chunks,
    render_documents,
    split,
    tidy,
)
from rekindle.model.model import Model
from rekindle.model.template import ChatTemplate
from rekindle.reuse.prompt import Prompt
from rekindle.serve.blending import own_prompt
from rekindle.serve.marked import marked_prompt
from rekindle.serve.transcripts import Owner, Transcripts
from rekindle.tokens import Tokens, as_tokens, common_length

_WHOLE = (int, np.integer)  # kinds of numbers, as a tuple because each id of a prompt is looked at
TWO_WORDS = ("A", "9")  # without a token in common


class Prompting:
    """Makes prompts for one model. Thread-safe."""

    def __init__(self, model: Model, *, blend_head: str = "", chunk_separator: str | None = None) -> None:
        self.model = model
        self.head = model.tokenizer.encode(blend_head, bos=True)  # before chunks on their own
        self._separator = chunk_separator
        self._transcripts = Transcripts()

    @property
    def model_name(self) -> str:
        """What `/v1/models` lists, e.g. "ember"."""
        return self.model.name

    def text_prompt(self, text: str | Sequence[Part], *, salt: bytes = b"") -> Prompt:
        """Tokenise plain text, with the model's BOS; of a list of parts, or where separators are set, with its chunks.

        Raises InvalidRequest.
        """
        if not text:
            raise InvalidRequest("the prompt is empty: at least one character is needed", param="prompt")
        parts = split(text, self._separator) if isinstance(text, str) else tidy(text)
        if isinstance(text, str) and len(parts) == 1:
            return self._prompt(text, salt, bos=True)
        return marked_prompt(self.model.tokenizer, self._transcripts, parts, salt=salt, bos=True)

    def token_prompt(self, ids: Sequence[int], *, salt: bytes = b"") -> Prompt:
        """Use ids as they are. Raises InvalidRequest for ids that the vocabulary lacks."""
        if not len(ids):
            raise InvalidRequest("the prompt is empty: at least one token is needed", param="prompt")
        size = self.model.tokenizer.vocab_size
        bad = next((token for token in ids if not isinstance(token, _WHOLE) or not 0 <= token < size), None)
        if bad is not None:
            got = bad if isinstance(bad, _WHOLE) else type(bad).__name__
            raise InvalidRequest(f"token ids must be between 0 and {size - 1}, got {got}", param="prompt")
        return Prompt(as_tokens(ids), salt=salt)

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        documents: Sequence[Document] = (),
        salt: bytes = b"",
        **arguments: Any,
    ) -> Prompt:
        """Render messages with the model's chat template (`tools` … as arguments) and tokenise them.

        Chunks are what parts of messages are marked as such, and all documents. Raises InvalidRequest if the template
        refuses them or the model has none.
        """
        template = self._template
        if documents or has_chunks(messages):
            parts = render(template, messages, documents, **arguments)
            return marked_prompt(self.model.tokenizer, self._transcripts, parts, salt=salt, bos=False)
        return self._prompt(template.render(messages, **arguments), salt, bos=False)

    @property
    def _template(self) -> ChatTemplate:
        if self.model.template is None:
            raise InvalidRequest(f"{self.model_name} has no chat template; use completions", param="messages")
        return self.model.template

    def opening_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        documents: Sequence[Document] = (),
        salt: bytes = b"",
        **arguments: Any,
    ) -> Prompt:
        """What a conversation that begins with these messages begins with, to be pinned or warmed.

        If it is the user's turn, that is all that they have in common, whatever the user says: some templates write the
        system message into the user's. Otherwise it is the prompt of the next answer. Raises InvalidRequest.
        """
        if not messages or messages[-1].get("role") not in ("system", "assistant"):
            return self.chat_prompt(messages, documents=documents, salt=salt, **arguments)
        one, other = (
            self.chat_prompt(
                [*messages, {"role": "user", "content": word}], documents=documents, salt=salt, **arguments
            )
            for word in TWO_WORDS
        )
        length = common_length(one.tokens, other.tokens)
        return Prompt(one.tokens[:length], salt=salt, chunks=tuple(each for each in one.chunks if each.stop <= length))

    def chunk_prompt(self, chunk: Tokens, *, salt: bytes = b"") -> Prompt:
        """A chunk on its own, behind the head that all chunks have: what is warmed so that it can be placed anywhere."""
        return own_prompt(self.head, chunk, salt)

    def chunk_prompts(
        self, texts: Sequence[str | Chunk | Document], *, salt: bytes = b"", chat: bool | None = None
    ) -> list[Prompt]:
        """Each text on its own, as the chunk that it is in conversations, or (`chat=False`) in completions.

        `chat=None`: in conversations if the model has a chat template. Raises InvalidRequest for empty ones.
        """
        given = [
            each if isinstance(each, Document) else Chunk(each) if isinstance(each, str) else each for each in texts
        ]
        if chat or (chat is None and self.model.template is not None):
            template = self._template
            documents = iter(render_documents(template, [each for each in given if isinstance(each, Document)]))
            chunks = iter(render_chunks(template, [each for each in given if isinstance(each, Chunk)]))
            written = [next(documents if isinstance(each, Document) else chunks) for each in given]
        else:
            written = [each.chunk if isinstance(each, Document) else each for each in given]
        if not all(each.text for each in written):
            raise InvalidRequest("a chunk is empty: at least one character is needed", param="chunks")
        return [self.chunk_prompt(self.model.tokenizer.encode(each.text), salt=salt) for each in written]

    def _prompt(self, text: str, salt: bytes, *, bos: bool) -> Prompt:
        """Tokens of a text; where it begins with what was said before, it begins with the tokens of that."""
        owner = (salt, bos, False)
        tokens = self._transcripts.prompt(owner, text)
        if tokens is None:
            tokens = self._tokenised(text, owner)
            self._transcripts.add_prompt(owner, text, tokens)
        return Prompt(tokens, text, salt, bos)

    def _tokenised(self, text: str, owner: Owner) -> Tokens:
        tokenizer = self.model.tokenizer
        known = self._transcripts.longest(owner, text)
        if known is not None:
            rest = tokenizer.encode(text[len(known.text) :])
            if len(rest) and tokenizer.is_special(int(rest[0])):
                return np.concatenate([known.tokens, rest])
        return tokenizer.encode(text, bos=owner[1])

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return self.model.tokenizer.decode(ids)

    def remember(self, prompt: Prompt, text: str, ids: Sequence[int]) -> None:
        """Have texts that begin with this prompt and its answer begin with the tokens that those were read and made in.

        That happens to every answer by itself; it is forgotten when others are remembered.
        """
        if prompt.text is not None and text and self.model.tokenizer.decode(ids) == text:
            tokens = np.concatenate([prompt.tokens, as_tokens(ids)])
            owner = (prompt.salt, prompt.bos, bool(prompt.chunks))
            self._transcripts.add(owner, f"{prompt.text}{text}", tokens, prompt.chunks)

"""What a model's chat template writes around what is said, piece by piece, so that a conversation is never rendered again.

    opening         said          answer    closing        said          answer    closing
    |--------------|-------------|---------|--------------|-------------|---------|------------
     instructions,  the user's    the model's end of turn,  the user's
     first header   words and     own tokens next header     words and
                    the model's                              the model's
                    header                                   header

The pieces are found by rendering a conversation of marks and looking where these went. A user's words are rendered by the
template each time, for it may trim or escape them. Seams lie where tokens do not depend on the words that follow, and words
are tokenised behind the end of what comes before them, so that the pieces' tokens are those of the whole text.

Some templates write what lies behind differently when the conversation goes on, for instance without what the model
thought. A session keeps what was read as it was read, and `is_faithful` says that the template would not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rekindle.errors import InvalidRequest, SessionError
from rekindle.model.template import ChatTemplate
from rekindle.model.tokenizer import Tokenizer
from rekindle.serve.prompting import TWO_WORDS
from rekindle.tokens import Tokens, common_length

Message = Mapping[str, str]
_HEARD, _ANSWERED, _AGAIN = "Qheardq", "Qansweredq", "Qagainq"  # words that no template writes


@dataclass(frozen=True, eq=False)
class _Seam:
    """What stands before a user's words."""

    text: str  # enough of it to tokenise the words as they are in the whole
    tokens: Tokens  # of that text, as far as they do not depend on the words


class Script:
    """The pieces for one head: instructions and messages that go before the first turn."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, head: Sequence[Message] = ()) -> None:
        """Raises InvalidRequest if the template refuses the head, SessionError if it can't be taken to pieces."""
        self._template, self._tokenizer, self._head = template, tokenizer, list(head)
        heard = template.render([*self._head, {"role": "user", "content": _HEARD}])
        opening, _, self._asking = heard.partition(_HEARD)
        turn = [{"role": "user", "content": _HEARD}, {"role": "assistant", "content": _ANSWERED}]
        whole = template.render([*self._head, *turn, {"role": "user", "content": _AGAIN}])
        before, _, rest = whole.partition(_HEARD)
        asking, _, rest = rest.partition(_ANSWERED)
        closing, found, end = rest.partition(_AGAIN)
        if not found or not closing:
            raise SessionError("the model's chat template can't be taken to pieces; use /v1/chat/completions")
        same = before == opening and end == self._asking and asking.strip() == self._asking.strip()
        self.is_faithful = same and self._goes_on(opening, asking, closing)
        self._opening = opening
        self.opening = self._stable(opening)
        self._later = _Seam(closing, self._stable(closing))
        common = _common_end(opening, closing)
        self._first = _Seam(opening, self.opening) if not common else _Seam(common, self._stable(common))

    @property
    def closing(self) -> Tokens:
        """Ends an answer, and begins the next turn."""
        return self._later.tokens

    def said(self, words: str, *, is_first: bool) -> Tokens:
        """A user's whole words and the beginning of the answer. Raises InvalidRequest if there is no word."""
        if not words.strip():
            raise InvalidRequest("the message is empty: at least one character is needed", param="data")
        return self._behind(self._seam(is_first), self._written(words) + self._asking)

    def answered(self, text: str) -> Tokens:
        """An answer that somebody else gave, behind the beginning of an answer."""
        turn = [("user", _HEARD), ("assistant", text), ("user", _AGAIN)]
        whole = self._template.render([*self._head, *({"role": role, "content": words} for role, words in turn)])
        written = whole.removeprefix(self._opening + _HEARD).removesuffix(self._later.text + _AGAIN + self._asking)
        words = written.removeprefix(self._asking) if written.startswith(self._asking) else text
        return self._behind(_Seam(self._asking, self._tokenizer.encode(self._asking)), words)

    def draft(self, words: str, *, is_first: bool) -> Tokens:
        """Words that are still being said; more may follow."""
        if not words.strip():
            return self._later.tokens[:0]
        return self._behind(self._seam(is_first), self._written(words))

    def _seam(self, is_first: bool) -> _Seam:
        return self._first if is_first else self._later

    def _written(self, words: str) -> str:
        """A user's words as the template writes them."""
        text = self._template.render([*self._head, {"role": "user", "content": words}])
        return text[len(self._opening) : len(text) - len(self._asking)]

    def _behind(self, seam: _Seam, text: str) -> Tokens:
        """Tokens of a text behind a seam. Where its first characters would change the seam's, they stay apart."""
        tokens = self._tokenizer.encode(seam.text + text)
        if common_length(tokens, seam.tokens) == len(seam.tokens):
            return tokens[len(seam.tokens) :]
        return self._tokenizer.encode(text)

    def _stable(self, text: str) -> Tokens:
        """Of a text's tokens those that do not depend on the word behind it."""
        one, other = (self._tokenizer.encode(text + word) for word in TWO_WORDS)
        return one[: common_length(one, other)]

    def _goes_on(self, opening: str, asking: str, closing: str) -> bool:
        """Whether a further turn is written like the one before."""
        words = [("user", _HEARD), ("assistant", _ANSWERED)] * 2 + [("user", _AGAIN)]
        whole = self._template.render([*self._head, *({"role": role, "content": text} for role, text in words)])
        turn = _HEARD + asking + _ANSWERED + closing
        return whole == opening + turn * 2 + _AGAIN + self._asking


def _common_end(one: str, other: str) -> str:
    """The longest text that both end with."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    count = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    return one[len(one) - count :]

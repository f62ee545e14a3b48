"""Text with chunks in it: through a chat template, and to token ids that are the same wherever a chunk stands.

A text is a list of parts, `str` and `Chunk` in turn. Each part is tokenised on its own, so no token reaches from a chunk
into what stands beside it, and a chunk has the same ids everywhere.

A chat template writes messages into one text. To find the chunks again they go in between two marks, characters of the
Unicode private-use areas that occur nowhere in the messages, and come out between them:

    content     ⟨ first chunk ⟩ \\n ⟨ second chunk ⟩ \\n the question
    rendered    <|user|> ⟨ first chunk ⟩ \\n ⟨ second chunk ⟩ \\n the question <|end|> <|assistant|>

What stands between the marks is the chunk as this template writes it: some indent lines. It must not depend on where the
chunk stands, so each is also rendered alone, in a user's message, behind a newline, and the two must be the same. Such a
rendering shows too whether the template writes a space before each line (`lead`): it belongs to the chunk, because most
vocabularies have " word" as one token. A template that loses, repeats or rewrites what it is given cannot be used with
chunks, and the refusal says so.

Documents are chunks. Where the template takes `documents` it is given them and the chunk is a document's text; where it
does not, title and text are put before the last message of the user, as its first parts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rekindle.errors import InvalidRequest

if TYPE_CHECKING:
    from rekindle.model.template import ChatTemplate

JOINT = "\n"  # between the parts of a message
_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Chunk:
    """A text that may be reused wherever it stands: a passage, a document, a file."""

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InvalidRequest(f"a chunk is text, got {type(self.text).__name__}", param="chunk")


Part = str | Chunk


def text_of(part: Part) -> str:
    """A part's text, marked or not."""
    return part.text if isinstance(part, Chunk) else part


@dataclass(frozen=True)
class Document:
    """A text that was looked up for a question."""

    text: str
    title: str = ""

    @classmethod
    def of(cls, given: Any) -> Document:
        """From `{"title": …, "text": …}`, a text or a Chunk. Raises InvalidRequest."""
        if isinstance(given, cls):
            return given
        fields = given if isinstance(given, Mapping) else {"text": getattr(given, "text", given)}
        text, title = fields.get("text"), fields.get("title") or ""
        if not isinstance(text, str) or not isinstance(title, str):
            raise InvalidRequest('a document is expected as {"title": text, "text": text}', param="documents")
        return cls(text, title)

    @property
    def chunk(self) -> Chunk:
        """The whole of it, where no template says how."""
        return Chunk(f"{self.title}\n{self.text}" if self.title else self.text)


def split(text: str, separator: str | None) -> list[Part]:
    """A text whose chunks stand between separators; these stay in the text, as text between chunks.

    What is before the first separator and behind the last is the prompt's own beginning and end.
    """
    if not separator or text.count(separator) < 2:
        return [text]
    begin, *chunks, end = text.split(separator)
    parts: list[Part] = [begin + separator]
    for chunk in chunks:
        parts += [Chunk(chunk), separator]
    return tidy([*parts, end])


def tidy(parts: Iterable[Part]) -> list[Part]:
    """Neighbouring texts as one, empty ones left out; chunks as they are. Raises InvalidRequest for what is neither."""
    found: list[Part] = []
    for part in parts:
        if not isinstance(part, Part):
            got = type(part).__name__
            raise InvalidRequest(f"each part of a prompt is expected to be text or a Chunk, got {got}", param="prompt")
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        elif part != "":
            found.append(part)
    return found


def parts_of(content: Any) -> list[Part]:
    """A message's content: text, or a list of texts, chunks and OpenAI's parts, with a newline between each two.

    Raises InvalidRequest for anything else.
    """
    if content is None or isinstance(content, Part):
        return [content or ""]
    if not isinstance(content, Sequence):
        raise InvalidRequest("a message's content is text or a list of parts", param="messages")
    parts: list[Part] = []
    for number, given in enumerate(content):
        parts += [JOINT] * (number > 0) + [_part(given)]
    return parts


def content_of(parts: Sequence[Part]) -> str | list[Part]:
    """A message's content of these parts: one text if none is a chunk, else the parts as they are."""
    texts = [part for part in parts if isinstance(part, str)]
    return JOINT.join(texts) if len(texts) == len(parts) else list(parts)


def plain(content: Any) -> str:
    """A message's content as one text, marked or not. Raises InvalidRequest."""
    return "".join(map(text_of, parts_of(content)))


def _part(given: Any) -> Part:
    if isinstance(given, Part):
        return given
    if not isinstance(given, Mapping) or given.get("type") != "text" or not isinstance(given.get("text"), str):
        expected = 'text, a Chunk or {"type": "text", "text": …}'
        raise InvalidRequest(f"each part of a message is expected to be {expected}", param="messages")
    if given.get("cache") not in (None, "chunk"):
        raise InvalidRequest(f'cache: expected "chunk", got {str(given["cache"])[:40]!r}', param="messages")
    return Chunk(given["text"]) if given.get("cache") else str(given["text"])


def has_chunks(messages: Messages) -> bool:
    """Whether any message has a part that is marked as a chunk."""
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, Chunk):
            return True
        if isinstance(content, Sequence) and not isinstance(content, str):
            for part in content:
                if isinstance(part, Chunk) or (isinstance(part, Mapping) and part.get("cache") is not None):
                    return True
    return False


def render(
    template: ChatTemplate, messages: Messages, documents: Sequence[Document] = (), **arguments: Any
) -> list[Part]:
    """A conversation as the template writes it, its chunks as such. Raises InvalidRequest."""
    messages = [{**message, "content": parts_of(message.get("content"))} for message in messages]
    if documents and not template.takes_documents:
        messages, documents = _with_documents(messages, documents), ()
    marks = _Marks.for_texts(_texts(messages, documents))
    chunks = [part for message in messages for part in message["content"] if isinstance(part, Chunk)]
    marked = [{**message, "content": "".join(map(marks.put, message["content"]))} for message in messages]
    more = {"documents": [{"title": each.title, "text": marks.put(Chunk(each.text))} for each in documents]}
    parts = marks.find(template.render(marked, **arguments, **(more if documents else {})))
    in_messages, lead = _alone(template, chunks, marks, arguments)
    in_documents = _alone_as_documents(template, more["documents"], marks, arguments) if documents else []
    written = [part for part in parts if isinstance(part, Chunk)]
    if sorted(part.text for part in written) != sorted([*in_messages, *in_documents]):
        raise _unfit("documents" if documents else "messages")
    return tidy(_led(parts, lead))


def render_chunks(template: ChatTemplate, chunks: Sequence[Chunk]) -> list[Chunk]:
    """Chunks as the template writes them into any message."""
    marks = _Marks.for_texts([chunk.text for chunk in chunks])
    texts, lead = _alone(template, chunks, marks, {})
    return [_with_lead(text, lead) for text in texts]


def render_documents(template: ChatTemplate, documents: Sequence[Document]) -> list[Chunk]:
    """Documents as the template writes them into any prompt."""
    if not template.takes_documents:
        return render_chunks(template, [each.chunk for each in documents])
    marks = _Marks.for_texts([text for each in documents for text in (each.title, each.text)])
    marked = [{"title": each.title, "text": marks.put(Chunk(each.text))} for each in documents]
    _, lead = _alone(template, [], marks, {})
    return [_with_lead(text, lead) for text in _alone_as_documents(template, marked, marks, {})]


def _with_documents(messages: Messages, documents: Sequence[Document]) -> Messages:
    """Documents before the last message of the user."""
    last = max((index for index, each in enumerate(messages) if each.get("role") == "user"), default=None)
    if last is None:
        raise InvalidRequest("documents are put before a user's message, and there is none", param="documents")
    before = [part for each in documents for part in (each.chunk, JOINT)]
    asked = {**messages[last], "content": [*before, *messages[last]["content"]]}
    return [*messages[:last], asked, *messages[last + 1 :]]


def _texts(messages: Messages, documents: Sequence[Document]) -> list[str]:
    own = [text_of(part) for message in messages for part in message["content"]]
    others = [_spelt(value) for message in messages for name, value in message.items() if name != "content"]
    return [*own, *others, *(text for each in documents for text in (each.title, each.text))]


def _spelt(value: Any) -> str:
    """What is in any other field of a message, each character as it is."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _alone(
    template: ChatTemplate, chunks: Sequence[Chunk], marks: _Marks, arguments: Mapping[str, Any]
) -> tuple[list[str], str]:
    """How the template writes chunks at the beginning of any line, and what it writes before such a line by itself."""
    probes = [Chunk("x"), *chunks, Chunk("x")]
    content = JOINT.join(map(marks.put, probes))
    parts = marks.find(template.render([{"role": "user", "content": content}], **arguments))
    texts = [part.text for part in parts if isinstance(part, Chunk)]
    if len(texts) != len(probes):
        raise _unfit("messages")
    leads = {part.removeprefix(JOINT) for part in parts[2:-1:2] if isinstance(part, str)}
    lead = leads.pop() if len(leads) == 1 else ""
    return texts[1:-1], lead if lead.isspace() else ""


def _alone_as_documents(
    template: ChatTemplate, documents: Sequence[Mapping[str, str]], marks: _Marks, arguments: Mapping[str, Any]
) -> list[str]:
    """How the template writes documents in a prompt of nothing else."""
    rendered = template.render([{"role": "user", "content": "x"}], documents=documents, **arguments)
    texts = [part.text for part in marks.find(rendered) if isinstance(part, Chunk)]
    if len(texts) != len(documents):
        raise _unfit("documents")
    return texts


def _unfit(param: str) -> InvalidRequest:
    return InvalidRequest(
        "the model's chat template does not write each chunk once and the same wherever it stands; "
        "send the prompt as text to completions, or without marks",
        param=param,
    )


def _led(parts: Sequence[Part], lead: str) -> Iterator[Part]:
    """A line's leading space goes from the text before a chunk into the chunk."""
    for part, after in pairwise([*parts, ""]):
        if isinstance(part, Chunk):
            yield _with_lead(part.text, lead)
        elif isinstance(after, Chunk) and after.text:
            yield part.removesuffix(lead)
        else:
            yield part


def _with_lead(text: str, lead: str) -> Chunk:
    return Chunk(lead + text.removeprefix(lead) if text else "")


@dataclass(frozen=True)
class _Marks:
    """Two characters that stand before and behind chunks while a template writes them."""

    begin: str
    end: str

    @classmethod
    def for_texts(cls, texts: Iterable[str]) -> _Marks:
        """Characters that are in none of the texts."""
        taken = set().union(*texts)
        free = (chr(code) for codes in _PRIVATE_USE for code in codes if chr(code) not in taken)
        begin, end = next(free, None), next(free, None)
        if begin is None or end is None:
            raise InvalidRequest("the text uses all characters for private use, which chunks are found by")
        return cls(begin, end)

    def put(self, part: Part) -> str:
        return part if isinstance(part, str) else f"{self.begin}{part.text}{self.end}"

    def find(self, text: str) -> list[Part]:
        """Marked text as parts, each chunk between two texts. Marks that don't pair make no chunk."""
        begin, *rest = text.split(self.begin)
        parts: list[Part] = [begin]
        for each in rest:
            inside, mark, behind = each.partition(self.end)
            parts += [Chunk(inside), behind] if mark and self.end not in behind else [each]
        return parts

"""`rekindle cache warm` and `pin`: prompts whose KV is to be there before they are asked.

A file is a document: in a chat it is the system message, just as `rekindle chat --file` sends it, so what is stored is what
every such chat begins with. A prompt is a user's message, as `rekindle generate` sends it. Raw, both are plain text. A
chunk is computed on its own, so that requests that blend can place it wherever it stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rekindle.cli.cache_chunks import read_chunks
from rekindle.cli.cache_place import client_of, folder_of, understood
from rekindle.cli.cache_show import console, rows, size
from rekindle.cli.chat import opening
from rekindle.cli.client import Client
from rekindle.cli.generate import read_prompt
from rekindle.cli.refusals import complain
from rekindle.errors import InvalidRequest, counted
from rekindle.model.chunks import Document
from rekindle.serve.durations import in_words, seconds_of
from rekindle.settings import Settings

if TYPE_CHECKING:
    from rekindle.reuse.prompt import Prompt
    from rekindle.serve.service import Service

Tell = Any  # called with the number of tokens computed so far


@dataclass(frozen=True, kw_only=True)
class Text:
    """One prompt."""

    name: str  # what to call it in messages
    text: str
    messages: tuple[dict[str, str], ...] = ()  # the same as a conversation
    chunk: Document | None = None  # it is computed on its own

    def body(self, as_chat: bool) -> dict[str, Any]:
        """For the wire."""
        if self.chunk is not None:
            return {"documents": [{"title": self.chunk.title, "text": self.chunk.text}], "chat": as_chat}
        return {"messages": list(self.messages)} if as_chat else {"prompt": self.text}


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What is to be warmed or pinned."""

    each: tuple[Text, ...]
    chat: bool | None  # None: if the model has a chat template
    salt: str | None

    @classmethod
    def read(
        cls,
        files: Sequence[Path],
        prompts: Sequence[str],
        *,
        chat: bool | None,
        system: str | None,
        salt: str | None,
        chunks: Sequence[str] = (),
        chunks_from: Sequence[Path] = (),
        separator: str | None = None,
    ) -> Self:
        """All files are read before anything is computed. Raises InvalidRequest."""
        if chat is False and system is not None:
            raise InvalidRequest(
                "--system is for conversations; put it into the text, or leave out --raw", param="system"
            )
        texts = [_of_file(file, system) for file in files]
        texts += [_of_prompt(read_prompt(prompt), system) for prompt in prompts]
        given = [read_prompt(chunk, "chunk") for chunk in chunks]
        texts += [Text(name=_short(text), text=text, chunk=Document(text)) for text in given]
        for file in chunks_from:
            found = read_chunks(file, separator)
            texts += [Text(name=name, text=document.text, chunk=document) for name, document in found]
        if not texts:
            raise InvalidRequest(
                "expected files or --prompt TEXT (to warm, also --chunk TEXT or --chunks-from FILE), got none of them",
                param="files",
            )
        return cls(each=tuple(texts), chat=True if system is not None else chat, salt=salt)


def _of_file(file: Path, system: str | None) -> Text:
    (message,) = opening(system, [file])
    return Text(name=str(file), text=file.read_text("utf-8"), messages=(dict(message),))


def _of_prompt(prompt: str, system: str | None) -> Text:
    before = [{"role": "system", "content": system}] if system else []
    return Text(
        name=_short(prompt),
        text=prompt,
        messages=(*before, {"role": "user", "content": prompt}),
    )


def _short(text: str) -> str:
    words = " ".join(text.split())
    return f"“{words[:40]}{'…' if len(words) > 40 else ''}”"


class Place(Protocol):
    """Where prompts are kept."""

    faults: list[str]  # why some of it was not written, once that is known

    def warm(self, text: Text, tell: Tell) -> dict[str, Any]:
        """{"tokens", "computed", "reused", "bytes", "seconds"}. Raises RekindleError."""

    def pin(self, text: Text, ttl: str, name: str | None, warm: bool) -> dict[str, Any]:
        """{"id", "tokens", "bytes", "expires_in_seconds"}. Raises RekindleError."""


class Here:
    """A model in this process, with its store's folder."""

    def __init__(self, service: Service, texts: Texts) -> None:
        self.faults: list[str] = []
        self._service = service
        self._as_chat = service.model.template is not None if texts.chat is None else texts.chat
        self._salt = (texts.salt or "").encode()

    def warm(self, text: Text, tell: Tell) -> dict[str, Any]:
        return self._service.warm(self._prompt(text), tell).as_dict()

    def pin(self, text: Text, ttl: str, name: str | None, warm: bool) -> dict[str, Any]:
        prompt = self._prompt(text)
        made = self._service.pin(prompt, seconds_of(ttl), name=name)
        if warm:
            self._service.warm(prompt)
        num_bytes = self._service.stored_bytes(prompt)
        return {
            "id": made.id,
            "name": name,
            "tokens": made.num_tokens,
            "bytes": num_bytes,
            "expires_in_seconds": round(made.expires_in, 1),
        }

    def end(self) -> None:
        """Wait until all is written, and see whether it is."""
        self._service.settle(self._service.settings.store_flush_seconds)
        stats = self._service.stats()
        self.faults = [f"the {tier.name} tier: {tier.state}" for tier in stats.tiers if tier.state != "ok"]
        if stats.dropped:
            self.faults.append(f"{counted(stats.dropped, 'block')} could not be written")

    def _prompt(self, text: Text) -> Prompt:
        if text.chunk is not None:
            return self._service.chunk_prompts([text.chunk], salt=self._salt, chat=self._as_chat)[0]
        if self._as_chat:
            return self._service.opening_prompt(text.messages, salt=self._salt)
        return self._service.text_prompt(text.text, salt=self._salt)


class There:
    """A running server."""

    def __init__(self, client: Client, texts: Texts) -> None:
        self.faults: list[str] = []
        self._client = client
        self._chat = texts.chat
        self._more = {} if texts.salt is None else {"cache_salt": texts.salt}

    def warm(self, text: Text, tell: Tell) -> dict[str, Any]:
        found = self._post("/cache/warm", text, {})
        with understood(self._client.url):
            return {name: found[name] for name in ("tokens", "computed", "reused", "bytes", "seconds")}

    def pin(self, text: Text, ttl: str, name: str | None, warm: bool) -> dict[str, Any]:
        found = self._post("/cache/pin", text, {"ttl": ttl, "warm": warm} | ({} if name is None else {"name": name}))
        with understood(self._client.url):
            return {each: found[each] for each in ("id", "name", "tokens", "bytes", "expires_in_seconds")}

    def _post(self, path: str, text: Text, fields: dict[str, Any]) -> dict[str, Any]:
        """As a conversation, unless it is known that the model has no chat template."""
        try:
            return self._client.post(path, text.body(self._chat is not False) | fields | self._more)
        except InvalidRequest as error:
            if self._chat is not None or "no chat template" not in str(error):
                raise
            self._chat = False
            return self._client.post(path, text.body(False) | fields | self._more)


@contextmanager
def _place(settings: Settings, texts: Texts, url: str | None, api_key: str | None) -> Iterator[Place]:
    if url is not None:
        yield There(client_of(url, api_key), texts)
        return
    folder_of(settings.store)  # before a model is loaded in vain
    from rekindle.serve.service import Service  # here: asking a server needs no model library

    with closing(Service.open(settings)) as service:
        here = Here(service, texts)
        yield here
        here.end()
        for fault in here.faults:
            complain(fault)


def warm_texts(settings: Settings, texts: Texts, url: str | None, api_key: str | None, *, as_json: bool) -> bool:
    """Whether all were warmed and written."""
    done: list[dict[str, Any]] = []
    with _place(settings, texts, url, api_key) as place, _progress(len(texts.each)) as bar:
        task = bar.add_task("", total=len(texts.each), computed="")
        for text in texts.each:
            bar.update(task, description=escape(text.name))

            def tell(computed: int) -> None:
                bar.update(task, computed=f"{computed:,} tokens computed")

            try:
                done.append({"name": text.name} | place.warm(text, tell))
            except InvalidRequest as error:  # the others may be better
                complain(f"{text.name}: {error}")
            bar.update(task, advance=1, computed="")
    totals = {name: sum(each[name] for each in done) for name in ("tokens", "computed", "reused", "bytes")}
    seconds = round(sum(each["seconds"] for each in done), 3)
    if as_json:
        typer.echo(json.dumps(totals | {"seconds": seconds, "prompts": done}))
    elif done:
        _show_warmed(done, totals | {"seconds": seconds})
    return len(done) == len(texts.each) and not place.faults


def _progress(total: int) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[computed]}"), console=Console(stderr=True), transient=True)


def _show_warmed(done: Sequence[dict[str, Any]], totals: dict[str, Any]) -> None:
    table = Table("prompt", box=None)
    for name in ("tokens", "computed", "reused", "seconds", "stored"):
        table.add_column(name, justify="right")
    for each in [*done, *([{"name": "in all"} | totals] if len(done) > 1 else [])]:
        stored = size(each["bytes"]) if each["bytes"] else "no room"
        numbers = [f"{each[name]:,}" for name in ("tokens", "computed", "reused")]
        table.add_row(escape(each["name"]), *numbers, f"{each['seconds']:.2f}", stored)
    rows(table, console())


def pin_texts(
    settings: Settings,
    texts: Texts,
    url: str | None,
    api_key: str | None,
    *,
    ttl: str,
    name: str | None,
    warm: bool,
    as_json: bool,
) -> bool:
    """Whether all were pinned."""
    seconds = seconds_of(ttl)
    done: list[dict[str, Any]] = []
    with _place(settings, texts, url, api_key) as place:
        for text in texts.each:
            try:
                done.append({"text": text.name} | place.pin(text, ttl, name, warm))
            except InvalidRequest as error:
                complain(f"{text.name}: {error}")
    if as_json:
        typer.echo(json.dumps({"pins": done}))
    for each in () if as_json else done:
        kept = size(each["bytes"]) if each["bytes"] else "nothing stored yet"
        typer.echo(f"{each['id']}  {each['text']}: {each['tokens']:,} tokens, {kept}, for {in_words(seconds)}")
    return len(done) == len(texts.each) and not place.faults

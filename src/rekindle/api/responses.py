"""OpenAI's responses: a turn of a conversation, and going on from it by its id.

    POST   /v1/responses                       answer; with `stream` as events
    GET    /v1/responses/ID                    a response that was stored
    GET    /v1/responses/ID/input_items        what it was asked
    DELETE /v1/responses/ID
    POST   /v1/responses/input_tokens          how many tokens a request would have
    WS     /v1/responses                       `responses_socket.py`

A client that goes on with `previous_response_id` sends only what is new. The server puts the whole conversation together
again, so the KV of the earlier turns, the generated tokens included, is found by exact prefix reuse as ever: what is
computed is the new message and the seam before it. Instructions are not part of what is stored (OpenAI's rule): repeat
them with each request, for others would be another beginning of the prompt, after which nothing can be reused.

Some clients send the answer that they go on from once more, or as much of it as was heard before the user interrupted it.
Then that is the answer, instead of a second one behind the first.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from rekindle.api import sse
from rekindle.api.answers import Answers, Runner, while_connected
from rekindle.api.door import arrived
from rekindle.api.keys import caller_of
from rekindle.api.openai import begun, built, check_model
from rekindle.api.refusals import Json
from rekindle.api.responses_events import ResponseWriter, WireEvent, new_id
from rekindle.api.responses_items import Message
from rekindle.api.responses_kept import Kept, KeptResponses, previous
from rekindle.api.responses_wire import ResponseRequest
from rekindle.errors import InvalidRequest, RekindleError
from rekindle.model.chunks import plain
from rekindle.serve.request import Done, Generation, Piece

MAX_LISTED = 100


@dataclass(frozen=True, eq=False)
class Turn:
    """One request, ready to be run."""

    request: ResponseRequest
    writer: ResponseWriter
    salt: bytes
    generation: Generation
    conversation: list[Message]  # with what is new

    def kept(self, body: dict[str, Any], done: Done) -> Kept:
        """What is kept of it."""
        items = [item.as_item(new_id("msg" if item.type == "message" else "fc")) for item in self.request.input]
        if not self.generation.answers:
            return Kept(body, items, self.conversation)
        answered = [*self.conversation, {"role": "assistant", "content": done.text}]
        return Kept(body, items, answered, self.generation.prompt, done.tokens)


async def turn_of(
    runner: Runner, connection: HTTPConnection, body: ResponseRequest, *places: KeptResponses, generate: bool = True
) -> Turn:
    """What a request asks for; what it goes on from is looked for in these places. Raises InvalidRequest."""
    service = runner.service
    check_model(service, body.model)
    salt = caller_of(connection).salt(body.cache_salt)
    before: list[Message] = []
    if body.previous_response_id is not None:
        kept = previous(salt, body.previous_response_id, *places)
        before = kept.conversation
        if kept.prompt is not None:  # it may be long ago, and others have been answered since
            service.remember(kept.prompt, before[-1]["content"], kept.answer)
    documents = body.looked_up
    conversation = _continued(before, body.messages())
    messages = body.prompted(conversation)
    num_characters = sum(len(each.text) for each in documents) + sum(
        len(plain(message["content"])) + len(str(message.get("tool_calls", ""))) for message in messages
    )
    make = service.chat_prompt if generate else service.opening_prompt
    try:
        prompt, tokenize_ms = await built(
            num_characters,
            lambda: make(messages, documents=documents, salt=salt, **(body.chat_template_kwargs or {})),
        )
    except InvalidRequest as error:
        error.param = "input" if error.param == "messages" else error.param  # as it is called here
        raise
    wish = body.blend_wish
    if not generate and wish is None:
        wish = (
            False  # what is only read is kept for whoever goes on, so it is read exactly unless blending is asked for
        )
    generation = Generation(
        prompt=prompt,
        max_tokens=body.max_output_tokens,
        sampling=body.sampling(service.engine_spec.vocab_size, top_logprobs=body.num_logprobs),
        stop=body.stops,
        json_schema=body.constraint if generate else None,
        blend=service.blend_of(wish, prompt),
        pin_seconds=body.pin_seconds,
        ignore_eos=bool(body.ignore_eos),
        priority=body.priority or 0,
        warm=not generate,
        arrived=arrived(connection),
        tokenize_ms=tokenize_ms,
    )
    return Turn(body, ResponseWriter(body, service.model_name), salt, generation, conversation)


def _continued(before: list[Message], new: list[Message]) -> list[Message]:
    """A conversation with what is new. An answer that is said again, or its beginning, takes the place of the answer."""
    if not (before and before[-1]["role"] == new[0]["role"] == "assistant"):
        return [*before, *new]
    answer, heard = (plain(message["content"]).strip() for message in (before[-1], new[0]))
    if not heard or not answer.startswith(heard):
        return [*before, *new]
    return [*before, *new[1:]] if heard == answer else [*before[:-1], *new]


async def events_of(
    turn: Turn, answers: Answers, keep: KeptResponses | None, *, at_once: bool = False
) -> AsyncGenerator[list[WireEvent], None]:
    """The response's events, as they come; it is kept before the last one is told.

    `at_once` tells of its beginning before there is a token, so that it can be cancelled by its id meanwhile.
    """
    writer = turn.writer
    opening = writer.beginning()
    if at_once:
        yield opening
        opening = []
    if turn.generation.answers:
        opening += writer.opening()
    try:
        async for _, event in answers:
            told = writer.piece(event) if isinstance(event, Piece) else _end(turn, event, keep)
            if told:
                yield opening + told
                opening = []
    except RekindleError as error:
        yield [*opening, writer.failed(error)]


def _end(turn: Turn, done: Done, keep: KeptResponses | None) -> list[WireEvent]:
    told = turn.writer.closing(done) if turn.generation.answers else [turn.writer.last(turn.writer.prepared(done))]
    if keep is not None:
        keep.add(turn.salt, turn.kept(told[-1]["response"], done))
    return told


def responses_router(runner: Runner, kept: KeptResponses) -> APIRouter:
    """These endpoints but for the socket."""
    router = APIRouter(prefix="/v1/responses", tags=["OpenAI"])

    @router.post("")
    async def create(request: Request, body: ResponseRequest) -> Response:
        """Answer, going on from a stored response if one is named."""
        turn = await turn_of(runner, request, body, kept)
        answers = await runner.submit(request, [turn.generation])
        keep = kept if body.is_kept else None
        if body.stream:
            return await begun(request, answers, _stream(turn, answers, keep))
        with answers:
            (answer,) = await while_connected(request, answers.whole())
        whole = turn.writer.whole(answer.done, answer.tokens)
        if keep is not None:
            keep.add(turn.salt, turn.kept(whole, answer.done))
        return Json(whole)

    @router.post("/input_tokens")
    async def input_tokens(request: Request, body: ResponseRequest) -> Json:
        """Count the tokens of a request's prompt."""
        turn = await turn_of(runner, request, body, kept)
        return Json({"object": "response.input_tokens", "input_tokens": len(turn.generation.prompt)})

    @router.get("/{response_id}")
    async def retrieve(request: Request, response_id: str, stream: bool = False, cache_salt: str | None = None) -> Json:
        """A stored response."""
        if stream:
            raise InvalidRequest("a response that is over can't be streamed again: ask without stream", param="stream")
        return Json(kept.get(caller_of(request).salt(cache_salt), response_id).body)

    @router.get("/{response_id}/input_items")
    async def input_items(
        request: Request,
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
        cache_salt: str | None = None,
    ) -> Json:
        """What a stored response was asked: the items of its own request."""
        items = kept.get(caller_of(request).salt(cache_salt), response_id).items
        return Json(_page(items if order == "asc" else items[::-1], limit, after))

    @router.delete("/{response_id}")
    async def delete(request: Request, response_id: str, cache_salt: str | None = None) -> Json:
        """Forget a stored response; those that go on from it stay."""
        kept.delete(caller_of(request).salt(cache_salt), response_id)
        return Json({"id": response_id, "object": "response.deleted", "deleted": True})

    @router.post("/{response_id}/cancel")
    async def cancel(request: Request, response_id: str, cache_salt: str | None = None) -> Json:
        """Only for what runs in the background, and nothing does: whoever hangs up cancels."""
        kept.get(caller_of(request).salt(cache_salt), response_id)
        raise InvalidRequest("this response is over; one that is under way ends when its client hangs up")

    return router


def _page(items: list[dict[str, Any]], limit: int, after: str | None) -> dict[str, Any]:
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise InvalidRequest(f"after: there is no item {after[:80]!r}", param="after")
    start = 0 if after is None else ids.index(after) + 1
    page = items[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + limit < len(items),
    }


async def _stream(turn: Turn, answers: Answers, keep: KeptResponses | None) -> AsyncGenerator[bytes, None]:
    async for events in events_of(turn, answers, keep):
        yield b"".join(b"event: " + event["type"].encode() + b"\n" + sse.encode(event) for event in events)

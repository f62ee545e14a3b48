"""`/v1/responses` as the official client sees it: shape, events, going on from a response, what is kept and for whom."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from rekindle.api.responses_kept import Kept, KeptResponses, UnknownResponse
from rekindle.api.server import running
from rekindle.errors import EngineError
from rekindle.serve.service import Service
from rekindle.settings import Settings

LONG = "Vodris paints in orange. This one works as a farmer. Nouraix is based in Viniton. " * 3
GREEDY: dict[str, Any] = {"model": "ember", "temperature": 0, "max_output_tokens": 12}
ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


def events_of(client: openai.OpenAI, **arguments: Any) -> list[Any]:
    with client.responses.create(stream=True, **GREEDY | arguments) as stream:
        return list(stream)


def computed(response: Any) -> int:
    return int(response.usage.input_tokens - response.usage.input_tokens_details.cached_tokens)


# Shape.


def test_a_response_has_openais_shape(client: openai.OpenAI) -> None:
    response = client.responses.create(input="Hello.", instructions="Be short.", metadata={"a": "b"}, **GREEDY)
    assert response.id.startswith("resp_") and response.object == "response" and response.model == "ember"
    (item,) = response.output
    assert (item.type, item.role, item.id[:4]) == ("message", "assistant", "msg_")
    assert response.output_text == item.content[0].text != ""
    assert (response.instructions, response.metadata, response.store) == ("Be short.", {"a": "b"}, True)
    assert response.error is None and response.previous_response_id is None and response.tools == []
    usage = response.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.input_tokens_details.cache_write_tokens == computed(response)


def test_too_few_tokens_make_a_response_incomplete(client: openai.OpenAI) -> None:
    response = client.responses.create(input="Hello.", extra_body={"ignore_eos": True}, **GREEDY)
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.completed_at is None and response.usage.output_tokens == 12
    assert response.output[0].status == "incomplete"


def test_the_events_come_in_the_official_order_with_numbers(client: openai.OpenAI) -> None:
    events = events_of(client, input="Hello there, tell me more.")
    kinds = [event.type for event in events]
    assert list(dict.fromkeys(kinds)) == [*ORDER, f"response.{events[-1].response.status}"]
    assert kinds.count("response.output_text.delta") == len(kinds) - len(ORDER)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert len({event.item_id for event in events if hasattr(event, "item_id")}) == 1
    assert events[0].response.status == events[1].response.status == "in_progress"
    assert events[0].response.usage is None and events[-1].response.usage.output_tokens > 0
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert (
        text
        == events[-1].response.output_text
        == client.responses.create(input="Hello there, tell me more.", **GREEDY).output_text
    )


def test_on_the_wire_each_event_has_its_name_and_there_is_no_done(http: httpx.Client) -> None:
    answer = http.post("/v1/responses", json={"input": "Hello.", "stream": True, "max_output_tokens": 3})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *frames, last = answer.text.split("\n\n")
    assert last == "" and "[DONE]" not in answer.text
    for frame in frames:
        name, _, data = frame.partition("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_async_and_with_the_clients_own_stream_helper(ember_url: str, ember: openai.OpenAI) -> None:
    asked = GREEDY | {"input": "Vodris paints in orange. Who paints in orange?"}

    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{ember_url}/v1", api_key="none", max_retries=0) as client:
            whole = await client.responses.create(**asked)
            stream = await client.responses.create(stream=True, **asked)
            return whole.output_text, "".join([e.delta async for e in stream if e.type.endswith("text.delta")])

    whole, streamed = asyncio.run(ask())
    assert whole == streamed != ""
    with ember.responses.stream(**asked) as stream:
        assert stream.get_final_response().output_text == whole


def test_input_items_are_messages_of_all_roles(client: openai.OpenAI, ember: openai.OpenAI) -> None:
    items: list[Any] = [
        {"role": "developer", "content": "You are a guide."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Vodris paints in orange."}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Yes."}]},
        {"role": "user", "content": "Who paints in orange?"},
    ]
    for each in (client, ember):
        response = each.responses.create(input=items, instructions="Be short.", **GREEDY)
        messages = [{"role": "system", "content": "Be short.\n\nYou are a guide."}, {"role": "user"}]
        messages[1]["content"] = "Vodris paints in orange."
        messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Who paints in orange?"}]
        same = each.chat.completions.create(messages=messages, model="ember", temperature=0, max_tokens=12)
        assert response.output_text == same.choices[0].message.content
        assert response.usage.input_tokens == same.usage.prompt_tokens


def test_an_answer_of_a_schema(ember: openai.OpenAI) -> None:
    class Painter(BaseModel):
        name: Literal["Vodris", "Nouraix"]
        colour: Literal["orange", "blue"]

    parsed = ember.responses.parse(
        input=f"{LONG} Who paints in orange?", text_format=Painter, model="ember", temperature=0, max_output_tokens=200
    )
    assert parsed.status == "completed" and isinstance(parsed.output_parsed, Painter)
    assert parsed.text.format.type == "json_schema" and parsed.text.format.name == "Painter"


def test_logprobs_where_they_are_asked_for(client: openai.OpenAI) -> None:
    events = events_of(client, input="Hello.", include=["message.output_text.logprobs"], top_logprobs=2)
    (part,) = events[-1].response.output[0].content
    deltas = [token for event in events if event.type == "response.output_text.delta" for token in event.logprobs]
    assert len(deltas) == len(part.logprobs) > 3
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in part.logprobs)
    assert events_of(client, input="Hello.")[-1].response.output[0].content[0].logprobs == []


# Going on.


def test_going_on_computes_only_what_is_new(ember: openai.OpenAI) -> None:
    first = ember.responses.create(input=f"{LONG} Who paints in orange?", **GREEDY)
    second = ember.responses.create(input="And who works as a farmer?", previous_response_id=first.id, **GREEDY)
    third = events_of(ember, input="Who is based in Viniton?", previous_response_id=second.id)[-1].response
    for before, after in ((first, second), (second, third)):
        kept = before.usage.input_tokens + before.usage.output_tokens
        assert after.usage.input_tokens_details.cached_tokens >= kept - 1
        assert computed(after) <= 16 < kept
        assert after.previous_response_id == before.id


def test_going_on_is_the_same_conversation_as_sending_it_all(ember: openai.OpenAI) -> None:
    first = ember.responses.create(input=f"{LONG} Who paints in orange?", instructions="Be short.", **GREEDY)
    going_on = {"input": "And who works as a farmer?", "instructions": "Be short."}
    second = ember.responses.create(previous_response_id=first.id, **going_on, **GREEDY)
    messages: list[Any] = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": f"{LONG} Who paints in orange?"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And who works as a farmer?"},
    ]
    same = ember.chat.completions.create(messages=messages, model="ember", temperature=0, max_tokens=12)
    assert second.output_text == same.choices[0].message.content
    assert same.usage.prompt_tokens == second.usage.input_tokens


def test_going_on_after_many_others_were_answered(client: openai.OpenAI, service: Service) -> None:
    """The toy engine answers with tokens that no tokenizer would make of their text."""
    first = client.responses.create(input=LONG, **GREEDY)
    service._transcripts.clear()
    second = client.responses.create(input="More.", previous_response_id=first.id, **GREEDY)
    kept = first.usage.input_tokens + first.usage.output_tokens
    assert second.usage.input_tokens_details.cached_tokens >= kept - 1


def test_two_may_go_on_from_one(client: openai.OpenAI) -> None:
    first = client.responses.create(input=LONG, **GREEDY)
    one, other = (
        client.responses.create(input=text, previous_response_id=first.id, **GREEDY) for text in ("This?", "That?")
    )
    assert one.id != other.id
    kept = first.usage.input_tokens + first.usage.output_tokens - 1
    assert min(each.usage.input_tokens_details.cached_tokens for each in (one, other)) >= kept


def test_an_answer_that_is_sent_again_is_there_once(ember: openai.OpenAI) -> None:
    first = ember.responses.create(input=f"{LONG} Who paints in orange?", **GREEDY)
    question: Any = {"role": "user", "content": "And who works as a farmer?"}

    def going_on(*items: Any) -> Any:
        return ember.responses.create(input=[*items, question], previous_response_id=first.id, **GREEDY)

    def said(text: str) -> Any:
        return {"role": "assistant", "content": text}

    plain = going_on()
    for text in (first.output_text, first.output_text.strip()):
        again = going_on(said(text))
        assert again.usage.input_tokens == plain.usage.input_tokens and again.output_text == plain.output_text
        assert computed(again) == 0
    heard = going_on(said(first.output_text.strip().partition(" ")[0]))
    assert heard.usage.input_tokens < plain.usage.input_tokens
    assert heard.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens  # all but the answer
    other = going_on(said("Something else."))
    assert other.usage.input_tokens > plain.usage.input_tokens


def test_instructions_do_not_come_along(client: openai.OpenAI) -> None:
    first = client.responses.create(input=LONG, instructions="Be short. " * 10, **GREEDY)
    second = client.responses.create(input="More.", previous_response_id=first.id, **GREEDY)
    assert second.instructions is None
    assert second.usage.input_tokens < first.usage.input_tokens + first.usage.output_tokens


# What is kept.


def test_a_response_is_kept_until_it_is_deleted(client: openai.OpenAI) -> None:
    response = client.responses.create(input="Hello.", **GREEDY)
    assert client.responses.retrieve(response.id) == response
    client.responses.delete(response.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="there is no response") as caught:
            call(response.id)
        assert caught.value.body["code"] == "not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(input="More.", previous_response_id=response.id, **GREEDY)
    assert (refused.value.code, refused.value.param) == ("previous_response_not_found", "previous_response_id")


def test_what_is_streamed_is_kept_before_its_end_is_told(client: openai.OpenAI) -> None:
    with client.responses.create(input="Hello.", stream=True, **GREEDY) as stream:
        for event in stream:
            if event.type in ("response.completed", "response.incomplete"):
                assert client.responses.retrieve(event.response.id) == event.response


def test_with_store_false_nothing_is_kept(client: openai.OpenAI) -> None:
    response = client.responses.create(input="Hello.", store=False, **GREEDY)
    streamed = events_of(client, input="Hello.", store=False)[-1].response
    for each in (response, streamed):
        assert each.store is False
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(each.id)


def test_what_was_asked_is_listed_in_pages(client: openai.OpenAI) -> None:
    items: list[Any] = [{"role": "user", "content": str(number)} for number in range(5)]
    response = client.responses.create(input=items, **GREEDY)
    page = client.responses.input_items.list(response.id, limit=2, order="asc")
    assert [item.content[0].text for item in page.data] == ["0", "1"] and page.has_more
    assert [item.content[0].text for item in page] == ["0", "1", "2", "3", "4"]
    assert client.responses.input_items.list(response.id).data[0].content[0].text == "4"


def test_tokens_are_counted_without_an_answer(client: openai.OpenAI) -> None:
    counted = client.responses.input_tokens.count(model="ember", input=LONG, instructions="Be short.")
    response = client.responses.create(input=LONG, instructions="Be short.", **GREEDY)
    assert counted.input_tokens == response.usage.input_tokens


def test_salts_keep_responses_apart(client: openai.OpenAI) -> None:
    response = client.responses.create(input=LONG, extra_body={"cache_salt": "one"}, **GREEDY)
    assert client.responses.retrieve(response.id, extra_query={"cache_salt": "one"}) == response
    for salt in ({}, {"cache_salt": "two"}):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id, extra_query=salt)
        with pytest.raises(openai.BadRequestError):
            client.responses.create(input="More.", previous_response_id=response.id, extra_body=salt, **GREEDY)
    same = client.responses.create(
        input="More.", previous_response_id=response.id, extra_body={"cache_salt": "one"}, **GREEDY
    )
    assert same.usage.input_tokens_details.cached_tokens > 50


def test_keys_keep_responses_apart_and_their_number_is_bounded() -> None:
    settings = Settings(engine="toy", context=512, store="none", api_key=("one", "two"), max_responses=2)
    with (
        Service.open(settings) as service,
        running(service) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="one", max_retries=0) as one,
        openai.OpenAI(base_url=f"{url}/v1", api_key="two", max_retries=0) as two,
    ):
        ids = [one.responses.create(input="Hello.", **GREEDY).id for _ in range(2)]
        with pytest.raises(openai.NotFoundError):
            two.responses.retrieve(ids[1])
        one.responses.retrieve(ids[0])  # used again: the other one goes
        ids.append(one.responses.create(input="Hello.", **GREEDY).id)
        one.responses.retrieve(ids[0])
        with pytest.raises(openai.NotFoundError):
            one.responses.retrieve(ids[1])


def test_what_is_too_old_is_forgotten() -> None:
    now = 0.0
    kept = KeptResponses(9, 10.0, clock=lambda: now)
    kept.add(b"", Kept({"id": "a"}, [], []))
    now = 10.0
    assert kept.get(b"", "a").body == {"id": "a"}
    now = 10.5
    with pytest.raises(UnknownResponse):
        kept.get(b"", "a")
    assert len(kept) == 0
    kept.add(b"", Kept({"id": "b"}, [], []))
    now = 21.0
    kept.add(b"", Kept({"id": "c"}, [], []))
    assert len(kept) == 1


def test_nobody_loses_a_response_for_somebody_who_has_more() -> None:
    kept = KeptResponses(3, 10.0)
    one, other = b"1" * 16, b"2" * 16
    kept.add(one, Kept({"id": "a"}, [], []))
    for name in "bcde":
        kept.add(other + b"any cache_salt", Kept({"id": name}, [], []))
    assert kept.find(one, "a") is not None and len(kept) == 3
    assert [name for name in "bcde" if kept.find(other + b"any cache_salt", name)] == ["d", "e"]


# What is refused.

USER = {"role": "user", "content": "Hello."}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no input": ({}, "input", "required"),
    "an empty input": ({"input": []}, "input", "at least one element"),
    "a number": ({"input": 5}, "input", "expected a string or an array of messages"),
    "no role": ({"input": [{"content": "x"}]}, "input[0].role", "required"),
    "a role that is none": ({"input": [{"role": "boss", "content": "x"}]}, "input[0].role", "user"),
    "no text": ({"input": [{"role": "user", "content": 5}]}, "input[0].content", "expected a string or an array"),
    "an image": ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "text only"),
    "a tool's output of no call": (
        {"input": [USER, {"type": "function_call_output", "output": "x"}]},
        "input[1].call_id",
        "required",
    ),
    "a tool's empty output": (
        {"input": [USER, {"type": "function_call_output", "call_id": "1", "output": []}]},
        "input[1].output",
        "at least one",
    ),
    "reasoning": ({"input": [USER, {"type": "reasoning"}]}, "input", "function_call_output, not reasoning"),
    "another mark": (
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x", "cache": "always"}]}]},
        "input[0].content[0].cache",
        "expected 'chunk'",
    ),
    "documents that are none": ({"input": "x", "documents": [{"title": "x"}]}, "documents[0].text", "required"),
    "a misspelt ratio": (
        {"input": "x", "rekindle": {"blend": {"ration": 1}}},
        "rekindle.blend.ration",
        "did you mean 'ratio'",
    ),
    "blending what is pinned": (
        {
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "x", "cache": "chunk"}]}],
            "rekindle": {"blend": True, "pin": "1m"},
        },
        "rekindle.blend",
        "can't be pinned",
    ),
    "tools": ({"input": "x", "tools": [{"type": "function"}]}, "tools", "not supported"),
    "background": ({"input": "x", "background": True}, "background", "not supported"),
    "a conversation": ({"input": "x", "conversation": "conv_1"}, "conversation", "previous_response_id"),
    "a prompt": ({"input": "x", "prompt": {"id": "pmpt_1"}}, "prompt", "instructions"),
    "truncation": ({"input": "x", "truncation": "auto"}, "truncation", "not supported"),
    "no tokens": ({"input": "x", "max_output_tokens": 0}, "max_output_tokens", "at least 1"),
    "a schema without one": ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format", "schema"),
    "long labels": ({"input": "x", "metadata": {"a": "b" * 600}}, "metadata", "512 characters"),
    "too long": ({"input": "word " * 3000}, "prompt", "context"),
    "a chat's schema": ({"input": "x", "response_format": {"type": "json_object"}}, "response_format", "text.format"),
    "a chat's limit": ({"input": "x", "max_tokens": 5}, "max_tokens", "use max_output_tokens"),
    "vLLM's schema": ({"input": "x", "guided_json": {"type": "object"}}, "guided_json", "text.format"),
    "a template's own": (
        {"input": "x", "chat_template_kwargs": {"messages": []}},
        "chat_template_kwargs",
        "can't be set",
    ),
    "another model": ({"input": "x", "model": "gpt"}, "model", "there is no model"),
    "unknown option": ({"input": "x", "rekindle": {"plans": True}}, "rekindle.plans", "did you mean"),
}


@pytest.mark.parametrize(("body", "param", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(http: httpx.Client, body: dict[str, Any], param: str, words: str) -> None:
    answer = http.post("/v1/responses", json=body)
    error = answer.json()["error"]
    assert answer.status_code in (400, 404) and set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and words in error["message"], error


def test_what_has_no_effect_here_is_accepted(http: httpx.Client) -> None:
    body = {
        "input": "Hello.",
        "max_output_tokens": 2,
        "reasoning": {"effort": "low"},
        "text": {"verbosity": "low"},
        "prompt_cache_key": "a",
        "safety_identifier": "b",
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "include": ["reasoning.encrypted_content"],
        "tools": [],
        "tool_choice": "auto",
        "truncation": "disabled",
        "stream_options": {"include_obfuscation": False},
    }
    assert http.post("/v1/responses", json=body).status_code == 200


@pytest.fixture
def broken(service: Service) -> Iterator[None]:
    """The engine fails at its fifth step, of those of the next request: nothing is left to be studied in idle time."""
    assert service.study(60)
    forward, steps = service._engine.forward, iter(range(100))

    def fail(work: Any) -> Any:
        if next(steps) >= 4:
            raise EngineError("broken on purpose")
        return forward(work)

    service._engine.forward = fail  # type: ignore[method-assign]
    yield
    service._engine.forward = forward  # type: ignore[method-assign]


def test_an_answer_that_breaks_off_says_so(client: openai.OpenAI, broken: None) -> None:
    events = events_of(client, input="Break off, please.")
    assert events[-1].type == "response.failed"
    failed = events[-1].response
    assert failed.status == "failed" and failed.error.code == "server_error" and "broken" not in failed.error.message
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert failed.output[0].content[0].text == text != ""
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(failed.id)

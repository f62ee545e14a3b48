"""OpenAI's own client against the realtime API, with the built-in model: what is documented for it works here."""

from __future__ import annotations

import asyncio
import socket
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from tests.api.realtime_client import wait_until_read
from tests.api.steps import Steps

from rekindle.api.server import running
from rekindle.model.ember.language import Kind, Split, generate_document, generate_questions
from rekindle.serve.service import Service
from rekindle.settings import Settings

# of the client's own way to connect, with this release of websockets
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")

FACTS = (
    "Bitris rents from Mesith. Branris belongs to Meneco. Branris lives in Tarwick. Tarwick holds its market on "
    "Wednesday. Meneco makes chairs. This one was founded in 1937. Bitris lives in Sekton. This one plays the fiddle. "
    "This one is 59 years old. Bitris works as a potter. Dredune works as a mason. Dredune plays the banjo. This one "
    "rents from Nisdas. Dredune was born on 26 April. Sekton holds its market on Sunday."
)
QUESTION = "When does Sekton hold its market?"
ANSWER = "Sunday"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = Settings(model="builtin", threads=1, store=str(tmp_path_factory.mktemp("store")))
    with Service.open(settings) as service, running(service) as url:
        yield f"{url}/v1"
        service.check_integrity()


def _ask(connection: Any, text: str, **options: Any) -> Any:
    part = {"type": "input_text", "text": text}
    connection.conversation.item.create(item={"type": "message", "role": "user", "content": [part]})
    connection.response.create(response={"max_output_tokens": 24, "temperature": 0} | options)
    return _until(connection, "response.done").response


def _until(connection: Any, kind: str) -> Any:
    for event in connection:
        if event.type == kind:
            return event
        assert event.type != "error", event
    raise AssertionError("the connection has ended")


def test_the_synchronous_client(url: str) -> None:
    with (
        openai.OpenAI(base_url=url, api_key="none") as client,
        client.realtime.connect(model="ember", websocket_connection_options={"proxy": None}) as connection,
    ):
        assert _until(connection, "session.created").session.output_modalities == ["text"]
        connection.session.update(session={"type": "realtime", "instructions": FACTS, "output_modalities": ["text"]})
        assert _until(connection, "session.updated").session.instructions == FACTS
        response = _ask(connection, QUESTION)
        assert response.status == "completed" and ANSWER in response.output[0].content[0].text
        assert response.output[0].content[0].type == "output_text"
        usage = response.usage
        assert usage.input_token_details.cached_tokens <= usage.input_tokens == usage.total_tokens - usage.output_tokens
        connection.conversation.item.retrieve(item_id=response.output[0].id)
        assert _until(connection, "conversation.item.retrieved").item.content == response.output[0].content
        connection.conversation.item.truncate(item_id=response.output[0].id, content_index=0, audio_end_ms=0)
        assert _until(connection, "conversation.item.truncated").item_id == response.output[0].id
        connection.conversation.item.delete(item_id=response.output[0].id)
        _until(connection, "conversation.item.deleted")
        connection.input_audio_buffer.append(audio="AAAA", event_id="mine")
        error = next(event for event in connection if event.type == "error").error
        assert (error.event_id, error.code, error.type) == ("mine", "unsupported", "invalid_request_error")


def test_the_asynchronous_client(url: str) -> None:
    async def talk() -> tuple[str, str]:
        async with (
            openai.AsyncOpenAI(base_url=url, api_key="none") as client,
            client.realtime.connect(model="ember", websocket_connection_options={"proxy": None}) as connection,
        ):
            await connection.session.update(session={"type": "realtime", "instructions": FACTS})
            for word in QUESTION.split(" "):
                await connection.send({"type": "input_text_buffer.append", "text": f"{word} "})  # type: ignore[misc, arg-type]
            await connection.send({"type": "input_text_buffer.commit"})  # type: ignore[misc, arg-type]
            await connection.response.create(response={"max_output_tokens": 24, "temperature": 0})  # type: ignore[typeddict-unknown-key]
            text = ""
            async for event in connection:
                assert event.type != "error", event
                if event.type == "response.output_text.delta":
                    text += event.delta
                if event.type == "response.done":
                    return text, event.response.output[0].content[0].text
        raise AssertionError("the connection has ended")

    streamed, whole = asyncio.run(talk())
    assert streamed == whole and ANSWER in whole


def test_the_beta_client(url: str) -> None:
    sockets = url.replace("http", "ws", 1)
    with (
        warnings.catch_warnings(),
        openai.OpenAI(base_url=url, websocket_base_url=sockets, api_key="none") as client,
    ):
        warnings.simplefilter("ignore", DeprecationWarning)
        manager = client.beta.realtime.connect(model="ember", websocket_connection_options={"proxy": None})
        with manager as connection:
            created = _until(connection, "session.created").session
            assert created.modalities == ["text"] and created.max_response_output_tokens == "inf"
            session = {
                "instructions": FACTS,
                "modalities": ["text"],
                "max_response_output_tokens": 24,
                "temperature": 0.0,
            }
            connection.session.update(session=session)  # type: ignore[arg-type]
            part = {"type": "input_text", "text": QUESTION}
            connection.conversation.item.create(item={"type": "message", "role": "user", "content": [part]})  # type: ignore
            item = _until(connection, "conversation.item.created").item
            assert item.content[0].text == QUESTION
            connection.response.create()
            deltas = []
            for event in connection:
                assert event.type not in ("error", "conversation.item.done")
                if event.type == "response.text.delta":
                    deltas.append(event.delta)
                if event.type == "response.done":
                    break
            (part,) = event.response.output[0].content
            assert (part.type, part.text) == ("text", "".join(deltas)) and ANSWER in part.text
            assert event.response.modalities == ["text"]


def test_the_client_comes_back_by_itself_and_has_lost_nothing() -> None:
    """Its network fails amid an answer; it dials again with the session's name and the last event that it has seen."""
    seen: dict[str, str] = {}
    deltas = []
    with Service.open(Settings(model="builtin", threads=1, store="none")) as service, running(service) as url:
        steps = Steps(service)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")

        def again(event: Any) -> Any:
            seen["reconnects"] = seen.get("reconnects", "") + "x"
            steps.let_all()
            return {"extra_query": {"session": seen["session"], "last_event": seen["last"]}}

        options = {"websocket_connection_options": {"proxy": None}, "on_reconnecting": again, "initial_delay": 0.01}
        with client.realtime.connect(model="ember", **options) as connection:  # type: ignore[arg-type]
            seen["session"] = _until(connection, "session.created").session.rekindle["session"]
            part = {"type": "input_text", "text": QUESTION}
            connection.conversation.item.create(item={"type": "message", "role": "user", "content": [part]})
            connection.response.create(response={"max_output_tokens": 200, "temperature": 20.0, "seed": 3})  # type: ignore
            steps.let(12)  # a few tokens, and no more before the network has failed
            for event in connection:
                assert event.type != "error", event
                if event.type not in ("session.created", "rekindle.session.resumed"):
                    seen["last"] = event.event_id
                if event.type == "response.output_text.delta":
                    deltas.append(event.delta)
                    if len(deltas) == 2:
                        connection._connection.socket.shutdown(socket.SHUT_RDWR)
                if event.type == "response.done":
                    break
        client.close()
    assert seen["reconnects"] == "x" and len(deltas) > 12
    assert "".join(deltas) == event.response.output[0].content[0].text


def test_a_session_whose_server_has_gone_goes_on_by_its_handle(tmp_path: Any) -> None:
    """Only the new message is computed: what was said before comes from the disk."""
    settings = Settings(model="builtin", threads=1, store=str(tmp_path), block_tokens=16, store_flush_seconds=60)
    facts = " ".join([FACTS] * 3)
    options = {"websocket_connection_options": {"proxy": None}}
    with Service.open(settings) as service, running(service) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        with client.realtime.connect(model="ember", **options) as connection:  # type: ignore[arg-type]
            handle = _until(connection, "session.created").session.rekindle["handle"]
            connection.session.update(session={"type": "realtime", "instructions": facts})
            before = _ask(connection, QUESTION)
        client.close()
    with Service.open(settings) as service, running(service) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        with client.realtime.connect(extra_query={"resume": handle}, **options) as connection:  # type: ignore[arg-type]
            created = _until(connection, "session.created").session
            assert created.instructions == facts
            resumed = _until(connection, "rekindle.session.resumed")
            assert [item["content"][0]["text"] for item in resumed.items] == [
                QUESTION,
                before.output[0].content[0].text,
            ]
            wait_until_read(url)  # it is being brought back
            part = {"type": "input_text", "text": "What is the job of Dredune?"}
            connection.conversation.item.create(item={"type": "message", "role": "user", "content": [part]})
            connection.response.create(response={"max_output_tokens": 8, "temperature": 0})  # type: ignore
            kv = _until(connection, "rekindle.kv")
        client.close()
        computed = kv.tokens["computed"] + kv.ahead["computed"]
        restored = kv.tokens["restored"] + kv.ahead["restored"]
        assert restored >= kv.tokens["prompt"] - 64 > 100
        assert (kv.tier, kv.ahead["tier"]) == ("engine", "disk")
        assert computed <= service.num_computed <= kv.tokens["prompt"] - restored + settings.block_tokens


def test_several_at_once_hear_of_their_own_facts_only(url: str) -> None:
    def talk(number: int) -> list[tuple[str, str]]:
        document = generate_document(f"crowd {number}", num_people=3, split=Split.HELD_OUT)
        said = []
        with (
            openai.OpenAI(base_url=url, api_key="none") as client,
            client.realtime.connect(model="ember", websocket_connection_options={"proxy": None}) as connection,
        ):
            connection.session.update(session={"type": "realtime", "instructions": document.text})
            for each in generate_questions(document, "crowd", kinds=(Kind.DIRECT,), count=4):
                response = _ask(connection, each.text)
                said.append((response.output[0].content[0].text.strip(), each.answer))
        return said

    with ThreadPoolExecutor(4) as pool:
        said = [pair for pairs in pool.map(talk, range(4)) for pair in pairs]
    assert sum(text == answer for text, answer in said) >= len(said) - 1, said  # the model itself may be wrong once

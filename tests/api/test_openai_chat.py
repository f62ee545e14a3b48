"""`/v1/chat/completions` as the official client sees it, on the toy engine."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from rekindle.model.template import ChatTemplate
from rekindle.serve.service import Service

ASK = [{"role": "user", "content": "Where does Vodris work, and what does the letter say of the river town?"}]
GREEDY: dict[str, Any] = {"model": "ember", "messages": ASK, "temperature": 0, "max_tokens": 24}


def text_of(client: openai.OpenAI, **arguments: Any) -> str:
    return client.chat.completions.create(**GREEDY | arguments).choices[0].message.content


def chunks_of(client: openai.OpenAI, **arguments: Any) -> list[Any]:
    with client.chat.completions.create(stream=True, **GREEDY | arguments) as stream:
        return list(stream)


def streamed(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def test_an_answer_has_openais_shape(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**GREEDY, extra_body={"ignore_eos": True})
    (choice,) = answer.choices
    assert answer.object == "chat.completion" and answer.model == "ember" and answer.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24


def test_a_stream_says_the_same_as_the_whole_answer(client: openai.OpenAI) -> None:
    chunks = chunks_of(client)
    assert streamed(chunks) == text_of(client)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 3, "an answer of 24 tokens came in one piece"


def test_usage_comes_in_a_last_chunk_when_asked_for(client: openai.OpenAI) -> None:
    *chunks, last = chunks_of(client, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks_of(client))


def test_a_repeated_prompt_is_all_cached(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(**GREEDY)
    again = client.chat.completions.create(**GREEDY)
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens
    assert again.choices[0].message.content == first.choices[0].message.content


def test_a_salt_keeps_prompts_apart(client: openai.OpenAI) -> None:
    client.chat.completions.create(**GREEDY, extra_body={"cache_salt": "one"})
    same = client.chat.completions.create(**GREEDY, extra_body={"cache_salt": "one"})
    other = client.chat.completions.create(**GREEDY, extra_body={"cache_salt": "two"})
    assert same.usage.prompt_tokens_details.cached_tokens == same.usage.prompt_tokens
    assert other.usage.prompt_tokens_details.cached_tokens == 0


def test_choices_differ_but_a_seed_makes_them_the_same_again(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        answer = client.chat.completions.create(**GREEDY | {"temperature": 1.0}, n=3, seed=seed)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    once = texts(7)
    assert len(set(once)) == 3
    assert texts(7) == once
    assert texts(8)[0] == once[1], "choice i is sampled with seed + i"
    assert texts(-5) == texts(-5)


def test_choices_share_one_stream(client: openai.OpenAI) -> None:
    arguments = {"temperature": 1.0, "seed": 7, "n": 2}
    answer = client.chat.completions.create(**GREEDY | arguments)
    chunks = chunks_of(client, **arguments)
    for choice in answer.choices:
        assert streamed(chunks, choice.index) == choice.message.content
    ends = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert sorted(ends) == [0, 1]


def test_n_counts_the_prompt_once(client: openai.OpenAI) -> None:
    one = client.chat.completions.create(**GREEDY).usage
    two = client.chat.completions.create(**GREEDY, n=2).usage
    assert two.prompt_tokens == one.prompt_tokens
    assert two.completion_tokens == 2 * one.completion_tokens


@pytest.mark.parametrize("as_list", [False, True])
def test_a_stop_string_that_spans_tokens_ends_the_answer_before_it(client: openai.OpenAI, as_list: bool) -> None:
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks_of(client)]
    whole = "".join(pieces)
    spots = [i for i in range(3, len(pieces) - 1) if pieces[i][-2:].strip() and pieces[i + 1][:2].strip()]
    stop = pieces[spots[0]][-2:] + pieces[spots[0] + 1][:2]
    expected = whole[: whole.index(stop)]
    given: Any = ["not in there", stop] if as_list else stop
    answer = client.chat.completions.create(**GREEDY, stop=given)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (expected, "stop")
    chunks = chunks_of(client, stop=given)
    assert streamed(chunks) == expected, "no letter of a stop string may leak into a stream"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_logprobs(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=3).choices[0]
    tokens = choice.logprobs.content
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob), "greedy takes the most probable"
        ordered = [top.logprob for top in token.top_logprobs]
        assert ordered == sorted(ordered, reverse=True) and sum(map(math.exp, ordered)) <= 1 + 1e-6
    spelled = b"".join(bytes(token.bytes) for token in tokens)
    assert spelled.decode("utf-8", "replace").startswith(choice.message.content)


def test_logprobs_in_a_stream_are_those_of_the_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**GREEDY, logprobs=True).choices[0].logprobs.content
    chunks = chunks_of(client, logprobs=True)
    parts = [chunk.choices[0].logprobs.content for chunk in chunks if chunk.choices[0].logprobs]
    assert [token.bytes for part in parts for token in part] == [token.bytes for token in whole]
    assert all(token.top_logprobs == [] for token in whole)


def test_temperature_does_not_change_logprobs(client: openai.OpenAI) -> None:
    greedy = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=2).choices[0].logprobs.content[0]
    hot = client.chat.completions.create(**GREEDY | {"temperature": 2.0}, seed=1, logprobs=True, top_logprobs=2)
    first = hot.choices[0].logprobs.content[0]
    assert [top.logprob for top in first.top_logprobs] == pytest.approx([top.logprob for top in greedy.top_logprobs])


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_an_answer_of_a_given_format(client: openai.OpenAI, kind: str) -> None:
    schema = {
        "type": "object",
        "properties": {"sure": {"type": "boolean"}, "place": {"enum": ["Viniton", "Zürich"]}},
        "required": ["sure", "place"],
        "additionalProperties": False,
    }
    chosen: dict[str, Any] = {"type": kind}
    if kind == "json_schema":
        chosen["json_schema"] = {"name": "where", "schema": schema, "strict": True}
        answer = client.chat.completions.create(**GREEDY | {"max_tokens": 200}, response_format=chosen)
        value = json.loads(answer.choices[0].message.content)
        assert set(value) == {"sure", "place"} and value["place"] in ("Viniton", "Zürich")
    else:
        assert text_of(client, response_format=chosen).lstrip().startswith("{")


def test_parts_and_the_developer_role(client: openai.OpenAI) -> None:
    plain = [{"role": "system", "content": "Be short.\nBe kind."}, *ASK]
    parts = [{"type": "text", "text": "Be short."}, {"type": "text", "text": "Be kind."}]
    assert text_of(client, messages=[{"role": "developer", "content": parts}, *ASK]) == text_of(client, messages=plain)


def test_max_completion_tokens_has_the_last_word(client: openai.OpenAI) -> None:
    usage = client.chat.completions.create(**GREEDY, max_completion_tokens=5, extra_body={"ignore_eos": True}).usage
    assert usage.completion_tokens == 5


def test_plan_and_timings_on_request(client: openai.OpenAI) -> None:
    both = {"rekindle": {"plan": True, "timings": True}}
    answer = client.chat.completions.create(**GREEDY, extra_body=both)
    report = answer.model_extra["rekindle"]
    assert report["plan"]["total"] == answer.usage.prompt_tokens
    assert report["plan"]["reused"] == answer.usage.prompt_tokens_details.cached_tokens
    assert report["timings"]["ttft_ms"] > 0
    *others, last = chunks_of(client, extra_body=both)
    assert "plan" in last.model_extra["rekindle"] and all("rekindle" not in chunk.model_extra for chunk in others)
    several = client.chat.completions.create(**GREEDY, n=2, extra_body={"rekindle": {"timings": True}})
    assert [set(report) for report in several.model_extra["rekindle"]["choices"]] == [{"timings"}, {"timings"}]


def test_unknown_fields_and_nulls_change_nothing(client: openai.OpenAI) -> None:
    extra = {"frobnicate": [1, {"a": None}], "user": "u", "stop": None, "top_p": None, "seed": None, "tools": []}
    assert text_of(client, extra_body=extra) == text_of(client)


def test_arguments_of_the_chat_template(
    client: openai.OpenAI, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for documents, which it is shown more than once."""
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '<think></think>' if enable_thinking is false }}"
    monkeypatch.setattr(service, "model", replace(service.model, template=ChatTemplate(source)))

    def num_tokens(**extra: Any) -> int:
        return client.chat.completions.create(**GREEDY, extra_body=extra).usage.prompt_tokens

    without = {"chat_template_kwargs": {"enable_thinking": False}}
    assert num_tokens(**without) > num_tokens() == num_tokens(chat_template_kwargs={"enable_thinking": True})
    documents = {"documents": [{"text": "Vodris paints in orange."}]}
    assert num_tokens(**without, **documents) > num_tokens(**documents)

    def num_input_tokens(**extra: Any) -> int:
        response = client.responses.create(model="ember", input="Hello.", max_output_tokens=1, extra_body=extra)
        return response.usage.input_tokens

    assert num_input_tokens(**without) > num_input_tokens()

    def num_warmed(**extra: Any) -> int:
        body = {"messages": GREEDY["messages"]} | extra
        return httpx.post(f"{client.base_url}".replace("/v1/", "/cache/warm"), json=body).json()["prompts"][0]["tokens"]

    assert (num_warmed(**without), num_warmed()) == (num_tokens(**without), num_tokens())


def test_the_models_list(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["ember"]
    assert client.models.retrieve("ember").owned_by == "rekindle"
    with pytest.raises(openai.NotFoundError, match="only 'ember'"):
        client.models.retrieve("gpt-9")


@pytest.mark.parametrize("name", ["ember", "builtin"])
def test_names_by_which_the_model_goes(client: openai.OpenAI, name: str) -> None:
    assert client.chat.completions.create(**GREEDY | {"model": name}).model == "ember"


def test_many_chats_at_once(url: str) -> None:
    """Twenty streams over one event loop, each what it is alone."""
    import asyncio

    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        message = {"role": "user", "content": f"Tell me about number {number}, please, and about its neighbours."}
        stream = await client.chat.completions.create(**GREEDY | {"messages": [message]}, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def both() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            together = await asyncio.gather(*(one(client, number) for number in range(20)))
            return list(together), [await one(client, number) for number in range(20)]

    together, alone = asyncio.run(both())
    assert together == alone

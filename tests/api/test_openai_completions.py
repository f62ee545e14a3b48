"""`/v1/completions` as the official client sees it, on the toy engine."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from rekindle.serve.service import Service

PROMPT = "Nouraix is based in Viniton. Vodris belongs to"
GREEDY: dict[str, Any] = {"model": "ember", "prompt": PROMPT, "temperature": 0, "max_tokens": 12}


def texts(client: openai.OpenAI, **arguments: Any) -> list[str]:
    answer = client.completions.create(**GREEDY | arguments)
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    return [choice.text for choice in answer.choices]


def test_an_answer_has_openais_shape(client: openai.OpenAI) -> None:
    answer = client.completions.create(**GREEDY, extra_body={"ignore_eos": True})
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].text
    assert answer.usage.completion_tokens == 12


def test_token_ids_are_the_same_prompt(client: openai.OpenAI, service: Service) -> None:
    ids = service.text_prompt(PROMPT).tokens.tolist()
    text = texts(client)
    assert texts(client, prompt=ids) == text
    assert texts(client, prompt=[ids, ids[:5]])[0] == text[0]
    assert client.completions.create(**GREEDY | {"prompt": ids}).usage.prompt_tokens == len(ids)


def test_several_prompts_make_several_choices(client: openai.OpenAI) -> None:
    other = "Another text that has nothing to do with the first one."
    alone = texts(client) + texts(client, prompt=other)
    assert texts(client, prompt=[PROMPT, other]) == alone
    usage = client.completions.create(**GREEDY | {"prompt": [PROMPT, other]}).usage
    both = [client.completions.create(**GREEDY | {"prompt": prompt}).usage.prompt_tokens for prompt in (PROMPT, other)]
    assert usage.prompt_tokens == sum(both)


def test_choices_of_several_prompts_come_in_order(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"temperature": 1.0, "seed": 3, "n": 2}
    first, second = texts(client, **arguments), texts(client, prompt="Something else", **arguments)
    assert texts(client, prompt=[PROMPT, "Something else"], **arguments) == first + second


def test_several_prompts_share_a_stream(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "Something else", "And a third"]
    parts = ["", "", ""]
    with client.completions.create(**GREEDY | {"prompt": prompts}, stream=True) as stream:
        for chunk in stream:
            parts[chunk.choices[0].index] += chunk.choices[0].text
    assert parts == texts(client, prompt=prompts)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_before_the_answer(client: openai.OpenAI, stream: bool) -> None:
    expected = PROMPT + texts(client)[0]
    if not stream:
        assert texts(client, echo=True) == [expected]
        return
    with client.completions.create(**GREEDY, echo=True, stream=True) as chunks:
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_echo_of_token_ids_is_their_text(client: openai.OpenAI, service: Service) -> None:
    ids = service.text_prompt(PROMPT).tokens.tolist()
    (text,) = texts(client, prompt=ids, echo=True)
    assert text.strip().startswith("Nouraix is based in Viniton.")


def test_logprobs_in_the_completions_shape(client: openai.OpenAI) -> None:
    choice = client.completions.create(**GREEDY, logprobs=2).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    assert logprobs.text_offset[0] == 0 and logprobs.text_offset == sorted(logprobs.text_offset)
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == pytest.approx(logprob) and len(top) <= 3


def test_logprobs_of_a_stream_join_up(client: openai.OpenAI) -> None:
    whole = client.completions.create(**GREEDY, logprobs=1).choices[0].logprobs
    with client.completions.create(**GREEDY, logprobs=1, stream=True) as stream:
        parts = [chunk.choices[0].logprobs for chunk in stream if chunk.choices[0].logprobs]
    assert [token for part in parts for token in part.tokens] == whole.tokens
    assert [offset for part in parts for offset in part.text_offset] == whole.text_offset


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"suffix": "the end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
    ],
)
def test_what_is_not_supported_is_refused(client: openai.OpenAI, arguments: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(**GREEDY | arguments)
    assert refusal.value.param == param


def test_logit_bias_forces_a_token(client: openai.OpenAI, service: Service) -> None:
    token = int(service.text_prompt("Viniton").tokens[-1])
    bias = {str(token): 100}
    assert texts(client, logit_bias=bias, max_tokens=2) == [service.detokenize([token, token])]

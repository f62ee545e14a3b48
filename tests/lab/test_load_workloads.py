"""What the load test asks: the same from the same seed, shared where it says so, and of the right size."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from rekindle.errors import InvalidRequest
from rekindle.lab.load.measures import MEASURES
from rekindle.lab.load.run import WORKLOADS, sizes_for, workload_named
from rekindle.lab.load.texts import Texts
from rekindle.lab.load.workloads import SESSIONS, Session, Sizes, agent, chat, rag, trace

TEXTS = Texts(seed=7, tokens_per_word=1.0)


def prompts(sessions: list[Session]) -> list[str]:
    return ["\n".join(message["content"] for message in session.steps[0].add) for session in sessions]


@pytest.mark.parametrize("name", ["chat", "agent", "rag"])
def test_the_same_seed_asks_the_same(name: str) -> None:
    workload = SESSIONS[name]
    sizes = workload.defaults
    assert workload.sessions(sizes, TEXTS) == workload.sessions(sizes, TEXTS)
    assert workload.sessions(sizes, TEXTS) != workload.sessions(sizes, Texts(seed=8, tokens_per_word=1.0))


@pytest.mark.parametrize("name", WORKLOADS)
def test_sizes_that_a_workload_does_not_read_are_refused(name: str) -> None:
    reads = workload_named(name).reads
    nothing = dict.fromkeys(each.name for each in fields(Sizes))
    assert sizes_for(name, nothing) == workload_named(name).defaults
    for size in nothing:
        value = Path("load.jsonl") if size == "trace" else 12
        if size in reads:
            assert getattr(sizes_for(name, nothing | {size: value}), size) == value
        else:
            with pytest.raises(InvalidRequest, match=f"the workload {name} has no {size}; its sizes are answer_tokens"):
                sizes_for(name, nothing | {size: value})


@pytest.mark.parametrize("name", SESSIONS)
def test_what_a_workload_says_that_it_reads_is_what_it_looks_at(name: str, tmp_path: Path) -> None:
    (file := tmp_path / "trace.jsonl").write_text('{"hash_ids": [1, 2], "input_length": 600, "timestamp": 0}\n')
    workload, looked_at = SESSIONS[name], set()

    class Watched:
        def __getattr__(self, size: str) -> Any:
            looked_at.add(size)
            return file if size == "trace" else getattr(workload.defaults, size)

    workload.sessions(Watched(), TEXTS)  # type: ignore[arg-type]
    assert looked_at | {"clients"} == workload.reads  # which is how many sessions there are at a time


def test_a_text_depends_on_its_name_alone() -> None:
    assert TEXTS.text("a", 20) == TEXTS.text("a", 20) != TEXTS.text("b", 20)
    assert len(TEXTS.text("a", 20).split()) == 20
    assert len(Texts(seed=7, tokens_per_word=2.0).text("a", 20).split()) == 10


def test_clients_of_a_chat_share_the_system_prompt_and_nothing_else() -> None:
    sessions = chat(Sizes(clients=3, turns=4, system_tokens=50, message_tokens=5, answer_tokens=9), TEXTS)
    assert [len(session.steps) for session in sessions] == [4, 4, 4]
    openings = [session.steps[0].add for session in sessions]
    assert {message["role"] for message, _ in openings} == {"system"}
    assert len({message["content"] for message, _ in openings}) == 1
    said = [step.add[-1]["content"] for session in sessions for step in session.steps]
    assert len(set(said)) == 12
    assert {step.answer_tokens for session in sessions for step in session.steps} == {9}


def test_an_agents_transcript_grows_by_tool_outputs() -> None:
    (session,) = agent(Sizes(clients=1, turns=3, message_tokens=30), TEXTS)
    task, *outputs = [step.add[-1]["content"] for step in session.steps]
    assert task.startswith("Your task: ")
    assert all(output.startswith("The tool's output:\n") and len(output.split()) >= 30 for output in outputs)


def test_rag_permutes_documents_that_all_prompts_draw_from() -> None:
    sizes = Sizes(requests=30, documents=5, documents_per_prompt=3, document_tokens=10, message_tokens=4)
    orders = []
    for session in rag(sizes, TEXTS):
        *documents, question = session.steps[0].add[-1]["content"].split("\n\n")
        assert question.startswith("Question: ")
        orders.append(tuple(documents))
    assert {len(order) for order in orders} == {3}
    assert len({document for order in orders for document in order}) == 5
    assert len(set(orders)) > 10


def test_equal_hashes_give_equal_text_and_lengths_follow_the_trace(tmp_path: Path) -> None:
    lines = [
        {"hash_ids": [1, 2, 3], "input_length": 1_536},
        {"hash_ids": [1, 2, 4], "input_length": 1_280},
        {"hash_ids": [9, 2], "input_length": 1_024},
        {"hash_ids": [], "input_length": 0},
    ]
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    sizes = Sizes(trace=file, block_tokens=10, requests=10)
    first, second, third = (prompt.split() for prompt in prompts(trace(sizes, TEXTS)))
    assert [len(first), len(second), len(third)] == [30, 25, 20]
    assert first[:20] == second[:20] and first[20:25] != second[20:]
    assert third[:10] != first[:10] and third[10:] != first[10:20]  # the same block after another beginning is another
    assert len(trace(Sizes(trace=file, requests=2), TEXTS)) == 2
    assert SESSIONS["trace"].cells(sizes) >= 4 * 30


def test_a_trace_needs_its_file() -> None:
    with pytest.raises(InvalidRequest, match="--trace FILE"):
        trace(Sizes(), TEXTS)


def test_the_context_of_a_chat_holds_four_conversations_however_many_there_are() -> None:
    workload = SESSIONS["chat"]
    cells = workload.cells(workload.defaults)
    assert 4 <= cells / workload.defaults.conversation_tokens < 5
    assert cells == workload.cells(workload.defaults.with_(clients=64))
    assert workload.parallel(workload.defaults) == 4


@pytest.mark.parametrize("measure", MEASURES.values(), ids=lambda measure: measure.name)
def test_measures_have_room_for_what_runs_at_once(measure: object) -> None:
    sizes = measure.defaults  # type: ignore[attr-defined]
    assert measure.cells(sizes) >= measure.parallel(sizes) * sizes.answer_tokens  # type: ignore[attr-defined]
    assert measure.cells(sizes) > sizes.system_tokens  # type: ignore[attr-defined]
    assert measure.about  # type: ignore[attr-defined]


def test_an_unknown_workload_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'burst'"):
        workload_named("bust")


@pytest.mark.parametrize("given", [{"clients": 0}, {"answer_tokens": -1}, {"documents": 2, "documents_per_prompt": 3}])
def test_sizes_without_meaning_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest):
        Sizes(**given)  # type: ignore[arg-type]

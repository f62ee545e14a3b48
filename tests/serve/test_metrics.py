"""What is counted of requests, to the token; and that the list of metrics is what the registry has."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.kv.doubles import DictTier
from tests.serve.blending import HEAD, prompt_of
from tests.serve.conftest import END, Stage, ids
from tests.serve.test_fetch import ask, settled

from rekindle.errors import EngineError, PromptTooLong
from rekindle.kv.store import Fetched
from rekindle.reuse.blend import Blend
from rekindle.reuse.plan import Compute, Fork, Place, Plan
from rekindle.reuse.prompt import Prompt
from rekindle.serve.counting import Rate, Times
from rekindle.serve.metric_list import METRICS, PREFIX
from rekindle.serve.metrics import CHUNK_OUTCOMES, OUTCOMES, SOURCES, Metrics, sources_of
from rekindle.serve.request import Generation, Sampling, request_id
from rekindle.serve.service import Service
from rekindle.settings import Settings
from rekindle.tokens import as_tokens


class Counted:
    """A stage with metrics, and their samples."""

    def __init__(self, **options: object) -> None:
        self.metrics = Metrics()
        self.stage = Stage(observer=self.metrics, **options)  # type: ignore[arg-type]

    def value(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(f"rekindle_{name}", labels)
        assert value is not None, f"no sample {name} {labels}"
        return value

    def sources(self) -> dict[str, int]:
        """Prompt tokens by source, without zeros."""
        counts = {source: int(self.value("prompt_tokens_total", source=source)) for source in SOURCES}
        return {source: count for source, count in counts.items() if count}


def test_tokens_of_a_cold_prompt_a_repeat_and_a_longer_one_by_source() -> None:
    counted = Counted()
    prompt = ids(1, 100)
    counted.stage.ask(prompt, 5)
    assert counted.sources() == {"computed": 100}
    counted.stage.ask(prompt, 5)  # its logits are kept: nothing is computed
    assert counted.sources() == {"computed": 100, "resident": 100}
    counted.stage.ask(prompt + ids(2, 30), 5)
    assert counted.sources() == {"computed": 130, "resident": 200}
    assert counted.value("generated_tokens_total") == 15 == counted.metrics.num_generated


def test_chunks_of_blended_prompts_by_what_became_of_them() -> None:
    counted = Counted(head=HEAD)
    one, other, third = ids(21, 60), ids(22, 60), ids(23, 60)
    blend = Blend("none", 0)
    counted.stage.ask(prompt_of([one, other, []]), 1, blend=blend)
    while counted.stage.scheduler.use_idle_time():
        counted.stage.run()
    assert counted.sources() == {"computed": 130}
    counted.stage.ask(prompt_of([one, third, other]), 1, blend=blend)
    outcomes = {outcome: counted.value("chunks_total", outcome=outcome) for outcome in CHUNK_OUTCOMES}
    assert outcomes == {"exact": 1, "placed": 1, "computed": 3}
    assert counted.sources() == {"computed": 130 + 60 + 2 + 2 + 3, "resident": 63, "blended": 60}
    counted.stage.ask(prompt_of([one, other]), 1)
    assert sum(counted.value("chunks_total", outcome=outcome) for outcome in CHUNK_OUTCOMES) == 5


def test_tokens_from_memory_after_the_residents_have_left() -> None:
    counted = Counted()
    prompt = ids(3, 100)
    counted.stage.ask(prompt, 1)
    while counted.stage.scheduler.residents.evict():
        pass
    counted.stage.ask([*prompt, *ids(4, 10)], 1)
    assert counted.sources() == {"computed": 110, "memory": 100}
    assert counted.value("resident_evictions_total") == 1
    assert counted.value("request_restore_seconds_count") == 1


@pytest.mark.parametrize("name", ["disk", "network"])
def test_tokens_from_a_slower_tier(name: str) -> None:
    tier, prompt = DictTier(name), ids(5, 100)
    first = Stage(tiers=[tier])
    ask(first, prompt)
    settled(first)
    counted = Counted(tiers=[tier])
    answer = counted.stage.submit([*prompt, *ids(6, 7)], 1)
    counted.stage.scheduler.step()
    assert counted.metrics.num_queued == 1 and not counted.sources()
    counted.stage.end_fetches()
    counted.stage.run()
    assert answer.done.usage.cached_tokens == 100
    assert counted.sources() == {name: 100, "computed": 7}
    assert counted.value("request_restore_seconds_count") == 1


def test_a_prompt_computed_without_reuse_is_computed() -> None:
    counted = Counted()
    for _ in range(2):
        counted.stage.ask(ids(7, 40), 2, use_kv_cache=False)
    assert counted.sources() == {"computed": 80}


@given(
    lengths=st.lists(st.integers(1, 50), min_size=3, max_size=3),
    brought=st.dictionaries(st.sampled_from(["disk", "network"]), st.integers(0, 80)),
)
def test_sources_add_up_to_the_prompt(lengths: list[int], brought: dict[str, int]) -> None:
    fork, place, compute = lengths
    steps = (
        Fork(0, 0, fork, ""),
        Place(fork, fork + place, ""),
        Compute(fork + place, fork + place + compute, ""),
    )
    counts = sources_of(Plan(steps, sum(lengths), None), Fetched(brought))
    assert sum(counts.values()) == sum(lengths)
    assert (counts["resident"], counts["computed"]) == (fork, compute)
    assert all(counts.get(tier, 0) <= count for tier, count in brought.items())
    assert set(counts) <= set(SOURCES)


def test_of_what_is_placed_the_end_came_from_the_slowest_tier() -> None:
    plan = Plan((Place(0, 100, ""),), 100, None)
    counts = sources_of(plan, Fetched({"disk": 30, "network": 20}))
    assert counts == {"memory": 50, "disk": 30, "network": 20}


def test_times_are_observed_once_for_each_request_and_token() -> None:
    counted = Counted()
    prompt = ids(8, 64)
    for _ in range(3):
        counted.stage.ask(prompt, 6)
    assert counted.value("time_to_first_token_seconds_count") == 3
    assert counted.value("request_queue_seconds_count") == 3
    assert counted.value("inter_token_latency_seconds_count") == 3 * 5
    assert counted.value("request_prefill_seconds_count") == 1  # the others computed nothing
    assert counted.value("request_duration_seconds_count") == 3
    assert counted.metrics.mean_ttft_seconds > 0
    assert counted.metrics.mean_duration_seconds > counted.metrics.mean_ttft_seconds


def test_a_gap_of_an_answer_that_was_swapped_out_is_not_beyond_all_buckets() -> None:
    counted = Counted()
    answer = counted.stage.submit(ids(8, 30), 3)
    counted.stage.run(until=lambda: answer.num_tokens == 2)
    answer.run.clock.last_token -= 20.0
    counted.stage.run()
    edges = ("10.0", "30.0")
    assert [counted.value("inter_token_latency_seconds_bucket", le=edge) for edge in edges] == [1, 2]


def test_the_end_of_a_turn_is_no_token_of_the_answer() -> None:
    counted = Counted()
    answer = counted.stage.submit(ids(9, 30), 50, ignore_eos=False, sampling=Sampling(logit_bias={END: 100.0}))
    counted.stage.run()
    assert answer.done.reason == "stop" and answer.done.usage.completion_tokens == 0
    assert counted.value("generated_tokens_total") == 0
    assert counted.value("inter_token_latency_seconds_count") == 0
    assert counted.value("requests_total", outcome="stop") == 1


def test_requests_are_counted_by_how_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted()
    counted.stage.ask(ids(10, 30), 2)
    answer = counted.stage.submit(ids(11, 30), 2)
    answer.run.cancel()
    counted.stage.run()

    def fail(work: object) -> object:
        raise EngineError("made to fail")

    monkeypatch.setattr(counted.stage.engine, "forward", fail)
    counted.stage.ask(ids(12, 30), 2)
    outcomes = {outcome: counted.value("requests_total", outcome=outcome) for outcome in OUTCOMES}
    assert outcomes == {"stop": 0, "length": 1, "cancelled": 1, "failed": 1, "refused": 0}
    assert counted.value("request_duration_seconds_count") == 1
    assert counted.metrics.num_requests == 3
    assert (counted.metrics.num_running, counted.metrics.num_queued) == (0, 0)


def test_running_queued_and_swapped_add_up_at_every_step() -> None:
    counted = Counted(num_cells=260)
    scheduler = counted.stage.scheduler
    for seed in (17, 18, 19):
        counted.stage.submit(ids(seed, 60), 60)
    most_swapped = 0.0
    while scheduler.waiting or scheduler.running:
        running, queued = counted.value("requests_running"), counted.value("requests_queued")
        swapped = counted.value("requests_swapped")
        assert running == len(scheduler.running)
        assert queued + swapped == len(scheduler.waiting)
        most_swapped = max(most_swapped, swapped)
        scheduler.step()
    assert most_swapped >= 1
    assert counted.value("swaps_total") >= 1
    assert counted.value("requests_swapped") == 0


def test_the_present_speed_forgets() -> None:
    now = 100.0
    rate = Rate("tokens", "Tokens.", lambda: now)
    assert rate.per_second() == 0.0
    for _ in range(200):
        now += 0.05
        rate.add(2, now)
    assert rate.per_second() == pytest.approx(40, rel=0.06)
    now += 5
    assert rate.per_second() == pytest.approx(20, rel=0.11)
    now += 6
    assert rate.per_second() == 0.0
    now += 100
    rate.add(30, now)
    assert rate.per_second() == pytest.approx(3)


@given(seconds=st.lists(st.floats(0, 3, allow_nan=False), max_size=30))
def test_our_histogram_is_the_clients_one(seconds: list[float]) -> None:
    edges = (0.001, 0.01, 0.5, 1.0, 2.0)
    theirs, ours = Histogram("t", "T.", registry=None, buckets=edges), Times("t", "T.", edges)
    for each in [*seconds, *edges]:
        theirs.observe(each)
        ours.observe(each)
    values = []
    for histogram in (theirs, ours):
        samples = [sample for family in histogram.collect() for sample in family.samples]
        values.append(
            {(each.name, each.labels.get("le")): each.value for each in samples if "created" not in each.name}
        )
    assert values[0] == pytest.approx(values[1])


# A whole service.


@pytest.fixture
def service() -> Iterator[Service]:
    with Service.open(Settings(engine="toy", store="none", context=512)) as service:
        yield service


def samples(service: Service) -> dict[str, float]:
    """All samples, as a scraper sees them."""
    text = generate_latest(service.metrics.registry).decode()
    families = text_string_to_metric_families(text)
    return {
        sample.name + "".join(f"{{{value}}}" for label, value in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def generate(service: Service, tokens: list[int], max_tokens: int) -> None:
    generation = Generation(prompt=service.token_prompt(tokens), max_tokens=max_tokens, ignore_eos=True)
    for _ in service.events(generation):
        pass
    service.check_integrity()  # the worker has told its observers by then


def test_a_service_has_just_the_metrics_that_are_listed(tmp_path: Path) -> None:
    with Service.open(Settings(engine="toy", store=str(tmp_path), context=512)) as service:
        service.metrics.answered("GET", "/health", 200)
        families = {family.name: family for family in service.metrics.registry.collect()}
    found = {name: family for name, family in families.items() if not name.startswith("process_")}
    listed = {f"{PREFIX}{metric.name}": metric for metric in METRICS}
    assert set(found) == set(listed)
    for name, metric in listed.items():
        family = found[name]
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert (family.type, family.documentation, labels) == (metric.kind, metric.help, set(metric.labels)), name


def test_names_follow_the_conventions() -> None:
    for metric in METRICS:
        assert metric.help.endswith(".")
        assert re.fullmatch(r"[a-z][a-z_]*[a-z]", metric.name)
        assert not metric.name.endswith(("_total", "_info", "_count", "_sum", "_bucket", "_ms"))
        if metric.kind == "histogram":
            assert metric.name.endswith("_seconds")
            assert list(metric.edges) == sorted(set(metric.edges))


def test_levels_are_those_of_engine_and_store(service: Service) -> None:
    prompt = [int(token) for token in np.random.default_rng(3).integers(10, 200, 130)]
    generate(service, prompt, 4)
    service.settle()
    found = samples(service)
    assert found["rekindle_cells_capacity"] == 512
    assert found["rekindle_cells_used"] == 133  # the last token's KV is never computed
    assert found["rekindle_computed_tokens_total"] == 133 == service.num_computed
    assert found["rekindle_model_calls_total"] == service.num_calls
    assert (found["rekindle_residents"], found["rekindle_resident_tokens"]) == (1, 133)
    assert found["rekindle_tier_blocks{memory}"] == service.stats().blocks > 0
    assert found["rekindle_tier_bytes{memory}"] == service.stats().bytes > 0
    assert found["rekindle_tier_capacity_bytes{memory}"] == service.stats().max_bytes
    assert found["rekindle_tier_up{memory}"] == found["rekindle_worker_up"] == 1


def test_what_is_refused_is_counted(service: Service) -> None:
    with pytest.raises(PromptTooLong):
        service.submit(Generation(prompt=Prompt(as_tokens([5] * 600))), lambda event: None)
    assert samples(service)["rekindle_requests_total{refused}"] == 1


def test_a_dead_worker_is_down(service: Service) -> None:
    def die(engine: object) -> None:
        raise SystemError("made to fail")

    service._worker._scheduler.step = die  # type: ignore[method-assign,assignment]
    service._worker.wake()
    service._worker._thread.join(60)
    assert samples(service)["rekindle_worker_up"] == 0


def test_services_count_apart(service: Service) -> None:
    generate(service, list(range(10, 60)), 3)
    with Service.open(Settings(engine="toy", store="none", context=512)) as other:
        assert samples(other)["rekindle_generated_tokens_total"] == 0
    assert samples(service)["rekindle_generated_tokens_total"] == 3


def test_scrapes_during_load_lose_nothing_and_never_go_back(service: Service) -> None:
    num_callers, num_requests, num_tokens = 4, 15, 5
    scraped: list[dict[str, float]] = []

    def call(seed: int) -> None:
        for number in range(num_requests):
            tokens = [int(each) for each in np.random.default_rng([seed, number]).integers(10, 200, 30)]
            generation = Generation(prompt=service.token_prompt(tokens), max_tokens=num_tokens, ignore_eos=True)
            for _ in service.events(generation):
                pass

    callers = [Thread(target=call, args=(seed,)) for seed in range(num_callers)]
    for caller in callers:
        caller.start()
    while any(caller.is_alive() for caller in callers):
        scraped.append(samples(service))
    for caller in callers:
        caller.join()
    service.check_integrity()
    scraped.append(samples(service))
    counters = [name for name in scraped[-1] if "_total" in name or name.endswith("_count")]
    for before, after in pairwise(scraped):
        assert all(before.get(name, 0) <= after[name] for name in counters)
    last = scraped[-1]
    assert last["rekindle_requests_total{length}"] == num_callers * num_requests
    assert last["rekindle_generated_tokens_total"] == num_callers * num_requests * num_tokens
    prompt_tokens = sum(value for name, value in last.items() if name.startswith("rekindle_prompt_tokens_total"))
    assert prompt_tokens == num_callers * num_requests * 30
    assert last["rekindle_time_to_first_token_seconds_count"] == num_callers * num_requests


# What is logged on the worker's thread.


def test_a_dying_worker_names_the_requests_it_leaves(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    def die(*told: object) -> None:
        raise SystemError("made to fail")

    token = request_id.set("left-alone")
    try:
        service._engine.forward = die  # type: ignore[method-assign,assignment]
        events: list[object] = []
        service.submit(Generation(prompt=service.token_prompt(list(range(10, 50)))), events.append)
    finally:
        request_id.reset(token)
    service._worker._thread.join(60)
    (record,) = [record for record in caplog.records if record.getMessage() == "the worker failed"]
    assert record.__dict__["fields"] == {"request_ids": "left-alone"}


def test_a_line_about_a_request_is_logged_in_its_context(service: Service) -> None:
    found: list[str] = []

    class Ids(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(request_id.get())

    def fail(event: object) -> None:
        raise ValueError("made to fail")

    logger, handler = logging.getLogger("rekindle.serve.run"), Ids()
    logger.addHandler(handler)
    token = request_id.set("broken-sink")
    try:
        service.submit(Generation(prompt=service.token_prompt(list(range(10, 50))), max_tokens=3), fail)
    finally:
        request_id.reset(token)
    service.close()
    logger.removeHandler(handler)
    assert found and set(found) == {"broken-sink"}

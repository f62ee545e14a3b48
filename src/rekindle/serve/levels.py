"""What is a state of a service and not an event: read when somebody asks for metrics, and at no other time.

All of it is read from another thread than the worker's: single numbers, the worker's latest snapshot, and what the store
and its tiers have counted, whose locks are held for moments.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric as Family

from rekindle.engine.protocol import Engine
from rekindle.kv.store import Store, StoreStats
from rekindle.kv.tier import TierStats
from rekindle.serve.metric_list import BY_NAME, PREFIX
from rekindle.serve.worker import Worker

OF_SLOWER_TIERS = ("hits", "misses", "read_bytes", "written_bytes")  # of memory, where tokens come from says more
Labels = tuple[str, ...]
Samples = Iterable[tuple[Labels, float]]


class Levels:
    """A collector for Prometheus' registry, of one engine, its worker and its store."""

    def __init__(self, engine: Engine, store: Store, worker: Worker, *, model: Mapping[str, str]) -> None:
        """`model` gives the labels of the metric of this name."""
        self._engine = engine
        self._store = store
        self._worker = worker
        self._infos = {"build": build_facts(), "model": dict(model)}

    def collect(self) -> Iterator[Family]:
        for name, labels in self._infos.items():
            yield _info(name, labels)
        for name, value in self.numbers().items():
            yield _family(name, [((), value)])
        stats = self._store.stats()
        yield _family("store_dropped_blocks", [((), stats.dropped)])
        yield _family("tier_pinned_bytes", [(("memory",), stats.pinned_bytes)])
        for name, samples in _tier_samples(tiers_of(stats)).items():
            yield _family(name, samples)

    def tiers(self) -> list[TierStats]:
        """All tiers, memory first."""
        return tiers_of(self._store.stats())

    def numbers(self) -> dict[str, float]:
        """Of engine and worker, by the names of their metrics."""
        engine, snapshot = self._engine, self._worker.snapshot
        return {
            "worker_up": float(self._worker.failure is None),
            "computed_tokens": engine.num_computed,
            "model_calls": engine.num_calls,
            "cells_capacity": engine.num_cells,
            "cells_used": engine.num_cells - engine.num_free_cells,
            "sequences_used": snapshot.running + snapshot.residents,
            "residents": snapshot.residents,
            "resident_tokens": snapshot.resident_tokens,
        }


def build_facts() -> dict[str, str]:
    """Versions of Rekindle and of what it computes with."""
    return {
        "version": _version("rekindle"),
        "llama_cpp_python": _version("llama-cpp-python"),
        "python": platform.python_version(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def tiers_of(stats: StoreStats) -> list[TierStats]:
    """All tiers, memory first."""
    memory = TierStats(
        name="memory",
        blocks=stats.blocks,
        bytes=stats.bytes,
        max_bytes=stats.max_bytes,
        evictions=stats.evictions,
        state=stats.state,
    )
    return [memory, *stats.tiers]


def _tier_samples(tiers: Iterable[TierStats]) -> dict[str, list[tuple[Labels, float]]]:
    values: dict[str, list[tuple[Labels, float]]] = {}
    for tier in tiers:
        numbers = {
            "tier_blocks": tier.blocks,
            "tier_bytes": tier.bytes,
            "tier_capacity_bytes": tier.max_bytes,
            "tier_up": tier.state == "ok",
            "tier_hits": tier.hits,
            "tier_misses": tier.misses,
            "tier_read_bytes": tier.read_bytes,
            "tier_written_bytes": tier.written_bytes,
            "tier_evictions": tier.evictions,
            "tier_faults": tier.faults,
            "tier_corrupt_blocks": tier.corrupt,
        }
        if tier.name == "memory":
            for name in OF_SLOWER_TIERS:
                del numbers[f"tier_{name}"]
        for name, number in numbers.items():
            if number is not None:
                values.setdefault(name, []).append(((tier.name,), float(number)))
    return values


def _family(name: str, samples: Samples) -> Family:
    metric = BY_NAME[name]
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(PREFIX + name, metric.help, labels=metric.labels)
    for labels, value in samples:
        family.add_metric(labels, value)
    return family


def _info(name: str, labels: Mapping[str, str]) -> Family:
    family = InfoMetricFamily(PREFIX + name, BY_NAME[name].help)
    family.add_metric([], dict(labels))
    return family

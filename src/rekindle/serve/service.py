"""What the floors above talk to: one model with its tokenizer, template, engine, store and worker."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rekindle import heap
from rekindle.engine.protocol import Engine
from rekindle.errors import InvalidRequest, PromptTooLong, RekindleError
from rekindle.kv.disk import DiskTier
from rekindle.kv.pins import Pin
from rekindle.kv.store import Fetched
from rekindle.model.model import Model
from rekindle.reuse.blend import Blend, check_select
from rekindle.reuse.prompt import Prompt
from rekindle.serve.assembly import check_store_url, engine_name, open_courtesy, open_crowding, open_engine, open_store
from rekindle.serve.blend_gate import BlendGate, BlendingRefused
from rekindle.serve.blending import Blending, blends, check_blend, check_layer, offered, tell_if_unmovable
from rekindle.serve.grammar import Grammars
from rekindle.serve.kept import CacheStats, Warmed
from rekindle.serve.levels import Levels
from rekindle.serve.marked import Wish, wished_blend
from rekindle.serve.metrics import Metrics
from rekindle.serve.observe import Observer, Observers
from rekindle.serve.pinning import Pinning, Watch
from rekindle.serve.policies import Policy, policy_named
from rekindle.serve.prompting import Prompting
from rekindle.serve.request import Done, Event, Failed, Generation, Sink
from rekindle.serve.rows import Rows
from rekindle.serve.run import Clock, Run
from rekindle.serve.scheduler import Scheduler
from rekindle.serve.scores import Scores
from rekindle.serve.traces import Traces, open_traces
from rekindle.serve.worker import Worker
from rekindle.settings import Settings
from rekindle.tokens import Tokens

FETCHERS = 4  # prompts that are looked for in slower tiers at the same time
_TELL_SECONDS = 0.1  # between reports of progress


class Ticket(Protocol):
    """A submitted generation."""

    def cancel(self) -> None:
        """Stop it at the next step, wherever it is; its sink still gets a `Done` with reason "cancelled"."""


@dataclass(frozen=True)
class _Ticket:
    """The ticket of a run: the worker is woken, for it may be waiting for something else."""

    run: Run
    worker: Worker

    def cancel(self) -> None:
        self.run.cancel()
        self.worker.wake()


class Service(Prompting):
    """One served model. Thread-safe, but for `open` and `close`. A context manager."""

    def __init__(
        self,
        settings: Settings,
        model: Model,
        engine: Engine,
        observers: Sequence[Observer] = (),
        policy: Policy | None = None,
    ) -> None:
        super().__init__(model, blend_head=settings.blend_head, chunk_separator=settings.chunk_separator)
        self.settings = settings
        self.engine_spec = engine.spec
        self.num_cells = engine.num_cells
        self.max_tokens = min(engine.num_cells, engine.spec.train_context)  # of one sequence, prompt and answer
        self._engine = engine
        with ExitStack() as undo:  # what was begun ends, in the opposite order, if something fails here, or in `close`
            undo.callback(engine.shutdown)
            check_select(settings.blend_select, offered(engine.spec), "blend_select")
            if settings.blend_layer is not None and engine.spec.can_look:
                check_layer(Blend("deviation", layer=settings.blend_layer), engine.spec, "blend_layer")
            self._store = open_store(settings, model, engine)
            self._writer = threading.Thread(target=self._store.behind.run, name="rekindle-writer", daemon=True)
            self._writer.start()
            undo.callback(self._close_store)
            self._fetchers = ThreadPoolExecutor(FETCHERS, "rekindle-fetch")
            undo.callback(self._fetchers.shutdown, cancel_futures=True)
            self._probed = self._fetchers.submit(self._get_ready)
            self.metrics = Metrics()
            given = next((each for each in observers if isinstance(each, Traces)), None)
            self.traces = given or open_traces()
            if self.traces is not None:
                undo.callback(self.traces.close)
                self.traces.bind(self.model_name)
                observers = observers if given else [*observers, self.traces]
            crowding = open_crowding(settings, model)
            if crowding is not None:
                undo.callback(crowding.close)
                observers = [*observers, crowding]
            if (courtesy := open_courtesy(settings, model)) is not None:
                observers = [*observers, courtesy]
            self._scores = Scores(engine.spec.fingerprint, self.head, self.folder)
            rows = Rows() if engine_name(settings, model) == "llama.cpp" else None
            self._blending = Blending(self._store, self.head, self._scores, rows)
            scheduler = Scheduler(
                engine,
                self._store,
                model.tokenizer,
                max_running=settings.max_running,
                max_residents=settings.max_residents,
                prefill_budget=settings.prefill_budget,
                slowdown=settings.prefill_slowdown,
                min_tokens=settings.min_tokens,
                max_length=self.max_tokens,
                fetch=self._begin_fetch if self._store.tiers else None,
                observer=Observers([self.metrics, *observers]),
                policy=policy_named(settings.policy) if policy is None else policy,
                blending=self._blending,
            )
            self._prefill_speed = scheduler.prefill_speed
            self._worker = Worker(scheduler, max_queue=settings.max_queue)
            undo.callback(self._worker.stop)
            self._grammars = Grammars(model.tokenizer)
            gate, fingerprint = settings.blend_gate, engine.spec.fingerprint
            self._gate = None if gate is None else BlendGate.load(Path(gate), fingerprint, settings.blend_least)
            if settings.blend == "marked":
                tell_if_unmovable(engine.spec)
            if self._gate is not None:
                self._gate.tell_of(self.default_blend, engine.spec.num_layers)
            self._pinning = Pinning(self._store)
            self._started = time.monotonic()
            self.levels = Levels(engine, self._store, self._worker, model=self._about_model())
            self.metrics.registry.register(self.levels)
            self._closing = undo.pop_all()

    def _about_model(self) -> dict[str, str]:
        """Labels of a metric."""
        return {
            "model": self.model_name,
            "engine": engine_name(self.settings, self.model),
            "kv_type": self.engine_spec.kv_type,
            "fingerprint": self.engine_spec.fingerprint.hex(),
        }

    @classmethod
    def open(cls, settings: Settings, *, observers: Sequence[Observer] = (), policy: Policy | None = None) -> Self:
        """Load the model and start the worker; `observers` hear what happens, `policy` goes before the settings' one.

        Raises ModelError or InvalidRequest.
        """
        if settings.store_url is not None:
            check_store_url(settings.store_url)  # before a model is loaded in vain
        model = Model.open(
            settings.model,
            engine=settings.engine,
            gpu_layers=settings.gpu_layers,
            vocab_only=settings.engine == "toy",
        )
        try:
            return cls(settings, model, open_engine(settings, model), observers, policy)
        except BaseException:
            model.close()
            raise

    def close(self) -> None:
        """Stop the worker; running generations end as cancelled. What slower tiers lack is written."""
        self._closing.close()
        self.model.close()

    def _close_store(self) -> None:
        self._store.close(self.settings.store_flush_seconds)
        self._writer.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def default_blend(self) -> Blend:
        """How a request blends that asks for it and says no more."""
        return Blend(self.settings.blend_select, self.settings.blend_ratio, self.settings.blend_layer)

    def blend_of(self, wish: Wish, prompt: Prompt) -> Blend | None:
        """How a prompt is read of which a request says this, None for nothing said; the result None for exactly.

        Raises InvalidRequest; BlendingRefused if it asks for what was not measured to be good enough.
        """
        is_asked = wish is not None
        is_usual = self.settings.blend == "marked" and self.engine_spec.can_shift
        blend = wished_blend(wish if is_asked else is_usual, self.default_blend, offered(self.engine_spec))
        if blend is None or not prompt.chunks:
            return None
        try:
            if self._gate is not None:
                self._gate.check(blend, self.engine_spec.num_layers)
        except BlendingRefused:
            if is_asked:
                raise
            return None
        return blend

    # Generating.

    def submit(self, generation: Generation, sink: Sink) -> Ticket:
        """Queue a generation. Raises PromptTooLong, Overloaded, InvalidRequest at once; later errors reach the sink."""
        watch: Watch | None = None
        try:
            self._check_length(generation.prompt)
            check_blend(generation, self.engine_spec)
            watch = None if generation.pin_seconds is None else self._pinning.watch(generation, sink)
            run = self._run(generation, watch or sink)
            self._worker.submit(run)
        except RekindleError:
            self.metrics.refused()
            if watch is not None:
                watch.undo()
            raise
        return _Ticket(run, self._worker)

    def check_room(self) -> None:
        """For who would do something before one more generation is queued. Raises Overloaded."""
        try:
            self._worker.check_room()
        except RekindleError:
            self.metrics.refused()
            raise

    def _check_length(self, prompt: Prompt) -> None:
        """Raises PromptTooLong."""
        if len(prompt) >= self.max_tokens:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens; the context holds {self.max_tokens}, prompt and answer together",
                param="prompt",
            )

    def check_lengths(self, prompts: Sequence[Prompt], name: str) -> None:
        """Raises PromptTooLong for one that is, and says which of them it is."""
        for number, prompt in enumerate(prompts):
            try:
                self._check_length(prompt)
            except PromptTooLong as error:
                if len(prompts) == 1:
                    raise
                raise PromptTooLong(f"{name}[{number}]: {error}", param=f"{name}[{number}]") from None

    def _run(self, generation: Generation, sink: Sink) -> Run:
        """A run of what can be run here. Raises InvalidRequest."""
        size = self.engine_spec.vocab_size
        for token in generation.sampling.logit_bias:
            if not 0 <= token < size:
                raise InvalidRequest(f"logit_bias names token {token}; ids go from 0 to {size - 1}", param="logit_bias")
        schema = generation.json_schema
        grammar = None if schema is None else self._grammars.for_schema(schema)
        now = time.perf_counter()
        arrived = now - generation.tokenize_ms / 1000 if generation.arrived is None else generation.arrived
        return Run(generation, self._remembering(generation, sink), grammar, Clock(arrived=arrived, submitted=now))

    def _get_ready(self) -> None:
        """Tell of a wrong folder or password now, and have memory for the first fetch."""
        self._store.probe()
        self._store.prepare()

    def _begin_fetch(self, run: Run) -> Future[Fetched]:
        """Look for a prompt's KV in slower tiers, in a thread; the worker is woken when that is done."""
        prompt = run.generation.prompt
        compute = None if run.generation.warm else self._prefill_speed  # what is stored need not be computed to be warm
        future: Future[Fetched]
        if blends(run):
            future = self._fetchers.submit(self._blending.fetch, prompt, compute)
        else:
            future = self._fetchers.submit(self._store.fetch, prompt.tokens, prompt.salt, compute=compute)
        future.add_done_callback(self._fetched)
        return future

    def _fetched(self, future: Future[Fetched]) -> None:
        """The worker goes on, and meanwhile memory for the next fetch is made ready."""
        self._worker.wake()
        if not future.cancelled() and future.exception() is None and future.result().tokens:
            with suppress(RuntimeError):  # at the end no more is taken on
                self._fetchers.submit(self._store.prepare)

    def _remembering(self, generation: Generation, sink: Sink) -> Sink:
        """Note the whole text of a finished sequence before its end is told."""
        if generation.prompt.text is None:
            return sink

        def remember(event: Event) -> None:
            if isinstance(event, Done):
                self.remember(generation.prompt, event.text, event.tokens)
            sink(event)

        return remember

    def events(self, generation: Generation, meanwhile: Callable[[], object] | None = None) -> Iterator[Event]:
        """Submit and yield events; ends after `Done`. Raises what `Failed` carries. Closing the iterator cancels.

        `meanwhile` is called now and then while nothing comes.
        """
        inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        ticket = self.submit(generation, inbox.put)
        try:
            while True:
                try:
                    event = inbox.get(timeout=None if meanwhile is None else _TELL_SECONDS)
                except queue.Empty:
                    assert meanwhile is not None
                    meanwhile()
                    continue
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Done):
                    return
        finally:
            ticket.cancel()

    # What is kept, and how it goes.

    def stats(self) -> CacheStats:
        return CacheStats.of(self._worker.snapshot, self._store.stats())

    def clear_cache(self, *, every_model: bool = False) -> None:
        """Forget all residents and everything stored of this model, or of every model. Running requests go on.

        Pins stay: what is stored of their prompts later is kept again. Memory goes back to the system.
        Raises TierUnavailable if a tier keeps what it has.
        """
        self._transcripts.clear()
        self._worker.call(Scheduler.clear_cache)
        self._scores.clear()
        try:
            self._store.clear(every_model=every_model)
        finally:
            heap.trim()

    def clear_memory(self) -> None:
        """Forget all residents and what is in memory; slower tiers keep what they have."""
        self._worker.call(Scheduler.clear_cache)

    def pin(self, prompt: Prompt, seconds: float, *, name: str | None = None) -> Pin:
        """Keep a prompt's KV for so long, whether it was read yet or not; once more renews it.

        Raises InvalidRequest if too much would be pinned, or PromptTooLong.
        """
        self._check_length(prompt)
        return self._pinning.pin(prompt, seconds, name=name)

    def unpin(self, pin_id: str, *, owner: bytes = b"") -> bool:
        """End a pin, whose salt begins with `owner`; False if there is none."""
        return self._pinning.unpin(pin_id, owner)

    def pins(self, *, owner: bytes = b"") -> list[Pin]:
        """Pins whose salts begin with `owner`; which end first, first."""
        return self._pinning.all(owner)

    def warm(self, prompt: Prompt, progress: Callable[[int], object] = lambda computed: None) -> Warmed:
        """Compute a prompt's KV ahead of time, while no request has work, and store it; waits until it is written.

        `progress` is told now and then how many tokens the engine has computed meanwhile. Raises PromptTooLong,
        Overloaded, and whatever makes a request fail.
        """
        before = self.num_computed
        generation = Generation(prompt=prompt, warm=True)
        (done,) = self.events(generation, lambda: progress(self.num_computed - before))
        assert isinstance(done, Done)
        return self.warmed(prompt, done)

    def warmed(self, prompt: Prompt, done: Done) -> Warmed:
        """What came of a generation that was to warm a prompt; waits until it is written to slower tiers."""
        self._store.behind.flush(self.settings.store_flush_seconds)
        return Warmed(
            tokens=len(prompt),
            computed=done.usage.computed_tokens,
            stored_bytes=self.stored_bytes(prompt),
            seconds=done.timings.total_ms / 1000,
        )

    def stored_bytes(self, prompt: Prompt) -> int:
        """Of a prompt's KV in the store's memory; 0 unless it is whole."""
        match = self._store.match(prompt.tokens, prompt.salt)
        return sum(block.num_bytes for block in match.blocks) if match.length == len(prompt) else 0

    @property
    def folder(self) -> Path | None:
        """The disk tier's, if there is one."""
        return next((tier.path for tier in self._store.tiers if isinstance(tier, DiskTier)), None)

    def decode_own(self, fingerprint: bytes, tokens: Tokens) -> str | None:
        """The text of stored tokens, if it is this model that they are of."""
        return self.detokenize(tokens.tolist()) if fingerprint == self.engine_spec.fingerprint else None

    def settle(self, timeout_seconds: float | None = None) -> bool:
        """Save every resident to the store and wait until it is written; False if that took too long."""

        def save(scheduler: Scheduler) -> None:
            while scheduler.residents.save_one():
                pass

        self._worker.call(save)
        return self._store.behind.flush(timeout_seconds)

    def study(self, timeout_seconds: float | None = None) -> bool:
        """Wait until chunks that were met are computed on their own, so that they can be placed; False if not by then.

        Raises EngineError or Stopping if the worker ends meanwhile.
        """
        done = threading.Event()
        self._worker.call(lambda scheduler: scheduler.when_studied(done.set))
        self._worker.wake()
        if not done.wait(timeout_seconds):
            return False
        self._worker.call(lambda scheduler: None)  # it may be done because the worker has ended, which this tells
        return True

    def evict_residents(self) -> None:
        """Let every idle sequence leave the engine for the store."""

        def evict(scheduler: Scheduler) -> None:
            while scheduler.residents.evict():
                pass

        self._worker.call(evict)

    def let_go(self, holder: str) -> None:
        """What `Generation.hold` keeps for this name leaves the engine like any other idle sequence."""
        self._worker.post(lambda scheduler: scheduler.let_go(holder))

    def run_on_engine(self, action: Callable[[Engine], object]) -> None:
        """Do something with the engine between two steps, on its thread; for experiments. Raises what it raises."""
        self._worker.call(lambda scheduler: action(self._engine))

    def check_integrity(self) -> None:
        """Recount engine and store from scratch. Raises AssertionError."""
        self._worker.call(lambda scheduler: scheduler.check_integrity())

    @property
    def num_computed(self) -> int:
        """Tokens the engine has computed since the start."""
        return self._engine.num_computed

    @property
    def num_calls(self) -> int:
        """Model calls since the start."""
        return self._engine.num_calls

    @property
    def alarm(self) -> str | None:
        """Why nobody will be answered any more: the name of the error that ended the worker, "stalled", or None."""
        if self._worker.failure is not None:
            return type(self._worker.failure).__name__
        limit = self.settings.stall_seconds
        return "stalled" if limit is not None and self._worker.busy_seconds > limit else None

    def health(self) -> dict[str, Any]:
        """{"status": "ok" | "failed", "reason" if failed, "model", "engine", "uptime_seconds", "running", "queued"}."""
        worker, alarm = self._worker.snapshot, self.alarm
        return {
            **({"status": "ok"} if alarm is None else {"status": "failed", "reason": alarm}),
            "model": self.model_name,
            "engine": engine_name(self.settings, self.model),
            "uptime_seconds": round(time.monotonic() - self._started, 1),
            "running": worker.running,
            "queued": worker.waiting,
        }

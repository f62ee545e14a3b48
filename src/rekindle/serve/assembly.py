"""What settings stand for: the engine they describe, and its store with all its tiers."""

from __future__ import annotations

from typing import Any

from rekindle.engine.llama import LlamaEngine
from rekindle.engine.protocol import Engine
from rekindle.engine.toy import ToyEngine
from rekindle.errors import InvalidRequest, ModelError
from rekindle.kv.disk import DiskTier
from rekindle.kv.store import Store
from rekindle.kv.tier import Tier
from rekindle.model.fingerprint import FileStates
from rekindle.model.gguf import GgufModel
from rekindle.model.hf import HfModel
from rekindle.model.model import Model, file_state
from rekindle.model.spec import ModelSpec
from rekindle.serve.budget import free_bytes, memory_budget
from rekindle.serve.cores import reachable_cores, usable_cores
from rekindle.serve.courtesy import Courtesy
from rekindle.serve.crowding import Crowding, watch_crowding
from rekindle.serve.place import store_folder
from rekindle.settings import Settings

DEFAULT_CELLS = 8192
MAX_READY_BYTES = 48 << 20  # of memory for the next prompt that is read from disk, beside the store's budget
NETWORK_TIMEOUT_SECONDS = 2.0  # of each operation of the network tier; decoding goes on meanwhile


def open_engine(settings: Settings, model: Model) -> Engine:
    """The engine that the settings name, or that the model is for. Raises ModelError, EngineError or InvalidRequest."""
    if settings.engine == "toy":
        return _toy_engine(settings, model)
    if model.hf is not None:
        return _torch_engine(settings, model, model.hf)
    assert model.gguf is not None
    return _llama_engine(settings, model, model.gguf)


def engine_name(settings: Settings, model: Model) -> str:
    """For people: "llama.cpp", "torch" or "toy"."""
    return "toy" if settings.engine == "toy" else "llama.cpp" if model.hf is None else "torch"


def open_crowding(settings: Settings, model: Model) -> Crowding | None:
    """Who watches for other programs on the engine's cores, if that is of use to it."""
    is_llama = engine_name(settings, model) == "llama.cpp"
    return watch_crowding(num_threads(settings), reachable_cores()) if is_llama else None


def open_courtesy(settings: Settings, model: Model) -> Courtesy | None:
    """Who lets first tokens out, if the engine's threads leave no core for that."""
    is_on_cores = engine_name(settings, model) == "llama.cpp" and not settings.gpu_layers
    return Courtesy() if is_on_cores and num_threads(settings) >= reachable_cores() else None


def num_threads(settings: Settings) -> int:
    """As asked, or the cores that this process may use."""
    return usable_cores() if settings.threads is None else settings.threads


def _num_cells(settings: Settings, model: Model) -> int:
    """As asked, or room for a few conversations of the length that the model was trained for."""
    return settings.context or min(DEFAULT_CELLS, 2 * model.train_context)


def _num_sequences(settings: Settings) -> int:
    return min(settings.max_running + settings.max_residents + 8, 127)


def _llama_engine(settings: Settings, model: Model, gguf: GgufModel) -> Engine:
    if settings.device not in ("auto", "cpu"):
        raise InvalidRequest(
            f"device {settings.device} is for the torch engine; llama.cpp takes gpu_layers", param="device"
        )
    if settings.dtype != "auto":
        raise InvalidRequest("dtype is for the torch engine; a GGUF file has the types of its weights", param="dtype")
    return LlamaEngine(
        gguf,
        num_cells=_num_cells(settings, model),
        threads=num_threads(settings),
        kv_type=settings.kv_type,
        max_sequences=_num_sequences(settings),
    )


def _torch_engine(settings: Settings, model: Model, folder: HfModel) -> Engine:
    if settings.kv_type != "f16":
        raise InvalidRequest(
            f"kv_type {settings.kv_type} is for llama.cpp; the torch engine keeps KV in the type that it computes in, "
            "which dtype chooses",
            param="kv_type",
        )
    if settings.gpu_layers:
        raise InvalidRequest("gpu_layers is for llama.cpp; the torch engine takes device", param="gpu_layers")
    from rekindle.model.hf_load import load_weights

    files = FileStates(folder.loaded_files)
    loaded = load_weights(folder, device=settings.device, dtype=settings.dtype, threads=num_threads(settings))
    from rekindle.engine.torch.engine import TorchEngine  # here, because importing torch takes seconds
    from rekindle.engine.torch.identity import file_weights_digest

    num_cells = _num_cells(settings, model)
    try:
        return TorchEngine(
            loaded,
            num_cells=num_cells,
            max_sequences=_num_sequences(settings),
            max_length=min(num_cells, model.train_context),
            name=model.name,
            weights=file_weights_digest(loaded, files),
        )
    except (RuntimeError, MemoryError) as error:  # PyTorch has no better name for it on a CPU
        reason = str(error).partition("\n")[0] or "out of memory"
        raise ModelError(f"cannot make an engine of {num_cells:,} cells for {model.name}: {reason}") from error


def open_store(settings: Settings, model: Model, engine: Engine) -> Store:
    """The store as set. Where no size is, its memory is a share of what is free now, with the model loaded."""
    memory = settings.store_memory
    return Store(
        engine.spec.fingerprint,
        max_bytes=memory_budget(free_bytes()) if memory is None else memory,
        block_tokens=settings.block_tokens,
        tiers=open_tiers(settings, model, engine),
        policy=settings.store_policy,
        quota=settings.store_quota,
        max_pinned_share=settings.store_pinned,
        bytes_per_token=engine.spec.kv_bytes_per_token,
    )


def open_tiers(settings: Settings, model: Model, engine: Engine) -> list[Tier]:
    """The slower tiers as set, the fastest first."""
    tiers: list[Tier] = []
    if _wants_disk(settings):
        folder = store_folder(settings)
        label = _label(settings, model, engine)
        disk = DiskTier(
            folder,
            fingerprint=engine.spec.fingerprint,
            max_bytes=settings.store_disk,
            label=label,
            ready_bytes=min(engine.spec.kv_bytes_per_token * engine.num_cells, MAX_READY_BYTES),
        )
        tiers.append(disk)
    if settings.store_url is not None:
        tiers.append(_network_tier(settings.store_url, settings, engine))
    return tiers


def _label(settings: Settings, model: Model, engine: Engine) -> dict[str, Any]:
    """What a folder's reader needs to name the model and to show its tokens as text."""
    file = file_state(model.path)
    return {"name": model.name, "file": file, "kv_type": engine.spec.kv_type, "block_tokens": settings.block_tokens}


def _wants_disk(settings: Settings) -> bool:
    """A toy engine's KV is not worth a file unless a folder is named."""
    is_named = settings.store != "auto"
    return settings.store != "none" and settings.store_disk > 0 and (is_named or settings.engine != "toy")


def _network_tier(url: str, settings: Settings, engine: Engine) -> Tier:
    from rekindle.kv.network import NetworkTier  # here, because most have none

    password = settings.store_password
    return NetworkTier(
        url,
        fingerprint=engine.spec.fingerprint,
        ttl_seconds=settings.store_ttl_seconds,
        timeout_seconds=NETWORK_TIMEOUT_SECONDS,
        password=None if password is None else password.get_secret_value(),
    )


def check_store_url(url: str) -> None:
    """Raises InvalidRequest."""
    from rekindle.kv.link import parse_url

    parse_url(url)


def _toy_engine(settings: Settings, model: Model) -> Engine:
    spec = ModelSpec(
        name=model.name,
        architecture="toy",
        vocab_size=model.tokenizer.vocab_size,
        num_layers=1,
        train_context=4096,
        kv_bytes_per_token=8,
        window=0,
        kv_type=settings.kv_type,
        can_shift=True,
        fingerprint=b"toy" + bytes(13),
    )
    return ToyEngine(spec, settings.context or DEFAULT_CELLS, _num_sequences(settings))

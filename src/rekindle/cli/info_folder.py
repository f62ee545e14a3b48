"""What `rekindle info` says of a folder of safetensors.

The weights are loaded on the CPU and a few tokens are run through them, because how a model's keys turn is found out and
not looked up. A model that the torch engine refuses is described all the same, with the reason.
"""

from __future__ import annotations

from typing import Any

from rekindle.cli.info import PROBE_CELLS, ModelInfo, Reuse, Rope
from rekindle.errors import ModelError
from rekindle.model.fingerprint import FileStates
from rekindle.model.hf import HfModel
from rekindle.model.hf_load import choose_dtype, load_weights
from rekindle.model.model import Model

_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_KINDS = {False: "half pairs (NeoX)", True: "adjacent pairs"}


def describe_folder(asked: str, model: Model, folder: HfModel) -> ModelInfo:
    """Raises ModelError if it can't be loaded."""
    files = FileStates(folder.loaded_files)
    loaded = load_weights(folder, device="cpu")
    from rekindle.engine.torch.engine import TorchEngine  # after the weights, which say what to install
    from rekindle.engine.torch.identity import file_weights_digest

    config = loaded.config.get_text_config()
    kv_type = choose_dtype(folder, "cpu", "auto")
    engine: TorchEngine | None = None
    obstacle: str | None = None
    try:
        weights = file_weights_digest(loaded, files)
        engine = TorchEngine(loaded, num_cells=PROBE_CELLS, max_sequences=8, name=model.name, weights=weights)
    except ModelError as error:
        obstacle = str(error)
    can_shift = engine is not None and engine.spec.can_shift
    if engine is not None and not can_shift:
        obstacle = engine.immovable
    return ModelInfo(
        model=asked,
        name=model.name,
        path=str(model.path),
        architecture=folder.architecture,
        parameters=folder.num_parameters,
        weight_bytes=folder.size_bytes,
        quantisation=_STORED.get(folder.dtype, folder.dtype.lower()),
        context=folder.train_context,
        vocabulary=config.vocab_size,
        layers=config.num_hidden_layers,
        kv_bytes_per_token=_kv_bytes(engine),
        rope=_rope(config, engine),
        sliding_window=engine.spec.window if engine else int(getattr(config, "sliding_window", None) or 0),
        reuse=Reuse(can_cut=engine is not None, can_shift=can_shift, obstacle=obstacle),
        chat_template=model.template is not None,
        fingerprint=engine.spec.fingerprint.hex() if engine else None,
        kv_type=kv_type,
    )


def _kv_bytes(engine: Any) -> dict[str, int]:
    """By the types that it may be served in; nothing if it can't be served."""
    if engine is None:
        return {}
    values = engine.spec.kv_bytes_per_token // _BYTES[engine.spec.kv_type]
    return {name: values * size for name, size in _BYTES.items()}


def _rope(config: Any, engine: Any) -> Rope:
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)  # layers of several kinds have one each
    scaling = str(parameters.get("rope_type", "default"))
    return Rope(
        kind=_rope_kind(parameters, engine),
        base=parameters.get("rope_theta"),
        scaling="none" if scaling == "default" else scaling,
        factor=parameters.get("factor"),
    )


def _rope_kind(parameters: Any, engine: Any) -> str:
    """As the engine found it in the first layer that turns."""
    if not parameters:
        return "none"
    turning = [] if engine is None else [each for each in engine.rotations if each and len(each.frequencies)]
    return _KINDS[turning[0].interleaved] if turning else "unknown"

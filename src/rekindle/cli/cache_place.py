"""Where a `rekindle cache` command looks: a folder, or a server; and how tokens of a folder are shown as text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from rekindle.cli.client import Client, ServerError, first_key
from rekindle.errors import InvalidRequest, ModelError
from rekindle.kv.catalog import Catalog
from rekindle.model.hf_load import DTYPES
from rekindle.serve.listing import Decode
from rekindle.serve.place import store_folder
from rekindle.settings import Settings
from rekindle.tokens import Tokens


def client_of(url: str, api_key: str | None) -> Client:
    """For a running server. Raises InvalidRequest."""
    return Client(url, key=api_key or first_key(Settings.load()))


def folder_of(store: str | None) -> Path:
    """The folder that is meant. Raises InvalidRequest."""
    settings = Settings.load(None, store=store)
    if settings.store == "none":
        raise InvalidRequest("the store has no folder (store is none); name one with --store", param="store")
    return store_folder(settings)


def one_of(store: str | None, url: str | None) -> None:
    """Raises InvalidRequest if both are given."""
    if store is not None and url is not None:
        raise InvalidRequest("expected --store or --url, got both", param="url")


@contextmanager
def understood(url: str | None) -> Iterator[None]:
    """What a server sends is taken for what a Rekindle server sends. Raises ServerError if it turns out not to be."""
    try:
        yield
    except (KeyError, TypeError) as error:
        if url is None:
            raise
        raise ServerError(f"{url} sent something unexpected ({error!r}); is it a Rekindle server?") from None


@contextmanager
def decoder(catalog: Catalog, model: str | None) -> Iterator[Decode]:
    """Shows tokens of the models that the folder's notes name, as long as their files are what they were, and of `model`.

    Raises ModelError if `model` can't be opened.
    """
    with ExitStack() as stack:
        tokenizers: dict[bytes, Any] = {}
        for fingerprint in catalog.fingerprints():
            tokenizer = _noted(catalog.labels.get(fingerprint, {}), stack)
            if tokenizer is not None:
                tokenizers[fingerprint] = tokenizer
        if model is not None:
            tokenizers |= _named(model, stack)

        def decode(fingerprint: bytes, tokens: Tokens) -> str | None:
            tokenizer = tokenizers.get(fingerprint)
            with suppress(InvalidRequest):  # an id that this vocabulary lacks
                return None if tokenizer is None else str(tokenizer.decode(tokens))
            return None

        yield decode


def _noted(label: dict[str, Any], stack: ExitStack) -> Any:
    """The tokenizer of the model that a note names, or None if its file is another one now."""
    from rekindle.model.model import Model, file_state

    with suppress(OSError, ModelError, KeyError, TypeError):
        noted = label["file"]
        path = Path(noted["path"])
        state = file_state(path)
        if (state["size"], state["mtime_ns"]) == (noted["size"], noted["mtime_ns"]):
            model = Model.open(str(path), vocab_only=True)
            stack.callback(model.close)
            return model.tokenizer
    return None


def _named(name: str, stack: ExitStack) -> dict[bytes, Any]:
    """The tokenizer of a model that a user names, by all fingerprints that its KV may have."""
    from rekindle.engine.llama import KV_TYPES
    from rekindle.model.model import Model
    from rekindle.serve.assembly import open_engine

    model = Model.open(name)
    stack.callback(model.close)
    types = [{"dtype": dtype} for dtype in DTYPES] if model.gguf is None else [{"kv_type": kind} for kind in KV_TYPES]
    found = {}
    for chosen in types:
        with suppress(ModelError):  # not every model may have every type
            engine = open_engine(Settings.load(None, {}, context=256, threads=1, **chosen), model)
            found[engine.spec.fingerprint] = model.tokenizer
            engine.shutdown()
    return found

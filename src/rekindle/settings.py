"""One frozen `Settings` object, made from a file, the environment and flags, in that order of growing weight.

The file is TOML (`--config FILE`), environment names are the field names in capitals after `REKINDLE_`
(`REKINDLE_THREADS=2`), flags are keyword arguments. A name that is not a setting is refused with the nearest known one.
A setting of several values is an array in the file, an option given several times, or one text with commas between
them; it may be named in the plural (`REKINDLE_API_KEYS=one,two`).
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, SecretStr, ValidationError, field_validator

from rekindle.errors import InvalidRequest, nearest

PREFIX = "REKINDLE_"
SECRETS = frozenset({"store_url", "store_password", "api_key"})  # not repeated in messages; a URL may hold a password
SEVERAL = frozenset({"allowed_host", "api_key", "cors_origin"})


class Settings(BaseModel):
    """Everything that can be chosen about a running Rekindle. Sizes are in bytes, times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)

    model: str = Field(
        "builtin",
        description="builtin, the path of a .gguf file or of a folder of safetensors, or hf:owner/repo[:file]",
    )
    engine: Literal["auto", "llama", "torch", "toy"] = Field(
        "auto", description="what computes KV; auto: llama for .gguf files, torch for safetensors; toy is a test double"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="where the torch engine computes; auto: on a GPU, if there is one"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type of the torch engine's numbers, KV too; auto: the weights', but no float16 on a CPU"
    )
    context: int | None = Field(None, ge=64, description="KV cells, shared by all sequences; default: by the model")
    threads: int | None = Field(None, ge=1, description="compute threads; default: the cores that it may use")
    gpu_layers: int = Field(0, ge=-1, description="layers that llama.cpp offloads to a GPU, -1 for all")
    kv_type: Literal["f16", "q8_0", "q4_0"] = Field("f16", description="type of llama.cpp's K and V cells")
    max_running: int = Field(16, ge=1, le=64, description="sequences that decode at the same time")
    max_residents: int = Field(32, ge=0, le=60, description="idle sequences kept in the engine for the next request")
    policy: Literal["fifo", "priority", "cache-aware"] = Field(
        "fifo", description="who goes first when not everybody can: the first, the most urgent, the longest reuse"
    )
    prefill_budget: int = Field(512, ge=1, description="most prompt tokens computed per step beside running streams")
    prefill_slowdown: float = Field(
        2.0, ge=1, description="how much longer a step of running streams may get, as a factor, to read prompts beside"
    )
    max_queue: int = Field(256, ge=1, description="requests that may wait; one more is refused")
    block_tokens: int = Field(64, ge=1, description="tokens per stored block")
    min_tokens: int = Field(20, ge=0, description="prompts shorter than this are not stored")
    store_memory: ByteSize | None = Field(
        None, description="size of the store's memory tier; default: a quarter of the memory that is free at start"
    )
    store_policy: Literal["prospect", "gdsf", "lru"] = Field(
        "prospect", description="which block of memory goes when room is needed"
    )
    store_quota: float = Field(
        1.0,
        gt=0,
        le=1,
        description="most of the store's memory that one cache_salt may have; below 1, all share fairly",
    )
    store_pinned: float = Field(0.5, ge=0, le=1, description="most of the store's memory that pins may take")
    store: str = Field("auto", description="folder of the store's disk tier, or none; auto: in the user's cache folder")
    store_disk: ByteSize = Field(ByteSize(20 << 30), description="size of the store's disk tier")
    store_url: str | None = Field(
        None, repr=False, description="valkey:// or redis:// URL of the store's network tier; rediss:// for TLS"
    )
    store_ttl_seconds: int = Field(
        7 * 24 * 3600, ge=1, le=10**9, description="the network tier forgets what was not used for so long"
    )
    store_password: SecretStr | None = Field(
        None, description="password for the network tier, if its URL has none; best given in the environment"
    )
    store_flush_seconds: float = Field(10.0, ge=0, description="at the end, time to write what slower tiers lack")
    blend: Literal["asked", "marked"] = Field(
        "asked", description="which prompts with marked chunks are blended: those that ask for it, or all"
    )
    blend_select: Literal["none", "first", "remembered", "deviation", "query", "auto"] = Field(
        "auto", description="which tokens of placed chunks are computed anew, unless a request that blends says"
    )
    blend_layer: int | None = Field(
        None, ge=1, description="layer at which deviation is judged, from 0; default: a quarter of the way through"
    )
    blend_ratio: float = Field(
        0.15, ge=0, le=1, description="how much of placed chunks is computed anew, unless it says"
    )
    blend_head: str = Field(
        "", description="text before chunks that are computed on their own; default: the model's BOS only"
    )
    blend_gate: str | None = Field(
        None, description="file with the last line of `rekindle lab blend`: blend only as it says is good enough"
    )
    blend_least: float = Field(
        0.97, ge=0, le=1, description="with blend_gate: least share of full prefill's right answers"
    )
    chunk_separator: str | None = Field(
        None, min_length=1, description="what stands between the chunks of a plain prompt, such as ' # # '"
    )
    max_sessions: int = Field(
        256, ge=1, le=100_000, description="live sessions; for one more, one that nobody listens to makes way"
    )
    session_idle_seconds: float = Field(
        300.0, gt=0, description="a live session that was not used for so long leaves the engine for the store"
    )
    session_policy: Literal["slide", "rebuild", "refuse"] = Field(
        "slide",
        description="what a live session does when its window is full: oldest turns go, and the rest "
        "slides down or is read again; or new messages are refused",
    )
    session_retention: float = Field(
        0.8, gt=0, le=0.95, description="how much of a live session's window is left when its oldest turns go"
    )
    session_slides: int = Field(
        4, ge=1, description="how often KV of a live session slides before it is placed anew from the store"
    )
    session_pause_seconds: float = Field(
        0.2, ge=0, description="a live draft that rests for so long is read as if it were the whole message; inf: never"
    )
    session_ttl_seconds: float = Field(
        30 * 24 * 3600, gt=0, description="a saved session that was not used for so long is deleted"
    )
    session_files: int = Field(
        1000, ge=1, description="saved sessions that each API key may have; for one more, the oldest is deleted"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on, 0 for a free one")
    max_body_bytes: int = Field(8 << 20, ge=1024, description="largest request body")
    max_responses: int = Field(1024, ge=0, description="responses of /v1/responses that are kept, to go on from")
    response_ttl_seconds: float = Field(
        24 * 3600.0, gt=0, allow_inf_nan=False, description="how long a response of /v1/responses is kept"
    )
    api_key: tuple[SecretStr, ...] = Field(
        (), description="key that requests must bring; may be given several times, best in the environment or a file"
    )
    api_key_file: str | None = Field(None, description="file of further API keys, one per line, as KEY or NAME:KEY")
    max_per_key: int | None = Field(None, ge=1, description="answers of one API key under way; default: no limit")
    request_timeout: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="seconds that a request may take, its wait included; default: any"
    )
    drain_seconds: float = Field(
        5.0, ge=0, allow_inf_nan=False, description="at the end, time for running answers; new ones are refused"
    )
    stall_seconds: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="end with an error when one step takes longer; default: never"
    )
    cors_origin: tuple[str, ...] = Field(
        (), description="origin of web pages that may call, or * for all; may be given several times"
    )
    allowed_host: tuple[str, ...] = Field(
        (),
        description="name by which a local server without API keys may be called besides localhost and addresses, "
        "or * for any; may be given several times",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="what goes to stderr; info has one line per request"
    )
    log_format: Literal["text", "json"] = Field("text", description="how log lines look")

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any) -> Any:
        """Python counts True as 1; `threads = true` is a mistake all the same."""
        if isinstance(value, bool):
            raise ValueError("a number or text is expected")
        return value

    @field_validator(*SEVERAL, mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """One text holds one value or several; a text that holds none is a mistake, such as a variable left empty."""
        parts = value.replace(",", " ").split() if isinstance(value, str) else value
        if value is not parts and not parts:
            raise ValueError("at least one value is expected")
        return parts

    @field_validator("cors_origin")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Browsers send an origin in this form and no other; one with a path would never be met."""
        for origin in value:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/?#@]+", origin):
                raise ValueError("expected * or an origin such as https://example.org, without a path")
        return value

    @classmethod
    def load(cls, file: Path | None = None, environ: Mapping[str, str] | None = None, /, **flags: Any) -> Settings:
        """Merge the three sources; a flag that is None was not given. Raises InvalidRequest."""
        merged: dict[str, Any] = {}
        if file is not None:
            merged |= _singular(_read(file))
        pairs = (os.environ if environ is None else environ).items()
        merged |= _singular({name[len(PREFIX) :].lower(): value for name, value in pairs if name.startswith(PREFIX)})
        merged |= _singular({name: value for name, value in flags.items() if value is not None})
        for name in merged:
            if name not in cls.model_fields:
                raise InvalidRequest(f"unknown setting {name!r}{nearest(name, cls.model_fields)}", param=name)
        try:
            return cls(**merged)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            got = "" if first["loc"][0] in SECRETS else f", got {first['input']!r}"
            reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
            raise InvalidRequest(f"setting {name}: {reason}{got}", param=name) from None


def _singular(source: Mapping[str, Any]) -> dict[str, Any]:
    """What one source says, with each setting of several values under its field's name."""
    for name in SEVERAL:
        if name in source and f"{name}s" in source:
            raise InvalidRequest(f"settings {name} and {name}s are the same; use one of them", param=name)
    return {name[:-1] if name[:-1] in SEVERAL else name: value for name, value in source.items()}


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8-sig"))
    except OSError as error:
        raise InvalidRequest(f"cannot read the settings file {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError, a path no file system holds
        raise InvalidRequest(f"the settings file {file} is not TOML: {error}") from None

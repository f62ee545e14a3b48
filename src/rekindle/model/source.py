"""From a model's name to a file on this machine: `builtin`, a path, or `hf:owner/repo[:file]`."""

from __future__ import annotations

from pathlib import Path

from rekindle.errors import ModelError

BUILTIN = "builtin"
HUB = "hf:"


def locate(name: str) -> Path:
    """The GGUF file that a name stands for; hub files are downloaded once, with a progress bar. Raises ModelError."""
    if name == BUILTIN:
        from rekindle.model import ember

        return ember.weights_path()
    if name.startswith(HUB):
        return _from_hub(name)
    return Path(name).expanduser()


def _from_hub(name: str) -> Path:
    import httpx
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    repo, _, file = name.removeprefix(HUB).partition(":")
    if repo.count("/") != 1:
        raise ModelError(f"expected hf:owner/repo or hf:owner/repo:file.gguf, got {name!r}")
    unreachable = ModelError(
        f"the model hub cannot be reached and {name!r} is not in the local cache {HF_HUB_CACHE}; "
        "go online once, or give the path of a .gguf file"
    )
    try:
        return Path(hf_hub_download(repo, file or _choose(repo)))
    except RepositoryNotFoundError:
        raise ModelError(f"the hub has no repository {repo!r}, or it is private and no token is set") from None
    except HFValidationError as error:
        raise ModelError(f"{name!r} is not a hub name: {error}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.TransportError):
        raise unreachable from None
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"cannot get {name!r} from the model hub (local cache {HF_HUB_CACHE}): {error}") from None


def _choose(repo: str) -> str:
    """The one GGUF file of a repository; of several the usual quantisation. Raises ModelError that lists them."""
    files = sorted(file for file in _list(repo) if file.endswith(".gguf"))
    if not files:
        raise ModelError(f"the hub repository {repo!r} has no .gguf file")
    for wanted in ("q4_k_m", "q8_0", "f16"):
        fitting = [file for file in files if wanted in file.lower()]
        if len(files) > 1 and len(fitting) == 1:
            return fitting[0]
    if len(files) > 1:
        raise ModelError(
            f"the hub repository {repo!r} has several models; name one, as hf:{repo}:FILE: {', '.join(files)}"
        )
    return files[0]


def _list(repo: str) -> list[str]:
    """Files of a hub repository; offline, those in the local cache."""
    import httpx
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return list(list_repo_files(repo))
    except (httpx.TransportError, OfflineModeIsEnabled):
        folder = Path(snapshot_download(repo, local_files_only=True))
        return [str(file.relative_to(folder)) for file in folder.rglob("*.gguf")]

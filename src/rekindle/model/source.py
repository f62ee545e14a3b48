"""From a model's name to what it stands for on this machine: `builtin`, a path, or `hf:owner/repo[:file]`.

That is a .gguf file for llama.cpp, or a folder of safetensors for PyTorch. Where a name stands for both, as `builtin` does
and many a hub repository, the engine that was asked for decides, and without one the file.
"""

from __future__ import annotations

import re
from pathlib import Path

from rekindle.errors import ModelError, nearest
from rekindle.model.hf import CONFIG, files_of_model

BUILTIN = "builtin"
HUB = "hf:"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_USUAL = ("q4_k_m", "q8_0", "f16")  # quantisations, the most usual first
_NO_MODELS = ("mmproj", "imatrix")  # companions of a model that are GGUF files too
_ANSWER_SECONDS = 10.0


def locate(name: str, engine: str = "auto") -> Path:
    """The file or folder that a name stands for; hub files are downloaded once, with a progress bar. Raises ModelError."""
    if name == BUILTIN:
        from rekindle.model import ember

        return ember.hf_path() if engine == "torch" else ember.weights_path()
    if name.startswith(HUB):
        return _from_hub(name, engine)
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # ~somebody who has no home
        raise ModelError(f"{name!r} is not a path: {error}") from None


def _from_hub(name: str, engine: str) -> Path:
    """Ask the hub; where it does not answer, take what was downloaded before."""
    from huggingface_hub.constants import HF_HUB_CACHE

    repo, _, file = name.removeprefix(HUB).partition(":")
    _check_name(name, repo, file)
    try:
        return _fetch(repo, _choose(repo, _files(repo), file, engine), offline=False)
    except ModelError:
        raise
    except (
        Exception
    ) as error:  # offline, refused, gone, … : the client's HTTP library, and so its errors, vary with its version
        reason = _reason(error, repo)
    try:
        return _fetch(repo, _choose(repo, _cached_files(repo), file, engine), offline=True)
    except (ModelError, OSError):
        raise ModelError(
            f"cannot get {name!r} from the model hub: {reason}. It is not in the local cache {HF_HUB_CACHE} either; "
            "check the name and the network, or give the path of a .gguf file or of a folder of safetensors"
        ) from None


def _check_name(name: str, repo: str, file: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if repo.count("/") != 1 or ".." in file.split("/"):
        raise ModelError(f"expected hf:owner/repo or hf:owner/repo:file.gguf, got {name!r}")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ModelError(f"{name!r} is not a hub name: {error}") from None


def _reason(error: Exception, repo: str) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, RepositoryNotFoundError):
        return f"it has no repository {repo!r}, or it is private and no token is set"
    if isinstance(error, OfflineModeIsEnabled):
        return "it cannot be reached: offline mode is set"
    text = f"{type(error).__name__}: {str(error).partition(chr(10))[0] or 'no reason given'}"
    return text if isinstance(error, OSError) else f"it cannot be reached ({text})"


def _fetch(repo: str, files: list[str], *, offline: bool) -> Path:
    """Files in the local cache, downloaded if they are not there; the first's path, or the folder of a whole model."""
    from huggingface_hub import hf_hub_download

    paths = [Path(hf_hub_download(repo, file, local_files_only=offline)) for file in files]
    return paths[0].parent if files[0] == CONFIG else paths[0]


def parts(file: str) -> list[str]:
    """The files that a model is split into, as llama.cpp names them: itself, unless its name says `-00001-of-00003`."""
    split = _PART.fullmatch(file)
    if split is None:
        return [file]
    stem, count = split[1], int(split[3])
    return [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def _choose(repo: str, files: list[str], file: str, engine: str) -> list[str]:
    """The files of the model that was asked for, or of the one there is. Raises ModelError."""
    if file:
        if file not in files:
            known = [name for name in files if name.endswith(".gguf")] or files
            raise ModelError(f"the hub repository {repo!r} has no file {file!r}{nearest(file, known)}")
        return parts(file)
    folder = files_of_model(files)
    if engine == "torch":
        if not folder:
            raise ModelError(
                f"the hub repository {repo!r} has no config.json with model.safetensors for the torch engine"
            )
        return folder
    return parts(found) if (found := _quantisation(repo, files, needed=engine == "llama" or not folder)) else folder


def _quantisation(repo: str, files: list[str], *, needed: bool) -> str | None:
    """The one .gguf model there is; of several the usual quantisation. Raises ModelError if there is none and it is
    needed, or if there are several and none is usual.
    """
    models = [name for name in sorted(files) if name.endswith(".gguf") and parts(name)[0] == name]
    models = [name for name in models if not any(word in name.lower() for word in _NO_MODELS)]
    if not models and needed:
        raise ModelError(
            f"the hub repository {repo!r} has no .gguf file; Rekindle needs a model in that format, or "
            "config.json with model.safetensors"
        )
    for wanted in _USUAL:
        fitting = [name for name in models if wanted in name.lower()]
        if len(models) > 1 and len(fitting) == 1:
            return fitting[0]
    if len(models) > 1:
        several = ", ".join(models)
        raise ModelError(f"the hub repository {repo!r} has several models; name one, as hf:{repo}:FILE: {several}")
    return models[0] if models else None


def _files(repo: str) -> list[str]:
    """Files of a hub repository. One request, without the retries that would keep an offline user waiting."""
    from huggingface_hub import model_info

    return [sibling.rfilename for sibling in model_info(repo, timeout=_ANSWER_SECONDS).siblings or ()]


def _cached_files(repo: str) -> list[str]:
    """Files of a hub repository that were downloaded before."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repo, local_files_only=True))
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]

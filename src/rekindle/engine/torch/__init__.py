"""The torch engine: the seven verbs on a stock transformers model, on CPU or GPU. An optional extra: `rekindle[torch]`.

No model is rewritten. The engine lends the model an attention function of its own for the length of a call (`borrow.py`);
that function writes the new K and V into a pool of cells (`pool.py`) and lets each query see the cells of its own sequence
(`attention.py`). Which cells those are is kept in `cells.py`, and which layers may use which in `groups.py`. What a model
must be for that, and how its keys turn with their position, is not looked up by name but found out by running a few tokens
through it (`survey.py`, `rotation.py`).
"""

from __future__ import annotations

from rekindle.errors import ModelError

try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ModelError(
        f"the torch engine needs PyTorch and transformers, and {error.name} is not installed: pip install 'rekindle[torch]'"
    ) from None

"""Which of torch's kernels multiply, where the default is the slower one.

To decode one token is to read every weight once. For a single row in bfloat16 torch goes through oneDNN, which reads
weights from memory at half the speed of torch's own matrix-vector product (13 against 24 GB/s on one core of an AMD EPYC of
the Turin generation); from two rows on it is the other way round. docs/measurements.md has the figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kernels_for(rows: int, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """While inside, a call of the model with so many rows runs on the faster kernels. The switch is the whole process's."""
    switch = rows == 1 and dtype is torch.bfloat16 and device.type == "cpu" and torch.backends.mkldnn.enabled
    if switch:
        torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        if switch:
            torch._C._set_mkldnn_enabled(True)

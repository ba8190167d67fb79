"""Which of the processor's units oneDNN may use for bfloat16 on a CPU.

With AMX a row's bits depend on the number of rows: its kernels cut a deep sum in another way for each (measured: from a
depth of 512 on; at a width of 1,024 all log-probs differ, by up to 0.1). Without it none do, at any depth and number of
threads; large products take several times as long.
"""

from __future__ import annotations

import logging
import os

import torch
from torch.nn.functional import linear

logger = logging.getLogger(__name__)

LIMIT = "ONEDNN_MAX_CPU_ISA"
EXACT = "AVX512_CORE_BF16"


def limit_units() -> None:
    """Keep oneDNN off AMX in this process, unless the environment says which units it may use.

    It asks once, at its first product of any type, so this comes when the models' code is loaded.
    """
    if torch.cpu._is_amx_tile_supported():
        os.environ.setdefault(LIMIT, EXACT)


def check_rows_are_exact() -> None:
    """Say where bfloat16 gives a row other bits in other company: the limit came too late, or another one is set."""
    if torch.cpu._is_amx_tile_supported() and not rows_are_exact():
        logger.warning(
            "bfloat16 on this CPU: the log-probs of sampler and trainer will differ, since AMX is in use; start the "
            "program with %s=%s, or use float32",
            LIMIT,
            EXACT,
        )


def rows_are_exact() -> bool:
    """Whether a few rows of a deep product have the bits that they have among many."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 1024, generator=generator).bfloat16()
    rows = torch.randn(512, 1024, generator=generator).bfloat16()
    with torch.inference_mode():
        whole = linear(rows, weight)
        return all(torch.equal(linear(rows[:count].clone(), weight), whole[:count]) for count in (16, 64, 256))

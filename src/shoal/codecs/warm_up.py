"""What a launcher calls before it starts workers."""

from __future__ import annotations

import torch

from shoal.codecs.codec import MOST_ENTRIES, Codec
from shoal.codecs.feedback import keep_residual
from shoal.codecs.rows import warm_up_rows

NUM_ENTRIES = 2**14
"""Few, but so many that a matrix of them is worth decomposing."""


def warm_up(codec: Codec) -> None:
    """Compile what the codec needs, so that no step waits for it: some seconds on a machine's first call, then less.

    What is compiled is kept on disk for this machine's other processes, and in memory for those forked from this one.
    Without this call it is compiled when it is first needed. Vectors on a GPU need nothing of it.
    """
    small = codec.share(NUM_ENTRIES, MOST_ENTRIES)
    payload = small.encode(torch.ones(NUM_ENTRIES), 0)
    for add in (False, True):
        small.decode(payload, 0, torch.zeros(NUM_ENTRIES), add=add)
    keep_residual(small, torch.ones(NUM_ENTRIES), payload, 0, torch.zeros(NUM_ENTRIES))
    warm_up_rows(small, NUM_ENTRIES)

"""plumbing.keys"""

import numpy as np
import torch


def keyed(*key):
    """A torch generator (on the CPU) that depends on the integers of `key`, 0 or more, and nothing else."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(seed)


VIEWS, BATCHES = (
    1,
    2,
)  # first word of each random key: NumPy pads keys with zeros, so (s, e) would equal (s, e, 0)


TRAIN_VIEW, JITTER = 5, 6  # first words of the random keys, as in data.py

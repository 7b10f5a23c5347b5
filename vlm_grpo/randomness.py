"""The random numbers of a run: what is looked at on the side leaves those that training draws as they are."""

import random
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def same_random_states() -> Iterator[None]:
    """After it, Python, NumPy and torch (of every GPU) draw what they would have drawn without it."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])

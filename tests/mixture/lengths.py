"""Documents of which only the lengths are known."""

import numpy as np


class Lengths:
    def __init__(self, lengths):
        self.lengths = np.asarray(lengths, np.int64)
        self._positions = np.concatenate([[0], np.cumsum(self.lengths)])
        self.n_tokens = int(self._positions[-1])

    def __len__(self):
        return len(self.lengths)

    def positions(self, documents):
        return self._positions[documents]


def log_normal(count, mean, sigma=1.0, seed=0):
    random = np.random.default_rng(seed)
    return Lengths(np.maximum(1, random.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)))

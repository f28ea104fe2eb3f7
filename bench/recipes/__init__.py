"""What people do with a model, once in each framework's idiom: `<task>_nnx.py` beside `<task>_equinox.py`.

Each file is read from top to bottom. Its `recipe` does the task on a tiny model, asserts what it claims, and returns a
small result, equal in bits to its partner's. The mistakes below it are ones that users make; they are run and classed.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from core.config import TransformerConfig
from core.losses import Batch

CONFIG = TransformerConfig(
    source_vocab_size=11, target_vocab_size=11, d_model=8, num_heads=2, d_ff=16, num_encoder_layers=1,
    num_decoder_layers=1, norm_order="pre", dropout_rate=0.0,
)  # fmt: skip
"""The smallest model with all of its parts."""


class Batches:
    """Endless small batches, the same each time; `drawn` tells how far a program came before it failed.

    The first of the three rows is shorter than the others.
    """

    def __init__(self):
        self.drawn = 0
        self._numbers = np.random.default_rng(0)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        self.drawn += 1
        source, target = self._numbers.integers(3, 11, (2, 3, 5), dtype=np.int32)
        inputs = np.concatenate([np.ones((3, 1), np.int32), target[:, :-1]], axis=1)
        real = np.arange(5) < np.array([[2], [5], [4]])
        return Batch(*map(jnp.asarray, (source, real, inputs, target, real)))


def moved(before: Mapping[str, ArrayLike], after: Mapping[str, ArrayLike]) -> set[str]:
    """The names of the arrays that are not what they were."""
    return {name for name in before if not np.array_equal(np.asarray(before[name]), np.asarray(after[name]))}

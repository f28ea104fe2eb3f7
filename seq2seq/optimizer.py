"""How a model is trained: the options, and the optax transformation they stand for."""

import dataclasses

import jax.numpy as jnp
import optax

from seq2seq.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """AdamW with warm-up and inverse square root decay (2017, section 5.3), clipped by the global norm."""

    steps: int = 5000
    tokens: int = 2048  # target positions in a batch
    learning_rate: float = 1e-3  # its peak, reached after the warm-up
    warmup: int = 400  # steps
    weight_decay: float = 1e-3
    clip_norm: float = 1.0
    label_smoothing: float = 0.1
    validate_every: int = 200  # steps
    patience: int = 5  # validations without a new lowest loss before training stops
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "tokens", "warmup", "validate_every", "patience"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}")
        if not 0 <= self.weight_decay < float("inf"):
            raise UserError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")


def make_optimizer(options: TrainingOptions) -> optax.GradientTransformation:
    """Update k uses the rate of step k, counted from 0."""

    def learning_rate(count):
        step = jnp.asarray(count, jnp.float32) + 1
        return options.learning_rate * jnp.minimum(step / options.warmup, jnp.sqrt(options.warmup / step))

    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.adamw(learning_rate, b2=0.98, weight_decay=options.weight_decay),
    )

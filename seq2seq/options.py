"""How a model is trained: one frozen description, which validates itself."""

import dataclasses
from typing import Literal, get_args

from seq2seq.errors import UserError

TASKS = ("copy", "reverse", "pronounce", "scan", "scan-length", "translate", "digits")
Schedule = Literal["inverse_sqrt", "cosine", "constant"]
NonFinite = Literal["skip", "stop"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """AdamW, clipped by the global norm, with a schedule of the learning rate."""

    steps: int = 5000
    tokens: int = 2048  # target positions in a batch, or in a micro-batch
    accumulate: int = 1  # micro-batches whose gradients make one step
    learning_rate: float = 1e-3  # its peak, reached after the warm-up
    schedule: Schedule = "inverse_sqrt"  # as in 2017, section 5.3
    warmup: int = 400  # steps
    weight_decay: float = 1e-3  # of matrices; biases, norms and other vectors are left alone
    clip_norm: float = 1.0
    label_smoothing: float = 0.1
    average: float = 0.0  # decay of the moving average of weights that is evaluated and kept; 0: none
    frozen: tuple[str, ...] = ()  # patterns of the names of parameters that stay as they are
    non_finite: NonFinite = "skip"  # a step whose gradients are not finite changes nothing; or stops the run
    validate_every: int = 200  # steps
    patience: int = 5  # validations without a new lowest loss before training stops
    keep: int = 1  # checkpoints of the lowest validation losses, beside the latest
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "tokens", "accumulate", "warmup", "validate_every", "patience", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("label_smoothing", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < float("inf"):
            raise UserError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")
        for name, choices in (("schedule", get_args(Schedule)), ("non_finite", get_args(NonFinite))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.schedule == "cosine" and self.steps <= self.warmup:
            raise UserError(f"a cosine schedule needs more steps than warmup={self.warmup}, got steps={self.steps}")

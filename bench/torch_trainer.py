"""Training the peer in PyTorch as ours are trained: the same optimizer, schedule, clipping, smoothing and average."""

import copy

import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from bench.torch_transformer import Transformer
from core.losses import Batch, Metrics
from seq2seq.errors import UserError
from seq2seq.optimizer import learning_rate
from seq2seq.options import TrainingOptions


class Trainer:
    """The methods of a frontend's Trainer. `averaged` is the model to evaluate: the moving average, if there is one."""

    def __init__(self, model: Transformer, options: TrainingOptions):
        if options.frozen:
            raise UserError(f"the peer trains all parameters, got frozen={options.frozen}; train a run without it")
        self.model, self.options = model, options
        self.averaged = copy.deepcopy(model) if options.average else model
        self.rate = learning_rate(options)
        self.steps, self.skipped = 0, 0
        matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
        groups = [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8, fused=True)

    def train(self, batch: Batch, *, place: int | None = None) -> Metrics:
        """One step; one whose gradients are not finite changes nothing. Its rate is that of step `place` if given."""
        self.model.train()
        self.optimizer.zero_grad()
        parts = [Batch(*part) for part in zip(*batch, strict=True)] if self.options.accumulate > 1 else [batch]
        tokens = int(sum(np.asarray(part.target_mask).sum() for part in parts))
        loss, right = 0.0, 0
        for part in parts:
            losses, hits = self._losses(self.model, part, self.options.label_smoothing)
            mean = losses.sum() / tokens
            mean.backward()
            loss, right = loss + mean.detach(), right + hits
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        if norm.isfinite():
            self._step(self.steps if place is None else place)
        elif self.options.non_finite == "stop":
            raise UserError("a gradient was not finite; train a run of a lower --learning-rate")
        else:
            self.skipped += 1
        return _metrics(loss, right / tokens, tokens)

    def _step(self, place: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = float(np.asarray(self.rate(place)))
        self.optimizer.step()
        if self.averaged is not self.model:
            keep = min(self.options.average, (1 + self.steps) / (10 + self.steps))
            with torch.no_grad():
                for mean, new in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
                    mean.lerp_(new, 1 - keep)
        self.steps += 1

    @torch.inference_mode()
    def evaluate(self, batch: Batch) -> Metrics:
        """The metrics of a batch with dropout off, the loss not smoothed."""
        self.averaged.eval()
        losses, right = self._losses(self.averaged, batch, 0.0)
        tokens = max(1, len(losses))
        return _metrics(losses.sum() / tokens, right / tokens, len(losses))

    def _losses(self, model: Transformer, batch: Batch, smoothing: float):
        """Of each real target token its loss; and how many are predicted. Rows without any are left out."""
        real = np.asarray(batch.target_mask).any(axis=-1)
        device = model.target_table.device
        arrays = (torch.tensor(np.asarray(x)[real], device=device) for x in batch)
        source, source_mask, inputs, labels, target_mask = arrays
        wide = model.config.dtype != "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=not wide):
            logits = model(source, inputs, source_mask, target_mask)
        logits, labels = logits if wide else logits.float(), labels[target_mask].long()
        losses = functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        return losses, (logits.detach().argmax(-1) == labels).sum()


def _metrics(*values) -> Metrics:
    return Metrics(*(jnp.asarray(float(value)) for value in values))

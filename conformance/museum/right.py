"""Attention in NumPy float64, right in every case: what the exhibits change one step of."""

import numpy as np

from conformance.adapters import Attention


class NumpyAttention:
    """Each step of attention is a method, so that an exhibit replaces the one that is wrong."""

    def __call__(
        self, q, k, v, *, mask=None, bias=None, causal=False, q_offset=None, window=None, scale=None,
        soft_cap=None, sinks=None, dropout_rate=0.0, dropout_seed=None,
    ):  # fmt: skip
        self.check_rate(dropout_rate)
        self.check_arrays(q, k, v)
        k, v = self.for_each_head(k, q.shape[-2]), self.for_each_head(v, q.shape[-2])
        logits = self.logits(q, k, scale, soft_cap)
        if mask is not None:
            self.check_mask(mask, logits.shape)
        rules = {"mask": mask, "bias": bias, "causal": causal, "q_offset": q_offset, "window": window}
        training = dropout_seed is not None and dropout_rate != 0
        seed = 0 if dropout_seed is None else int(dropout_seed)
        allowed = self.allowed(logits.shape, training=training, **rules)
        logits = logits if bias is None else logits + np.where(np.isneginf(bias), 0, bias)
        weights = self.softmax(logits, allowed, sinks, v.dtype, training)
        if training:
            weights = self.dropped(weights, dropout_rate, seed)
        return self.mix(weights, v, allowed).astype(v.dtype)

    def check_rate(self, rate):
        if not 0 <= rate < 1:
            raise ValueError(f"the dropout rate must be at least 0 and below 1, got {rate}")

    def check_arrays(self, q, k, v):
        if any(np.issubdtype(x.dtype, np.integer) for x in (q, k, v)):
            raise TypeError("q, k and v must be floats")
        if q.shape[-2] % k.shape[-2]:
            raise ValueError("the query heads must be a multiple of the key heads")

    def check_mask(self, mask, shape):
        if mask.dtype != bool:
            raise TypeError(f"the mask must be bool, got {mask.dtype}")
        if mask.ndim != len(shape):
            raise ValueError(f"the mask must have rank {len(shape)}, got {mask.ndim}")

    def for_each_head(self, x, heads):
        """Each key head once for every query head of its group."""
        return np.repeat(x, heads // x.shape[-2], axis=-2)

    def logits(self, q, k, scale, soft_cap):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        heads = [np.moveaxis(np.asarray(x, np.float64), -2, -3) for x in (q, k)]
        logits = (heads[0][..., :, None, :] * scale * heads[1][..., None, :, :]).sum(axis=-1)
        return logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)

    def allowed(self, shape, *, mask, bias, causal, q_offset, window, training):
        """bool, of the logits' shape."""
        allowed = np.ones(shape, bool)
        if causal or window is not None:
            allowed &= self.in_sight(self.ahead(shape, q_offset), causal, window)
        if mask is not None:
            allowed &= mask
        return allowed if bias is None else allowed & ~np.isneginf(bias)

    def ahead(self, shape, q_offset):
        """How far each key lies ahead of each query."""
        if q_offset is None:
            if shape[-1] != shape[-2]:
                raise ValueError("causal and window need q_offset where T != S")
            q_offset = 0
        first = np.asarray(q_offset)[..., None, None, None]
        return np.arange(shape[-1]) - (first + np.arange(shape[-2])[:, None])

    def in_sight(self, ahead, causal, window):
        left, right = (np.inf, np.inf) if window is None else window
        return (-left <= ahead) & (ahead <= (min(right, 0) if causal else right))

    def softmax(self, logits, allowed, sinks, dtype, training):
        logits = np.where(allowed, logits, -np.inf)
        highest = logits.max(axis=-1, keepdims=True, initial=-np.inf)
        if sinks is not None:
            highest = np.maximum(highest, np.asarray(sinks, np.float64)[:, None, None])
        highest = np.where(np.isneginf(highest), 0, highest)
        exponentials = np.exp(logits - highest)
        total = exponentials.sum(axis=-1, keepdims=True)
        if sinks is not None:
            total = total + np.exp(np.asarray(sinks, np.float64)[:, None, None] - highest)
        return exponentials / np.where(total == 0, 1, total)

    def dropped(self, weights, rate, seed):
        kept = np.random.default_rng(seed).random(weights.shape) >= rate
        return np.where(kept, weights / (1 - rate), 0)

    def mix(self, weights, v, allowed):
        v = np.moveaxis(np.asarray(v, np.float64), -2, -3)
        seen = np.where(allowed[..., None], v[..., None, :, :], 0)
        return np.moveaxis((weights[..., None] * seen).sum(axis=-2), -3, -2)


class BlockedAttention(NumpyAttention):
    """Two keys at a time with a running maximum and total (Milakov and Gimelshein 2018), as kernels do."""

    def softmax(self, logits, allowed, sinks, dtype, training):
        logits = np.where(allowed, logits, -np.inf)
        start = np.full((*logits.shape[:-1], 1), -np.inf)
        highest = start if sinks is None else np.maximum(start, np.asarray(sinks, np.float64)[:, None, None])
        total = np.where(np.isneginf(highest), 0.0, 1.0)
        for first in range(0, logits.shape[-1], 2):
            block = logits[..., first : first + 2]
            higher = np.maximum(highest, block.max(axis=-1, keepdims=True))
            finite = np.where(np.isneginf(higher), 0.0, higher)
            total = total * np.exp(highest - finite) + np.exp(block - finite).sum(axis=-1, keepdims=True)
            highest = higher
        finite = np.where(np.isneginf(highest), 0.0, highest)
        return np.exp(logits - finite) / np.where(total == 0, 1.0, total)


CAN = Attention.flags.keys() - {"jax"}
numpy_attention = Attention("NumPy float64", NumpyAttention(), CAN)
blocked_attention = Attention("NumPy, online softmax", BlockedAttention(), CAN)

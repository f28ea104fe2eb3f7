"""A checkpoint as PyTorch's users name and lay it out: kernels (out, in), queries, keys and values in one."""

from collections.abc import Mapping

import numpy as np
from jax.typing import ArrayLike

_NAMES = {
    "attention.o_proj.kernel": "attn.out.weight", "attention_norm.bias": "ln_1.bias",
    "attention_norm.scale": "ln_1.weight", "feed_forward.down_proj.bias": "mlp.down.bias",
    "feed_forward.down_proj.kernel": "mlp.down.weight", "feed_forward.up_proj.bias": "mlp.up.bias",
    "feed_forward.up_proj.kernel": "mlp.up.weight", "feed_forward_norm.bias": "ln_2.bias",
    "feed_forward_norm.scale": "ln_2.weight",
}  # fmt: skip


def checkpoint(weights: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    """Of a decoder with one layer."""
    ours = {name.removeprefix("decoder.blocks.0."): np.asarray(array) for name, array in weights.items()}
    found = {f"h.0.{theirs}": ours[name].T for name, theirs in _NAMES.items()}
    found["h.0.attn.qkv.weight"] = np.concatenate([ours[f"attention.{letter}_proj.kernel"].T for letter in "qkv"])
    return found | {
        "ln_f.bias": ours["decoder.norm.bias"],
        "ln_f.weight": ours["decoder.norm.scale"],
        "wte.weight": ours["embedding.embedding"],
    }

"""`jax.nn.dot_product_attention`."""

import jax

from conformance.adapters import Attention, lenient


def attend(q, k, v, *, mask=None, bias=None, causal=False, window=None, scale=None):
    return jax.nn.dot_product_attention(
        q, k, v, bias, mask, is_causal=causal, local_window_size=window, scale=scale
    )  # fmt: skip


CAN = {"jax", "bfloat16", "float16", "grouped heads", "mask", "broadcast mask", "bias", "causal", "window", "scale"}
attention = Attention("jax.nn.dot_product_attention", attend, CAN | {"combined"}, lenient)
adapters = (attention,)

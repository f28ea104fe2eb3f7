"""PyTorch's `scaled_dot_product_attention`, on the CPU."""

import ml_dtypes
import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from conformance.adapters import Attention


def tensor(x):
    """A torch tensor of a NumPy array; torch reads no bfloat16 from NumPy."""
    if x.dtype == ml_dtypes.bfloat16:
        return torch.tensor(x.astype(np.float32)).to(torch.bfloat16)
    return torch.tensor(np.array(x))


def attend(q, k, v, *, mask=None, bias=None, causal=False, scale=None, dropout_rate=0.0, dropout_seed=None):
    heads_first = [tensor(x).transpose(-2, -3) for x in (q, k, v)]
    if dropout_seed is not None:
        torch.manual_seed(int(dropout_seed))
    added = mask if bias is None else bias
    out = torch.nn.functional.scaled_dot_product_attention(
        *heads_first,
        attn_mask=None if added is None else tensor(added),
        is_causal=causal,
        scale=scale,
        dropout_p=0.0 if dropout_seed is None else dropout_rate,
        enable_gqa=q.shape[-2] != k.shape[-2],
    )
    out = out.transpose(-2, -3)
    return out.float().numpy().astype(ml_dtypes.bfloat16) if out.dtype == torch.bfloat16 else out.numpy()


CAN = {
    "bfloat16", "float16", "float64", "leading axes", "grouped heads", "value width", "empty", "mask", "broadcast mask",
    "bias", "causal", "scale", "dropout",
}  # fmt: skip
attention = Attention("torch scaled_dot_product_attention", attend, CAN)
adapters = (attention,)

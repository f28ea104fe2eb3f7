"""A right attention whose sums and softmax are PyTorch's, where it is installed."""

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from conformance.adapters import Attention
from conformance.museum.right import CAN, NumpyAttention


class TorchAttention(NumpyAttention):
    def softmax(self, logits, allowed, sinks, dtype, training):
        hidden = torch.tensor(~allowed)
        with_sinks = torch.tensor(logits).masked_fill(hidden, -torch.inf)
        if sinks is not None:
            column = torch.tensor(np.asarray(sinks, np.float64))[:, None, None].expand(*logits.shape[:-1], 1)
            with_sinks = torch.cat([with_sinks, column], dim=-1)
        weights = torch.softmax(with_sinks, dim=-1)[..., : logits.shape[-1]]
        return weights.masked_fill(hidden, 0.0).numpy()

    def mix(self, weights, v, allowed):
        v = torch.tensor(np.asarray(v, np.float64)).transpose(-2, -3)[..., None, :, :]
        seen = torch.where(torch.tensor(allowed)[..., None], v, 0.0)
        return (torch.tensor(weights)[..., None] * seen).sum(dim=-2).transpose(-2, -3).numpy()


torch_attention = Attention("PyTorch float64", TorchAttention(), CAN)

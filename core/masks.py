"""Masks: bool arrays, True where a query may attend, with the rank of the logits `[*B, N, T, S]`."""

import jax.numpy as jnp
from jaxtyping import Array, Bool


def causal_mask(queries: int, keys: int | None = None, *, q_offset: int | None = None) -> Bool[Array, "1 T S"]:
    """True where the key's position is at most the query's, `q_offset + t`; T != S needs q_offset.

    >>> causal_mask(2, 3, q_offset=1).astype(int).tolist()
    [[[1, 1, 0], [1, 1, 1]]]
    """
    keys = queries if keys is None else keys
    if q_offset is None and keys != queries:
        raise ValueError(
            f"with {queries} queries and {keys} keys give q_offset: 0 aligns the first query with the first key, "
            f"{keys - queries} the last with the last"
        )
    return (jnp.arange(keys)[None, :] <= jnp.arange(queries)[:, None] + (q_offset or 0))[None]


def padding_mask(
    real: Bool[Array, "*B S"] | None, shape: tuple[int, ...] | None = None
) -> Bool[Array, "*B 1 1 S"] | None:
    """Every query may see the real tokens of its row, and no padding. None: all are real.

    `shape` is what `real` must have, that of the tokens it tells of.
    """
    if real is None:
        return None
    if real.dtype != jnp.bool_:
        raise TypeError(f"a padding mask must be bool, True for a real token, got {real.dtype}; use tokens != pad_id")
    if shape is not None and real.shape != shape:
        raise ValueError(f"a padding mask must have the shape of its tokens, {shape}, got {real.shape}")
    return real[..., None, None, :]


def combine(*masks: Bool[Array, "..."] | None) -> Bool[Array, "..."] | None:
    """True where all are; None stands for all True. Missing leading axes are added."""
    combined = None
    for mask in masks:
        if mask is None:
            continue
        if mask.dtype != jnp.bool_:
            raise TypeError(f"masks must be bool, True where a query may attend, got {mask.dtype}")
        if mask.ndim < 3:
            raise ValueError(
                f"masks must end in the axes N, T, S of the logits, got {mask.shape}; "
                "padding_mask makes one from [*B, S]"
            )
        if combined is None:
            combined = mask
        else:
            rank = max(mask.ndim, combined.ndim)
            combined = _with_rank(combined, rank) & _with_rank(mask, rank)
    return combined


def _with_rank(mask: Array, rank: int) -> Array:
    return mask.reshape((1,) * (rank - mask.ndim) + mask.shape)

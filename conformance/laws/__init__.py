"""All laws, by the kind of what they judge, in the order in which they are reported."""

from conformance.adapters import Adapter
from conformance.law import Law
from conformance.laws import (
    attention,
    attention_dropout,
    cache,
    decoding,
    dropout,
    edges,
    encodings,
    gradients,
    loss,
    norm,
    rotary,
    runs,
    sampling,
    visibility,
    weights,
)

MODULES = (
    attention, visibility, edges, attention_dropout, gradients, cache, norm, rotary, encodings, dropout, loss, weights,
    decoding, sampling, runs,
)  # fmt: skip
ALL = tuple(x for module in MODULES for x in vars(module).values() if isinstance(x, Law))


def laws_for(adapter: Adapter) -> list[Law]:
    """Those of the adapter's kind."""
    return [law for law in ALL if isinstance(adapter, law.kind)]


def named(name: str) -> Law:
    """The law of a name."""
    (found,) = (law for law in ALL if law.name == name)
    return found

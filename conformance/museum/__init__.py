"""The bug museum: what others shipped, rebuilt here, so that the kit is shown to reject it."""

from conformance.museum import attention, caches, decoding, encodings, layers, runs
from conformance.museum.exhibit import Exhibit

EXHIBITS: tuple[Exhibit, ...] = tuple(
    sorted(
        (exhibit for module in (attention, caches, encodings, layers, decoding, runs) for exhibit in module.EXHIBITS),
        key=lambda e: e.number,
    )
)
UNSHOWN = {47: "false alarms by subnormals and deadlines: not an implementation's bug; the kit draws no subnormals"}
"""Entries of the list that have no exhibit here, and why."""

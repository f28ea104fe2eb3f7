"""The bug museum: what others shipped, rebuilt here, so that the kit is shown to reject it."""

from conformance.museum import attention, caches, decoding, encodings, layers
from conformance.museum.exhibit import Exhibit

EXHIBITS: tuple[Exhibit, ...] = tuple(
    sorted(
        (*attention.EXHIBITS, *caches.EXHIBITS, *encodings.EXHIBITS, *layers.EXHIBITS, *decoding.EXHIBITS),
        key=lambda e: e.number,
    )
)
LATER = {
    38: "random keys, optimizer and streams lost at resume: of runs, not of functions; see tests/test_training.py",
    39: "resume off by one step: of runs, not of functions; see tests/test_training.py",
    40: "a checkpoint taken for temporary: of runs, not of functions; see tests/test_training.py",
    41: "tied weights lose their tie: of runs, not of functions; see tests/test_training.py",
    47: "false alarms by subnormals and deadlines: not an implementation's bug; the kit draws no subnormals",
}
"""Entries of the list that have no exhibit here, and why."""

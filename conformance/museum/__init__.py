"""The bug museum: what others shipped, rebuilt here, so that the kit is shown to reject it."""

from conformance.museum import attention, caches, encodings, layers
from conformance.museum.exhibit import Exhibit

EXHIBITS: tuple[Exhibit, ...] = tuple(
    sorted((*attention.EXHIBITS, *caches.EXHIBITS, *encodings.EXHIBITS, *layers.EXHIBITS), key=lambda e: e.number)
)
LATER = {
    31: "beam cache not reordered, cross-attention cache shared: with the laws of decoding",
    32: "beam length off by one, going on after EOS, stop rule: with the laws of decoding",
    33: "top-k keeps k + 1, top-p drops the crossing token: with the laws of decoding",
    38: "random keys, optimizer and streams lost at resume: with the laws of training",
    39: "resume off by one step: with the laws of training",
    40: "a checkpoint taken for temporary: with the laws of training",
    41: "tied weights lose their tie: with the laws of training",
    47: "false alarms by subnormals and deadlines: not an implementation's bug; the kit draws no subnormals",
}
"""Entries of the list that have no exhibit here, and why."""

"""Which examples are learned from and which are held out: by the text alone, so that no run sees what another tests."""

import hashlib

SPLITS = ("train", "validation", "test")


def split_by_hash(text: str) -> str:
    """10 % test, 2 % validation."""
    bucket = int(hashlib.sha1(text.encode()).hexdigest(), 16) % 100
    return "test" if bucket < 10 else "validation" if bucket < 12 else "train"

"""Contenders take turns: each is timed once a round, in an order drawn anew for every round."""

import math
import random
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from seq2seq.measure import timed

Name = TypeVar("Name", bound=Hashable)
SETTLE = 0.2  # seconds; as long as OpenMP's threads, those of PyTorch and CTranslate2, go on spinning after their work


def in_turn(
    contenders: Mapping[Name, Callable[[], Any]], *, rounds: int, enough: float = math.inf
) -> dict[Name, list[float]]:
    """Seconds of a call of each in every round; after `enough` seconds 3 rounds will do.

    Before its call is timed, a contender is called until it has had the machine for `SETTLE` seconds, as in a loop of
    its user's: the one before it is at rest then, and caches and threads are its own. A pause would leave them cold.
    """
    samples: dict[Name, list[float]] = {name: [] for name in contenders}
    order, start = random.Random(0), time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > enough:
            break
        for name in order.sample(list(contenders), len(contenders)):
            spent = 0.0
            while spent < SETTLE:
                spent += timed(contenders[name])[0]
            samples[name].append(timed(contenders[name])[0])
    return samples

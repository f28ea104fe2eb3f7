"""SCAN, commands and the actions they stand for, by its grammar (Lake and Baroni 2018, figure 6 and 7)."""

from collections.abc import Iterator

LONGEST_TRAINED = 22
"""Actions of the longest outputs that the length split trains on; it is tested on those of 24 and more."""

_TURN = {"left": "I_TURN_LEFT", "right": "I_TURN_RIGHT"}
_ACT = {"walk": "I_WALK", "look": "I_LOOK", "run": "I_RUN", "jump": "I_JUMP"}


def pairs() -> Iterator[tuple[str, str]]:
    """All 20 910 commands with their actions, words with a blank between.

    >>> dict(pairs())["jump around left after walk twice"]
    'I_WALK I_WALK I_TURN_LEFT I_JUMP I_TURN_LEFT I_JUMP I_TURN_LEFT I_JUMP I_TURN_LEFT I_JUMP'
    """
    sentences = list(_sentences())
    yield from ((command, " ".join(actions)) for command, actions in sentences)
    for first, done in sentences:
        for second, then in sentences:
            yield f"{first} and {second}", " ".join(done + then)
            yield f"{first} after {second}", " ".join(then + done)


def _sentences() -> Iterator[tuple[str, list[str]]]:
    for command, actions in _phrases():
        yield command, actions
        yield f"{command} twice", 2 * actions
        yield f"{command} thrice", 3 * actions


def _phrases() -> Iterator[tuple[str, list[str]]]:
    for verb, act in _ACT.items():
        yield verb, [act]
    for verb in (*_ACT, "turn"):
        act = [_ACT[verb]] if verb in _ACT else []
        for side, turn in _TURN.items():
            yield f"{verb} {side}", [turn, *act]
            yield f"{verb} opposite {side}", [turn, turn, *act]
            yield f"{verb} around {side}", 4 * [turn, *act]

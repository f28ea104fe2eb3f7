"""Beam search over a table for a model: what it finds, when it stops and what it gives."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from jaxtyping import Float, Int

from conformance.adapters import Search
from conformance.cases import gaussian, seeds
from conformance.law import Check, Violation, law, require, same_bits

CLEAR = 2.0**-12
"""By how much every choice of a case is decided: float32 is off by less than half of it at these sizes."""

ROWS = 2


class Setting(NamedTuple):
    """How a search is called. Of few kinds, for each may be a program of its own."""

    beam_size: int
    length_penalty: float
    eos: int
    pad: int


class Case(NamedTuple):
    """Logits of token number n of a row by all tokens before it: table[row, n, (last + sum of all) % V]."""

    table: Float[np.ndarray, "B L V V"]
    first: Int[np.ndarray, "B"]
    setting: Setting

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows, the most tokens of each, and the vocabulary."""
        return self.table.shape[:3]


class Hypothesis(NamedTuple):
    """The end, if it has come, is the last of the tokens."""

    log_prob: float
    tokens: tuple[int, ...]
    ended: bool


NOTHING = Hypothesis(0.0, (), False)
Finals = Callable[[Case, int, list[float]], list[Hypothesis]]
"""The hypotheses of a row among which the score decides; the gaps by which others fell out go into the list."""


# the search, written down


def grown(case: Case, row: int, held: list[Hypothesis]) -> list[Hypothesis]:
    """Each hypothesis with each token behind it."""
    found = []
    for log_prob, tokens, _ in held:
        fed = (int(case.first[row]), *tokens)
        logits = np.float64(case.table[row, len(tokens), (fed[-1] + sum(fed)) % case.sizes[2]])
        steps = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        found += [Hypothesis(log_prob + p, (*tokens, t), t == case.setting.eos) for t, p in enumerate(steps)]
    return found


def likeliest(found: list[Hypothesis], number: int, gaps: list[float]) -> list[Hypothesis]:
    order = sorted(found, key=lambda hypothesis: -hypothesis.log_prob)
    if 0 < number < len(order):
        gaps.append(order[number - 1].log_prob - order[number].log_prob)
    return order[:number]


def greedy(case: Case, row: int, gaps: list[float]) -> list[Hypothesis]:
    """The likeliest token each time."""
    held = NOTHING
    while not held.ended and len(held.tokens) < case.sizes[1]:
        (held,) = likeliest(grown(case, row, [held]), 1, gaps)
    return [held]


def everything(case: Case, row: int, gaps: list[float]) -> list[Hypothesis]:
    """All sequences that end, and all of full length that do not."""
    held, finals = [NOTHING], []
    for _ in range(case.sizes[1]):
        held = grown(case, row, held)
        finals += [hypothesis for hypothesis in held if hypothesis.ended]
        held = [hypothesis for hypothesis in held if not hypothesis.ended]
    return finals + held


def slots(case: Case, row: int, gaps: list[float]) -> list[Hypothesis]:
    """W slots: what has ended keeps its own, the others go to the likeliest that go on."""
    held = [NOTHING]
    for _ in range(case.sizes[1]):
        ended = [hypothesis for hypothesis in held if hypothesis.ended]
        going = grown(case, row, [hypothesis for hypothesis in held if not hypothesis.ended])
        held = ended + likeliest(going, case.setting.beam_size - len(ended), gaps)
    return held


def beside(looked_at: int, unended: bool) -> Finals:
    """W always go on; what has ended among the `looked_at` W likeliest waits beside them.

    What has not ended after the last token counts, or only where nothing has ended.
    """

    def finals(case: Case, row: int, gaps: list[float]) -> list[Hypothesis]:
        beam_size, going, ended = case.setting.beam_size, [NOTHING], []
        for _ in range(case.sizes[1]):
            found = grown(case, row, going)
            ended += [held for held in likeliest(found, looked_at * beam_size, gaps) if held.ended]
            going = likeliest([held for held in found if not held.ended], beam_size, gaps)
        return ended + going if unended or not ended else ended

    return finals


def score(hypothesis: Hypothesis, length_penalty: float, end: int = 1) -> float:
    """log P / ((5 + length) / 6)^a (Wu et al. 2016); `end` is what the end token adds to the length."""
    length = len(hypothesis.tokens) - hypothesis.ended * (1 - end)
    return hypothesis.log_prob / ((5 + length) / 6) ** length_penalty


def best(case: Case, row: int, finals: Finals, gaps: list[float], end: int = 1) -> Hypothesis:
    scored = sorted(((score(x, case.setting.length_penalty, end), x) for x in finals(case, row, gaps)), reverse=True)
    gaps += [scored[0][0] - other for other, _ in scored[1:2]]
    return scored[0][1]


# cases


def is_clear(case: Case) -> bool:
    """No rule that is known here has to choose between neighbours."""
    gaps: list[float] = []
    for finals in RULES:
        best(case, 0, finals, gaps)
    return min(gaps) > CLEAR


def any_row(case: Case) -> bool:
    return True


def cases(
    length: int,
    vocab: int,
    settings: list[Setting],
    of_note: Callable[[Case], bool] = any_row,
):
    """Rows in which every choice is clear and that are of note, each a case by itself."""

    def strategy(search):
        def build(seed, setting):
            if "length penalty" not in search.can:
                setting = setting._replace(length_penalty=0.0)

            def row(i, attempt):
                table = gaussian((1, length, vocab, vocab), seed, i, attempt, scale=2.0)
                firsts = [token for token in range(vocab) if token != setting.eos]
                return Case(table, np.array([firsts[(seed + i) % len(firsts)]], np.int32), setting)

            drawn = ((row(i, attempt) for attempt in itertools.count()) for i in range(ROWS))
            found = [next(case for case in attempts if of_note(case) and is_clear(case)) for attempts in drawn]
            return Case(np.concatenate([x.table for x in found]), np.concatenate([x.first for x in found]), setting)

        return st.builds(build, seeds, st.sampled_from(settings))

    return strategy


def the_end_decides(case: Case) -> bool:
    """Another hypothesis would be the best if the end token did not count."""
    return best(case, 0, everything, []) != best(case, 0, everything, [], end=0)


def a_longer_one_wins(case: Case) -> bool:
    """The likeliest has ended, yet a longer hypothesis has the better score."""
    finals = everything(case, 0, [])
    first = max(finals, key=lambda hypothesis: hypothesis.log_prob)
    return first.ended and len(best(case, 0, everything, []).tokens) > len(first.tokens)


ALL = [Setting(64, *rest) for rest in [(0.0, 2, 0), (0.6, 1, 3), (1.0, 0, 1)]]
NARROW = [Setting(2, 0.0, 2, 0), Setting(3, 0.6, 1, 3), Setting(3, 1.0, 0, 1)]
ONE = [setting._replace(beam_size=1) for setting in NARROW[:2]]


# laws


def result(search, case: Case) -> Int[np.ndarray, "B L"]:
    """What the search gives."""
    setting = case.setting
    options = {"length_penalty": setting.length_penalty} if "length penalty" in search.can else {}
    options |= {"max_length": case.sizes[1], "beam_size": setting.beam_size, "eos": setting.eos, "pad": setting.pad}
    return search(case.table, case.first, **options)


def finds(finals: Finals) -> Check:
    """The check that each row is the best of these by the score, then padding."""

    def check(search, case: Case) -> None:
        got, (rows, length, _) = result(search, case), case.sizes
        require(got.shape == (rows, length), f"tokens must have shape {[rows, length]}, got {list(got.shape)}")
        for row in range(rows):
            wanted = best(case, row, finals, [])
            padded = [*wanted.tokens, *[case.setting.pad] * (length - len(wanted.tokens))]
            if got[row].tolist() != padded:
                value = score(wanted, case.setting.length_penalty)
                raise Violation(f"row {row} must be {padded} with the score {value:.6g}, got {got[row].tolist()}")

    return check


BESIDE = {
    "W go on beside what has ended among the W likeliest": beside(1, True),
    "W go on beside what has ended among the 2 W likeliest, which comes before what has not": beside(2, False),
}
RULES: list[Finals] = [slots, *BESIDE.values()]
FREED = {name: finds(rule) for name, rule in BESIDE.items()}


@law(Search, cases=cases(5, 5, ONE), conventions=FREED)
def one_beam_is_greedy_decoding(search, case):
    """Whatever the penalty: one slot holds one hypothesis."""
    finds(greedy)(search, case)


@law(Search, cases=cases(3, 4, ALL), conventions=FREED)
def a_beam_that_holds_everything_finds_the_best_sequence(search, case):
    """By log P / ((5 + length) / 6)^a over all that end and all of full length."""
    finds(everything)(search, case)


@law(Search, cases=cases(5, 5, NARROW), conventions=FREED)
def a_narrow_beam_is_the_search_written_down(search, case):
    """A hypothesis that has ended keeps its slot, so the rest is searched with one less; the caches follow the slots.

    To stop early is right only where nothing that goes on could still win.
    """
    finds(slots)(search, case)


@law(Search, "length penalty", cases=cases(3, 4, ALL[2:], of_note=the_end_decides), conventions=FREED)
def the_length_in_the_score_counts_the_end_token(search, case):
    """Tried where another hypothesis would win by a length that is one short."""
    finds(everything)(search, case)


@law(Search, "length penalty", cases=cases(3, 4, ALL[2:], of_note=a_longer_one_wins), conventions=FREED)
def the_search_goes_on_while_a_longer_hypothesis_could_win(search, case):
    """The likeliest of all has ended, which is no reason to stop: the score of another is better in the end."""
    finds(everything)(search, case)


@law(Search, cases=cases(5, 5, ONE[:1] + NARROW))
def nothing_but_padding_follows_the_end(search, case):
    got, (rows, length, vocab) = result(search, case), case.sizes
    right = got.shape == (rows, length) and np.issubdtype(got.dtype, np.integer)
    require(right, f"tokens must be whole numbers {[rows, length]}, got {got.dtype}{list(got.shape)}")
    require((got >= 0) & (got < vocab), f"tokens must lie in the vocabulary [0, {vocab}), got {got.tolist()}")
    ends = np.cumsum(got == case.setting.eos, axis=-1)
    behind = np.concatenate([np.zeros((rows, 1), bool), ends[:, :-1] > 0], axis=-1)
    eos, pad = case.setting.eos, case.setting.pad
    require(got[behind] == pad, f"behind the end, {eos}, there must be nothing but padding, {pad}, got {got.tolist()}")


@law(Search, cases=cases(5, 5, NARROW), max_examples=10)
def a_batch_is_its_rows_one_by_one(search, case):
    """Each row has its own table, so none may read another's; and they end at different times."""
    together = result(search, case)
    for row in range(case.sizes[0]):
        alone = case._replace(table=case.table[row : row + 1], first=case.first[row : row + 1])
        same_bits(together[row : row + 1], result(search, alone), f"row {row} of a batch")

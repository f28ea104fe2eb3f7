"""KV caches: whatever is done to one, each output is that of the full forward."""

import numpy as np
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from conformance.adapters import Cache
from conformance.cache_machine import Decoding, cache_machine
from conformance.law import EVERY_HEALTH_CHECK, Violation, law

CAPACITY = 6
seeds = lambda cache: st.integers(0, 1000)


def decoding(cache, seed: int, rows: int = 2) -> Decoding:
    return Decoding(cache, rows=rows, capacity=CAPACITY, seed=seed)


@law(Cache, cases=seeds, max_examples=5)
def one_token_at_a_time_is_the_full_forward(cache, seed):
    run = decoding(cache, seed)
    for _ in range(CAPACITY):
        run.feed()


@law(
    Cache,
    "chunks",
    cases=lambda cache: st.tuples(seeds(cache), st.sampled_from([(2, 1, 3), (4, 2), (1, 5), (6,)])),
    max_examples=8,
)
def chunks_of_any_size_are_the_full_forward(cache, case):
    """A chunk is causal in itself, too."""
    run = decoding(cache, case[0])
    for number in case[1]:
        run.feed(number)


@law(Cache, cases=seeds, max_examples=3)
def a_token_too_many_raises_or_gives_nan(cache, seed):
    """Written over the last slot, or nowhere, it would give numbers that are wrong."""
    run = decoding(cache, seed)
    for _ in range(CAPACITY + 1):
        run.feed(compare=False)


@law(Cache, cases=seeds, max_examples=3)
def a_fork_leaves_the_original_as_it_was(cache, seed):
    run = decoding(cache, seed)
    run.feed()
    fork = run.fork()
    fork.seed += 100
    for each in (fork, run, fork, run):
        each.feed()


@law(
    Cache,
    "reorder",
    cases=lambda cache: st.tuples(seeds(cache), st.sampled_from([(1, 0, 2), (2, 2, 0), (0, 0, 0)])),
    max_examples=6,
)
def reordered_rows_go_on_as_the_rows_they_were(cache, case):
    run = decoding(cache, case[0], rows=3)
    run.feed()
    run.feed()
    run.reorder(np.array(case[1]))
    run.feed()


@law(Cache, "truncate", cases=lambda cache: st.tuples(seeds(cache), st.integers(0, 3)), max_examples=6)
def a_truncated_tail_is_forgotten(cache, case):
    run = decoding(cache, case[0])
    for _ in range(3):
        run.feed()
    run.truncate(np.full(2, case[1]))
    run.feed()
    run.feed()


@law(
    Cache,
    "ragged",
    cases=lambda cache: st.tuples(seeds(cache), st.sampled_from([(1, 3), (3, 0), (2, 1)])),
    max_examples=6,
)
def rows_may_hold_different_numbers_of_tokens(cache, case):
    run = decoding(cache, case[0])
    for _ in range(3):
        run.feed()
    run.truncate(np.array(case[1]))
    run.feed()
    run.feed()


@law(Cache, cases=lambda cache: st.none(), max_examples=1)
def no_sequence_of_operations_leaves_the_full_forward(cache, case):
    """The state machine of `conformance.cache_machine`."""
    limits = settings(
        max_examples=25,
        stateful_step_count=10,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=EVERY_HEALTH_CHECK,
    )
    try:
        run_state_machine_as_test(cache_machine(cache), settings=limits)
    except Violation as violation:
        notes = "\n".join(getattr(violation, "__notes__", [])).splitlines()
        steps = "; ".join(line for line in notes if line.startswith("state.") and "teardown" not in line)
        raise Violation(f"{violation} after {steps}") from None

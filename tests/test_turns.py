"""What is compared is measured in turn, at rest, and only if it gives the same; `all` benches are all."""

import jax
import numpy as np
import pytest
from typer.main import get_command

from bench import forms, modules, speed, turns
from bench.__main__ import app


def test_each_runs_alone_until_it_is_warm_and_then_is_timed(monkeypatch):
    calls = []
    seconds = {"quick": turns.SETTLE / 2, "slow": 2 * turns.SETTLE}
    monkeypatch.setattr(turns, "timed", lambda program: (seconds[program()], None))
    contenders = {name: lambda name=name: calls.append(name) or name for name in seconds}
    assert turns.in_turn(contenders, rounds=20) == {name: [took] * 20 for name, took in seconds.items()}
    turn = {"quick": ["quick"] * 3, "slow": ["slow"] * 2}
    first = []
    while calls:
        name = calls[0]
        assert calls[: len(turn[name])] == turn[name]
        del calls[: len(turn[name])]
        first.append(name)
    assert all(set(pair) == set(seconds) for pair in zip(first[::2], first[1::2], strict=True))
    assert set(first[::2]) == set(seconds)  # now the one begins, now the other


def test_after_enough_seconds_three_rounds_will_do(monkeypatch):
    monkeypatch.setattr(turns, "timed", lambda program: (turns.SETTLE, program()))
    assert turns.in_turn({0: int}, rounds=9, enough=-1.0) == {0: [turns.SETTLE] * 3}


@pytest.mark.parametrize("causal", [False, True])
def test_modules_of_all_frameworks_are_the_same_function(causal, monkeypatch):
    """Forward, as the bench itself asks, and in their gradients by x."""
    found = []

    def once(programs, *, rounds):
        found.extend(jax.tree.leaves(program())[-1] for (_, kind), program in programs.items() if kind != "forward")
        return {name: [1.0] for name in programs}

    monkeypatch.setattr(speed, "in_turn", once)
    times = modules.module_times((5,), rounds=1, causal=causal)
    assert {time.implementation for time in times} >= set(modules.MODULES)
    for gradient in found:
        np.testing.assert_allclose(np.asarray(gradient), np.asarray(found[0]), rtol=1e-3, atol=1e-3)


def test_what_gives_something_else_is_not_timed():
    programs = {name: {"forward": lambda value=value: np.float32(value)} for name, value in (("a", 1), ("b", 2))}
    with pytest.raises(AssertionError, match="b"):
        speed.timed_in_turn(programs, 4, 1)


def test_the_forms_are_those_of_every_bench():
    commands = get_command(app).commands
    assert {form.command[0] for form in forms.FORMS.values()} == set(commands) - {"all", "report"}
    for name, *options in (form.command + form.short for form in forms.FORMS.values()):
        commands[name].make_context(name, options)  # an option that it does not have raises

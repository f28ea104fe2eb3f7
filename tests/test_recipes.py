"""Every recipe does what it claims, in both frameworks to the same bits; mistakes end as docs/recipes.md says."""

import functools
import json
import re
import subprocess
import sys
import warnings

import jax
import pytest

import nnx_impl
from bench.ergonomics import Recipe, fingerprint, load, measured, recipe_names
from bench.mistakes import RECIPES, mistake, mistakes, tried
from bench.recipe_tables import main, outcomes
from tests.conftest import ROOT

ALONE = {"graph_and_tree"}  # Equinox has no modes: its modules are always trees
TASKS = {name.rpartition("_")[0] for name in recipe_names()}
PAIRS = sorted(TASKS - ALONE)
pytestmark = pytest.mark.usefixtures("untyped", "_as_users_have_it", "_classes_stay_as_they_were")


@pytest.fixture
def _as_users_have_it():
    """JAX's own defaults, which let frameworks and optax promote."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def _classes_stay_as_they_were():
    """nnx.tabulate leaves inherited methods behind, as their own, in the classes of the modules that it has shown."""
    before = {cls: set(vars(cls)) for cls in vars(nnx_impl).values() if isinstance(cls, type)}
    yield
    for cls, names in before.items():
        for name in vars(cls).keys() - names:
            delattr(cls, name)


@functools.cache
def run(name: str) -> Recipe:
    return measured(name, runs=1)


def test_the_recipes_stand_in_pairs():
    expected = {f"{task}_{frontend}" for task in PAIRS for frontend in ("nnx", "equinox")}
    assert set(recipe_names()) == expected | {f"{task}_nnx" for task in ALONE}
    assert len(PAIRS) >= 21


@pytest.mark.parametrize("task", PAIRS)
def test_a_pair_gives_the_same_bits(task):
    assert run(f"{task}_nnx").result == run(f"{task}_equinox").result


@pytest.mark.parametrize("name", recipe_names())
def test_the_claim_holds_and_the_mistakes_end_as_the_page_says(name):
    found = {row[:4] for row in outcomes([run(name)])}
    rows = {row for row in PAGE_ROWS if "_".join(row[:2]) == name}
    assert found == rows, "write the page anew: python -m bench recipes --page docs/recipes.md"


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_can_fail(name):
    kinds = [outcome.outcome for outcome in run(name).outcomes]
    assert len(kinds) >= 2
    assert set(kinds) != {"harmless"}


@pytest.mark.parametrize("name", recipe_names())
def test_a_mistake_has_a_name_and_says_what_is_wrong(name):
    planted = mistakes(load(name))
    assert len({run.__name__ for run in planted}) == len(planted)
    assert all((run.__doc__ or "").endswith(".") for run in planted)


def test_what_is_measured_is_read_from_the_source():
    recipe = run("train_step_nnx")
    assert recipe.names == [
        "nnx.Optimizer", "nnx.Param", "nnx.Rngs", "nnx.jit", "nnx.value_and_grad",
    ]  # fmt: skip
    assert (recipe.statements, recipe.nesting) == (14, 2)
    assert recipe.host_seconds > 0


def test_the_first_batch_parts_construction_from_the_call_and_the_second_from_what_is_late():
    for number, expected in enumerate(["refused at construction", "refused at the call", "refused late"]):

        @mistake("somewhere #1")
        def fails(batches, number=number):
            """It fails."""
            for _ in range(number):
                next(batches)
            raise ValueError("\n  no good\nat all")

        assert tried(fails) == ("fails", "It fails.", "somewhere #1", expected, "ValueError: no good")


def test_an_assertion_of_the_recipe_means_that_nobody_else_noticed():
    names = {"mistake": mistake, "warnings": warnings}
    code = """
@mistake()
def told(batches):
    warnings.warn("take care")
    assert False, "the claim"
@mistake()
def untold(batches):
    assert False, "the claim"
"""
    exec(compile(code, RECIPES / "some_nnx.py", "exec"), names)
    assert tried(names["untold"])[3:] == ("silently wrong", "AssertionError: the claim")
    assert tried(names["told"])[3:] == ("wrong with a warning", "UserWarning: take care")

    @mistake()
    def elsewhere(batches):
        raise AssertionError("not the recipe's")

    assert tried(elsewhere).outcome == "refused at construction"
    assert tried(mistake()(lambda batches: None)).outcome == "harmless"


def test_fingerprints_tell_names_types_and_bits_apart():
    zero = jax.numpy.zeros(2)
    results = [zero, -zero, zero.astype("int32"), {"a": zero}, {"b": zero}, zero[None]]
    assert len({fingerprint(result) for result in results}) == len(results)
    assert fingerprint(zero) == fingerprint(zero + 0)


def test_a_recipe_runs_as_a_program():
    command = [sys.executable, "-m", "bench.recipes.inspection_nnx"]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "silently wrong: AssertionError: counted 2018, not 672" in said


def test_the_command_prints_tables_and_keeps_data(tmp_path, capsys):
    main(["inspection_nnx", "--runs", "1", "--json", str(tmp_path / "data.json"), "--page", str(tmp_path / "page.md")])
    assert "silently" in capsys.readouterr().out
    (recipe,) = json.loads((tmp_path / "data.json").read_text())["results"]
    assert recipe["names"]
    assert recipe["outcomes"][0]["outcome"] == "silently wrong"
    assert page_rows((tmp_path / "page.md").read_text()) == {row for row in PAGE_ROWS if row[0] == "inspection"} - {
        row for row in PAGE_ROWS if row[1] == "equinox"
    }
    with pytest.raises(SystemExit):
        main(["no_such_recipe"])


def page_rows(text: str) -> set[tuple[str, ...]]:
    """Task, frontend, mistake and what happened, of each row of the page's last table."""
    table = text.partition("| task | frontend | mistake |")[2]
    rows = re.findall(r"^\| (\w+) \| (nnx|equinox) \| (.*?) \| ([\w ]+) \| ", table, re.M)
    return set(rows)


PAGE_ROWS = page_rows((ROOT / "docs/recipes.md").read_text())

"""The conformance kit judges rightly: ours conform, every bug of the museum is rejected, right ones pass."""

import contextlib
import dataclasses
import warnings

import numpy as np
import pytest
from hypothesis import strategies as st

from conformance.adapters import Attention, Cache, Run, Sampling, Search, Sinusoid, WeightsFile
from conformance.cache_machine import Decoding, cache_machine
from conformance.law import Violation, judge, law, refuses, require, same_bits, within
from conformance.laws import ALL, laws_for, named
from conformance.laws import decoding as laws_of_search
from conformance.laws.sampling import nucleus
from conformance.museum import EXHIBITS, UNSHOWN, caches, decoding
from conformance.museum import runs as museum_runs
from conformance.museum.jax_right import jax_attention
from conformance.museum.right import blocked_attention, numpy_attention
from conformance.snippet import literal, snippet
from conformance.subjects import eqx_nn, flax_nnx, jax_nn, ours, runs

EXAMPLES = 10
OURS = [
    pytest.param(adapter, law, id=f"{adapter.name}-{law.name}")
    for adapter in ours.adapters + runs.adapters
    for law in laws_for(adapter)
    if law.needs <= adapter.can and not law.lacks & adapter.can
]


@pytest.mark.parametrize(("adapter", "law"), OURS)
def test_ours_conform(adapter, law):
    verdict = judge(law, adapter, max_examples=EXAMPLES)
    interleaved = adapter is ours.rotary_interleaved and law.name.startswith("pair i is made of")
    assert verdict.status == ("differs" if interleaved else "holds"), verdict.failure and verdict.failure.message


def test_ours_offer_all_that_the_laws_of_attention_ask_for():
    assert ours.attention.can == Attention.flags.keys()


# the museum


@pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda e: f"{e.number}-{e.adapter.name}")
def test_every_bug_of_the_museum_is_rejected_by_the_laws_it_names_and_by_a_snippet(exhibit):
    target = f"conformance.museum:EXHIBITS[{EXHIBITS.index(exhibit)}].adapter"
    for name in exhibit.laws:
        verdict = judge(named(name), exhibit.adapter, shrinks=0)
        assert verdict.status not in ("holds", "not offered"), f"{name} lets {exhibit.defect!r} pass"
        code = snippet(target, verdict)
        raised = pytest.raises((Violation, KeyError, FileNotFoundError))
        broken = raised if ").check(" in code else contextlib.nullcontext()
        with broken, warnings.catch_warnings(action="ignore"):  # NumPy's, of what the wrong one does
            exec(code, {})


RIGHT = [
    numpy_attention,
    blocked_attention,
    jax_attention,
    caches.right,
    museum_runs.right,
    decoding.right_search,
    decoding.right_sampling,
]


@pytest.mark.parametrize("adapter", RIGHT, ids=lambda a: a.name)
def test_right_implementations_pass_every_law(adapter):
    examples = EXAMPLES if adapter is jax_attention else 25
    verdicts = (judge(law, adapter, max_examples=examples) for law in laws_for(adapter))
    wrong = [v for v in verdicts if v.status not in ("holds", "not offered")]
    assert not wrong, [(v.law.name, v.failure.message) for v in wrong if v.failure]


@pytest.mark.torch
def test_a_right_attention_of_torch_passes_every_law():
    pytest.importorskip("torch")
    from conformance.museum.torch_right import torch_attention

    test_right_implementations_pass_every_law(torch_attention)


def test_the_museum_shows_every_entry_or_says_why_not():
    shown = {exhibit.number for exhibit in EXHIBITS}
    assert shown | UNSHOWN.keys() == set(range(1, 48))
    assert not shown & UNSHOWN.keys()


@pytest.mark.parametrize(
    ("adapter", "name"),
    [
        (flax_nnx.layer_norm, "a mean of a thousand costs no more than rounding"),
        (eqx_nn.rotary, "two thetas in one process have each their own angles"),
        (flax_nnx.cache_causal, "one token at a time is the full forward"),
        (flax_nnx.cache, "a token too many raises or gives nan"),
        (jax_nn.attention, "a value that no query sees may hold anything"),
        (flax_nnx.attention, "a value that no query sees may hold anything"),
        (eqx_nn.attention, "a value that no query sees may hold anything"),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_the_kit_finds_the_known_defects_of_peers(adapter, name):
    assert judge(named(name), adapter, max_examples=EXAMPLES).status == "defect"


@pytest.mark.parametrize(
    ("adapter", "name"),
    [
        (flax_nnx.layer_norm_slow, "a mean of a thousand costs no more than rounding"),
        (eqx_nn.layer_norm, "a mean of a thousand costs no more than rounding"),
        (flax_nnx.cache, "one token at a time is the full forward"),
        (flax_nnx.cache, "reordered rows go on as the rows they were"),
        (jax_nn.attention, "a key that no query sees may hold anything"),
        (jax_nn.attention, "options hold together"),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_where_peers_are_right_they_pass(adapter, name):
    assert judge(named(name), adapter, max_examples=EXAMPLES).status == "holds"


def test_the_mean_of_the_values_is_a_convention_and_no_defect():
    verdict = judge(named("a query with nothing to see gives zero"), jax_nn.attention, max_examples=4)
    assert (verdict.status, verdict.convention) == ("differs", "the mean of all values")


def freed(table, first, *, max_length, beam_size, eos, pad, length_penalty=0.0):
    """A search where what ends frees its slot."""
    case = laws_of_search.Case(table, first, laws_of_search.Setting(beam_size, length_penalty, eos, pad))
    tokens = np.full((len(first), max_length), pad)
    for row in range(len(first)):
        found = laws_of_search.best(case, row, laws_of_search.beside(1, True), []).tokens
        tokens[row, : len(found)] = found
    return tokens


class ColdNucleus(decoding.NumpySampling):
    """Top-p, and only then the temperature."""

    def __call__(self, logits, *, seed, temperature=1.0, top_p=None, **rules):
        if top_p is not None:
            p = np.exp(np.float64(logits) - logits.max())
            logits = np.where(nucleus(p[0] / p[0].sum(), top_p) > 0, logits, -np.inf)  # all rows are alike
        return super().__call__(logits, seed=seed, temperature=temperature, **rules)


@pytest.mark.parametrize(
    ("adapter", "name", "convention"),
    [
        (
            Search("freed", freed, decoding.CAN_SEARCH),
            "a narrow beam is the search written down",
            "W go on beside what has ended among the W likeliest",
        ),
        (
            Sampling("cold nucleus", ColdNucleus(), decoding.CAN_DRAW),
            "the mass of top p is that after the temperature",
            "the mass is that before the temperature",
        ),
        (
            Sampling("cold nucleus", ColdNucleus(), decoding.CAN_DRAW),
            "the mass of top p is that of what top k has left",
            "the mass is that of all tokens",
        ),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_other_rules_of_decoding_are_conventions_and_no_defects(adapter, name, convention):
    verdict = judge(named(name), adapter, shrinks=0)
    assert (verdict.status, verdict.convention) == ("differs", convention)


# verdicts


def table_law(wanted, **conventions):
    """The law that every number of a table is the wanted one."""

    def equals(number):
        def check(table, case):
            within(table(length=case, d_model=2), np.full((case, 2), number), 0.0)

        return check

    conventions = {name: equals(number) for name, number in conventions.items()}
    return law(Sinusoid, cases=lambda table: st.integers(1, 50), conventions=conventions)(equals(wanted))


def constant(number):
    return Sinusoid("constant", lambda *, length, d_model: np.full((length, d_model), number))


def raising(*, length, d_model):
    raise RuntimeError(f"no table of {length}")


def test_a_law_that_holds_holds():
    assert judge(table_law(1.0), constant(1.0)).status == "holds"


def test_a_convention_that_is_followed_everywhere_is_named():
    verdict = judge(table_law(1.0, zeros=0.0, twos=2.0), constant(2.0))
    assert (verdict.status, verdict.convention) == ("differs", "twos")


def test_a_convention_that_is_followed_only_sometimes_is_a_defect():
    sometimes = Sinusoid("sometimes", lambda *, length, d_model: np.full((length, d_model), 2.0 if length < 7 else 3.0))
    assert judge(table_law(1.0, twos=2.0), sometimes).status == "defect"


def test_a_defect_comes_with_its_smallest_case():
    wrong_from_7 = Sinusoid("wrong", lambda *, length, d_model: np.full((length, d_model), float(length < 7)))
    verdict = judge(table_law(1.0), wrong_from_7)
    assert verdict.status == "defect"
    assert verdict.failure is not None
    assert verdict.failure.case == 7


def test_what_raises_is_told_apart():
    verdict = judge(table_law(1.0), Sinusoid("raising", raising))
    assert verdict.status == "raises"
    assert verdict.failure is not None
    assert verdict.failure.message == "RuntimeError: no table of 1"


def test_a_law_whose_flags_are_missing_is_not_offered():
    bare = Attention("bare", numpy_attention.function, set())
    statuses = {judge(law, bare, max_examples=1).status for law in laws_for(bare) if law.needs}
    assert statuses == {"not offered"}
    assert judge(named("the output is the softmax weighted mean of the values"), bare).status == "holds"


def test_verdicts_are_the_same_in_every_run():
    law = named("the bias is added to the scaled logits")
    wrong = Attention("no bias", lambda q, k, v, bias=None: numpy_attention.function(q, k, v), {"bias"})
    first, second = (judge(law, wrong).failure for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.message == second.message


def test_unknown_flags_are_named():
    with pytest.raises(ValueError, match=r"Attention 'x' can do \['masks'\], which is unknown; .*the flags are .*mask"):
        Attention("x", numpy_attention.function, {"masks"})
    with pytest.raises(ValueError, match=r"\['masc'\], which is unknown; perhaps 'mask' is meant; the flags are"):
        Attention("x", numpy_attention.function, {"masc"})
    with pytest.raises(
        TypeError, match=r"the flags of Attention 'x' must be a set of names, got 'mask'; give {'mask'}"
    ):
        Attention("x", numpy_attention.function, "mask")
    with pytest.raises(ValueError, match="Sinusoid has no flags"):
        law(Sinusoid, "mask", cases=lambda table: st.none())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention("x", 3), "Attention 'x' needs a function that can be called, got 3"),
        (lambda: WeightsFile("x", print), "WeightsFile 'x' needs a load that can be called, got None"),
        (lambda: Cache("x", print, start=print), "Cache 'x' needs a full that can be called, got None"),
        (lambda: Run("x", print, start=print, load=print), "Run 'x' needs a save that can be called, got None"),
        (
            lambda: Cache("x", print, {"reorder"}, start=print, full=print),
            "Cache 'x' needs a select that can be called, for it has the flag 'reorder', got None",
        ),
    ],
)
def test_what_an_adapter_needs_is_asked_for_when_it_is_made(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_law_names_are_one_each():
    names = [law.name for law in ALL]
    assert len(set(names)) == len(names)


# checks


def test_checks_reject_what_they_must():
    one, nan = np.ones(2, "float32"), np.array([1, np.nan], "float32")
    same_bits(nan, nan.copy())
    within(one, one + 1e-3, 2e-3)
    refuses(lambda: raising(length=1, d_model=1), "this")
    for bad in (
        lambda: same_bits(one, one.astype("float64")),
        lambda: same_bits(one, nan),
        lambda: same_bits(one, np.ones((2, 1), "float32")),
        lambda: within(one, one + 1e-3, 5e-4),
        lambda: within(one, nan, 1.0),
        lambda: within(nan, one, np.inf),
        lambda: within(one, np.ones(1), 1.0),
        lambda: refuses(lambda: one, "this"),
        lambda: require(nan == 1, "equal"),
    ):
        with pytest.raises(Violation):
            bad()


# the cache machine


def test_the_cache_machine_passes_a_right_cache_as_a_unittest():
    cache_machine(caches.right).TestCase("runTest").runTest()


def test_the_cache_machine_finds_what_only_a_sequence_shows():
    """A truncation that forgets to is seen by the next step alone."""
    forgetful = dataclasses.replace(caches.right, truncate=lambda state, lengths: state)
    verdict = judge(named("no sequence of operations leaves the full forward"), forgetful)
    assert verdict.status == "defect"
    assert verdict.failure is not None
    assert "after state.step(); state.truncate(length=0); state." in verdict.failure.message


def test_a_decoding_demands_that_an_overflow_is_no_number():
    run = Decoding(caches.right, capacity=2)
    for _ in range(3):
        run.feed()
    assert run.lengths == [2, 2]


# snippets


def printed(code, capsys):
    exec(code, {})
    return capsys.readouterr().out


def test_a_snippet_makes_the_failing_call_again(capsys):
    verdict = judge(named("a row of minus infinity in the bias gives zero"), jax_nn.attention, max_examples=3)
    code = snippet("conformance.subjects.jax_nn:attention", verdict)
    assert verdict.failure is not None
    assert printed(code, capsys) == "".join(f"{call.result}\n" for call in verdict.failure.calls)
    assert "nan" in str(verdict.failure.calls[-1].result)


def test_a_snippet_goes_on_behind_what_was_rightly_refused(capsys):
    """The failing call is the last one."""

    def refuses_two_axes(q, k, v, *, mask):
        if mask.ndim == 2:
            raise ValueError("of rank 2")
        return np.float32(7)

    @law(Attention, "mask", cases=lambda attend: st.just(np.ones((2, 2), bool)))
    def twice_refused(attend, mask):
        for x in (mask, mask[0]):
            refuses(lambda x=x: attend(x, x, x, mask=x), "this")

    picky = Attention("picky", refuses_two_axes, {"mask"})
    code = snippet("nowhere:picky", judge(twice_refused, picky, shrinks=0))
    exec(code.replace("import nowhere as target\n", "").replace("target.picky", "picky"), {"picky": picky})
    assert capsys.readouterr().out == "ValueError of rank 2\n7.0\n"


def refuses_all_but_nan(q, k, v, *, dropout_rate, dropout_seed):
    if not np.isnan(dropout_rate):
        raise ValueError(f"no rate: {dropout_rate}")
    return v


rate_unchecked = Attention("rate unchecked", refuses_all_but_nan, {"dropout"})


def test_a_snippet_knows_a_rate_that_is_no_number(capsys):
    verdict = judge(named("a rate outside of zero to one is refused"), rate_unchecked)
    assert verdict.failure is not None
    assert "dropout_rate=nan" in verdict.failure.configuration
    assert printed(snippet(f"{__name__}:rate_unchecked", verdict), capsys).startswith("ValueError no rate: -0.5\n")


@pytest.mark.parametrize(
    ("law", "message"), [("no nan is made on the way", "FloatingPointError"), ("a key is used once", "KeyReuseError")]
)
def test_a_snippet_makes_a_careful_call_as_carefully(law, message, capsys):
    """Under JAX's checks for NaN and for keys used twice."""
    (exhibit,) = (e for e in EXHIBITS if law in e.laws)
    verdict = judge(named(law), exhibit.adapter, shrinks=0)
    code = snippet(f"conformance.museum:EXHIBITS[{EXHIBITS.index(exhibit)}].adapter", verdict)
    assert printed(code, capsys).startswith(message)


def test_a_snippet_of_a_cache_checks_the_law_again():
    (exhibit,) = (e for e in EXHIBITS if e.number == 6)
    verdict = judge(named(exhibit.laws[0]), exhibit.adapter)
    target = f"conformance.museum:EXHIBITS[{EXHIBITS.index(exhibit)}].adapter"
    with pytest.raises(Violation, match="row 0, positions 1 to 1"):
        exec(snippet(target, verdict), {})


@pytest.mark.parametrize(
    "array",
    [
        np.array([[0.1, -0.0, np.nan], [np.inf, -np.inf, 1e-38]], "float32"),
        np.arange(6, dtype="int32").reshape(2, 3),
        np.array([True, False]),
        np.zeros((0, 3), "float32"),
        np.random.default_rng(0).standard_normal((7, 9, 11)),
        np.array(2.5, "float32"),
    ],
    ids=str,
)
def test_literals_are_the_arrays(array):
    names = {"np": np, "nan": np.nan, "inf": np.inf}
    exec("import base64, zlib", names)
    same_bits(eval(literal(array), names), array)

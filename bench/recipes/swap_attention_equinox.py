"""Another attention, in Equinox: each MultiHeadAttention is replaced by a module that calls a function of one's own."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import equinox as eqx
import jax
import numpy as np

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from core.attention import merge_heads, split_heads
from equinox_impl import DecoderOnlyTransformer, MultiHeadAttention


class Swapped(eqx.Module):
    """The projections of an attention around another function; self-attention alone."""

    inner: MultiHeadAttention
    function: Callable[..., Any] = eqx.field(static=True)

    def run(self, x, memory=None, *, causal=False, **others):
        others["memory"] = memory
        if given := [name for name, value in others.items() if value is not None and value is not False]:
            raise NotImplementedError(f"the function that was swapped in has no place for {given}")
        q = split_heads(self.inner.q_proj(x), self.inner.config.num_heads)
        out = self.function(q, *self.inner.keys_values(x), is_causal=causal)
        return self.inner.o_proj(merge_heads(out)), None


def attentions(model):
    is_attention = lambda node: isinstance(node, MultiHeadAttention)
    return [node for node in jax.tree.leaves(model, is_leaf=is_attention) if is_attention(node)]


def swapped(model, function=jax.nn.dot_product_attention, module=Swapped):
    return eqx.tree_at(attentions, model, [module(node, function) for node in attentions(model)])


def recipe(
    batches: Batches,
    *,
    swapped: Callable[[Any], Any] = swapped,
    called: Callable[..., Any] = lambda model, batch: model(batch.inputs),
):
    """jax.nn's attention gives what ours gives, up to rounding, and is traced once for all batches."""
    model = DecoderOnlyTransformer(CONFIG, key=jax.random.key(0))
    traces, outputs = [], []

    @eqx.filter_jit
    def logits(model, batch):
        traces.append(model)
        return called(model, batch)

    assert not isinstance(swapped(model).decoder.blocks[0].attention, MultiHeadAttention), "no attention was swapped"
    for batch in islice(batches, 2):
        outputs.append(logits(swapped(model), batch))
        assert np.allclose(outputs[-1], called(model, batch), atol=1e-5), "another output than with our attention"
    assert len(traces) == 1, f"traced {len(traces)} times"
    return outputs[0][0, 0]


@mistake("flax #4505")
def causal_is_not_passed_on(batches: Batches):
    """The function takes queries, keys and values, and never hears that the attention is causal."""
    deaf = lambda q, k, v, **_: jax.nn.dot_product_attention(q, k, v)
    recipe(batches, swapped=lambda model: swapped(model, deaf))


@mistake()
def padding_is_not_passed_on(batches: Batches):
    """The model is called with a mask of real tokens, which the wrapper takes and forgets."""

    class Deaf(Swapped):
        def run(self, x, memory=None, *, causal=False, mask=None, **others):
            return super().run(x, causal=causal)

    called = lambda model, batch: model(batch.inputs, target_mask=jax.numpy.roll(batch.target_mask, 1, axis=1))
    recipe(batches, swapped=lambda model: swapped(model, module=Deaf), called=called)


@mistake()
def the_function_knows_no_mask(batches: Batches):
    """The model is called with a mask of real tokens, which the function has no place for."""
    recipe(batches, called=lambda model, batch: model(batch.inputs, target_mask=batch.target_mask))


@mistake("equinox #1062")
def the_function_is_a_new_lambda_each_time(batches: Batches):
    """A function is compared by identity: a lambda made anew for every step is compiled anew."""
    recipe(batches, swapped=lambda model: swapped(model, lambda *a, **b: jax.nn.dot_product_attention(*a, **b)))


@mistake()
def the_attention_is_assigned(batches: Batches):
    """Surgery by assignment, as in PyTorch."""

    def assigned(model):
        model.decoder.blocks[0].attention = Swapped(model.decoder.blocks[0].attention, jax.nn.dot_product_attention)
        return model

    recipe(batches, swapped=assigned)


if __name__ == "__main__":
    demonstrate(__file__)

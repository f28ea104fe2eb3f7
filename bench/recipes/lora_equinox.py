"""LoRA, in Equinox: every Linear is replaced by a module that holds it, and only the low-rank matrices are trained."""

from collections.abc import Callable
from itertools import islice

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches, moved
from equinox_impl import DecoderOnlyTransformer, Linear, loss_fn, to_weights

tx = optax.adam(0.01)


class LoRA(eqx.Module):
    """base(x) + x A B."""

    base: Linear
    lora_a: Array
    lora_b: Array

    def __init__(self, base: Linear, rank: int, *, b_init: Callable = jax.nn.initializers.zeros, key: Array):
        inputs, outputs = base.kernel.shape
        self.base = base
        self.lora_a = jax.nn.initializers.he_uniform()(key, (inputs, rank))
        self.lora_b = b_init(key, (rank, outputs))

    def __call__(self, x: Array) -> Array:
        return x @ self.lora_a @ self.lora_b + self.base(x)


def linears(model):
    """Every Linear, in the order of the tree."""
    is_linear = lambda node: isinstance(node, Linear)
    return [node for node in jax.tree.leaves(model, is_leaf=is_linear) if is_linear(node)]


def adapted(model, **options):
    """The model with rank 2 beside every Linear; its output is the same until lora_b has moved."""
    keys = [jax.random.fold_in(jax.random.key(1), 2 * i) for i in range(len(linears(model)))]  # as nnx.LoRA draws
    wrapped = [LoRA(node, 2, key=key, **options) for node, key in zip(linears(model), keys, strict=True)]
    return eqx.tree_at(linears, model, wrapped)


def of_adapters(model):
    """True for the matrices of LoRA."""
    is_lora = lambda node: isinstance(node, LoRA)
    matrices = lambda m: [x for n in jax.tree.leaves(m, is_leaf=is_lora) if is_lora(n) for x in (n.lora_a, n.lora_b)]
    return eqx.tree_at(matrices, jax.tree.map(lambda _: False, model), replace_fn=lambda _: True)


@eqx.filter_jit
def train_step(model, opt_state, batch, filter_spec):
    params, frozen = eqx.partition(model, filter_spec)
    objective = lambda params: loss_fn(eqx.combine(params, frozen), batch)
    grads, metrics = eqx.filter_grad(objective, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state)
    return eqx.apply_updates(model, updates), opt_state, metrics.loss


def recipe(batches: Batches, *, adapted: Callable = adapted, filter_spec: Callable = of_adapters):
    """The wrapped model gives the bits of the old one; then adapters learn, all else stays."""
    plain = DecoderOnlyTransformer(CONFIG, key=jax.random.key(0))
    model = adapted(plain)
    spec = filter_spec(model)
    opt_state, tokens = tx.init(eqx.filter(model, spec)), next(batches).inputs
    assert np.array_equal(model(tokens), plain(tokens)), "the output is another before any training"

    before, losses = to_weights(model), []
    for batch in islice(batches, 2):
        model, opt_state, loss = train_step(model, opt_state, batch, spec)
        losses.append(loss)
    changed = moved(before, to_weights(model))
    assert changed, "nothing was trained"
    assert changed == {name for name in before if "lora_" in name}, "more than the adapters has moved"
    return jnp.stack(losses)


@mistake()
def all_arrays_are_trained(batches: Batches):
    """The model is partitioned by eqx.is_inexact_array, as before the surgery."""
    recipe(batches, filter_spec=lambda model: eqx.is_inexact_array)


@mistake()
def lora_b_does_not_begin_at_zero(batches: Batches):
    """Both matrices are drawn at random."""
    recipe(batches, adapted=lambda model: adapted(model, b_init=jax.nn.initializers.normal()))


@mistake()
def layers_are_looked_for_among_the_leaves(batches: Batches):
    """jax.tree.leaves without is_leaf never sees a Linear, only its arrays."""
    found = lambda model: [node for node in jax.tree.leaves(model) if isinstance(node, Linear)]
    recipe(batches, adapted=lambda model: eqx.tree_at(found, model, []))


@mistake()
def the_new_layer_is_assigned(batches: Batches):
    """Surgery by assignment, as in PyTorch."""

    def assigned(model):
        attention = model.decoder.blocks[0].attention
        attention.q_proj = LoRA(attention.q_proj, 2, key=jax.random.key(1))
        return model

    recipe(batches, adapted=assigned)


if __name__ == "__main__":
    demonstrate(__file__)

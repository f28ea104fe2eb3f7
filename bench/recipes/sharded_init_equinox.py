"""A model that is born sharded, in Equinox: a rule by path says how each array is split, init is jitted."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from equinox_impl import DecoderOnlyTransformer

DEVICES = 8  # simulated on one processor
RULES = {
    ("q_proj", "kernel"): P(None, "model"), ("k_proj", "kernel"): P(None, "model"),
    ("v_proj", "kernel"): P(None, "model"), ("o_proj", "kernel"): P("model", None),
    ("up_proj", "kernel"): P(None, "model"), ("up_proj", "bias"): P("model"), ("down_proj", "kernel"): P("model", None),
}  # fmt: skip


def shardings(model, mesh, rules):
    """Of each array, by the last two names of its path; what no rule names is on every device."""
    named = lambda path, _: NamedSharding(mesh, rules.get(tuple(getattr(key, "name", None) for key in path[-2:]), P()))
    return jax.tree_util.tree_map_with_path(named, eqx.filter(model, eqx.is_array))


@eqx.filter_jit
def born(key, mesh, rules):
    model = DecoderOnlyTransformer(CONFIG, key=key)
    return eqx.filter_shard(model, shardings(model, mesh, rules))


def recipe(batches: Batches, *, born: Callable[..., Any] = born, rules: Any = RULES):
    """Kernels are split over four devices, each made where it stays; numbers are those of one device."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    model = born(jax.random.key(0), mesh, rules)
    single = DecoderOnlyTransformer(CONFIG, key=jax.random.key(0))
    kernel = model.decoder.blocks[0].feed_forward.up_proj.kernel
    shards = {shard.data.shape for shard in kernel.addressable_shards}
    assert shards == {(8, 4)}, f"shards of {shards} of a kernel {kernel.shape}"
    assert np.array_equal(kernel, single.decoder.blocks[0].feed_forward.up_proj.kernel)

    batch = next(batches)
    outputs = eqx.filter_jit(lambda model, tokens: model(tokens))(model, batch.inputs)
    assert np.allclose(outputs, single(batch.inputs), atol=1e-5)
    return kernel[0]


@mistake()
def a_rule_matches_nothing(batches: Batches):
    """A rule for `weight`, as eqx.nn.Linear calls it: no array has that name."""
    recipe(batches, rules={("up_proj", "weight"): P(None, "model")})


@mistake()
def the_mesh_does_not_divide(batches: Batches):
    """The vocabulary of 11 is to be split over four devices."""
    recipe(batches, rules=RULES | {("embedding", "embedding"): P("model", None)})


@mistake()
def one_sharding_is_for_all(batches: Batches):
    """One specification of two axes for a model whose biases have one."""

    def same(key, mesh, rules):
        return eqx.filter_shard(DecoderOnlyTransformer(CONFIG, key=key), NamedSharding(mesh, P(None, "model")))

    recipe(batches, born=eqx.filter_jit(same))


if __name__ == "__main__":
    demonstrate(__file__)

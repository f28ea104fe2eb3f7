"""A model that is born sharded, in NNX: parameters name their axes, rules map names to the mesh, init is jitted."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from nnx_impl import DecoderOnlyTransformer

DEVICES = 8  # simulated on one processor
RULES = (("embed", None), ("heads", "model"), ("mlp", "model"), ("vocab", None))


def born():
    model = DecoderOnlyTransformer(CONFIG, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
    return model


def recipe(batches: Batches, *, born: Callable[[], Any] = born, rules: Sequence = RULES):
    """Kernels are split over four devices, each made where it stays; numbers are those of one device."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        model = nnx.jit(lambda: born())()  # a function traced before would keep the rules of its first trace
    single = DecoderOnlyTransformer(CONFIG, rngs=nnx.Rngs(0))
    kernel = model.decoder.blocks[0].feed_forward.up_proj.kernel[...]
    shards = {shard.data.shape for shard in kernel.addressable_shards}
    assert shards == {(8, 4)}, f"shards of {shards} of a kernel {kernel.shape}"
    assert np.array_equal(kernel, single.decoder.blocks[0].feed_forward.up_proj.kernel[...])

    batch = next(batches)
    outputs = nnx.jit(lambda model, tokens: model(tokens))(model, batch.inputs)
    assert np.allclose(outputs, single(batch.inputs), atol=1e-5)
    return kernel[0]


@mistake()
def there_are_no_rules(batches: Batches):
    """The mesh knows "model", the parameters say "heads", and nothing tells that they are one."""
    recipe(batches, rules=())


@mistake()
def the_rules_come_after_the_trace(batches: Batches):
    """The same jitted function under one set of rules, then another: rules are no part of what it was traced for."""
    jitted = nnx.jit(born)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), nnx.logical_axis_rules([(name, None) for name, _ in RULES]):
        jitted()
    recipe(batches, born=jitted)


@mistake()
def the_mesh_does_not_divide(batches: Batches):
    """The vocabulary of 11 is to be split over four devices."""
    recipe(batches, rules=(("embed", None), ("heads", "model"), ("mlp", "model"), ("vocab", "model")))


@mistake()
def specs_are_asked_for_and_not_applied(batches: Batches):
    """nnx.get_partition_spec only tells where parameters ought to be."""

    def anywhere():
        model = DecoderOnlyTransformer(CONFIG, rngs=nnx.Rngs(0))
        nnx.get_partition_spec(nnx.state(model, nnx.Param))
        return model

    recipe(batches, born=anywhere)


if __name__ == "__main__":
    demonstrate(__file__)

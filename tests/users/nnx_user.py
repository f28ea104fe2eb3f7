"""What a user of the NNX frontend writes; a type checker finds nothing in it."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from core.losses import Batch
from core.weights import load, save
from nnx_impl import (
    Linear,
    Trainer,
    Transformer,
    TransformerConfig,
    beam_search,
    compiled,
    evaluation,
    from_weights,
    generate,
    loss_fn,
    score,
    to_weights,
    train_step,
)

config = TransformerConfig(
    source_vocab_size=9, target_vocab_size=9, d_model=8, num_heads=2, d_ff=16, norm_order="pre", dtype=jnp.bfloat16,
    positions="shaw", activation="swiglu", attention_bias=True, attention_sinks=True, tie_embeddings="none",
)  # fmt: skip
model = Transformer(config, rngs=nnx.Rngs(0))
tokens = jnp.array([[1, 2, 3]])
batch = Batch(tokens, tokens > 0, tokens, tokens, tokens > 0)


@nnx.jit
def step(model: Transformer, optimizer: nnx.Optimizer, rngs: nnx.Rngs) -> jax.Array:
    (loss, _), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, batch, rngs, label_smoothing=0.1)
    optimizer.update(model, grads)
    return loss


optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
loss: jax.Array = step(model, optimizer, nnx.Rngs(1))
print(train_step(model, optimizer, batch, nnx.Rngs(2), label_smoothing=0.1).accuracy)
logits: jax.Array = evaluation(model)(tokens, tokens)

decoder, block = model.decoder, model.decoder.blocks[0]
arrays: list[jax.Array] = [
    logits,
    decoder.norm.scale[...],
    block.cross_attention.q_proj.kernel[...],
    block.cross_attention_norm.scale[...],
    block.attention.sinks[...],
    block.attention.o_proj.bias[...],
    block.feed_forward.gate_proj.kernel[...],
    model.output_proj.kernel[...],
    model.source_embedding.embedding[...],
    *(block.attention.q_proj.kernel[...] for block in model.encoder.blocks),
]
model.encoder.blocks[0].feed_forward.up_proj = Linear(8, 16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))

weights = to_weights(model)
save("model.safetensors", weights)
again: Transformer = from_weights(config, load("model.safetensors"))
produced: jax.Array = generate(again, tokens, max_length=4)
best = beam_search(again, tokens, max_length=4, beam_size=2)
print(score(again, tokens, best.tokens[:, 0]), compiled(lambda model, x: model(x, x), evaluation(again))(tokens))
trainer = Trainer(again, optax.adam(1e-3))
print(trainer.train(batch).loss, trainer.evaluate(batch).loss, trainer.model.encoder.norm.scale[...])

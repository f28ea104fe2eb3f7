"""What a user of the Equinox frontend writes; a type checker finds nothing in it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from core.losses import Batch
from core.weights import load, save
from equinox_impl import (
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
model = Transformer(config, key=jax.random.key(0))
tokens = jnp.array([[1, 2, 3]])
batch = Batch(tokens, tokens > 0, tokens, tokens, tokens > 0)


tx = optax.adam(1e-3)


@eqx.filter_jit
def step(
    model: Transformer, opt_state: optax.OptState, key: jax.Array
) -> tuple[Transformer, optax.OptState, jax.Array]:
    (loss, _), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, batch, key, label_smoothing=0.1)
    updates, opt_state = tx.update(grads, opt_state)
    return eqx.apply_updates(model, updates), opt_state, loss


model, opt_state, loss = step(model, tx.init(eqx.filter(model, eqx.is_inexact_array)), jax.random.key(1))
model, opt_state, metrics = train_step(model, opt_state, batch, jax.random.key(2), tx=tx, label_smoothing=0.1)
print(metrics.accuracy)
logits: jax.Array = evaluation(model)(tokens, tokens)

decoder, block = model.decoder, model.decoder.blocks[0]
arrays: list[jax.Array] = [
    logits,
    decoder.norm.scale,
    block.cross_attention.q_proj.kernel,
    block.cross_attention_norm.scale,
    block.attention.sinks,
    block.attention.o_proj.bias,
    block.feed_forward.gate_proj.kernel,
    model.output_proj.kernel,
    model.source_embedding.embedding,
    *(block.attention.q_proj.kernel for block in model.encoder.blocks),
]
narrow = Linear(8, 16, param_dtype=jnp.float32, key=jax.random.key(0))
model = eqx.tree_at(lambda model: model.encoder.blocks[0].feed_forward.up_proj, model, narrow)

weights = to_weights(model)
save("model.safetensors", weights)
again: Transformer = from_weights(config, load("model.safetensors"))
produced: jax.Array = generate(again, tokens, max_length=4)
best = beam_search(again, tokens, max_length=4, beam_size=2)
print(score(again, tokens, best.tokens[:, 0]), compiled(lambda model, x: model(x, x), evaluation(again))(tokens))
trainer = Trainer(again, optax.adam(1e-3))
print(trainer.train(batch).loss, trainer.evaluate(batch).loss, trainer.model.encoder.norm.scale)

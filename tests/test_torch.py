"""The second oracle: PyTorch's own layers in float64 with copied weights, forward to 1e-10 and gradients to 1e-9."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from core.config import TransformerConfig
from core.losses import Batch
from tests import reference
from tests.conftest import ROOT
from tests.test_reference import FRONTENDS, S, T, random_weights, rebuilt

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

B, D, N, F = 2, 8, 2, 16
every_frontend = pytest.mark.parametrize("frontend", FRONTENDS.values(), ids=FRONTENDS)
every_block = pytest.mark.parametrize(
    ("norm_order", "activation"), [("post", "relu"), ("pre", "gelu"), ("post", "gelu"), ("pre", "relu")]
)


@pytest.fixture(autouse=True)
def float64(x64):
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small_config(norm_order="post", activation="relu"):
    return TransformerConfig(
        source_vocab_size=11, target_vocab_size=13, d_model=D, num_heads=N, d_ff=F, num_encoder_layers=1,
        num_decoder_layers=1, dropout_rate=0.0, activation=activation, norm_order=norm_order, norm_epsilon=1e-3,
        attention_bias=True, tie_embeddings="none", dtype="float64", param_dtype="float64",
    )  # fmt: skip


def as_torch(x):
    return torch.tensor(np.array(x))


def attention_state(w):
    """Ours by torch's names: kernels are transposed, q, k and v stacked."""
    packed = [np.concatenate([w[f"{name}_proj.{leaf}"].T for name in "qkv"]) for leaf in ("kernel", "bias")]
    return {
        "in_proj_weight": packed[0],
        "in_proj_bias": packed[1],
        "out_proj.weight": w["o_proj.kernel"].T,
        "out_proj.bias": w["o_proj.bias"],
    }


def block_state(w):
    """An encoder's or a decoder's block by torch's names."""
    sublayers = [name for name in ("attention", "cross_attention", "feed_forward") if f"{name}_norm.scale" in w]
    state = {}
    for i, name in enumerate(sublayers, 1):
        state |= {f"norm{i}.weight": w[f"{name}_norm.scale"], f"norm{i}.bias": w[f"{name}_norm.bias"]}
    for ours, theirs in {"attention": "self_attn", "cross_attention": "multihead_attn"}.items():
        if ours in sublayers:
            attention = attention_state(reference.below(w, ours))
            state |= {f"{theirs}.{name}": value for name, value in attention.items()}
    for ours, theirs in {"up_proj": "linear1", "down_proj": "linear2"}.items():
        state |= {
            f"{theirs}.weight": w[f"feed_forward.{ours}.kernel"].T,
            f"{theirs}.bias": w[f"feed_forward.{ours}.bias"],
        }
    return state


def with_weights(module, state):
    module.load_state_dict({name: as_torch(value) for name, value in state.items()})
    return module


def inputs(seed):
    """Targets `[B, T, D]`, a memory `[B, S, D]`, a cotangent, and ragged masks that leave no row without keys."""
    rng = np.random.default_rng(seed)
    x, memory, u = (rng.standard_normal((B, length, D)) for length in (T, S, T))
    ragged = [np.arange(n) < np.array([[n], [2]]) for n in (T, S)]
    return x, memory, u, *ragged


def assert_alike(ours, theirs, arrays, cotangent, weights, state_of, module):
    """f(weights, *arrays), its gradients by the arrays and by every weight, against torch's."""
    arrays = [jnp.asarray(x) for x in arrays]
    weights = jax.tree.map(jnp.asarray, weights)
    got, pullback = jax.vjp(ours, weights, *arrays)
    grads, *array_grads = pullback(jnp.asarray(cotangent))
    leaves = [as_torch(x).requires_grad_() for x in arrays]
    wanted = theirs(*leaves)
    wanted.backward(as_torch(cotangent))
    np.testing.assert_allclose(got, wanted.detach().numpy(), rtol=1e-10, atol=1e-10)
    for grad, leaf in zip(array_grads, leaves, strict=True):
        np.testing.assert_allclose(grad, leaf.grad.numpy(), rtol=1e-9, atol=1e-9)
    by_name, parameters = state_of(jax.tree.map(np.asarray, grads)), dict(module.named_parameters())
    assert by_name.keys() == parameters.keys()
    for name, grad in by_name.items():
        np.testing.assert_allclose(grad, parameters[name].grad.numpy(), rtol=1e-9, atol=1e-9, err_msg=name)


def inside(frontend, config, prefix, weights):
    """The module at a dotted path of a model with these weights below it, and random ones elsewhere."""
    everything = jax.tree.map(jnp.asarray, random_weights(config, 0)) | {
        f"{prefix}.{name}": value for name, value in weights.items()
    }
    module = rebuilt(frontend, "Transformer", config, everything)
    for part in prefix.split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


@every_frontend
@pytest.mark.parametrize("seed", [0, 1])
def test_multi_head_attention_equals_that_of_torch(frontend, seed):
    config, prefix = small_config(), "decoder.blocks.0.cross_attention"
    x, memory, u, _, real = inputs(seed)
    weights = reference.below(random_weights(config, seed), prefix)
    module = with_weights(torch.nn.MultiheadAttention(D, N, batch_first=True), attention_state(weights))
    padding = as_torch(~real)

    def ours(weights, x, memory):
        return inside(frontend, config, prefix, weights)(x, memory, mask=jnp.asarray(real)[:, None, None])

    def theirs(x, memory):
        return module(x, memory, memory, key_padding_mask=padding, need_weights=False)[0]

    assert_alike(ours, theirs, (x, memory), u, weights, attention_state, module)


@every_frontend
@every_block
def test_encoder_block_equals_that_of_torch(frontend, norm_order, activation):
    config, prefix = small_config(norm_order, activation), "encoder.blocks.0"
    x, _, u, real, _ = inputs(2)
    weights = reference.below(random_weights(config, 2), prefix)
    layer = functools.partial(torch.nn.TransformerEncoderLayer, dropout=0.0, layer_norm_eps=1e-3, batch_first=True)
    module = layer(D, N, F, activation=activation, norm_first=norm_order == "pre")
    module, padding = with_weights(module, block_state(weights)), as_torch(~real)

    def ours(weights, x):
        return inside(frontend, config, prefix, weights)(x, mask=jnp.asarray(real)[:, None, None])

    def theirs(x):
        return module(x, src_key_padding_mask=padding)

    assert_alike(ours, theirs, (x,), u, weights, block_state, module)


@every_frontend
@every_block
def test_decoder_block_equals_that_of_torch(frontend, norm_order, activation):
    config, prefix = small_config(norm_order, activation), "decoder.blocks.0"
    x, memory, u, target_real, real = inputs(3)
    weights = reference.below(random_weights(config, 3), prefix)
    layer = functools.partial(torch.nn.TransformerDecoderLayer, dropout=0.0, layer_norm_eps=1e-3, batch_first=True)
    module = layer(D, N, F, activation=activation, norm_first=norm_order == "pre")
    module = with_weights(module, block_state(weights))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    masks = {"tgt_key_padding_mask": as_torch(~target_real), "memory_key_padding_mask": as_torch(~real)}

    def ours(weights, x, memory):
        block = inside(frontend, config, prefix, weights)
        target_mask, memory_mask = (jnp.asarray(m)[:, None, None] for m in (target_real, real))
        return block(x, memory, mask=target_mask, memory_mask=memory_mask)

    def theirs(x, memory):
        return module(x, memory, tgt_mask=future, **masks)

    assert_alike(ours, theirs, (x, memory), u, weights, block_state, module)


@every_frontend
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_the_page_for_those_who_come_from_torch_takes_its_layers_over(frontend, kind):
    page = (ROOT / "docs/from_pytorch.md").read_text()
    names = {}
    exec(re.search(r"^```python\n(.*?)^```", page, re.S | re.M)[1], names)
    layer = getattr(torch.nn, f"Transformer{kind}Layer")(D, N, F, dropout=0.0, layer_norm_eps=1e-3, batch_first=True)
    weights = names["block_weights"]({name: value.numpy() for name, value in layer.state_dict().items()})
    block = inside(frontend, small_config(), f"{kind.lower()}.blocks.0", jax.tree.map(jnp.asarray, weights))
    x, memory, *_ = inputs(5)
    if kind == "Encoder":
        got, wanted = block(jnp.asarray(x)), layer(as_torch(x))
    else:
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        got = block(jnp.asarray(x), jnp.asarray(memory))
        wanted = layer(as_torch(x), as_torch(memory), tgt_mask=future)
    np.testing.assert_allclose(got, wanted.detach().numpy(), rtol=1e-10, atol=1e-10)


class TorchTransformer(torch.nn.Module):
    """The same small model in torch: tables, sinusoidal positions, one encoder and one decoder block, logits."""

    def __init__(self, w):
        super().__init__()
        how = {"dropout": 0.0, "layer_norm_eps": 1e-3, "batch_first": True}
        encoder = torch.nn.TransformerEncoderLayer(D, N, F, **how)
        decoder = torch.nn.TransformerDecoderLayer(D, N, F, **how)
        self.encoder = with_weights(encoder, block_state(reference.below(w, "encoder.blocks.0")))
        self.decoder = with_weights(decoder, block_state(reference.below(w, "decoder.blocks.0")))
        names = ("source_embedding.embedding", "target_embedding.embedding", "output_proj.kernel")
        self.source_table, self.target_table, self.output = (torch.nn.Parameter(as_torch(w[name])) for name in names)

    def forward(self, source, target, source_mask, target_mask):
        positions = as_torch(reference.sinusoidal(max(S, T), D))
        x = self.source_table[source] * D**0.5 + positions[:S]
        y = self.target_table[target] * D**0.5 + positions[:T]
        memory = self.encoder(x, src_key_padding_mask=~source_mask)
        y = self.decoder(
            y, memory, tgt_mask=torch.ones(T, T, dtype=torch.bool).triu(1), tgt_key_padding_mask=~target_mask,
            memory_key_padding_mask=~source_mask,
        )  # fmt: skip
        return y @ self.output


@every_frontend
def test_ten_steps_of_adamw_follow_the_trajectory_of_torch(frontend):
    config, rng = small_config(), np.random.default_rng(4)
    weights = random_weights(config, 4)
    _, _, _, target_mask, source_mask = inputs(4)
    source, inputs_, labels = (rng.integers(0, 11, (10, B, length)) for length in (S, T, T))
    theirs = TorchTransformer(weights)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    ours = jax.tree.map(jnp.asarray, weights)
    tx = optax.adamw(1e-2, b1=0.9, b2=0.99, eps=1e-6, weight_decay=0.1)
    step = jax.jit(frontend.functional_step(config, tx, label_smoothing=0.1))
    state = frontend.Trainer(frontend.from_weights(config, ours), tx).optimizer_state()
    for i in range(10):
        batch = Batch(*map(jnp.asarray, (source[i], source_mask, inputs_[i], labels[i], target_mask)))
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to its integer count
            ours, state, metrics = step(ours, state, batch, jax.random.key(0), jnp.uint32(i))
        optimizer.zero_grad()
        logits = theirs(*map(as_torch, (source[i], inputs_[i], source_mask, target_mask)))
        loss = torch.nn.functional.cross_entropy(
            logits[as_torch(target_mask)], as_torch(labels[i])[as_torch(target_mask)], label_smoothing=0.1
        )
        loss.backward()
        optimizer.step()
        np.testing.assert_allclose(metrics.loss, loss.item(), rtol=1e-8)
    for name, value in block_state(reference.below(jax.tree.map(np.asarray, ours), "decoder.blocks.0")).items():
        np.testing.assert_allclose(value, theirs.decoder.state_dict()[name].numpy(), rtol=1e-8, atol=1e-8, err_msg=name)
    np.testing.assert_allclose(ours["output_proj.kernel"], theirs.output.detach().numpy(), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(
        ours["source_embedding.embedding"], theirs.source_table.detach().numpy(), rtol=1e-8, atol=1e-8
    )

"""The weights of one of our models in CTranslate2 and in Hugging Face's Marian, and the tokens that they decode.

What all three can express is the model of 2017 with biases in its attention and one table for all tokens. Our table of
sinusoidal positions is given to both, for theirs holds the same columns in another order.
"""

import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from core.config import TransformerConfig
from core.decoding import BOS, EOS, PAD
from core.positions import sinusoidal_table

Weights = Mapping[str, np.ndarray]
Decode = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""Tokens [B, L] of the best hypothesis, from sources [B, S], their lengths [B] and the number of beams."""


def peers(config: TransformerConfig, weights: Weights, *, max_length: int, threads: int) -> dict[str, Decode]:
    """Those that are installed, by name."""
    build = {"CTranslate2": (_ctranslate2, "ctranslate2"), "Marian": (_marian, "transformers")}
    return {
        name: make(config, weights, max_length, threads)
        for name, (make, package) in build.items()
        if importlib.util.find_spec(package)
    }


def _ctranslate2(config: TransformerConfig, weights: Weights, max_length: int, threads: int) -> Decode:
    ctranslate2 = importlib.import_module("ctranslate2")
    spec = ctranslate2.specs.TransformerSpec.from_config(
        (config.num_encoder_layers, config.num_decoder_layers), config.num_heads, pre_norm=False
    )  # fmt: skip
    table = weights["target_embedding.embedding"]
    words = ["<blank>", "<s>", "</s>", *map(str, range(3, len(table)))]
    positions = np.asarray(sinusoidal_table(config.max_length, config.d_model))
    for stack, name in ((spec.encoder, "encoder"), (spec.decoder, "decoder")):
        embeddings = stack.embeddings[0] if name == "encoder" else stack.embeddings
        embeddings.weight, stack.scale_embeddings = table, True
        stack.position_encodings.encodings = positions
        for i, layer in enumerate(stack.layer):
            block = f"{name}.blocks.{i}."
            parts: list[tuple[Any, str, tuple[str, ...]]] = [(layer.self_attention, "attention", ("qkv", "o"))]
            if name == "decoder":
                parts.append((layer.attention, "cross_attention", ("q", "kv", "o")))
            for attention, ours, products in parts:
                for linear, letters in zip(attention.linear, products, strict=True):
                    _fill_linear(linear, [_linear(weights, f"{block}{ours}.{letter}_proj") for letter in letters])
                _fill_norm(attention.layer_norm, weights, f"{block}{ours}_norm")
            _fill_linear(layer.ffn.linear_0, [_linear(weights, f"{block}feed_forward.up_proj")])
            _fill_linear(layer.ffn.linear_1, [_linear(weights, f"{block}feed_forward.down_proj")])
            _fill_norm(layer.ffn.layer_norm, weights, f"{block}feed_forward_norm")
    spec.decoder.projection.weight = table
    spec.register_source_vocabulary(words)
    spec.register_target_vocabulary(words)
    spec.config.unk_token, spec.config.layer_norm_epsilon = words[PAD], config.norm_epsilon
    with tempfile.TemporaryDirectory() as folder:
        spec.validate()
        spec.optimize()
        spec.save(folder)
        translator = ctranslate2.Translator(folder, device="cpu", compute_type="float32", intra_threads=threads)
    ids = {word: i for i, word in enumerate(words)}

    def decode(source: np.ndarray, lengths: np.ndarray, beam_size: int) -> np.ndarray:
        rows = [[words[token] for token in row[:length]] for row, length in zip(source, lengths, strict=True)]
        found = translator.translate_batch(
            rows, beam_size=beam_size, length_penalty=0, max_decoding_length=max_length, max_batch_size=0,
        )  # fmt: skip
        return _padded([[ids[word] for word in one.hypotheses[0]] for one in found], max_length)

    return decode


def _marian(config: TransformerConfig, weights: Weights, max_length: int, threads: int) -> Decode:
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    torch.set_num_threads(threads)
    size, heads, width = config.vocab_size("target"), config.num_heads, config.d_ff
    described = transformers.MarianConfig(
        vocab_size=size, max_position_embeddings=config.max_length, d_model=config.d_model, activation_function="relu",
        encoder_layers=config.num_encoder_layers, decoder_layers=config.num_decoder_layers, scale_embedding=True,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=width, decoder_ffn_dim=width,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, decoder_start_token_id=BOS, forced_eos_token_id=None,
    )  # fmt: skip
    model = transformers.MarianMTModel(described).eval()
    model.load_state_dict(
        {name: torch.tensor(np.asarray(array)) for name, array in _marian_weights(config, weights).items()}
    )

    def decode(source: np.ndarray, lengths: np.ndarray, beam_size: int) -> np.ndarray:
        real = torch.from_numpy(np.arange(source.shape[1]) < lengths[:, None])
        with torch.inference_mode():
            found = model.generate(
                torch.from_numpy(source).long(), attention_mask=real.long(), num_beams=beam_size, do_sample=False,
                max_new_tokens=max_length, max_length=None, **({"length_penalty": 0.0} if beam_size > 1 else {}),
            )  # fmt: skip
        return _padded(found[:, 1:].tolist(), max_length)

    return decode


def _marian_weights(config: TransformerConfig, weights: Weights) -> dict[str, np.ndarray]:
    table = weights["target_embedding.embedding"]
    positions = np.asarray(sinusoidal_table(config.max_length, config.d_model))
    tables = ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")
    found = {f"{name}.weight": table for name in tables} | {"final_logits_bias": np.zeros((1, len(table)), "float32")}
    for name in ("encoder", "decoder"):
        found[f"model.{name}.embed_positions.weight"] = positions
    linears = {"feed_forward.up_proj": "fc1", "feed_forward.down_proj": "fc2"}
    linears |= {
        f"{ours}.{letter}_proj": f"{theirs}.{'out' if letter == 'o' else letter}_proj"
        for ours, theirs in (("cross_attention", "encoder_attn"), ("attention", "self_attn"))
        for letter in "qkvo"
    }
    norms = {
        "attention_norm": "self_attn_layer_norm",
        "cross_attention_norm": "encoder_attn_layer_norm",
        "feed_forward_norm": "final_layer_norm",
    }
    for key, array in weights.items():
        if ".blocks." not in key:
            continue
        stack, _, layer, *parts, kind = key.split(".")
        module = ".".join(parts)
        name = f"model.{stack}.layers.{layer}.{(linears | norms)[module]}"
        found[f"{name}.{'bias' if kind == 'bias' else 'weight'}"] = array.T if kind == "kernel" else array
    return found


def _linear(weights: Weights, name: str) -> tuple[np.ndarray, np.ndarray]:
    return weights[f"{name}.kernel"], weights[f"{name}.bias"]


def _fill_linear(spec: Any, parts: list[tuple[np.ndarray, np.ndarray]]) -> None:
    spec.weight = np.concatenate([kernel.T for kernel, _ in parts])
    spec.bias = np.concatenate([bias for _, bias in parts])


def _fill_norm(spec: Any, weights: Weights, name: str) -> None:
    spec.gamma, spec.beta = weights[f"{name}.scale"], weights[f"{name}.bias"]


def _padded(rows: list[list[int]], length: int) -> np.ndarray:
    return np.asarray([row + [PAD] * (length - len(row)) for row in rows], "int32")

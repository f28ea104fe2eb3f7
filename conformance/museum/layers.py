"""Bugs of norms, random keys, losses and files of weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from conformance import oracle
from conformance.adapters import Dropout, Loss, Norm, WeightsFile
from conformance.museum.exhibit import Exhibit


def fast_variance(x, scale, bias, *, epsilon):
    """E[x^2] - E[x]^2 in float32."""
    mean = x.mean(axis=-1, keepdims=True, dtype=np.float32)
    variance = np.square(x).mean(axis=-1, keepdims=True, dtype=np.float32) - np.square(mean)
    return ((x - mean) / np.sqrt(np.maximum(variance, 0) + np.float32(epsilon)) * scale + bias).astype(x.dtype)


def key_used_twice(x, *, rate, seed=None):
    if not 0 <= rate < 1:
        raise ValueError(f"the rate must be at least 0 and below 1, got {rate}")
    if seed is None or rate == 0:
        return x
    key = jax.random.key(seed)
    kept = jax.random.bernoulli(key, 1 - rate, x.shape) & (jax.random.uniform(key, x.shape) >= 0)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))


def token_losses(logits, labels, label_smoothing):
    each = np.ones(1)
    cells = [
        oracle.cross_entropy(logits[i][None], labels[i][None], each, label_smoothing) for i in np.ndindex(labels.shape)
    ]
    return np.reshape(cells, labels.shape)


def checked(labels, logits, weights):
    if ((labels < 0) | (labels >= logits.shape[-1]))[weights != 0].any():
        raise ValueError("labels must lie in [0, V)")


def mean_of_means(logits, labels, weights, *, label_smoothing=0.0):
    checked(labels, logits, weights)
    losses = np.where(weights == 0, 0, token_losses(logits, labels, label_smoothing)) * weights
    total = weights.sum(axis=-1)
    return (losses.sum(axis=-1) / np.where(total == 0, 1, total)).mean()


def smoothing_counts_ignored(logits, labels, weights, *, label_smoothing=0.0):
    """The share of smoothing is a mean over all positions."""
    checked(labels, logits, weights)
    counted = oracle.cross_entropy(logits, labels, weights)
    log_probabilities = logits - np.log(np.exp(np.asarray(logits, np.float64)).sum(axis=-1, keepdims=True))
    return (1 - label_smoothing) * counted + label_smoothing * -log_probabilities.mean()


def empty_is_nan(logits, labels, weights, *, label_smoothing=0.0):
    checked(labels, logits, weights)
    if weights.sum() == 0:
        return np.float64(np.nan)
    return oracle.cross_entropy(logits, labels, weights, label_smoothing)


def padding_in_the_mean(logits, labels, weights, *, label_smoothing=0.0):
    checked(labels, logits, weights)
    return oracle.cross_entropy(logits, labels, weights, label_smoothing) * weights.sum() / weights.size


# a small file format, right but for what the exhibits change: a header in JSON, then the bytes


def write(path, arrays, *, data=lambda x: x.tobytes(), names=lambda names: list(names)):
    tensors = {}
    for name, x in zip(names(arrays), arrays.values(), strict=True):
        tensors[name] = [x.dtype.name, list(x.shape), data(np.asarray(x))]
    header = {name: [dtype, shape, len(raw)] for name, (dtype, shape, raw) in tensors.items()}
    text = json.dumps(header).encode()
    body = b"".join(raw for _, _, raw in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def read(path):
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    arrays = {}
    for name, (dtype, shape, length) in json.loads(data[8:start]).items():
        arrays[name] = np.frombuffer(data[start : start + length], np.dtype(dtype)).reshape(shape)
        start += length
    if start != len(data):
        raise ValueError("bytes are left over")
    return arrays


def write_as_it_lies(path, arrays):
    write(path, arrays, data=lambda x: x.tobytes(order="A"))


def read_without_bfloat16(path):
    arrays = read(path)
    if any(x.dtype.name == "bfloat16" for x in arrays.values()):
        raise KeyError("BF16")
    return arrays


def write_by_position(path, arrays):
    write(path, arrays, names=sorted)


def write_safetensors(path, arrays):
    from safetensors.numpy import save_file

    save_file({name: np.array(x, order="C") for name, x in arrays.items()}, path)


def read_offsets_unchecked(path):
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    dtypes, arrays = {"F32": "float32", "I32": "int32", "BOOL": "bool"}, {}
    for name, tensor in json.loads(data[8:start]).items():
        dtype, shape = np.dtype(dtypes[tensor["dtype"]]), tensor["shape"]
        begin = start + tensor["data_offsets"][0]
        arrays[name] = np.frombuffer(data[begin : begin + dtype.itemsize * int(np.prod(shape))], dtype).reshape(shape)
    return arrays


CAN_FILE = {"bfloat16"}
EXHIBITS = (
    Exhibit(
        20,
        "a random key is used twice",
        "flax#2665, netket#241",
        Dropout("key used twice", key_used_twice, {"jax"}),
        ("a_key_is_used_once",),
    ),
    Exhibit(
        34,
        "the mean of means",
        "transformers#24725, torchtune#1875",
        Loss("mean of means", mean_of_means, {"smoothing"}),
        ("the_loss_is_the_mean_over_the_tokens_with_weight",),
    ),
    Exhibit(
        35,
        "label smoothing counts ignored tokens",
        "pytorch#73205",
        Loss("smoothing counts padding", smoothing_counts_ignored, {"smoothing"}),
        ("smoothing_moves_its_share_to_all_labels_of_counted_tokens",),
    ),
    Exhibit(
        35,
        "a batch of padding gives NaN",
        "cosmos-rl#155",
        Loss("NaN without tokens", empty_is_nan, {"smoothing"}),
        ("a_batch_without_tokens_has_loss_zero",),
    ),
    Exhibit(
        36,
        "padding enters the mean",
        "LightRAG#3675",
        Loss("padding in the mean", padding_in_the_mean, {"smoothing"}),
        ("the_loss_is_the_mean_over_the_tokens_with_weight",),
    ),
    Exhibit(
        37,
        "variance as E[x^2] - E[x]^2",
        "flax#1491, equinox#314",
        Norm("fast variance", fast_variance, {"centre", "bias"}),
        ("a_mean_of_a_thousand_costs_no_more_than_rounding",),
    ),
    Exhibit(
        42,
        "Fortran order is written as it lies",
        "safetensors#825",
        WeightsFile("as it lies", write_as_it_lies, CAN_FILE, load=read),
        ("an_array_comes_back_in_every_bit",),
    ),
    Exhibit(
        43,
        "bfloat16 cannot be read",
        "safetensors#598",
        WeightsFile("no bfloat16", write, CAN_FILE, load=read_without_bfloat16),
        ("bfloat16_comes_back_in_every_bit",),
    ),
    Exhibit(
        44,
        "offsets are not checked",
        "mlx#3363, safetensors#401",
        WeightsFile("offsets unchecked", write_safetensors, {"safetensors"}, load=read_offsets_unchecked),
        ("arrays_that_overlap_in_the_file_are_refused",),
    ),
    Exhibit(
        45,
        "leaves in the order of their names",
        "equinox#136, #498",
        WeightsFile("by position", write_by_position, CAN_FILE, load=read),
        ("arrays_are_found_by_name",),
    ),
)

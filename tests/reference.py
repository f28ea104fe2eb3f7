"""The Transformer in NumPy float64 and plain loops: the oracle that every implementation is judged by.

It shares no code with `core`. Each function is a formula of a paper, for one row, one head, one query and one
key at a time. Weights are a plain {dotted name: array}, as `to_weights` gives them; of a configuration only the
fields are read. Inside of a model x is one sequence `[T, D]`; the models loop over the rows of a batch.
"""

import math

import numpy as np


def attention_scores(q, k, *, mask=None, bias=None, causal=False, q_offset=0, window=None, scale=None):
    """scale * <q_t, k_s> + bias of each row, head, query and key, `[*B, N, T, S]`; -inf where t may not see s."""
    *batch, T, N, H = q.shape
    S, K = k.shape[-3:-1]
    scores = np.full((*batch, N, T, S), -np.inf)
    mask = np.broadcast_to(True if mask is None else mask, scores.shape)
    bias = np.broadcast_to(0.0 if bias is None else bias, scores.shape)
    offset = np.broadcast_to(q_offset, batch)
    left, right = (math.inf, math.inf) if window is None else window
    scale = 1 / math.sqrt(H) if scale is None else scale
    for *b, n, t, s in np.ndindex(scores.shape):
        ahead = s - (t + offset[*b])
        in_sight = -left <= ahead <= right and (ahead <= 0 or not causal)
        if in_sight and mask[*b, n, t, s] and bias[*b, n, t, s] > -np.inf:
            scores[*b, n, t, s] = scale * (q[*b, t, n] @ k[*b, s, n // (N // K)]) + bias[*b, n, t, s]
    return scores


def softmax(scores):
    """exp(s_j) / sum_i exp(s_i); 0 everywhere if all scores are -inf."""
    if scores.max(initial=-np.inf) == -np.inf:
        return np.zeros_like(scores)
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()


def attention(q, k, v, **how):
    """softmax(q k^T / sqrt(H)) v (2017, section 3.2.1), `[*B, T, N, Hv]`; head n reads key head n // (N // K)."""
    scores, group = attention_scores(q, k, **how), q.shape[-2] // k.shape[-2]
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    for *b, n, t in np.ndindex(scores.shape[:-1]):
        for s, weight in enumerate(softmax(scores[*b, n, t])):
            if scores[*b, n, t, s] > -np.inf:
                out[*b, t, n] += weight * v[*b, s, n // group]
    return out


def linear(w, x):
    """x W + b; b where there is one."""
    return x @ w["kernel"] + w.get("bias", 0.0)


def layer_norm(x, scale, bias, epsilon):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias of each vector (Ba et al. 2016)."""
    out = np.empty_like(x)
    for t in np.ndindex(x.shape[:-1]):
        mean = sum(x[t]) / len(x[t])
        variance = sum((x[t] - mean) ** 2) / len(x[t])
        out[t] = (x[t] - mean) / math.sqrt(variance + epsilon) * scale + bias
    return out


def rms_norm(x, scale, epsilon):
    """x / sqrt(mean(x^2) + epsilon) * scale of each vector (Zhang and Sennrich 2019)."""
    out = np.empty_like(x)
    for t in np.ndindex(x.shape[:-1]):
        out[t] = x[t] / math.sqrt(sum(x[t] ** 2) / len(x[t]) + epsilon) * scale
    return out


def relu(x):
    """max(0, x)."""
    return np.maximum(x, 0.0)


def gelu(x):
    """x Phi(x), Phi the normal distribution function (Hendrycks and Gimpel 2016)."""
    return x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))) / 2


def silu(x):
    """x sigmoid(x)."""
    return x / (1 + np.exp(-x))


def sinusoidal(length, width):
    """sin(p / 10000^(2i/D)) in column 2i, cos in 2i + 1 (2017, section 3.5); an odd table is cut from an even one."""
    table, even = np.empty((length, width)), width + width % 2
    for p, column in np.ndindex(table.shape):
        angle = p / 10_000 ** ((column - column % 2) / even)
        table[p, column] = math.cos(angle) if column % 2 else math.sin(angle)
    return table


def rotary(x, theta, start=0):
    """Turns the pair (x_i, x_(i + H/2)) of each head of `[T, N, H]` by p theta^(-2i/H) (Su et al. 2021)."""
    T, N, H = x.shape
    out = np.empty_like(x)
    for t, n, i in np.ndindex(T, N, H // 2):
        angle, a, b = (start + t) * theta ** (-2 * i / H), x[t, n, i], x[t, n, i + H // 2]
        out[t, n, i] = a * math.cos(angle) - b * math.sin(angle)
        out[t, n, i + H // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def multi_head_attention(w, config, x, memory=None, **how):
    """Concat(head_1, ..., head_N) W_o (2017, section 3.2.2); rotary positions in self-attention only."""
    heads, width = config.num_heads, config.d_model // config.num_heads
    kv_heads, seen = config.num_kv_heads or heads, x if memory is None else memory
    q = linear(below(w, "q_proj"), x).reshape(len(x), heads, width)
    k = linear(below(w, "k_proj"), seen).reshape(len(seen), kv_heads, width)
    v = linear(below(w, "v_proj"), seen).reshape(len(seen), kv_heads, width)
    if config.positions == "rotary" and memory is None:
        q, k = rotary(q, config.rotary_theta), rotary(k, config.rotary_theta)
    return linear(below(w, "o_proj"), attention(q, k, v, **how).reshape(len(x), -1))


def feed_forward(w, config, x):
    """max(0, x W_up) W_down (2017, section 3.3), gelu for max, or swiglu (Shazeer 2020)."""
    up = linear(below(w, "up_proj"), x)
    if config.activation == "swiglu":
        return linear(below(w, "down_proj"), silu(linear(below(w, "gate_proj"), x)) * up)
    return linear(below(w, "down_proj"), {"relu": relu, "gelu": gelu}[config.activation](up))


def norm(w, config, x):
    """The configuration's norm."""
    if config.norm == "rms_norm":
        return rms_norm(x, w["scale"], config.norm_epsilon)
    return layer_norm(x, w["scale"], w["bias"], config.norm_epsilon)


def residual(w, config, x, name, sublayer):
    """norm(x + f(x)) (2017, section 3.1), or x + f(norm(x)) (Xiong et al. 2020)."""
    w_norm, w = below(w, f"{name}_norm"), below(w, name)
    if config.norm_order == "pre":
        return x + sublayer(w, config, norm(w_norm, config, x))
    return norm(w_norm, config, x + sublayer(w, config, x))


def stack(w, config, layers, x, mask, causal, memory=None, memory_mask=None):
    """An encoder or a decoder: positions, then blocks; with pre-norm one more norm at the end."""
    if config.positions == "sinusoidal":
        x = x + sinusoidal(len(x), config.d_model)
    if config.positions == "learned":
        x = x + w["position_embedding.embedding"][: len(x)]
    for i in range(layers):
        block = below(w, f"blocks.{i}")
        x = residual(block, config, x, "attention", lambda *a: multi_head_attention(*a, mask=mask, causal=causal))
        if memory is not None:
            x = residual(
                block, config, x, "cross_attention", lambda *a: multi_head_attention(*a, memory, mask=memory_mask)
            )
        x = residual(block, config, x, "feed_forward", feed_forward)
    return norm(below(w, "norm"), config, x) if config.norm_order == "pre" else x


def transformer(w, config, source, target, source_mask=None, target_mask=None):
    """Logits `[*B, T, V]` of the encoder-decoder; masks `[*B, S]` and `[*B, T]` are True at real tokens."""
    target_table, root = w["target_embedding.embedding"], math.sqrt(config.d_model)
    source_table = target_table if config.tie_embeddings == "all" else w["source_embedding.embedding"]
    output = w["output_proj.kernel"] if config.tie_embeddings == "none" else target_table.T
    logits = np.empty((*target.shape, config.target_vocab_size))
    for b in np.ndindex(target.shape[:-1]):
        real, target_real = row(source_mask, b), row(target_mask, b)
        x, y = source_table[source[b]] * root, target_table[target[b]] * root
        memory = stack(below(w, "encoder"), config, config.num_encoder_layers, x, real, False)
        y = stack(below(w, "decoder"), config, config.num_decoder_layers, y, target_real, True, memory, real)
        logits[b] = y @ output
    return logits


def encoder_only(w, config, tokens, mask=None):
    """Logits `[*B, S, V]`; every token sees every real one."""
    return _one_stack(w, config, tokens, mask, "encoder", config.num_encoder_layers, causal=False)


def decoder_only(w, config, tokens, mask=None):
    """Logits `[*B, T, V]`; every token sees the real ones up to itself."""
    return _one_stack(w, config, tokens, mask, "decoder", config.num_decoder_layers, causal=True)


def _one_stack(w, config, tokens, mask, name, layers, *, causal):
    table = w["embedding.embedding"]
    output = w["output_proj.kernel"] if config.tie_embeddings == "none" else table.T
    logits = np.empty((*tokens.shape, len(table)))
    for b in np.ndindex(tokens.shape[:-1]):
        x = table[tokens[b]] * math.sqrt(config.d_model)
        logits[b] = stack(below(w, name), config, layers, x, row(mask, b), causal) @ output
    return logits


def cross_entropy(logits, labels, weights, label_smoothing=0.0):
    """-sum_v target_v log softmax(logits)_v, averaged with the tokens' weights; 0 if they are all 0."""
    total = 0.0
    for b in np.ndindex(labels.shape):
        highest = logits[b].max()
        log_softmax = logits[b] - highest - math.log(sum(np.exp(logits[b] - highest)))
        target = np.full(logits.shape[-1], label_smoothing / logits.shape[-1])
        target[labels[b]] += 1 - label_smoothing
        total -= weights[b] * (target @ log_softmax)
    return total / weights.sum() if weights.any() else 0.0


def greedy(logits_of, prompt, *, max_length, eos_id, pad_id):
    """The likeliest next token of one row, each time from the whole text anew; behind `eos_id` padding."""
    written = []
    while len(written) < max_length:
        likeliest = int(np.argmax(logits_of(np.array([*prompt, *written]))[-1]))
        written.append(pad_id if eos_id in written else likeliest)
    return written


def below(w, name):
    """The weights below a name, without it."""
    return {path.removeprefix(f"{name}."): array for path, array in w.items() if path.startswith(f"{name}.")}


def row(mask, b):
    """Row b of a mask, None for no mask."""
    return None if mask is None else mask[b]

"""The Transformer in NumPy float64 and plain loops: the oracle that every implementation is judged by.

It shares no code with `core`. Each function is a formula of a paper, for one row, one head, one query and one
key at a time. Weights are a plain {dotted name: array}, as `to_weights` gives them; of a configuration only the
fields are read. Inside of a model x is one sequence `[T, D]`; the models loop over the rows of a batch.
"""

import math
from fractions import Fraction

import numpy as np


def attention_scores(
    q, k, *, mask=None, bias=None, causal=False, prefix=0, q_offset=0, window=None, scale=None, soft_cap=None
):
    """scale * <q_t, k_s>, capped, + bias of each row, head, query and key; -inf where t may not see s.

    Query t stands at q_offset + t, key s at s; the first `prefix` keys are no query's future.
    """
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
        in_sight = -left <= ahead <= right and (ahead <= 0 or s < prefix or not causal)
        if in_sight and mask[*b, n, t, s] and bias[*b, n, t, s] > -np.inf:
            score = scale * (q[*b, t, n] @ k[*b, s, n // (N // K)])
            score = score if soft_cap is None else soft_cap * math.tanh(score / soft_cap)
            scores[*b, n, t, s] = score + bias[*b, n, t, s]
    return scores


def softmax(scores, sink=-np.inf):
    """exp(s_j) / (exp(sink) + sum_i exp(s_i)); 0 everywhere if all of them are -inf."""
    highest = max(scores.max(initial=-np.inf), sink)
    if highest == -np.inf:
        return np.zeros_like(scores)
    exponentials = np.exp(scores - highest)
    return exponentials / (np.exp(sink - highest) + exponentials.sum())


def attention(q, k, v, *, sinks=None, values=None, **how):
    """softmax(q k^T / sqrt(H)) v (2017, section 3.2.1), `[*B, T, N, Hv]`; head n reads key head n // (N // K).

    `sinks` is a logit for each head that has no value, `values [T, S, Hv]` what is added to v for each pair.
    """
    scores, group = attention_scores(q, k, **how), q.shape[-2] // k.shape[-2]
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    for *b, n, t in np.ndindex(scores.shape[:-1]):
        for s, weight in enumerate(softmax(scores[*b, n, t], -np.inf if sinks is None else sinks[n])):
            if scores[*b, n, t, s] > -np.inf:
                out[*b, t, n] += weight * (v[*b, s, n // group] + (0.0 if values is None else values[t, s]))
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


def gelu_tanh(x):
    """The approximation of the same paper."""
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def silu(x):
    """x sigmoid(x)."""
    return x * sigmoid(x)


PLAIN = {"relu": relu, "gelu": gelu, "gelu_tanh": gelu_tanh, "silu": silu}
GATES = {"glu": sigmoid, "geglu": gelu, "swiglu": silu, "reglu": relu}


def sinusoid(p, width):
    """sin(p / 10000^(2i/D)) in column 2i, cos in 2i + 1 (2017, section 3.5); an odd row is cut from an even one."""
    even = width + width % 2
    angles = [p / 10_000 ** ((column - column % 2) / even) for column in range(width)]
    return np.array([math.cos(a) if column % 2 else math.sin(a) for column, a in enumerate(angles)])


def sinusoidal(length, width):
    """The sinusoids of positions 0, 1, ...; `[length, width]`."""
    return np.array([sinusoid(p, width) for p in range(length)]).reshape(length, width)


def rotary_frequencies(config):
    """theta^(-2i/W) in radians a position (Su et al. 2021), and as texts longer than the original stretch it."""
    width, theta = config.rotary_dim or config.d_model // config.num_heads, config.rotary_theta
    factor, length = config.rotary_factor, config.rotary_original_length
    if config.rotary_scaling == "ntk" and width > 2:
        theta = theta * factor ** (width / (width - 2))
    frequencies = [theta ** (-2 * i / width) for i in range(width // 2)]
    if config.rotary_scaling == "linear":
        return [f / factor for f in frequencies]
    if config.rotary_scaling == "yarn":  # the pairs that turn 32 times and once in the original length
        low, high = (width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1))
        low, high = max(math.floor(low), 0), min(math.ceil(high), width - 1)
        stretched = [min(max((i - low) / (max(high - low, 1e-3)), 0), 1) for i in range(width // 2)]
        return [(1 - part) * f + part * f / factor for f, part in zip(frequencies, stretched, strict=True)]
    if config.rotary_scaling == "llama3":
        return [_llama3(f, factor, length) for f in frequencies]
    return frequencies


def _llama3(frequency, factor, length):
    wavelength = 2 * math.pi / frequency
    if wavelength < length / 4:
        return frequency
    if wavelength > length / 1:
        return frequency / factor
    smooth = (length / wavelength - 1) / (4 - 1)
    return (1 - smooth) * frequency / factor + smooth * frequency


def rotary(x, config, start=0):
    """Turns pairs of features of each head of `[T, N, H]` by position times frequency; YaRN makes them longer too."""
    frequencies, out = rotary_frequencies(config), x.copy()
    half = len(frequencies)
    size = 0.1 * math.log(config.rotary_factor) + 1 if config.rotary_scaling == "yarn" else 1.0
    for t, n, i in np.ndindex(*x.shape[:2], half):
        j, k = (i, i + half) if config.rotary_layout == "half" else (2 * i, 2 * i + 1)
        angle, a, b = (start + t) * frequencies[i], x[t, n, j], x[t, n, k]
        out[t, n, j] = size * (a * math.cos(angle) - b * math.sin(angle))
        out[t, n, k] = size * (b * math.cos(angle) + a * math.sin(angle))
    return out


def alibi_slopes(heads):
    """2^(-8/N), its square, its cube, ...; N no power of two: those of the next lower one, then every other of 2 N."""
    if math.log2(heads).is_integer():
        return [2 ** (-8 * (n + 1) / heads) for n in range(heads)]
    lower = 2 ** math.floor(math.log2(heads))
    return alibi_slopes(lower) + alibi_slopes(2 * lower)[::2][: heads - lower]


def t5_bucket(ahead, buckets, distance, bidirectional):
    """Which of the buckets a key belongs to that lies so far ahead (Raffel et al. 2020)."""
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if ahead > 0 else 0
    away, exact = abs(ahead) if bidirectional else max(-ahead, 0), buckets // 2
    if away < exact:
        return first + away
    # the largest step <= log(away / exact) / log(distance / exact) * (buckets - exact), in whole numbers
    step, growing = 0, buckets - exact
    while Fraction(away, exact) ** growing >= Fraction(distance, exact) ** (step + 1) and step < growing - 1:
        step += 1
    return first + exact + step


def shaw_row(ahead, limit):
    """From a key `limit` behind the query, or more, to one `limit` ahead, or more."""
    return min(max(ahead, -limit), limit) + limit


def position_scores(w, config, q, k, start, bidirectional, scale):
    """What positions add to each score, `[N, T, S]`: of queries `[T, N, H]` at start + t and keys `[S, K, H]` at s."""
    (T, N, _), (S, K, _) = q.shape, k.shape
    scores, limit = np.zeros((N, T, S)), config.relative_distance
    for n, t, s in np.ndindex(scores.shape):
        ahead, key = s - (start + t), k[s, n // (N // K)]
        match config.positions:
            case "alibi":  # Press et al. 2022
                scores[n, t, s] = -alibi_slopes(N)[n] * abs(ahead)
            case "t5":
                bucket = t5_bucket(ahead, config.relative_buckets, limit, bidirectional)
                scores[n, t, s] = w["relative.embedding"][bucket, n]
            case "shaw":  # Shaw et al. 2018, formula 4
                scores[n, t, s] = scale * (q[t, n] @ w["relative.key_embedding"][shaw_row(ahead, limit)])
            case "transformer_xl":  # Dai et al. 2019, terms b, c and d of A^rel
                row = (sinusoid(-ahead, config.d_model) @ w["relative.kernel"]).reshape(N, -1)[n]
                u, v = w["relative.content_bias"][n], w["relative.position_bias"][n]
                scores[n, t, s] = scale * (q[t, n] @ row + u @ key + v @ row)
    return scores


def position_values(w, config, queries, keys, start):
    """What positions add to the values, `[T, S, H]`; None: nothing (Shaw et al. 2018, formula 3)."""
    if config.positions != "shaw":
        return None
    table, limit, values = w["relative.value_embedding"], config.relative_distance, []
    for t in range(queries):
        values.append([table[shaw_row(s - (start + t), limit)] for s in range(keys)])
    return np.array(values)


def multi_head_attention(w, config, x, memory=None, history=None, **how):
    """Concat(head_1, ..., head_N) W_o (2017, section 3.2.2); positions and the window in self-attention only."""
    heads, width = config.num_heads, config.d_model // config.num_heads
    seen = memory if memory is not None else x if history is None else np.concatenate([history, x])
    kv_heads, start = config.num_kv_heads or heads, len(seen) - len(x)
    scale = 1 / math.sqrt(width) if config.attention_scale is None else config.attention_scale
    q = linear(below(w, "q_proj"), x).reshape(len(x), heads, width)
    k = linear(below(w, "k_proj"), seen).reshape(len(seen), kv_heads, width)
    v = linear(below(w, "v_proj"), seen).reshape(len(seen), kv_heads, config.value_dim or width)
    if config.qk_norm:
        q, k = norm(below(w, "q_norm"), config, q), norm(below(w, "k_norm"), config, k)
    if memory is None:
        if config.positions == "rotary":
            q, k = rotary(q, config, start), rotary(k, config)
        how |= {
            "bias": position_scores(w, config, q, k, start, not how["causal"], scale),
            "values": position_values(w, config, len(x), len(seen), start),
            "window": config.attention_window,
            "q_offset": start,
        }
    out = attention(q, k, v, scale=scale, soft_cap=config.attention_soft_cap, sinks=w.get("sinks"), **how)
    return linear(below(w, "o_proj"), out.reshape(len(x), heads * v.shape[-1]))


def feed_forward(w, config, x):
    """f(x W_up) W_down (2017, section 3.3); gated (f(x W_gate) * x W_up) W_down (Shazeer 2020)."""
    up, name = linear(below(w, "up_proj"), x), config.activation
    inner = GATES[name](linear(below(w, "gate_proj"), x)) * up if name in GATES else PLAIN[name](up)
    return linear(below(w, "down_proj"), inner)


def norm(w, config, x):
    """The configuration's norm."""
    if config.norm == "rms_norm":
        return rms_norm(x, w["scale"], config.norm_epsilon)
    return layer_norm(x, w["scale"], w["bias"], config.norm_epsilon)


def residual(w, config, x, stem, name, sublayer):
    """norm(x + f(x)) (2017, section 3.1), x + f(norm(x)) (Xiong et al. 2020), x + norm(f(norm(x))) (Ding et al. 2021).

    In a parallel block f reads the block's input, the stem (Wang and Komatsuzaki 2021).
    """
    w_norm, w_out = below(w, f"{name}_norm"), below(w, f"{name}_out_norm")
    if config.norm_order == "post":
        return norm(w_norm, config, x + sublayer(below(w, name), config, x))
    y = sublayer(below(w, name), config, norm(w_norm, config, stem if config.parallel_residual else x))
    return x + (norm(w_out, config, y) if config.norm_order == "sandwich" else y)


def stack(w, config, layers, x, mask, causal, memory=None, memory_mask=None, prefix=0, history=None):
    """An encoder or a decoder, and what it keeps: positions, then blocks; unless post-norm one more norm at the end.

    `history` is each block's input in earlier segments, which its attention sees before x (Dai et al. 2019, 3.2).
    """
    if config.positions == "sinusoidal":
        x = x + sinusoidal(len(x), config.d_model)
    if config.positions == "learned":
        x = x + w["position_embedding.embedding"][: len(x)]
    kept, shared = [], {"relative.embedding": w.get("relative.embedding")}
    for i in range(layers):
        block, stem, past = below(w, f"blocks.{i}"), x, None if history is None else history[i]
        kept.append((x if past is None else np.concatenate([past, x]))[-config.history_length or len(x) :])
        if past is not None and config.norm_order != "post":
            past = norm(below(block, "attention_norm"), config, past)
        attend = lambda w, c, y, past=past: multi_head_attention(
            shared | w, c, y, history=past, mask=mask, causal=causal, prefix=prefix
        )
        x = residual(block, config, x, stem, "attention", attend)
        if memory is not None:
            attend = lambda w, c, y: multi_head_attention(w, c, y, memory, mask=memory_mask)
            x = residual(block, config, x, stem, "cross_attention", attend)
        x = residual(block, config, x, stem, "feed_forward", feed_forward)
    return (x if config.norm_order == "post" else norm(below(w, "norm"), config, x)), kept


def transformer(
    w, config, source, target, source_mask=None, target_mask=None, source_segments=None, target_segments=None
):
    """Logits `[*B, T, V]` of the encoder-decoder; masks `[*B, S]` and `[*B, T]` are True at real tokens.

    Tokens of one segment id, in the source and in the target, are a pair of texts that stands alone.
    """
    target_table, scale = w["target_embedding.embedding"], embedding_scale(config)
    source_table = target_table if config.tie_embeddings == "all" else w["source_embedding.embedding"]
    output = w["output_proj.kernel"] if config.tie_embeddings == "none" else target_table.T
    logits = np.empty((*target.shape, config.target_vocab_size))
    for b in np.ndindex(target.shape[:-1]):
        for s, t in texts(row(source_segments, b), row(target_segments, b)):
            real, target_real = row(source_mask, (*b, s)), row(target_mask, (*b, t))
            x, y = source_table[source[b][s]] * scale, target_table[target[b][t]] * scale
            memory, _ = stack(below(w, "encoder"), config, config.num_encoder_layers, x, real, False)
            y, _ = stack(below(w, "decoder"), config, config.num_decoder_layers, y, target_real, True, memory, real)
            logits[(*b, t)] = y @ output
    return logits


def encoder_only(w, config, tokens, mask=None, segments=None):
    """Logits `[*B, S, V]`; every token sees every real one of its segment."""
    return _one_stack(w, config, tokens, mask, segments, "encoder", config.num_encoder_layers)


def decoder_only(w, config, tokens, mask=None, segments=None, prefix=None):
    """Logits `[*B, T, V]`; every token sees the real ones of its segment up to itself, and the first `prefix`."""
    return _one_stack(w, config, tokens, mask, segments, "decoder", config.num_decoder_layers, prefix)


def classifier(w, config, source, mask=None):
    """Logits `[*B, C]` of vectors `[*B, S, P]`: of the mean of the encoder's outputs at real ones; 0 if none is."""
    logits = np.zeros((*source.shape[:-2], config.target_vocab_size))
    for b in np.ndindex(source.shape[:-2]):
        real, x = row(mask, b), linear(below(w, "source_proj"), source[b])
        x, _ = stack(below(w, "encoder"), config, config.num_encoder_layers, x, real, False)
        read = [vector for s, vector in enumerate(x) if real is None or real[s]]
        if read:
            logits[b] = (sum(read) / len(read)) @ w["output_proj.kernel"]
    return logits


def _one_stack(w, config, tokens, mask, segments, name, layers, prefix=None):
    table = w["embedding.embedding"]
    output = w["output_proj.kernel"] if config.tie_embeddings == "none" else table.T
    logits = np.empty((*tokens.shape, len(table)))
    for b in np.ndindex(tokens.shape[:-1]):
        known = 0 if prefix is None else np.broadcast_to(prefix, tokens.shape[:-1])[b]
        for (s,) in texts(row(segments, b)):
            x, real = table[tokens[b][s]] * embedding_scale(config), row(mask, (*b, s))
            x, _ = stack(below(w, name), config, layers, x, real, name == "decoder", prefix=known)
            logits[(*b, s)] = x @ output
    return logits


def transformer_xl(w, config, segments, history=None):
    """Logits of segments `[*B, T]` that follow each other, each of which remembers `history_length` vectors a block.

    `history` is what the first remembers, `[*B, M, D]` for each block; and what the last leaves comes beside them.
    """
    table, batch = w["embedding.embedding"], segments[0].shape[:-1]
    output = w["output_proj.kernel"] if config.tie_embeddings == "none" else table.T
    logits = [np.empty((*tokens.shape, len(table))) for tokens in segments]
    left = []
    for b in np.ndindex(batch):
        past = None if history is None else [block[b] for block in history]
        for tokens, out in zip(segments, logits, strict=True):
            x = table[tokens[b]] * embedding_scale(config)
            x, past = stack(below(w, "decoder"), config, config.num_decoder_layers, x, None, True, history=past)
            out[b] = x @ output
        left.append(past)
    return logits, [np.reshape(block, (*batch, *block[0].shape)) for block in zip(*left, strict=True)]


def embedding_scale(config):
    """sqrt(D) (2017, section 3.4), or 1."""
    return math.sqrt(config.d_model) if config.scale_embeddings else 1.0


def texts(*ids):
    """Where each text of a row stands, on each side: everywhere if there are no segment ids."""
    if ids[0] is None:
        return [(slice(None),) * len(ids)]
    return [tuple(np.flatnonzero(side == name) for side in ids) for name in sorted(set(np.concatenate(ids).tolist()))]


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

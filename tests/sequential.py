"""A naive drafter: one anchor at a time, one token at a time, a list for a cache. What the parallel code must equal.

Written from the formulas of the design alone. It takes weights, frozen tables and sizes from a drafter, and calls none of its
code, nor that of ``kvshot_lib.drafters.attention`` and ``kvshot_lib.training.ttt``.
"""

import itertools
import math

import torch


def draft(drafter, features, document: int, anchor: int, ttt_steps: int) -> list[torch.Tensor]:
    """Logits over the draft vocabulary of q_{t,0} … q_{t,K-1} at one anchor t, as far as the document has tokens."""
    weights = dict(drafter.named_parameters())
    chain = {"hidden": _hidden_chain, "hybrid": _hidden_chain, "kv": _kv_chain}[drafter.config.paradigm]
    steps = min(ttt_steps, features.tokens.shape[1] - 1 - anchor)
    outputs = chain(drafter, weights, features, document, anchor, steps)
    return [drafter.head @ rms_norm(output, weights["norm.weight"], drafter.sizes.rms_norm_eps) for output in outputs]


def is_scored(answer_mask, document: int, anchor: int, step: int) -> bool:
    """Whether the pair (t, k) counts: x_{t+1} … x_{t+2+k} are all there and all answer tokens."""
    after = answer_mask[document, anchor + 1 : anchor + 3 + step].tolist()
    return len(after) == step + 2 and all(after)


def scored_pairs(answer_mask, steps: int) -> list[tuple[int, int, int]]:
    """Every (document, t, k) that counts, in order."""
    places = itertools.product(range(answer_mask.shape[0]), range(answer_mask.shape[1]), range(steps))
    return [place for place in places if is_scored(answer_mask, *place)]


def ttt_loss(drafter, features, target_head, ttt_steps: int, step_decay: float) -> torch.Tensor:
    """Σ_k λ^k · mean of the soft cross-entropy over valid pairs whose target argmax the drafter can draft."""
    places = {token: place for place, token in enumerate(drafter.draft_ids.tolist())}
    terms = [[] for _ in range(ttt_steps)]
    for document in range(len(features.tokens)):
        for anchor in range(features.tokens.shape[1] - 2):
            if not is_scored(features.answer_mask, document, anchor, 0):
                continue
            for step, logits in enumerate(draft(drafter, features, document, anchor, ttt_steps)):
                if not is_scored(features.answer_mask, document, anchor, step):
                    continue
                judge = features.final_hidden[document, anchor + 1 + step]
                if int((target_head @ judge).argmax()) in places:
                    p = torch.softmax(drafter.head @ judge, -1)
                    terms[step].append(-(p * torch.log_softmax(logits, -1)).sum())
    return sum(step_decay**k * sum(found) / len(found) for k, found in enumerate(terms) if found)


def rms_norm(x, weight, eps):
    """[…, d] -> […, d]"""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def mlp(weights, layer: str, x):
    """SwiGLU: W_down (silu(W_gate x) * W_up x)"""
    gate = weights[f"{layer}.mlp.gate_proj.weight"] @ x
    return weights[f"{layer}.mlp.down_proj.weight"] @ (
        gate * torch.sigmoid(gate) * (weights[f"{layer}.mlp.up_proj.weight"] @ x)
    )


def rotate(heads, position: int, base: float):
    """RoPE: turn the pair (i, i + D/2) of every head [heads, D] by position · base^(-2i/D)."""
    half = heads.shape[-1] // 2
    angles = position * base ** (torch.arange(half) * -2 / heads.shape[-1])
    first, second = heads[:, :half], heads[:, half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def attend(query, entries):
    """One query [H, D] over a list of (key [G, D], value [G, D]); query head h reads KV head h // (H/G)."""
    repeats = len(query) // len(entries[0][0])
    keys, values = (torch.stack(part).repeat_interleave(repeats, 1) for part in zip(*entries, strict=True))
    shares = torch.softmax(torch.einsum("hd,ehd->he", query, keys) / math.sqrt(query.shape[1]), -1)
    return torch.einsum("he,ehd->hd", shares, values).flatten()


def heads_of(drafter, weights, name: str, x):
    """A projection of x, cut into heads: [heads, D]"""
    return (weights[f"{name}.weight"] @ x).view(-1, drafter.sizes.head_dim)


def own_entry(drafter, weights, attention: str, x, position: int):
    """Key and value of one draft token (or one prefix column)."""
    base = drafter.sizes.rope_parameters["rope_theta"]
    key = head_norm(drafter, weights, f"{attention}.k_norm", heads_of(drafter, weights, f"{attention}.k_proj", x))
    return rotate(key, position, base), heads_of(drafter, weights, f"{attention}.v_proj", x)


def own_query(drafter, weights, attention: str, x, position: int):
    base = drafter.sizes.rope_parameters["rope_theta"]
    query = head_norm(drafter, weights, f"{attention}.q_norm", heads_of(drafter, weights, f"{attention}.q_proj", x))
    return rotate(query, position, base)


def head_norm(drafter, weights, name: str, heads):
    """Each head by itself, if the drafter norms its queries and keys."""
    return rms_norm(heads, weights[f"{name}.weight"], drafter.sizes.rms_norm_eps) if drafter.config.qk_norm else heads


def fused_entry(drafter, weights, layer: str, features, document: int, position: int):
    """Keys and values of one position for one drafter layer, made from target state as the config says."""
    config, size, name = drafter.config, drafter.sizes.head_dim, f"{layer}.fusion"
    base = drafter.sizes.rope_parameters["rope_theta"]
    if config.kv_control == "from_hidden":
        return entry_from_hidden(drafter, weights, name, ("keys", "values"), features, document, position)
    keys, values = features.keys[document, position], features.values[document, position]  # [S, G, D]
    if config.kv_control == "zero":
        keys, values = 0 * keys, 0 * values
    if config.kv_rope == "unrotate":
        keys = torch.stack([rotate(layer_keys, -position, base) for layer_keys in keys])
    if config.kv_norm:
        eps = drafter.sizes.rms_norm_eps
        keys = torch.stack([rms_norm(layer.reshape(-1), weights[f"{name}.keys_norm.weight"], eps) for layer in keys])
        values = torch.stack(
            [rms_norm(layer.reshape(-1), weights[f"{name}.values_norm.weight"], eps) for layer in values]
        )
    key, value = (
        fuse(weights, f"{name}.{part}", config.kv_fusion, x).view(-1, size)
        for part, x in (("keys", keys.reshape(-1)), ("values", values.reshape(-1)))
    )
    if config.kv_rope == "unrotate":
        key = rotate(head_norm(drafter, weights, f"{layer}.attention.k_norm", key), position, base)
    if config.kv_with_hidden:
        parts = ("hidden_keys", "hidden_values")
        added = entry_from_hidden(drafter, weights, name, parts, features, document, position)
        key, value = key + added[0], value + added[1]
    return key, value


def entry_from_hidden(drafter, weights, name: str, parts, features, document: int, position: int):
    """Key and value of one position, made from its hidden states."""
    size, base = drafter.sizes.head_dim, drafter.sizes.rope_parameters["rope_theta"]
    state = features.hidden_states[document, position]  # [S, d], each layer normed by itself
    state = rms_norm(state, weights[f"{name}.norm.weight"], drafter.sizes.rms_norm_eps).reshape(-1)
    key, value = ((weights[f"{name}.{part}.weight"] @ state).view(-1, size) for part in parts)
    key = head_norm(drafter, weights, f"{name.removesuffix('.fusion')}.attention.k_norm", key)
    return rotate(key, position, base), value


def fuse(weights, name: str, kind: str, x):
    """The reused layers end to end: as they are, through one map, or through two with SiLU between."""
    if kind == "heads":
        return x
    if kind == "linear":
        return weights[f"{name}.weight"] @ x
    middle = weights[f"{name}.0.weight"] @ x
    return weights[f"{name}.2.weight"] @ (middle * torch.sigmoid(middle))


def seen_positions(config, anchor: int) -> int:
    """How many target positions anchor t may read: all s ≤ t, or older ones (but one at least)."""
    return max(1, anchor + 1 - config.kv_lag_tokens) if config.kv_control == "lagged" else anchor + 1


def seen_entries(config, cache: list, later: int) -> list:
    """The newest of a layer's entries, so many as the window holds and those of ``later`` draft tokens; all without."""
    return cache[-(config.window_tokens + later) :] if config.window_tokens else cache


def _kv_chain(drafter, weights, features, document, anchor, steps):
    """Per layer the target's projected KV at s ≤ t, then the layer's own entries; each draft token passes all layers.

    Without target state the tokens of the prefix pass them too: a causal language model.
    """
    layers = [f"layers.{i}" for i in range(drafter.config.num_layers)]
    seen, alone = range(seen_positions(drafter.config, anchor)), drafter.config.kv_control == "none"
    caches = {
        layer: [] if alone else [fused_entry(drafter, weights, layer, features, document, s) for s in seen]
        for layer in layers
    }
    for position in range(0 if alone else anchor + 1, anchor + 1 + steps):
        x = drafter.embedding[features.tokens[document, position]]
        for layer in layers:
            asked = asked_at(drafter, features, document, position, anchor)
            x = plain_layer(drafter, weights, layer, x, position, caches[layer], max(0, position - anchor), asked)
        if position > anchor:
            yield x


def asked_at(drafter, features, document: int, position: int, anchor: int):
    """What the query is made from, if not from the drafter's own input."""
    eps = torch.finfo(features.hidden_states.dtype).eps if features.hidden_states is not None else 0
    if drafter.config.query_from == "anchor":
        token, states = drafter.embedding[features.tokens[document, position]], features.hidden_states[document, anchor]
        return torch.cat([rms_norm(part, 1.0, eps) for part in (token, *states)])
    if drafter.config.query_from == "target":
        states = features.hidden_states[document, position]
        return rms_norm(states, 1.0, eps).reshape(-1)
    return torch.ones(1) if drafter.config.query_from == "constant" else None


def plain_layer(drafter, weights, layer: str, x, position: int, cache: list, later: int, asked=None):
    """One token through one pre-norm layer, over the entries so far and its own, which joins them."""
    eps = drafter.sizes.rms_norm_eps
    u = rms_norm(x, weights[f"{layer}.attention_norm.weight"], eps)
    cache.append(own_entry(drafter, weights, f"{layer}.attention", u, position))
    query = own_query(drafter, weights, f"{layer}.attention", u if asked is None else asked, position)
    x = x + weights[f"{layer}.attention.o_proj.weight"] @ attend(query, seen_entries(drafter.config, cache, later))
    return x + mlp(weights, layer, rms_norm(x, weights[f"{layer}.mlp_norm.weight"], eps))


def _hidden_chain(drafter, weights, features, document, anchor, steps):
    """EAGLE-3: the prefix is the drafter's own step-0 entry of every column s ≤ t. `hybrid` adds the gated cross-attention.

    Of several layers the first reads (f_s, x_{s+1}), and every column passes all of them, as every draft token does.
    """
    eps, layer, deeper = (
        drafter.sizes.rms_norm_eps,
        "layers.0",
        [f"layers.{i}" for i in range(1, drafter.config.num_layers)],
    )
    deep_caches = {name: [] for name in deeper}

    def read(token_place, state):
        embedding = drafter.embedding[features.tokens[document, token_place]]
        normed = rms_norm(embedding, weights[f"{layer}.embedding_norm.weight"], eps)
        return torch.cat([normed, rms_norm(state, weights[f"{layer}.state_norm.weight"], eps)])

    def pass_deeper(output, position):
        for name in deeper:
            later = max(0, position - anchor - 1)
            output = plain_layer(drafter, weights, name, output, position, deep_caches[name], later)
        return output

    cache, cross_cache = [], []
    for s in range(anchor + 1):
        states = features.hidden_states[document, s]
        if drafter.config.hidden_norm:
            states = rms_norm(states, weights["hidden_norm.weight"], eps)
        state = weights["fuse_hidden.weight"] @ torch.cat(list(states))
        if not drafter.config.cross_only:
            cache.append(own_entry(drafter, weights, f"{layer}.attention", read(s + 1, state), s + 1))
        if drafter.config.paradigm == "hybrid":
            cross_cache.append(fused_entry(drafter, weights, layer, features, document, s))
        if deeper and s < anchor:  # column t is draft step 0
            query = own_query(drafter, weights, f"{layer}.attention", read(s + 1, state), s + 1)
            seen = attend(query, seen_entries(drafter.config, cache, 0))
            output = state + weights[f"{layer}.attention.o_proj.weight"] @ seen
            output = output + mlp(weights, layer, rms_norm(output, weights[f"{layer}.mlp_norm.weight"], eps))
            pass_deeper(output, s + 1)
    for step in range(steps):
        position = anchor + 1 + step
        u = read(position, state)
        if not drafter.config.cross_only:
            if step > 0:  # the entry of step 0 is column s = t
                cache.append(own_entry(drafter, weights, f"{layer}.attention", u, position))
            entries = seen_entries(drafter.config, cache, step)
            seen = attend(own_query(drafter, weights, f"{layer}.attention", u, position), entries)
            mixed = weights[f"{layer}.attention.o_proj.weight"] @ seen
        if drafter.config.paradigm == "hybrid":
            cross_cache.append(own_entry(drafter, weights, f"{layer}.cross", u, position))
            entries = seen_entries(drafter.config, cross_cache, step + 1)
            crossed = attend(own_query(drafter, weights, f"{layer}.cross", u, position), entries)
            crossed = weights[f"{layer}.cross.o_proj.weight"] @ crossed
            if drafter.config.cross_only:
                mixed = crossed
            else:
                gate = torch.sigmoid(weights[f"{layer}.gate.weight"] @ u + weights[f"{layer}.gate.bias"])
                mixed = mixed + gate * (crossed - mixed)
        output = state + mixed
        output = output + mlp(weights, layer, rms_norm(output, weights[f"{layer}.mlp_norm.weight"], eps))
        output = pass_deeper(output, position)
        yield output
        post_norm = drafter.config.feedback == "post_norm"
        state = rms_norm(output, weights["norm.weight"], eps) if post_norm else output

"""`block` drafters of the tests, and a naive one: one block at a time, one slot at a time, lists for caches.

The naive drafter is written from the formulas of the design and shares no code with ``kvshot_lib.drafters.block`` or ``kvshot_lib.drafters.attention``.
"""

import examples
import sequential
import torch

from kvshot_lib.drafters.drafter import DrafterConfig, build_drafter

BLOCKS = {
    "block_kv_1": DrafterConfig("block", block_size=4),
    "block_kv_2": DrafterConfig("block", 2),
    "block_kv_2_unrotate": DrafterConfig("block", 2, kv_rope="unrotate", block_size=4),
    "block_states_2": DrafterConfig("block", 2, block_context="hidden"),
    "block_hidden_1_normed": DrafterConfig("block", block_context="hidden", hidden_norm=True, block_size=2),
    "block_both_2": DrafterConfig("block", 2, block_context="both", block_size=5),
    "block_both_1_mlp": DrafterConfig("block", block_context="both", kv_fusion="mlp"),
}


def block_drafter(variant: str, name: str = "tiny-llama", draft_ids=examples.DRAFT_IDS):
    """With norms and MASK that are random too."""
    config = BLOCKS[variant]
    return examples.roughened(build_drafter(config, examples.target(name), examples.live(name).spec, draft_ids, seed=1))


def steps_of(drafter) -> int:
    return drafter.config.block_size - 1


def naive_block(drafter, features, document: int, anchor: int) -> list[torch.Tensor]:
    """Logits of q_{t,0} … q_{t,b-2} at one anchor t."""
    weights, eps = dict(drafter.named_parameters()), drafter.sizes.rms_norm_eps
    known = drafter.embedding[features.tokens[document, anchor + 1]]
    slots = [known] + [weights["mask_embedding"]] * steps_of(drafter)
    for i in range(drafter.config.num_layers):
        layer = f"layers.{i}"
        read = [sequential.rms_norm(x, weights[f"{layer}.attention_norm.weight"], eps) for x in slots]
        entries = [
            entry
            for s in range(anchor + 1)
            for entry in context_entries(drafter, weights, layer, features, document, s)
        ]
        entries += [
            sequential.own_entry(drafter, weights, f"{layer}.attention", u, anchor + 1 + j) for j, u in enumerate(read)
        ]
        for j, u in enumerate(read):
            query = sequential.own_query(drafter, weights, f"{layer}.attention", u, anchor + 1 + j)
            x = slots[j] + weights[f"{layer}.attention.o_proj.weight"] @ sequential.attend(query, entries)
            normed = sequential.rms_norm(x, weights[f"{layer}.mlp_norm.weight"], eps)
            slots[j] = x + sequential.mlp(weights, layer, normed)
    return [drafter.head @ sequential.rms_norm(x, weights["norm.weight"], eps) for x in slots[1:]]


def context_entries(drafter, weights, layer: str, features, document: int, s: int) -> list:
    """What one position of target state gives a layer: a (key, value) from its KV, one from its hidden states, or both."""
    found, context = [], drafter.config.block_context
    if context != "hidden":
        found.append(sequential.fused_entry(drafter, weights, layer, features, document, s))
    if context != "kv":
        eps, states = drafter.sizes.rms_norm_eps, features.hidden_states[document, s]
        if drafter.config.hidden_norm:
            states = sequential.rms_norm(states, weights["hidden_norm.weight"], eps)
        fused = weights["fuse_hidden.weight"] @ torch.cat(list(states))
        normed = sequential.rms_norm(fused, weights[f"{layer}.context_norm.weight"], eps)
        found.append(sequential.own_entry(drafter, weights, f"{layer}.attention", normed, s))
    return found

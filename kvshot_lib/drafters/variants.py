"""The study's variants: every drafter is one set of parameters of notebook 02, in the order in which tables and figures show them.

A profile lists these names; what it does not say (budget, draft vocabulary, learning rate) is equal for all of them.
"""

KV_2 = {"paradigm": "kv", "num_layers": 2}
WARM = {"paradigm": "hybrid", "init_from": "hidden"}
STRONG = {"paradigm": "hidden", "feedback": "post_norm", "hidden_norm": True}
STRONG_WARM = {**STRONG, "paradigm": "hybrid", "init_from": "hidden_31"}
UNROTATE_MLP = {"kv_rope": "unrotate", "kv_fusion": "mlp"}
KV_4 = {"paradigm": "kv", "num_layers": 4}
STRONG_KV = {**KV_4, **UNROTATE_MLP}
WITH_HIDDEN = {"kv_with_hidden": True, "kv_rope": "unrotate"}
KV_4_FROM_HIDDEN, KV_4_WITH_HIDDEN = {**KV_4, "kv_control": "from_hidden"}, {**KV_4, **WITH_HIDDEN}
COMBINED = {"gate_floor": 0.3, **UNROTATE_MLP}
BLOCK = {"paradigm": "block"}

VARIANTS: dict[str, dict] = {
    "hidden": {"paradigm": "hidden"},
    "hidden_post_norm": {"paradigm": "hidden", "feedback": "post_norm"},
    "hidden_normed": {"paradigm": "hidden", "hidden_norm": True},
    "hidden_continued": {"paradigm": "hidden", "init_from": "hidden"},
    "hidden_all_anchors": {"paradigm": "hidden", "anchor_fraction": 1.0},
    "kv_1": {"paradigm": "kv"},
    "kv_2": KV_2,
    "kv_3": {"paradigm": "kv", "num_layers": 3},
    "kv_4": KV_4,
    "kv_2_heads": {**KV_2, "kv_fusion": "heads"},
    "kv_2_mlp": {**KV_2, "kv_fusion": "mlp"},
    "kv_2_unrotate": {**KV_2, "kv_rope": "unrotate"},
    "kv_2_4kv": {**KV_2, "kv_layers": 4},
    "none_1": {"paradigm": "kv", "kv_control": "none"},
    "kv_2_zero": {**KV_2, "kv_control": "zero"},
    "kv_2_shuffled": {**KV_2, "kv_control": "shuffled"},
    "kv_2_lagged": {**KV_2, "kv_control": "lagged"},
    "states_2": {**KV_2, "kv_control": "from_hidden"},
    "kv_2_no_ttt": {**KV_2, "ttt_steps": 1},
    "kv_2_grad50": {**KV_2, "kv_grad_scale": 50.0},
    "kv_2_all_anchors": {**KV_2, "anchor_fraction": 1.0},
    "kv_4_all_anchors": {**KV_4, "anchor_fraction": 1.0},
    "kv_2_kv_init": {**KV_2, "kv_init": "target"},
    "kv_2_lag_augment": {**KV_2, "kv_lag_augment_tokens": 4},
    "hybrid": {"paradigm": "hybrid"},
    "hybrid_warm": WARM,
    "cross_only_warm": {**WARM, "cross_only": True},
    # Cures for a cross branch that starves behind its gate, one change each.
    "hybrid_warm_gate_floor": {**WARM, "gate_floor": 0.3},
    "hybrid_warm_branch_warmup": {**WARM, "branch_warmup_steps": 130},
    "hybrid_warm_branch_loss": {**WARM, "branch_loss_weight": 0.5},
    "hybrid_warm_branch_rate": {**WARM, "branch_learning_rate_scale": 3.0},
    "hybrid_warm_lag_augment": {**WARM, "kv_lag_augment_tokens": 4},
    "hybrid_warm_kv_init": {**WARM, "kv_init": "target"},
    "hybrid_warm_unrotate_mlp": {**WARM, **UNROTATE_MLP},
    "hybrid_warm_all_anchors": {**WARM, "anchor_fraction": 1.0},
    # Together: every cure above the uncured hybrid on validation documents (seed 0), of two that exclude each other the better one.
    "hybrid_warm_combined": {**WARM, **COMBINED},
    # What helped each paradigm alone, together: the strongest of each that the study knows.
    "hidden_31": STRONG,
    "hidden_31_continued": {**STRONG, "init_from": "hidden_31"},
    "hybrid_warm_31": STRONG_WARM,
    "hybrid_warm_31_combined": {**STRONG_WARM, **COMBINED},
    "kv_4_unrotate_mlp": STRONG_KV,
    "kv_4_unrotate_mlp_continued": {**STRONG_KV, "init_from": "kv_4_unrotate_mlp"},
    "states_2_continued": {**KV_2, "kv_control": "from_hidden", "init_from": "states_2"},
    # Is it depth or the cache that makes the deepest kv strong? Equal depth and training: entries from hidden states, and from both.
    "states_4": KV_4_FROM_HIDDEN,
    "states_4_continued": {**KV_4_FROM_HIDDEN, "init_from": "states_4"},
    "both_2": {**KV_2, **WITH_HIDDEN},
    "both_4": KV_4_WITH_HIDDEN,
    "both_4_continued": {**KV_4_WITH_HIDDEN, "init_from": "both_4"},
    # Block-wise. Each depth with and without the KV cache, so that depth, parallel drafting and KV reuse can be told apart; kv_*_all_anchors
    # has the dense gradients of block-wise training without its parallel drafting (see `ttt`).
    "block_kv_1": {**BLOCK, "block_context": "kv"},
    "block_kv_2": {**BLOCK, "block_context": "kv", "num_layers": 2},
    "block_kv_4": {**BLOCK, "block_context": "kv", "num_layers": 4},
    "block_states_1": {**BLOCK, "block_context": "hidden"},
    "block_states_2": {**BLOCK, "block_context": "hidden", "num_layers": 2},
    "block_states_4": {**BLOCK, "block_context": "hidden", "num_layers": 4},
    "block_both_2": {**BLOCK, "block_context": "both", "num_layers": 2},
    "block_both_4": {**BLOCK, "block_context": "both", "num_layers": 4},
    # A block is one pass, all of it on drawn anchors: a share of .285 takes the arithmetic of kv_2's training on equal tokens (`compute`).
    "block_kv_2_equal_compute": {**BLOCK, "block_context": "kv", "num_layers": 2, "anchor_fraction": 0.285},
    "block_kv_2_all_anchors": {**BLOCK, "block_context": "kv", "num_layers": 2, "anchor_fraction": 1.0},
    "block_kv_2_b16": {**BLOCK, "block_context": "kv", "num_layers": 2, "block_size": 16, "ttt_steps": 15},
}

# The warm hybrid with something done for its cross branch.
CURES = tuple(n for n, own in VARIANTS.items() if n.startswith("hybrid_warm_") and own["init_from"] == "hidden")
# Those that line figures show where more than seven were trained.
MAIN_VARIANTS = ("hidden", "kv_1", "kv_2", "kv_4", "hybrid", "hybrid_warm", "none_1")
# Those that `query_estimation` measures by default: plain reuse of the KV cache at every depth, and with hidden states.
QUERY_VARIANTS = ("kv_1", "kv_2", "kv_3", "kv_4", "hybrid", "hybrid_warm")
QUERY_ARMS = ("as_trained", "own", "oracle", "perfect", "random")  # of the oracle (`query_oracle` explains them)

RENAMED = {
    "kv_1_none": "none_1", "kv_2_from_hidden": "states_2", "kv_4_from_hidden": "states_4", "kv_2_with_hidden": "both_2",
    "kv_4_with_hidden": "both_4", "hidden_normed_post_norm": "hidden_31", "hybrid_warm_normed_post_norm": "hybrid_warm_31",
    "block_hidden_1": "block_states_1", "block_hidden_2": "block_states_2", "block_hidden_4": "block_states_4",
}  # fmt: skip


def current_name(name: str) -> str:
    """The present name of a variant that an earlier version of the study may have called otherwise."""
    for old, new in RENAMED.items():
        for suffix in ("", "_continued", "_combined"):
            if name.removesuffix("_checkpoint") == old + suffix:
                return name.replace(old, new)
    return name

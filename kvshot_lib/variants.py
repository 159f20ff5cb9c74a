"""The study's variants: every drafter is one set of parameters of notebook 02, in the order in which tables and figures show them.

A profile lists these names; what it does not say (budget, draft vocabulary, learning rate) is equal for all of them.
"""

KV_2 = {"paradigm": "kv", "num_layers": 2}

VARIANTS: dict[str, dict] = {
    "hidden": {"paradigm": "hidden"},
    "hidden_post_norm": {"paradigm": "hidden", "feedback": "post_norm"},
    "hidden_normed": {"paradigm": "hidden", "hidden_norm": True},
    "hidden_continued": {"paradigm": "hidden", "init_from": "hidden"},
    "hidden_all_anchors": {"paradigm": "hidden", "anchor_fraction": 1.0},
    "kv_1": {"paradigm": "kv"},
    "kv_2": KV_2,
    "kv_3": {"paradigm": "kv", "num_layers": 3},
    "kv_4": {"paradigm": "kv", "num_layers": 4},
    "kv_2_heads": {**KV_2, "kv_fusion": "heads"},
    "kv_2_mlp": {**KV_2, "kv_fusion": "mlp"},
    "kv_2_unrotate": {**KV_2, "kv_rope": "unrotate"},
    "kv_2_4kv": {**KV_2, "kv_layers": 4},
    "kv_1_none": {"paradigm": "kv", "kv_control": "none"},
    "kv_2_zero": {**KV_2, "kv_control": "zero"},
    "kv_2_shuffled": {**KV_2, "kv_control": "shuffled"},
    "kv_2_lagged": {**KV_2, "kv_control": "lagged"},
    "kv_2_from_hidden": {**KV_2, "kv_control": "from_hidden"},
    "kv_2_no_ttt": {**KV_2, "ttt_steps": 1},
    "kv_2_grad50": {**KV_2, "kv_grad_scale": 50.0},
    "kv_2_all_anchors": {**KV_2, "anchor_fraction": 1.0},
    "hybrid": {"paradigm": "hybrid"},
    "hybrid_warm": {"paradigm": "hybrid", "init_from": "hidden"},
    "cross_only_warm": {"paradigm": "hybrid", "cross_only": True, "init_from": "hidden"},
}

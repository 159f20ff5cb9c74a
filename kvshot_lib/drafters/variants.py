"""The study's variants, one entry each, in the order in which tables and figures show them.

A profile lists these names; what an entry does not say (budget, draft vocabulary, learning rate) is equal
for all. Tables, figures, comparisons, glossary and sweep read this registry: a new variant of parameters
is one entry more.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One drafter of the study.

    Attributes
    ----------
    says : one sentence that says what it is.
    parameters : of the training notebook; they alone make it this variant.
    against : the variant that it differs from in one point, "" for one that stands on its own.
    group : what that point is about: paper, norms, fusion, controls, sources, training, cures or blocks.
    colour, marker : its look in every figure. A hue for what is read (blue hidden states, orange to brown
        the cache, green both, violet blocks, grey no target state), a shape for the architecture.
    """

    name: str
    says: str
    parameters: dict
    against: str
    group: str
    colour: str
    marker: str


HIDDEN, KV, HYBRID, BLOCK = ({"paradigm": name} for name in ("hidden", "kv", "hybrid", "block"))
HIDDEN_31 = {**HIDDEN, "feedback": "post_norm", "hidden_norm": True}
KV_2, KV_3, KV_4 = ({**KV, "num_layers": depth} for depth in (2, 3, 4))
NONE, QUERY = {"kv_control": "none"}, {"kv_fusion": "heads", "kv_layers": 1}
UNROTATE_MLP = {"kv_rope": "unrotate", "kv_fusion": "mlp"}
STATES, BOTH = {"kv_control": "from_hidden"}, {"kv_with_hidden": True, "kv_rope": "unrotate"}
WARM = {**HYBRID, "init_from": "hidden"}
WARM_31 = {**HIDDEN_31, **HYBRID, "init_from": "hidden_31"}
COMBINED = {"gate_floor": 0.3, **UNROTATE_MLP}
BLOCK_KV, BLOCK_STATES, BLOCK_BOTH = ({**BLOCK, "block_context": read} for read in ("kv", "hidden", "both"))
BLOCK_KV_2 = {**BLOCK_KV, "num_layers": 2}
QK_NORM, GAINS = {"qk_norm": True}, {"state_gains": "target"}
ORACLE, CONSTANT = {"query_from": "target", "state_layers": "kv"}, {"query_from": "constant"}
ANCHORED = {"query_from": "anchor", "state_layers": "kv"}
EVERY_ANCHOR = {"anchor_fraction": 1.0}

# The looks of kin that no figure sets against one another.
HIDDEN_LOOK, KV_LOOK, HYBRID_LOOK, BLOCK_LOOK = ("#0072B2", "v"), ("#c98a5e", "P"), ("#009E73", "v"), ("#CC79A7", "^")

_ENTRIES = (
    Variant("hidden", "EAGLE-3: one layer over fused hidden states of three target layers, fed back its own output.",
            HIDDEN, "", "paper", "#0072B2", "o"),
    Variant("hidden_post_norm", "hidden that feeds back its output after the final norm.",
            {**HIDDEN, "feedback": "post_norm"}, "hidden", "norms", "#56B4E9", "o"),
    Variant("hidden_normed", "hidden that norms each target hidden state before fusing them.",
            {**HIDDEN, "hidden_norm": True}, "hidden", "norms", *HIDDEN_LOOK),
    Variant("hidden_continued", "hidden, trained once more for as long.",
            {**HIDDEN, "init_from": "hidden"}, "hidden", "training", "#00456b", "o"),
    Variant("hidden_all_anchors", "hidden, trained at every anchor instead of a fifth of them.",
            {**HIDDEN, **EVERY_ANCHOR}, "hidden", "training", *HIDDEN_LOOK),
    Variant("kv_1", "One layer over the target's KV cache of three layers, mapped to one layer's width.",
            KV, "", "paper", "#E69F00", "s"),
    Variant("kv_2", "Two layers over the target's KV cache, each with maps of its own.",
            KV_2, "", "paper", "#D55E00", "s"),
    Variant("kv_3", "Three layers over the target's KV cache.", KV_3, "", "paper", "#a34700", "s"),
    Variant("kv_4", "Four layers over the target's KV cache.", KV_4, "", "paper", "#6e3000", "s"),
    Variant("kv_2_heads", "kv_2 that takes the cached layers as they are, side by side as KV heads.",
            {**KV_2, "kv_fusion": "heads"}, "kv_2", "fusion", *KV_LOOK),
    Variant("kv_2_mlp", "kv_2 that maps the cache by two linear maps with SiLU between them.",
            {**KV_2, "kv_fusion": "mlp"}, "kv_2", "fusion", *KV_LOOK),
    Variant("kv_2_unrotate", "kv_2 that takes RoPE off the cached keys before it maps them.",
            {**KV_2, "kv_rope": "unrotate"}, "kv_2", "fusion", *KV_LOOK),
    Variant("kv_2_4kv", "kv_2 over the cache of four layers instead of three.",
            {**KV_2, "kv_layers": 4}, "kv_2", "fusion", *KV_LOOK),
    Variant("none_1", "No target state: one layer over the tokens so far, a tiny language model on its own.",
            {**KV, **NONE}, "kv_1", "controls", "#444444", "X"),
    Variant("none_2", "No target state: two layers over the tokens so far.",
            {**KV_2, **NONE}, "kv_2", "controls", "#8c8c8c", "X"),
    Variant("none_4", "No target state: four layers over the tokens so far.",
            {**KV_4, **NONE}, "kv_4", "controls", "#000000", "X"),
    Variant("kv_2_zero", "kv_2 with zeros in place of the cache.",
            {**KV_2, "kv_control": "zero"}, "kv_2", "controls", "#777777", "X"),
    Variant("kv_1_shuffled", "kv_1 with the cache of another document.",
            {**KV, "kv_control": "shuffled"}, "kv_1", "controls", "#aaaaaa", "X"),
    Variant("kv_2_shuffled", "kv_2 with the cache of another document.",
            {**KV_2, "kv_control": "shuffled"}, "kv_2", "controls", "#aaaaaa", "X"),
    Variant("kv_2_lagged", "kv_2 whose cache ends four tokens before the anchor.",
            {**KV_2, "kv_control": "lagged"}, "kv_2", "controls", *KV_LOOK),
    Variant("query_1", "One layer whose queries read the last target layer's own cache, without maps.",
            {**KV, **QUERY}, "kv_1", "sources", "#f2b84b", "*"),
    Variant("query_2", "Two layers whose queries read the last target layer's own cache, without maps.",
            {**KV_2, **QUERY}, "kv_2", "sources", "#e07b39", "*"),
    Variant("query_4", "Four layers whose queries read the last target layer's own cache, without maps.",
            {**KV_4, **QUERY}, "kv_4", "sources", "#8a4b1f", "*"),
    Variant("kv_1_oracle_query", "kv_1 whose queries are made from the target's own state at their place.",
            {**KV, **ORACLE}, "kv_1", "controls", *KV_LOOK),
    Variant("kv_2_oracle_query", "kv_2 whose queries are made from the target's own state at their place.",
            {**KV_2, **ORACLE}, "kv_2", "controls", *KV_LOOK),
    Variant("kv_1_oracle_query_shuffled", "kv_1_oracle_query over the cache of another document.",
            {**KV, **ORACLE, "kv_control": "shuffled"}, "kv_1_oracle_query", "controls", "#aaaaaa", "X"),
    Variant("kv_2_oracle_query_shuffled", "kv_2_oracle_query over the cache of another document.",
            {**KV_2, **ORACLE, "kv_control": "shuffled"}, "kv_2_oracle_query", "controls", "#aaaaaa", "X"),
    Variant("kv_1_anchor_query", "kv_1 whose queries are made from the target's state at the anchor, and the token.",
            {**KV, **ANCHORED}, "kv_1", "controls", *KV_LOOK),
    Variant("kv_1_anchor_query_shuffled", "kv_1_anchor_query over the cache of another document.",
            {**KV, **ANCHORED, "kv_control": "shuffled"}, "kv_1_anchor_query", "controls", "#aaaaaa", "X"),
    Variant("kv_1_constant_query", "kv_1 that asks the same at every place.",
            {**KV, **CONSTANT}, "kv_1", "controls", *KV_LOOK),
    Variant("kv_2_constant_query", "kv_2 that asks the same at every place.",
            {**KV_2, **CONSTANT}, "kv_2", "controls", *KV_LOOK),
    Variant("states_1", "One layer over entries made from hidden states: kv_1 with another source.",
            {**KV, **STATES}, "kv_1", "sources", "#8ecbf0", "s"),
    Variant("states_1_qk_norm", "states_1 that norms the queries and keys of its attention, head by head.",
            {**KV, **STATES, **QK_NORM}, "states_1", "norms", *HIDDEN_LOOK),
    Variant("kv_1_qk_norm", "kv_1 that norms the queries and keys of its attention, head by head.",
            {**KV, "kv_rope": "unrotate", **QK_NORM}, "kv_1", "norms", *KV_LOOK),
    Variant("states_2", "Two layers over entries made from hidden states: kv_2 with another source.",
            {**KV_2, **STATES}, "kv_2", "sources", "#56B4E9", "s"),
    Variant("states_2_gains", "states_2 whose states are at first normed as the target norms them, layer by layer.",
            {**KV_2, **STATES, **GAINS}, "states_2", "norms", *HIDDEN_LOOK),
    Variant("kv_2_no_ttt", "kv_2, trained on its first draft step alone (no training-time test).",
            {**KV_2, "ttt_steps": 1}, "kv_2", "training", *KV_LOOK),
    Variant("kv_2_grad50", "kv_2, trained with fifty times the gradient on its draft-side keys and values.",
            {**KV_2, "kv_grad_scale": 50.0}, "kv_2", "training", *KV_LOOK),
    Variant("kv_2_all_anchors", "kv_2, trained at every anchor instead of a fifth of them.",
            {**KV_2, **EVERY_ANCHOR}, "kv_2", "training", *KV_LOOK),
    Variant("kv_4_all_anchors", "kv_4, trained at every anchor instead of a fifth of them.",
            {**KV_4, **EVERY_ANCHOR}, "kv_4", "training", *KV_LOOK),
    Variant("kv_2_kv_init", "kv_2 whose draft-side keys and values start as the target's own projections.",
            {**KV_2, "kv_init": "target"}, "kv_2", "training", *KV_LOOK),
    Variant("kv_2_lag_augment", "kv_2, trained with its cache ending up to four tokens early.",
            {**KV_2, "kv_lag_augment_tokens": 4}, "kv_2", "training", *KV_LOOK),
    Variant("hybrid", "The paper's hybrid: hidden with a cross-attention branch over the cache behind a gate.",
            HYBRID, "", "paper", "#009E73", "D"),
    Variant("hybrid_warm", "hybrid that starts from a trained hidden.", WARM, "hybrid", "paper", "#005c43", "D"),
    Variant("cross_only_warm", "hybrid_warm without its self-attention branch and gate.",
            {**WARM, "cross_only": True}, "hybrid_warm", "controls", "#6fcbb1", "D"),
    Variant("hybrid_warm_gate_floor", "hybrid_warm whose gate can't fall below .3.",
            {**WARM, "gate_floor": 0.3}, "hybrid_warm", "cures", *HYBRID_LOOK),
    Variant("hybrid_warm_branch_warmup", "hybrid_warm whose cross branch trains alone for the first 130 steps.",
            {**WARM, "branch_warmup_steps": 130}, "hybrid_warm", "cures", *HYBRID_LOOK),
    Variant("hybrid_warm_branch_loss", "hybrid_warm with a second loss on the output of the cross branch alone.",
            {**WARM, "branch_loss_weight": 0.5}, "hybrid_warm", "cures", *HYBRID_LOOK),
    Variant("hybrid_warm_branch_rate", "hybrid_warm with three times the learning rate on its cross branch.",
            {**WARM, "branch_learning_rate_scale": 3.0}, "hybrid_warm", "cures", *HYBRID_LOOK),
    Variant("hybrid_warm_lag_augment", "hybrid_warm, trained with its cache ending up to four tokens early.",
            {**WARM, "kv_lag_augment_tokens": 4}, "hybrid_warm", "cures", *HYBRID_LOOK),
    Variant("hybrid_warm_kv_init", "hybrid_warm whose cross branch starts from the target's own projections.",
            {**WARM, "kv_init": "target"}, "hybrid_warm", "cures", *HYBRID_LOOK),
    Variant("hybrid_warm_unrotate_mlp", "hybrid_warm whose cross branch maps un-rotated keys by a two-layer map.",
            {**WARM, **UNROTATE_MLP}, "hybrid_warm", "cures", *HYBRID_LOOK),
    Variant("hybrid_warm_all_anchors", "hybrid_warm, trained at every anchor instead of a fifth of them.",
            {**WARM, **EVERY_ANCHOR}, "hybrid_warm", "cures", *HYBRID_LOOK),
    # Every cure above the uncured hybrid on validation documents (seed 0); of two that exclude each other the better.
    Variant("hybrid_warm_combined", "hybrid_warm with the cures that helped it, together.",
            {**WARM, **COMBINED}, "hybrid_warm", "cures", *HYBRID_LOOK),
    Variant("hidden_31", "EAGLE-3.1: hidden with normed inputs and its state fed back after the final norm.",
            HIDDEN_31, "hidden_post_norm", "norms", "#7a86d6", "p"),
    Variant("hidden_31_2", "EAGLE-3.1 with a second layer over the stream.",
            {**HIDDEN_31, "num_layers": 2}, "hidden_31", "sources", "#5a66bd", "p"),
    Variant("hidden_31_4", "EAGLE-3.1 with three more layers over the stream.",
            {**HIDDEN_31, "num_layers": 4}, "hidden_31", "sources", "#1e2769", "p"),
    Variant("hidden_31_qk_norm", "hidden_31 that norms the queries and keys of its attention, head by head.",
            {**HIDDEN_31, **QK_NORM}, "hidden_31", "norms", *HIDDEN_LOOK),
    Variant("hidden_31_continued", "hidden_31, trained once more for as long.",
            {**HIDDEN_31, "init_from": "hidden_31"}, "hidden_31", "training", "#2f3b8f", "p"),
    Variant("hybrid_warm_31", "hybrid_warm over EAGLE-3.1: both norms, started from a trained hidden_31.",
            WARM_31, "hybrid_warm", "norms", "#00382a", "d"),
    Variant("hybrid_warm_31_combined", "hybrid_warm_31 with the cures that helped hybrid_warm.",
            {**WARM_31, **COMBINED}, "hybrid_warm_31", "norms", *HYBRID_LOOK),
    Variant("kv_4_unrotate_mlp", "kv_4 that maps un-rotated keys, by a two-layer map.",
            {**KV_4, **UNROTATE_MLP}, "kv_4", "fusion", "#3d1a00", "P"),
    Variant("kv_4_unrotate_mlp_continued", "kv_4_unrotate_mlp, trained once more for as long.",
            {**KV_4, **UNROTATE_MLP, "init_from": "kv_4_unrotate_mlp"}, "kv_4_unrotate_mlp", "training",
            "#1f0d00", "p"),
    Variant("states_2_continued", "states_2, trained once more for as long.",
            {**KV_2, **STATES, "init_from": "states_2"}, "states_2", "training", "#2f7fb8", "s"),
    Variant("states_4", "Four layers over entries made from hidden states: kv_4 with another source.",
            {**KV_4, **STATES}, "kv_4", "sources", "#1c5d99", "s"),
    Variant("states_4_continued", "states_4, trained once more for as long.",
            {**KV_4, **STATES, "init_from": "states_4"}, "states_4", "training", "#0c3866", "s"),
    Variant("both_1", "One layer over the sum of entries from the cache and entries from hidden states.",
            {**KV, **BOTH}, "states_1", "sources", "#cfe08a", "s"),
    Variant("both_2", "Two layers over the sum of entries from the cache and entries from hidden states.",
            {**KV_2, **BOTH}, "states_2", "sources", "#a9bf5a", "s"),
    Variant("both_2_gains", "both_2 whose states are at first normed as the target norms them, layer by layer.",
            {**KV_2, **BOTH, **GAINS}, "both_2", "norms", "#6b8e23", "v"),
    Variant("both_4", "Four layers over the sum of entries from the cache and entries from hidden states.",
            {**KV_4, **BOTH}, "states_4", "sources", "#7f9a2c", "s"),
    Variant("both_4_continued", "both_4, trained once more for as long.",
            {**KV_4, **BOTH, "init_from": "both_4"}, "both_4", "training", "#56700a", "s"),
    # Block-wise, each depth with and without the cache: so depth, parallel drafting and KV reuse can be told apart.
    Variant("block_kv_1", "A whole block of seven tokens in one pass of one layer over the cache.",
            BLOCK_KV, "kv_1", "blocks", "#e3b3cc", "^"),
    Variant("block_kv_2", "A whole block of seven tokens in one pass of two layers over the cache.",
            BLOCK_KV_2, "kv_2", "blocks", "#CC79A7", "^"),
    Variant("block_kv_4", "A whole block of seven tokens in one pass of four layers over the cache.",
            {**BLOCK_KV, "num_layers": 4}, "kv_4", "blocks", "#7d3c61", "^"),
    Variant("block_states_1", "block_kv_1 over entries made from hidden states.",
            BLOCK_STATES, "block_kv_1", "blocks", "#9aa6d6", "v"),
    Variant("block_states_2", "block_kv_2 over entries made from hidden states.",
            {**BLOCK_STATES, "num_layers": 2}, "block_kv_2", "blocks", "#5b6fb5", "v"),
    Variant("block_states_4", "block_kv_4 over entries made from hidden states.",
            {**BLOCK_STATES, "num_layers": 4}, "block_kv_4", "blocks", "#34437f", "v"),
    Variant("block_both_2", "block_kv_2 over entries from the cache and entries from hidden states, side by side.",
            {**BLOCK_BOTH, "num_layers": 2}, "block_kv_2", "blocks", "#8064a2", "<"),
    Variant("block_both_4", "block_kv_4 over entries from the cache and entries from hidden states, side by side.",
            {**BLOCK_BOTH, "num_layers": 4}, "block_kv_4", "blocks", "#523a70", "<"),
    # .285 of the anchors, each in one pass, take the arithmetic of kv_2's training on equal tokens.
    Variant("block_kv_2_equal_compute", "block_kv_2, trained on equal tokens with the arithmetic of kv_2.",
            {**BLOCK_KV_2, "anchor_fraction": 0.285}, "block_kv_2", "blocks", *BLOCK_LOOK),
    Variant("block_kv_2_all_anchors", "block_kv_2, trained at every anchor instead of a fifth of them.",
            {**BLOCK_KV_2, **EVERY_ANCHOR}, "block_kv_2", "blocks", *BLOCK_LOOK),
    Variant("block_kv_2_b16", "block_kv_2 with sixteen slots, which drafts fifteen tokens.",
            {**BLOCK_KV_2, "block_size": 16, "ttt_steps": 15}, "block_kv_2", "blocks", *BLOCK_LOOK),
)  # fmt: skip
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _ENTRIES}

# Those that line figures show where more than seven were trained.
MAIN_VARIANTS = ("hidden", "kv_1", "kv_2", "kv_4", "hybrid", "hybrid_warm", "none_1")
# Those whose queries are compared with the target's: plain reuse of the cache at every depth, and with hidden states.
QUERY_VARIANTS = ("kv_1", "kv_2", "kv_3", "kv_4", "hybrid", "hybrid_warm")

_FIRST = {
    new + end: old + end
    for old, new in (
        ("kv_1_none", "none_1"), ("kv_2_from_hidden", "states_2"), ("kv_4_from_hidden", "states_4"),
        ("kv_2_with_hidden", "both_2"), ("kv_4_with_hidden", "both_4"), ("hidden_normed_post_norm", "hidden_31"),
        ("hybrid_warm_normed_post_norm", "hybrid_warm_31"), ("block_hidden_1", "block_states_1"),
        ("block_hidden_2", "block_states_2"), ("block_hidden_4", "block_states_4"),
    )
    for end in ("", "_continued", "_combined")
}  # fmt: skip


def parameters_of(name: str) -> dict:
    """What makes this variant, as parameters of the training notebook; nothing for a drafter that isn't the study's."""
    return dict(VARIANTS[name].parameters) if name in VARIANTS else {}


def in_study_order(names: Iterable[str]) -> list[str]:
    """Each name once: the study's variants in its own order, then others by name."""
    known = {name: place for place, name in enumerate(VARIANTS)}
    return sorted(set(names), key=lambda name: (known.get(name, len(known)), name))


def first_name(name: str) -> str:
    """The name under which a variant was first recorded: what is drawn by name stays the same when it is renamed.

    >>> first_name("hidden_31_continued"), first_name("kv_2")
    ('hidden_normed_post_norm_continued', 'kv_2')
    """
    return _FIRST.get(name, name)

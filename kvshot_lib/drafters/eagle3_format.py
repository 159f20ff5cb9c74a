"""The format of EAGLE-3 checkpoints: what stands in ``config.json``, and under which names their tensors are.

EAGLE, SpecForge, AngelSlim and Model-Optimizer write flat configs (the last one with null for whatever isn't
set), speculators nest the layers' in ``transformer_layer_config``; vLLM and SGLang read them. A field that
changes what is drafted and isn't read would be a silent mistake, so each is read, known to change nothing,
or refused by its name.

Layers are counted in two ways: EAGLE and vLLM name hidden states as inputs of decoder layers (2, L/2, L-3),
as the study does; ``eagle_config``, which SGLang reads, names the layers whose outputs they are, one less each.
"""

from collections.abc import Mapping
from pathlib import Path

from transformers import LlamaConfig

from ..errors import StudyError
from ..files import read_json
from ..settings import check_value
from ..target.capture import hidden_layers
from .config import DrafterConfig

CONFIG = "config.json"
LAYERS = "eagle_aux_hidden_state_layer_ids"
OUTPUTS = f"eagle_config.{LAYERS}"
ORIGIN = "kvshot"  # our own exports say here which target they are for
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
REQUIRED = (*SIZES[:3], "vocab_size")
READ = dict.fromkeys(SIZES, int) | {
    "vocab_size": int, "num_hidden_layers": int, "draft_vocab_size": int, "target_hidden_size": int,
    "max_position_embeddings": int, "sliding_window": int, "rms_norm_eps": float, "rope_theta": float, "fc_norm": bool,
    "norm_output": bool, "tie_word_embeddings": bool, LAYERS: tuple[int, ...], OUTPUTS: tuple[int, ...],
}  # fmt: skip
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # those that turn a position alike however long the text is
ROPE = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "attention_factor",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
)  # fmt: skip
# What the study's layers always do; another value is refused.
FIXED = {
    "hidden_act": "silu", "layer_types": "full_attention", "use_sliding_window": False, "is_causal": True,
    "norm_before_residual": False, "norm_before_fc": False, "partial_rotary_factor": 1, "logit_scale": 1,
    "parallel_drafting": False,
    **dict.fromkeys(("bias", "attention_bias", "qkv_bias", "mlp_bias"), False),
    "speculators_model_type": "eagle3", "speculators_config.algorithm": "eagle3",
    "eagle_config.use_aux_hidden_state": True, "eagle_config.use_input_layernorm_in_first_layer": True,
    "eagle_config.use_last_layernorm": True, "eagle_config.use_mtp_layernorm": False,
    "eagle_config.next_layer_regular": True, "eagle_config.parallel_draft_step": 1,
}  # fmt: skip
# What says something about training, other code or the target, and nothing about what is drafted.
HARMLESS = {
    "architectures", "model_type", "auto_map", "_name_or_path", "name_or_path", "transformers_version", "torch_dtype",
    "dtype", "use_cache", "return_dict", "output_attentions", "output_hidden_states", "initializer_range",
    "attention_dropout", "hidden_dropout", "pretraining_tp", "max_window_layers", "bos_token_id", "eos_token_id",
    "pad_token_id", "target_model_type", "modal_type", "num_aux_hidden_states", "embed_requires_grad",
    "speculators_version", "speculators_config.proposal_methods", "speculators_config.default_proposal_method",
    "speculators_config.verifier", "eagle_config.parallel_draft_heads_num_layers",
}  # fmt: skip


def read_config(folder: Path, overrides: Mapping[str, object]) -> dict:
    """The fields that are read, nested ones under their path (``eagle_config.…``), and ``rope``, all checked.

    Parameters
    ----------
    overrides : fields to take instead of what the file says.

    Raises
    ------
    StudyError : no such file, or a field that is missing, of another type, or of unknown effect.
    """
    path, found = folder / CONFIG, {}
    for name, value in read_json(path, "give the folder of an EAGLE-3 checkpoint").items():
        if name in ("eagle_config", "speculators_config") and isinstance(value, dict):
            found |= {f"{name}.{inner}": part for inner, part in value.items()}
        elif name == "transformer_layer_config" and isinstance(value, dict):
            found = {**value, **found}
        elif value is not None:
            found[name] = value
    found = {name: value for name, value in found.items() if value is not None}
    if unknown := sorted({*overrides} - {*READ}):
        raise StudyError(f"{', '.join(unknown)}: no field that is read of {path}; known are {', '.join(READ)}")
    if LAYERS in overrides:
        found.pop(OUTPUTS, None)
    rope = _rope(found, path)
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in {**found, **overrides}.items()}
    for name, value in found.items():
        _check_field(name, value, found, path)
    for name in REQUIRED:
        if name not in found:
            raise StudyError(f"{path} has no {name}; give the folder of an EAGLE-3 checkpoint, or {name}=…")
    bases = {found.get("rope_theta"), rope.get("rope_theta")} - {None}
    if len(bases) > 1 and "rope_theta" not in overrides:
        raise StudyError(f"{path} names two RoPE bases, {min(bases)} and {max(bases)}; say which with rope_theta=…")
    return {**found, "rope": {**rope, "rope_theta": found.get("rope_theta", rope.get("rope_theta", 10_000.0))}}


def _check_field(name: str, value: object, found: dict, path: Path) -> None:
    """Refuse a field that isn't of its kind, or changes what is drafted and isn't read."""
    if name in READ:
        try:
            check_value(name, tuple(value) if isinstance(value, list) else value, READ[name])
        except StudyError as error:
            raise StudyError(f"{path}: {error}") from None
        small = not isinstance(value, bool | list) and value <= 0
        if small or (name == "sliding_window" and found.get("use_sliding_window") is not False):
            raise StudyError(f"{path} has {name}={value}, which the study's 'hidden' can't do")
    elif name in FIXED:
        for one in value if isinstance(value, list) else [value]:
            if one != FIXED[name]:
                raise StudyError(f"{path} has {name}={value!r}: the study's 'hidden' has {FIXED[name]!r}")
    elif name not in HARMLESS and not (name == ORIGIN and isinstance(value, dict)):
        told = "is not read here and may change what is drafted; if you know that it doesn't, take it out"
        raise StudyError(f"{path} has {name}={value!r}, which {told}")


def _rope(found: dict, path: Path) -> dict:
    """Take RoPE out of the config's several places for it; a base in there counts as ``rope_theta``."""
    rope: dict = {}
    for place in ("rope_scaling", "rope_parameters"):
        given = found.pop(place, {})
        if not isinstance(given, dict):
            raise StudyError(f"{path} has {place}={given!r}, which is no object")
        given = {"rope_type" if name == "type" else name: value for name, value in given.items()}
        rope |= {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            if name not in ("rope_type", "rope_theta", *ROPE) and (name, value) != ("partial_rotary_factor", 1):
                raise StudyError(f"{path} has {place}.{name}={value!r}, which is not read here; drafts would differ")
    if (kind := rope.setdefault("rope_type", "default")) not in ROPE_TYPES:
        raise StudyError(f"{path} has RoPE of type {kind!r}; the study's 'hidden' does {', '.join(ROPE_TYPES)}")
    if kind != "default":
        rope.setdefault("original_max_position_embeddings", found.get("max_position_embeddings", 2048))
    rope.pop("partial_rotary_factor", None)
    return rope


def layer_sizes(found: dict) -> LlamaConfig:
    """The sizes of its layers, from what `read_config` gives."""
    heads = found["num_attention_heads"]
    usual = {"num_key_value_heads": heads, "head_dim": found["hidden_size"] // heads, "rms_norm_eps": 1e-6}
    said = {name: found[name] for name in (*SIZES, "rms_norm_eps", "max_position_embeddings") if name in found}
    return LlamaConfig(**{**usual, **said}, rope_parameters=found["rope"], hidden_act="silu")


def fused_layers(found: dict, num_layers: int) -> tuple[int, ...]:
    """Target layers whose inputs are fused: as vLLM names them, as SGLang does (one less), or EAGLE's own.

    Raises
    ------
    StudyError : both, and they don't agree.
    """
    inputs, outputs = found.get(LAYERS), [layer + 1 for layer in found.get(OUTPUTS, ())]
    if inputs and outputs and list(inputs) != outputs:
        raise StudyError(
            f"{CONFIG} names inputs of layers {list(inputs)} ({LAYERS}) and of {outputs} ({OUTPUTS}, counted as "
            f"outputs); say which with {LAYERS}=…"
        )
    return tuple(inputs or outputs or hidden_layers(num_layers))


def tensor_names(config: DrafterConfig) -> dict[str, str]:
    """Our name -> theirs, of every tensor but the norms of fused states (``fc_norm``)."""
    names = {"fuse_hidden.weight": "fc.weight", "norm.weight": "norm.weight"}
    for index in range(config.num_layers):
        norms = ("embedding_norm", "input_layernorm"), ("state_norm", "hidden_norm")
        if index:  # reads the stream alone
            norms = (("attention_norm", "input_layernorm"),)
        parts = dict((*norms, ("mlp_norm", "post_attention_layernorm")))
        parts |= {f"attention.{part}_proj": f"self_attn.{part}_proj" for part in "qkvo"}
        parts |= {f"attention.{part}_norm": f"self_attn.{part}_norm" for part in "qk" if config.qk_norm}
        parts |= {f"mlp.{part}_proj": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
        place = f"layers.{index}" if index else "midlayer"
        names |= {f"layers.{index}.{ours}.weight": f"{place}.{theirs}.weight" for ours, theirs in parts.items()}
    return names

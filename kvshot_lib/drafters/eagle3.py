"""`hidden` drafters in the format of EAGLE-3 checkpoints, which vLLM and SGLang serve; and theirs read for our metrics.

What must agree, and where it is easy to be wrong by one:

- Layers. EAGLE and vLLM count hidden states as inputs of decoder layers (2, L/2, L-3), as the study does;
  ``eagle_config``, which SGLang reads, names the layers whose outputs they are, one less each.
- Norms. ``input_layernorm`` is the embedding's, ``hidden_norm`` the state's; attention reads [embedding;
  state], the residual is the state before its norm, and what is fed back is the output before the final
  norm (`feedback=pre_norm`).
- Positions. The entry of (f_t, x_{t+1}) is at t+1 here and at t in EAGLE; RoPE only sees differences, so
  both draft the same.
- Draft vocabulary. ``d2t`` holds offsets: draft token i is target token i + d2t[i]; ``t2d`` marks target
  tokens that can be drafted.
- LM head. Our drafters use the target's rows; exported they are the checkpoint's own, and an imported one
  keeps what it brought.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from ..errors import StudyError
from ..features.spec import feature_spec
from ..files import read_json, write_atomically
from ..target.capture import hidden_layers
from ..target.load import Target
from .drafter import Drafter, DrafterConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"
NAMES = {
    "fuse_hidden.weight": "fc.weight",
    "norm.weight": "norm.weight",
    "layers.0.embedding_norm.weight": "midlayer.input_layernorm.weight",
    "layers.0.state_norm.weight": "midlayer.hidden_norm.weight",
    "layers.0.mlp_norm.weight": "midlayer.post_attention_layernorm.weight",
    **{f"layers.0.attention.{p}_proj.weight": f"midlayer.self_attn.{p}_proj.weight" for p in "qkvo"},
    **{f"layers.0.mlp.{p}_proj.weight": f"midlayer.mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
}
TABLES = ("lm_head.weight", "embed_tokens.weight", "d2t", "t2d")
SIZES = (
    *("hidden_size", "intermediate_size", "head_dim", "num_attention_heads", "num_key_value_heads"),
    *("rms_norm_eps", "hidden_act", "max_position_embeddings"),
)


def export_eagle3(drafter: Drafter, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write ``model.safetensors`` and ``config.json`` as EAGLE-3 checkpoints have them; returns the folder.

    ``dtype`` of the weights; None: as they are.

    Raises
    ------
    StudyError : a drafter that the format has no place for.
    """
    own, folder = drafter.config, Path(folder)
    if own != DrafterConfig("hidden"):
        raise StudyError(
            f"EAGLE-3 has no place for a drafter with paradigm={own.paradigm!r}, feedback={own.feedback!r}, "
            f"hidden_norm={own.hidden_norm}; export the study's 'hidden'"
        )
    state = drafter.state_dict()
    tensors = {theirs: state[ours] for ours, theirs in NAMES.items()} | {"lm_head.weight": drafter.head}
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous().clone() for name, tensor in tensors.items()}
    ids, vocab_size = drafter.draft_ids.cpu(), len(drafter.embedding)
    tensors["d2t"] = ids - torch.arange(len(ids))
    tensors["t2d"] = torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    rope = dict(drafter.sizes.rope_parameters)
    theta, scaled = rope.pop("rope_theta"), rope.get("rope_type", "default") != "default"
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        **{name: getattr(drafter.sizes, name) for name in SIZES},
        "rope_theta": theta,
        "rope_scaling": rope if scaled else None,
        "vocab_size": vocab_size,
        "draft_vocab_size": len(ids),
        "target_hidden_size": drafter.sizes.hidden_size,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(tensors["fc.weight"].dtype).removeprefix("torch."),
        "eagle_aux_hidden_state_layer_ids": list(drafter.spec.hidden_layers),
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in drafter.spec.hidden_layers],
        },
    }
    write_atomically(folder / WEIGHTS, lambda p: save_file(tensors, p, {"format": "pt"}))
    text = json.dumps(config, indent=2) + "\n"  # no seal of ours: others may edit it
    write_atomically(folder / CONFIG, lambda p: p.write_text(text))
    return folder


def import_eagle3(folder: str | Path, target: Target) -> Drafter:
    """Read an EAGLE-3 checkpoint, exported here or published, as a `hidden` drafter with an LM head of its own.

    The checkpoint doesn't say which weights it was trained for: only sizes can be checked.

    Raises
    ------
    StudyError : no such checkpoint, one of another shape than the target's, or one with parts that
        `hidden` doesn't have.
    """
    folder, config = Path(folder), target.config
    found = read_json(folder / CONFIG, "give the folder of an EAGLE-3 checkpoint")
    check_config(found, folder)
    state, rest = _split(_tensors(folder), folder)
    head = rest["lm_head.weight"]
    ids = torch.arange(len(head)) + rest.get("d2t", torch.zeros(len(head))).long()
    if head.shape[1] != config.hidden_size or int(ids.max()) >= config.vocab_size:
        raise StudyError(
            f"{folder} drafts {len(head)} tokens up to {int(ids.max())} at width {head.shape[1]}, target {target.name} "
            f"has {config.vocab_size} at width {config.hidden_size}; load the target that it was trained for"
        )
    spec = feature_spec(target, fused_layers=fused_layers(found, target.num_layers))
    sizes = LlamaConfig.from_dict({name: value for name, value in found.items() if name != "eagle_config"})
    embedding = rest.get("embed_tokens.weight", target.model.get_input_embeddings().weight.cpu())
    drafter = Drafter(DrafterConfig("hidden"), spec, sizes, ids, embedding, head)
    try:
        drafter.load_state_dict(state)
    except RuntimeError as error:
        told = str(error).splitlines()[-1].strip()
        raise StudyError(f"{folder}: {CONFIG} and {WEIGHTS} don't fit ({told})") from error
    return drafter.to(target.device).eval()


def _split(tensors: dict[str, torch.Tensor], folder: Path) -> tuple[dict, dict]:
    """The drafter's own weights under our names, and the tables that stand beside them; refuse anything else."""
    state = {ours: tensors[theirs] for ours, theirs in NAMES.items() if theirs in tensors}
    rest = {name: tensors[name] for name in TABLES if name in tensors}
    missing = sorted({*NAMES.values(), "lm_head.weight"} - set(tensors))
    unknown = sorted(set(tensors) - {*NAMES.values(), *TABLES})
    if missing or unknown:
        told = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}"
        raise StudyError(f"{folder} {told}: that is no EAGLE-3 drafter of one layer as the study has it")
    return state, rest


def check_config(found: dict, folder: Path) -> None:
    """Refuse what changes the drafter's arithmetic and what `hidden` doesn't do."""
    known = {
        "num_hidden_layers": 1, "attention_bias": False, "norm_before_residual": False, "norm_before_fc": False,
        "fc_norm": False, "norm_output": False, "hidden_act": "silu",
    }  # fmt: skip
    for name, value in known.items():
        if found.get(name, value) != value:
            raise StudyError(
                f"{folder} has {name}={found[name]!r}: the study's 'hidden' has {value!r}, so it can't be measured"
            )


def fused_layers(found: dict, num_layers: int) -> tuple[int, ...]:
    """Target layers whose inputs are fused: as vLLM names them, as SGLang does (one less), or EAGLE's own."""
    if ids := found.get("eagle_aux_hidden_state_layer_ids"):
        return tuple(ids)
    if ids := (found.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids"):
        return tuple(layer + 1 for layer in ids)
    return hidden_layers(num_layers)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors under EAGLE's names (speculators calls the layer ``layers.0``)."""
    try:
        if (folder / WEIGHTS).exists():
            tensors = load_file(folder / WEIGHTS)
        else:
            tensors = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise StudyError(
            f"no {WEIGHTS} or pytorch_model.bin in {folder}; give the folder of an EAGLE-3 checkpoint"
        ) from None
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise StudyError(f"the weights in {folder} can't be read ({type(error).__name__}); fetch them again") from error
    floats = {name.replace("layers.0.", "midlayer.", 1): tensor for name, tensor in tensors.items()}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in floats.items()}

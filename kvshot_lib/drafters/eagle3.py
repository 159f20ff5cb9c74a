"""`hidden` drafters in the format of EAGLE-3 and 3.1 checkpoints, which engines serve; and theirs read for our metrics.

What must agree, and where it is easy to be wrong by one:

- Layers: counted in two ways (`eagle3_format`). Norms: ``input_layernorm`` is the embedding's, ``hidden_norm``
  the state's; attention reads [embedding; state], the residual is the state before its norm.
- EAGLE-3.1 is two switches: ``norm_output`` feeds the state back after the final norm (`feedback=post_norm`),
  ``fc_norm`` norms each fused state with gains of its own. Ours share one norm: written it stands there three
  times; three that differ are read as a norm without gains and an ``fc`` with them multiplied in.
- Positions. The entry of (f_t, x_{t+1}) is at t+1 here and at t in EAGLE; RoPE only sees differences, so both
  draft the same.
- Draft vocabulary. ``d2t`` holds offsets: draft token i is target token i + d2t[i]; ``t2d`` marks target tokens
  that can be drafted.
- LM head and embedding. Our drafters use the target's; exported the head's rows are the checkpoint's own, and an
  imported one keeps what it brought.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..errors import StudyError
from ..features.spec import check_origin, feature_spec
from ..files import write_atomically
from ..target.load import Target
from .checkpoint import load_weights
from .drafter import Drafter, DrafterConfig
from .eagle3_format import CONFIG, LAYERS, ROPE_TYPES, SIZES, fused_layers, layer_sizes, read_config, tensor_names

WEIGHTS, CARD = "model.safetensors", "README.md"
HEAD, EMBEDDING, MAPS = "lm_head.weight", "embed_tokens.weight", ("d2t", "t2d")
UNUSED = ("verifier_norm.weight", "verifier_lm_head.weight")  # the target's, for training alone
ANGLES = "midlayer.self_attn.rotary_emb.inv_freq"  # [D / 2]: RoPE as it was trained with, in older ones
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TRAINED_TOKENS = 512  # length of the study's documents


def export_eagle3(
    drafter: Drafter, target: Target, folder: str | Path, *, dtype: torch.dtype | None = None,
    trained_tokens: int = TRAINED_TOKENS,
) -> Path:  # fmt: skip
    """Write ``model.safetensors``, ``config.json`` and a card as EAGLE-3 checkpoints have them; returns the folder.

    Parameters
    ----------
    dtype : of the weights; None: as they are.
    trained_tokens : length of the longest documents that it was trained on, told as ``max_position_embeddings``.

    Raises
    ------
    StudyError : a drafter that the format has no place for, or of another target.
    """
    own, folder = drafter.config, Path(folder)
    check_origin(drafter.spec, target, f"the drafter for {folder} was trained")
    turn = drafter.sizes.rope_parameters.get("rope_type", "default")
    for told, present in (
        (f"paradigm={own.paradigm!r}", own.paradigm != "hidden"),
        ("qk_norm=True", own.qk_norm),
        (f"window_tokens={own.window_tokens}", own.window_tokens > 0),
        (f"capped logits ({drafter.logit_cap:g})", drafter.logit_cap),
        (f"{turn} RoPE, which turns by the length", turn not in ROPE_TYPES),
    ):
        if present:
            raise StudyError(f"EAGLE-3 has no place for a drafter with {told}; export one of the study's 'hidden'")
    state, names, ids = drafter.state_dict(), tensor_names(own), drafter.draft_ids.cpu()
    tensors = {theirs: state[ours] for ours, theirs in names.items()} | {HEAD: drafter.head}
    if own.hidden_norm:
        layers = range(len(drafter.spec.hidden_layers))
        tensors |= {f"fc_norm.{index}.weight": state["hidden_norm.weight"] for index in layers}
    if not torch.equal(drafter.embedding, target.model.get_input_embeddings().weight):  # scaled, as Gemma's
        tensors[EMBEDDING] = drafter.embedding
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous().clone() for name, tensor in tensors.items()}
    tensors["d2t"] = ids - torch.arange(len(ids))
    tensors["t2d"] = torch.zeros(len(drafter.embedding), dtype=torch.bool).index_fill_(0, ids, True)
    config = _config(drafter, str(tensors["fc.weight"].dtype).removeprefix("torch."), trained_tokens)
    write_atomically(folder / WEIGHTS, lambda p: save_file(tensors, p, {"format": "pt"}))
    text = json.dumps(config, indent=2) + "\n"  # no seal of ours: others may edit it
    write_atomically(folder / CONFIG, lambda p: p.write_text(text))
    write_atomically(folder / CARD, lambda p: p.write_text(_card(config)))
    return folder


def _config(drafter: Drafter, dtype: str, trained_tokens: int) -> dict:
    own, sizes, spec = drafter.config, drafter.sizes, drafter.spec
    rope = dict(sizes.rope_parameters)
    theta, scaled = rope.pop("rope_theta"), rope.get("rope_type", "default") != "default"
    if scaled:
        rope.setdefault("original_max_position_embeddings", sizes.max_position_embeddings)
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": own.num_layers,
        **{name: getattr(sizes, name) for name in (*SIZES, "rms_norm_eps", "hidden_act")},
        "max_position_embeddings": trained_tokens,
        "rope_theta": theta,
        "rope_scaling": rope if scaled else None,
        "vocab_size": len(drafter.embedding),
        "draft_vocab_size": len(drafter.draft_ids),
        "target_hidden_size": sizes.hidden_size,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "fc_norm": own.hidden_norm,
        "norm_output": own.feedback == "post_norm",
        "torch_dtype": dtype,
        LAYERS: list(spec.hidden_layers),
        "eagle_config": {"use_aux_hidden_state": True, LAYERS: [layer - 1 for layer in spec.hidden_layers]},
        "kvshot": {"target": spec.target, "target_hash": spec.target_hash, "tokenizer_hash": spec.tokenizer_hash},
    }


def _card(config: dict) -> str:
    """What a user of the folder should know."""
    kind = "EAGLE-3.1" if config["fc_norm"] and config["norm_output"] else "EAGLE-3"
    origin, length = config["kvshot"], config["max_position_embeddings"]
    return f"""# {kind} drafter for {origin["target"]}

| what | this drafter |
| :-- | :-- |
| target | {origin["target"]}, SHA-256 `{origin["target_hash"]}` of what changes its numbers |
| reads | inputs of the target's layers {config[LAYERS]}, counted from 0; normed: {config["fc_norm"]} |
| layers | {config["num_hidden_layers"]}; state fed back after the final norm: {config["norm_output"]} |
| drafts | {config["draft_vocab_size"]:,} of {config["vocab_size"]:,} tokens |
| trained on | texts of up to {length} tokens (`max_position_embeddings`); at longer contexts it accepts less |

vLLM: `speculative_config={{"method": "eagle3", "model": FOLDER, "num_speculative_tokens": 3}}`.
"""


def import_eagle3(
    folder: str | Path, target: Target, tensors: Mapping[str, torch.Tensor] | None = None, **overrides: object
) -> Drafter:
    """Read an EAGLE-3 checkpoint, exported here or published, as a `hidden` drafter with an LM head of its own.

    Others' checkpoints don't say which weights they were trained for: only sizes can be checked.

    Parameters
    ----------
    tensors : in place of the folder's own (`read_tensors`).
    overrides : fields of ``config.json`` to take instead, such as ``rope_theta=10_000``: some drafters were trained
        with that base whatever their config says, and accept less with another. ``norm_output=False`` is for
        SpecForge's of before September 2026, which said true of plain EAGLE-3.

    Raises
    ------
    StudyError : no such checkpoint, one of another shape than the target's, or one with parts that
        `hidden` doesn't have.
    """
    folder = Path(folder)
    found, tensors = read_config(folder, overrides), dict(read_tensors(folder) if tensors is None else tensors)
    _check_target(found, target, folder)
    spec = feature_spec(target, fused_layers=fused_layers(found, target.num_layers))
    config = DrafterConfig(
        "hidden", found.get("num_hidden_layers", 1), feedback="post_norm" if found.get("norm_output") else "pre_norm",
        hidden_norm=found.get("fc_norm", False), qk_norm="midlayer.self_attn.q_norm.weight" in tensors,
    )  # fmt: skip
    ids = _draft_ids(tensors, found, folder)
    raw, head = target.model.get_input_embeddings().weight.cpu(), tensors.pop(HEAD, None)
    embedding = tensors.pop(EMBEDDING, raw)
    if head is None:
        tied = embedding if found.get("tie_word_embeddings") else target.model.get_output_embeddings().weight.cpu()
        head = tied[ids]
    shapes, size = f"{HEAD} {tuple(head.shape)}, {EMBEDDING} {tuple(embedding.shape)}", found["hidden_size"]
    said = found.get("draft_vocab_size", len(ids))
    if said != len(ids) or head.shape != (len(ids), size) or embedding.shape != (found["vocab_size"], size):
        raise StudyError(f"{folder} maps {len(ids)} draft tokens, says {said}, and has {shapes}; that doesn't fit")
    turned = tensors.pop(ANGLES, None)
    state = _state(tensors, config, len(spec.hidden_layers), folder)
    try:
        drafter = Drafter(config, spec, layer_sizes(found), ids, embedding, head)
    except Exception as error:  # whatever sizes make of it
        raise StudyError(f"{folder / CONFIG} describes no layer ({str(error).strip().splitlines()[-1]})") from error
    own = drafter.rotary.inv_freq
    if turned is not None and turned.shape == own.shape and not torch.allclose(turned, own, rtol=0.02):
        base, said = float(turned[1]) ** -len(turned), found["rope"]["rope_theta"]
        raise StudyError(f"{folder} says rope_theta={said:g} but was trained at about {base:.3g}; give rope_theta=…")
    load_weights(drafter, state, f"{folder}: {CONFIG} and {WEIGHTS} don't fit")
    return drafter.to(target.device).eval()


def _check_target(found: dict, target: Target, folder: Path) -> None:
    """Refuse another target: by its sizes, and by its hashes in an export of ours."""
    sizes = {"hidden_size": target.config.hidden_size, "vocab_size": target.config.vocab_size}
    sizes["target_hidden_size"] = sizes["hidden_size"]
    for name, size in sizes.items():
        if found.get(name, size) != size:
            told = f"{folder} has {name}={found[name]}, target {target.name} {size}"
            raise StudyError(f"{told}; load the target that it was trained for")
    if origin := found.get("kvshot"):
        check_origin(origin, target, f"{folder} was trained")


def _draft_ids(tensors: dict[str, torch.Tensor], found: dict, folder: Path) -> torch.Tensor:
    """Target ids [V_draft] of the draft vocabulary, from ``d2t``, ``t2d``, or all of them; both taken out."""
    to_target, marked = tensors.pop("d2t", None), tensors.pop("t2d", None)
    vocab_size = found["vocab_size"]
    kept = None if marked is None else marked.nonzero().flatten()
    if to_target is None:
        rows = len(tensors[HEAD]) if HEAD in tensors else found.get("draft_vocab_size", vocab_size)
        if kept is None and rows != vocab_size:
            raise StudyError(f"{folder} drafts {rows} of {vocab_size} tokens and has no map to them (d2t or t2d)")
        ids = torch.arange(rows) if kept is None else kept
    elif to_target.is_floating_point() or to_target.dim() != 1:
        raise StudyError(f"{folder} has a d2t of {to_target.dtype}, {to_target.dim()}-dimensional; offsets are whole")
    else:
        ids = torch.arange(len(to_target)) + to_target.long()
    if marked is not None and (len(marked) != vocab_size or not torch.equal(ids.sort().values, kept)):
        raise StudyError(f"{folder}: d2t and t2d name different tokens; delete the damaged one if you know which")
    inside = len(ids) and 0 <= int(ids.min()) and int(ids.max()) < vocab_size
    if not inside or len(ids.unique()) < len(ids):
        raise StudyError(f"{folder}: d2t names tokens twice or outside 0 … {vocab_size - 1}; fetch it again")
    if kept is None and to_target is not None and len(ids) < vocab_size and not to_target.any():
        raise StudyError(f"{folder}: d2t is all zero, so no vocabulary map was written; add t2d, or the map itself")
    return ids


def _state(tensors: dict[str, torch.Tensor], config: DrafterConfig, fused: int, folder: Path) -> dict:
    """The drafter's weights under our names; refuse missing ones and any other."""
    names = tensor_names(config)
    norms = [f"fc_norm.{index}.weight" for index in range(fused)] if config.hidden_norm else []
    wanted = {*names.values(), *norms}
    if missing := sorted(wanted - {*tensors}):
        raise StudyError(f"{folder} lacks {', '.join(missing)}: that is no EAGLE-3 drafter as its {CONFIG} says")
    if unknown := sorted({*tensors} - wanted):
        raise StudyError(f"{folder} has {', '.join(unknown)}, which the study's 'hidden' doesn't have")
    state = {ours: tensors[theirs] for ours, theirs in names.items()}
    if norms:
        gains = [tensors[name] for name in norms]
        state["hidden_norm.weight"] = gains[0]
        if not all(torch.equal(gain, gains[0]) for gain in gains):
            state["hidden_norm.weight"] = torch.ones_like(gains[0])
            state["fuse_hidden.weight"] = state["fuse_hidden.weight"] * torch.cat(gains)
    return state


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors, from one file or several, under EAGLE's names; floats as float32."""
    paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not paths:
        raise StudyError(f"no {WEIGHTS} or pytorch_model.bin in {folder}; give the folder of an EAGLE-3 checkpoint")
    found: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            safe = path.suffix == ".safetensors"
            read = dict(load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # of several libraries
            raise StudyError(f"{path} can't be read ({type(error).__name__}); fetch it again") from error
        for name, tensor in read.items():
            name = name.removeprefix("model.").replace("layers.0.", "midlayer.", 1)
            if name.endswith(UNUSED):
                continue
            if name in found:
                raise StudyError(f"{folder} has {name} twice; keep one of its copies")
            kind = getattr(tensor, "dtype", type(tensor))
            if not isinstance(tensor, torch.Tensor) or (kind not in FLOATS and name not in MAPS):
                raise StudyError(f"{folder} has {name} in {kind}; export weights alone, and unquantised")
            if not tensor.isfinite().all():
                raise StudyError(f"{folder} has {name} with values that are not finite; fetch it again")
            found[name] = tensor if name in MAPS else tensor.float()
    return found

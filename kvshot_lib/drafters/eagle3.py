"""`hidden` drafters in the format of EAGLE-3 checkpoints, which vLLM and SGLang serve; and theirs read for our metrics.

python -m kvshot_lib.drafters.eagle3 export RUN_FOLDER OUT [--target NAME] [--dtype bfloat16]
python -m kvshot_lib.drafters.eagle3 import FOLDER [--target NAME] [--corpus NAME] [--documents 64]    prints its acceptance

What must agree, and where it is easy to be wrong by one:

- Layers. EAGLE and vLLM count hidden states as inputs of decoder layers (2, L/2, L-3), as the study does; ``eagle_config``, which
  SGLang reads, names the layers whose outputs they are, one less each.
- Norms. ``input_layernorm`` is the embedding's, ``hidden_norm`` the state's; attention reads [embedding; state], the residual is the
  state before its norm, and what is fed back is the output before the final norm (`feedback=pre_norm`).
- Positions. The entry of (f_t, x_{t+1}) is at t+1 here and at t in EAGLE; RoPE only sees differences, so both draft the same.
- Draft vocabulary. ``d2t`` holds offsets: draft token i is target token i + d2t[i]; ``t2d`` marks target tokens that can be drafted.
- LM head. Our drafters use the target's rows; exported they are the checkpoint's own, and an imported one keeps what it brought.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from ..errors import StudyError, one_line_errors
from ..features.live import LiveFeatures
from ..features.spec import feature_spec
from ..files import read_json, write_atomically
from ..metrics.acceptance import count_run
from ..target.capture import hidden_layers
from ..target.load import Target, load_target
from ..target.smollm2 import DEFAULT_TARGET
from ..text.corpus import load_corpus
from ..training.judging import acceptance_by_step, match_documents
from .checkpoint import load_drafter
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
    """Read an EAGLE-3 checkpoint, exported here or published, as a `hidden` drafter of ``target``, with its own LM head.

    The checkpoint doesn't say which weights it was trained for: only sizes can be checked.

    Raises
    ------
    StudyError : no such checkpoint, one of another shape than the target's, or one with parts that `hidden` doesn't have.
    """
    folder = Path(folder)
    found, tensors = read_json(folder / CONFIG, "give the folder of an EAGLE-3 checkpoint"), _tensors(folder)
    check_config(found, folder)
    names, config = {theirs: ours for ours, theirs in NAMES.items()}, target.config
    state = {names[name]: tensors.pop(name) for name in names if name in tensors}
    missing = sorted(theirs for theirs, ours in names.items() if ours not in state)
    head, embedding = tensors.pop("lm_head.weight", None), tensors.pop("embed_tokens.weight", None)
    d2t, _ = tensors.pop("d2t", None), tensors.pop("t2d", None)
    if missing or tensors or head is None:
        told = (
            f"lacks {', '.join(missing or ['lm_head.weight'])}"
            if missing or head is None
            else f"has {', '.join(tensors)}"
        )
        raise StudyError(f"{folder} {told}: that is no EAGLE-3 drafter of one layer as the study has it")
    ids = torch.arange(len(head)) + (0 if d2t is None else d2t.long())
    embedding = target.model.get_input_embeddings().weight.cpu() if embedding is None else embedding
    if head.shape[1] != config.hidden_size or int(ids.max()) >= config.vocab_size or len(ids) != len(head):
        raise StudyError(
            f"{folder} drafts {len(head)} tokens up to {int(ids.max())} at width {head.shape[1]}, target {target.name} has "
            f"{config.vocab_size} at width {config.hidden_size}; load the target that it was trained for"
        )
    spec = feature_spec(target, fused_layers=fused_layers(found, target.num_layers))
    sizes = LlamaConfig.from_dict({name: value for name, value in found.items() if name != "eagle_config"})
    drafter = Drafter(DrafterConfig("hidden"), spec, sizes, ids, embedding, head)
    try:
        drafter.load_state_dict(state)
    except RuntimeError as error:
        raise StudyError(
            f"{folder}: {CONFIG} and {WEIGHTS} don't fit ({str(error).splitlines()[-1].strip()})"
        ) from error
    return drafter.to(target.device).eval()


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
    """Target layers whose inputs are fused: as named at the top (vLLM), in ``eagle_config`` (SGLang, one less), or EAGLE's own."""
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


def measure(drafter: Drafter, target: Target, corpus: str, documents: int, draft_length: int = 7) -> str:
    """Acceptance of an imported drafter on the corpus' evaluation answers, as text; features are captured on the fly."""
    source = LiveFeatures(target, load_corpus(corpus, "evaluation").documents[:documents], drafter.spec)
    matched = match_documents(source, drafter, draft_length, device=target.device, dtype=torch.float32)
    counts, run_lengths = count_run("imported", 0, matched)
    table = acceptance_by_step(counts).to_string(index=False, float_format="%.3f")
    accepted = run_lengths["accepted"].sum() / max(1, run_lengths["anchors"].sum())
    return (
        f"{table}\nmeasured MAT {1 + accepted:.3f} tokens per target forward, on {len(source)} answers of {target.name}"
    )


@one_line_errors
def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvshot_lib.drafters.eagle3", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="a trained `hidden` drafter -> the folder of an EAGLE-3 checkpoint")
    export.add_argument("run", type=Path, metavar="RUN_FOLDER", help=".../runs/hidden/seed0")
    export.add_argument("out", type=Path)
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    reading = commands.add_parser("import", help="measure an EAGLE-3 checkpoint with the study's metrics")
    reading.add_argument("folder", type=Path)
    reading.add_argument("--corpus", default="selfgen", help="its evaluation answers are drafted")
    reading.add_argument("--documents", type=int, default=64)
    for command in (export, reading):
        command.add_argument("--target", default=DEFAULT_TARGET, help="a name of the study, a hub id or a model folder")
    given = parser.parse_args(words)
    target = load_target(given.target, dtype="float32")
    if given.command == "export":
        print(export_eagle3(load_drafter(given.run, target), given.out, dtype=getattr(torch, given.dtype)))
    else:
        print(measure(import_eagle3(given.folder, target), target, given.corpus, given.documents))
    return 0


if __name__ == "__main__":
    sys.exit(main())

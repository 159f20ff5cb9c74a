"""What a drafter takes over from its target, *as the target uses it*: embedding, logits, last norm, RoPE.

Families differ in small ways that would be silent mistakes. Gemma scales its embedding inside the module and keeps
norm weights as gain - 1; some cap their logits; some have one RoPE for full and one for sliding layers. So what is
taken over is tried against the target's own forward; a family with a twist that isn't known here is refused by name.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import StudyError
from .capture import capture
from .load import Target, capped

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True)
class Shared:
    """embedding [V, d], scale included; head [V_draft, d]; logit_cap, 0 for none; norm [d] gains of the last norm."""

    embedding: Tensor
    head: Tensor
    logit_cap: float
    norm: Tensor


@torch.no_grad()
def shared_parts(target: Target, draft_ids: Tensor) -> Shared:
    """What a drafter over these target ids (on the target's device) shares with ``target``.

    Raises
    ------
    StudyError : the target's own input or logits are not what these parts give.
    """
    module, model = target.model.get_input_embeddings(), target.model
    plain = type(module) is nn.Embedding
    embedding = module.weight if plain else module(torch.arange(target.vocab_size, device=target.device))
    norm = norm_gain(model.get_decoder().norm, target.name)
    shared = Shared(embedding, model.get_output_embeddings().weight[draft_ids], target.logit_cap, norm)
    ids = torch.tensor([[1, 0, min(2, target.vocab_size - 1)]], device=target.device)
    with capture(model, hidden=[0]) as taken:
        logits = model(input_ids=ids, use_cache=False).logits[..., draft_ids]
    again = capped(taken.final["hidden"] @ shared.head.T, shared.logit_cap)
    if not torch.equal(taken.hidden_states[0], embedding[ids]):
        how = "changes its embeddings before the first layer, which"
    elif not torch.allclose(again.float(), logits.float(), rtol=2e-2, atol=2e-2 * float(logits.abs().max())):
        how = "forms its logits in a way that"
    else:
        return shared
    raise StudyError(f"target {target.name} ({type(model).__name__}) {how} no drafter imitates; choose another target")


def norm_gain(norm: nn.Module, target_name: str) -> Tensor:
    """What an RMS norm multiplies by, read off its own output: its weight, or 1 + weight as Gemma keeps it."""
    weight = norm.weight.float()
    for gain in (weight, 1 + weight):
        if torch.allclose(norm(torch.ones_like(weight)), gain, rtol=1e-4, atol=1e-4):
            return gain
    raise StudyError(
        f"target {target_name} has {type(norm).__name__} as its last norm; drafters need an RMS norm; "
        "choose another target"
    )


def rope_parameters(config) -> dict:
    """RoPE of the layers whose cache is reused: of the full-attention ones, where sliding ones have another.

    Raises
    ------
    StudyError : no RoPE (in some layers), one over part of each head only, or a type that the drafters don't know.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    kind, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor") or 1.0
    if not rope:
        why = f"a {config.model_type} target has no RoPE in its full-attention layers"
    elif 0 in (getattr(config, "no_rope_layers", None) or ()):
        why = f"a {config.model_type} target leaves RoPE out in some layers, drafters in none"
    elif kind not in ROPE_TYPES:
        why = f"RoPE of type {kind!r} is not known to the drafters, only {', '.join(ROPE_TYPES)}"
    elif share != 1.0:
        why = f"this target rotates {share:.0%} of each head, drafters all of it"
    else:
        return dict(rope)
    raise StudyError(f"{why}; choose another target")


def rope_limit(config) -> int | None:
    """Tokens up to which the angles of a position don't depend on how long the sequence is (None: however long).

    Beyond it ``dynamic`` and ``longrope`` turn every position otherwise: keys cached before no longer fit.
    """
    rope = rope_parameters(config)
    if rope.get("rope_type") == "dynamic":
        return rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else None


def check_length(target: Target, tokens: int, advice: str) -> None:
    """Refuse sequences on which the target's RoPE changes its angles on the way (`rope_limit`)."""
    limit = rope_limit(target.config)
    if limit is not None and tokens > limit:
        kind = rope_parameters(target.config)["rope_type"]
        raise StudyError(
            f"{tokens} tokens: the {kind} RoPE of target {target.name} turns cached keys otherwise "
            f"beyond {limit} tokens; {advice}"
        )

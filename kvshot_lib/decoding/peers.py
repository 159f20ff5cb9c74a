"""What transformers decodes by itself, for comparison: `generate`, alone, with prompt lookup, and with an assistant model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..target.load import Target


@dataclass(frozen=True)
class Peer:
    """One way to call ``generate``.

    mode : ``alone``, ``prompt_lookup`` (drafts copied from where the last tokens occurred before) or ``assisted``.
    plan : its setting, as tables name it; the tokens that are looked up at most, say.
    """

    mode: str
    plan: str
    arguments: dict


def peers(lookup_tokens: int = 10, assistant: PreTrainedModel | None = None) -> list[Peer]:
    """``generate`` alone, with prompt lookup and, if there is an assistant of the same vocabulary, with that."""
    found = [
        Peer("alone", "-", {}),
        Peer("prompt_lookup", str(lookup_tokens), {"prompt_lookup_num_tokens": lookup_tokens}),
    ]
    return found + ([Peer("assisted", "-", {"assistant_model": assistant})] if assistant is not None else [])


@torch.inference_mode()
def generate(target: Target, prompt: Sequence[int], peer: Peer, max_new_tokens: int) -> tuple[list[int], int]:
    """Greedy answer to one prompt, and how many forwards of the target it took (the first over the prompt included)."""
    forwards, model = [0], target.model

    def count(*_) -> None:
        forwards[0] += 1

    ids = torch.tensor([list(prompt)], device=target.device)
    handle = model.register_forward_pre_hook(count)
    try:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
            eos_token_id=target.eos_token_id, pad_token_id=target.eos_token_id, **peer.arguments,
        )  # fmt: skip
    finally:
        handle.remove()
    return out[0, len(prompt) :].tolist(), forwards[0]

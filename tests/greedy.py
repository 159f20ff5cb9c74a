"""Small prompts, the target's own greedy answers to them, and drafters that have learned part of these answers by heart."""

from functools import cache

import numpy as np
import torch
from blocks import block_drafter, steps_of
from examples import VARIANTS, drafter, live_of, target

from kvshot_lib.text.corpus import Document
from kvshot_lib.training.loss import ttt_loss

NEW = 24


def prompt(seed: int, length: int = 9) -> list[int]:
    return np.random.default_rng([7, seed]).integers(3, 512, length).tolist()


@cache
def alone(name: str, seed: int, length: int = 9, new: int = NEW) -> list[int]:
    """The target's own greedy answer: the argmax of a plain forward without any cache, token by token."""
    tokens = prompt(seed, length)
    with torch.no_grad():
        for _ in range(new):
            tokens.append(int(target(name).model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[length:]


@cache
@torch.enable_grad()
def trained(variant: str, name: str = "tiny-llama"):
    """A drafter to which long runs, short ones and misses all happen."""
    answered = sorted({token for seed in range(3) for token in alone(name, seed)})
    known = torch.tensor(answered[: len(answered) * 9 // 10])
    built = (drafter if variant in VARIANTS else block_drafter)(variant, name, known)
    tokens = [np.array(prompt(seed) + alone(name, seed), dtype=np.int32) for seed in range(2)]
    features = live_of(*(Document(part, np.arange(len(part)) >= 9) for part in tokens), name=name).batch([0, 1])
    optimiser = torch.optim.AdamW(built.parameters(), lr=5e-3)
    steps = 5 if variant in VARIANTS else steps_of(built)
    for _ in range(25):
        ttt_loss(built, features, ttt_steps=steps).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return built.eval()

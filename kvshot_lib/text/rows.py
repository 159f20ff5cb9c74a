"""Texts written many at a time with fixed shapes, for GPUs: each row takes up the next text when its own has ended.

All rows take one step together, over one new column of a cache that is written round and round. The position in a
column tells a row what it holds, so rows can be at different places of their texts. A prompt goes in token by token. No
text is longer than the cache, so none loses an entry. A step is a CUDA graph; the host looks at every sixteenth.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils._triton import has_triton

from ..errors import StudyError
from ..target.load import Target
from ..target.static import EMPTY, PlacedCache, address, recorded, static_forward

ROWS = 1024  # at most, of one step
STEPS = 16  # between two looks at what has ended


def write_rows(
    target: Target, prompts: Sequence[np.ndarray], stops: Sequence[int], length: int, new: int, *, rows: int,
    temperature: float = 0.0, top_p: float = 1.0,
) -> Iterator[tuple[int, np.ndarray]]:  # fmt: skip
    """Continue every prompt up to and including its first stop token: its number and int32 [new tokens], as they end.

    Parameters
    ----------
    length : tokens of a text at most, prompt included. new : tokens of a continuation at most.
    rows : texts in hand at a time. temperature : 0 takes the most likely token; draws follow torch's global seed.

    Notes
    -----
    A token's draw is that of its row and step: equal prompts, rows and seed give equal texts on one machine.
    """
    if new < 1 or max(map(len, prompts), default=0) >= length:
        raise StudyError(f"no room for {new} tokens behind prompts in texts of {length}; give shorter prompts")
    told = rows, length, temperature, top_p, tuple(stops)
    writer = writer_of(Writer, address(target.model), target, *told)
    writer.restart()
    waiting, inside = list(enumerate(prompts))[::-1], {}
    while waiting or inside:
        free = np.flatnonzero(writer.ended.cpu().numpy()).tolist()
        ended = [row for row in free if row in inside]
        for row, text in zip(ended, writer.written(ended)):
            number, begun = inside.pop(row)
            yield number, text[begun:]
        begun = {row: waiting.pop() for row in free[: len(waiting)]}
        inside |= {row: (number, len(prompt)) for row, (number, prompt) in begun.items()}
        writer.begin({row: prompt for row, (_, prompt) in begun.items()}, new)
        for _ in range(STEPS if inside else 0):
            writer.step()


def rows_at_once(target: Target, length: int, texts: int) -> int:
    """`ROWS`, or as many as there are texts, or as have room in a third of the GPU's memory."""
    config, most = target.config, min(ROWS, texts)
    if target.device.type != "cuda":
        return most
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    entries = 2 * target.num_layers * config.num_key_value_heads * head * length * target.dtype.itemsize
    scores = 20 * target.vocab_size  # logits, probabilities and noise, in float32 for the most part
    room = torch.cuda.get_device_properties(target.device).total_memory // 3
    return max(1, min(most, room // (entries + scores)))


def mass_from(probabilities: Tensor, least: Tensor) -> Tensor:
    """Mass [3, B] of what has at least the probabilities ``least`` [3, B] in each row of [B, V]."""
    return torch.stack([(probabilities * (probabilities >= part[:, None])).sum(-1) for part in least])


def sampled(logits: Tensor, noise: Tensor, temperature: float, top_p: float, mass: Callable = mass_from) -> Tensor:
    """A token [B] of each row of [B, V], drawn after temperature and top-p by ``noise`` [B, V] ~ Exp(1).

    argmax p / noise is distributed as p (the exponential race).
    """
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        least = least_probability(probabilities, top_p, mass)
        probabilities = probabilities * (probabilities >= least[:, None])
    return (probabilities / noise).argmax(-1)


def least_probability(probabilities: Tensor, top_p: float, mass: Callable = mass_from) -> Tensor:
    """The least probability [B] that top-p keeps in each row of [B, V] float32, without sorting them.

    Kept is what has less than ``top_p`` of the mass above it: all p ≥ t, with t the largest for which Σ p[p ≥ t] ≥
    ``top_p``. Positive floats are ordered as their bits are, so t is found two bits at a time, from the highest.
    """
    bits = torch.zeros(len(probabilities), dtype=torch.int32, device=probabilities.device)
    parts = torch.arange(1, 4, dtype=torch.int32, device=probabilities.device)[:, None]
    for shift in range(28, -1, -2):  # below 2.0, so the two highest bits are 0
        enough = mass(probabilities, (bits + (parts << shift)).view(torch.float32)) >= top_p
        bits = bits + (enough.sum(0, dtype=torch.int32) << shift)
    return bits.view(torch.float32)


class Writer:
    """``rows`` texts of at most ``length`` tokens, a step of all of them, and which have ``ended``.

    ``place`` [B] : of the token that goes in next. ``given``, ``limit`` [B] : tokens of the prompt, and at most of all.
    """

    def __init__(self, target: Target, rows: int, length: int, temperature: float, top_p: float, stops: Sequence[int]):
        self.target, self.temperature, self.top_p, device = target, temperature, top_p, target.device
        columns = -(-length // 8) * 8  # as the attention kernel likes its mask
        numbers = lambda *shape: torch.zeros(shape, dtype=torch.int64, device=device)
        self.cache, self.text, self.column = PlacedCache(target, columns), numbers(rows, length + 1), numbers()
        self.place, self.given, self.limit = numbers(rows), numbers(rows), numbers(rows)
        self.held, self.stops = numbers(rows, columns), torch.tensor(stops, device=device)
        self.ended = torch.ones(rows, dtype=torch.bool, device=device)
        self.noise = torch.ones(rows, target.vocab_size if temperature else 0, device=device)
        self.draws = torch.Generator(device)  # its own: what is recorded on the way can't move it
        self.mass = torch.compile(mass_from, dynamic=False) if device.type == "cuda" and has_triton() else mass_from
        self.recorded = recorded(self.forward, device)

    def restart(self) -> None:
        """No text in hand, and the draws that follow torch's global seed now."""
        self.draws.manual_seed(int(torch.randint(2**62, ())))
        self.ended.fill_(True)
        self.column.zero_()

    def begin(self, prompts: Mapping[int, np.ndarray], new: int) -> None:
        """New texts in rows that have ended, of at most ``new`` tokens more than the prompt."""
        if not prompts:
            return
        lengths = np.array([len(prompt) for prompt in prompts.values()])
        padded = np.zeros((len(prompts), lengths.max()), dtype=np.int64)
        for row, prompt in zip(padded, prompts.values()):
            row[: len(prompt)] = prompt
        limits = np.minimum(lengths + new, self.text.shape[1] - 1)
        put = lambda array: torch.from_numpy(array).to(self.text.device)
        rows = put(np.array([*prompts]))
        self.text[rows, : padded.shape[1]] = put(padded)
        self.given[rows], self.limit[rows] = put(np.stack([lengths, limits]))
        self.held[rows], self.place[rows], self.ended[rows] = EMPTY, 0, False

    def written(self, rows: Sequence[int]) -> list[np.ndarray]:
        """The texts of rows that have ended, int32."""
        chosen = torch.tensor(rows, dtype=torch.int64, device=self.text.device)
        texts, lengths = self.text[chosen].cpu().numpy().astype(np.int32), (self.place[chosen] + 1).tolist()
        return [text[:length] for text, length in zip(texts, lengths)]

    def step(self) -> None:
        """One token more in every row that has not ended."""
        if self.temperature:
            self.noise.exponential_(generator=self.draws)
        self.recorded()

    def forward(self) -> None:
        """The step; an ended row goes on writing behind its end, where nobody reads."""
        here = self.place[:, None]
        self.held.index_copy_(1, self.column[None], here)
        ids = self.text.gather(1, here)
        logits = static_forward(self.target, self.cache, ids, here, self.column, self.held)[:, -1].float()
        after = self.place + 1
        own = after >= self.given
        token = torch.where(own, self.choose(logits, own), self.text.gather(1, after[:, None])[:, 0])
        self.text.scatter_(1, after[:, None], token[:, None])
        self.place.copy_(torch.where(self.ended, self.place, after))
        self.ended |= own & ((token[:, None] == self.stops).any(-1) | (after + 1 >= self.limit))
        self.column.copy_((self.column + 1) % len(self.cache.layers[0].keys[0, 0]))

    def choose(self, logits: Tensor, own: Tensor) -> Tensor:
        """The next token [B] of each row of logits [B, V]; it counts where ``own`` [B], behind the prompt."""
        if self.temperature:
            return sampled(logits, self.noise, self.temperature, self.top_p, self.mass)
        return logits.argmax(-1)


@lru_cache(maxsize=2)  # user turns are sampled, evaluation answers are not
def writer_of(kind: type[Writer], _address: int, target: Target, *how) -> Writer:
    """The writer of a kind for ``target``, made ``how``: recorded once, while the weights stay where they are."""
    return kind(target, *how)

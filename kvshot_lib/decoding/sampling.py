"""How a token is chosen, and a draft accepted: one rule for greedy decoding and for sampling, for chains and for trees.

Drafts are deterministic proposals: the drafter's most likely tokens, not samples of it. A node of the draft
has children x, y, … that compete for the same place; the target's distribution there (after temperature and
top-p) is p. Accept x with probability p(x); if rejected, set p(x) = 0, renormalise, and go on with y; if
none is left, the token is drawn from what remains. The token that comes out is distributed as p, whatever
was proposed:

    P(x) = p(x)      P(y) = (1 - p(x)) · p(y) / (1 - p(x)) = p(y)      P(z) = p(z), and so on

Greedy decoding is the same with p = 1 on the target's argmax.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import StudyError
from ..settings import check_settings

LEAST = 1e-6  # temperature: logits divided by less might not be finite


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from the target.

    temperature : divides the logits; 0 is greedy.
    top_p : keep the smallest set of most likely tokens whose mass reaches ``top_p``; 1 keeps all.
    seed : of the draws; a generator on the CPU, so that every device draws the same numbers.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        check_settings(self)
        if self.temperature != 0 and self.temperature < LEAST:
            raise StudyError(f"temperature={self.temperature} must be 0 (greedy), or {LEAST:g} and above")
        if not 0 < self.top_p <= 1:
            raise StudyError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise StudyError(f"seed={self.seed} must be 0 or more, and below 2**63")


GREEDY = Sampling()


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """[V] logits -> [V] float64 probabilities after temperature and top-p (temperature above 0)."""
    probabilities = (logits.double() / float(sampling.temperature)).softmax(-1)
    if sampling.top_p < 1:
        ranked, order = probabilities.sort(descending=True)
        dropped = order[ranked.cumsum(-1) - ranked >= sampling.top_p]  # the mass before it is enough already
        probabilities[dropped] = 0
        probabilities /= probabilities.sum()
    return probabilities


class Chooser:
    """Chooses the next token at a node of the draft; holds the generator of the draws."""

    def __init__(self, sampling: Sampling = GREEDY):
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(sampling.seed)

    def rows(self, logits: Tensor | list[int]) -> Sequence[Tensor | int]:
        """What `choose` reads at each node of [T, V]: if greedy the best token, all at one wait for the device."""
        greedy = self.sampling.temperature == 0 and isinstance(logits, Tensor)
        return logits.argmax(-1).tolist() if greedy else logits

    def choose(self, logits: Tensor | int, proposals: Sequence[int] = ()) -> tuple[int, int | None]:
        """The token where the target's logits are [V], and which of the ``proposals`` it is (None: none of them)."""
        if self.sampling.temperature == 0:
            token = logits if isinstance(logits, int) else int(logits.argmax())
            return token, proposals.index(token) if token in proposals else None
        return self.accept(distribution(logits, self.sampling), proposals)

    def accept(self, probabilities: Tensor, proposals: Sequence[int]) -> tuple[int, int | None]:
        """The rule of the module's docstring; [V] float64 ``probabilities`` are used up."""
        for place, token in enumerate(proposals):
            if self.uniform() < float(probabilities[token]):
                return token, place
            probabilities[token] = 0
            probabilities /= probabilities.sum()
        return self.draw(probabilities), None

    def draw(self, probabilities: Tensor) -> int:
        """A token drawn from [V] probabilities, by inverting their running sum."""
        total = probabilities.cumsum(-1)
        place = torch.searchsorted(total, self.uniform() * total[-1], right=True)
        return min(int(place), len(total) - 1)

    def uniform(self) -> float:
        """A number in [0, 1)."""
        return torch.rand((), dtype=torch.float64, generator=self.generator).item()

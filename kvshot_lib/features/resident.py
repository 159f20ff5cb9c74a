"""Features held in a device's memory, all or the newest: trainings must not wait for a disk, or each for the target."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from tqdm import tqdm

from .spec import STATE, Features, OfLayers, moved


class ResidentFeatures(OfLayers):
    """Everything of a source (`StoredFeatures`, `LiveFeatures`), loaded once; the same interface.

    Each field is one tensor [tokens + 1, …] of all documents end to end, and a row of zeros for the padding.
    """

    def __init__(self, source, device: torch.device | str, state: Sequence[str] = STATE, batch_documents: int = 64):
        super().__init__(source.spec)
        self.lengths, self.documents_hash, self.device = source.lengths, source.documents_hash, torch.device(device)
        self._lengths = torch.tensor(self.lengths, device=self.device)
        self._starts = self._lengths.cumsum(0) - self._lengths
        self._fields: dict[str, torch.Tensor] = {}
        order = sorted(range(len(source)), key=lambda i: self.lengths[i])
        for start in tqdm(range(0, len(order), batch_documents), desc="load features", mininterval=2):
            indices = order[start : start + batch_documents]
            batch = source.batch(indices, state).to(self.device)
            rows = self._rows(indices)
            for name in ("tokens", "answer_mask", *state):
                padded = getattr(batch, name)
                if name not in self._fields:
                    self._fields[name] = padded.new_zeros(sum(self.lengths) + 1, *padded.shape[2:])
                self._fields[name][rows] = padded
        for field in self._fields.values():
            field[-1] = 0  # padding was written there

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Sequence[int], state: Sequence[str] = STATE) -> Features:
        """The chosen documents, right-padded with zeros, on the device; ``state`` names the fields wanted."""
        rows = self._rows(indices)
        fields = {name: self._read(name, self._fields[name][rows]) for name in ("tokens", "answer_mask", *state)}
        return Features(documents=moved(torch.tensor(list(indices)), self.device), **fields)

    def _rows(self, indices: Sequence[int]) -> torch.Tensor:
        """Row of every token of these documents [B, n]; the last row, of zeros, for padding."""
        chosen = moved(torch.tensor(list(indices)), self.device)
        places = torch.arange(max(2, *(self.lengths[i] for i in indices)), device=self.device)
        real = places < self._lengths[chosen, None]
        return torch.where(real, self._starts[chosen, None] + places, sum(self.lengths))


class StreamedFeatures(OfLayers):
    """A source whose newest batches stay, with all ``state`` that any reads: one forward feeds all who take turns."""

    def __init__(self, source, state: Sequence[str] = STATE):
        super().__init__(source.spec)
        self.source, self.target, self.lengths = source, source.target, source.lengths
        self.documents_hash = source.documents_hash
        self._newest = lru_cache(maxsize=2)(lambda indices: source.batch(indices, state))  # one more: of `ShuffledKV`

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Sequence[int], state: Sequence[str] = STATE) -> Features:
        """The chosen documents, as from the source; ``state`` names the fields wanted."""
        whole = self._newest(tuple(indices)) if state else self.source.batch(indices, ())
        names = ("tokens", "answer_mask", "documents", *state)
        return Features(**{name: self._read(name, getattr(whole, name)) for name in names})

"""Features with another document's KV cache: a control that keeps everything but the content of the prefix."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from .spec import STATE, Features


class ShuffledKV:
    """A source of features whose keys and values come from another document (``kv_control="shuffled"``).

    Documents are ranked by length and each takes the KV of the next in rank (the last that of the first), so that
    lengths are about equal; where the other document is shorter, its entries are repeated from its start.

    fields : of `Features` that are another document's; ``hidden_states`` may be one.
    """

    def __init__(self, source, fields: Sequence[str] = ("keys", "values")):
        self.source, self.spec, self.lengths, self.fields = source, source.spec, source.lengths, fields
        self.documents_hash = f"shuffled {source.documents_hash}"
        ranked = sorted(range(len(source)), key=lambda i: (self.lengths[i], i))
        self.partner = dict(zip(ranked, ranked[1:] + ranked[:1], strict=True))

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: Sequence[int], state: Sequence[str] = STATE) -> Features:
        """As the source's, with keys and values of each document's partner."""
        features = self.source.batch(indices, state)
        wanted = [name for name in self.fields if name in state]
        if not wanted:
            return features
        partners = [self.partner[i] for i in indices]
        others = self.source.batch(partners, wanted)
        device, length = features.tokens.device, features.tokens.shape[1]
        lengths = torch.tensor([self.lengths[i] for i in partners], device=device)
        rows = torch.arange(length, device=device) % lengths[:, None]
        documents = torch.arange(len(partners), device=device)[:, None]
        return replace(features, **{name: getattr(others, name)[documents, rows] for name in wanted})

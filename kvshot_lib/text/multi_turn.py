"""Dialogues of many turns that the target writes by itself: it plays user and assistant, up to a length.

It samples a user turn behind the bare header, then its own answer, then the next user turn with all before it in view,
and so on; what the chat template puts between turns is put in. A turn that doesn't end in time is ended.
"""

import numpy as np
import torch
from torch import Tensor
from tqdm import trange

from ..target.chat import chat_headers, turn_header
from ..target.load import Target
from ..target.static import address
from .corpus import Document
from .rows import Writer, rows_at_once, writer_of

USER, ASSISTANT = 0, 1


class DialogueWriter(Writer):
    """A `Writer` whose rows are dialogues, all of ``length`` tokens.

    most : tokens of a user turn and of an answer, at most. ``own`` [B, length + 1] says which tokens are the answers',
    an end that the target chose included. Of each row: whose turn it is (``speaker``), tokens ``spent`` on it, and the
    ``framing`` token that comes next (0: none).
    """

    def __init__(self, target: Target, rows: int, length: int, temperature: float, top_p: float, most: tuple[int, int]):
        device = target.device
        opening, after_user = chat_headers(target.tokenizer)
        frames = [after_user, turn_header(target.tokenizer)]
        padded = np.zeros((2, max(map(len, frames))), dtype=np.int64)
        for row, frame in zip(padded, frames):
            row[: len(frame)] = frame
        self.opening, self.frames = opening, torch.from_numpy(padded).to(device)
        self.sizes, self.most = torch.tensor([*map(len, frames)], device=device), torch.tensor(most, device=device)
        self.special = torch.zeros(target.vocab_size, dtype=torch.bool, device=device)
        self.special[sorted(target.special_ids)] = True
        self.speaker, self.spent, self.framing = torch.zeros(3, rows, dtype=torch.int64, device=device).unbind()
        self.own = torch.zeros(rows, length + 1, dtype=torch.bool, device=device)
        super().__init__(target, rows, length, temperature, top_p, stops=())

    def write(self) -> list[Document]:
        """One dialogue a row."""
        self.restart()
        for state in (self.speaker, self.spent, self.framing, self.own):
            state.zero_()
        rows, length = len(self.ended), self.text.shape[1] - 1
        self.begin(dict.fromkeys(range(rows), self.opening), length)
        for _ in trange(length - 1, desc=f"{rows} dialogues", unit="token", leave=False, position=0):
            self.step()
        masks = self.own.cpu().numpy()
        return [Document(text, mask[: len(text)]) for text, mask in zip(self.written(range(rows)), masks, strict=True)]

    def choose(self, logits: Tensor, begun: Tensor) -> Tensor:
        """What the speaker says, or the next token of the frame around its turn; ``begun`` [B]: the header is in."""
        silent = (self.spent == 0)[:, None] & self.special
        said = super().choose(logits.masked_fill(silent, float("-inf")), begun)
        frame, late = self.frames[self.speaker], self.spent >= self.most[self.speaker]
        ends = (self.framing == 0) & (late | self.special[said])
        framed = ends | (self.framing > 0)
        token = torch.where(framed, frame.gather(1, self.framing[:, None])[:, 0], said)
        chosen = ~framed | (ends & ~late & (said == token))
        answered = (self.speaker == ASSISTANT) & chosen & begun
        self.own.scatter_(1, self.place[:, None] + 1, answered[:, None])
        place = (self.framing + 1) * (framed & begun)
        done = place == self.sizes[self.speaker]
        self.spent.copy_((self.spent + (begun & ~framed)) * ~done)
        self.framing.copy_(place * ~done)
        self.speaker.copy_(self.speaker ^ done)
        return token


@torch.inference_mode()
def write_dialogues(
    target: Target, count: int, length: int, most: tuple[int, int], *, temperature: float, top_p: float
) -> list[Document]:
    """``count`` dialogues of ``length`` tokens each; draws follow torch's global seed.

    Parameters
    ----------
    most : tokens of a user turn and of an answer, at most.
    """
    rows, documents = rows_at_once(target, length, count), []
    how = rows, length, temperature, top_p, most
    writer = writer_of(DialogueWriter, address(target.model), target, *how)
    while len(documents) < count:
        documents += writer.write()
    return documents[:count]

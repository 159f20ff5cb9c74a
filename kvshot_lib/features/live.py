"""Target state computed when it is asked for: no disk, one forward of the target a batch."""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from ..errors import StudyError
from ..settings import check_value
from ..target.capture import capture, check_layers
from ..target.load import Target
from ..target.shared import check_length
from ..text.corpus import Document, check_tokenizer
from .spec import STATE, Features, FeatureSpec, check_origin, pad_documents


class LiveFeatures:
    """Features captured on the fly: no disk, one target forward a batch.

    Documents are cut to ``max_length_tokens``; those whose answer begins behind that are left out, and a line says so.

    Raises
    ------
    StudyError : layers or state of another target; documents that another tokenizer wrote; no answer that is left.
    """

    def __init__(self, target: Target, documents: Sequence[Document], spec: FeatureSpec, max_length_tokens: int = 512):
        check_origin(spec, target, "these layers were chosen")
        if check_value("max_length_tokens", max_length_tokens, int) < 1 or not documents:
            raise StudyError(f"{len(documents)} documents of {max_length_tokens} tokens at most hold nothing to read")
        check_tokenizer(target, documents)
        self.target, self.spec, self.max_length_tokens = target, spec, max_length_tokens
        self.given_documents, self.documents = len(documents), _cut(documents, max_length_tokens)
        self.lengths = [len(document.tokens) for document in self.documents]
        check_length(target, max(self.lengths), "set a smaller max_length_tokens")

    def __len__(self) -> int:
        return len(self.documents)

    def with_layers(self, kv: Sequence[int] | None = None, hidden: Sequence[int] | None = None) -> "LiveFeatures":
        """The same documents, with cache and hidden states of other target layers (None: of the same)."""
        check_layers(self.target.model, hidden or (), kv or ())
        view = copy.copy(self)
        view.spec = self.spec.of_layers(kv, hidden)
        return view

    @property
    def documents_hash(self) -> str:
        """SHA-256 of all tokens and answer masks."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.tokens.astype("<i4").tobytes() + document.answer_mask.astype("u1").tobytes() + b"|")
        return digest.hexdigest()

    @torch.no_grad()  # not inference_mode: a drafter's backward can't use tensors made there
    def batch(self, indices: Sequence[int], state: Sequence[str] = STATE) -> Features:
        """Run the target on the chosen documents and return their features on its device, in its dtype."""
        plain = pad_documents(self.documents, indices).to(self.target.device)
        if not state:
            return plain
        model, spec = self.target.model, self.spec
        hidden = spec.hidden_layers if "hidden_states" in state else ()
        kv = spec.kv_layers if "keys" in state or "values" in state else ()
        with capture(model, hidden=hidden, kv=kv) as taken:
            model.get_decoder()(input_ids=plain.tokens, use_cache=False)
        read = {
            "hidden_states": lambda: torch.stack([taken.hidden_states[layer] for layer in hidden], dim=2),
            "keys": lambda: torch.stack([taken.keys[layer] for layer in kv], dim=2).permute(0, 3, 2, 1, 4),
            "values": lambda: torch.stack([taken.values[layer] for layer in kv], dim=2).permute(0, 3, 2, 1, 4),
            "final_hidden": lambda: taken.final["hidden"],
            "target_argmax": lambda: self.argmax(taken.final["hidden"]),
        }
        return replace(plain, **{name: read[name]() for name in state})

    def argmax(self, final_hidden: Tensor, rows: int = 2048) -> Tensor:
        """argmax p_t over the whole vocabulary, [B, n, d] -> [B, n] int64, by chunks of rows: logits are large."""
        flat = final_hidden.flatten(0, 1)
        found = torch.cat([self.target.logits(part).argmax(-1) for part in flat.split(rows)])
        return found.view(final_hidden.shape[:-1])


def _cut(documents: Sequence[Document], most: int) -> list[Document]:
    """The documents' first tokens, without those that lose their whole answer."""
    kept = [d.until(most) for d in documents if d.answer_mask[:most].any() or not d.answer_mask.any()]
    if not kept:
        raise StudyError(f"no answer begins within max_length_tokens={most}; set more")
    if gone := len(documents) - len(kept):
        was, now = (sum(int(d.answer_mask.sum()) for d in some) for some in (documents, kept))
        told = f"{gone} of {len(documents)} documents have no answer within max_length_tokens={most} and are left out"
        print(f"{told}; {was - now:,} of {was:,} answer tokens are cut", flush=True)
    return kept


def extraction_speed(live: LiveFeatures, indices: Sequence[int], repeats: int = 3) -> tuple[float, float]:
    """Tokens/s of extraction and of the bare forward (up to the argmax that decoding needs); medians, by turns."""
    decoder, batch = live.target.model.get_decoder(), live.batch(indices, ()).tokens
    bare = torch.inference_mode()(lambda: live.argmax(decoder(input_ids=batch, use_cache=False)[0]))
    timers = [Timer("run()", globals={"run": run}) for run in (lambda: live.batch(indices), bare)]
    rounds = [[timer.timeit(1).median for timer in timers] for _ in range(repeats)]  # timeit warms up itself
    return tuple(sum(live.lengths[i] for i in indices) / median(seconds) for seconds in zip(*rounds, strict=True))

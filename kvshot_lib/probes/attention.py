"""A drafter's attention over the target's KV cache: seen, replaced, and held against where the target looks itself.

The target at position p = t+1+k attends with true queries q_p over its own keys at s ≤ p. A drafter's step k at
anchor t sees exactly these places: the prefix s ≤ t, and one entry of its own for each of t+1 … t+1+k. So its
*layer's row*, the mean over heads of its weights on the prefix, is compared with the target's row at p, cut to
s ≤ t. (Heads of a drafter have no counterparts among the target's; a head that hardly reads the prefix counts
little in the mean.)

    js          Jensen-Shannon divergence in nats, 0 (the same row) … ln 2
    recall      share of the target's 8 largest prefix entries that are among the drafter's 8 largest

The primary measures leave out s = 0, the attention sink (`shift` says why); ``…_with_sink`` are over all s ≤ t.
Anchors with 8 prefix entries or fewer, sink apart, are left out: there every choice of 8 is right. Two rows of
the target alone say how to read the numbers:

    row_t            the target's own row at the anchor t: what is known without estimating anything
    other_document   its row at the same position of another document: recency and sink, nothing of this text
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..drafters.attention import Entries, chain_attention, extend
from ..drafters.drafter import Drafter
from ..drafters.hooks import watching
from ..training.anchors import Anchors
from ..training.ttt import draft_steps
from .target_rows import TargetState, jensen_shannon

TOP = 8
MEASURES = ("js", "js_with_sink", "recall", "recall_with_sink")


@dataclass(frozen=True)
class Call:
    """One attention at one draft step, of M anchors of one document.

    key : which of the attentions. inputs : [M, width] what the query projection reads. query : [1, H, M, D]. prefix :
    keys and values [1, G, N, D]. mask : [1, 1, M, N]. chain : keys and values [1, G, M, k+1, D]; one fewer, and None at
    step 0, where the newest prefix entry is the query's own.
    """

    key: Hashable
    draft_step: int
    inputs: Tensor
    query: Tensor
    prefix: Entries
    mask: Tensor
    chain: Entries | None

    @property
    def anchors(self) -> Tensor:
        """[M] t: an anchor sees t + 1 prefix entries."""
        seen = self.mask[0, 0] == 0
        return torch.where(seen, torch.arange(seen.shape[-1], device=seen.device), -1).amax(-1)

    def places(self, length: int) -> Tensor:
        """[M] the query's position t+1+k, clamped to a document of ``length`` tokens where the step isn't valid."""
        return (self.anchors + 1 + self.draft_step).clamp(max=length - 1)


Attend = Callable[[Call], Tensor]
"""What an attention gives: `Call` -> heads [1, H, M, D]"""


def own_query(call: Call) -> Tensor:
    """A drafter's own attention, unchanged."""
    return chain_attention(call.query, call.prefix, call.mask, call.chain)


def kv_attentions(drafter: Drafter) -> dict[int, nn.Module]:
    """Layer -> its attention over the target's KV."""
    return {index: getattr(layer, "cross", None) or layer.attention for index, layer in enumerate(drafter.layers)}


def attending(modules: Mapping[Hashable, nn.Module], attend: Attend) -> AbstractContextManager:
    """Within it attentions, each by its key, give what ``attend`` says: in one run of draft steps, uncompiled."""
    steps = Counter()

    def stand_in(key, _forward, inputs, rotary, prefix, mask, chain, append, asked):
        (query,) = modules[key].project(inputs if asked is None else asked, rotary, "q")
        chain = extend(chain, modules[key].project(inputs, rotary, "k", "v")) if append else chain
        call = Call(key, steps[key], inputs[0], query, prefix, mask, chain)
        steps[key] += 1
        return modules[key].merge(attend(call)), chain

    return watching(modules, "forward", stand_in)


@torch.no_grad()
def watch(drafter: Drafter, features, anchors: Anchors, steps: Sequence[int]) -> list[Call]:
    """Run the drafter over one document and keep its calls at some draft steps."""
    calls: list[Call] = []

    def see(call: Call) -> Tensor:
        if call.draft_step in steps:
            calls.append(call)
        return own_query(call)

    with attending(kv_attentions(drafter), see):
        for _ in draft_steps(drafter, features, anchors, max(steps) + 1):
            pass
    return calls


def scores(query: Tensor, prefix: Entries, mask: Tensor, chain: Entries | None) -> tuple[Tensor, Tensor]:
    """q k / √D in float32, on the prefix [B, G, R, M, N] (-inf where hidden) and on the chain [B, G, R, M, J].

    Arguments as for `chain_attention`; R query heads share each of G KV heads.
    """
    grouped, scale = query.unflatten(1, (prefix[0].shape[1], -1)).float(), query.shape[-1] ** -0.5
    on_prefix = grouped @ prefix[0][:, :, None].float().transpose(-1, -2) * scale + mask[:, None]
    if chain is None:
        return on_prefix, on_prefix[..., :0]
    return on_prefix, torch.einsum("bgrmd,bgmjd->bgrmj", grouped, chain[0].float()) * scale


def draft_mass(query: Tensor, prefix: Entries, mask: Tensor, chain: Entries) -> Tensor:
    """Share of each query's attention that goes to its chain, [B, H, M]; arguments as for `chain_attention`.

    With the log-sum-exps L_p, L_c of the scores of both it is exp(L_c) / (exp(L_p) + exp(L_c)) = sigmoid(L_c - L_p).
    """
    on_prefix, on_chain = scores(query, prefix, mask, chain)
    return torch.sigmoid(on_chain.logsumexp(-1) - on_prefix.logsumexp(-1)).flatten(1, 2)


def layer_row(call: Call, query: Tensor | None = None) -> Tensor:
    """The drafter's weights on the prefix, mean over heads: [M, N]. ``query`` [1, H, M, D] stands for its own."""
    parts = scores(call.query if query is None else query, call.prefix, call.mask, call.chain)
    weights = torch.cat(parts, -1).softmax(-1)[..., : parts[0].shape[-1]]
    return weights.flatten(1, 2)[0].mean(0)


def overlap(drafter: Tensor, target: Tensor, anchors: Tensor) -> Tensor:
    """``MEASURES`` of rows [M, N] of both at anchors [M]: [4, M]. Entries after the anchor don't count."""
    places = torch.arange(drafter.shape[-1], device=drafter.device)
    prefix = places <= anchors[:, None]
    kept = (prefix & (places > 0), prefix)
    divergences = [jensen_shannon(drafter * part, target * part) for part in kept]
    return torch.stack([*divergences, *(recall(drafter, target, part) for part in kept)])


def recall(drafter: Tensor, target: Tensor, kept: Tensor) -> Tensor:
    """Share of the target's ``TOP`` largest of the ``kept`` entries that are among the drafter's: [M, N] -> [M]."""
    chosen = []
    for row in (drafter, target):
        best = row.masked_fill(~kept, -1.0).topk(min(TOP, row.shape[-1])).indices
        chosen.append(torch.zeros_like(kept).scatter(1, best, True) & kept)
    return (chosen[0] & chosen[1]).sum(1) / chosen[1].sum(1)


def overlap_rows(calls: Iterable[Call], state: TargetState, layers: Sequence[int], valid: Tensor) -> list[dict]:
    """Rows of ``attention_overlap`` of one drafter on one document, but for its labels; valid [M, K]."""
    rows = []
    for call in calls:
        used = valid[:, call.draft_step] & (call.anchors > TOP)
        positions, mine = call.places(state.length)[used], layer_row(call)[used]
        for place, layer in enumerate(layers):
            true = state.rows(place, positions).mean(0)[:, : mine.shape[1]]
            rows += _row("drafter", call.key, layer, call.draft_step, overlap(mine, true, call.anchors[used]))
    return rows


def reference_rows(
    anchors: Tensor, valid: Tensor, steps: Sequence[int], state: TargetState, other: TargetState, layers: Sequence[int]
) -> list[dict]:
    """Rows of the references on one document: anchors [M] t, valid [M, K]; ``other`` is another document's state."""
    rows = []
    for k in steps:
        t = anchors[valid[:, k] & (anchors > TOP)]
        for place, layer in enumerate(layers):
            true, foreign = (s.rows(place, (t + 1 + k).clamp(max=s.length - 1)).mean(0) for s in (state, other))
            for source, row in (("row_t", state.rows(place, t).mean(0)), ("other_document", foreign)):
                row = nn.functional.pad(row, (0, max(0, state.length - row.shape[1])))[:, : state.length]
                rows += _row(source, None, layer, k, overlap(row, true, t))
    return rows


def _row(source: str, layer: int | None, target_layer: int, step: int, measured: Tensor) -> list[dict]:
    """One row, means over anchors; none if there are no anchors."""
    if not measured.shape[1]:
        return []
    means = dict(zip(MEASURES, measured.double().nanmean(1).tolist(), strict=True))
    labels = {"source": source, "draft_step": step, "layer": layer, "target_layer": target_layer}
    return [{**labels, "anchors": measured.shape[1], **means}]

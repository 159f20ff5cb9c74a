"""Does a drafter look where the target will look? Overlap of its attention over the prefix with the target's own at the same position.

At anchor t and draft step k the drafter attends from position t+1+k. The target's own attention at t+1+k, cut to the prefix s ≤ t, is
what a perfect estimate of the target's query would reproduce. Of both a *layer's row* is compared: the mean over heads of the weights
as they are, cut to the prefix and made to sum to 1. (Heads of a drafter have no counterparts among the target's, so heads can't be
compared one by one; and a head that hardly reads the prefix counts little in the mean.) Against each reused target layer:

    js          Jensen-Shannon divergence in nats, 0 (the same row) … ln 2
    recall      share of the target's 8 largest prefix entries that are among the drafter's 8 largest

**The sink.** As in `attention_shift` the primary measures leave out s = 0, where most heads put most of their mass whatever the query
is; ``js_with_sink`` and ``recall_with_sink`` are the same over all s ≤ t. Anchors with 8 prefix entries or fewer (sink apart) are left
out: there every choice of 8 is right.

References, of the target alone, say how to read these numbers:

    row_t            the target's own row at the anchor t, against its row at t+1+k: what is known without estimating anything
    other_document   the target's row at the same position of another document, next in length: recency and sink, nothing of this text
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..drafters.drafter import Drafter
from ..training.ttt import Anchors, draft_steps
from .kv_attention import Call, TargetState, attending, own_query
from .shift import jensen_shannon

TOP = 8
MEASURES = ("js", "js_with_sink", "recall", "recall_with_sink")


def layer_row(call: Call, query: Tensor | None = None) -> Tensor:
    """The drafter's attention weights on the prefix, mean over heads: [M, N]. ``query`` [1, H, M, D] stands for its own."""
    query = call.query if query is None else query
    grouped, scale = query.unflatten(1, (call.prefix[0].shape[1], -1)).float(), query.shape[-1] ** -0.5
    on_prefix = grouped @ call.prefix[0][:, :, None].float().transpose(-1, -2) * scale + call.mask[:, None]
    on_chain = torch.einsum("bgrmd,bgmjd->bgrmj", grouped, call.chain[0].float()) * scale
    weights = torch.cat([on_prefix, on_chain], -1).softmax(-1)[..., : on_prefix.shape[-1]]
    return weights.flatten(1, 2)[0].mean(0)


def overlap(drafter: Tensor, target: Tensor, anchors: Tensor) -> Tensor:
    """``MEASURES`` of rows [M, N] of both at anchors [M]: [4, M]. Entries after the anchor don't count."""
    places = torch.arange(drafter.shape[-1], device=drafter.device)
    prefix = places <= anchors[:, None]
    found = []
    for kept in (prefix & (places > 0), prefix):
        found += [jensen_shannon(drafter * kept, target * kept), recall(drafter, target, kept)]
    return torch.stack([found[0], found[2], found[1], found[3]])


def recall(drafter: Tensor, target: Tensor, kept: Tensor) -> Tensor:
    """Share of the target's ``TOP`` largest of the ``kept`` entries that are among the drafter's: [M, N] -> [M]."""
    chosen = []
    for row in (drafter, target):
        best = row.masked_fill(~kept, -1.0).topk(min(TOP, row.shape[-1])).indices
        chosen.append(torch.zeros_like(kept).scatter(1, best, True) & kept)
    return (chosen[0] & chosen[1]).sum(1) / chosen[1].sum(1)


@torch.no_grad()
def watch(drafter: Drafter, features, anchors: Anchors, steps: Sequence[int]) -> list[Call]:
    """Run the drafter over one document and keep its calls at some draft steps."""
    calls: list[Call] = []

    def see(call: Call) -> Tensor:
        if call.draft_step in steps:
            calls.append(call)
        return own_query(call)

    with attending(drafter, see):
        for _ in draft_steps(drafter, features, anchors, max(steps) + 1):
            pass
    return calls


def overlap_rows(calls: list[Call], state: TargetState, layers: Sequence[int], valid: Tensor) -> list[dict]:
    """Rows of ``attention_overlap`` (without variant, seed, document) of one drafter on one document; valid [M, K]."""
    rows = []
    for call in calls:
        used = valid[:, call.draft_step] & (call.anchors > TOP)
        positions, mine = call.places(state.queries.shape[2])[used], layer_row(call)[used]
        for place, layer in enumerate(layers):
            true = state.rows(place, positions).mean(0)[:, : mine.shape[1]]
            rows += _row("drafter", call.layer, layer, call.draft_step, overlap(mine, true, call.anchors[used]))
    return rows


def reference_rows(
    anchors: Tensor, valid: Tensor, steps: Sequence[int], state: TargetState, other: TargetState, layers: Sequence[int]
) -> list[dict]:
    """Rows of the references on one document: anchors [M] t, valid [M, K]; ``other`` is another document's state."""
    rows, length, theirs = [], state.queries.shape[2], other.queries.shape[2]
    for k in steps:
        used = valid[:, k] & (anchors > TOP)
        t = anchors[used]
        for place, layer in enumerate(layers):
            true = state.rows(place, (t + 1 + k).clamp(max=length - 1)).mean(0)
            foreign = state.rows(place, t).mean(0), other.rows(place, (t + 1 + k).clamp(max=theirs - 1)).mean(0)
            for source, row in zip(("row_t", "other_document"), foreign, strict=True):
                row = torch.nn.functional.pad(row, (0, max(0, length - row.shape[1])))[:, :length]
                rows += _row(source, None, layer, k, overlap(row, true, t))
    return rows


def _row(source: str, layer: int | None, target_layer: int, step: int, measured: Tensor) -> list[dict]:
    """One row, means over anchors; none if there are no anchors."""
    if not measured.shape[1]:
        return []
    means = dict(zip(MEASURES, measured.double().nanmean(1).tolist(), strict=True))
    labels = {"source": source, "draft_step": step, "layer": layer, "target_layer": target_layer}
    return [{**labels, "anchors": measured.shape[1], **means}]

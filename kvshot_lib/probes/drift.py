"""What changes along the draft steps of a drafter that is fed its state back: the state itself, and where it looks.

    state_cosine     cos(state fed to step k, the fused state g that the target has there), k ≥ 1
    attention_recall share of the 8 tokens that the target looks at most at t+1+k (of s ≤ t, without the first) that are
                     among the 8 that the drafter's last layer looks at most; mean over the target layers that it reads

`HELD` is the same of what is known at the anchor: its own state g_t, and the target's own attention at t. An entry of
the drafter at s is made from (g_s, x_{s+1}), so it stands at token s + 1.
"""

from collections.abc import Iterator

import torch
from torch import nn
from tqdm import tqdm

from ..drafters.drafter import Drafter
from ..target.load import Target, full_attention_layers
from ..training.anchors import find_anchors
from ..training.ttt import draft_steps
from .answers import ratio
from .attention import TOP, layer_row, recall, watch
from .target_rows import compute_state

DRIFT, HELD, COSINE, RECALL = "along the draft steps", "kept from the anchor", "state_cosine", "attention_recall"


@torch.no_grad()
def drift_rows(target: Target, drafter: Drafter, source, draft_length: int) -> Iterator[dict]:
    """Rows for `draw_ratios` of every answer of ``source``."""
    layers = [layer for layer in drafter.spec.hidden_layers if layer in full_attention_layers(target.model)]
    for document in tqdm(range(len(source)), "drift", unit="answer", mininterval=1):
        features = source.batch([document], drafter.reads).to(drafter.norm.weight.device, torch.float32)
        anchors = find_anchors(features.answer_mask, draft_length)
        valid, t = anchors.valid[0], anchors.index[0]
        _, fused = drafter.prefix(features)
        for k, _, output in draft_steps(drafter, features, anchors, draft_length - 1):
            used = valid[:, k + 1]
            true = fused[0, t[used] + 1 + k]
            for name, state in ((DRIFT, drafter.feedback(output)[0, used]), (HELD, fused[0, t[used]])):
                cosine = nn.functional.cosine_similarity(state, true, dim=-1)
                yield ratio(name, document, COSINE, k + 1, float(cosine.sum()), int(used.sum()))
        if not layers:
            continue
        state, last = compute_state(target, features.tokens[0], layers), len(drafter.layers) - 1
        for call in watch(drafter, features, anchors, range(draft_length)):
            used = valid[:, call.draft_step] & (t > TOP)
            if call.key == last and used.any():
                yield from _looks(call, state, used, document)


def _looks(call, state, used, document: int) -> Iterator[dict]:
    """Recall of the target's attention by the drafter's, and by the target's own at the anchor."""
    t, length = call.anchors[used], state.length
    mine = layer_row(call)[used].roll(1, 1)
    kept = torch.arange(mine.shape[1], device=t.device)
    kept = (kept > 0) & (kept <= t[:, None])
    sums = torch.zeros(2)
    for place in range(len(state.queries)):
        true = state.rows(place, call.places(length)[used]).mean(0)[:, : mine.shape[1]]
        before = state.rows(place, t).mean(0)[:, : mine.shape[1]]
        sums += torch.stack([recall(row, true, kept).sum() for row in (mine, before)]).cpu()
    for name, total in zip((DRIFT, HELD), (sums / len(state.queries)).tolist(), strict=True):
        yield ratio(name, document, RECALL, call.draft_step, total, len(t))

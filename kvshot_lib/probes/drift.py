"""What changes along the draft steps of a drafter that is fed its state back: the state itself, and where it looks.

    state_cosine     cos(state fed to step k, the fused state g that the target has there), k ≥ 1
    attention_recall share of the 8 tokens that the target looks at most at t+1+k (of s ≤ t, without the first) that are
                     among the 8 that the drafter's last layer looks at most; mean over the target layers that it reads

`HELD` is the same of what is known at the anchor: its own state g_t, and the target's own attention at t. An entry of
the drafter at s is made from (g_s, x_{s+1}), so it stands at token s + 1.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..drafters.drafter import Drafter
from ..target.load import Target, full_attention_layers
from ..training.anchors import find_anchors
from ..training.ttt import draft_steps
from .answers import ratio
from .attention import TOP, Call, attending, kv_attentions, layer_row, own_query, recall
from .target_rows import TargetState, compute_state

DRIFT, HELD, COSINE, RECALL = "along the draft steps", "kept from the anchor", "state_cosine", "attention_recall"


@torch.no_grad()
def drift_rows(target: Target, drafter: Drafter, source, draft_length: int) -> Iterator[dict]:
    """Rows for `draw_ratios` of every answer of ``source``."""
    layers = [layer for layer in drafter.spec.hidden_layers if layer in full_attention_layers(target.model)]
    for document in tqdm(range(len(source)), "drift", unit="answer", mininterval=1):
        features = source.batch([document], drafter.reads).to(drafter.norm.weight.device, torch.float32)
        anchors = find_anchors(features.answer_mask, draft_length)
        valid, t = anchors.valid[0], anchors.index[0]
        fused, calls = drafter.prefix(features)[1], []

        def see(call: Call, calls=calls) -> Tensor:
            calls.append(call)
            return own_query(call)

        with attending(kv_attentions(drafter), see):
            outputs = [output for *_, output in draft_steps(drafter, features, anchors, draft_length)]
        for k, output in enumerate(outputs[:-1]):
            used = valid[:, k + 1]
            true = fused[0, t[used] + 1 + k]
            for name, state in ((DRIFT, drafter.feedback(output)[0, used]), (HELD, fused[0, t[used]])):
                cosine = nn.functional.cosine_similarity(state, true, dim=-1)
                yield ratio(name, document, COSINE, k + 1, float(cosine.sum()), int(used.sum()))
        if not layers:
            continue
        state = compute_state(target, features.tokens[0], layers)
        held = [state.rows(place, t).mean(0) for place in range(len(layers))]
        for call in calls:
            used = valid[:, call.draft_step] & (t > TOP)
            if call.key == len(drafter.layers) - 1 and used.any():
                for name, found in zip((DRIFT, HELD), _recalls(call, state, held, used), strict=True):
                    yield ratio(name, document, RECALL, call.draft_step, found, int(used.sum()))


def _recalls(call: Call, state: TargetState, held: Sequence[Tensor], used: Tensor) -> list[float]:
    """Recall of the target's rows by the drafter's, and by ``held`` ones [M, n]: sums over the ``used`` anchors [M]."""
    t, place = call.anchors[used], torch.arange(state.length, device=used.device)
    kept, sums = (place > 0) & (place <= t[:, None]), torch.zeros(2)
    mine = nn.functional.pad(layer_row(call)[used], (1, 0))
    for layer, before in enumerate(held):
        true = state.rows(layer, call.places(state.length)[used]).mean(0)
        sums += torch.stack([recall(row, true, kept).sum() for row in (mine, before[used])]).cpu()
    return (sums / len(held)).tolist()

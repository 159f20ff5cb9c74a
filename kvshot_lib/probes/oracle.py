"""The causal test of query estimation: give a trained drafter the target's true queries, and see what comes back.

Five arms of each drafter. ``as_trained`` is the drafter itself; each other one replaces what its attention over
the target's KV gives, and has then its **output side** re-trained: in every layer the output projection of that
attention, the MLP and its norm, and the final norm. Everything else stays frozen. All arms see the same
documents, in the same order, with the same sampled anchors, optimiser and schedule, so equal tokens.

    own       its own query: what the extra training does by itself
    oracle    the target's true query at t+1+k, seen through the drafter's own key projection
    perfect   *perfect re-attention*: the target's own attention row at t+1+k, its weights at s ≤ t on the drafter's
              projected values, those at t+1 … t+1+k on the values of the drafter's own chain (the same places)
    random    a random direction at each position, as long as the drafter's own query

Head h of drafter layer j gets the query (or row) of head h of reused layer number (h + j) mod S.

**Through the same projection.** The drafter's keys are linear maps W_g k of all S · G cached key heads k of a
position, a true query q scores just one of them, (l, g). The oracle's query is the one whose scores through W_g
come nearest to the true ones, in least squares over the second moments C of the target's keys: q̃ = (W_g C
W_gᵀ)⁻¹ W_g C E_{l,g} q, with E_{l,g} q the query padded with zeros. It is a constant matrix for each head;
nothing of it is trained. If W_g picks (l, g) out, q̃ = q, and the row on the prefix is the target's own.

**What it can show.** The **gap** is perfect minus own, in expected MAT. If the oracle closes much of a gap that
is there, estimating the query is the bottleneck. No gap says that looking where the target looks brings nothing
*to these values and this re-training*: the own query had all of the drafter's training to fit the rest to it,
the others only this.

The target made its query at t+1+k from tokens up to x_{t+1+k}. The drafter has these tokens too (under teacher
forcing), but not what the target's lower layers make of them: oracle and perfect re-attention know more than
any drafter could.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..drafters.attention import chain_attention
from ..drafters.drafter import Drafter
from ..metrics.acceptance import COUNTS, count_document
from ..training.judging import judge, predict
from ..training.loss import ttt_loss
from .attention import Attend, Call, attending, kv_attentions, own_query
from .measuring import visit
from .target_rows import TargetState

RATE, CLIP, ANCHOR_FRACTION = 5e-4, 0.5, 0.2
MOMENTS = 32  # training documents that the second moments of the keys are taken from

States = Callable[[int], TargetState]
"""Document -> its `TargetState`"""


@dataclass(frozen=True)
class Retraining:
    """How every arm is re-trained and judged: ``passes`` over training ``documents``, at learning ``rate``.

    sources, states : features and `States`, by split (``train``, ``evaluation``).
    """

    sources: dict
    states: dict[str, States]
    documents: Sequence[int]
    draft_length: int = 7
    passes: int = 1
    rate: float = RATE
    seed: int = 0


def run_arm(drafter: Drafter, arm: str, how: Retraining) -> pd.DataFrame:
    """Re-train a copy of ``drafter`` as one arm (not ``as_trained``) and judge it: rows of ``query_oracle``."""
    copied, tokens, maps = working_copy(drafter), 0, []
    if arm == "oracle":
        maps = all_query_maps(drafter, key_moments(how.states["train"], how.documents[:MOMENTS]))
    if arm != "as_trained":
        tokens = retrain(copied, arm, maps, how)
    return evaluate(copied, arm, maps, how).assign(arm=arm, trained_tokens=tokens)


def working_copy(drafter: Drafter) -> Drafter:
    """A copy to re-train: weights of its own, the frozen embedding and head shared."""
    return copy.deepcopy(drafter, {id(tensor): tensor for tensor in (drafter.embedding, drafter.head)})


def output_side(drafter: Drafter) -> list[nn.Parameter]:
    """What is re-trained: output projections of attentions over the target's KV, MLPs and norms, final norm."""
    modules = [*(attention.o_proj for attention in kv_attentions(drafter).values()), drafter.norm]
    modules += [part for layer in drafter.layers for part in (layer.mlp_norm, layer.mlp)]
    return [parameter for module in modules for parameter in module.parameters()]


def retrain(drafter: Drafter, arm: str, maps: list[Tensor], how: Retraining) -> int:
    """Re-train the output side of ``drafter`` in place, one document a step; returns the tokens passed through.

    The learning rate falls from ``rate`` to 0 along a cosine over all passes.
    """
    for parameter in drafter.parameters():
        parameter.requires_grad_(False)
    trained = [parameter.requires_grad_() for parameter in output_side(drafter)]
    optimiser = torch.optim.AdamW(trained, lr=how.rate, betas=(0.9, 0.95), weight_decay=0.01)
    chance, reads = np.random.default_rng(how.seed), (*drafter.reads, "final_hidden", "target_argmax")
    order = np.concatenate([chance.permutation(how.documents) for _ in range(how.passes)]).tolist()
    visits = visit(how.sources["train"], f"re-train {arm}", reads, how.draft_length, drafter.norm.weight.device, order)
    for step, (document, features, _) in enumerate(visits):
        generator = torch.Generator().manual_seed(how.seed * 1_000_003 + step)
        attend = make_attend(arm, drafter, how.states["train"](document), maps, how.seed + document)
        sampled = {"ttt_steps": how.draft_length, "anchor_fraction": ANCHOR_FRACTION, "generator": generator}
        with attending(kv_attentions(drafter), attend):
            loss = ttt_loss(drafter, features, **sampled).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimiser.param_groups[0]["lr"] = how.rate * 0.5 * (1 + math.cos(math.pi * step / len(order)))
        optimiser.step()
        optimiser.zero_grad()
    return how.passes * sum(how.sources["train"].lengths[document] for document in how.documents)


@torch.no_grad()
def evaluate(drafter: Drafter, arm: str, maps: list[Tensor], how: Retraining) -> pd.DataFrame:
    """Counts of every evaluation document, teacher-forced: document, draft_step and `acceptance.COUNTS`."""
    source, device, rows = how.sources["evaluation"], drafter.norm.weight.device, []
    visits = visit(source, f"evaluate {arm}", (*drafter.reads, "target_argmax"), how.draft_length, device)
    for document, features, anchors in visits:
        attend = make_attend(arm, drafter, how.states["evaluation"](document), maps, how.seed + document)
        with attending(kv_attentions(drafter), attend):
            match = judge(predict(drafter, features, anchors, how.draft_length), features, anchors)[0].cpu().numpy()
        counts, _ = count_document(match, anchors.valid[0].cpu().numpy())
        rows.append(pd.DataFrame(counts, columns=COUNTS).assign(document=document, draft_step=range(how.draft_length)))
    return pd.concat(rows, ignore_index=True)


def make_attend(arm: str, drafter: Drafter, state: TargetState, maps: list[Tensor], seed: int) -> Attend:
    """What an arm's attention gives on one document; ``maps`` are those of `all_query_maps`, for the oracle."""
    if arm == "oracle":
        return oracle_query(maps, state)
    if arm == "perfect":
        return perfect_rows(len(drafter.layers), state)
    return random_query(drafter, state, seed) if arm == "random" else own_query


def head_layers(layer: int, heads: int, reused: int) -> Tensor:
    """Which reused layer each head of a drafter layer is given: [H].

    >>> head_layers(1, 4, 3)
    tensor([1, 2, 0, 1])
    """
    return (torch.arange(heads) + layer) % reused


def key_moments(states: States, documents: Sequence[int]) -> Tensor:
    """Second moments C of all cached key heads of a position, about each document's mean: [S · G · D, S · G · D].

    About the mean, because adding a constant to all keys of a prefix changes no softmax over it.
    """
    total, count = 0.0, 0
    for document in documents:
        keys = states(document).keys.permute(2, 0, 1, 3).flatten(1)
        keys = keys - keys.mean(0)
        total, count = total + keys.T @ keys, count + len(keys)
    return total / count


def query_maps(weight: Tensor, moments: Tensor, layer: int, heads: int, groups: int, size: int) -> Tensor:
    """The matrix of q -> q̃ of every head: [H, D, D].

    weight : [G · D, S · G · D] of the fusion of keys, W_g for each of G groups. moments : C; a little of its mean
    eigenvalue is added to the diagonal, so that the inverse exists whatever the projection is.
    """
    width, reused = weight.shape[1], weight.shape[1] // (groups * size)
    moments = moments + 1e-4 * moments.trace() / width * torch.eye(width, device=weight.device)
    maps = []
    for head, place in enumerate(head_layers(layer, heads, reused).tolist()):
        group = head // (heads // groups)
        mine, start = weight[group * size : (group + 1) * size], (place * groups + group) * size
        maps.append(torch.linalg.solve(mine @ moments @ mine.T, mine @ moments[:, start : start + size]))
    return torch.stack(maps)


@torch.no_grad()
def all_query_maps(drafter: Drafter, moments: Tensor) -> list[Tensor]:
    """`query_maps` of every layer."""
    sizes, spec = drafter.sizes, drafter.spec
    return [
        query_maps(layer.fusion.keys.weight, moments, j, sizes.num_attention_heads, spec.num_kv_heads, spec.head_dim)
        for j, layer in enumerate(drafter.layers)
    ]


def oracle_query(maps: list[Tensor], state: TargetState) -> Attend:
    """The target's true query at each step's position, through the drafter's key projection."""
    turned = []
    for layer, matrices in enumerate(maps):
        heads = torch.arange(len(matrices))
        true = state.queries[head_layers(layer, len(matrices), len(state.queries)), heads]
        turned.append(true @ matrices.transpose(1, 2))  # [H, n, D]
    return _with_query(turned, state)


def random_query(drafter: Drafter, state: TargetState, seed: int) -> Attend:
    """A random direction at each position of the document, as long as the drafter's own query there."""
    generator, (_, heads, length, size) = torch.Generator().manual_seed(seed), state.queries.shape
    noise = torch.randn(len(drafter.layers), heads, length, size, generator=generator).to(state.queries.device)
    return _with_query(list(nn.functional.normalize(noise, dim=-1)), state, own_length=True)


def _with_query(queries: list[Tensor], state: TargetState, own_length: bool = False) -> Attend:
    """Attention with the queries [H, n, D] of each layer at t+1+k, over prefix and chain alike."""

    def attend(call: Call) -> Tensor:
        query = queries[call.key][None, :, call.places(state.queries.shape[2])].to(call.query)
        if own_length:
            query = query * call.query.norm(dim=-1, keepdim=True)
        return chain_attention(query, call.prefix, call.mask, call.chain)

    return attend


def perfect_rows(layers: int, state: TargetState) -> Attend:
    """The target's own attention rows on the drafter's values, prefix and chain."""
    heads, length = state.queries.shape[1:3]
    everywhere, picked = torch.arange(length, device=state.queries.device), []
    for layer in range(layers):
        chosen = head_layers(layer, heads, len(state.queries)).tolist()
        needed = {place: state.rows(place, everywhere) for place in set(chosen)}
        picked.append(torch.stack([needed[place][head] for head, place in enumerate(chosen)]))  # [H, n, n]
    return lambda call: apply_rows(picked[call.key], call)


def apply_rows(rows: Tensor, call: Call) -> Tensor:
    """Target rows [H, n, n] at the call's positions, on its values: heads [1, H, M, D]."""
    length, t = rows.shape[-1], call.anchors
    at = rows[:, call.places(length)].to(call.query)  # [H, M, n]
    repeats = call.query.shape[1] // call.prefix[1].shape[1]
    prefix, chain = (values[0].repeat_interleave(repeats, 0) for values in (call.prefix[1], call.chain[1]))
    seen = torch.arange(prefix.shape[1], device=t.device) <= t[:, None]
    places = (t[:, None] + 1 + torch.arange(call.draft_step + 1, device=t.device)).clamp(max=length - 1)
    on_chain = at.gather(2, places.expand(len(at), -1, -1))  # [H, M, k+1]
    return ((at[..., : prefix.shape[1]] * seen) @ prefix + (on_chain[..., None] * chain).sum(2))[None]

"""Where a trained drafter's gradient goes: to queries, to keys and values of its own tokens, or to target state.

An anchor t at draft step k attends to n = t + 1 prefix entries and to its own chain of k + 1 *draft-side*
entries (a `block` drafter's slots all attend to all b slots of their block). For contexts of 128 to 2,048
tokens, of documents put end to end, this measures by autograd of the training loss on the 16 anchors nearest to
that length

    quantity         side            of what
    draft_share      draft           chain entries / all visible ones, by draft step: 7 / 4,103 for n = 4,096, K = 7
    draft_mass       draft           attention that they get, mean over heads and anchors, by draft step
    grad_norm        draft, prefix   part of ∂L/∂W that comes in by rows y = Wx on that side; parts sum to the whole
    numel                            parameters of W

Norms are Frobenius norms of raw gradients: neither ``kv_grad_scale`` nor the optimiser is in them
(`training.record` has those). The rows go to RESULTS_DIR/tables/gradient_flow.parquet.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..drafters.attention import Entries
from ..drafters.checkpoint import load_drafter
from ..drafters.context import read_by
from ..drafters.drafter import Drafter
from ..drafters.hooks import watching
from ..drafters.layers import BlockLayer, View
from ..drafters.runs import find_runs
from ..errors import StudyError
from ..features.live import LiveFeatures
from ..features.resident import ResidentFeatures
from ..features.spec import Features, FeatureSpec
from ..target.load import Target, load_target, resolve_device
from ..text.corpus import Document, load_corpus
from ..training.anchors import Anchors, find_anchors
from ..training.loss import ttt_loss
from ..training.record import branch_of
from .attention import Call, attending, draft_mass, own_query
from .measuring import Part, described, measure_parts, write_tables

CONTEXTS = (128, 256, 512, 1024, 2048)
DRAFT_LENGTH, STEP_DECAY = 7, 0.8
ANCHORS = 16
LEAST_SEQUENCES = 4  # fewer say nothing of other text: longer contexts are left out then
KEY = ["layer", "branch", "matrix", "side", "draft_step", "quantity", "value"]


def attentions(drafter: Drafter) -> dict[tuple[int, str], nn.Module]:
    """(layer, branch) -> its attention."""
    return {
        (index, branch_of(layer, name)): getattr(layer, name)
        for index, layer in enumerate(drafter.layers)
        for name in ("attention", "cross")
        if getattr(layer, name, None) is not None
    }


def projections(drafter: Drafter) -> dict[tuple[int, str, str], nn.Linear]:
    """(layer, branch, matrix) -> every linear projection of queries, keys, values, attention outputs and target KV."""
    found = {
        (*key, matrix): getattr(attention, matrix)
        for key, attention in attentions(drafter).items()
        for matrix in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    for index, layer in enumerate(drafter.layers):
        if (fusion := getattr(layer, "fusion", None)) is not None:
            found |= {(index, "cross", f"fusion.{matrix}"): getattr(fusion, matrix) for matrix in ("keys", "values")}
    return {key: module for key, module in found.items() if isinstance(module, nn.Linear)}


@contextmanager
def watched_gradients(drafter: Drafter) -> Iterator[dict[tuple, Tensor]]:
    """Within it a backward pass fills (layer, branch, matrix, side) -> that side's part of ∂L/∂W, Σ ∂L/∂y xᵀ."""
    found: dict[tuple, Tensor] = {}
    side = ["draft"]

    def from_target(_key, prefix, *given, **named):
        side[0] = "prefix"
        made = prefix(*given, **named)
        side[0] = "draft"
        return made

    def seen(key, forward, inputs):
        output, at = forward(inputs), (*key, side[0])

        def arrive(gradient: Tensor) -> None:
            part = gradient.flatten(0, -2).float().T @ inputs.detach().flatten(0, -2).float()
            found[at] = found.get(at, 0.0) + part

        if output.requires_grad:
            output.register_hook(arrive)
        return output

    with watching({"drafter": drafter}, "prefix", from_target), watching(projections(drafter), "forward", seen):
        yield found


@contextmanager
def watched_mass(drafter: Drafter) -> Iterator[list[dict]]:
    """Within it every draft step of every attention adds rows ``draft_mass`` and ``draft_share``."""
    rows: list[dict] = []
    modules = attentions(drafter)

    def add(key: tuple, k: int, query: Tensor, prefix: Entries, mask: Tensor, chain: Entries) -> None:
        entries = chain[0].shape[3]
        share = entries / (entries + (mask == 0).sum(-1).float())
        mass = draft_mass(query, prefix, mask, chain)
        for name, value in (("draft_mass", mass), ("draft_share", share)):
            rows.append(_row((*key, "attention", "draft"), name, value.mean().item(), k))

    def see(call: Call) -> Tensor:
        if call.chain is not None:  # `hidden` adds none at step 0: the newest prefix entry is its own
            with torch.no_grad():
                add(call.key, call.draft_step, call.query, call.prefix, call.mask, call.chain)
        return own_query(call)

    def blockwise(index: int, attend, inputs: Tensor, rotary: Entries, view: View, slots: int) -> Tensor:
        """Mask slot k + 1 is draft step k, and each slot sees all b of its block."""
        with torch.no_grad():
            query, *own = modules[index, "cross"].project(inputs, rotary, "q", "k", "v")
            by_slot = query.unflatten(2, (slots, -1))  # [B, H, b, M, D]
            block = tuple(part.unflatten(2, (slots, -1)).transpose(2, 3) for part in own)
            prefix = tuple(torch.cat(parts, 2) for parts in zip(*view.prefix.values(), strict=True))
            mask = view.mask.repeat(1, 1, 1, len(view.prefix))
            for k in range(min(slots - 1, DRAFT_LENGTH)):
                add((index, "cross"), k, by_slot[:, :, k + 1], prefix, mask, block)
        return attend(inputs, rotary, view, slots)

    blocks = {index: layer for index, layer in enumerate(drafter.layers) if isinstance(layer, BlockLayer)}
    with watching(blocks, "attend", blockwise), attending({} if blocks else modules, see):
        yield rows


def measure(drafter: Drafter, features: Features, anchors: Anchors, draft_length: int = DRAFT_LENGTH) -> list[dict]:
    """All rows of one sequence and one context length; parameters and gradients of the drafter stay as they were."""
    with watched_gradients(drafter) as gradients, watched_mass(drafter) as rows:
        loss = ttt_loss(drafter, features, ttt_steps=draft_length, step_decay=STEP_DECAY, anchors=anchors).loss
        torch.autograd.grad(loss, [p for p in drafter.parameters() if p.requires_grad], allow_unused=True)
    modules = projections(drafter)
    for key, gradient in gradients.items():
        rows.append(_row(key, "grad_norm", gradient.norm().item()))
        rows.append(_row(key, "numel", sum(p.numel() for p in modules[key[:3]].parameters())))
    return rows


def _row(key: tuple, quantity: str, value: float, draft_step: int | None = None) -> dict:
    return dict(zip(KEY, (*key, draft_step, quantity, float(value)), strict=True))


def measure_run(drafter: Drafter, source, contexts: Sequence[int], draft_length: int = DRAFT_LENGTH) -> pd.DataFrame:
    """Rows of one drafter on every sequence of ``source``: those of ``gradient_flow`` without variant and seed."""
    device, measured = drafter.norm.weight.device, []
    source = read_by(drafter.config, drafter.spec, source)
    for index in range(len(source)):
        whole = source.batch([index], (*drafter.reads, "final_hidden", "target_argmax")).to(device, torch.float32)
        for context in contexts:
            length = context + draft_length + 1
            cut = {n: t[:, :length] for n, t in vars(whole).items() if t is not None and t.dim() > 1}
            features = replace(whole, **cut)
            anchors = anchors_before(features.answer_mask, context, draft_length)
            if anchors is not None:
                labels = {"document": index, "context_length_tokens": context, "anchors": anchors.index.shape[1]}
                measured.append(pd.DataFrame(measure(drafter, features, anchors, draft_length)).assign(**labels))
    if not measured:
        raise StudyError(f"no answer of {draft_length + 1} tokens near any context of {list(contexts)}; give others")
    return pd.concat(measured, ignore_index=True)


def anchors_before(answer_mask: Tensor, context: int, draft_length: int = DRAFT_LENGTH) -> Anchors | None:
    """The ``ANCHORS`` anchors that see most, but at most ``context``, prefix entries and are valid at all steps.

    answer_mask : [1, n]. None if no such anchor sees more than half of ``context``.
    """
    found = find_anchors(answer_mask, draft_length)
    index = found.index[0][found.valid[0, :, -1]]
    index = index[(index + 1 <= context) & (index + 1 > context // 2)][-ANCHORS:]
    if not len(index):
        return None
    ones = torch.ones(1, len(index), device=index.device)
    return Anchors(index[None], ones[..., None].bool().expand(-1, -1, draft_length), ones)


def measure_gradients(
    results_dir: str | Path, runs: Sequence[str] = (), *, fingerprint: str, corpus: str = "", documents: int = 8,
    contexts: Sequence[int] = CONTEXTS, device: str = "auto",
) -> dict[str, Path]:  # fmt: skip
    """Measure runs (``variant/seedN``; all finished ones by default) and write the table.

    Parameters
    ----------
    fingerprint : of the code; parts that another one left are measured anew.
    corpus : whose evaluation documents are read; by default ``selfgen``, or ``tiny`` for a tiny target.
    documents : sequences a run, each of other documents.

    Raises
    ------
    StudyError : no finished run by that name; a target other than the one that a run was trained for.
    """
    folders = find_runs(results_dir, runs)
    specs = [FeatureSpec.from_json(described(folder)["spec"]) for folder in folders.values()]
    text = load_corpus(corpus or ("tiny" if specs[0].target.startswith("tiny") else "selfgen"), "evaluation")

    @cache  # opened only if there is something to measure
    def opened() -> tuple:
        target = load_target(specs[0].target, device=device)
        return target, *long_features(target, specs, text.documents, documents, contexts)

    def of_run(folder: Path) -> pd.DataFrame:
        target, source, usable = opened()
        return measure_run(load_drafter(folder, target), source, usable)

    parts = [Part("gradient_flow", "flow", partial(of_run, folder), folder) for folder in folders.values()]
    depends = f"{fingerprint} {text.provenance} {documents} {list(contexts)} {resolve_device(device)}"
    return write_tables(results_dir, measure_parts(Path(results_dir) / "gradient_flow", depends, parts))


def long_features(
    target: Target, specs: Sequence[FeatureSpec], text: Sequence[Document], most: int, contexts: Sequence[int]
) -> tuple[ResidentFeatures, list[int]]:
    """Target state of the sequences that drafters of ``specs`` read, and the contexts that there is text for."""
    text, usable = sequences_for(text, contexts, most)
    if left_out := [c for c in contexts if c not in usable]:
        print(f"too little text for contexts of {', '.join(map(str, left_out))} tokens", flush=True)
    kinds = ("kv_layers", "hidden_layers")
    read = {kind: tuple(sorted({layer for spec in specs for layer in getattr(spec, kind)})) for kind in kinds}
    live = LiveFeatures(target, text, replace(specs[0], **read), max(usable) + DRAFT_LENGTH + 1)
    return ResidentFeatures(live, target.device, batch_documents=1), usable


def sequences_for(
    documents: Sequence[Document], contexts: Sequence[int], most: int, draft_length: int = DRAFT_LENGTH
) -> tuple[list[Document], list[int]]:
    """Sequences, and those ``contexts`` that the documents suffice for (``LEAST_SEQUENCES``; the shortest anyway)."""
    for longest in sorted(contexts, reverse=True):
        made = long_documents(documents, longest + draft_length + 1, most)
        if len(made) >= LEAST_SEQUENCES:
            return made, [c for c in contexts if c <= longest]
    if made:
        return made, [min(contexts)]
    raise StudyError(
        f"{sum(len(d.tokens) for d in documents)} tokens of evaluation text make no context of {min(contexts)} tokens; "
        "give shorter contexts"
    )


def long_documents(documents: Sequence[Document], length: int, most: int) -> list[Document]:
    """Documents put end to end, ``length`` tokens each and at most ``most`` of them; none is in two."""
    made, tokens, mask = [], [], []
    for document in documents:
        tokens, mask = [*tokens, document.tokens], [*mask, document.answer_mask]
        if sum(map(len, tokens)) >= length and len(made) < most:
            made.append(Document(np.concatenate(tokens)[:length], np.concatenate(mask)[:length], document.origin))
            tokens, mask = [], []
    return made

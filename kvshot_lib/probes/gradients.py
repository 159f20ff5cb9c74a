"""Where a trained drafter's gradient goes: to queries, to keys and values of its own tokens, or to target state.

An anchor t at draft step k attends to n = t + 1 prefix entries and to its own chain of k + 1 *draft-side*
entries (a `block` drafter's slots all attend to all b slots of their block). For contexts of 128 to 2,048
tokens, of documents put end to end, this measures by autograd of the training loss on the 16 anchors nearest to
that length

    quantity         side            of what
    draft_share      draft           chain entries / all visible ones, by draft step: 7 / 4,103 for n = 4,096, K = 7
    draft_mass       draft           attention that they get, mean over heads and anchors, by draft step
    grad_norm        draft, prefix   part of ∂L/∂W that comes in by rows on that side; parts sum to the whole
    entry_grad_norm  draft, prefix   root mean square of ‖∂L/∂y‖ over the rows y = Wx that get any gradient
    entries          draft, prefix   how many rows do
    numel                            parameters of W
    gate_mean, gate_spread           the hybrid's gate, by draft step

Norms are Frobenius norms of raw gradients: neither ``kv_grad_scale`` nor the optimiser is in them
(`training.record` has those). The rows go to RESULTS_DIR/tables/gradient_flow.parquet.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..drafters.attention import Entries
from ..drafters.checkpoint import load_drafter
from ..drafters.drafter import Drafter
from ..drafters.hooks import watching
from ..drafters.layers import BlockLayer, View
from ..drafters.runs import find_runs
from ..errors import StudyError
from ..features.live import LiveFeatures
from ..features.resident import ResidentFeatures
from ..features.spec import Features, FeatureSpec
from ..parts import Parts
from ..target.load import Target, load_target
from ..text.corpus import Document, load_corpus
from ..training.anchors import Anchors, find_anchors
from ..training.loss import ttt_loss
from ..training.record import branch_of
from .attention import draft_mass
from .measuring import described, part_name, read_by, table_of, write_tables

CONTEXTS = (128, 256, 512, 1024, 2048)
DRAFT_LENGTH, STEP_DECAY = 7, 0.8
ANCHORS = 16
LEAST_SEQUENCES = 4  # fewer say nothing of other text: longer contexts are left out then
KEY = ["layer", "branch", "matrix", "side", "draft_step", "quantity", "value"]


@dataclass
class Flow:
    """Gradient at the rows y = Wx of one matrix on one side: rows that got some, Σ‖∂L/∂y‖², and Σ ∂L/∂y xᵀ."""

    entries: int = 0
    squared: float = 0.0
    weight: Tensor | float = 0.0

    def arrive(self, gradient: Tensor, read: Tensor | None) -> None:
        """Add the gradient [..., out] of one call's rows, which were made from ``read`` [..., in]."""
        gradient = gradient.detach().flatten(0, -2).float()
        squared = gradient.square().sum(-1)
        self.entries += int((squared > 0).sum())
        self.squared += float(squared.sum())
        if read is not None:
            self.weight = self.weight + gradient.T @ read.flatten(0, -2).float()


def projections(drafter: Drafter) -> dict[tuple[int, str, str], nn.Module]:
    """(layer, branch, matrix) -> every projection of queries, keys, values, attention outputs and target KV."""
    found = {}
    for (index, branch), attention in attentions(drafter).items():
        for matrix in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[index, branch, matrix] = getattr(attention, matrix)
    for index, layer in enumerate(drafter.layers):
        if (fusion := getattr(layer, "fusion", None)) is not None:
            found |= {(index, "cross", f"fusion.{matrix}"): getattr(fusion, matrix) for matrix in ("keys", "values")}
    return found


def attentions(drafter: Drafter) -> dict[tuple[int, str], nn.Module]:
    """(layer, branch) -> its attention."""
    return {
        (index, branch_of(layer, name)): getattr(layer, name)
        for index, layer in enumerate(drafter.layers)
        for name in ("attention", "cross")
        if getattr(layer, name, None) is not None
    }


@contextmanager
def watched_flow(drafter: Drafter) -> Iterator[dict[tuple, Flow]]:
    """Within it a backward pass fills (layer, branch, matrix, side) -> `Flow`."""
    flows: dict[tuple, Flow] = {}
    modules, side = projections(drafter), ["draft"]

    def from_target(_key, prefix, *given, **named):
        side[0] = "prefix"
        made = prefix(*given, **named)
        side[0] = "draft"
        return made

    def seen(key, forward, inputs):
        output = forward(inputs)
        if output.requires_grad:
            at, read = (*key, side[0]), inputs.detach() if isinstance(modules[key], nn.Linear) else None
            output.register_hook(lambda gradient: flows.setdefault(at, Flow()).arrive(gradient, read))
        return output

    with watching({"drafter": drafter}, "prefix", from_target), watching(modules, "forward", seen):
        yield flows


@contextmanager
def watched_mass(drafter: Drafter) -> Iterator[list[dict]]:
    """Within it every draft step of every attention adds rows ``draft_mass`` and ``draft_share``."""
    rows: list[dict] = []
    modules, steps = attentions(drafter), Counter()

    def add(key: tuple, k: int, query: Tensor, prefix: Entries, mask: Tensor, chain: Entries) -> None:
        entries = chain[0].shape[3]
        share = entries / (entries + (mask == 0).sum(-1).float())
        mass = draft_mass(query, prefix, mask, chain)
        for name, value in (("draft_mass", mass), ("draft_share", share)):
            rows.append(_row((*key, "attention", "draft"), name, value.mean().item(), k))

    def chained(key, forward, inputs, rotary, prefix, mask, chain, append):
        out, chain = forward(inputs, rotary, prefix, mask, chain, append)
        if chain is not None:  # `hidden` adds none at step 0: the newest prefix entry is its own
            with torch.no_grad():
                add(key, steps[key], modules[key].project(inputs, rotary, "q")[0], prefix, mask, chain)
        steps[key] += 1
        return out, chain

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
    with watching(blocks, "attend", blockwise), watching({} if blocks else modules, "forward", chained):
        yield rows


def measure(drafter: Drafter, features: Features, anchors: Anchors, draft_length: int = DRAFT_LENGTH) -> list[dict]:
    """All rows of one sequence and one context length; parameters and gradients of the drafter stay as they were."""
    gates: list[dict] = []
    gated = {index: layer for index, layer in enumerate(drafter.layers) if getattr(layer, "gate", None) is not None}
    steps, held = Counter(), [p.grad for p in drafter.parameters()]

    def mixed(index, mix, inputs, own, cross):
        with torch.no_grad():
            gate = torch.sigmoid(gated[index].gate(inputs)).float()
            for name, value in (("gate_mean", gate.mean()), ("gate_spread", gate.std(unbiased=False))):
                gates.append(_row((index, "layer", "gate", "draft"), name, value.item(), steps[index]))
        steps[index] += 1
        return mix(inputs, own, cross)

    try:
        with watched_flow(drafter) as flows, watched_mass(drafter) as rows, watching(gated, "mix", mixed):
            drafter.zero_grad()
            ttt_loss(drafter, features, ttt_steps=draft_length, step_decay=STEP_DECAY, anchors=anchors).loss.backward()
    finally:
        for parameter, gradient in zip(drafter.parameters(), held, strict=True):
            parameter.grad = gradient
    modules = projections(drafter)
    for key, flow in flows.items():
        rows.append(_row(key, "entries", flow.entries))
        rows.append(_row(key, "entry_grad_norm", (flow.squared / max(1, flow.entries)) ** 0.5))
        if isinstance(flow.weight, Tensor):
            numel = sum(p.numel() for p in modules[key[:3]].parameters())
            rows += [_row(key, "grad_norm", flow.weight.norm().item()), _row(key, "numel", numel)]
    return rows + gates


def _row(key: tuple, quantity: str, value: float, draft_step: int | None = None) -> dict:
    return dict(zip(KEY, (*key, draft_step, quantity, float(value)), strict=True))


def measure_run(drafter: Drafter, source, contexts: Sequence[int], draft_length: int = DRAFT_LENGTH) -> pd.DataFrame:
    """Rows of one drafter on every sequence of ``source``: those of ``gradient_flow`` without variant and seed."""
    device, measured = drafter.norm.weight.device, []
    source = read_by(drafter, source)
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
    contexts: Sequence[int] = CONTEXTS, device: str = "auto", keep: str | Path = "",
) -> dict[str, Path]:  # fmt: skip
    """Measure runs (``variant/seedN``; all finished ones by default) and write the table.

    Parameters
    ----------
    fingerprint : of the code; parts that another one left are measured anew.
    corpus : whose evaluation documents are read; by default ``selfgen``, or ``tiny`` for a tiny target.
    documents : sequences a run, each of other documents.
    keep : a folder of tables made before on the same sequences: their other runs stay.

    Raises
    ------
    StudyError : no finished run by that name; a target other than the one that a run was trained for.
    """
    folders, settings = find_runs(results_dir, runs), f"{fingerprint} {corpus} {documents} {list(contexts)}"
    parts = Parts(Path(results_dir) / "gradient_flow", settings)
    specs = [FeatureSpec.from_json(described(folder)["spec"]) for folder in folders.values()]

    @cache  # opened only if there is something to measure
    def opened() -> tuple:
        target = load_target(specs[0].target, device=device)
        return target, *long_features(target, specs, corpus, documents, contexts)

    def of_run(folder: Path) -> pd.DataFrame:
        target, source, usable = opened()
        print(f"{folder.parent.name}/{folder.name}: {len(source)} sequences", flush=True)
        return table_of("gradient_flow", measure_run(load_drafter(folder, target), source, usable), folder)

    made = [parts.table(part_name(folder), partial(of_run, folder)) for folder in folders.values()]
    return write_tables(results_dir, {"gradient_flow": pd.concat(made, ignore_index=True)}, keep)


def long_features(
    target: Target, specs: Sequence[FeatureSpec], corpus: str, documents: int, contexts: Sequence[int]
) -> tuple[ResidentFeatures, list[int]]:
    """Target state of the sequences that drafters of ``specs`` read, and the contexts that there is text for."""
    corpus = corpus or ("tiny" if target.name.startswith("tiny") else "selfgen")
    text, usable = sequences_for(load_corpus(corpus, "evaluation").documents, contexts, documents)
    if left_out := [c for c in contexts if c not in usable]:
        print(f"too little text for contexts of {', '.join(map(str, left_out))} tokens", flush=True)
    read = tuple(sorted({layer for spec in specs for layer in spec.kv_layers}))
    live = LiveFeatures(target, text, replace(specs[0], kv_layers=read), max(usable) + DRAFT_LENGTH + 1)
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
            made.append(Document(np.concatenate(tokens)[:length], np.concatenate(mask)[:length]))
            tokens, mask = [], []
    return made

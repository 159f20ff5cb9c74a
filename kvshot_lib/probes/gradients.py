"""Where a trained drafter's gradient goes: to queries, to keys and values of its own tokens, or to those made from target state.

python -m kvshot_lib.probes.gradients RESULTS_DIR [VARIANT/seedN ...]    writes RESULTS_DIR/tables/gradient_flow.parquet

An anchor t at draft step k attends to n = t + 1 prefix entries and to its own chain of k + 1 *draft-side* entries (a `block` drafter's
slots all attend to all b slots of their block). For contexts of 128
to 2,048 tokens, of documents put end to end, this measures by autograd of the training loss on the 16 anchors nearest to that length

    quantity         side            of what
    draft_share      draft           chain entries / all visible entries, by draft step: 7 / 4,103 for n = 4,096 and K = 7
    draft_mass       draft           share of the attention that chain entries get, mean over heads and anchors, by draft step
    grad_norm        draft, prefix   the part of ∂L/∂W that comes in by rows on that side: the parts sum to the whole gradient
    entry_grad_norm  draft, prefix   root mean square of ‖∂L/∂y‖ over the rows y = Wx (a query, a key, a value) that get any gradient
    entries          draft, prefix   how many rows do
    numel                            parameters of W
    gate_mean, gate_spread           the hybrid's gate, by draft step

Norms are Frobenius norms of raw gradients: neither ``kv_grad_scale`` nor the optimiser is in them (`gradient_record` has those).
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..drafters.block import BlockLayer
from ..drafters.checkpoint import load_drafter
from ..drafters.drafter import Drafter
from ..drafters.layers import View
from ..errors import StudyError, one_line_errors
from ..features.live import LiveFeatures
from ..features.resident import ResidentFeatures
from ..features.shuffled import ShuffledKV
from ..features.spec import Features
from ..files import write_csv
from ..metrics import tables
from ..parts import claim
from ..target.load import Target, load_target
from ..text.corpus import Document, load_corpus
from ..training.record import branch_of, gate_statistics, watched_mixing
from ..training.ttt import Anchors, find_anchors, ttt_loss

CONTEXTS = (128, 256, 512, 1024, 2048)
DRAFT_LENGTH, STEP_DECAY = 7, 0.8
ANCHORS = 16
LEAST_SEQUENCES = 4  # fewer say nothing of other text: longer contexts are left out then
KEY = ["layer", "branch", "matrix", "side", "draft_step", "quantity", "value"]


def long_documents(documents: Sequence[Document], length: int, most: int) -> list[Document]:
    """Documents put end to end, ``length`` tokens each and at most ``most`` of them; none is in two."""
    made, tokens, mask = [], [], []
    for document in documents:
        tokens, mask = [*tokens, document.tokens], [*mask, document.answer_mask]
        if sum(map(len, tokens)) >= length and len(made) < most:
            made.append(Document(np.concatenate(tokens)[:length], np.concatenate(mask)[:length]))
            tokens, mask = [], []
    return made


def sequences_for(
    documents: Sequence[Document], contexts: Sequence[int], most: int, draft_length: int = DRAFT_LENGTH
) -> tuple[list[Document], list[int]]:
    """Sequences, and those of ``contexts`` that the documents suffice for (``LEAST_SEQUENCES`` sequences; the shortest anyway)."""
    for longest in sorted(contexts, reverse=True):
        made = long_documents(documents, longest + draft_length + 1, most)
        if len(made) >= LEAST_SEQUENCES:
            return made, [c for c in contexts if c <= longest]
    if made:
        return made, [min(contexts)]
    raise StudyError(
        f"{sum(len(d.tokens) for d in documents)} tokens of evaluation text make no context of {min(contexts)} tokens; "
        "give shorter --contexts"
    )


def anchors_before(answer_mask: Tensor, context: int, draft_length: int = DRAFT_LENGTH) -> Anchors | None:
    """The ``ANCHORS`` anchors that see most, but at most ``context``, prefix entries, and are valid at all draft steps.

    answer_mask : [1, n]. None if no such anchor sees more than half of ``context``.
    """
    found = find_anchors(answer_mask, draft_length)
    index = found.index[0][found.valid[0, :, -1]]
    index = index[(index + 1 <= context) & (index + 1 > context // 2)][-ANCHORS:]
    if not len(index):
        return None
    ones = torch.ones(1, len(index), device=index.device)
    return Anchors(index[None], ones[..., None].bool().expand(-1, -1, draft_length), ones)


@dataclass
class Flow:
    """Gradient that came in at the rows y = Wx of one matrix on one side: rows that got some, Σ‖∂L/∂y‖², and Σ ∂L/∂y xᵀ."""

    entries: int = 0
    squared: float = 0.0
    weight: Tensor | float = 0.0


@contextmanager
def watched_flow(drafter: Drafter) -> Iterator[dict[tuple, Flow]]:
    """Within it a backward pass fills (layer, branch, matrix, side) -> `Flow`; afterwards the drafter is as it was."""
    flows: dict[tuple, Flow] = {}
    now = {"side": "draft"}
    prefix = drafter.prefix

    def from_target(*given, **named):
        now["side"] = "prefix"
        try:
            return prefix(*given, **named)
        finally:
            now["side"] = "draft"

    def hook(key: tuple):
        def seen(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            if output.requires_grad:
                at, read = (*key, now["side"]), inputs[0].detach() if isinstance(module, nn.Linear) else None
                output.register_hook(lambda gradient: _arrive(flows.setdefault(at, Flow()), gradient, read))

        return seen

    with ExitStack() as stack:
        for key, module in watched_modules(drafter):
            stack.callback(module.register_forward_hook(hook(key)).remove)
        drafter.prefix = from_target
        stack.callback(lambda: vars(drafter).pop("prefix"))
        yield flows


def watched_modules(drafter: Drafter) -> Iterator[tuple[tuple[int, str, str], nn.Module]]:
    """(layer, branch, matrix) and module of every projection of queries, keys, values, attention outputs and target KV."""
    for index, layer in enumerate(drafter.layers):
        for name in ("attention", "cross"):
            if (attention := getattr(layer, name, None)) is not None:
                for matrix in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    yield (index, branch_of(layer, name), matrix), getattr(attention, matrix)
        if (fusion := getattr(layer, "fusion", None)) is not None:
            for matrix in ("keys", "values"):
                yield (index, "cross", f"fusion.{matrix}"), getattr(fusion, matrix)


def _arrive(flow: Flow, gradient: Tensor, read: Tensor | None) -> None:
    """Add the gradient [..., out] of one call's rows, which were made from ``read`` [..., in]."""
    gradient = gradient.detach().flatten(0, -2).float()
    squared = gradient.square().sum(-1)
    flow.entries += int((squared > 0).sum())
    flow.squared += float(squared.sum())
    if read is not None:
        flow.weight = flow.weight + gradient.T @ read.flatten(0, -2).float()


def draft_mass(query: Tensor, prefix: tuple[Tensor, Tensor], mask: Tensor, chain: tuple[Tensor, Tensor]) -> Tensor:
    """Share of each query's attention that goes to its chain, [B, H, M]; arguments as for `attention.chain_attention`.

    With the log-sum-exps L_p, L_c of the scores of prefix and chain it is exp(L_c) / (exp(L_p) + exp(L_c)) = sigmoid(L_c - L_p).
    """
    grouped = query.unflatten(1, (chain[0].shape[1], -1)).float()  # [B, G, R, M, D]
    scale = query.shape[-1] ** -0.5
    on_prefix = grouped @ prefix[0][:, :, None].float().transpose(-1, -2) * scale + mask[:, None]
    on_chain = torch.einsum("bgrmd,bgmjd->bgrmj", grouped, chain[0].float()) * scale
    return torch.sigmoid(on_chain.logsumexp(-1) - on_prefix.logsumexp(-1)).flatten(1, 2)


@contextmanager
def watched_mass(drafter: Drafter) -> Iterator[list[dict]]:
    """Within it every draft step of every attention adds rows ``draft_mass`` and ``draft_share``, means over all anchors."""
    rows: list[dict] = []

    def hook(layer: int, branch: str):
        steps = [0]

        @torch.no_grad()
        def seen(module: nn.Module, given: tuple, _named: dict, output: tuple) -> None:
            inputs, rotary, prefix, mask, _ = given[:5]
            chain, k = output[1], steps[0]
            steps[0] += 1
            if chain is None:  # `hidden` adds none at step 0: the newest prefix entry is its own
                return
            (query,) = module.project(inputs, rotary, "q")
            entries = chain[0].shape[3]
            share = entries / (entries + (mask == 0).sum(-1).float())
            mass = draft_mass(query, prefix, mask, chain)
            for name, value in (("draft_mass", mass.mean()), ("draft_share", share.mean())):
                rows.append(_row((layer, branch, "", "draft"), name, value.item(), k))

        return seen

    with ExitStack() as stack:
        for index, layer in enumerate(drafter.layers):
            if isinstance(layer, BlockLayer):
                stack.enter_context(watched_block(index, layer, rows))
                continue
            for name in ("attention", "cross"):
                if (attention := getattr(layer, name, None)) is not None:
                    seen = hook(index, branch_of(layer, name))
                    stack.callback(attention.register_forward_hook(seen, with_kwargs=True).remove)
        yield rows


@contextmanager
def watched_block(index: int, layer: BlockLayer, rows: list[dict]) -> Iterator[None]:
    """The same for a `block` drafter's layer: mask slot k + 1 is draft step k, and each sees all b slots of its block."""
    attend = layer.attend

    def seen(inputs: Tensor, rotary: tuple, view: View, slots: int) -> Tensor:
        with torch.no_grad():
            query, *own = layer.attention.project(inputs, rotary, "q", "k", "v")
            by_slot = query.unflatten(2, (slots, -1))  # [B, H, b, M, D]
            block = tuple(part.unflatten(2, (slots, -1)).transpose(2, 3) for part in own)
            prefix = tuple(torch.cat(parts, 2) for parts in zip(*view.prefix.values(), strict=True))
            mask = view.mask.repeat(1, 1, 1, len(view.prefix))
            share = slots / (slots + (mask == 0).sum(-1).float())
            for k in range(min(slots - 1, DRAFT_LENGTH)):
                mass = draft_mass(by_slot[:, :, k + 1], prefix, mask, block)
                for name, value in (("draft_mass", mass.mean()), ("draft_share", share.mean())):
                    rows.append(_row((index, "cross", "", "draft"), name, value.item(), k))
        return attend(inputs, rotary, view, slots)

    layer.attend = seen
    try:
        yield
    finally:
        vars(layer).pop("attend", None)


def measure(drafter: Drafter, features: Features, anchors: Anchors, draft_length: int = DRAFT_LENGTH) -> list[dict]:
    """All rows of one sequence and one context length; parameters, outputs and hooks of the drafter stay as they were."""
    gates: list[dict] = []
    used = anchors.valid[..., 0]

    def see(layer: int, k: int, inputs: Tensor, _own: Tensor, _cross: Tensor) -> None:
        with torch.no_grad():
            gate = torch.sigmoid(drafter.layers[layer].gate(inputs)).float()
            gates.extend(
                _row((layer, "layer", "gate", "draft"), row["quantity"], row["value"], k)
                for row in gate_statistics(gate, used, layer, k)
            )

    held = [p.grad for p in drafter.parameters()]
    try:
        with watched_flow(drafter) as flows, watched_mass(drafter) as rows, watched_mixing(drafter, see):
            drafter.zero_grad()
            ttt_loss(drafter, features, ttt_steps=draft_length, step_decay=STEP_DECAY, anchors=anchors).loss.backward()
    finally:
        for parameter, gradient in zip(drafter.parameters(), held, strict=True):
            parameter.grad = gradient
    modules = dict(watched_modules(drafter))
    for (*key, side), flow in flows.items():
        numel = sum(p.numel() for p in modules[*key].parameters())
        rows += [
            _row((*key, side), "entries", flow.entries),
            _row((*key, side), "entry_grad_norm", (flow.squared / max(1, flow.entries)) ** 0.5),
        ]
        if isinstance(flow.weight, Tensor):
            rows += [_row((*key, side), "grad_norm", flow.weight.norm().item()), _row((*key, side), "numel", numel)]
    return rows + gates


def _row(key: tuple, quantity: str, value: float, draft_step: int | None = None) -> dict:
    layer, branch, matrix, side = key
    return dict(zip(KEY, (layer, branch, matrix or "attention", side, draft_step, quantity, float(value)), strict=True))


def measure_run(drafter: Drafter, source, contexts: Sequence[int], draft_length: int = DRAFT_LENGTH) -> pd.DataFrame:
    """Rows of one drafter on every sequence of ``source``: those of ``gradient_flow`` without variant and seed."""
    device, measured = drafter.norm.weight.device, []
    source = source.with_kv_layers(drafter.spec.kv_layers)
    if drafter.config.kv_control == "shuffled":
        source = ShuffledKV(source)
    for index in range(len(source)):
        whole = source.batch([index], (*drafter.reads, "final_hidden", "target_argmax")).to(device, torch.float32)
        for context in contexts:
            length = context + draft_length + 1
            cut = {n: t[:, :length] for n, t in vars(whole).items() if t is not None and t.dim() > 1}
            features = replace(whole, **cut)
            anchors = anchors_before(features.answer_mask, context, draft_length)
            if anchors is None:
                continue
            found = pd.DataFrame(measure(drafter, features, anchors, draft_length))
            labels = {"document": index, "context_length_tokens": context, "anchors": anchors.index.shape[1]}
            measured.append(found.assign(**labels)[[*labels, *KEY]])
    if not measured:
        raise StudyError(
            f"no answer of {draft_length + 1} tokens near any context of {list(contexts)} tokens; give other --contexts"
        )
    return pd.concat(measured, ignore_index=True)


def gradient_flow(
    results_dir: str | Path, runs: Sequence[str] = (), *, corpus: str = "", documents: int = 8,
    contexts: Sequence[int] = CONTEXTS, device: str = "auto", fingerprint: str = "",
) -> Path:  # fmt: skip
    """Measure runs (``variant/seed0`` …; all finished ones by default) and write the table; what is measured is not measured again.

    Parameters
    ----------
    corpus : whose evaluation documents are read; by default ``selfgen``, or ``tiny`` for a tiny target.
    documents : sequences a run, each of other documents. fingerprint : of what a pipeline's results depend on (`notebooks.claim`).

    Raises
    ------
    StudyError : no finished run by that name; a target other than the one that a run was trained for.
    """
    results_dir = Path(results_dir)
    finished = {f"{p.parents[1].name}/{p.parent.name}": p.parent for p in results_dir.glob("runs/*/seed*/run.json")}
    if unknown := [name for name in runs if name not in finished]:
        known = ", ".join(sorted(finished)) or "none"
        raise StudyError(f"{', '.join(unknown)}: no finished run in {results_dir / 'runs'}; finished: {known}")
    if not finished:
        raise StudyError(f"no finished run in {results_dir / 'runs'}: train one with notebooks/03_train_drafter.ipynb")
    kept = results_dir / "gradient_flow"
    claim(kept, f"{fingerprint} {corpus} {documents} {list(contexts)}")
    place = {variant: i for i, variant in enumerate(tables.in_order(name.split("/")[0] for name in finished))}
    names = sorted(runs or finished, key=lambda name: (place[name.split("/")[0]], int(name.rpartition("seed")[2])))
    paths = {name: kept / f"{name.replace('/', '.')}.csv" for name in names}
    wanted = [name for name in names if not _up_to_date(paths[name], finished[name] / "drafter.safetensors")]
    if wanted:
        target = load_target(tables.read_record(finished[wanted[0]])["target"], device=device)
        drafters = {name: load_drafter(finished[name], target) for name in wanted}
        source, usable = long_features(target, drafters.values(), corpus, documents, contexts)
    for name in wanted:
        record = tables.read_record(finished[name])
        found = measure_run(drafters.pop(name), source, usable)
        labels = {"variant": record["variant"], "seed": record["seed"]}
        found = found.assign(**labels)[list(tables.SCHEMAS["gradient_flow"])].astype({"draft_step": "Int64"})
        write_csv(paths[name], tables.rounded(found))
        print(f"{name}: {len(source)} sequences, contexts of {', '.join(map(str, usable))} tokens", flush=True)
    parts = [tables.read_one(path, "gradient_flow") for path in paths.values()]
    return tables.write(results_dir / "tables", "gradient_flow", pd.concat(parts, ignore_index=True))


def _up_to_date(path: Path, weights: Path) -> bool:
    return path.exists() and path.stat().st_mtime >= weights.stat().st_mtime


def long_features(
    target: Target, drafters: Iterable[Drafter], corpus: str, documents: int, contexts: Sequence[int]
) -> tuple[ResidentFeatures, list[int]]:
    """Target state of the sequences, with all that any of the drafters reads, and the contexts that there is text for."""
    corpus = corpus or ("tiny" if target.name.startswith("tiny") else "selfgen")
    text, usable = sequences_for(load_corpus(corpus, "evaluation").documents, contexts, documents)
    if left_out := [c for c in contexts if c not in usable]:
        print(f"too little text for contexts of {', '.join(map(str, left_out))} tokens", flush=True)
    specs = [drafter.spec for drafter in drafters]
    read = tuple(sorted({layer for spec in specs for layer in spec.kv_layers}))
    live = LiveFeatures(target, text, replace(specs[0], kv_layers=read), max(usable) + DRAFT_LENGTH + 1)
    return ResidentFeatures(live, target.device, batch_documents=1), usable


@one_line_errors
def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvshot_lib.probes.gradients", description=__doc__.splitlines()[0])
    parser.add_argument("results_dir", metavar="RESULTS_DIR")
    parser.add_argument("runs", nargs="*", metavar="VARIANT/seedN", help="only these (all finished ones by default)")
    parser.add_argument("--corpus", default="", help="default: selfgen, or tiny for a tiny target")
    parser.add_argument("--documents", type=int, default=8, help="sequences of evaluation documents a run")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="context lengths in tokens")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--fingerprint", default="", help=argparse.SUPPRESS)
    given = vars(parser.parse_intermixed_args(words))
    print(gradient_flow(given.pop("results_dir"), given.pop("runs"), **given))
    return 0


if __name__ == "__main__":
    sys.exit(main())

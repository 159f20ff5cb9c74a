"""How far the target's attention moves between an anchor and its draft steps, and where each drafter was right there.

The paper says that a hidden state is a query-dependent summary of the prefix: f_t keeps what the query at t
looked at, and fails where the query at a later position would look elsewhere. So compare the target's attention
rows at t and at t+1+k over the prefix s ≤ t, which is all that a drafter can know of the target at any k. With
rows a_t and a_{t+1+k}, both cut to s ≤ t and made to sum to 1, and m their mean,

    shift_{t,k} = mean over reused layers and heads of KL(a_t | m) / 2 + KL(a_{t+1+k} | m) / 2    nats, 0 … ln 2

Stated before any data: the **primary** shift leaves out s = 0. In most heads the first token takes most of the
mass whatever the query (an attention sink), its content is the same in every document, and mass that goes there
reads nothing; with it the divergence tells mostly whether a head reads at all, without it *where* it reads. The
price is that heads which hardly read count as much as others. Hence two secondary measures:
``shift_with_sink``, over all s ≤ t; and ``new_mass`` = Σ_{1 ≤ s ≤ t} max(0, a_{t+1+k}(s) - a_t(s)) of the rows
as they are: the share of the later row's attention that t's row did not put there, 0 … 1.

Into RESULTS_DIR/tables go, for the draft steps of `axis_steps`, `attention_shift.parquet` (a row for each
anchor and step, about the target alone), `attention_matches.parquet` (a row for each run, document and step:
its matches as 0 and 1, in the order of those anchors) and `attention_shift_facts.csv`. Nothing here is trained,
and nothing reaches a drafter.
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ..drafters.checkpoint import load_drafter
from ..drafters.context import read_by
from ..errors import StudyError
from ..metrics.acceptance import AXES, axis_steps
from ..target.capture import uniform_layers
from ..target.load import Target, full_attention_layers, resolve_dtype
from ..training.judging import anchor_places, match_documents
from .measuring import Part, facts_of, measure_parts, open_results, visit, write_tables
from .target_rows import check_rows, compute_state, jensen_shannon

KV_LAYERS = 3  # the study's default: uniformly spaced layers, the same for every drafter: shift is of the anchor
MEASURES = ("shift", "shift_with_sink", "new_mass", "entropy")


def row_measures(now: Tensor, later: Tensor, anchors: Tensor) -> Tensor:
    """Shift, shift with sink and new mass between the rows of anchors and of later positions, averaged over heads.

    Parameters
    ----------
    now, later : [H, M, N] attention weights of positions t and of t+1+k, M anchors. anchors : [M] t.

    Returns
    -------
    [3, M]; the first is NaN for an anchor at t = 0, whose prefix is the sink alone.
    """
    places = torch.arange(now.shape[-1], device=now.device)
    prefix = places <= anchors[:, None]
    content = prefix & (places > 0)
    new = (later - now).clamp(min=0) * content
    found = [jensen_shannon(now * content, later * content), jensen_shannon(now * prefix, later * prefix), new.sum(-1)]
    return torch.stack(found).mean(1)


@torch.no_grad()
def shift_document(
    target: Target, tokens: Tensor, anchors: Tensor, steps: Sequence[int], layers: Sequence[int]
) -> Tensor:
    """`row_measures` of one document, averaged over ``layers``: tokens [n], anchors [M] t -> [steps, 3, M] float32.

    Rows are recomputed a hundred anchors at a time, so that nothing of size [H, n, n] is held. Steps that end past the
    document are clamped to it: ignore them where not valid.
    """
    state, anchors = compute_state(target, tokens, layers), anchors.to(target.device)
    found = torch.zeros(len(steps), 3, len(anchors), device=target.device)
    for layer in range(len(layers)):
        for part in torch.arange(len(anchors), device=target.device).split(100):
            now = state.rows(layer, anchors[part])
            for place, k in enumerate(steps):
                later = state.rows(layer, (anchors[part] + 1 + k).clamp(max=len(tokens) - 1))
                found[place, :, part] += row_measures(now, later, anchors[part]) / len(layers)
    return found


def entropy(target: Target, final_hidden: Tensor, rows: int = 512) -> Tensor:
    """Entropy in nats of softmax(head · final_hidden): [n, d] -> [n] float32 on the CPU."""
    parts = final_hidden.to(target.device, target.dtype).split(rows)
    logits = (target.logits(part).float().log_softmax(-1) for part in parts)
    return torch.cat([-(log.exp() * log).sum(-1).cpu() for log in logits])


@torch.no_grad()
def measure_target(source, target: Target, draft_length: int, layers: Sequence[int]) -> pd.DataFrame:
    """The rows of ``attention_shift``: every valid (anchor, step) of every document, steps of `axis_steps`.

    ``entropy`` is that of p_{t+1+k} in nats over the whole vocabulary: the p that judges drafts.
    """
    check_rows(target, layers, source.batch([0], ()).tokens[0, : source.lengths[0]][:64])
    steps, found = axis_steps(draft_length), []
    for document, features, anchors in visit(source, "attention shift", ("final_hidden",), draft_length, target.device):
        kept = anchors.valid[0, :, 0].cpu()
        index, valid = anchors.index[0].cpu()[kept], anchors.valid[0].cpu()[kept]
        if not len(index):
            continue
        tokens = features.tokens[0, : source.lengths[document]]
        measured = shift_document(target, tokens, index, steps, layers).cpu()
        uncertainty = entropy(target, features.final_hidden[0])
        axes = dict(zip(AXES, anchor_places(source, document).T, strict=True))
        for place, k in enumerate(steps):
            rows = valid[:, k]
            columns = dict(zip(MEASURES, [*measured[place][:, rows], uncertainty[index[rows] + 1 + k]], strict=True))
            labels = {name: column[rows.numpy()] for name, column in axes.items()}
            values = {name: column.double().numpy() for name, column in columns.items()}
            found.append(pd.DataFrame({"document": document, "draft_step": k, **labels, **values}))
    table = pd.concat(found or [pd.DataFrame()], ignore_index=True)
    return table.assign(**{name: [float(f"{x:.3g}") for x in table[name]] for name in MEASURES if name in table})


def measure_matches(source, folder: Path, target: Target, draft_length: int) -> pd.DataFrame:
    """The rows of ``attention_matches`` of one run: match_{t,k} of every valid anchor, as text of 0 and 1.

    Raises
    ------
    StudyError : the run was evaluated on other documents or other anchors (its ``counts.csv`` says so).
    """
    drafter = load_drafter(folder, target)
    dtype = resolve_dtype("auto", target.device)
    matched = match_documents(
        read_by(drafter.config, drafter.spec, source), drafter, draft_length, device=target.device, dtype=dtype
    )
    rows = [
        [document, k, "".join(map(str, match[valid[:, k], k].astype(int)))]
        for document, (match, valid) in enumerate(matched)
        for k in axis_steps(draft_length)
        if valid[:, k].any()
    ]
    rows = pd.DataFrame(rows, columns=["document", "draft_step", "matches"])
    check_counts(rows, folder, len(source))
    return rows


def check_counts(rows: pd.DataFrame, folder: Path, documents: int) -> None:
    """The run's own counts, made when it was trained: the same anchors, and matches that differ by rounding at most.

    Fewer ``documents`` than the run was judged on will do: they are the first of the split in both.
    """
    counts = pd.read_csv(folder / "counts.csv").query("anchors > 0 and document < @documents")
    counts = counts[counts["draft_step"].isin(rows["draft_step"])]
    both = rows.merge(counts, on=["document", "draft_step"], how="outer", suffixes=("_again", ""))
    if not both["matches_again"].str.len().eq(both["anchors"]).all():
        raise StudyError(
            f"{folder} was evaluated on other documents or anchors than {folder.parents[2]}/features; train it again"
        )
    changed = both["matches_again"].str.count("1").sub(both["matches"]).abs().sum() / both["anchors"].sum()
    if changed > 0.02:
        raise StudyError(f"{folder}: {changed:.1%} of its matches are not those of its counts.csv; train it again")


def measure_shift(results_dir: str | Path, runs: Sequence[str] = (), *, fingerprint: str) -> dict[str, Path]:
    """Measure target and runs (``variant/seedN``; all finished ones by default) and write the tables.

    fingerprint : of the code; what RESULTS_DIR/attention_shift has of it, of these documents and weights, stays.
    """
    started, results = time.perf_counter(), open_results(results_dir, runs)
    source, target, draft_length = results.source, results.target, results.draft_length
    layers = uniform_layers(full_attention_layers(target.model), KV_LAYERS)
    parts = [Part("attention_shift", "target", partial(measure_target, source, target, draft_length, layers))]
    for folder in results.runs.values():
        make = partial(measure_matches, source, folder, target, draft_length)
        parts.append(Part("attention_matches", "matches", make, folder))
    depends = f"{fingerprint} {results.hashes} {layers} {draft_length}"
    made = measure_parts(results.folder / "attention_shift", depends, parts)
    facts = facts_of(results, time.perf_counter() - started, kv_layers=" ".join(map(str, layers)))
    return write_tables(results_dir, {**made, "attention_shift_facts": facts})

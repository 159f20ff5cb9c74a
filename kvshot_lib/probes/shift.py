"""How far the target's own attention moves between an anchor and its draft steps, and where each drafter was right there.

    python -m kvshot_lib.probes.shift RESULTS_DIR [VARIANT/seedN ...]     after `python -m kvshot_lib.metrics.tables collect RESULTS_DIR`

The paper says that a hidden state is a query-dependent summary of the prefix: f_t keeps what the query at t looked at, and fails where
the query at a later position would look elsewhere. So compare the target's attention rows at t and at t+1+k over the prefix s ≤ t, which
is all that a drafter can know of the target at any k. With rows a_t and a_{t+1+k}, both cut to s ≤ t and made to sum to 1, and m their mean,

    shift_{t,k} = mean over the reused layers and their heads of JS,   JS = KL(a_t | m) / 2 + KL(a_{t+1+k} | m) / 2   in nats, 0 … ln 2

Stated before any data: the **primary** shift leaves out s = 0. In most heads the first token takes most of the mass whatever the query (an
attention sink), its content is the same in every document, and mass that goes there reads nothing; with it the divergence tells mostly
whether a head reads at all, without it *where* it reads. The price is that heads which hardly read count as much as others. Hence two
secondary measures: ``shift_with_sink``, the same over all s ≤ t; and ``new_mass`` = Σ_{1 ≤ s ≤ t} max(0, a_{t+1+k}(s) - a_t(s)) of the rows as
they are (t+1+k's is not made to sum to 1 over s ≤ t): the share of its attention that t's row did not put there, 0 … 1.

It writes, for the draft steps of `metrics.axis_steps`, `attention_shift.parquet` (a row for each anchor and step, about the target alone),
`attention_matches.parquet` (a row for each run, document and step: its matches as 0 and 1, in the order of those anchors) and
`attention_shift_facts.csv` (provenance) into RESULTS_DIR/tables. Nothing here is trained, and nothing reaches a drafter.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from ..drafters.checkpoint import load_drafter
from ..errors import StudyError, one_line_errors
from ..features.shuffled import ShuffledKV
from ..features.store import StoredFeatures
from ..files import write_csv
from ..metrics import tables
from ..metrics.acceptance import AXES, axis_steps
from ..parts import claim
from ..provenance import provenance
from ..study.fingerprints import fingerprint
from ..target.capture import attention_rows, capture, uniform_layers
from ..target.load import Target, full_attention_layers, load_target, resolve_dtype
from ..training.judging import anchor_places, match_documents
from ..training.ttt import find_anchors

KV_LAYERS = 3  # the study's default: uniformly spaced layers, the same for every drafter, so that shift is a property of the anchor
MEASURES = ("shift", "shift_with_sink", "new_mass", "entropy")


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """JS divergence of distributions over the last axis, in nats: 0 for equal ones, ln 2 for disjoint ones (Lin 1991).

    Each is made to sum to 1 first; NaN where one has no mass. [..., N], [..., N] -> [...]
    """
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    mean = (a + b) / 2
    return ((torch.special.xlogy(a, a / mean) + torch.special.xlogy(b, b / mean)).nan_to_num(0).sum(-1) / 2).where(
        a.sum(-1).isfinite() & b.sum(-1).isfinite(), torch.nan
    )


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

    Rows are recomputed from captured queries and keys, a hundred anchors at a time, so that nothing of size [H, n, n] is held.
    Steps that end past the document are clamped to it: ignore them where not valid.
    """
    with capture(target.model, kv=layers, queries=True) as taken:
        target.model.get_decoder()(input_ids=tokens[None].to(target.device), use_cache=False)
    anchors = anchors.to(target.device)
    found = torch.zeros(len(steps), 3, len(anchors), device=target.device)
    for layer in layers:
        rows = lambda positions, layer=layer: attention_rows(taken.queries[layer], taken.keys[layer], positions)[0]
        for part in torch.arange(len(anchors), device=target.device).split(100):
            now = rows(anchors[part])
            for place, k in enumerate(steps):
                later = rows((anchors[part] + 1 + k).clamp(max=len(tokens) - 1))
                found[place, :, part] += row_measures(now, later, anchors[part]) / len(layers)
    return found


@torch.no_grad()
def row_error(target: Target, layers: Sequence[int], tokens: Tensor) -> float:
    """Largest difference between attention outputs from recomputed rows and the target's own (what enters ``o_proj``), tokens [n]."""
    outputs, handles = {}, []
    with capture(target.model, kv=layers, queries=True) as taken:
        try:
            for layer in layers:
                read = lambda _module, given, layer=layer: outputs.update({layer: given[0]})
                module = target.model.get_decoder().layers[layer].self_attn.o_proj
                handles.append(module.register_forward_pre_hook(read))
            target.model.get_decoder()(input_ids=tokens[None].to(target.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    worst = 0.0
    for layer in layers:
        weights = attention_rows(
            taken.queries[layer], taken.keys[layer], torch.arange(len(tokens), device=target.device)
        )
        values = taken.values[layer].repeat_interleave(weights.shape[1] // taken.values[layer].shape[1], dim=1)
        again = (weights @ values.float()).transpose(1, 2).flatten(2)
        worst = max(worst, float((again - outputs[layer].float()).abs().max()))
    return worst


def check_rows(target: Target, layers: Sequence[int], tokens: Tensor) -> None:
    """Refuse a target whose attention is not softmax(q k / sqrt(D)): one with learned sinks, capped scores or gated outputs, say.

    Raises
    ------
    StudyError : also for a layer that keeps a sliding window only, whose rows don't cover the prefix.
    """
    try:
        error = row_error(target, layers, tokens)
    except (AttributeError, RuntimeError) as cause:
        raise StudyError(
            f"target {target.name}: its attention can't be recomputed ({cause}); choose another target"
        ) from cause
    if not error < 1e-3:
        raise StudyError(
            f"target {target.name}: attention recomputed from queries and keys differs from its own by {error:.2g} in layers "
            f"{list(layers)}, so its rows are not comparable; choose a target with plain softmax attention"
        )


@torch.no_grad()
def measure_target(source, target: Target, draft_length: int, layers: Sequence[int]) -> pd.DataFrame:
    """The rows of ``attention_shift.csv``: every valid (anchor, step) of every document, steps of `axis_steps`.

    ``entropy`` is that of p_{t+1+k} in nats, over the whole vocabulary, from the stored final hidden state: the p that judges drafts.
    """
    steps, found = axis_steps(draft_length), []
    for document in tqdm(range(len(source)), desc="attention shift", mininterval=2):
        features = source.batch([document], ("final_hidden",))
        tokens, anchors = (
            features.tokens[0, : source.lengths[document]],
            find_anchors(features.answer_mask, draft_length),
        )
        kept = anchors.valid[0, :, 0].cpu()
        index, valid = anchors.index[0].cpu()[kept], anchors.valid[0].cpu()[kept]
        if not len(index):
            continue
        measured = shift_document(target, tokens, index, steps, layers).cpu()
        uncertainty = entropy(target, features.final_hidden[0])
        axes = dict(zip(AXES, anchor_places(source, [document])[0].T, strict=True))
        for place, k in enumerate(steps):
            rows = valid[:, k]
            columns = dict(zip(MEASURES, [*measured[place][:, rows], uncertainty[index[rows] + 1 + k]], strict=True))
            labels = {"document": document, "draft_step": k}
            labels |= {name: column[rows.numpy()] for name, column in axes.items()}
            found.append(
                pd.DataFrame({**labels, **{name: column.double().numpy() for name, column in columns.items()}})
            )
    if not found:
        raise StudyError("no anchors in the evaluation documents: extract documents with longer answers")
    table = pd.concat(found, ignore_index=True)
    return table.assign(**{name: [float(f"{x:.3g}") for x in table[name]] for name in MEASURES})


def entropy(target: Target, final_hidden: Tensor, rows: int = 512) -> Tensor:
    """Entropy in nats of softmax(head · final_hidden): [n, d] -> [n] float32 on the CPU."""
    parts = final_hidden.to(target.device, target.dtype).split(rows)
    logits = (target.logits(part).float().log_softmax(-1) for part in parts)
    return torch.cat([-(log.exp() * log).sum(-1).cpu() for log in logits])


def measure_run(source, folder: Path, target: Target, draft_length: int) -> pd.DataFrame:
    """The rows of ``attention_matches.csv`` of one run: match_{t,k} of every valid anchor, as text of 0 and 1.

    Raises
    ------
    StudyError : the run was evaluated on other documents or other anchors (its ``counts.csv`` says so).
    """
    drafter = load_drafter(folder, target)
    source = source.with_kv_layers(drafter.spec.kv_layers)
    source = ShuffledKV(source) if drafter.config.kv_control == "shuffled" else source
    device, dtype = target.device, resolve_dtype("auto", target.device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        matched = match_documents(source, drafter, draft_length, device=device, dtype=dtype)
    labels = {"variant": folder.parent.name, "seed": int(folder.name.removeprefix("seed"))}
    rows = [
        {
            **labels,
            "document": document,
            "draft_step": k,
            "matches": "".join(map(str, match[valid[:, k], k].astype(int))),
        }
        for document, (match, valid) in enumerate(matched)
        for k in axis_steps(draft_length)
        if valid[:, k].any()
    ]
    _check_counts(pd.DataFrame(rows), folder, len(source))
    return pd.DataFrame(rows)


def _check_counts(rows: pd.DataFrame, folder: Path, documents: int) -> None:
    """The run's own counts, made when it was trained: the same anchors, and matches that differ by rounding at most.

    Fewer ``documents`` than the run was judged on will do: they are the first of the split in both.
    """
    counts = pd.read_csv(folder / "counts.csv")
    counts = counts[(counts["anchors"] > 0) & counts["draft_step"].isin(rows["draft_step"])]
    counts = counts[counts["document"] < documents]
    both = rows.merge(counts, on=["document", "draft_step"], how="outer", suffixes=("_again", ""))
    if not both["matches_again"].str.len().eq(both["anchors"]).all():
        raise StudyError(
            f"{folder} was evaluated on other documents or anchors than {folder.parents[2]}/features; train it again"
        )
    changed = both["matches_again"].str.count("1").sub(both["matches"]).abs().sum() / both["anchors"].sum()
    if changed > 0.02:
        raise StudyError(f"{folder}: {changed:.1%} of its matches are not those of its counts.csv; train it again")


def measure(results_dir: str | Path, runs: Sequence[str] = (), keep: str | Path = "") -> dict[str, Path]:
    """Measure target and runs (all finished ones by default), a file each in RESULTS_DIR/attention_shift, and merge them into tables.

    What is there already, of the same code, documents and weights, is not measured again. ``keep`` names a folder of tables made on the same documents
    before: their other runs stay.
    """
    started, results_dir = time.perf_counter(), Path(results_dir)
    folders = sorted(path.parent for path in results_dir.glob("runs/*/seed*/run.json"))
    folders = [folder for folder in folders if not runs or f"{folder.parent.name}/{folder.name}" in runs]
    if not folders or len(folders) < len(set(runs)):
        raise StudyError(
            f"no finished run in {results_dir}/runs, or not all of those named: train with 03_train_drafter first"
        )
    source = StoredFeatures(results_dir / "features" / "evaluation")
    target = load_target(source.spec.target, dtype="float32")
    if target.hash != source.spec.target_hash:
        raise StudyError(
            f"the features in {results_dir} come from other weights of {target.name}; run 01_extract_kv_cache anew"
        )
    layers = uniform_layers(full_attention_layers(target.model), KV_LAYERS)
    draft_length = int(pd.read_csv(folders[0] / "counts.csv")["draft_step"].max()) + 1
    work = results_dir / "attention_shift"
    claim(work, fingerprint("probes.shift", {"layers": layers, "draft_length": draft_length}))
    path = work / f"target.{source.documents_hash[:8]}.csv"
    if not path.exists():
        check_rows(target, layers, source.batch([0], ()).tokens[0, : source.lengths[0]][:64])
        write_csv(path, measure_target(source, target, draft_length, layers))
    found = [_one_run(work, folder, source, target, draft_length) for folder in folders]
    made = {"attention_shift": pd.read_csv(path), "attention_matches": pd.concat(found, ignore_index=True)}
    if keep:
        made["attention_matches"] = _kept(keep, made)
    facts = {
        "target": target.name,
        "target_hash": target.hash,
        "kv_layers": " ".join(map(str, layers)),
        "documents": len(source),
    }
    facts |= {
        "documents_hash": source.documents_hash,
        "dtype": "float32",
        "seconds": round(time.perf_counter() - started, 1),
    }
    made["attention_shift_facts"] = pd.DataFrame([facts | provenance(target.device)])
    return {name: tables.write(results_dir / "tables", name, table) for name, table in made.items()}


def _one_run(work: Path, folder: Path, source, target: Target, draft_length: int) -> pd.DataFrame:
    """A run's matches, from their file if its weights are those of then."""
    weights = json.loads((folder / "drafter.json").read_text())["weights_sha256"]
    path = work / f"{folder.parent.name}.{folder.name}.{weights[:8]}.{source.documents_hash[:8]}.csv"
    if not path.exists():
        print(f"{folder.parent.name}/{folder.name}", file=sys.stderr, flush=True)
        write_csv(path, measure_run(source, folder, target, draft_length))
    return pd.read_csv(path, dtype={"variant": str, "matches": str})


def _kept(keep: str | Path, made: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The matches measured now, and those of other runs in the tables of ``keep``, if these are about the same anchors."""
    before, new = tables.read(keep, "attention_matches"), made["attention_matches"]
    places = ["document", "draft_step", *AXES]
    if not tables.read(keep, "attention_shift")[places].equals(made["attention_shift"][places]):
        raise StudyError(f"the tables in {keep} are about other anchors: leave out --keep")
    runs = set(zip(new["variant"], new["seed"], strict=True))
    others = [run not in runs for run in zip(before["variant"], before["seed"], strict=True)]
    return pd.concat([before[others], new], ignore_index=True)


@one_line_errors
def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvshot_lib.probes.shift", description=__doc__.splitlines()[0])
    parser.add_argument("results_dir", metavar="RESULTS_DIR")
    parser.add_argument("runs", nargs="*", metavar="VARIANT/seedN", help="only these (all finished ones by default)")
    parser.add_argument(
        "--keep", default="", metavar="TABLES_DIR", help="and the runs of these tables, if not measured again"
    )
    given = parser.parse_args(words)
    for path in measure(given.results_dir, given.runs, given.keep).values():
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Arithmetic and memory traffic that runs took and that drafting takes, counted; no clock is involved.

python -m kvshot_lib.study.compute TABLES_DIR    writes TABLES_DIR/compute.csv from its runs.csv, the run's profile and the corpus

A run's batches are a function of its seed, so the tokens, anchors and pairs (t, k) that it computed are counted by walking them again;
the walk must end at the ``trained_tokens`` that the run recorded, or the run is left out. FLOPs are those of `cost`: 2 · inputs · outputs
for every linear map a row goes through, and attention over the entries that an anchor really sees. Padding, norms, RoPE, softmax, the
optimiser, and whatever a kernel computes only to mask it are not counted, nor is the target's own pass (equal for equal tokens).

Backward counts twice the forward: once for the gradient of the weights, once for that of the inputs. The frozen LM head has no gradient of
weights, a map that reads target state as it is no gradient of inputs; these count once.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..drafters.drafter import Drafter, DrafterConfig, build_drafter
from ..errors import StudyError, one_line_errors
from ..features.live import LiveFeatures
from ..features.spec import feature_spec
from ..metrics import tables
from ..target.load import Target, load_target
from ..text.corpus import Document, load_corpus
from ..training.cost import block_bytes, block_flops, prefix_flops_per_token, step_bytes, step_flops
from ..training.loop import TrainConfig, batches, total_steps
from ..training.ttt import find_anchors
from .profiles import NOTEBOOKS, Profile, load_profile, parameter_defaults

CHAIN = 7  # draft steps of the chain whose cost is counted
CONTEXT = 512  # tokens that it and the target see


@dataclass(frozen=True)
class Work:
    """What one training computed.

    tokens, columns : of all documents that went through; prefix entries are made for every token but a document's last.
    rows : float [K], anchors that draft step k ran on (expected, where they are drawn). entries : float [K], prefix entries that they saw.
    scored : float [K], pairs (t, k) whose loss was taken; those outside the draft vocabulary, a few in a hundred, are among them.
    steps : of the optimiser.
    """

    tokens: int
    columns: int
    rows: np.ndarray
    entries: np.ndarray
    scored: np.ndarray
    steps: int


def document_work(answer_mask: np.ndarray, ttt_steps: int, fraction: float, *, dense_first: bool = True) -> np.ndarray:
    """``rows``, ``entries`` and ``scored`` of one document, float [3, K].

    An answer of 6 tokens after 3 others, K = 3, all anchors: steps 0, 1, 2 have 5, 4, 3 pairs; 5 anchors t = 2 … 6 see 3 + … + 7 = 25 entries,
    at every step, because a chain runs to its end. With ``fraction=.2`` one anchor of the five is drawn for k ≥ 1 (``dense_first=False``,
    a block: for step 0 too), and sees 5 entries on average.
    """
    anchors = find_anchors(torch.from_numpy(answer_mask)[None], ttt_steps)
    used = anchors.valid[0, :, 0]
    number = used.sum()
    share = float(torch.ceil(number * fraction) / number.clamp(min=1)) if fraction < 1 else 1.0
    shares = np.full(ttt_steps, share)
    if dense_first:
        shares[0] = 1.0
    seen = float((anchors.index[0] + 1)[used].sum())
    return np.stack([shares * float(number), shares * seen, shares * anchors.valid[0].sum(0).numpy()])


def run_work(documents: Sequence[Document], config: TrainConfig, *, dense_first: bool = True) -> Work:
    """What a training on these documents computes, from start to end."""
    lengths = [len(document.tokens) for document in documents]
    total = total_steps(config, len(documents))
    times = np.zeros(len(documents), dtype=np.int64)
    for indices in batches(lengths, config, 0, total):
        times[indices] += 1
    options = {"dense_first": dense_first}
    each = [document_work(d.answer_mask, config.ttt_steps, config.anchor_fraction, **options) for d in documents]
    summed = np.tensordot(times, np.stack(each), 1)
    tokens = int(times @ np.array(lengths))
    return Work(tokens, tokens - int(times.sum()), *summed, total)


def training_flops(drafter: Drafter, work: Work) -> float:
    """FLOPs of a training: layers 3 times their forward, prefix maps 2 or 3 times, LM head 2 times, and the target's probabilities."""
    head = 2 * drafter.head.numel()
    if drafter.config.paradigm == "block":
        tokens = drafter.config.block_size - 1
        layers = work.rows[0] * (block_flops(drafter, _mean(work, 0)) - head * tokens)
    else:
        steps = [k for k, rows in enumerate(work.rows) if rows]
        layers = sum(work.rows[k] * (step_flops(drafter, _mean(work, k), k) - head) for k in steps)
    prefix = work.columns * (3 * prefix_flops_per_token(drafter) - plain_prefix_flops(drafter))
    return float(3 * layers + prefix + 2 * head * work.scored.sum() + head * work.tokens)


def _mean(work: Work, k: int) -> float:
    """Prefix entries that an anchor sees at step k; costs are linear in them."""
    return work.entries[k] / work.rows[k]


def plain_prefix_flops(drafter: Drafter) -> int:
    """FLOPs a token of the maps that read target state as it is stored: nothing before them is trained."""
    config, maps = drafter.config, []
    if config.fuses_hidden and not config.hidden_norm:
        maps.append(drafter.fuse_hidden)
    if config.kv_control != "from_hidden":
        fusions = [fusion for layer in drafter.layers if (fusion := getattr(layer, "fusion", None))]
        maps += [part for fusion in fusions for part in (fusion.keys, fusion.values)]
    first = [part[0] if isinstance(part, nn.Sequential) else part for part in maps]
    return sum(2 * part.weight.numel() for part in first if isinstance(part, nn.Linear))


def chain_cost(drafter: Drafter) -> dict[str, int]:
    """FLOPs and bytes of one chain of `CHAIN` draft steps (of a block: its one pass) at `CONTEXT` tokens, and of the projection before it.

    The projection of newly verified tokens into prefix entries reads its weights once, however many tokens they are.
    """
    if drafter.config.paradigm == "block":
        flops, read = block_flops(drafter, CONTEXT), block_bytes(drafter, CONTEXT)
    else:
        flops = sum(step_flops(drafter, CONTEXT, k) for k in range(CHAIN))
        read = sum(step_bytes(drafter, CONTEXT, k) for k in range(CHAIN))
    # in bfloat16 a weight has 2 bytes, and it takes part in 2 FLOPs a row
    return {"chain_flops": flops, "chain_bytes": read + prefix_flops_per_token(drafter)}


def target_cost(target: Target) -> dict[str, int]:
    """FLOPs and bytes of one target forward over one new token at `CONTEXT` tokens, LM head included: 2 a weight, and the attention."""
    config = target.config
    weights = sum(m.weight.numel() for m in target.model.modules() if isinstance(m, nn.Linear))
    layers, size = config.num_hidden_layers, feature_spec(target).head_dim
    attention = 4 * layers * config.num_attention_heads * size * CONTEXT
    cache = 2 * 2 * layers * config.num_key_value_heads * size * CONTEXT
    return {"target_flops": 2 * weights + attention, "target_bytes": 2 * weights + cache}


def compute_table(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows of ``compute.csv``, and what could not be counted, a line a run."""
    rows, untold, known = [], [], {}
    for run in runs.itertuples():
        try:
            rows.append(_run_row(run, known))
        except StudyError as error:
            untold.append(f"{run.variant} seed {run.seed}: {error}")
    table = pd.DataFrame(rows, columns=list(tables.SCHEMAS["compute"]))
    own = table.set_index(["variant", "seed"])["training_flops"].to_dict()
    starts = {(r.variant, r.seed): (r.init_from, r.seed) for r in runs.itertuples() if _text(r, "init_from")}
    table["start_flops"] = [own.get(starts[key], np.nan) if key in starts else 0.0 for key in own]
    return tables.check(table, "compute", "compute.csv"), untold


def _run_row(run, known: dict) -> dict:
    """One run's row; ``known`` keeps targets, documents and work that runs share."""
    profile = load_profile(run.profile)
    if run.variant not in profile.drafters:
        raise StudyError(f"profile {run.profile} does not train it, so its parameters are not known")
    target = _once(known, ("target", run.target), lambda: load_target(run.target, device="cpu", dtype="float32"))
    if target.hash != run.target_hash:
        raise StudyError(f"its target's weights ({run.target_hash[:8]}…) are not those of {run.target} here")
    documents = _once(known, ("documents", run.profile), lambda: _documents(profile, target))
    if run.corpus.removeprefix("shuffled ")[:7] != documents[1][:7]:
        raise StudyError(f"it was trained on other documents than profile {run.profile} has now")
    values = parameter_defaults(NOTEBOOKS["train"]) | profile.train | profile.drafters[run.variant]
    drafting, training = (
        config(**{f.name: values[f.name] for f in fields(config) if f.name in values} | more)
        for config, more in ((DrafterConfig, {}), (TrainConfig, {"seed": run.seed}))
    )
    dense = drafting.paradigm != "block"
    key = (
        "work",
        run.profile,
        run.seed,
        training.ttt_steps,
        training.anchor_fraction,
        dense,
        training.max_steps,
        training.epochs,
    )
    work = _once(known, key, lambda: run_work(documents[0], training, dense_first=dense))
    if work.tokens != run.trained_tokens:
        raise StudyError(f"it saw {run.trained_tokens:,} tokens, its profile now gives {work.tokens:,}")
    drafter = _drafter(drafting, target, run.draft_vocab_size)
    flops = training_flops(drafter, work)
    if training.branch_warmup_steps or training.branch_loss_weight:
        alone = training_flops(_drafter(replace(drafting, cross_only=True), target, run.draft_vocab_size), work)
        warming = training.branch_warmup_steps / work.steps
        flops = (1 - warming) * flops + (warming if warming else 1) * alone
    counts = {"anchors": work.rows[0], "pairs": work.rows.sum(), "training_flops": flops, "start_flops": np.nan}
    label = {"variant": run.variant, "seed": run.seed, "tokens": work.tokens}
    return label | counts | chain_cost(drafter) | target_cost(target) | {"context_length_tokens": CONTEXT}


def _drafter(config: DrafterConfig, target: Target, vocabulary: int) -> Drafter:
    """An untrained drafter: counts do not depend on values."""
    return build_drafter(config, target, feature_spec(target, config.kv_layers), torch.arange(vocabulary))


def _documents(profile: Profile, target: Target) -> tuple[list[Document], str]:
    """The profile's training documents, cut as notebook 01 cuts them, and their hash."""
    values = parameter_defaults(NOTEBOOKS["extract"]) | profile.extract
    documents = load_corpus(values["corpus"], "train").documents[: values["train_documents"]]
    live = LiveFeatures(target, documents, feature_spec(target), values["max_length_tokens"])
    return live.documents, live.documents_hash


def _once(known: dict, key: tuple, make):
    if key not in known:
        known[key] = make()
    return known[key]


def _text(row, name: str) -> str:
    """A text cell that may be empty, or a column that may not be there."""
    found = getattr(row, name, "")
    return found if isinstance(found, str) else ""


@one_line_errors
def main(words: Iterable[str] | None = None) -> int:
    """Count the runs of a folder of tables; says which could not be counted."""
    parser = argparse.ArgumentParser(prog="python -m kvshot_lib.study.compute", description=__doc__.split("\n")[0])
    parser.add_argument("tables_dir", metavar="TABLES_DIR")
    given = parser.parse_args(words)
    table, untold = compute_table(tables.read(given.tables_dir, "runs"))
    for line in untold:
        print(f"not counted: {line}", file=sys.stderr)
    print(tables.write(given.tables_dir, "compute", tables.rounded(table)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the recorded runs took and what their drafters take: one row a run, counted by `training.cost` from what is on
record.

A run's batches are a function of its seed, so they are walked again; the walk must end at the ``trained_tokens`` that
the run recorded, or the run is left out. Its parameters are those of its profile, its documents those of the
profile's corpus.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import torch

from ..drafters.config import DrafterConfig
from ..drafters.context import drafter_spec
from ..drafters.drafter import Drafter, build_drafter
from ..errors import StudyError
from ..features.extract import Extraction, prepare
from ..metrics import tables
from ..target.load import Target
from ..training.config import TrainConfig, configurations
from ..training.cost import CONTEXT, chain_cost, prefix_cost, run_work, target_cost, training_flops
from .profiles import extract_values, load_profile, train_values

WALK = ("seed", "epochs", "max_steps", "batch_documents", "ttt_steps", "anchor_fraction")  # what a walk depends on


def compute_table(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows of ``compute.csv``, and what could not be counted, a line a run."""
    rows, untold = [], []
    extracted = cache(_extraction)
    work = cache(lambda profile, *plan: run_work(extracted(profile).documents["train"].documents, *plan))
    for run in runs.itertuples():
        try:
            rows.append(_run_row(run, extracted, work))
        except StudyError as error:
            untold.append(f"{run.variant} seed {run.seed}: {error}")
    table = pd.DataFrame(rows, columns=list(tables.SCHEMAS["compute"]))
    own = table.set_index(["variant", "seed"])["training_flops"].to_dict()
    starts = {(r.variant, r.seed): (r.init_from, r.seed) for r in runs.itertuples() if isinstance(r.init_from, str)}
    starts = {key: start for key, start in starts.items() if start[0]}
    table["start_flops"] = [own.get(starts[key], np.nan) if key in starts else 0.0 for key in own]
    return tables.check(table, "compute", "compute.csv"), untold


def _extraction(name: str) -> Extraction:
    profile = load_profile(name)
    return prepare(extract_values(profile, profile.results) | {"device": "cpu", "dtype": "float32"})


def _run_row(run, extracted: Callable, work_of: Callable) -> dict:
    """One run's row; ``extracted`` gives a profile's target and documents, ``work_of`` walks over these."""
    profile = load_profile(run.profile)
    if run.variant not in profile.drafters:
        raise StudyError(f"profile {run.profile} does not train it, so its parameters are not known")
    found = extracted(run.profile)
    target, documents = found.target, found.documents["train"]
    if target.hash != run.target_hash:
        raise StudyError(f"its target's weights ({run.target_hash[:8]}…) are not those of {target.name} here")
    if run.corpus.removeprefix("shuffled ")[:7] != documents.documents_hash[:7]:
        raise StudyError(f"it was trained on other documents than profile {run.profile} has now")
    config, training = configurations(train_values(profile, run.variant, run.seed))
    walk = TrainConfig(**{name: getattr(training, name) for name in WALK})
    work = work_of(run.profile, walk, config.paradigm != "block")
    if work.tokens != run.trained_tokens:
        raise StudyError(f"it saw {run.trained_tokens:,} tokens, its profile now gives {work.tokens:,}")
    drafter = _drafter(config, target, run.draft_vocab_size)
    flops, chain, alone = training_flops(drafter, work), chain_cost(drafter), target_cost(target)
    if training.branch_warmup_steps or training.branch_loss_weight:
        branch = training_flops(_drafter(replace(config, cross_only=True), target, run.draft_vocab_size), work)
        warming = training.branch_warmup_steps / work.steps
        flops = (1 - warming) * flops + (warming or 1) * branch
    return {
        "variant": run.variant,
        "seed": run.seed,
        "tokens": work.tokens,
        "anchors": work.rows[0],
        "pairs": work.rows.sum(),
        "training_flops": flops,
        "start_flops": np.nan,
        "chain_flops": chain.flops,
        "chain_bytes": chain.bytes + prefix_cost(drafter).flops,
        "target_flops": alone.flops,
        "target_bytes": alone.bytes,
        "context_length_tokens": CONTEXT,
    }


def _drafter(config: DrafterConfig, target: Target, vocabulary: int) -> Drafter:
    """An untrained drafter: counts do not depend on values."""
    return build_drafter(config, target, drafter_spec(config, target), torch.arange(vocabulary))

"""Acceptance by the length of context, also beyond what a drafter was trained on, with windows on what it attends to.

Every drafter reads the same long documents, so each bin of context lengths holds the same anchors for all. An anchor t
has a context of t + 1 tokens; bins are powers of two (`metrics.acceptance.bin_low`). A window of w tokens shows each
anchor the newest w of its prefix entries, in a drafter that was trained with none.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from ..drafters.checkpoint import load_drafter
from ..drafters.context import read_by
from ..drafters.runs import find_runs
from ..errors import StudyError
from ..features.live import LiveFeatures
from ..features.spec import FeatureSpec
from ..metrics.acceptance import COUNTS, STEPS, bin_low, count_document
from ..settings import at_least
from ..target.load import load_target, resolve_dtype
from ..text.corpus import load_corpus
from ..training.judging import anchor_places, match_documents
from .measuring import Part, Results, described, facts_of, measure_parts, write_tables

NO_CUT = 1 << 20


def measure_context(
    results_dir: str | Path, runs: Sequence[str] = (), *, fingerprint: str, corpus: str = "selfgen",
    documents: int = 64, windows: Sequence[int] = (0,), device: str = "auto",
) -> dict[str, Path]:  # fmt: skip
    """Judge trained drafters on the evaluation documents of ``corpus``, by context length: table ``context``.

    Parameters
    ----------
    documents : the first so many. windows : tokens, 0 for none.
    fingerprint : of the code; what RESULTS_DIR/context has of it, of these documents and weights, stays.
    """
    at_least(1, documents=documents, windows=len(windows))
    at_least(0, window=min(windows))
    started, found = time.perf_counter(), find_runs(results_dir, runs, finished=False)
    spec = FeatureSpec.from_json(described(next(iter(found.values())))["spec"])
    text, target = load_corpus(corpus, "evaluation"), load_target(spec.target, device=device)
    source = LiveFeatures(target, text.documents[:documents], spec, NO_CUT)
    results = Results(Path(results_dir), found, target, source)
    parts = [
        Part("context", f"window{window}", partial(measure_window, run, source, window), run)
        for run in found.values()
        for window in dict.fromkeys(windows)
    ]
    depends = f"{fingerprint} {results.hashes} {target.dtype} {target.device}"
    made = measure_parts(results.folder / "context", depends, parts)
    facts = facts_of(results, time.perf_counter() - started, corpus=str(corpus))
    return write_tables(results_dir, {**made, "context_facts": facts})


def measure_window(run: Path, source: LiveFeatures, window: int) -> pd.DataFrame:
    """The rows of ``context`` of one drafter and window."""
    drafter, device = load_drafter(run, source.target), source.target.device
    drafter.config = replace(drafter.config, window_tokens=window)
    source, dtype = read_by(drafter.config, drafter.spec, source), resolve_dtype("auto", device)
    matched = match_documents(source, drafter, STEPS, device=device, dtype=dtype, batch_documents=1)
    rows = []
    for document, (match, valid) in enumerate(matched):
        bins = bin_low(anchor_places(source, document)[:, 1])
        for low in np.unique(bins):
            counts, (complete, accepted) = count_document(match[bins == low], valid[bins == low])
            own = pd.DataFrame(counts, columns=COUNTS).assign(complete=complete, accepted=accepted)
            labels = {"window_tokens": window, "document": document, "bin_low": low, "draft_step": own.index}
            rows.append(own.assign(**labels))
    if not rows:
        raise StudyError("no anchors in these documents: give some with longer answers")
    return pd.concat(rows, ignore_index=True)

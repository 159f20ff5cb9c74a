"""Query estimation, measured on trained drafters: do they look where the target will look?

Two measurements of each run over a linear map of the target's own KV (kv_1 … kv_4, the hybrids); `attention` and
`probe` say what they are. (What a true query would bring is asked of drafters that are trained with one: variants
``kv_1_oracle_query`` and others of data/experiments/sources.yaml.) Into RESULTS_DIR/tables go

    attention_overlap.parquet    means over the anchors of a document, by draft step, drafter layer and target layer;
                                 the rows of the target alone have the variant "target"
    query_probe.parquet          squared errors of the linear probe on a document, and those of its floor
    query_estimation_facts.csv   what was measured, and how

Documents are taken one by one. The target's queries and keys stay in memory (3 MB a document of 370 tokens at three
layers), each finished part of each run in RESULTS_DIR/query_estimation.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property, partial
from pathlib import Path

import pandas as pd

from ..drafters.checkpoint import load_drafter
from ..drafters.config import DrafterConfig
from ..drafters.drafter import Drafter
from ..drafters.runs import find_runs
from ..drafters.variants import QUERY_VARIANTS
from ..errors import StudyError
from ..features.shuffled import ShuffledKV
from ..metrics.acceptance import axis_steps
from .attention import overlap_rows, reference_rows, watch
from .measuring import Part, Results, described, facts_of, measure_parts, open_results, visit, write_tables
from .probe import probe_data, probe_rows
from .target_rows import TargetState, check_rows, compute_state, plain_queries

REFERENCE = "target"  # in place of a variant: rows of `attention_overlap` that are about the target alone


def target_states(results: Results) -> Callable[[tuple[int, ...], int], TargetState]:
    """(layers, document) -> the target's state in these layers, computed once."""
    tokens = lambda document: results.source.batch([document], ()).tokens[0, : results.source.lengths[document]]
    return cache(lambda layers, document: compute_state(results.target, tokens(document), layers))


class Run:
    """One drafter beside the target: features and state (of `target_states`) of its reused layers, when needed."""

    def __init__(self, results: Results, folder: Path, states: Callable[[tuple[int, ...], int], TargetState]):
        self.folder, self.target, self.steps = folder, results.target, axis_steps(results.draft_length)
        self.draft_length, self.layers = results.draft_length, tuple(described(folder)["spec"]["kv_layers"])
        self.source = results.source.with_layers(kv=self.layers)
        self.state = partial(states, self.layers)

    @cached_property
    def drafter(self) -> Drafter:
        return load_drafter(self.folder, self.target)

    def documents(self, told: str, reads: Sequence[str] = ()) -> Iterator[tuple]:
        """Every evaluation document: its number, features, anchors and the target's state."""
        for found in visit(self.source, told, reads, self.draft_length, self.target.device):
            yield *found, self.state(found[0])


def measure_references(run: Run) -> pd.DataFrame:
    """Rows of ``attention_overlap`` about the target alone, in the layers that ``run`` reuses."""
    partner, rows = ShuffledKV(run.source).partner, []
    for document, _, anchors, state in run.documents("references"):
        other = run.state(partner[document])
        found = reference_rows(anchors.index[0], anchors.valid[0], run.steps, state, other, run.layers)
        rows += [{"document": document, **row} for row in found]
    return pd.DataFrame(rows).assign(variant=REFERENCE, seed=0)


def measure_overlap(run: Run) -> pd.DataFrame:
    """Rows of ``attention_overlap`` of one run."""
    rows = []
    for document, features, anchors, state in run.documents("overlap", run.drafter.reads):
        calls = watch(run.drafter, features, anchors, run.steps)
        found = overlap_rows(calls, state, run.layers, anchors.valid[0])
        rows += [{"document": document, **row} for row in found]
    return pd.DataFrame(rows)


def measure_probe(run: Run) -> pd.DataFrame:
    """Rows of ``query_probe`` of one run."""
    data = []
    for document, features, anchors, state in run.documents("probe", run.drafter.reads):
        labels = plain_queries(state, run.drafter.rotary)
        data.append((document, probe_data(run.drafter, features, anchors, run.steps, labels)))
    return pd.DataFrame(probe_rows(data, run.layers))


def measure_queries(results_dir: str | Path, runs: Sequence[str] = (), *, fingerprint: str) -> dict[str, Path]:
    """Measure runs (``variant/seedN``; by default all finished ones of ``QUERY_VARIANTS``) and write the tables.

    Parameters
    ----------
    runs : the references are about the layers that the first of them reuses.
    fingerprint : of the code; parts that another one left are measured anew.

    Raises
    ------
    StudyError : no such run; a drafter whose queries, or a target whose attention, can't be compared, by name.
    """
    started = time.perf_counter()
    results = open_results(results_dir, _chosen(results_dir, runs))
    states = target_states(results)
    measured = [Run(results, folder, states) for folder in results.runs.values()]
    layers, evaluation = measured[0].layers, results.source
    check_rows(results.target, layers, evaluation.batch([0], ()).tokens[0, : evaluation.lengths[0]][:64])
    told = "-".join(map(str, layers))
    parts = [Part("attention_overlap", f"target.{told}", partial(measure_references, measured[0]))]
    for run in measured:
        parts.append(Part("attention_overlap", "overlap", partial(measure_overlap, run), run.folder))
        parts.append(Part("query_probe", "probe", partial(measure_probe, run), run.folder))
    depends = f"{fingerprint} {results.hashes} {results.draft_length}"
    made = measure_parts(results.folder / "query_estimation", depends, parts)
    made["query_estimation_facts"] = facts_of(results, time.perf_counter() - started)
    return write_tables(results_dir, made)


def _chosen(results_dir: str | Path, runs: Sequence[str]) -> list[str]:
    """The runs to be measured, each checked by what its drafter.json says."""
    found = find_runs(results_dir, runs)
    wanted = list(runs) or [name for name in found if name.split("/")[0] in QUERY_VARIANTS]
    if not wanted:
        raise StudyError(
            f"no finished run of {', '.join(QUERY_VARIANTS)} in {results_dir}/runs: train one with 03_train_drafter"
        )
    for name in wanted:
        check_drafter(DrafterConfig(**described(found[name])["config"]), name)
    return wanted


def reuses_kv(config: DrafterConfig) -> bool:
    """Whether a drafter attends over a linear map of the target's own, rotated KV: kv_1 … kv_4 and the hybrids."""
    plain = config.kv_control == "" and config.kv_fusion == "linear" and config.kv_rope == "raw"
    return config.paradigm in ("kv", "hybrid") and plain and not config.kv_with_hidden and config.query_from == "own"


def check_drafter(config: DrafterConfig, name: str) -> None:
    """Refuse, by name, a drafter whose queries can't be compared with the target's."""
    if not reuses_kv(config):
        raise StudyError(
            f"{name}: query estimation needs a kv or hybrid drafter over the target's own KV (kv_fusion='linear', "
            f"kv_rope='raw', no kv_control), not paradigm={config.paradigm!r} with kv_fusion={config.kv_fusion!r}, "
            f"kv_rope={config.kv_rope!r}, kv_control={config.kv_control!r}; leave it out"
        )

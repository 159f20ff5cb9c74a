"""Query estimation, measured on trained drafters: do they look where the target will look, and would it help them to?

    python -m kvshot_lib.probes.queries RESULTS_DIR [VARIANT/seedN ...]     after training (and `collect`)

Three measurements of each run, of drafters that attend over a linear map of the target's own KV (kv_1 … kv_4, the hybrids):
`attention_overlap`, `query_probe` and `query_oracle` say what they are. It writes, into RESULTS_DIR/tables,

    attention_overlap.parquet     means over the anchors of a document, by draft step, drafter layer and target layer; references as variant "target"
    query_probe.parquet           squared errors of the linear probe on a document, and those of its floor
    query_oracle.parquet          counts of every arm of the oracle on a document, by draft step
    query_estimation_facts.csv   what was measured, and how

Documents are taken one by one. The target's queries and keys are kept in RESULTS_DIR/target_state (3 MB a document of 370 tokens at
three layers), each finished part of each run in RESULTS_DIR/query_estimation, so that a killed command goes on where it was.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from ..drafters.checkpoint import load_drafter
from ..drafters.config import DrafterConfig
from ..drafters.variants import QUERY_ARMS, QUERY_VARIANTS
from ..errors import StudyError, one_line_errors
from ..features.shuffled import ShuffledKV
from ..features.store import StoredFeatures
from ..files import write_csv
from ..metrics import tables
from ..metrics.acceptance import axis_steps
from ..parts import claim
from ..provenance import provenance
from ..study.fingerprints import fingerprint
from ..target.load import Target, load_target
from ..training.ttt import find_anchors
from .kv_attention import check_drafter, read_state
from .overlap import overlap_rows, reference_rows, watch
from .query_oracle import RATE, all_query_maps, key_moments, run_arm
from .query_probe import plain_queries, probe_data, probe_rows
from .readout import rotary_of
from .shift import check_rows

REFERENCE = "target"  # in place of a variant: rows of `attention_overlap` that are about the target alone
RETRAINED, MOMENTS = 96, 32  # training documents that arms are re-trained on, and that key moments are taken from


class Study:
    """Target, features and the target's state of one results folder; ``draft_length`` K is that of its runs.

    ``documents``, ``passes``, ``rate``: how the oracle's arms are re-trained.
    """

    def __init__(self, results_dir: Path, draft_length: int, documents: int, passes: int, rate: float):
        self.draft_length, self.passes, self.rate = draft_length, passes, rate
        self.sources = {split: StoredFeatures(results_dir / "features" / split) for split in ("train", "evaluation")}
        spec = self.sources["evaluation"].spec
        self.target: Target = load_target(spec.target, dtype="float32")
        if self.target.hash != spec.target_hash:
            raise StudyError(
                f"the features in {results_dir} come from other weights of {spec.target}; run 01_extract_kv_cache anew"
            )
        self.retrained = range(min(documents, len(self.sources["train"])))
        kept = results_dir / "target_state"
        claim(kept, fingerprint("probes.kv_attention", {"target": self.target.hash}))
        self.kept = kept

    def on(self, layers: Sequence[int]) -> tuple[dict, dict]:
        """Sources of features and of the target's state, by split, for some reused layers."""
        sources = {split: source.with_kv_layers(layers) for split, source in self.sources.items()}
        folder = self.kept / "-".join(map(str, layers))
        return sources, {s: partial(read_state, folder, self.target, source) for s, source in sources.items()}


def measure_references(study: Study, layers: Sequence[int]) -> pd.DataFrame:
    """Rows of ``attention_overlap`` about the target alone, in the layers that drafters reuse."""
    sources, states = study.on(layers)
    source, read, rows = sources["evaluation"], states["evaluation"], []
    partner = ShuffledKV(source).partner
    for document in tqdm(range(len(source)), desc="references", mininterval=5):
        anchors = find_anchors(source.batch([document], ()).answer_mask, study.draft_length)
        index, valid = (part[0].to(study.target.device) for part in (anchors.index, anchors.valid))
        given = index, valid, axis_steps(study.draft_length), read(document), read(partner[document]), layers
        rows += [{"document": document, **row} for row in reference_rows(*given)]
    return pd.DataFrame(rows).assign(variant=REFERENCE, seed=0)


def measure_overlap(study: Study, drafter) -> pd.DataFrame:
    """Rows of ``attention_overlap`` of one run."""
    rows = []
    for document, features, anchors, state in _documents(study, drafter, "overlap"):
        calls = watch(drafter, features, anchors, axis_steps(study.draft_length))
        found = overlap_rows(calls, state, drafter.spec.kv_layers, anchors.valid[0])
        rows += [{"document": document, **row} for row in found]
    return pd.DataFrame(rows)


def measure_probe(study: Study, drafter) -> pd.DataFrame:
    """Rows of ``query_probe`` of one run."""
    rotary, data = rotary_of(study.target, drafter.spec), []
    for document, features, anchors, state in _documents(study, drafter, "probe"):
        labels = plain_queries(state, rotary)
        data.append((document, probe_data(drafter, features, anchors, axis_steps(study.draft_length), labels)))
    return pd.DataFrame(probe_rows(data, drafter.spec.kv_layers))


def measure_arm(study: Study, drafter, arm: str) -> pd.DataFrame:
    """Rows of ``query_oracle`` of one arm of one run."""
    sources, states = study.on(drafter.spec.kv_layers)
    maps = []
    if arm == "oracle":
        moments = key_moments(states["train"], study.retrained[:MOMENTS])
        maps = all_query_maps(drafter, moments)
    return run_arm(
        drafter, arm, sources, states, study.retrained, maps, study.draft_length, passes=study.passes, rate=study.rate
    )


def _documents(study: Study, drafter, told: str):
    """Every evaluation document: its number, features, anchors and the target's state."""
    sources, states = study.on(drafter.spec.kv_layers)
    device = study.target.device
    for document in tqdm(range(len(sources["evaluation"])), desc=told, mininterval=5):
        features = sources["evaluation"].batch([document], drafter.reads).to(device, torch.float32)
        yield document, features, find_anchors(features.answer_mask, study.draft_length), states["evaluation"](document)


PARTS: dict[str, tuple[str, Callable]] = {
    "overlap": ("attention_overlap", measure_overlap),
    "probe": ("query_probe", measure_probe),
    **{f"oracle_{arm}": ("query_oracle", partial(measure_arm, arm=arm)) for arm in QUERY_ARMS},
}
"""Part of a run's measurement -> its table, and what makes its rows."""


def measure(
    results_dir: str | Path, runs: Sequence[str] = (), *, documents: int = RETRAINED, passes: int = 1, rate: float = RATE,
    keep: str | Path = "", oracle: bool = True,
) -> dict[str, Path]:  # fmt: skip
    """Measure runs (``variant/seed0`` …; by default all finished ones of ``QUERY_VARIANTS``) and write the tables.

    Parameters
    ----------
    runs : the references are about the layers that the first of them reuses (the study's runs all reuse the same ones).
    documents, passes, rate : training documents that each arm of the oracle is re-trained on, how often, and at what learning rate.
    keep : a folder of tables made before, on the same documents: their other runs stay.
    oracle : re-train and judge the arms of the oracle too, which takes most of the time; without, the drafters as trained are its only arm.

    Raises
    ------
    StudyError : no such run; a drafter whose queries can't be compared, a target whose attention can't, each by name.
    """
    started, results_dir = time.perf_counter(), Path(results_dir)
    for name, value in (("documents", documents), ("passes", passes), ("rate", rate)):
        if not (value > 0 if name == "rate" else value >= 1):
            raise StudyError(f"{name}={value} must be {'above 0' if name == 'rate' else '1 or more'}")
    folders = chosen_runs(results_dir, runs)
    draft_length = int(pd.read_csv(folders[0] / "counts.csv")["draft_step"].max()) + 1
    study = Study(results_dir, draft_length, documents, passes, rate)
    work = results_dir / "query_estimation"
    claim(work, fingerprint("probes.queries", {"retrained": [documents, passes, rate], "draft_length": draft_length}))
    hashes = {split: source.documents_hash[:8] for split, source in study.sources.items()}
    found = {name: [] for name, _ in PARTS.values()}
    layers = json.loads((folders[0] / "drafter.json").read_text())["spec"]["kv_layers"]
    evaluation = study.sources["evaluation"]
    check_rows(study.target, layers, evaluation.batch([0], ()).tokens[0, : evaluation.lengths[0]][:64])
    path = work / f"target.{'-'.join(map(str, layers))}.{hashes['evaluation']}.csv"
    if not path.exists():
        _write_part(path, "attention_overlap", measure_references(study, layers))
    found["attention_overlap"].append(tables.read_one(path, "attention_overlap"))
    for folder in folders:
        for name, table in _one_run(work, folder, study, "".join(hashes.values()), oracle):
            found[name].append(table)
    made = {name: pd.concat(parts or [tables.empty(name)], ignore_index=True) for name, parts in found.items()}
    measured = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    facts = _facts(study, measured, made["query_oracle"], time.perf_counter() - started)
    if keep:
        made = {name: _kept(tables.read(keep, name), table) for name, table in made.items()}
        before = pd.read_csv(Path(keep) / "query_estimation_facts.csv")
        facts = pd.concat([facts, before[before["runs"] != " ".join(measured)]], ignore_index=True)
    made["query_estimation_facts"] = facts
    return {name: tables.write(results_dir / "tables", name, table) for name, table in made.items()}


def chosen_runs(results_dir: Path, runs: Sequence[str]) -> list[Path]:
    """Folders of the runs to be measured, in the order of the study; each is checked by what its drafter.json says."""
    finished = {f"{p.parents[1].name}/{p.parent.name}": p.parent for p in results_dir.glob("runs/*/seed*/run.json")}
    wanted = list(runs) or [name for name in finished if name.split("/")[0] in QUERY_VARIANTS]
    if unknown := [name for name in wanted if name not in finished]:
        raise StudyError(
            f"{', '.join(unknown)}: no finished run in {results_dir}/runs; finished: {', '.join(sorted(finished)) or 'none'}"
        )
    if not wanted:
        raise StudyError(
            f"no finished run of {', '.join(QUERY_VARIANTS)} in {results_dir}/runs: train one with 03_train_drafter first"
        )
    order = tables.in_order(name.split("/")[0] for name in wanted)
    wanted.sort(key=lambda name: (order.index(name.split("/")[0]), int(name.rpartition("seed")[2])))
    for name in wanted:
        described = json.loads((finished[name] / "drafter.json").read_text())
        check_drafter(DrafterConfig(**described["config"]), name)
    return [finished[name] for name in wanted]


def _one_run(work: Path, folder: Path, study: Study, documents: str, oracle: bool):
    """The parts of one run as (table, rows), from their files if its weights are those of then."""
    weights = json.loads((folder / "drafter.json").read_text())["weights_sha256"]
    stem, drafter = f"{folder.parent.name}.{folder.name}.{weights[:8]}.{documents}", None
    labels = {"variant": folder.parent.name, "seed": int(folder.name.removeprefix("seed"))}
    for part, (table, make) in PARTS.items():
        if table == "query_oracle" and not oracle and part != "oracle_as_trained":
            continue
        path = work / f"{stem}.{part}.csv"
        if not path.exists():
            print(f"{folder.parent.name}/{folder.name}: {part}", file=sys.stderr, flush=True)
            drafter = drafter or load_drafter(folder, study.target)
            _write_part(path, table, make(study, drafter).assign(**labels))
        yield table, tables.read_one(path, table)


def _write_part(path: Path, name: str, rows: pd.DataFrame) -> None:
    if rows.empty:
        raise StudyError("no anchors in the evaluation documents: extract documents with longer answers")
    write_csv(path, tables.rounded(rows[list(tables.SCHEMAS[name])].astype(tables.SCHEMAS[name])))


def _kept(before: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """The rows measured now, and those of other runs measured before, if these are about the same documents."""
    if len(new) and len(before) and set(before["document"]) != set(new["document"]):
        raise StudyError("the tables to keep are about other documents: leave out --keep")
    runs = set(zip(new["variant"], new["seed"], strict=True))
    others = [run not in runs for run in zip(before["variant"], before["seed"], strict=True)]
    return pd.concat([before[others], new], ignore_index=True)


def _facts(study: Study, runs: Sequence[str], oracle: pd.DataFrame, seconds: float) -> pd.DataFrame:
    """One row: what was measured, on what, by which code; how the oracle's arms were re-trained, if they were."""
    facts = {
        "target": study.target.name, "target_hash": study.target.hash, "runs": " ".join(runs),
        "documents": len(study.sources["evaluation"]), "documents_hash": study.sources["evaluation"].documents_hash,
    }  # fmt: skip
    if set(oracle["arm"]) > {"as_trained"}:
        facts |= {"retrained_documents": len(study.retrained), "retrained_tokens": int(oracle["trained_tokens"].max())}
        facts |= {"passes": study.passes, "learning_rate": study.rate}
    facts |= {"dtype": "float32", "seconds": round(seconds, 1)}
    return pd.DataFrame([facts | provenance(study.target.device)])


@one_line_errors
def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvshot_lib.probes.queries", description=__doc__.splitlines()[0])
    parser.add_argument("results_dir", metavar="RESULTS_DIR")
    told = f"only these (by default all finished ones of {', '.join(QUERY_VARIANTS)})"
    parser.add_argument("runs", nargs="*", metavar="VARIANT/seedN", help=told)
    parser.add_argument(
        "--documents",
        type=int,
        default=RETRAINED,
        help="training documents that each arm of the oracle is re-trained on",
    )
    parser.add_argument("--passes", type=int, default=1, help="over these documents")
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate of the re-training")
    parser.add_argument(
        "--no-oracle",
        dest="oracle",
        action="store_false",
        help="attention overlap and probe alone: most of the time goes to the oracle",
    )
    parser.add_argument(
        "--keep", default="", metavar="TABLES_DIR", help="and the runs of these tables, if not measured again"
    )
    given = vars(parser.parse_intermixed_args(words))
    for path in measure(given.pop("results_dir"), given.pop("runs"), **given).values():
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

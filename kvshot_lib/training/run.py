"""One training run: what it needs from disk, and what it leaves there (`results_dir/runs/<variant>/seed<k>`)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..drafters.checkpoint import draft_vocabulary, warm_start
from ..drafters.drafter import Drafter, DrafterConfig, build_drafter
from ..errors import StudyError
from ..features.kept import open_features, read_spec
from ..features.resident import ResidentFeatures
from ..features.shuffled import ShuffledKV
from ..features.store import StoredFeatures
from ..files import check_listed, sha256, write_csv, write_json
from ..metrics.acceptance import COUNTS, RUNS, count_axes, count_run, metrics_of
from ..provenance import provenance
from ..target.capture import uniform_layers
from ..target.load import Target, full_attention_layers, load_target, resolve_device, resolve_dtype
from .cost import drafting_cost
from .judging import anchor_places, match_documents, outside_vocabulary
from .loop import TrainConfig
from .record import recorded_gradients

SPLITS = ("train", "validation", "evaluation")


@dataclass(frozen=True)
class Run:
    """A drafter about to be trained, with its target, features by split, folder, and the dtype to compute in.

    ``fresh`` names the parameters that a warm start did not set.
    """

    variant: str
    drafter: Drafter
    target: Target
    features: dict[str, StoredFeatures]
    folder: Path
    dtype: torch.dtype
    init_from: str
    fresh: list[str]


def prepare_run(
    variant: str,
    drafter_config: DrafterConfig,
    train_config: TrainConfig,
    results_dir: str | Path,
    *,
    draft_vocab_size: int,
    init_from: str = "",
    device: str = "auto",
    dtype: str = "auto",
    compile_steps: bool = False,
    features_on_device: bool = False,
    features: dict | None = None,
) -> Run:
    """Open the features that notebook 01 left in ``results_dir`` (stored, or to be made live), load their target and build the drafter.

    ``compile_steps`` and ``features_on_device`` make a GPU faster; ``features`` are given where they are in memory already.

    Raises
    ------
    StudyError : features missing, damaged or of another target; target layers that weren't extracted; no trained drafter to
        start from.
    """
    results_dir = Path(results_dir)
    folders = {split: results_dir / "features" / split for split in SPLITS}
    spec = features["train"].spec if features else read_spec(folders["train"])
    target = load_target(spec.target, device=device, dtype=dtype)
    if target.hash != spec.target_hash:
        raise StudyError(
            f"the features in {results_dir}/features come from other weights of {spec.target}; run 01_extract_kv_cache anew"
        )
    features = features or {split: open_features(folder, target) for split, folder in folders.items()}
    if drafter_config.reads_kv:
        layers = uniform_layers(full_attention_layers(target.model), drafter_config.kv_layers)
        features = {split: source.with_kv_layers(layers) for split, source in features.items()}
        spec = features["train"].spec
    counts = _answer_token_counts(results_dir / "features" / "answer_token_counts.csv", target.vocab_size)
    size = min(draft_vocab_size, target.vocab_size)
    drafter = build_drafter(drafter_config, target, spec, draft_vocabulary(counts, size), seed=train_config.seed)
    if features_on_device:
        state = (*drafter.reads, "final_hidden", "target_argmax")
        features = {split: ResidentFeatures(source, target.device, state) for split, source in features.items()}
    if drafter_config.kv_control == "shuffled":
        features = {split: ShuffledKV(source) for split, source in features.items()}
    fresh = []
    if init_from:
        fresh = warm_start(drafter, results_dir / "runs" / init_from / f"seed{train_config.seed}")
    if compile_steps:
        drafter.compile_steps()
    folder = results_dir / "runs" / variant / f"seed{train_config.seed}"
    computed = resolve_dtype(dtype, resolve_device(device))
    return Run(variant, drafter, target, features, folder, computed, init_from, fresh)


def _answer_token_counts(path: Path, vocab_size: int) -> torch.Tensor:
    if not path.exists():
        raise StudyError(f"{path} is missing; run notebook 01_extract_kv_cache with the same results_dir")
    check_listed(path, "run notebook 01_extract_kv_cache again")
    table, counts = pd.read_csv(path), torch.zeros(vocab_size, dtype=torch.int64)
    counts[torch.tensor(table["token"].tolist())] = torch.tensor(table["count"].tolist())
    return counts


def run_facts(run: Run, train_config: TrainConfig, history: pd.DataFrame) -> dict:
    """The run's row of ``runs.csv``."""
    config, drafter = run.drafter.config, run.drafter
    return {
        "variant": run.variant,
        "seed": train_config.seed,
        "paradigm": config.paradigm,
        "num_layers": config.num_layers,
        "kv_layers": " ".join(map(str, drafter.spec.kv_layers)) if config.reads_kv else "",
        "parameters": sum(p.numel() for p in drafter.parameters()),
        "trained_tokens": int(history["trained_tokens"].max()),
        "train_s": float(history["seconds"].max()),
        "dtype": str(run.dtype).removeprefix("torch."),
        **provenance(run.target.device),
        "target": run.target.name,
        "target_hash": run.target.hash,
        "corpus": run.features["train"].documents_hash[:16],
        "draft_vocab_size": len(drafter.draft_ids),
        "ttt_steps": train_config.ttt_steps,
        "anchor_fraction": train_config.anchor_fraction,
        "learning_rate": train_config.learning_rate,
        "epochs": train_config.epochs,
        "profile": run.folder.parents[2].resolve().name,
        "evaluation_documents": len(run.features["evaluation"]),
        "out_of_draft_vocab_fraction": outside_vocabulary(run.features["evaluation"], drafter),
        "init_from": run.init_from,
        "batch_documents": train_config.batch_documents,
        **drafting_cost(drafter),
    }


def finish_run(
    run: Run, train_config: TrainConfig, history: pd.DataFrame, facts: dict, *, draft_length: int = 7
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Judge the drafter on the evaluation documents and write the run's tables; ``run.json`` comes last and marks it done.

    ``draft_length`` is K, the draft steps that are judged, however many it was trained on.

    Returns
    -------
    counts, run_lengths : see `metrics.count_run`.
    """
    device = run.target.device
    with torch.autocast(device.type, run.dtype, enabled=run.dtype != torch.float32):
        matched = match_documents(run.features["evaluation"], run.drafter, draft_length, device=device, dtype=run.dtype)
    counts, run_lengths = count_run(run.variant, train_config.seed, matched)
    axes = count_axes(run.variant, train_config.seed, matched, anchor_places(run.features["evaluation"]))
    labels = {"variant": run.variant, "seed": train_config.seed}
    tables = {"counts": counts, "run_lengths": run_lengths, "axes": axes, "history": history.assign(**labels)}
    gradients = recorded_gradients(run.folder / "checkpoint.pt", **labels)
    if gradients is not None:
        tables["gradients"] = gradients
    files = {path.name: sha256(path) for path in (write_csv(run.folder / f"{n}.csv", t) for n, t in tables.items())}
    write_json(run.folder / "run.json", {**facts, "files": files})
    (run.folder / "checkpoint.pt").unlink(missing_ok=True)
    return counts, run_lengths


def acceptance_by_step(counts: pd.DataFrame) -> pd.DataFrame:
    """Step and chain acceptance of one run, one row a draft step, from document counts summed first."""
    total = counts.groupby("draft_step")[COUNTS].sum()
    found = metrics_of(total.to_numpy(), np.ones(len(RUNS)))
    table = {"draft step": total.index, "step": found["step_acceptance"], "chain": found["chain_acceptance"]}
    return pd.DataFrame({**table, "anchors": total["anchors"].to_numpy()})

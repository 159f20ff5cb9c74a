"""One training run: what it needs from disk, and what it leaves there (`results_dir/runs/<variant>/seed<k>`).

`train_run` is the way to train one: the training notebook takes its three steps one by one, a sweep and several
processes call the whole. ``values`` are parameters of that notebook by name; what means something else is left alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from .. import parallel
from ..drafters.checkpoint import draft_vocabulary, save_drafter, warm_start
from ..drafters.context import drafter_spec, read_by
from ..drafters.drafter import Drafter, build_drafter
from ..features.extract import read_counts
from ..features.kept import open_features, read_spec
from ..features.resident import ResidentFeatures
from ..features.spec import check_origin
from ..features.store import StoredFeatures
from ..files import sha256, write_csv, write_json
from ..metrics.acceptance import count_axes, count_run
from ..provenance import provenance
from ..target.load import Target, load_target, resolve_device, resolve_dtype
from ..text.corpus import SPLITS, Document
from .config import TrainConfig, configurations
from .cost import prefix_cost, run_cost
from .judging import anchor_places, match_documents, outside_vocabulary
from .loop import Training
from .record import recorded_gradients

TOLD = ("ttt_steps", "anchor_fraction", "learning_rate", "epochs", "batch_documents")  # of the training, in its row


@dataclass(frozen=True)
class Run:
    """A drafter to be trained, with its target, features by split, folder, and the dtype to compute in.

    ``fresh`` names the parameters that a warm start did not set.
    """

    variant: str
    drafter: Drafter
    training: TrainConfig
    target: Target
    features: dict[str, StoredFeatures]
    folder: Path
    dtype: torch.dtype
    init_from: str = ""
    fresh: tuple[str, ...] = ()

    def begun(self) -> Training:
        """The training, where its checkpoint left it."""
        splits = self.features["train"], self.features["validation"]
        return Training(self.drafter, *splits, self.training, self.folder, self.dtype)


def train_run(variant: str, values: Mapping, results_dir: str | Path, features: dict | None = None) -> dict:
    """Train and judge one drafter, going on from its checkpoint; gives its row of ``runs.csv``.

    Several processes (`parallel`) share the work; each of them gets the row.

    Parameters
    ----------
    values : parameters of the training notebook; ``seed`` is one of them.
    features : by split, where they are in memory already; else those in ``results_dir/features``.

    Raises
    ------
    StudyError : see :func:`prepare_run` and :func:`~loop.train`.
    """
    return train_runs([(variant, values)], results_dir, features)[0]


def train_runs(jobs: Sequence[tuple], results_dir: str | Path, features: dict | None = None) -> list[dict]:
    """Several (variant, values) as by `train_run`, by turns: whichever is behind takes a step."""
    runs, facts = [prepare_run(*job, results_dir, features) for job in jobs], []
    trainings = [run.begun() for run in runs]
    going = {one: one.steps(values.get("log_to", "")) for one, (_, values) in zip(trainings, jobs)}
    while going:
        behind = min(going, key=lambda training: training.progress.step)
        if next(going[behind], None) is None:
            del going[behind]
    for run, training, (_, values) in zip(runs, trainings, jobs):
        facts.append(run_facts(run, history := training.history()))
        if parallel.is_main():
            finish_run(run, history, facts[-1], values["draft_length"])
    return facts


def prepare_run(variant: str, values: Mapping, results_dir: str | Path, features: dict | None = None) -> Run:
    """Open the features that notebook 01 left (stored, or to be made live), load their target and build the drafter.

    Parameters
    ----------
    values : of drafter and training (`configurations`), and ``draft_vocab_size``. May be there: ``init_from``, a
        trained variant to take weights from; ``device`` and ``dtype``; ``compile_steps`` and ``features_on_device``,
        which make a GPU faster.

    Raises
    ------
    StudyError : features missing, damaged or of another target; target layers that weren't extracted; no trained
        drafter to start from; values that contradict one another.
    """
    config, training = configurations(values)
    results_dir, on_device = Path(results_dir), bool(values.get("features_on_device")) and not features
    folders = {split: results_dir / "features" / split for split in SPLITS}
    device, dtype = values.get("device", "auto"), values.get("dtype", "auto")
    spec = features["train"].spec if features else read_spec(folders["train"])
    target = (features and features["train"].target) or load_target(spec.target, device=device, dtype=dtype)
    check_origin(spec, target, f"the features in {results_dir}/features were recorded")
    features = features or {split: open_features(folder, target) for split, folder in folders.items()}
    wanted = drafter_spec(config, target)
    features = {split: read_by(config, wanted, source) for split, source in features.items()}
    counts = read_counts(results_dir / "features", target.vocab_size)
    draft_ids = draft_vocabulary(counts, min(values["draft_vocab_size"], target.vocab_size))
    drafter = build_drafter(config, target, wanted, draft_ids, seed=training.seed)
    if on_device:
        state = (*drafter.reads, "final_hidden", "target_argmax")
        features = {split: ResidentFeatures(source, target.device, state) for split, source in features.items()}
    init_from, fresh, runs = values.get("init_from", ""), [], results_dir / "runs"
    if init_from:
        fresh = warm_start(drafter, runs / init_from / f"seed{training.seed}")
    if values.get("compile_steps"):
        drafter.compile_steps()
    computed = resolve_dtype(dtype, resolve_device(device))
    folder = runs / variant / f"seed{training.seed}"
    return Run(variant, drafter, training, target, features, folder, computed, init_from, tuple(fresh))


def run_facts(run: Run, history: pd.DataFrame) -> dict:
    """The run's row of ``runs.csv``."""
    drafter, training, evaluation = run.drafter, run.training, run.features["evaluation"]
    config = drafter.config
    return {
        "variant": run.variant,
        "seed": training.seed,
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
        **{name: getattr(training, name) for name in TOLD},
        "profile": run.folder.parents[2].resolve().name,
        "evaluation_documents": len(evaluation),
        "out_of_draft_vocab_fraction": outside_vocabulary(evaluation, drafter),
        "init_from": run.init_from,
        "prefix_bytes_per_token": prefix_cost(drafter).bytes,
    }


def finish_run(run: Run, history: pd.DataFrame, facts: dict, draft_length: int = 7) -> pd.DataFrame:
    """Save the drafter, judge it on the evaluation documents, and write the run's tables; the checkpoint goes.

    Parameters
    ----------
    facts : from :func:`run_facts`.
    draft_length : K, the draft steps that are judged, however many it was trained on.

    Returns
    -------
    counts : see `metrics.count_run`.
    """
    save_drafter(run.drafter, run.folder, variant=run.variant, seed=run.training.seed)
    counts = judge_run(run, history, facts, draft_length)
    (run.folder / "checkpoint.pt").unlink(missing_ok=True)
    return counts


def judge_run(run: Run, history: pd.DataFrame, facts: dict, draft_length: int) -> pd.DataFrame:
    """Judge a drafter and write the run's tables; ``run.json`` comes last and marks it done."""
    labels = {"variant": run.variant, "seed": run.training.seed}
    evaluation, device = run.features["evaluation"], run.target.device
    matched = match_documents(evaluation, run.drafter, draft_length, device=device, dtype=run.dtype)
    counts, run_lengths = count_run(**labels, documents=matched)
    places = [anchor_places(evaluation, document) for document in range(len(evaluation))]
    axes = count_axes(**labels, documents=matched, places=places)
    tables = {"counts": counts, "run_lengths": run_lengths, "axes": axes, "history": history.assign(**labels)}
    gradients = recorded_gradients(run.folder / "checkpoint.pt", **labels)
    if gradients is not None:
        tables["gradients"] = gradients
    if "train" in run.features:  # a published drafter was trained elsewhere
        cost = run_cost(run.drafter, run.training, run.target, _documents(run.features["train"]))
        tables["compute"] = pd.DataFrame([labels | cost])
    written = [write_csv(run.folder / f"{name}.csv", table) for name, table in tables.items()]
    write_json(run.folder / "run.json", {**facts, "files": {path.name: sha256(path) for path in written}})
    return counts


def _documents(source, at_once: int = 64) -> list[Document]:
    """Tokens and answer masks of a source of features, without target state."""
    found = []
    for start in range(0, len(source), at_once):
        batch = source.batch(range(start, min(start + at_once, len(source))), ())
        for tokens, mask in zip(batch.tokens.cpu().numpy(), batch.answer_mask.cpu().numpy()):
            length = source.lengths[len(found)]
            found.append(Document(tokens[:length], mask[:length]))
    return found

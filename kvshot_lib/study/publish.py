"""Published drafters: made small, described, and judged in other studies.

A published drafter is a folder of data/checkpoints that `load_drafter` reads like any other: rounded weights,
``drafter.json`` (config, target, hash, what its run recorded), ``history.csv``, ``acceptance.csv``, and the card.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..drafters.checkpoint import STEP, WEIGHTS, load_drafter, read_description, save_rounded
from ..drafters.config import READS
from ..drafters.context import read_by
from ..drafters.drafter import Drafter
from ..drafters.runs import DESCRIPTION, NOTEBOOK
from ..drafters.variants import VARIANTS
from ..errors import StudyError
from ..features.store import StoredFeatures
from ..files import read_json, sha256, write_atomically, write_csv, write_json
from ..metrics import tables
from ..metrics.acceptance import count_run
from ..metrics.resampling import Draws, draw
from ..parts import claim
from ..target.load import Target, load_target, resolve_dtype
from ..training.config import TrainConfig
from ..training.judging import match_documents, outside_vocabulary
from ..training.run import Run, judge_run
from .profiles import CHECKPOINTS, FOLDER

DRAFT_LENGTH = 7
BEFORE, AFTER = "as trained", "as published"
METRICS = (
    ("step_acceptance", 0), ("step_acceptance", DRAFT_LENGTH - 1), ("retention", None), ("expected_mat", None),
    ("measured_mat", None),
)  # fmt: skip


def publish_runs(results_dir: str, runs: Sequence[str], *, to: str = str(CHECKPOINTS), step: float = STEP) -> None:
    """Publish drafters (``VARIANT/seedN``) of a study, each in a folder of ``to``; prints what rounding changed."""
    if len({run.split("/")[0] for run in runs}) < len(runs):
        raise StudyError("two seeds of one drafter would be published into one folder: name one of them")
    evaluation = StoredFeatures(Path(results_dir) / "features" / "evaluation")
    target = load_target(evaluation.spec.target, device="cpu", dtype="float32")
    for run in runs:
        folder, out = Path(results_dir) / "runs" / run, Path(to) / run.split("/")[0]
        draws = publish(folder, out, target, evaluation, step)
        lost = draws.contrast((1, AFTER, "measured_mat"), (-1, BEFORE, "measured_mat"))
        size = (out / WEIGHTS).stat().st_size / 1e6
        told = f"measured MAT {draws.mean(AFTER, 'measured_mat')}, by rounding {lost}"
        print(f"{out}: {size:.2f} MB; {told}", flush=True)


def publish(folder: Path, to: Path, target: Target, evaluation: StoredFeatures, step: float = STEP) -> Draws:
    """Write the drafter of the run in ``folder`` to ``to``; returns the metrics of both states, on the same resamples.

    Raises
    ------
    StudyError : an unfinished run, or features of another target.
    """
    if not (folder / "run.json").exists():
        raise StudyError(f"{folder} has no finished run; train it to the end with {NOTEBOOK}")
    record, drafter = read_json(folder / "run.json", f"delete {folder} and train again"), load_drafter(folder, target)
    record.pop("files", None)
    tensors = {name: tensor.detach().cpu() for name, tensor in drafter.state_dict().items()}
    path = save_rounded({**tensors, "draft_ids": drafter.draft_ids.cpu()}, to / WEIGHTS, step)
    described = {**drafter.description(), "weights_sha256": sha256(path), "rounding_step": step}
    write_json(to / DESCRIPTION, {**described, "variant": record["variant"], "seed": record["seed"], "run": record})
    write_csv(to / "history.csv", tables.read_one(folder / "history.csv", "history"))
    draws = judged({BEFORE: drafter, AFTER: load_drafter(to, target)}, evaluation)
    rows = [[name, step_, *vars(draws.mean(AFTER, name, step_)).values()] for name, step_ in METRICS]
    measured = pd.DataFrame(rows, columns=["metric", "draft_step", "value", "low", "high"])
    write_csv(to / "acceptance.csv", tables.rounded(measured.astype({"draft_step": "Int64"})))
    text = card(record, described, draws, path.stat().st_size, max(evaluation.lengths))
    write_atomically(to / "README.md", lambda p: p.write_text(text))
    return draws


def judged(states: dict[str, Drafter], evaluation: StoredFeatures) -> Draws:
    """Metrics of some drafters on the same evaluation documents, paired."""
    counted = []
    for name, drafter in states.items():
        source = read_by(drafter.config, drafter.spec, evaluation)
        counted.append(count_run(name, 0, match_documents(source, drafter, DRAFT_LENGTH)))
    counts, run_lengths = (pd.concat(parts, ignore_index=True) for parts in zip(*counted, strict=True))
    return draw(counts, run_lengths)


CARD = """# Drafter `{variant}`

{says}

| what | this drafter |
| :-- | :-- |
| target | {target}, weights of SHA-256 `{target_hash:.16}…` (SmolLM2's are Q4_1, dequantised) |
| parameters | {parameters:,}, {draft_vocab_size:,} draft tokens; {told} |
| trained on | {trained_tokens:,} tokens, texts of the profile `{profile}` (documents `{corpus}`), seed {seed} |
| length | texts of up to {longest} tokens; what it accepts beyond is not known |
| training | {minutes:.0f} minutes on {device}, {dtype}, {date}, git revision `{git_revision}`, torch {torch} |
| weights | {megabytes:.2f} MB: rounded to {rounding_step:g} deviations of their row, SHA-256 `{weights_sha256}` |

Judged on {documents} held-out greedy answers of the target, before and after rounding (95% intervals over documents;
the difference is on the same documents):

| metric | as trained | as published | difference |
| :-- | --: | --: | --: |
{judged}

```python
from kvshot_lib import load_drafter, load_target

drafter = load_drafter("data/checkpoints/{variant}", load_target("{target}"))
```

{again}:

```
{command}
```
"""


def card(record: dict, described: dict, draws: Draws, size_bytes: int, longest: int) -> str:
    """The card, from what was recorded and measured."""
    config, run, profile = described["config"], f"{record['variant']}/seed{record['seed']}", record["profile"]
    again = f"To train it again (`drafter.json` has its parameters, the profile `{profile}` its budget)"
    command = f"kvshot notebook run {NOTEBOOK} OUT.ipynb -p variant {record['variant']} -p seed {record['seed']}"
    if (path := FOLDER / f"{profile}.yaml").exists():
        again = f"To train it again (`{path}` says on which text, with which layers and how long)"
        command = f"kvshot sweep {profile} {run}"
    lines = []
    for name, step in METRICS:
        label = name.replace("_", " ").replace("mat", "MAT") + ("" if step is None else f", draft step {step}")
        lost = draws.contrast((1, AFTER, name, step), (-1, BEFORE, name, step))
        lines.append(f"| {label} | {draws.mean(BEFORE, name, step)} | {draws.mean(AFTER, name, step)} | {lost} |")
    return CARD.format(
        **record,
        says=VARIANTS[record["variant"]].says if record["variant"] in VARIANTS else "A drafter of one's own.",
        told=", ".join(f"{name} {config[name]!r}" for name in ("paradigm", *READS[config["paradigm"]])),
        minutes=record["train_s"] / 60,
        longest=longest,
        megabytes=size_bytes / 1e6,
        rounding_step=described["rounding_step"],
        weights_sha256=described["weights_sha256"],
        documents=int(draws.keys["documents"].max()),
        judged="\n".join(lines),
        again=again,
        command=command,
    )


def judge_checkpoint(results_dir: str, name: str, *, mark: str = "") -> Path:
    """Judge a published drafter in a study of one's own, as one variant more: `kv_2` becomes `kv_2_checkpoint`.

    It leaves there what a training leaves, so that whatever reads runs reads it. Its training is the recorded one.
    ``mark`` says what the run depends on (`claim`).

    Raises
    ------
    StudyError : no such checkpoint, one for another target, or features without the layers that it reads.
    """
    source, results_dir = CHECKPOINTS / name, Path(results_dir)
    described = read_description(source)
    evaluation = StoredFeatures(results_dir / "features" / "evaluation")
    target = load_target(evaluation.spec.target)
    drafter = load_drafter(source, target)
    evaluation = read_by(drafter.config, drafter.spec, evaluation)
    variant, seed = f"{name}_checkpoint", described["seed"]
    folder = results_dir / "runs" / variant / f"seed{seed}"
    claim(folder, mark)
    for file in (WEIGHTS, DESCRIPTION):
        shutil.copyfile(source / file, folder / file)
    facts = described["run"] | {
        "variant": variant,
        "profile": results_dir.resolve().name,
        "evaluation_documents": len(evaluation),
        "out_of_draft_vocab_fraction": outside_vocabulary(evaluation, drafter),
    }
    history = tables.read_one(source / "history.csv", "history").drop(columns=["variant", "seed"])
    dtype = resolve_dtype("auto", target.device)
    run = Run(variant, drafter, TrainConfig(seed=seed), target, {"evaluation": evaluation}, folder, dtype)
    judge_run(run, history, facts, DRAFT_LENGTH)
    return folder

"""Trained drafters made small and described, for data/checkpoints: whoever clones the study can draft at once.

python -m kvshot_lib.study.publish RESULTS_DIR VARIANT/seedN ... [--step .5] [--to data/checkpoints]

For each run: its weights, rounded (`rounded_weights`), in `<to>/<variant>/drafter.safetensors`; ``drafter.json`` with config, target, hash and
what the run recorded of its training; ``history.csv``; and ``README.md``, the card. The drafter is judged before and after rounding on the run's own
evaluation features, and the card says what was lost. `load_drafter("data/checkpoints/hidden", target)` reads it like any other.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from ..drafters.checkpoint import DESCRIPTION, WEIGHTS, load_drafter, training_command
from ..drafters.config import READS
from ..drafters.drafter import Drafter, DrafterConfig
from ..drafters.rounding import STEP, save_rounded
from ..errors import StudyError, one_line_errors
from ..features.store import StoredFeatures
from ..files import sha256, write_atomically, write_csv, write_json
from ..metrics import tables
from ..metrics.collect import read_record
from ..metrics.acceptance import count_run
from ..metrics.resampling import Draws, draw
from ..plots.report import markdown_table, signed
from ..target.load import Target, load_target
from ..training.judging import match_documents

DRAFT_LENGTH = 7
CARD = "README.md"
BEFORE, AFTER = "as trained", "as published"
METRICS = (
    ("step_acceptance", 0),
    ("step_acceptance", DRAFT_LENGTH - 1),
    ("retention", None),
    ("expected_mat", None),
    ("measured_mat", None),
)


def publish(folder: Path, to: Path, target: Target, evaluation: StoredFeatures, step: float = STEP) -> Draws:
    """Write the drafter of the run in ``folder`` to ``to``; returns the metrics of both states, on the same documents and resamples.

    Raises
    ------
    StudyError : an unfinished run, or features of another target.
    """
    if not (folder / "run.json").exists():
        raise StudyError(f"{folder} has no finished run: train it first ({training_command(folder)})")
    record, drafter = read_record(folder), load_drafter(folder, target)
    tensors = {name: tensor.detach().cpu() for name, tensor in drafter.state_dict().items()}
    path = save_rounded({**tensors, "draft_ids": drafter.draft_ids.cpu()}, to / WEIGHTS, step)
    described = {**drafter.description(), "weights_sha256": sha256(path), "rounding_step": step}
    write_json(to / DESCRIPTION, {**described, "variant": record["variant"], "seed": record["seed"], "run": record})
    write_csv(to / "history.csv", tables.read_one(folder / "history.csv", "history"))
    states = {BEFORE: drafter, AFTER: load_drafter(to, target)}
    draws = judged(states, evaluation)
    rows = [[name, step_, *vars(draws.mean(AFTER, name, step_)).values()] for name, step_ in METRICS]
    measured = pd.DataFrame(rows, columns=["metric", "draft_step", "value", "low", "high"]).astype(
        {"draft_step": "Int64"}
    )
    write_csv(to / "acceptance.csv", tables.rounded(measured))
    write_atomically(to / CARD, lambda p: p.write_text(card(record, described, draws, path.stat().st_size, folder)))
    return draws


def judged(states: dict[str, Drafter], evaluation: StoredFeatures) -> Draws:
    """Metrics of some drafters on the same evaluation documents, paired."""
    counted = []
    for name, drafter in states.items():
        source = evaluation.with_kv_layers(drafter.spec.kv_layers) if drafter.config.reads_kv else evaluation
        counted.append(count_run(name, 0, match_documents(source, drafter, DRAFT_LENGTH)))
    counts, run_lengths = (pd.concat(parts, ignore_index=True) for parts in zip(*counted, strict=True))
    return draw(counts, run_lengths)


def card(record: dict, described: dict, draws: Draws, size_bytes: int, folder: Path) -> str:
    """The card, from what was recorded and measured."""
    target, config = described["spec"]["target"], described["config"]
    rows = []
    for name, step in METRICS:
        label = name.replace("_", " ").replace("mat", "MAT") + ("" if step is None else f", draft step {step}")
        lost = draws.difference((AFTER, name, step), (BEFORE, name, step))
        rows.append([label, draws.mean(BEFORE, name, step), draws.mean(AFTER, name, step), signed(lost)])
    start = f", after starting from a trained `{record['init_from']}`" if record.get("init_from") else ""
    told = {name: config[name] for name in READS[config["paradigm"]]}
    spec, made = described["spec"], DrafterConfig(**config)
    read = [f"hidden states of layers {spec['hidden_layers']}"] * (
        made.fuses_hidden or made.kv_with_hidden or made.kv_control == "from_hidden"
    )
    read += [f"keys and values of layers {spec['kv_layers']}"] * made.reads_kv
    command = training_command(
        Path("results") / record["profile"] / "runs" / record["variant"] / f"seed{record['seed']}"
    )
    facts = [
        ["target", f"{target}, weights of SHA-256 `{record['target_hash'][:16]}…` (SmolLM2's are Q4_1, dequantised)"],
        ["drafter", f"`{config['paradigm']}`, {record['parameters']:,} parameters, {record['draft_vocab_size']:,} draft tokens"],
        ["reads", " and ".join(read) or "no target state"],
        ["trained on", f"{record['trained_tokens']:,} tokens of the corpus `selfgen` (documents `{record['corpus']}`){start}"],
        ["training", f"{record['train_s'] / 60:.0f} minutes on {record['device']}, {record['dtype']}, {record['date']}, seed {record['seed']}"],
        ["made by", f"git revision `{record['git_revision']}`, torch {record['torch']}, transformers {record['transformers']}"],
        ["weights", f"{size_bytes / 1e6:.2f} MB: rounded to {described['rounding_step']:g} standard deviations of their row, {8 * size_bytes / record['parameters']:.2f} bits a parameter"],
        ["SHA-256", f"`{described['weights_sha256']}`"],
    ]  # fmt: skip
    documents = int(draws.keys["documents"].max())
    return f"""# Drafter `{record["variant"]}`

{_left(facts, ["what", "this drafter"])}

Judged on {documents} held-out greedy answers of the target, before and after rounding (95% intervals over documents; the difference is on the
same documents):

{markdown_table(rows, ["metric", BEFORE, AFTER, "difference"])}

Load it, or use it in a run of your own:

```python
from kvshot_lib.checkpoints import load_drafter
from kvshot_lib.target import load_target

drafter = load_drafter("data/checkpoints/{record["variant"]}", load_target("{target}"))
```

Its parameters: {", ".join(f"{name} {value!r}" for name, value in told.items())}. Train it again, with the profile `{record["profile"]}`
(`make study PROFILE={record["profile"]}` trains all of its drafters; this command alone wants the profile's budget added):

```
{command}
```
"""


def _left(rows: Iterable[Iterable], header: list[str]) -> str:
    return markdown_table(rows, header).replace("--:", ":--")


@one_line_errors
def main(words: Iterable[str] | None = None) -> int:
    """Publish runs; prints each one's size and what rounding changed."""
    parser = argparse.ArgumentParser(prog="python -m kvshot_lib.study.publish", description=__doc__.split("\n")[0])
    parser.add_argument("results_dir", type=Path, metavar="RESULTS_DIR")
    parser.add_argument("runs", nargs="+", metavar="VARIANT/seedN")
    parser.add_argument("--to", type=Path, default=Path("data/checkpoints"))
    parser.add_argument("--step", type=float, default=STEP, help="of rounding, in standard deviations of a row")
    given = parser.parse_args(words)
    evaluation = StoredFeatures(given.results_dir / "features" / "evaluation")
    target = load_target(evaluation.spec.target, device="cpu", dtype="float32")
    for run in given.runs:
        folder, to = given.results_dir / "runs" / run, given.to / run.split("/")[0]
        draws = publish(folder, to, target, evaluation, given.step)
        lost = draws.difference((AFTER, "measured_mat"), (BEFORE, "measured_mat"))
        size = (to / WEIGHTS).stat().st_size / 1e6
        print(
            f"{to}: {size:.2f} MB; measured MAT {draws.mean(AFTER, 'measured_mat')}, by rounding {signed(lost)}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

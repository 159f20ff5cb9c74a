"""A published drafter judged in a study of one's own, as one variant more: `hidden` of data/checkpoints becomes `hidden_checkpoint`.

python -m kvshot_lib.study.judge RESULTS_DIR NAME [--fingerprint TEXT]    writes RESULTS_DIR/runs/<name>_checkpoint/seed<k>

It leaves there what a training leaves (`runs.finish_run`), drafter included, so that whatever reads runs reads this one: tables, decoding,
diagnostics. Its training is the recorded one; only what was judged is new.
"""

import argparse
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from ..drafters.checkpoint import DESCRIPTION, WEIGHTS, load_drafter, read_description
from ..errors import StudyError
from ..features.store import StoredFeatures
from ..metrics import tables
from ..parts import claim
from ..target.load import load_target, resolve_dtype
from ..training.judging import outside_vocabulary
from ..training.loop import TrainConfig
from ..training.run import Run, finish_run
from .profiles import CHECKPOINTS


def judge_checkpoint(results_dir: Path, name: str, fingerprint: str | None = None, draft_length: int = 7) -> Path:
    """Judge ``data/checkpoints/<name>`` on the evaluation features of ``results_dir``; returns the run's folder.

    Raises
    ------
    StudyError : no such checkpoint, one for another target, or features without the layers that it reads.
    """
    source = CHECKPOINTS / name
    described = read_description(source)
    evaluation = StoredFeatures(results_dir / "features" / "evaluation")
    target = load_target(evaluation.spec.target)
    drafter = load_drafter(source, target)
    if drafter.config.reads_kv:
        evaluation = evaluation.with_kv_layers(drafter.spec.kv_layers)
    variant, seed = f"{name}_checkpoint", described["seed"]
    folder = results_dir / "runs" / variant / f"seed{seed}"
    claim(folder, fingerprint)
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
    run = Run(variant, drafter, target, {"evaluation": evaluation}, folder, dtype, "", [])
    finish_run(run, TrainConfig(seed=seed), history, facts, draft_length=draft_length)
    return folder


def main(words: Iterable[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kvshot_lib.study.judge", description=__doc__.split("\n")[0])
    parser.add_argument("results_dir", type=Path, metavar="RESULTS_DIR")
    parser.add_argument("name", metavar="NAME", help="a folder of data/checkpoints")
    parser.add_argument("--fingerprint", help="what the run depends on")
    given = parser.parse_args(words)
    try:
        print(judge_checkpoint(given.results_dir, given.name, given.fingerprint))
    except (StudyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

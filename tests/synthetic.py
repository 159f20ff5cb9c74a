"""Made-up tables of a whole matrix of runs, seeded, with the decay that each family of drafters is expected to have."""

from pathlib import Path

import numpy as np
import pandas as pd

from kvshot_lib.drafters.variants import VARIANTS, in_study_order, parameters_of
from kvshot_lib.metrics import acceptance as metrics
from kvshot_lib.metrics import tables

STEPS = 7


def matrix(variants=tuple(VARIANTS), seeds=3, documents=300) -> dict[str, pd.DataFrame]:
    """The tables ``runs``, ``counts``, ``run_lengths``, ``axes`` and ``history``, like those of `tables.collect`.

    All runs are judged on the same documents: answers of 2 to 300 tokens after prompts of 40 to 160, some easier than others.
    """
    chance = np.random.default_rng(0)
    answers = chance.integers(2, 300, documents)
    prompts, ease = chance.integers(40, 160, documents), chance.normal(1, 0.25, documents).clip(0.3, 1.8)
    made = [_run(v, seed, answers, prompts, ease) for v in in_study_order(variants) for seed in range(seeds)]
    return {name: pd.concat([run[name] for run in made], ignore_index=True) for name in made[0]}


def write_matrix(folder: Path, **settings) -> dict[str, pd.DataFrame]:
    """Write `matrix` where notebook 03 reads it."""
    made = matrix(**settings)
    for name, table in made.items():
        tables.write(folder, name, table)
    return made


def _run(variant, seed, answers, prompts, ease):
    chance = np.random.default_rng([seed, *variant.encode()])
    step, slope = (0.42, 0.87) if variant.startswith("hid") else (0.33, 0.985)
    if not variant.startswith("kv"):
        step, slope = step + 0.04, min(slope + 0.05, 0.97)
    step *= 0.3 if "none" in variant or "zero" in variant else 0.9 + 0.2 * chance.random()
    matched, places = [], []
    for answer, prompt, easy in zip(answers, prompts, ease):
        anchors = np.arange(answer - 1)
        valid = anchors[:, None] + np.arange(STEPS) < answer - 1
        stretch = np.repeat(chance.normal(1, 0.35, answer), 5)[
            : answer - 1, None
        ]  # easy and hard stretches of five tokens
        match = chance.random(valid.shape) < step * slope ** np.arange(STEPS) * easy * stretch
        matched.append((match & valid, valid))
        places.append(np.stack([anchors, prompt + anchors], axis=1))
    counts, run_lengths = metrics.count_run(variant, seed, matched)
    return {
        "runs": _facts(variant, seed),
        "counts": counts,
        "run_lengths": run_lengths,
        "axes": metrics.count_axes(variant, seed, matched, places),
        "history": _history(variant, seed, step, slope),
    }


def _facts(variant, seed):
    facts = {name: "x" if kind == "str" else 1 for name, kind in tables.SCHEMAS["runs"].items()}
    facts |= {
        "paradigm": variant.split("_")[0],
        "parameters": 5_000_000,
        "trained_tokens": 12_000_000,
        "train_s": 600.0,
    }
    start = parameters_of(variant).get("init_from", "")
    facts |= {"variant": variant, "seed": seed, "draft_vocab_size": 16384, "out_of_draft_vocab_fraction": 0.01}
    return pd.DataFrame([facts | {"init_from": start, "target": "smollm2-135m-instruct"}])


def _history(variant, seed, step, slope):
    rows = [
        [variant, seed, n, 200_000 * n, 10.0 * n, split, k, 3 + 6 / n + 0.05 * k, step * slope**k * n / (n + 9), 1e-3]
        for n in range(1, 61, 4)
        for split in ("train", "validation")
        for k in range(STEPS)
    ]
    return pd.DataFrame(rows, columns=list(tables.SCHEMAS["history"])).astype({"draft_step": "Int64"})

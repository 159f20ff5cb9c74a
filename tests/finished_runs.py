"""Finished runs as the training notebook leaves them, with made-up matches."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from kvshot_lib.metrics import acceptance as metrics
from kvshot_lib.metrics import tables

PLACES = np.stack([np.arange(10) + 10, np.arange(10) + 30], axis=1)  # of ten anchors: generated offset, context length


def write_run(results_dir, variant, seed=0, documents=6, **facts):
    """One run of K = 3 with ten anchors a document; gives its folder."""
    folder = Path(results_dir) / "runs" / variant / f"seed{seed}"
    folder.mkdir(parents=True)
    match = np.random.default_rng([seed, *variant.encode()]).random((documents, 10, 3)) < 0.5
    judged = [(m, np.ones_like(m)) for m in match]
    counts, run_lengths = metrics.count_run(variant, seed, judged)
    axes = metrics.count_axes(variant, seed, judged, [PLACES] * documents)
    rows = [[variant, seed, n, 100 * n, n / 3, "train", k, 1 / 3, 0.5, 1e-3] for n in range(3) for k in (0, 1)]
    history = pd.DataFrame(rows, columns=list(tables.SCHEMAS["history"]))
    gradients = [variant, seed, 1, 100, 0, "cross", "k_proj", None, None, "grad_norm", 0.5]
    gradients = pd.DataFrame([gradients], columns=list(tables.SCHEMAS["gradients"]))
    made = {"counts": counts, "run_lengths": run_lengths, "axes": axes, "history": history, "gradients": gradients}
    cost = {name: 1 for name in tables.SCHEMAS["compute"]} | {"variant": variant, "seed": seed}
    made["compute"] = pd.DataFrame([cost])
    for name, table in made.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    filled = {name: "x" if kind == "str" else 1 for name, kind in tables.SCHEMAS["runs"].items()}
    record = filled | {"variant": variant, "seed": seed, "target_hash": "abc"} | facts
    (folder / "run.json").write_text(json.dumps(record))
    return folder

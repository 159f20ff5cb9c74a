"""Draws of runs whose metrics are known by hand."""

import numpy as np
import pandas as pd

from kvshot_lib.metrics import acceptance
from kvshot_lib.metrics.resampling import Draws, draw


def draws_of(runs, documents: int = 6, noise: int = 0, samples: int = 300) -> Draws:
    """Draws of runs, variant to matches per 100 anchors at each draft step (or a list of them, one a seed).

    Every document is the same, so that intervals over documents have no width, but for ``noise`` more or fewer matches
    in every other document.
    """
    made = []
    for variant, seeds in runs.items():
        for seed, per_step in enumerate(seeds if isinstance(seeds, list) else [seeds]):
            wanted = [np.array(per_step) + noise * (-1) ** document for document in range(documents)]
            match = [np.arange(100)[:, None] < w for w in wanted]
            made.append(acceptance.count_run(variant, seed, [(m, np.ones_like(m)) for m in match]))
    return draw(*(pd.concat(parts, ignore_index=True) for parts in zip(*made)), samples=samples)

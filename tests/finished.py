"""Results folders with finished runs of tiny drafters, as measuring finds them."""

import torch
from examples import STEPS, drafter, live

from kvshot_lib.drafters.checkpoint import save_drafter
from kvshot_lib.features.store import write_store
from kvshot_lib.metrics.acceptance import count_run
from kvshot_lib.training.judging import match_documents


def finished(results_dir, *variants):
    """Stored features, and a finished run of each variant, judged on them."""
    write_store(results_dir / "features/evaluation", live(), dtype=torch.float32)
    for variant in variants:
        folder = results_dir / f"runs/{variant}/seed0"
        save_drafter(drafter(variant), folder)
        counts, _ = count_run(variant, 0, match_documents(live(), drafter(variant), STEPS))
        counts.to_csv(folder / "counts.csv", index=False)
        (folder / "run.json").write_text("{}")
    return results_dir

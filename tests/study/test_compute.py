"""The table of what runs took: against what recorded runs say of themselves."""

import examples
import numpy as np
import pandas as pd

from kvshot_lib.features.extract import Extraction
from kvshot_lib.metrics import tables
from kvshot_lib.study import compute


def test_a_run_that_cannot_be_walked_again_is_told_and_left_out(monkeypatch):
    """Recorded runs name a profile; one that it does not train, or that saw other tokens, is not guessed at."""
    runs, target = tables.read("data/recorded/laptop", "runs").head(1), examples.target()
    documents = examples.live_of(*(examples.document("000" + "1" * 30) for _ in range(144)))
    extraction = Extraction(target, documents.spec, {"train": documents}, np.zeros(512))
    monkeypatch.setattr(compute, "_extraction", lambda _: extraction)
    runs = runs.assign(target_hash=target.hash, corpus=documents.documents_hash, init_from="")
    others = [runs.assign(variant="mine"), runs.assign(target_hash="0"), runs.assign(corpus="0")]
    found, untold = compute.compute_table(pd.concat([runs, *others]))
    assert found.empty and len(untold) == 4
    assert "it saw" in untold[0] and "its profile now gives 14,256" in untold[0]
    assert "does not train it" in untold[1] and "target's weights" in untold[2] and "other documents" in untold[3]
    walked = runs.assign(trained_tokens=3 * 144 * 33, draft_vocab_size=410)
    found, untold = compute.compute_table(walked)
    assert not untold and found["start_flops"].tolist() == [0.0] and found["training_flops"].iloc[0] > 0


def test_every_recorded_run_is_counted():
    """The walk ended at each run's own number of tokens; a warm start has its start's FLOPs beside it."""
    runs, counted = (tables.read("data/recorded/full", name) for name in ("runs", "compute"))
    keys = ["variant", "seed"]
    both = runs.merge(counted, on=keys)
    assert len(both) == len(runs) and (both["tokens"] == both["trained_tokens"]).all()
    by_name = counted.set_index(keys)
    assert by_name.loc[("hybrid_warm", 0), "start_flops"] == by_name.loc[("hidden", 0), "training_flops"]
    assert np.isfinite(counted["training_flops"]).all()

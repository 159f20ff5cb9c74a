"""Measuring of queries: tables of tiny runs, resumed; refusals by name; target and drafters left as they were."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from examples import VARIANTS, live, target
from finished import finished
from test_capture import left_behind

from kvshot_lib.drafters.checkpoint import load_drafter
from kvshot_lib.drafters.config import DrafterConfig
from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import tables
from kvshot_lib.probes import measuring, queries
from kvshot_lib.probes.queries import check_drafter, measure_queries, reuses_kv
from kvshot_lib.target.load import load_target

MEASURED = {"fingerprint": "code"}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "load_target", lambda *_, **__: target())
    return finished(tmp_path, "hidden", "kv_1", "kv_2")


def written(results):
    return {path.name: path.read_bytes() for path in (results / "tables").glob("*.parquet")}


def test_tables_are_made_and_resumed(results, monkeypatch):
    before = left_behind(target().model), [p.clone() for p in target().model.parameters()]
    weights = load_drafter(results / "runs/kv_2/seed0", target()).state_dict()
    measure_queries(results, **MEASURED)
    overlap, probe = (tables.read(results / "tables", name) for name in ("attention_overlap", "query_probe"))
    assert set(overlap["variant"]) == {"target", "kv_1", "kv_2"}  # `hidden` has no attention over the cache
    assert set(probe.loc[probe["variant"] == "kv_2", "layer"]) == {0, 1}
    facts = pd.read_csv(results / "tables/query_estimation_facts.csv").iloc[0]
    assert facts["runs"] == "kv_1/seed0 kv_2/seed0" and facts["documents"] == len(live())

    assert left_behind(target().model) == before[0]
    assert all(torch.equal(a, b) for a, b in zip(before[1], target().model.parameters(), strict=True))
    again = load_drafter(results / "runs/kv_2/seed0", target()).state_dict()
    assert all(torch.equal(again[name], weights[name]) for name in weights)

    first = written(results)
    with monkeypatch.context() as patched:
        for name in ("measure_references", "load_drafter"):  # measured already
            patched.setattr(queries, name, lambda *_: 1 / 0)
        measure_queries(results, **MEASURED)
        assert len(first) == 2 and written(results) == first
        with pytest.raises(ZeroDivisionError):  # by other code
            measure_queries(results, **MEASURED | {"fingerprint": "other"})


def test_a_documents_state_is_computed_once_for_all_runs_over_the_same_layers(results, monkeypatch):
    computed, own = [], queries.compute_state
    monkeypatch.setattr(queries, "compute_state", lambda *given: computed.append(given[2]) or own(*given))
    measure_queries(results, **MEASURED)
    assert computed == [(0, 2, 3)] * len(live())


def test_what_cannot_be_measured_is_refused_by_name(results, monkeypatch):
    def told(message, *runs, on=None):
        if on is not None:
            monkeypatch.setattr(measuring, "load_target", lambda *_, **__: on)
        with pytest.raises(StudyError, match=message):
            measure_queries(results, runs, **MEASURED)

    told("^hidden/seed0: query estimation needs a kv or hybrid drafter", "hidden/seed0")
    told("kv_3/seed0: no finished run in .*: hidden/seed0, kv_1/seed0", "kv_3/seed0")
    sliding, odd = (load_target("tiny-llama", device="cpu", dtype="float32") for _ in range(2))
    sliding.model.config.layer_types = ["full_attention", "sliding_attention"] * 2
    told("sliding window", on=sliding)
    gated = odd.model.get_decoder().layers[2].self_attn.o_proj
    gated.register_forward_pre_hook(lambda _module, given: (given[0] * 1.5,))  # as a target with gated outputs would
    told("target tiny-llama: attention recomputed", on=odd)
    told("were recorded for target tiny-llama", on=replace(target(), hash="0" * 64))


def test_nothing_to_measure(tmp_path, monkeypatch):
    with pytest.raises(StudyError, match="no finished run in"):
        measure_queries(tmp_path, fingerprint="code")
    with pytest.raises(StudyError, match="no finished run of kv_1, kv_2"):
        measure_queries(finished(tmp_path, "hidden"), fingerprint="code")


def test_drafters_without_comparable_queries_are_refused_by_name():
    assert {name for name, config in VARIANTS.items() if reuses_kv(config)} >= {"kv_1", "kv_2", "hybrid"}
    for name in ("hidden", "kv_2_mlp", "kv_1_unrotate", "none_1", "kv_1_zero", "kv_2_lagged", "states_2"):
        with pytest.raises(StudyError, match=f"{name}/seed0: query estimation needs a kv or hybrid drafter"):
            check_drafter(VARIANTS[name], f"{name}/seed0")
    with pytest.raises(StudyError, match="paradigm='block'"):
        check_drafter(DrafterConfig("block"), "block_kv_2/seed0")

"""The command: tables on tiny runs, resumed and kept; refusals by name; target and drafters left as they were."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from examples import STEPS, drafter, live, target
from test_capture import left_behind

from kvshot_lib.drafters.checkpoint import load_drafter, save_drafter
from kvshot_lib.features.store import write_store
from kvshot_lib.metrics import acceptance as metrics
from kvshot_lib.metrics import tables
from kvshot_lib.probes import queries as query_estimation
from kvshot_lib.probes.queries import main, measure
from kvshot_lib.target.load import load_target
from kvshot_lib.training.judging import match_documents


def save_run(folder, variant):
    save_drafter(drafter(variant), folder)
    counts, _ = metrics.count_run(variant, 0, match_documents(live(), drafter(variant), STEPS))
    counts.to_csv(folder / "counts.csv", index=False)
    (folder / "run.json").write_text("{}")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Finished runs on stored features."""
    monkeypatch.setattr(query_estimation, "load_target", lambda *_, **__: target())
    for split in ("train", "evaluation"):
        write_store(tmp_path / "features" / split, live(), dtype=torch.float32)
    for variant in ("hidden", "kv_1", "kv_2"):
        save_run(tmp_path / f"runs/{variant}/seed0", variant)
    return tmp_path


def test_tables_are_made_resumed_and_kept(results, monkeypatch):
    before = left_behind(target().model), [p.clone() for p in target().model.parameters()]
    weights = load_drafter(results / "runs/kv_2/seed0", target()).state_dict()
    measure(results, documents=3)
    overlap, probe, oracle = (
        tables.read(results / "tables", name) for name in ("attention_overlap", "query_probe", "query_oracle")
    )
    assert set(overlap["variant"]) == {"target", "kv_1", "kv_2"}  # `hidden` has no attention over the cache
    assert set(oracle["arm"]) == {"as_trained", "own", "oracle", "perfect", "random"}
    plain = pd.read_csv(results / "runs/kv_2/seed0/counts.csv")
    own = oracle[(oracle["variant"] == "kv_2") & (oracle["arm"] == "as_trained")]
    assert own["matches"].tolist() == plain["matches"].tolist() and own["anchors"].tolist() == plain["anchors"].tolist()
    assert set(probe.loc[probe["variant"] == "kv_2", "layer"]) == {0, 1}
    facts = pd.read_csv(results / "tables/query_estimation_facts.csv").iloc[0]
    assert facts["runs"] == "kv_1/seed0 kv_2/seed0" and facts["retrained_tokens"] == sum(live().lengths[:3])

    assert left_behind(target().model) == before[0]
    assert all(torch.equal(a, b) for a, b in zip(before[1], target().model.parameters(), strict=True))
    again = load_drafter(results / "runs/kv_2/seed0", target()).state_dict()
    assert all(torch.equal(again[name], weights[name]) for name in weights)

    first = {path.name: path.read_bytes() for path in (results / "tables").glob("*.xz")}
    for name in ("measure_references", "load_drafter"):  # measured already
        monkeypatch.setattr(query_estimation, name, None)
    measure(results, documents=3)
    assert first and {path.name: path.read_bytes() for path in (results / "tables").glob("*.xz")} == first
    measure(results, ["kv_1/seed0"], documents=3, keep=results / "tables")
    assert set(tables.read(results / "tables", "query_oracle")["variant"]) == {"kv_1", "kv_2"}
    assert "target" in set(tables.read(results / "tables", "attention_overlap")["variant"])


def test_without_the_oracle_drafters_are_judged_as_trained_and_kept_arms_stay(results):
    measure(results, ["kv_1/seed0"], documents=3)
    measure(results, ["kv_2/seed0"], documents=3, oracle=False, keep=results / "tables")
    oracle = tables.read(results / "tables", "query_oracle")
    arms = oracle.groupby("variant")["arm"].unique().map(set).to_dict()
    assert arms == {"kv_1": {"as_trained", "own", "oracle", "perfect", "random"}, "kv_2": {"as_trained"}}
    assert {"kv_1", "kv_2"} <= set(tables.read(results / "tables", "attention_overlap")["variant"])
    facts = pd.read_csv(results / "tables/query_estimation_facts.csv")
    assert facts["runs"].tolist() == ["kv_2/seed0", "kv_1/seed0"] and facts["retrained_documents"].isna().tolist() == [
        True,
        False,
    ]


def test_what_cannot_be_measured_is_refused_by_name(results, monkeypatch, capsys):
    told = lambda *words: (main([str(results), *words]), capsys.readouterr().err)
    status, message = told("hidden/seed0")
    assert status == 1 and message.startswith("error: hidden/seed0: query estimation needs a kv or hybrid drafter")
    status, message = told("kv_3/seed0")
    assert status == 1 and "kv_3/seed0: no finished run" in message and "finished: hidden/seed0, kv_1/seed0" in message
    assert told("--documents", "0") == (1, "error: documents=0 must be 1 or more\n")
    sliding = load_target("tiny-llama", device="cpu", dtype="float32")
    sliding.model.config.layer_types = ["full_attention", "sliding_attention"] * 2
    monkeypatch.setattr(query_estimation, "load_target", lambda *_, **__: sliding)
    status, message = told()
    assert status == 1 and "sliding window" in message
    odd = load_target("tiny-llama", device="cpu", dtype="float32")
    gated = odd.model.get_decoder().layers[2].self_attn.o_proj
    gated.register_forward_pre_hook(lambda _module, given: (given[0] * 1.5,))  # as a target with gated outputs would
    monkeypatch.setattr(query_estimation, "load_target", lambda *_, **__: odd)
    status, message = told()
    assert status == 1 and "target tiny-llama: attention recomputed" in message
    other = replace(target(), hash="0" * 64)
    monkeypatch.setattr(query_estimation, "load_target", lambda *_, **__: other)
    assert "come from other weights of tiny-llama" in told()[1]


def test_nothing_to_measure(tmp_path):
    assert main([str(tmp_path)]) == 1


def test_drafters_without_comparable_queries_are_refused_by_name():
    assert {name for name, config in VARIANTS.items() if reuses_kv(config)} >= set(REUSING)
    for name in ("hidden", "kv_2_mlp", "kv_1_unrotate", "none_1", "kv_1_zero", "kv_2_lagged", "states_2"):
        with pytest.raises(StudyError, match=f"{name}/seed0: query estimation needs a kv or hybrid drafter"):
            check_drafter(VARIANTS[name], f"{name}/seed0")
    with pytest.raises(StudyError, match="paradigm='block'"):
        check_drafter(DrafterConfig("block"), "block_kv_2/seed0")

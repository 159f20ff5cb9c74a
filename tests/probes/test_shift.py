"""Attention shift: hand-made rows, a naive computation, what it may see, and tables that resume."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from examples import DOCUMENTS, STEPS, drafter, live, live_of, target
from finished import finished

from kvshot_lib.drafters.checkpoint import save_drafter
from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import tables
from kvshot_lib.probes import measuring
from kvshot_lib.probes import shift as attention_shift
from kvshot_lib.probes.shift import check_counts, entropy, measure_shift, measure_target, row_measures, shift_document
from kvshot_lib.probes.target_rows import jensen_shannon
from kvshot_lib.target.capture import attention_rows, capture

LAYERS = (1, 2, 3)


def test_measures_of_hand_made_rows():
    """One head, anchors t = 1 and t = 2: entries after t don't count, the sink only where it is asked for."""
    now = torch.tensor([[[0.9, 0.1, 0, 0, 0], [0.8, 0.2, 0, 0, 0]]])
    later = torch.tensor([[[0.2, 0.3, 0.5, 0, 0], [0.5, 0, 0.3, 0, 0.2]]])
    shift, with_sink, new = row_measures(now, later, torch.tensor([1, 2]))
    assert shift.tolist() == pytest.approx([0, math.log(2)], abs=1e-6)  # s = 1 alone; then s = 1 against s = 2
    wanted = jensen_shannon(torch.tensor([0.9, 0.1]), torch.tensor([0.4, 0.6])).item()
    assert with_sink[0].item() == pytest.approx(wanted)
    assert new.tolist() == pytest.approx([0.2, 0.3])
    assert row_measures(now, later, torch.tensor([0, 2]))[0, 0].isnan()  # nothing but the sink at s ≤ 0


def test_document_equals_a_naive_computation():
    tokens, anchors = torch.from_numpy(DOCUMENTS[1].tokens).long(), torch.tensor([2, 5, 9])
    found = shift_document(target(), tokens, anchors, [0, 3, 6], LAYERS)
    with capture(target().model, kv=LAYERS, queries=True) as taken:
        target().model(tokens[None], use_cache=False)
    for place, k in enumerate([0, 3, 6]):
        for column, t in enumerate(anchors.tolist()):
            each = []
            for layer in LAYERS:
                rows = attention_rows(taken.queries[layer], taken.keys[layer], torch.arange(len(tokens)))[0]
                for head in rows:
                    a, b = (head[position, 1 : t + 1].double() for position in (t, t + 1 + k))
                    a, b = a / a.sum(), b / b.sum()
                    m = (a + b) / 2
                    each.append(float(((a * (a / m).log()).sum() + (b * (b / m).log()).sum()) / 2))
            assert found[place, 0, column].item() == pytest.approx(np.mean(each), abs=1e-5)


def test_entropy_is_that_of_the_targets_distribution():
    features = live().batch([0])
    logits = target().model(features.tokens).logits[0]
    wanted = torch.distributions.Categorical(logits=logits).entropy()
    assert torch.allclose(entropy(target(), features.final_hidden[0], rows=5), wanted, atol=1e-5)


def test_a_token_changes_no_shift_of_steps_that_end_before_it():
    """Step k at anchor t reads rows t and t+1+k only, so what comes after t+1+k is of no matter."""
    table = measure_target(live(), target(), STEPS, LAYERS)
    changed = DOCUMENTS[0].tokens.copy()
    changed[10] = 5 + changed[10] % 400
    other = measure_target(live_of(replace(DOCUMENTS[0], tokens=changed)), target(), STEPS, LAYERS)
    rows = table[table["document"] == 0]
    before = (rows["context_length_tokens"] + rows["draft_step"] < 10).to_numpy()  # t + 1 + k < 10
    assert before.any() and (~before).any()
    assert rows[before].reset_index(drop=True).equals(other[before].reset_index(drop=True))
    assert (rows["shift"].to_numpy() != other["shift"].to_numpy())[~before].any()


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "load_target", lambda *_, **__: target())
    return finished(tmp_path, "hidden", "kv_1")


def test_tables_hold_every_valid_anchor_and_the_runs_own_matches(results, monkeypatch):
    measure_shift(results, fingerprint="code")
    shift, matches = (tables.read(results / "tables", name) for name in ("attention_shift", "attention_matches"))
    sizes = shift.groupby(["document", "draft_step"]).size()
    for variant in ("hidden", "kv_1"):
        counts = pd.read_csv(results / f"runs/{variant}/seed0/counts.csv").set_index(["document", "draft_step"])
        own = matches[matches["variant"] == variant].set_index(["document", "draft_step"])["matches"]
        assert own.str.len().to_dict() == sizes.to_dict() == counts.loc[own.index, "anchors"].to_dict()
        assert own.str.count("1").to_dict() == counts.loc[own.index, "matches"].to_dict()
    assert set(shift["draft_step"]) == {0, 3, 6}
    assert shift["shift"].dropna().between(0, math.log(2)).all() and shift["new_mass"].between(0, 1).all()
    assert shift["shift"].isna().sum() == (shift["context_length_tokens"] == 1).sum()

    for name in ("measure_target", "measure_matches"):  # measured already
        monkeypatch.setattr(attention_shift, name, lambda *_: 1 / 0)
    measure_shift(results, fingerprint="code")
    assert tables.read(results / "tables", "attention_shift").equals(shift)


def test_a_retrained_run_is_measured_again_and_one_of_other_documents_is_refused(results, monkeypatch):
    measure_shift(results, fingerprint="code")
    folder, changed, asked, original = results / "runs/kv_1/seed0", drafter("kv_1"), [], attention_shift.load_drafter
    torch.nn.init.zeros_(changed.layers[0].mlp.down_proj.weight)
    save_drafter(changed, folder)
    monkeypatch.setattr(attention_shift, "load_drafter", lambda f, t: asked.append(f.parent.name) or original(f, t))
    measure_shift(results, fingerprint="code")
    assert asked == ["kv_1"]
    counts = pd.read_csv(folder / "counts.csv")
    counts.loc[0, "anchors"] += 1
    counts.to_csv(folder / "counts.csv", index=False)
    with pytest.raises(StudyError, match="was evaluated on other documents or anchors"):
        measure_shift(results, fingerprint="other code")
    with pytest.raises(StudyError, match="kv_9/seed0: no finished run"):
        measure_shift(results, ["kv_9/seed0"], fingerprint="code")


def test_fewer_documents_than_the_run_was_judged_on_will_do(tmp_path):
    counts = pd.DataFrame({"document": [0, 1], "draft_step": [0, 0], "anchors": [2, 3], "matches": [1, 2]})
    counts.to_csv(tmp_path / "counts.csv", index=False)
    rows = pd.DataFrame([{"document": 0, "draft_step": 0, "matches": "10"}])
    check_counts(rows, tmp_path, 1)
    with pytest.raises(StudyError, match="was evaluated on other documents"):
        check_counts(rows, tmp_path, 2)
    with pytest.raises(StudyError, match="of its matches are not those"):
        check_counts(rows.assign(matches="11"), tmp_path, 1)

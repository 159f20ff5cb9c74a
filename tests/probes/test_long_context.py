"""Acceptance by context length: the bins of a document are its own counts taken apart, and windows act as they say."""

import shutil

import pandas as pd
import pytest
from examples import target
from finished import finished

from kvshot_lib.drafters.checkpoint import load_drafter
from kvshot_lib.errors import StudyError
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.metrics import tables
from kvshot_lib.metrics.acceptance import COUNTS, STEPS, count_document
from kvshot_lib.probes.long_context import measure_context
from kvshot_lib.target.load import load_target
from kvshot_lib.text.corpus import load_corpus
from kvshot_lib.text.generate import GeneratorSettings, generate_corpus
from kvshot_lib.training.judging import match_documents


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two finished runs and long dialogues, measured without a window, with one of all that there is, and with a short one."""
    folder = tmp_path_factory.mktemp("context")
    finished(folder / "results", "kv_2", "hidden")
    settings = GeneratorSettings(100, 6, batch_size=3, max_answer_tokens=30)
    corpus = generate_corpus(target(), folder / "long", {"evaluation": 3}, settings)
    written = measure_context(folder / "results", corpus=corpus, fingerprint="code", documents=2, windows=(0, 100, 4))
    return folder, corpus, written


def test_bins_are_the_whole_taken_apart(study):
    folder, corpus, _ = study
    table = tables.read(folder / "results/tables", "context")
    assert set(table["bin_low"]) == {0, 16, 32, 64} and set(table["document"]) == {0, 1}
    drafter = load_drafter(folder / "results/runs/kv_2/seed0", target())
    source = LiveFeatures(target(), load_corpus(corpus, "evaluation").documents[:2], drafter.spec, 100)
    for document, matched in enumerate(match_documents(source, drafter, STEPS)):
        counts, (complete, accepted) = count_document(*matched)
        own = table.query("variant == 'kv_2' and window_tokens == 0 and document == @document")
        assert own.groupby("draft_step")[COUNTS].sum().to_numpy().tolist() == counts.tolist()
        assert own.query("draft_step == 0")[["complete", "accepted"]].sum().tolist() == [complete, accepted]


def test_a_window_of_all_changes_nothing_and_a_short_one_no_short_context(study):
    folder, *_ = study
    table = tables.read(folder / "results/tables", "context").set_index("window_tokens")
    told = lambda window: table.loc[window].reset_index(drop=True)
    pd.testing.assert_frame_equal(told(0), told(100))
    same = ["variant", "document", "bin_low", "draft_step", "anchors", "complete"]
    pd.testing.assert_frame_equal(told(0)[same], told(4)[same])
    assert not told(4).equals(told(0))


def test_what_was_measured_is_not_measured_again_and_facts_say_on_what(study, monkeypatch):
    folder, corpus, written = study
    facts = tables.read(folder / "results/tables", "context_facts").iloc[0]
    assert facts["runs"] == "hidden/seed0 kv_2/seed0" and facts["documents"] == 2 and facts["corpus"] == str(corpus)
    assert f"torch.{facts['dtype']}" == str(load_target("tiny").dtype)
    before = written["context"].read_bytes()
    monkeypatch.setattr("kvshot_lib.probes.long_context.load_drafter", None)
    again = measure_context(folder / "results", corpus=corpus, fingerprint="code", documents=2, windows=(0, 100, 4))
    assert again["context"].read_bytes() == before


@pytest.mark.parametrize("given, told", [({"documents": -1}, "--documents"), ({"windows": (-4,)}, "--window"), ({"windows": ()}, "--windows")])  # fmt: skip
def test_options_that_measure_nothing_are_refused(tmp_path, given, told):
    with pytest.raises(StudyError, match=f"{told} is too small"):
        measure_context(tmp_path, fingerprint="code", **given)


def test_published_drafters_are_measured_as_runs_are(study, tmp_path):
    folder, corpus, _ = study
    shutil.copytree(folder / "results/runs/kv_2/seed0", tmp_path / "mine")
    given = {"corpus": corpus, "fingerprint": "code", "documents": 2, "windows": (0, 100, 4)}
    found = pd.read_parquet(measure_context(tmp_path, **given)["context"])
    first = tables.read(folder / "results/tables", "context").query("variant == 'kv_2'")
    assert set(found["variant"]) == {"mine"} and set(found["seed"]) == {0}
    same = ["window_tokens", "document", "bin_low", "draft_step", *COUNTS]
    pd.testing.assert_frame_equal(found[same], first[same].reset_index(drop=True))

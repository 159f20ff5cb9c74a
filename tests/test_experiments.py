"""What an experiment compares was written down before its runs: its profile trains all of it, and the registry knows it."""

import pytest
import yaml
from notebook_checks import ROOT
from recorded import minus

from kvshot_lib.drafters.variants import VARIANTS
from kvshot_lib.study.profiles import checked_profile, load_profile
from kvshot_lib.text.corpus import load_corpus, prompt_key

PLANS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "data/experiments").glob("*.yaml"))}


@pytest.mark.parametrize("name", PLANS)
def test_every_comparison_is_between_drafters_of_the_profile(name, monkeypatch):
    """Or, of an older one that is named beside it."""
    monkeypatch.chdir(ROOT)
    plan = PLANS[name]
    compared = [row for family in plan.get("families", {"": plan.get("comparisons")}).values() for row in family]
    assert len({row["id"] for row in compared}) == len(compared) > 0
    named = {row[side] for row in compared for side in ("a", "b") if side in row}
    older = load_profile(plan["beside"]).drafters.keys() if "beside" in plan else set()
    for profile in plan.get("profiles") or [plan["profile"]]:
        drafters = checked_profile(profile).drafters.keys()
        assert named <= drafters | older and drafters <= VARIANTS.keys()


@pytest.mark.parametrize("name", ["fresh", "one_layer"])
def test_what_was_known_before_is_that_of_sources(name):
    known = [row for row in PLANS[name]["comparisons"] if "sources" in row]
    for row in known:
        which = row.get("metric", "measured_mat"), *([row["draft_step"]] if "draft_step" in row else [])
        found = minus(row["a"], row["b"], *which, profile="sources")[0]
        assert found == pytest.approx(row["sources"], abs=5.001e-4), row["id"]
    assert known


def test_drafters_of_one_layer_are_trained_as_those_of_long_and_made_as_those_of_sources():
    one, long, sources = (load_profile(name) for name in ("one_layer", "long", "sources"))
    assert (one.train, one.extract, one.dialogues) == (long.train, long.extract, long.dialogues)
    assert all(one.drafters[variant] == sources.drafters[variant] for variant in ("kv_1", "none_1", "states_1"))
    assert {VARIANTS[variant].parameters.get("num_layers", 1) for variant in one.drafters} == {1}


def test_no_user_turn_of_the_sealed_set_stands_in_the_corpus():
    seen = {
        prompt_key(d)
        for split in ("train", "validation", "evaluation")
        for d in load_corpus("selfgen", split, whole_answers=True).documents
    }
    sealed = load_corpus("sealed", "evaluation", whole_answers=True).documents
    assert len(sealed) == 2177 and not seen & {prompt_key(d) for d in sealed}


def test_a_sealed_set_says_when_it_was_opened(capsys):
    load_corpus("sealed", "evaluation")
    assert (
        "sealed is a sealed set that was opened. On 2026-11-28 at revision 7bfb319e81, once" in capsys.readouterr().err
    )
    load_corpus("selfgen", "validation")
    assert capsys.readouterr().err == ""

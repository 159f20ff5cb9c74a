"""What an experiment compares was written down before its runs: its profile trains all of it, and the registry knows it."""

import pytest
import yaml
from notebook_checks import ROOT

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

"""The lossless check: it finds nothing where decoding is right and something where it is not, and goes on where it was stopped."""

import pytest
from examples import drafter, target

from kvshot_lib.decoding import decode as decoding
from kvshot_lib.decoding import lossless, timing
from kvshot_lib.drafters.checkpoint import save_drafter
from kvshot_lib.metrics import tables
from kvshot_lib.text.prompts import Prompt

SMALL = {"new_tokens": 8, "device": "cpu"}
PROMPTS = [Prompt("a", "coding", ("w7 w8 w9",)), Prompt("b", "rag", ("w10 w11",))]


@pytest.fixture
def results(tmp_path, monkeypatch):
    for variant in ("hidden", "kv_1"):
        save_drafter(drafter(variant), tmp_path / f"runs/{variant}/seed0", variant=variant, seed=0)
    monkeypatch.setattr(lossless, "load_prompts", lambda name: PROMPTS)
    monkeypatch.setattr(timing, "load_target", lambda *_, **__: target())
    return tmp_path


def test_right_decoding_has_no_mismatch_and_is_not_measured_twice(results, monkeypatch, capsys):
    assert lossless.verify_lossless(results, **SMALL) == 0
    table = tables.read(results / "tables", "lossless")
    assert set(zip(table["variant"], table["mode"])) == {(v, m) for v in ("hidden", "kv_1") for m in ("chain", "tree")}
    assert len(table) == 8 and (table["mismatches"] == 0).all()
    assert f"0 mismatches in float32, of {table['new_tokens'].sum():,} tokens" in capsys.readouterr().out
    monkeypatch.setattr(lossless, "decode", lambda *_, **__: pytest.fail("measured again"))
    assert lossless.verify_lossless(results, **SMALL) == 0


def test_a_rule_that_accepts_whatever_was_drafted_is_found(results, monkeypatch):
    first = lambda proposal, logits, chooser: (list(range(min(2, len(proposal.tokens)))), int(logits[0].argmax()))
    own = lossless.decode

    def wrong(target, drafter, *given, **named):
        with monkeypatch.context() as patch:
            if drafter is not None:
                patch.setattr(decoding, "accept", first)
            return own(target, drafter, *given, **named)

    monkeypatch.setattr(lossless, "decode", wrong)
    assert lossless.verify_lossless(results, ["hidden/seed0"], **SMALL) == 1
    table = tables.read(results / "tables", "lossless")
    assert (table["mismatches"] > 0).any() and table.loc[table["mismatches"] > 0, "logit_gap"].gt(0).all()


def test_a_folder_of_checkpoints_will_do_and_stays_as_it_is(results, tmp_path):
    checkpoints, out = tmp_path / "checkpoints", tmp_path / "out"
    save_drafter(drafter("kv_1"), checkpoints / "kv_1", variant="kv_1", seed=2)
    assert lossless.verify_lossless(checkpoints, out=out, **SMALL) == 0
    made = tables.read(out / "tables", "lossless")
    assert len(made) == 4 and set(made["seed"]) == {2} and [p.name for p in checkpoints.iterdir()] == ["kv_1"]

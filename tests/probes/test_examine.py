"""The microscope: counts by hand; and a drafter that was overfitted in seconds is damaged, and each fault is named."""

import json

import examples
import numpy as np
import planted
import pytest
import torch

from kvshot_lib.drafters.checkpoint import save_drafter
from kvshot_lib.drafters.config import DrafterConfig
from kvshot_lib.drafters.context import drafter_spec
from kvshot_lib.drafters.drafter import build_drafter
from kvshot_lib.drafters.eagle3 import export_eagle3, read_tensors
from kvshot_lib.drafters.eagle3_format import LAYERS, OUTPUTS
from kvshot_lib.errors import StudyError
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.parts import Parts
from kvshot_lib.probes import answers, examine
from kvshot_lib.probes.answers import BEGUN, DIFFER, ENDS, MAT, OUTSIDE, SAME, SHARE, Judged
from kvshot_lib.probes.counterfactuals import counterfactuals, halves
from kvshot_lib.probes.examine import AS_IT_IS, PLAIN, SHUFFLED, ZERO
from kvshot_lib.study.cli import main
from kvshot_lib.study.microscope import findings
from kvshot_lib.text.corpus import load_corpus
from kvshot_lib.text.prompts import Prompt
from kvshot_lib.training.loss import ttt_loss

PROMPTS = [Prompt(str(n), ("coding", "rag")[n % 2], (f"w{20 + n} w{40 + 3 * n} w{90 - n}",)) for n in range(8)]
GIVEN = {"draft_length": 4, "new_tokens": 24, "rounds": 1}
NAMED = (
    "d2t holds ids",
    "norm output left out",
    "head of the first tokens",
    "state before embedding",
)  # the others need a real target


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """An EAGLE-3.1 checkpoint of a tiny target that has learned the target's answers by heart."""
    folder, target = tmp_path_factory.mktemp("good"), examples.target()
    config = DrafterConfig("hidden", hidden_norm=True, feedback="post_norm")
    answered = examine.answers_of(target, PROMPTS, GIVEN["new_tokens"], Parts(folder / "answers", ""))
    known = torch.from_numpy(np.unique(np.concatenate(answered["answer"])))[1:]  # one of them can't be drafted
    built = build_drafter(config, target, drafter_spec(config, target), known.long(), seed=1)
    source = LiveFeatures(target, answers.documents_of(answered), built.spec)
    features, optimiser = source.batch(range(len(source))), torch.optim.AdamW(built.parameters(), lr=5e-3)
    for _ in range(40):
        ttt_loss(built, features, ttt_steps=GIVEN["draft_length"]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    save_drafter(built.eval(), folder / "run")
    return export_eagle3(built, target, folder / "good")


def test_rows_by_hand():
    """Anchors that match 1 1, 0 1 and 1 (the answer ends): of 5 drafts 4 are right; two whole chains accept 2 and 0."""
    match, valid = np.array([[1, 1], [0, 1], [1, 0]], bool), np.array([[1, 1], [1, 1], [1, 0]], bool)
    found = {
        (row["metric"], row["draft_step"]): (row["top"], row["bottom"]) for row in Judged([(match, valid)]).rows("a")
    }
    assert found[SHARE, None] == (4, 5) and found[MAT, None] == (2 + 0 + 2, 2)
    assert [found["step_acceptance", k] for k in (0, 1)] == [(2, 3), (2, 2)] and found["chain_acceptance", 1] == (1, 1)
    chosen = [np.array([False, True, False])]
    assert {row["metric"]: row["top"] for row in Judged([(match, valid)]).rows("a", chosen)}[MAT] == 1


def test_rounds_stand_at_their_anchors_by_hand():
    """The example of the module: rounds accept 2, 0 and 1 drafts and begin at anchors 0, 3 and 4; K = 2."""
    match = np.array([[1, 1], [0, 0], [1, 1], [0, 1], [1, 0], [1, 0]], bool)
    valid = np.array([[1, 1]] * 5 + [[1, 0]], bool)
    kept = lambda rounds: [(r["variant"], r["metric"], r["top"]) for r in Judged([(match, valid)]).decoded({0: rounds})]
    found = kept([2, 0, 1])
    assert [top for name, metric, top in found if name == BEGUN] == [3, 1, 2]
    assert [top for name, metric, top in found if (name, metric) == (SAME, MAT)] == [3, 1, 2]
    assert [top for name, metric, top in found if name == ENDS] == [3, 1, 2] and sum(
        t for *_, t in found if _[1] == DIFFER
    ) == 0
    assert sum(top for name, metric, top in kept([1, 0, 1]) if metric == DIFFER) > 0  # another decoder would be seen


def test_contexts_and_categories():
    import pandas as pd

    own = pd.DataFrame({"prompt": [np.zeros(14), np.zeros(40)], "category": ["rag", "coding"]})
    judged = Judged([(np.ones((4, 1), bool),) * 2, (np.ones((3, 1), bool),) * 2])
    found = {name: [anchors.sum() for anchors in chosen] for name, chosen in judged.by_context(own, 40).items()}
    assert found == {"context 0-15": [2, 0], "context 16-31": [2, 0], "context 32-63": [0, 3], "context up to 40": [4, 1], "context beyond 40": [0, 2]}  # fmt: skip
    assert [a.all() for a in judged.by_category(own["category"])["rag"]] == [True, False]


def test_a_document_is_a_prompt_too():
    """It has no chat template to be without."""
    own = load_corpus("tiny", "evaluation").documents[0]
    (row,) = answers.answered(examples.target("tiny"), Prompt("0", "held_out", (own,)), 4).itertuples()
    assert row.prompt.tolist() == row.plain.tolist() == own.prompt.tolist() and len(row.answer) == 4


def test_a_good_checkpoint_is_left_alone_and_every_part_is_measured(good, tmp_path):
    found = examine.examine(good, examples.target(), PROMPTS[:5], kept=tmp_path, **GIVEN)
    assert found.faults == [] and found.base == AS_IT_IS and found.of(AS_IT_IS, SHARE).value > 0.5
    assert found.of(SAME, DIFFER).value == 0 and found.of(SAME).value == found.of(BEGUN).value
    assert 0 < found.of(AS_IT_IS, OUTSIDE).value < 0.2
    assert all(found.gain(name).high < 0 for name in (ZERO, SHUFFLED, PLAIN))
    table = found.table
    parts = {"counterfactual", "control", "template", "context", "category", "drift", "decoding"}
    assert set(table["part"]) == {AS_IT_IS, *parts}
    whole = table[table["variant"].eq(AS_IT_IS) & table["metric"].eq(SHARE)]["anchors"].item()
    for part in ("context", "category"):
        assert table[table["part"].eq(part) & table["metric"].eq(SHARE)]["anchors"].sum() == whole


@pytest.mark.parametrize("name", NAMED)
def test_a_planted_fault_is_named(good, tmp_path, name):
    target = examples.target()
    answered = examine.answers_of(target, PROMPTS, 24, Parts(good.parent / "answers", ""))
    folder = planted.plant(good, tmp_path / "damaged", name, target)
    scope = examine.Microscope(folder, target, {}, 4, Parts(tmp_path / "kept", ""))
    _, faults = scope.search(scope.source(answered), 1)
    assert [one.name in planted.FAULTS[name][0] for one in faults] == [True], faults


def test_what_is_tried_depends_on_what_the_checkpoint_says(good, tmp_path):
    """Layers that two fields count otherwise: each is tried. The base that it has, and a head that it lacks, are not."""
    target, tensors = examples.target(), read_tensors(good)
    config = json.loads((good / "config.json").read_text()) | {"fc_norm": False, "rope_theta": 5000.0}
    (tmp_path / "config.json").write_text(json.dumps(config | {"eagle_config": {LAYERS: [0, 1, 2]}}))
    tried = {one.name: one for one in counterfactuals(tmp_path, target, {**tensors}, {})}
    assert tried[f"layers as {LAYERS} says"].fields == {LAYERS: [0, 2, 3]}
    assert tried[f"layers as {OUTPUTS} says"].fields == {LAYERS: [1, 2, 3]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    del tensors["lm_head.weight"], tensors["t2d"]
    found = {one.name: one for one in counterfactuals(tmp_path, target, tensors, {})}
    assert "fused states normed" in found and "RoPE base 10,000 (of old code)" in found
    assert not {
        "fused states as they are",
        "the target's LM head",
        "the target's embedding",
        "tokens that t2d marks",
    } & {*found}
    shifted = found["d2t one later"].change(tensors)["d2t"]
    assert torch.equal(shifted, tensors["d2t"] + 1)
    turned = found["state before embedding"].change(tensors)["midlayer.self_attn.q_proj.weight"]
    assert torch.equal(turned[:, :64], tensors["midlayer.self_attn.q_proj.weight"][:, 64:])
    assert halves(torch.arange(8)[:, None], 8)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_two_faults_are_named_one_after_the_other_though_it_cannot_be_read_as_it_is(good, tmp_path):
    target = examples.target()
    folder = planted.plant(good, tmp_path / "damaged", "norm output left out", target)
    folder = planted.plant(folder, tmp_path / "twice", "d2t holds ids", target)
    found = examine.examine(folder, target, PROMPTS[:4], kept=tmp_path / "kept", draft_length=4, new_tokens=24)
    assert [one.name for one in found.faults] == ["d2t read as ids", "state fed back after the final norm"]
    told = findings(found)
    assert told[0].startswith("As it is, it can't be read: ") and "d2t and t2d name different tokens" in told[0]
    assert (
        "LIKELY FAULT: its d2t holds target ids" in told[2] and "AND THEN: it was trained on states fed back" in told[3]
    )
    assert "draft alike" in told[4] and found.of(SAME, DIFFER).value == 0


def test_what_is_done_is_kept_and_the_page_tells_it(good, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kvshot_lib.study.microscope.fingerprint", lambda *_: "of the code")
    lines = [json.dumps({"question_id": p.id, "category": p.category, "turns": p.turns}) for p in PROMPTS[:4]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    words = [
        "examine",
        str(good.parent / "run"),
        "--target",
        "tiny-llama",
        "--prompts",
        str(tmp_path / "prompts.jsonl"),
        "--out",
        str(tmp_path),
    ]
    words += ["--draft-length", "4", "--new-tokens", "24", "--rounds", "1", "--set", "norm_output=false"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "LIKELY FAULT: it was trained on states fed back after the final norm: write norm_output=true" in told
    page = (tmp_path / "run.html").read_text()
    assert "LIKELY FAULT" in page and page.count("<svg") == 2 and "http" not in page.replace("http://www.w3.org", "")
    assert main([*words, "--set", "rope_theta=fast"]) == 1
    assert "rope_theta='fast' must be a finite number" in capsys.readouterr().err
    before = (tmp_path / "run.csv").read_bytes()
    monkeypatch.setattr(examine, "match_documents", None)
    monkeypatch.setattr(answers, "decode", None)
    assert main(words) == 0 and (tmp_path / "run.csv").read_bytes() == before


def test_what_is_no_checkpoint_is_one_line(good, tmp_path):
    with pytest.raises(StudyError, match="give the folder of an EAGLE-3 checkpoint"):
        examine.examine(tmp_path, examples.target(), PROMPTS, kept=tmp_path, **GIVEN)
    planted.left = json.loads((good / "config.json").read_text()) | {"hidden_size": 32}
    (good.parent / "other").mkdir()
    (good.parent / "other/config.json").write_text(json.dumps(planted.left))
    (good.parent / "other/model.safetensors").write_bytes((good / "model.safetensors").read_bytes())
    with pytest.raises(StudyError, match="has hidden_size=32, target tiny-llama 64"):
        examine.examine(good.parent / "other", examples.target(), PROMPTS, kept=tmp_path, **GIVEN)
    with pytest.raises(StudyError, match="no answer of 16 tokens or more"):
        examine.examine(good, examples.target(), PROMPTS, kept=tmp_path, new_tokens=3)

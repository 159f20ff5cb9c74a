"""Block-wise drafters: many blocks in one pass against one block at a time, every way to leak, the loss, and training."""

import itertools
from dataclasses import replace

import examples
import numpy as np
import pytest
import sequential
import torch
from blocks import BLOCKS, block_drafter, naive_block, steps_of
from examples import DRAFT_IDS
from killed import Killed, die_before_step

from kvshot_lib.drafters import block
from kvshot_lib.drafters import checkpoint as checkpoints
from kvshot_lib.drafters.attention import prefix_mask
from kvshot_lib.drafters.drafter import DrafterConfig, build_drafter
from kvshot_lib.drafters.layers import View
from kvshot_lib.errors import StudyError
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.features.resident import ResidentFeatures
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.metrics import acceptance as metrics
from kvshot_lib.text.corpus import load_corpus
from kvshot_lib.training import ttt
from kvshot_lib.training.anchors import find_anchors, sample_anchors
from kvshot_lib.training.config import TrainConfig
from kvshot_lib.training.judging import match_documents, predict
from kvshot_lib.training.loop import train
from kvshot_lib.training.loss import training_loss, ttt_loss
from kvshot_lib.training.ttt import draft_steps

EVERY = list(BLOCKS)
STATE = ("hidden_states", "keys", "values")


def logits_of(drafter, features, anchors):
    """[B, M, K, V_draft], from the code that trains."""
    with torch.no_grad():
        steps = draft_steps(drafter, features, anchors, steps_of(drafter))
        return torch.stack([drafter.norm(output) @ drafter.head.T for _, _, output in steps], 2)


def anchors_at(features, *places):
    index = torch.tensor(places).expand(len(features.tokens), -1)
    return ttt.Anchors(index, torch.ones(*index.shape, 7, dtype=torch.bool), torch.ones(index.shape))


# One pass against one block at a time


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3"])
@pytest.mark.parametrize("variant", EVERY)
def test_many_blocks_in_one_pass_equal_one_block_at_a_time(variant, name):
    drafter, features = block_drafter(variant, name), examples.features(name, documents=(1, 4))
    anchors = find_anchors(features.answer_mask, steps_of(drafter))
    parallel, compared = logits_of(drafter, features, anchors), 0
    with torch.no_grad():
        for document, row in anchors.valid[..., 0].nonzero().tolist():
            naive = naive_block(drafter, features, document, int(anchors.index[document, row]))
            assert len(naive) == steps_of(drafter)
            for step, logits in enumerate(naive):
                assert (parallel[document, row, step] - logits).abs().max() < 1e-5 * max(1, logits.abs().max())
                compared += 1
    assert compared == 24 * steps_of(drafter)


def test_reused_heads_side_by_side_equal_one_block_at_a_time():
    target = examples.target()
    source = LiveFeatures(target, examples.DOCUMENTS, feature_spec(target, 2))
    config = DrafterConfig("block", block_context="both", kv_layers=2, kv_fusion="heads", block_size=3)
    drafter = examples.roughened(build_drafter(config, target, source.spec, DRAFT_IDS, seed=1))
    features = source.batch([0, 4])
    parallel = logits_of(drafter, features, anchors_at(features, 3, 7))
    for document, (row, anchor) in itertools.product(range(2), enumerate((3, 7))):
        naive = torch.stack(naive_block(drafter, features, document, anchor))
        assert torch.allclose(parallel[document, row], naive, atol=1e-4)


def test_five_layers_and_sixteen_slots_equal_one_block_at_a_time():
    """DFlash's size, over both kinds of target state: every slot of two blocks of an answer that holds them whole."""
    target = examples.target()
    source = examples.live_of(examples.document("00" + "1" * 20))
    config = DrafterConfig("block", 5, block_context="both", block_size=16)
    drafter = examples.roughened(build_drafter(config, target, source.spec, DRAFT_IDS, seed=1))
    features = source.batch([0])
    index = torch.tensor([[1, 4]])
    anchors = ttt.Anchors(index, torch.ones(1, 2, 15, dtype=torch.bool), torch.ones(1, 2))
    parallel = logits_of(drafter, features, anchors)
    assert parallel.shape[:3] == (1, 2, 15)
    with torch.no_grad():
        for row, anchor in enumerate((1, 4)):
            naive = torch.stack(naive_block(drafter, features, 0, anchor))
            assert torch.allclose(parallel[0, row], naive, atol=1e-4 * float(naive.abs().max()))


# Leaks, all of them to the last bit


def changed(features, *, state=slice(0, 0), tokens=(), documents=slice(None), value=None):
    """Other target state at the places ``state`` (random, or ``value``), and other ``tokens``."""
    generator, new = torch.Generator().manual_seed(0), {"tokens": features.tokens.clone()}
    for name in STATE:
        new[name] = getattr(features, name).clone()
        noise = torch.randn(new[name][documents, state].shape, generator=generator)
        new[name][documents, state] += 3 * noise if value is None else value
    for place in tokens:
        new["tokens"][documents, place] = (features.tokens[documents, place] + 101) % 512
    return replace(features, **new)


@pytest.mark.parametrize("variant", EVERY)
def test_a_block_sees_its_first_token_and_the_past_and_nothing_else(variant):
    drafter, features, anchor = block_drafter(variant), examples.features(documents=(0, 1), length=12), 5
    anchors = anchors_at(features, anchor)
    before = logits_of(drafter, features, anchors)

    def after(**change):
        return logits_of(drafter, changed(features, **change), anchors)

    others = [place for place in range(12) if place != anchor + 1]
    assert torch.equal(after(tokens=others), before), "a token other than x_(t+1) is seen"
    for value in (None, 1e30):  # a masked entry has weight 0, not a small one
        assert torch.equal(after(state=slice(anchor + 1, None), value=value), before), "target state at s > t is seen"
    other = after(state=slice(None), tokens=range(12), documents=[1])
    assert torch.equal(other[0], before[0]), "another document of the batch is seen"
    assert (other[1] != before[1]).any(-1).all()
    assert (after(tokens=[anchor + 1]) != before).any(-1).all(), "a slot does not see x_(t+1)"
    for s in (0, anchor):
        assert (after(state=slice(s, s + 1)) != before).any(-1).all(), f"a slot does not see target state at {s}"


@pytest.mark.parametrize("variant", ["block_kv_2", "block_both_2"])
def test_blocks_of_one_pass_do_not_see_one_another(variant):
    """Overlapping blocks at t = 4, 5, 6: what stands in the middle one, NaN even, changes no bit of the others."""
    drafter, features = block_drafter(variant), examples.features(documents=(0, 1), length=12)
    anchors = torch.tensor([[4, 5, 6]] * 2)
    entries, _ = drafter.prefix(features)
    views = [View(layer, prefix_mask(anchors + 1, 11), {}, True) for layer in entries]
    tokens = features.tokens.gather(1, anchors + 1)
    drafter.embedding = drafter.embedding.clone()
    with torch.no_grad():
        before = block.run_blocks(drafter, tokens, anchors + 1, views)
        for value in (1.0, float("nan")):
            other = tokens.clone()
            other[:, 1] = 511
            drafter.embedding[511] = value
            out = block.run_blocks(drafter, other, anchors + 1, views)
            assert torch.equal(out[:, :, [0, 2]], before[:, :, [0, 2]])
            assert not torch.equal(out[:, :, 1], before[:, :, 1])
    alone = block.run_blocks(
        drafter, tokens[:, [1]], anchors[:, [1]] + 1, [replace(v, mask=v.mask[:, :, [1]]) for v in views]
    )
    assert torch.allclose(alone, before[:, :, [1]], atol=1e-5)


def loss_and_gradients(drafter, features, **options):
    drafter.zero_grad()
    result = ttt_loss(drafter, features, ttt_steps=steps_of(drafter), **options)
    result.loss.backward()
    return result, torch.cat([p.grad.flatten() for p in drafter.parameters()])


@pytest.mark.parametrize("variant", ["block_kv_2", "block_states_2", "block_both_2"])
def test_nothing_beyond_the_answer_enters_loss_or_gradient(variant):
    """Answer x_3 … x_8 of 14 tokens: tokens, judges and state beyond it may be anything."""
    drafter = block_drafter(variant)
    features = examples.live_of(examples.document("00011111100000", seed=4)).batch([0])
    full, gradient = loss_and_gradients(drafter, features)
    other = changed(features, state=slice(8, None), tokens=range(9, 14))
    judges = {name: getattr(features, name).clone() for name in ("final_hidden", "target_argmax")}
    judges["final_hidden"][:, 8:], judges["target_argmax"][:, 8:] = float("nan"), 0
    same, same_gradient = loss_and_gradients(drafter, replace(other, **judges))
    assert torch.equal(same.loss, full.loss) and torch.equal(same_gradient, gradient)
    assert full.pairs.tolist()[:4] == [5, 4, 3, 2]  # anchors 2 … 6, x_4 … x_8 to predict
    judged = features.final_hidden.clone()
    judged[:, 7] *= -1  # p_7 judges x_8, the last answer token
    assert loss_and_gradients(drafter, replace(features, final_hidden=judged))[0].loss != full.loss


# The loss


def naive_loss(drafter, features, step_decay):
    """Σ_k λ^k · mean of the soft cross-entropy over the valid pairs whose target argmax can be drafted, block by block."""
    terms = [[] for _ in range(steps_of(drafter))]
    for document, anchor in itertools.product(range(len(features.tokens)), range(features.tokens.shape[1] - 2)):
        for k, logits in enumerate(naive_block(drafter, features, document, anchor)):
            if sequential.is_scored(features.answer_mask, document, anchor, k):
                judge = features.final_hidden[document, anchor + 1 + k]
                if int(features.target_argmax[document, anchor + 1 + k]) in DRAFT_IDS:
                    p = torch.softmax(drafter.head @ judge, -1)
                    terms[k].append(-(p * torch.log_softmax(logits, -1)).sum())
    return sum(step_decay**k * sum(found) / len(found) for k, found in enumerate(terms) if found)


@pytest.mark.parametrize("variant", ["block_kv_1", "block_both_2"])
def test_loss_and_gradients_equal_those_of_one_block_at_a_time(variant):
    drafter, features = block_drafter(variant), examples.features(documents=(0, 1), length=13)
    result, gradient = loss_and_gradients(drafter, features, step_decay=0.7)
    drafter.zero_grad()
    naive = naive_loss(drafter, features, 0.7)
    naive.backward()
    wanted = torch.cat([p.grad.flatten() for p in drafter.parameters()])
    assert result.loss.item() == pytest.approx(naive.item(), rel=1e-5)
    assert (gradient - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_loss_by_hand(monkeypatch):
    """Answer x_2 … x_5, b = 3: anchors 1, 2, 3 at step 0 and 1, 2 at step 1. Uniform drafts cost log V each, whatever p is; with
    λ = 0.5 the loss is log V + 0.5 log V. With outputs zero but at anchor 2, step 1, the second mean is over two pairs."""
    source = examples.live_of(examples.document("001111", seed=2))
    features, everything = source.batch([0]), torch.arange(512)
    config = DrafterConfig("block", block_size=3)
    drafter = build_drafter(config, examples.target(), source.spec, everything)
    out = torch.zeros(1, 2, 3, 64)  # [B, K, M, d]
    monkeypatch.setattr(ttt, "draft_blocks", lambda *given: out)
    result = ttt_loss(drafter, features, ttt_steps=2, step_decay=0.5)
    assert result.pairs.tolist() == [3, 2]
    assert result.loss.item() == pytest.approx(1.5 * np.log(512), rel=1e-5)
    out[0, 1, 1] = torch.randn(64, generator=torch.Generator().manual_seed(0))
    logits = drafter.norm(out[0, 1, 1]) @ drafter.head.T
    p = (drafter.head @ features.final_hidden[0, 2 + 1 + 1]).softmax(-1)
    one = -(p * logits.log_softmax(-1)).sum().item()
    wanted = np.log(512) + 0.5 * (np.log(512) + one) / 2
    assert ttt_loss(drafter, features, ttt_steps=2, step_decay=0.5).loss.item() == pytest.approx(wanted, rel=1e-5)


def test_the_mean_over_all_samples_of_anchors_is_the_full_loss():
    """Every step runs on the sample, step 0 too: each is weighted up."""
    features = examples.live_of(*(examples.document(span, seed=9) for span in ("00111111000", "01111000000"))).batch(
        [0, 1]
    )
    drafter, found = block_drafter("block_kv_1"), {}
    for seed in range(300):
        subset, _ = sample_anchors(find_anchors(features.answer_mask, 3), 0.4, torch.Generator().manual_seed(seed))
        kept = str([sorted(row[used].tolist()) for row, used in zip(subset.index, subset.valid[..., 0], strict=True)])
        found.setdefault(kept, seed)
    assert len(found) == 30
    full, gradient = loss_and_gradients(drafter, features)
    sampled = [
        loss_and_gradients(drafter, features, anchor_fraction=0.4, generator=torch.Generator().manual_seed(seed))
        for seed in found.values()
    ]
    mean = torch.stack([result.step_loss for result, _ in sampled]).double().mean(0)
    assert (mean - full.step_loss).abs().max() < 1e-5
    assert (torch.stack([g for _, g in sampled]).mean(0) - gradient).abs().max() < 1e-4 * gradient.abs().max()
    assert sampled[0][0].pairs[0] == 4 and full.pairs[0] == 8


# `kv` block-wise in the causal sense is TTT on all anchors


def causal_blocks(drafter, features, anchors, steps):
    """A `kv` drafter over blocks of teacher-forced tokens, all slots in one pass under an explicit causal mask: [B, M, K, d]."""
    (batch, blocks), entries = anchors.index.shape, drafter.prefix(features)[0]
    last, size = features.tokens.shape[1] - 1, drafter.sizes.head_dim
    places = anchors.index[..., None] + 1 + torch.arange(steps)
    seen = torch.arange(last) <= anchors.index[..., None]  # [B, M, N]
    causal = torch.tril(torch.ones(steps, steps, dtype=torch.bool))
    mask = torch.cat([seen[:, :, None].expand(-1, -1, steps, -1), causal.expand(batch, blocks, -1, -1)], -1)
    rows = drafter.embed(features.tokens[torch.arange(batch)[:, None, None], places.clamp(max=last)])
    rotary = drafter.rotary(rows, places.flatten(1))
    for layer, made in zip(drafter.layers, entries, strict=True):
        attention, inputs = layer.attention, layer.attention_norm(rows)
        repeats = drafter.sizes.num_attention_heads // made["cross"][0].shape[1]
        query, keys, values = (
            part.unflatten(2, (blocks, steps))
            for part in attention.project(inputs.flatten(1, 2), rotary, "q", "k", "v")
        )
        keys, values = (
            torch.cat([old[:, :, None].expand(-1, -1, blocks, -1, -1), new], 3).repeat_interleave(repeats, 1)
            for old, new in zip(made["cross"], (keys, values), strict=True)
        )
        scores = (query @ keys.transpose(-1, -2) / size**0.5).masked_fill(~mask[:, None], float("-inf"))
        read = (scores.softmax(-1) @ values).permute(0, 2, 3, 1, 4).flatten(3)
        rows = layer.finish(rows, attention.o_proj(read))
    return rows


@pytest.mark.parametrize("variant", ["kv_2", "none_1"])
def test_kv_trained_in_causal_blocks_is_kv_trained_by_ttt_on_all_anchors(variant, monkeypatch):
    """Same outputs, loss, and gradient of every parameter, draft-side keys and values among them."""
    drafter, features = examples.drafter(variant), examples.features(documents=(0, 1, 4))
    anchors = find_anchors(features.answer_mask, 5)

    def loss(**options):
        drafter.zero_grad()
        result = ttt_loss(drafter, features, ttt_steps=5, **options).loss
        result.backward()
        return result.item(), {name: p.grad.clone() for name, p in drafter.named_parameters()}

    by_steps = loss(anchor_fraction=1.0)
    sampled = loss(anchor_fraction=0.2, generator=torch.Generator().manual_seed(0))
    with monkeypatch.context() as patched:
        blocks = lambda *given, **_: (
            (k, anchors, rows) for k, rows in enumerate(causal_blocks(drafter, features, anchors, 5).unbind(2))
        )
        patched.setattr(ttt, "draft_steps", blocks)
        in_blocks = loss()
    assert in_blocks[0] == pytest.approx(by_steps[0], rel=1e-6)
    for name, gradient in by_steps[1].items():
        assert (in_blocks[1][name] - gradient).abs().max() < 1e-4 * gradient.abs().max(), name
    assert sampled[0] != pytest.approx(by_steps[0], rel=1e-6)  # few anchors are another estimate


# Metrics, checkpoints, training


@pytest.mark.parametrize(("shift", "right"), [(0, True), (1, False)])
def test_a_perfect_block_drafter_scores_exactly_one(monkeypatch, shift, right):
    """Its mask slots put out the very state that the target predicts with; one place later would be taken for perfect by a judge that is off by one."""
    source = examples.live_of(*(examples.document("0" * 5 + "1" * length, seed=3) for length in range(1, 12)))
    drafter = build_drafter(DrafterConfig("block"), examples.target(), source.spec, torch.arange(512))

    def oracle(drafter, features, anchors, draft_length):
        states = source.batch(features.documents.tolist()).final_hidden / drafter.norm.weight
        places = anchors[:, None] + 1 + shift + torch.arange(draft_length)[:, None]
        places = places.clamp(max=states.shape[1] - 1)
        return states[torch.arange(len(states))[:, None, None], places]

    monkeypatch.setattr(ttt, "draft_blocks", oracle)
    counted = [metrics.count_document(*document) for document in match_documents(source, drafter, 7)]
    found = metrics.metrics_of(sum(counts for counts, _ in counted), sum(runs for _, runs in counted))
    if right:
        assert (found["step_acceptance"] == 1).all() and (found["chain_acceptance"] == 1).all()
        assert found["retention"] == 1 and found["measured_mat"] == found["expected_mat"] == 8
    else:
        assert found["step_acceptance"].max() < 0.5


@pytest.mark.parametrize("variant", EVERY)
def test_batch_size_and_padding_change_nothing_and_a_saved_drafter_is_the_same(variant, tmp_path):
    drafter, source, steps = block_drafter(variant), examples.live(), steps_of(block_drafter(variant))
    alone = match_documents(source, drafter, steps, batch_documents=1)
    checkpoints.save_drafter(drafter, tmp_path)
    again = checkpoints.load_drafter(tmp_path, examples.target())
    for found in (match_documents(source, drafter, steps, batch_documents=3), match_documents(source, again, steps)):
        for one, other in zip(found, alone, strict=True):
            assert np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])
    assert [len(match) for match, _ in alone] == [8, 11, 1, 0, 13]


def test_fewer_draft_steps_are_the_first_ones_of_the_same_block():
    drafter, features = block_drafter("block_kv_2"), examples.features()
    whole = predict(drafter, features, find_anchors(features.answer_mask, 7), 7)
    assert torch.equal(predict(drafter, features, find_anchors(features.answer_mask, 3), 3), whole[..., :3])
    with pytest.raises(StudyError, match="a block of 8 slots drafts 7 tokens, not 8; ask for 7 or fewer"):
        predict(drafter, features, find_anchors(features.answer_mask, 8), 8)


@pytest.mark.parametrize("variant", EVERY)
def test_only_the_state_that_is_named_is_read(variant):
    drafter, features = block_drafter(variant), examples.features()
    context = drafter.config.block_context
    assert drafter.reads == ("hidden_states",) * (context != "kv") + ("keys", "values") * (context != "hidden")
    unread = {name: None for name in (*STATE, "final_hidden", "target_argmax") if name not in drafter.reads}
    anchors = find_anchors(features.answer_mask, steps_of(drafter))
    drafts = predict(drafter, features, anchors, steps_of(drafter))
    assert torch.equal(predict(drafter, replace(features, **unread), anchors, steps_of(drafter)), drafts)


def test_weights_are_a_function_of_the_seed_and_the_mask_is_learned():
    make = lambda seed: build_drafter(
        BLOCKS["block_both_2"], examples.target(), examples.live().spec, DRAFT_IDS, seed=seed
    )
    torch.manual_seed(1)
    first = make(3).state_dict()
    torch.manual_seed(2)
    second, other = make(3).state_dict(), make(4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["mask_embedding"], other["mask_embedding"])
    drafter = make(3)
    ttt_loss(drafter, examples.features(), ttt_steps=4).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in drafter.parameters())


def test_a_kv_drafter_can_be_taken_over(tmp_path):
    folder = tmp_path / "runs/kv_2/seed0"
    checkpoints.save_drafter(examples.drafter("kv_2"), folder)
    assert checkpoints.warm_start(block_drafter("block_kv_2"), folder) == ["mask_embedding"]


SHORT = TrainConfig(
    epochs=3, batch_documents=2, ttt_steps=4, anchor_fraction=0.5, validate_every=4, checkpoint_every_s=1e9, learning_rate=3e-3
)  # fmt: skip


def trained(folder, config=SHORT, dtype=torch.float32):
    drafter, source = block_drafter("block_both_2"), examples.live()
    history = train(drafter, source, source, config, folder, dtype=dtype)
    return {n: t.clone() for n, t in drafter.state_dict().items()}, history.drop(columns="seconds")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_killed_block_wise_training_resumes_to_the_same_bits(tmp_path, monkeypatch, dtype):
    weights, history = trained(tmp_path / "whole", dtype=dtype)
    with monkeypatch.context() as patched:
        die_before_step(patched, 5)
        with pytest.raises(Killed):
            trained(tmp_path / "killed", replace(SHORT, checkpoint_every_s=0.0), dtype)
    again, same_history = trained(tmp_path / "killed", dtype=dtype)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert same_history.equals(history) and set(history["draft_step"]) == {0, 1, 2, 3}


@pytest.mark.slow
def test_a_block_drafter_learns_two_documents_by_heart(tmp_path):
    target = examples.target()
    live = LiveFeatures(target, load_corpus("tiny", "train").documents[:2], examples.live().spec)
    source = ResidentFeatures(live, "cpu")  # the target's forward once, not at each of 200 steps
    config = DrafterConfig("block", 2, block_context="both", block_size=3)
    drafter = build_drafter(config, target, source.spec, torch.arange(512))
    plan = TrainConfig(epochs=200, batch_documents=2, learning_rate=1e-2, clip_norm=5.0, ttt_steps=2, anchor_fraction=1.0, validate_every=0)  # fmt: skip
    train(drafter, source, source, plan, tmp_path)
    counts = sum(metrics.count_document(*document)[0] for document in match_documents(source, drafter, 2))
    assert (counts[:, 1] / counts[:, 0] > 0.95).all(), counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "block_size=1 must be 2 or more"),
        ({"block_context": "kv_cache"}, "block_context='kv_cache' must be one of 'kv', 'hidden', 'both'"),
        (
            {"feedback": "post_norm"},
            "feedback='post_norm' means nothing to a block drafter; it takes num_layers, block_",
        ),
        ({"kv_control": "zero"}, "kv_control='zero' means nothing to a block drafter"),
        ({"hidden_norm": True}, "hidden_norm=True means nothing without hidden states"),
        (
            {"block_context": "hidden", "kv_layers": 4},
            "kv_layers=4 means nothing to a block drafter over EAGLE's layers",
        ),
        ({"block_context": "hidden", "kv_fusion": "mlp"}, "block_context='hidden' contradicts kv_fusion='mlp'"),
        ({"paradigm": "kv", "block_size": 16}, "block_size=16 means nothing to a kv drafter"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(StudyError, match=message):
        DrafterConfig(**{"paradigm": "block", **options})


def test_a_block_is_trained_whole(tmp_path):
    source = examples.live()
    with pytest.raises(StudyError, match="ttt_steps=7 contradicts block_size=5: .* set ttt_steps=4"):
        train(block_drafter("block_both_2"), source, source, replace(SHORT, ttt_steps=7), tmp_path)
    assert training_loss(block_drafter("block_both_2"), examples.features(), SHORT, 0, torch.Generator()).loss > 0

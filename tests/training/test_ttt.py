"""The parallel draft steps against a naive drafter, and every way for the future to leak in."""

from dataclasses import replace

import examples
import pytest
import sequential
import torch
from examples import DRAFT_IDS, STEPS, VARIANTS, logits_by_pair

from kvshot_lib.decoding.decode import decode
from kvshot_lib.drafters.attention import rotated
from kvshot_lib.drafters.context import drafter_spec
from kvshot_lib.drafters.drafter import DrafterConfig, build_drafter
from kvshot_lib.errors import StudyError
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.target.capture import capture
from kvshot_lib.training.anchors import Anchors, find_anchors
from kvshot_lib.training.judging import predict
from kvshot_lib.training.ttt import draft_steps

EVERY = list(VARIANTS)

BLIND = ("none_1", "none_2", "kv_1_zero")  # these see no target state at all

TARGETS = ["tiny-llama", "tiny-qwen3"]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("variant", EVERY)
def test_parallel_forward_equals_the_sequential_drafter(variant, name):
    drafter, features = examples.drafter(variant, name), examples.features(name)
    with torch.no_grad():
        parallel = logits_by_pair(drafter, features)
        pairs = sequential.scored_pairs(features.answer_mask, STEPS)
        assert sorted(parallel) == pairs and len(pairs) > 100
        assert {step for *_, step in pairs} == set(range(STEPS))
        chains = {}
        for document, anchor, step in pairs:
            if (document, anchor) not in chains:
                chains[document, anchor] = sequential.draft(drafter, features, document, anchor, STEPS)
            naive = chains[document, anchor][step]
            assert (parallel[document, anchor, step] - naive).abs().max() < 1e-5 * max(1, naive.abs().max())


def heads_example():
    """Two reused layers as 4 KV heads for 4 query heads, and their features."""
    target = examples.target()
    live = LiveFeatures(target, examples.DOCUMENTS, feature_spec(target, 2))
    config = DrafterConfig("kv", 2, kv_layers=2, kv_fusion="heads")
    return examples.roughened(build_drafter(config, target, live.spec, DRAFT_IDS, seed=1)), live.batch((0, 2))


def test_stacked_heads_equal_the_sequential_drafter():
    drafter, features = heads_example()
    with torch.no_grad():
        for (document, anchor, step), logits in logits_by_pair(drafter, features).items():
            naive = sequential.draft(drafter, features, document, anchor, STEPS)[step] if step == 3 else logits
            assert (logits - naive).abs().max() < 1e-5 * max(1, naive.abs().max())


@torch.no_grad()
def test_without_target_state_every_draft_step_is_the_same_language_model():
    """What it predicts at (t, k) is what it predicts at (t + k, 0): it reads x_0 … x_{t+1+k} alone."""
    logits = logits_by_pair(examples.drafter("none_1"), examples.features())
    later = [
        (document, anchor, step) for document, anchor, step in logits if step and (document, anchor + step, 0) in logits
    ]
    assert len(later) > 50
    for document, anchor, step in later:
        assert torch.allclose(logits[document, anchor, step], logits[document, anchor + step, 0], atol=1e-4)


# Leaks: what q_{t,k} may and may not depend on

STATE = ("hidden_states", "keys", "values")


def logits_with(drafter, features, anchors):
    """[B, M, K, V_draft], from the code that trains; a chosen set of anchors, every step."""
    with torch.no_grad():
        steps = draft_steps(drafter, features, anchors, STEPS)
        return torch.stack([drafter.norm(output) @ drafter.head.T for _, _, output in steps], 2)


def sequential_logits(drafter, features, anchors):
    """The same from the naive drafter: [B, M, K, V_draft]."""
    with torch.no_grad():
        return torch.stack(
            [
                torch.stack([torch.stack(sequential.draft(drafter, features, d, int(t), STEPS)) for t in row])
                for d, row in enumerate(anchors.index)
            ]
        )


def one_anchor(features, anchor):
    """Anchor t of every document; all steps."""
    index = torch.full((len(features.tokens), 1), anchor)
    return Anchors(index, torch.ones(*index.shape, STEPS, dtype=torch.bool), torch.ones(index.shape))


def changed(features, *, state=slice(0, 0), tokens_from=99, documents=slice(None), value=None):
    """Other target state (or ``value``) at the places ``state``, other tokens at i ≥ tokens_from, in some documents."""
    generator, new = torch.Generator().manual_seed(0), {"tokens": features.tokens.clone()}
    for name in STATE:
        new[name] = getattr(features, name).clone()
        noise = torch.randn(new[name][documents, state].shape, generator=generator)
        new[name][documents, state] += 3 * noise if value is None else value
    new["tokens"][documents, tokens_from:] = (features.tokens[documents, tokens_from:] + 101) % 512
    return replace(features, **new)


@pytest.mark.parametrize("path", [logits_with, sequential_logits])
@pytest.mark.parametrize("variant", EVERY)
def test_nothing_but_the_visible_reaches_a_draft(variant, path):
    """q_{t,k} at t = 5, to the last bit, and whether each change that may be seen is seen."""
    drafter, features, anchor = examples.drafter(variant), examples.features(documents=(0, 1), length=16), 5
    anchors = one_anchor(features, anchor)
    before = path(drafter, features, anchors)
    assert before.shape[:3] == (2, 1, STEPS)

    future = path(drafter, changed(features, state=slice(anchor + 1, None)), anchors)
    assert torch.equal(future, before), "target state at s > t is seen"
    last = anchor - 2 if variant == "kv_2_lagged" else anchor  # of the target state that it may see
    unseen = path(drafter, changed(features, state=slice(last + 1, anchor + 1)), anchors)
    assert torch.equal(unseen, before), "target state that is too new is seen"
    first = last - 3 if variant == "kv_2_windowed" else 0
    older = path(drafter, changed(features, state=slice(0, first)), anchors)
    assert torch.equal(older, before), "target state before the window is seen"
    for s in (last, first):
        allowed = path(drafter, changed(features, state=slice(s, s + 1)), anchors)
        seen = (allowed != before).any(-1)
        assert not seen.any() if variant in BLIND else seen.all(), f"target state at s = {s}"

    other = path(drafter, changed(features, state=slice(None), tokens_from=0, documents=[1]), anchors)
    assert torch.equal(other[0], before[0]), "another document of the batch is seen"
    assert (other[1] != before[1]).any(-1).all()

    for k in range(STEPS):  # the tokens from x_{t+1+k} on change: steps before k stay, step k and later ones don't
        later = path(drafter, changed(features, tokens_from=anchor + 1 + k), anchors)
        assert torch.equal(later[:, :, :k], before[:, :, :k]), f"step {k - 1} sees x_(t+{k + 1})"
        assert (later[:, :, k:] != before[:, :, k:]).any(-1).all(), f"a step from {k} on does not see x_(t+{k + 1})"


@pytest.mark.parametrize("variant", EVERY)
def test_a_drafter_needs_only_the_state_that_it_names(variant):
    drafter, features = examples.drafter(variant), examples.features()
    unread = {name: None for name in (*STATE, "final_hidden", "target_argmax") if name not in drafter.reads}
    anchors = find_anchors(features.answer_mask, STEPS)
    with_all = predict(drafter, features, anchors, STEPS)
    assert torch.equal(predict(drafter, replace(features, **unread), anchors, STEPS), with_all)


@pytest.mark.parametrize("variant", EVERY)
def test_broken_state_stays_in_its_document(variant):
    """NaN in one document's state reaches no other document."""
    drafter, features = examples.drafter(variant), examples.features(documents=(0, 1), length=16)
    anchors = one_anchor(features, 5)
    before = logits_with(drafter, features, anchors)
    broken = logits_with(drafter, changed(features, state=slice(None), documents=[1], value=float("nan")), anchors)
    assert torch.equal(broken[0], before[0])
    assert torch.equal(broken, before) if variant in BLIND else broken[1].isnan().all()


@pytest.mark.parametrize("variant", EVERY)
def test_huge_state_in_the_future_changes_nothing(variant):
    """A masked entry has weight 0, not a small one: 1e30 times nothing is nothing."""
    drafter, features = examples.drafter(variant), examples.features(documents=(0, 1), length=16)
    anchors = one_anchor(features, 5)
    huge = logits_with(drafter, changed(features, state=slice(6, None), value=1e30), anchors)
    assert torch.equal(huge, logits_with(drafter, features, anchors))


# A hybrid's branch alone, and lagged KV


def build(**options):
    config = DrafterConfig(**{"paradigm": "hybrid", **options})
    return examples.roughened(build_drafter(config, examples.target(), examples.live().spec, DRAFT_IDS, seed=1))


def logits_of(drafter, features, **options):
    with torch.no_grad():
        steps = draft_steps(drafter, features, find_anchors(features.answer_mask, STEPS), STEPS, **options)
        return torch.stack([drafter.norm(output) @ drafter.head.T for *_, output in steps], 2)


def test_a_lag_of_two_is_what_the_lagged_control_sees():
    features = examples.features()
    config = DrafterConfig("kv", 2, kv_control="lagged", kv_lag_tokens=2)
    lagged = examples.roughened(build_drafter(config, examples.target(), examples.live().spec, DRAFT_IDS, seed=1))
    lag = torch.full((len(features.tokens),), 2)
    assert torch.equal(logits_of(examples.drafter("kv_2"), features, kv_lag=lag), logits_of(lagged, features))


@pytest.mark.parametrize("name", ["keys", "hidden_states"])
def test_a_lag_hides_new_kv_from_a_hybrid_and_no_hidden_state(name):
    drafter, features, lag = build(), examples.features(documents=(0, 1), length=12), torch.tensor([0, 3])
    anchors = find_anchors(features.answer_mask, 1)
    last = int(anchors.index[1][anchors.valid[1, :, 0]].max())
    state = getattr(features, name).clone()
    state[:, last - 2 : last + 1] += 1
    before, after = (logits_of(drafter, part, kv_lag=lag) for part in (features, replace(features, **{name: state})))
    row = int((anchors.index[1] == last).nonzero()[-1])
    assert torch.equal(before[1, row], after[1, row]) == (name == "keys")
    assert not torch.equal(before[0], after[0])


# A window on the prefix


@torch.no_grad()
@pytest.mark.parametrize("config", [{"paradigm": "hidden"}, {"paradigm": "kv", "kv_control": "none"}])
def test_a_window_moves_with_the_columns_of_every_layer(config):
    config = DrafterConfig(num_layers=3, window_tokens=3, **config)
    drafter = examples.roughened(build_drafter(config, examples.target(), examples.live().spec, DRAFT_IDS, seed=1))
    features = examples.features()
    for (document, anchor, step), logits in logits_by_pair(drafter, features).items():
        if step in (0, 3):
            naive = sequential.draft(drafter, features, document, anchor, STEPS)[step]
            assert (logits - naive).abs().max() < 1e-5 * max(1, naive.abs().max())


def test_a_window_as_long_as_the_text_changes_nothing():
    drafter, features = examples.drafter("kv_2"), examples.features()
    whole = logits_of(drafter, features)
    drafter.config = replace(drafter.config, window_tokens=features.tokens.shape[1])
    assert torch.equal(logits_of(drafter, features), whole)


# Queries that are made from something else than the drafter's own input

WAYS = ("target", "anchor", "constant")


def asking(query_from: str, depth: int = 2, documents=(0, 1, 2), length: int = 99):
    """A drafter whose queries are made so, and features of the layers that it reads."""
    read = {} if query_from == "constant" else {"state_layers": "kv"}
    config = DrafterConfig("kv", depth, kv_rope="unrotate", kv_norm=True, query_from=query_from, **read)
    target = examples.target()
    spec = drafter_spec(config, target)
    drafter = build_drafter(config, target, spec, DRAFT_IDS, seed=1)
    batch = LiveFeatures(target, examples.DOCUMENTS, spec).batch(documents)
    cut = {name: tensor[:, :length] for name, tensor in vars(batch).items() if name != "documents"}
    return examples.roughened(drafter), replace(batch, **cut)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_replaced_queries_equal_the_sequential_drafter(way):
    drafter, features = asking(way)
    for (document, anchor, step), logits in logits_by_pair(drafter, features).items():
        if step in (0, 3):
            naive = sequential.draft(drafter, features, document, anchor, STEPS)[step]
            assert (logits - naive).abs().max() < 1e-5 * max(1, naive.abs().max())


@pytest.mark.parametrize(
    "way, depth, first, later",
    [("target", 1, True, False), ("target", 2, True, True), ("constant", 2, False, False), ("anchor", 2, False, False)],
)
def test_an_oracle_sees_the_target_up_to_the_place_that_it_asks_for(way, depth, first, later):
    """State at t+1+k is seen by step k; by later steps through entries that a second layer makes of the first's output."""
    drafter, features = asking(way, depth, documents=(0, 1), length=16)
    anchors = one_anchor(features, 5)
    before = logits_with(drafter, features, anchors)
    for k in range(STEPS):
        after = logits_with(drafter, changed(features, state=slice(6 + k, 7 + k)), anchors)
        seen = (after != before).any(-1)[0, 0].tolist()
        assert seen == [(step == k and first) or (step > k and later) for step in range(STEPS)]


@torch.no_grad()
def test_every_true_query_is_among_those_that_an_oracle_can_make():
    """With the target's own projection (its input norm's gains folded in) as its map it asks what the target asks."""
    drafter, features = asking("target", 1)
    target, layers, attention = examples.target(), drafter.spec.kv_layers, drafter.layers[0].attention
    places = torch.arange(8)[None]
    asked = drafter.asked(features, places, places)
    rotary = drafter.rotary(asked, places)
    with capture(target.model, kv=layers, queries=True) as taken:
        target.model.get_decoder()(input_ids=features.tokens[:1, :8], use_cache=False)
    width = drafter.spec.hidden_size
    for place, layer in enumerate(layers):
        source = target.model.get_decoder().layers[layer]
        attention.q_proj.weight.zero_()
        attention.q_proj.weight[:, place * width : (place + 1) * width] = (
            source.self_attn.q_proj.weight * source.input_layernorm.weight
        )
        heads = attention.q_proj(asked[:1]).unflatten(-1, (-1, drafter.spec.head_dim)).transpose(1, 2)
        assert torch.allclose(rotated(heads, rotary), taken.queries[layer], atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_it_can_be_judged_but_not_decoded(way):
    drafter, _ = asking(way)
    with pytest.raises(StudyError, match=f"^query_from='{way}' is for judging along a known text"):
        decode(examples.target(), drafter, [1, 2, 3])


def test_an_oracle_reads_the_inputs_of_the_layers_whose_cache_it_reads():
    with pytest.raises(StudyError, match="query_from='target' contradicts state_layers='eagle'"):
        DrafterConfig("kv", query_from="target")

"""The oracle: exact where the projection picks the true keys out, perfect re-attention by hand, who is trained, and nothing else changes."""

import pytest
import torch
from examples import STEPS, drafter, live, target, target_layer_as_drafter

from kvshot_lib.drafters.variants import QUERY_ARMS
from kvshot_lib.probes import oracle as query_oracle
from kvshot_lib.probes.attention import watch
from kvshot_lib.probes.oracle import (
    Retraining,
    all_query_maps,
    apply_rows,
    evaluate,
    head_layers,
    key_moments,
    oracle_query,
    output_side,
    perfect_rows,
    query_maps,
    random_query,
    run_arm,
    working_copy,
)
from kvshot_lib.probes.target_rows import compute_state
from kvshot_lib.training.anchors import find_anchors

LAYERS = live().spec.kv_layers


def states(document):
    return compute_state(target(), live().batch([document]).tokens[0, : live().lengths[document]], LAYERS)


def retraining(documents):
    both = ("train", "evaluation")
    return Retraining(dict.fromkeys(both, live()), dict.fromkeys(both, states), documents, STEPS)


def calls_of(built, document=1):
    features = live().batch([document])
    return watch(built, features, find_anchors(features.answer_mask, STEPS), range(STEPS))


def test_each_head_has_one_true_head():
    assert head_layers(0, 4, 3).tolist() == [0, 1, 2, 0] and head_layers(2, 4, 3).tolist() == [2, 0, 1, 2]
    assert head_layers(1, 3, 1).tolist() == [0, 0, 0]


def test_query_map_is_the_identity_where_the_projection_picks_the_true_keys_out():
    """One reused layer, two key heads of two channels: the first drafter group reads the first head as it is, the second twice the second."""
    weight = torch.diag(torch.tensor([1.0, 1, 2, 2]))
    moments = torch.tensor([[2.0, 1, 0.5, 0], [1, 3, 0, 0], [0.5, 0, 1, 0], [0, 0, 0, 4]])
    maps = query_maps(weight, moments, 0, heads=4, groups=2, size=2)
    assert torch.allclose(maps[:2], torch.eye(2).expand(2, 2, 2), atol=1e-6)
    assert torch.allclose(maps[2:], torch.eye(2).expand(2, 2, 2) / 2, atol=1e-6)  # keys twice as long, queries half


def test_query_map_gives_the_nearest_scores():
    """Any other query's scores are further, in mean square over keys with these moments, from the true ones."""
    generator = torch.Generator().manual_seed(0)
    weight, mix = (torch.randn(*shape, generator=generator) for shape in ((4, 12), (12, 12)))
    keys = torch.randn(4000, 12, generator=generator) @ mix
    moments, true = keys.T @ keys / len(keys), torch.randn(2, generator=generator)
    maps = query_maps(weight, moments, 0, heads=2, groups=2, size=2)  # S = 3: head 1 gets reused layer 1, group 1
    query = maps[1] @ true

    def error(q):
        return ((keys[:, 6:8] @ true - keys @ weight[2:4].T @ q) ** 2).mean()

    assert all(error(query) < error(query + 0.1 * torch.randn(2, generator=generator)) for _ in range(20))


def queries_of(monkeypatch, built, make):
    """Every call of a drafter on document 1, and the query that ``make``'s attention asks in it."""
    asked, original, calls = [], query_oracle.chain_attention, calls_of(built)
    monkeypatch.setattr(query_oracle, "chain_attention", lambda q, *given: asked.append(q) or original(q, *given))
    for call in calls:
        make(call)
    return list(zip(calls, asked, strict=True))


def test_oracle_row_is_the_targets_where_nothing_is_lost_in_the_projection(monkeypatch):
    """`target_layer_as_drafter` reads the last reused layer's keys as they are; its head 2 (layer j = 0) is given that layer's query."""
    built, state, head = target_layer_as_drafter(), states(1), 2
    assert head_layers(0, 4, 3)[head] == 2
    maps = all_query_maps(built, key_moments(states, [0, 1, 4]))
    for call, query in queries_of(monkeypatch, built, oracle_query(maps, state)):
        found = (query[0, head] @ call.prefix[0][0, 1].T * 16**-0.5 + call.mask[0, 0]).softmax(-1)
        true = state.rows(2, call.places(19))[head][:, : found.shape[1]] * (call.mask[0, 0] == 0)
        assert torch.allclose(found, true / true.sum(-1, keepdim=True), atol=2e-3)


def test_oracle_asks_the_mapped_query_of_its_own_true_head(monkeypatch):
    built, state = drafter("kv_2"), states(1)
    maps = all_query_maps(built, key_moments(states, [0, 1, 4]))
    for call, query in queries_of(monkeypatch, built, oracle_query(maps, state)):
        for head, place in enumerate([[0, 1, 2, 0], [1, 2, 0, 1]][call.key]):
            for m, position in enumerate(call.places(19).tolist()):
                wanted = maps[call.key][head] @ state.queries[place, head, position]
                assert torch.allclose(query[0, head, m], wanted, atol=1e-5)


def test_perfect_rows_equal_a_naive_sum():
    built, state = drafter("kv_2"), states(1)
    attend = perfect_rows(2, state)
    for call in calls_of(built):
        found, length = attend(call)[0], 19
        for head in range(4):
            rows = state.rows(head_layers(call.key, 4, 3)[head], torch.arange(length))[head]
            for m, t in enumerate(call.anchors.tolist()):
                place = t + 1 + call.draft_step
                if place >= length:
                    continue
                values = torch.cat([call.prefix[1][0, head // 2, : t + 1], call.chain[1][0, head // 2, m]])
                assert torch.allclose(found[head, m], rows[place, : place + 1] @ values, atol=1e-5)


def test_rows_on_one_entry_pick_its_value():
    call = calls_of(drafter("kv_1"))[2]  # draft step 2
    rows = torch.zeros(4, 19, 19)
    rows[:, :, 1] = 1.0
    assert torch.allclose(apply_rows(rows, call)[0, 3], call.prefix[1][0, 1, 1].expand(len(call.anchors), -1))


def test_random_queries_have_the_own_length_and_the_same_direction_at_the_same_position(monkeypatch):
    built = drafter("kv_1")
    directions = {}
    for call, query in queries_of(monkeypatch, built, random_query(built, states(1), 3)):
        assert torch.allclose(query.norm(dim=-1), call.query.norm(dim=-1), atol=1e-5)
        unit = torch.nn.functional.normalize(query, dim=-1)[0, 0]
        for place, direction in zip((call.anchors + 1 + call.draft_step).tolist(), unit):
            if place < 19:
                assert torch.allclose(directions.setdefault(place, direction), direction, atol=1e-5)
    assert len(directions) > 8 and abs(directions[5] @ directions[9]) < 0.99


@pytest.mark.parametrize("variant", ["kv_2", "hybrid"])
@pytest.mark.parametrize("arm", ["own", "oracle", "perfect", "random"])
def test_an_arm_trains_the_output_side_of_a_copy_and_nothing_else(variant, arm):
    built = drafter(variant)
    before = {name: t.clone() for name, t in built.state_dict().items()}
    maps = all_query_maps(built, key_moments(states, [0, 1]))
    copied = working_copy(built)
    assert copied.embedding.data_ptr() == built.embedding.data_ptr()
    tokens = query_oracle.retrain(copied, arm, maps, retraining([0, 1, 4]))
    assert tokens == sum(live().lengths[d] for d in (0, 1, 4))
    trained = {id(parameter) for parameter in output_side(copied)}
    for name, parameter in copied.named_parameters():
        assert (id(parameter) in trained) == (not torch.equal(parameter, before[name])), name
    kinds = {name.split(".", 2)[-1].split(".")[0] for name, p in copied.named_parameters() if id(p) in trained}
    assert kinds == {"attention" if variant == "kv_2" else "cross", "mlp", "mlp_norm", "weight"}
    assert all(torch.equal(before[name], t) for name, t in built.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in built.parameters())


def test_arms_are_judged_on_the_same_anchors_and_own_queries_change_nothing():
    built, how = drafter("kv_1"), retraining([0, 1])
    made = {arm: run_arm(built, arm, how) for arm in QUERY_ARMS}
    plain = evaluate(built, "own", [], how)
    for arm, rows in made.items():
        assert rows["anchors"].equals(plain["anchors"]) and len(rows) == len(live()) * STEPS
        assert set(rows["trained_tokens"]) == {0 if arm == "as_trained" else sum(live().lengths[:2])}
    assert made["as_trained"]["matches"].equals(plain["matches"])

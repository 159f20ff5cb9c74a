"""Standing in a drafter's attention: the same numbers when nothing is replaced, all put back, the target's rows and refusals by name."""

import pytest
import torch
from examples import DOCUMENTS, STEPS, VARIANTS, drafter, live, target

from kvshot_lib.drafters.drafter import DrafterConfig
from kvshot_lib.errors import StudyError
from kvshot_lib.probes.kv_attention import (
    TargetState,
    attending,
    check_drafter,
    compute_state,
    kv_attentions,
    own_query,
    read_state,
    reuses_kv,
)
from kvshot_lib.target.load import load_target
from kvshot_lib.training.ttt import draft_steps, find_anchors

REUSING = ["kv_1", "kv_2", "hybrid"]


def outputs(built, document=0):
    features = live().batch([document])
    anchors = find_anchors(features.answer_mask, STEPS)
    with torch.no_grad():
        return [output for _, _, output in draft_steps(built, features, anchors, STEPS)]


@pytest.mark.parametrize("variant", REUSING)
def test_watching_changes_nothing_and_sees_every_step_and_place(variant):
    built, seen = drafter(variant), []
    before, weights = outputs(built), {name: t.clone() for name, t in built.state_dict().items()}

    def see(call):
        places = call.places(len(DOCUMENTS[0].tokens))
        seen.append((call.layer, call.draft_step, call.anchors.tolist(), places.tolist()))
        return own_query(call)

    with attending(built, see):
        watched = outputs(built)
    assert all(torch.equal(a, b) for a, b in zip(before, watched, strict=True))
    assert [key[:2] for key in seen] == [(layer, k) for k in range(STEPS) for layer in range(len(built.layers))]
    for _, k, anchors, places in seen:
        assert anchors == list(range(2, 10))  # answer x3 … x11: the first anchor is the last prompt token
        assert places == [min(t + 1 + k, 11) for t in anchors]
    assert all(torch.equal(weights[name], t) for name, t in built.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(built), strict=True))


def test_drafter_is_as_it_was_after_an_error():
    built = drafter("hybrid")
    before = outputs(built)
    with pytest.raises(RuntimeError, match="out of memory"), attending(built, lambda call: _fail()):
        outputs(built)
    assert all("forward" not in vars(module) for module in kv_attentions(built))
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(built), strict=True))


def _fail():
    raise RuntimeError("out of memory")


def test_what_is_replaced_matters():
    built = drafter("kv_2")
    with attending(built, lambda call: 0 * own_query(call)):
        changed = outputs(built)
    assert not torch.allclose(changed[0], outputs(built)[0])


def test_rows_are_the_targets_own_attention():
    """Rows of the kept state, on the target's values, give what enters its output projection."""
    tokens, layers = torch.from_numpy(DOCUMENTS[1].tokens).long(), (1, 3)
    state = compute_state(target(), tokens, layers)
    assert state.queries.shape == (2, 4, len(tokens), 16) and state.keys.shape == (2, 2, len(tokens), 16)
    decoder, entering = target().model.get_decoder(), {}
    for layer in layers:
        module = decoder.layers[layer].self_attn.o_proj
        handle = module.register_forward_pre_hook(lambda _m, given, layer=layer: entering.update({layer: given[0]}))
        cache = target().model(tokens[None], use_cache=True).past_key_values
        handle.remove()
        rows = state.rows(layers.index(layer), torch.arange(len(tokens)))
        values = cache.layers[layer].values[0].repeat_interleave(2, 0)
        assert torch.allclose((rows @ values).transpose(0, 1).flatten(1), entering[layer][0], atol=1e-4)


def test_state_is_kept_and_read_back_and_the_target_stays_as_it_was(tmp_path):
    loaded = load_target("tiny-llama", device="cpu", dtype="float32")
    first = read_state(tmp_path, loaded, live(), 1)
    assert loaded.model.config._attn_implementation == target().model.config._attn_implementation
    assert loaded.hash == load_target("tiny-llama", device="cpu", dtype="float32").hash
    again = read_state(tmp_path, loaded, live(), 1)
    assert isinstance(again, TargetState) and torch.equal(first.queries, again.queries)
    assert len(list(tmp_path.iterdir())) == 1


def test_drafters_without_comparable_queries_are_refused_by_name():
    assert {name for name, config in VARIANTS.items() if reuses_kv(config)} >= set(REUSING)
    for name in ("hidden", "kv_2_mlp", "kv_1_unrotate", "none_1", "kv_1_zero", "kv_2_lagged", "states_2"):
        with pytest.raises(StudyError, match=f"{name}/seed0: query estimation needs a kv or hybrid drafter"):
            check_drafter(VARIANTS[name], f"{name}/seed0")
    with pytest.raises(StudyError, match="paradigm='block'"):
        check_drafter(DrafterConfig("block"), "block_kv_2/seed0")

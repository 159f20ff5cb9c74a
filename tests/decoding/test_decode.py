from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from examples import DRAFT_IDS, VARIANTS, drafter, live_of, target
from greedy import NEW, alone, prompt, trained
from hypothesis import given
from hypothesis import strategies as st

from kvshot_lib.decoding.decode import Drafting, NoDrafting, decode, speculate
from kvshot_lib.decoding.propose import Chain, Tree
from kvshot_lib.decoding.sampling import GREEDY, Chooser, Sampling
from kvshot_lib.decoding.verify import TargetRun
from kvshot_lib.drafters.drafter import DrafterConfig, build_drafter
from kvshot_lib.errors import StudyError
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.target.capture import capture
from kvshot_lib.target.load import Target, load_target
from kvshot_lib.text.corpus import Document
from kvshot_lib.training.anchors import find_anchors
from kvshot_lib.training.judging import match_documents

NAMES = ("tiny-llama", "tiny-qwen2", "tiny-qwen3")
ANYTHING = st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=2), st.none(), st.lists(st.integers()))
PLANS = (Chain(5), Tree(3, 4, 14))
CASES = [(variant, "tiny-llama") for variant in VARIANTS]
LARGEST = [
    ("hidden", NAMES[0]),
    ("kv_2", NAMES[1]),
    ("hybrid", NAMES[2]),
]  # EAGLE's whole tree: each paradigm, each target
CASES += [(variant, name) for name in NAMES[1:] for variant in ("hidden", "kv_2", "hybrid", "kv_1_unrotate")]


class Scripted:
    """Acts like a drafter, reads no target state, and proposes by ``rule``: positions [M] -> scores over ``draft_ids`` [M, V']."""

    config, reads = SimpleNamespace(kv_control="", paradigm="", query_from="own"), ()

    def __init__(self, rule, draft_ids=None, name="tiny-llama"):
        self.rule, self.draft_ids = rule, torch.arange(512) if draft_ids is None else draft_ids
        self.head = torch.eye(len(self.draft_ids))
        self.norm, self.spec = torch.nn.Identity(), feature_spec(target(name))
        self.norm.weight = torch.zeros(1)

    def prefix(self, features, first=0, past=()):
        return [], None

    def visible(self, anchors):
        return anchors + 1

    def mask(self, anchors, length):
        return torch.zeros(1, 1, 1, length)

    def step(self, tokens, positions, state, views):
        return self.rule(positions[0])[None]

    def feedback(self, output):
        return output

    def logits(self, hidden):
        return hidden @ self.head.T


def adversary(kind: str, name: str, seed: int) -> Scripted:
    told = prompt(seed) + alone(name, seed)
    told = torch.tensor([*told, *[0] * 20])
    generator = torch.Generator().manual_seed(seed)
    noise = lambda positions, size=512: torch.rand(len(positions), size, generator=generator)
    right = lambda positions: 9 * torch.nn.functional.one_hot(told[positions + 1], 512).float()
    if kind == "outside":  # whatever the target answers can't be drafted
        ids = torch.tensor(sorted(set(range(512)) - set(told.tolist())))
        return Scripted(lambda positions: noise(positions, len(ids)), ids, name)
    if kind == "one_token":
        return Scripted(lambda positions: torch.zeros(len(positions), 1), told[[-25]], name)
    rules = {
        "random": noise,
        "constant": lambda positions: torch.eye(512)[torch.full_like(positions, 7)],
        "perfect": right,
        "often_right": lambda positions: right(positions) * (positions % 4 > 0)[:, None] + noise(positions),
        "second_best_is_right": lambda positions: (
            right(positions) + 9.1 * torch.eye(512)[(told[positions + 1] + 1) % 512]
        ),
    }
    return Scripted(rules[kind], name=name)


@cache
def decoded(variant: str, name: str, seed: int, plan: Chain | Tree):
    """The greedy answer of a trained drafter and its target."""
    return decode(target(name), trained(variant, name), prompt(seed), plan, max_new_tokens=NEW, eos_token_ids=())


@pytest.mark.parametrize("variant, name", CASES)
def test_greedy_output_is_the_targets_own(variant, name):
    accepted = 0
    whole = [Tree()] if (variant, name) in LARGEST else []
    for seed in (0, 2):  # learned in part, and never seen
        for plan in (*PLANS, *whole) if seed == 0 else PLANS:
            out = decoded(variant, name, seed, plan)
            assert out.tokens == alone(name, seed), (variant, name, plan)
            assert len(out.tokens) == 1 + sum(out.accepted) + out.target_forwards
            assert out.decoded_mat == pytest.approx(1 + np.mean(out.accepted))
            accepted += sum(out.accepted)
    assert accepted > 5


@pytest.mark.parametrize("name", NAMES)
def test_and_what_generate_of_transformers_gives_end_of_text_included(name):
    model, ends = target(name).model, 0
    for seed in range(3):
        answer = alone(name, seed)
        eos = answer[17 + seed]  # call this one end-of-text
        ids = torch.tensor([prompt(seed)])
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        theirs = model.generate(ids, eos_token_id=eos, **given)[0, 9:].tolist()
        assert theirs == answer[: answer.index(eos) + 1]
        for kind in ("perfect", "often_right"):
            for plan in (*PLANS, Chain(30)):
                out = decode(
                    target(name),
                    adversary(kind, name, seed),
                    prompt(seed),
                    plan,
                    max_new_tokens=NEW,
                    eos_token_ids=[eos],
                )
                assert out.tokens == theirs
                ends += len(out.tokens) < 1 + sum(out.accepted) + out.target_forwards
        out = decode(target(name), drafter("hybrid", name), prompt(seed), max_new_tokens=NEW, eos_token_ids=[eos, 600])
        assert out.tokens == theirs
    assert ends  # answers that ended on an accepted draft: no bonus token


@pytest.mark.parametrize("plan", [*PLANS, Chain(1), Tree(0, 1, 2), Tree()], ids=str)
@pytest.mark.parametrize(
    "kind", ["random", "constant", "perfect", "often_right", "second_best_is_right", "outside", "one_token"]
)
def test_no_drafter_changes_the_output(kind, plan):
    for name in NAMES if plan in PLANS else NAMES[:1]:
        for seed in (0, 1) if name == "tiny-llama" and plan in PLANS else (1,):
            out = decode(
                target(name), adversary(kind, name, seed), prompt(seed), plan, max_new_tokens=NEW, eos_token_ids=()
            )
            assert out.tokens == alone(name, seed)
            if kind == "perfect":
                assert out.accepted == out.drafted and len(out.accepted) == -(-(NEW - 1) // (1 + out.drafted[0]))
            if kind == "outside":
                assert not any(out.accepted) and out.decoded_mat == 1


def test_the_second_best_draft_of_a_tree_is_accepted_where_a_chain_fails():
    wrong = adversary("second_best_is_right", "tiny-llama", 0)
    chain, tree = (
        decode(target(), wrong, prompt(0), plan, max_new_tokens=NEW, eos_token_ids=())
        for plan in (Chain(5), Tree(2, 4, 40))
    )
    assert not any(chain.accepted) and tree.accepted == tree.drafted


@pytest.mark.parametrize("new", [1, 2, 3, 7])
def test_exactly_as_many_tokens_as_asked_for(new):
    for plan in PLANS:
        out = decode(
            target(), adversary("perfect", "tiny-llama", 0), prompt(0), plan, max_new_tokens=new, eos_token_ids=()
        )
        assert out.tokens == alone("tiny-llama", 0)[:new]
        assert max(out.drafted, default=0) <= max(0, new - 2)
    assert new > 1 or np.isnan(out.decoded_mat)


@pytest.mark.parametrize("variant, name", CASES)
def test_acceptance_while_decoding_is_the_teacher_forced_one(variant, name):
    """Anchor by anchor, the accepted run of a greedy chain is the run of matches that `match_documents` finds there."""
    built, length = trained(variant, name), 5
    runs = matched = 0
    for seed in (0, 2):
        out = decoded(variant, name, seed, Chain(length))
        tokens = np.array(prompt(seed) + out.tokens, dtype=np.int32)
        document = Document(tokens, np.arange(len(tokens)) >= 9)
        ((match, _),) = match_documents(live_of(document, name=name), built, length)
        index = find_anchors(torch.from_numpy(document.answer_mask)[None], length).index[0].tolist()
        anchor = 9 - 1
        for accepted, drafted in zip(out.accepted, out.drafted):
            if drafted:
                run = np.logical_and.accumulate(match[index.index(anchor)][:drafted]).sum()
                assert accepted == run, (variant, name, seed, anchor)
                runs, matched = runs + 1, matched + accepted
            anchor += accepted + 1
    assert runs > 20 and matched > 2  # how much it has learned depends on the machine's arithmetic


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_cache_ends_up_as_that_of_a_plain_forward(name, plan):
    """All tokens but the last, in order, also where the answer ends on an accepted draft."""
    for kind in ("perfect", "often_right", "second_best_is_right"):
        for eos in ((), (alone(name, 1)[20],)):
            drafting = Drafting(adversary(kind, name, 1), plan, 9 + NEW)
            with torch.no_grad(), capture(target(name).model) as taken:
                run = TargetRun(target(name), taken)
                out = speculate(run, drafting, prompt(1), Chooser(GREEDY), NEW, set(eos))
            with torch.no_grad():
                plain = target(name).model(torch.tensor([[*prompt(1), *out.tokens[:-1]]])).past_key_values
            assert run.cache.get_seq_length() == 9 + len(out.tokens) - 1
            for ours, wanted in zip(run.cache.layers, plain.layers, strict=True):
                torch.testing.assert_close(ours.keys, wanted.keys, atol=3e-5, rtol=1e-4)
                torch.testing.assert_close(ours.values, wanted.values, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_prefix_entries_come_from_the_targets_state_of_accepted_tokens(variant, plan):
    """After decoding they are what `Drafter.prefix` makes of the whole answer, and each was made once."""
    built, made = trained(variant, "tiny-llama"), []
    drafting = Drafting(built, plan, 9 + NEW)
    with capture(target().model, hidden=drafting.hidden_layers) as taken:
        run = TargetRun(target(), taken, drafting.kv_layers)
        drafting.drafter = Recorded(built, made)
        out = speculate(run, drafting, prompt(0), Chooser(GREEDY), NEW, set())
    tokens = np.array(prompt(0) + out.tokens, dtype=np.int32)
    features = live_of(Document(tokens, np.ones(len(tokens), bool))).batch([0])
    entries, fused = built.prefix(features)
    assert sum(made) == drafting.length == len(tokens) - out.accepted[-1] - 2
    for ours, wanted in zip(drafting.entries, entries, strict=True):
        assert ours.keys() == wanted.keys()
        for name in wanted:
            for part, whole in zip(ours[name], wanted[name]):
                end = drafting.length
                torch.testing.assert_close(part[:, :, :end], whole[:, :, :end], atol=1e-4, rtol=1e-4)
    if fused is not None:
        torch.testing.assert_close(drafting.state, fused[:, [drafting.length - 1]], atol=1e-4, rtol=1e-4)


class Recorded:
    """A drafter that notes how many prefix entries it makes."""

    def __init__(self, built, made):
        self._built, self._made = built, made

    def prefix(self, features, first=0, past=()):
        self._made.append(features.tokens.shape[1] - 1)
        return self._built.prefix(features, first, past)

    def __getattr__(self, name):
        return getattr(self._built, name)


@pytest.mark.parametrize(
    "nothing", [lambda: (None, Chain(7)), lambda: (drafter("kv_2"), Chain(0)), lambda: (drafter("kv_2"), Tree(3, 2, 1))]
)
def test_no_drafts_is_the_target_alone(nothing):
    built, plan = nothing()
    out = decode(target(), built, prompt(0), plan, max_new_tokens=NEW, eos_token_ids=())
    assert out.tokens == alone("tiny-llama", 0)
    assert out.decoded_mat == 1 and out.target_forwards == NEW - 1 and not any(out.drafted)


def test_one_token_is_prompt_enough_and_any_container_will_do():
    for built in (None, drafter("hybrid"), drafter("kv_2_lagged")):
        for tokens in ([5], np.array([5]), torch.tensor([[5]])):
            out = decode(target(), built, tokens, max_new_tokens=9, eos_token_ids=())
            assert out.tokens == decode(target(), None, [5], max_new_tokens=9, eos_token_ids=()).tokens


def test_sampling_is_repeatable_and_follows_its_seed():
    draws = [
        decode(
            target(), drafter("hybrid"), prompt(0), Tree(2, 3, 9), Sampling(1.0, seed=seed), max_new_tokens=20
        ).tokens
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_rounds_tell_what_was_proposed_and_taken():
    """The tokens along the accepted nodes, and a bonus token after each round, are the answer."""
    for plan in PLANS:
        out = decode(target(), trained("hybrid"), prompt(0), plan, max_new_tokens=NEW, eos_token_ids=())
        told = out.tokens[:1]
        for proposal, path in out.rounds:
            assert (
                proposal.tokens[0] == told[-1] and [proposal.parents[node] for node in path] == [0, *path][: len(path)]
            )
            told += [proposal.tokens[node] for node in path]
            told.append(out.tokens[len(told)])
        assert told == out.tokens


def test_half_precision_decodes_too():
    half = load_target("tiny-llama", device="cpu", dtype="bfloat16")
    for config in (DrafterConfig("hidden"), DrafterConfig("kv", 2), DrafterConfig("hybrid")):
        built = build_drafter(config, half, feature_spec(half), DRAFT_IDS)
        for plan in PLANS:
            assert len(decode(half, built, prompt(0), plan, max_new_tokens=9, eos_token_ids=()).tokens) == 9


def test_nothing_of_capture_stays_behind():
    decode(target(), drafter("hidden"), prompt(0), max_new_tokens=5)
    decoder = target().model.get_decoder()
    assert not decoder.norm._forward_hooks and not any(layer._forward_pre_hooks for layer in decoder.layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "of one token or more"),
        ({"prompt": torch.ones(2, 3, dtype=torch.int64)}, "one prompt of one token or more"),
        ({"prompt": [5, 512]}, "doesn't know"),
        ({"prompt": [5, -1]}, "doesn't know"),
        ({"prompt": [0.5]}, "doesn't know"),
        ({"prompt": [5] * 500, "max_new_tokens": 13}, "don't fit into the target's context of 512"),
        ({"prompt": [True]}, "doesn't know"),
        ({"prompt": "Hello"}, "a list of token ids; `encode_turn` makes one of text"),
        ({"prompt": None}, "a list of token ids"),
        ({"prompt": [[5], [6, 7]]}, "a list of token ids"),
        ({"max_new_tokens": 0}, "1 or more"),
        ({"max_new_tokens": True}, "max_new_tokens=True must be a whole number"),
        ({"max_new_tokens": 8.0}, "max_new_tokens=8.0 must be a whole number"),
        ({"plan": 7}, "plan=7 must be Chain or Tree"),
        ({"sampling": 0.7}, "sampling=0.7 must be Sampling"),
        ({"eos_token_ids": 2}, "eos_token_ids=2 must be a list, each of it a whole number"),
        ({"eos_token_ids": ["2"]}, "eos_token_ids=.* must be a list, each of it a whole number"),
    ],
)
def test_bad_prompts_and_options_are_refused_in_one_line(options, message):
    with pytest.raises(StudyError, match=message) as caught:
        decode(target(), **{"drafter": None, "prompt": [5], **options})
    assert "\n" not in str(caught.value)


@given(st.sampled_from([(Chain, "length"), (Tree, "depth"), (Tree, "top_k"), (Tree, "total")]), ANYTHING)
def test_plans_are_whole_numbers_or_refused(field, value):
    plan, name = field
    try:
        assert type(getattr(plan(**{name: value}), name)) is int and value >= 0
    except StudyError as refused:
        assert "\n" not in str(refused)


def test_every_id_that_ends_a_turn_of_the_target_ends_its_answer(monkeypatch):
    whole = decode(target(), None, prompt(0), max_new_tokens=NEW, eos_token_ids=()).tokens
    first = {token: whole.index(token) for token in whole}
    (one, other), built = sorted(first, key=first.get)[2:4], trained("hybrid")
    for stops, last in (((one, other), one), ((other, one), one), ((600, other), other)):
        monkeypatch.setattr(Target, "stop_ids", stops)
        for plan in (Chain(0), *PLANS):
            found = decode(target(), built, prompt(0), plan, max_new_tokens=NEW).tokens
            assert found == whole[: first[last] + 1]


def test_a_prompt_that_just_fits():
    assert len(decode(target(), drafter("hybrid"), [5] * 500, Tree(), max_new_tokens=12, eos_token_ids=()).tokens) == 12


def test_a_drafter_of_another_target_or_with_another_documents_kv_is_refused():
    with pytest.raises(StudyError, match="trained for target tiny-qwen2"):
        decode(target(), drafter("hidden", "tiny-qwen2"), [5])
    shuffled = build_drafter(DrafterConfig("kv", kv_control="shuffled"), target(), feature_spec(target()), DRAFT_IDS)
    with pytest.raises(StudyError, match="another document's KV"):
        decode(target(), shuffled, [5])


def test_the_target_alone_proposes_nothing():
    assert NoDrafting().propose(5, 9).tokens == [5]

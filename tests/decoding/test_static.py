"""Decoding with fixed shapes proposes, accepts and answers what decoding with growing ones does, prompt after prompt."""

import copy

import pytest
import torch
from examples import drafter
from greedy import alone, prompt, trained
from static_shapes import nothing_waits
from test_propose import FORK, PROMPT

from kvshot_lib.decoding import decode as decoding
from kvshot_lib.decoding import static
from kvshot_lib.decoding.clock import timed_parts
from kvshot_lib.decoding.decode import decode
from kvshot_lib.decoding.drafting import Drafting, NoDrafting
from kvshot_lib.decoding.forwards import Prefill, Verifier
from kvshot_lib.decoding.propose import ALONE, Chain, Tree
from kvshot_lib.decoding.sampling import GREEDY, Sampling
from kvshot_lib.decoding.static import StaticDrafting, StaticRun, static_parts
from kvshot_lib.drafters import attention as attentions
from kvshot_lib.target.capture import Captured
from kvshot_lib.target.load import load_target
from kvshot_lib.target.static import PlacedCache

NAME, NEW = "tiny-llama", 12


def on(device: str, name: str = NAME):
    """A tiny target there, always the same."""
    return KNOWN.setdefault((device, name), load_target(name, device=device, dtype="float32"))


KNOWN: dict = {}


@pytest.fixture
def both(device, monkeypatch):
    """Decodes with growing shapes, then with fixed ones, and gives both."""

    def decoded(built, tokens, plan, sampling=GREEDY, name=NAME, new=NEW, **given):
        found = []
        for devices in ((), ("cpu", "cuda")):
            monkeypatch.setattr(decoding, "STATIC", devices)
            given = {"max_new_tokens": new, "eos_token_ids": ()} | given
            found.append(decode(on(device, name), built, tokens, plan, sampling, **given))
        return found

    return decoded


LEARNED = [
    (variant, plan) for variant in ("hidden", "kv_2", "hybrid", "block_kv_1") for plan in (Chain(4), Tree(2, 3, 9))
]


@pytest.mark.parametrize(
    "variant, plan", [*LEARNED, ("states_2", Chain(3)), ("hidden_31_3", Chain(3)), ("none_2", Chain(3))], ids=str
)
def test_rounds_are_the_same_with_fixed_shapes(variant, plan, both, device):
    """Also for the prompt that comes after another in the same graphs, and again."""
    learned = (variant, plan) in LEARNED
    built, accepted = copy.deepcopy((trained if learned else drafter)(variant)).to(device), 0
    for seed in (0, 2, 0) if learned else (0,):
        growing, fixed = both(built, prompt(seed), plan)
        assert fixed.rounds == growing.rounds and fixed.tokens == alone(NAME, seed)[:NEW]
        accepted += sum(fixed.accepted)
    assert accepted > 2 or not learned


def test_the_first_chain_has_fixed_shapes_too(both, device, monkeypatch):
    """Kernels that are launched one by one take a GPU as long as several rounds. Also after a prompt of one token."""
    built = copy.deepcopy(trained("hybrid")).to(device)
    for tokens in (prompt(0), prompt(0)[:1]):
        grown, fixed = both(built, tokens, Chain(3))
        with monkeypatch.context() as patch:
            patch.setattr(Drafting, "propose", None)
            patch.setattr(Drafting, "extend", None)
            assert (
                decode(on(device), built, tokens, Chain(3), max_new_tokens=NEW, eos_token_ids=()).rounds == grown.rounds
            )
        assert fixed.rounds == grown.rounds
    assert max(both(built, prompt(0), Chain(3))[1].accepted) > 0


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3", "tiny-gemma3"])
def test_the_target_alone_answers_the_same(name, both):
    for seed in (0, 1):
        growing, fixed = both(None, prompt(seed), ALONE, name=name)
        assert fixed.tokens == growing.tokens == alone(name, seed)[:NEW]


def test_a_prompt_too_long_for_a_graph_is_read_the_same(both, device, monkeypatch):
    monkeypatch.setattr(static, "RECORDED", 4)
    growing, fixed = both(copy.deepcopy(trained("hybrid")).to(device), prompt(0), Chain(3))
    assert len(prompt(0)) > 4 and fixed.rounds == growing.rounds and fixed.tokens == growing.tokens


def test_answers_end_where_they_should(both, device):
    built = copy.deepcopy(trained("hybrid")).to(device)
    for new in (1, 2, 3):
        assert both(built, prompt(0), Chain(5), new=new)[1].tokens == alone(NAME, 0)[:new]
    stop = alone(NAME, 0)[9]
    growing, fixed = both(built, prompt(0), Chain(5), eos_token_ids=[stop])
    assert fixed.tokens == growing.tokens and fixed.tokens[-1] == stop and len(fixed.tokens) <= 10


def test_draws_are_the_same(both, device):
    built = copy.deepcopy(trained("hidden")).to(device)
    growing, fixed = both(built, prompt(0), Chain(3), Sampling(1.0, top_p=0.9, seed=3))
    assert fixed.rounds == growing.rounds and fixed.tokens == growing.tokens


def test_a_timed_pass_decodes_the_same_part_by_part(both, device):
    built = copy.deepcopy(trained("block_kv_1")).to(device)
    _, plain = both(built, prompt(0), Chain(6))  # more drafts than a block of four has
    with timed_parts(torch.device(device)) as clock:
        growing, fixed = both(built, prompt(0), Chain(6))
    assert fixed.rounds == growing.rounds == plain.rounds and min(clock.seconds[p] for p in ("draft", "verify")) > 0


@torch.inference_mode()
def test_filler_is_seen_by_no_node_and_sees_none(device):
    """Five nodes of a tree in a forward of eight: logits and states of each are those of its branch alone."""
    target = on(device)
    run = StaticRun(target, taken := Captured(), (), Verifier(target, (1, 2), 8, PlacedCache(target, 32)))
    run.prefill(PROMPT)
    logits = run.verify(FORK)
    for node, branch in enumerate([[40], [40, 41], [40, 42], [40, 41, 43], [40, 42, 44]]):
        ids = torch.tensor([PROMPT + branch], device=device)
        plain = target.model(ids, output_hidden_states=True)
        torch.testing.assert_close(logits[node], plain.logits[0, -1], atol=5e-5, rtol=1e-4)
        torch.testing.assert_close(taken.hidden_states[2][0, node], plain.hidden_states[2][0, -1], atol=5e-5, rtol=1e-4)
    run.keep([0, 2, 4])
    plain = target.model(torch.tensor([[*PROMPT, 40, 42, 44]], device=device)).past_key_values
    for layer, wanted in zip(run.cache.layers, plain.layers):
        torch.testing.assert_close(layer.keys[:, :, : run.end], wanted.keys, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ["hidden_31_3", "kv_1_unrotate", "hybrid", "kv_2_lagged"])
@torch.inference_mode()
def test_nothing_in_a_round_waits_for_the_device(variant, monkeypatch):
    built, target = drafter(variant), on("cpu")
    monkeypatch.setattr(decoding, "STATIC", ("cpu",))
    decode(target, built, prompt(0), Chain(3), max_new_tokens=9, eos_token_ids=())  # makes the buffers
    drafting = static_parts(target, Drafting(built, Chain(3), 18), Chain(3), 18, Captured(), True)[1]
    run, _ = static_parts(target, NoDrafting(), ALONE, 18, Captured(), True)
    prefill, verifier = Prefill(target, (1,), 8, run.cache), drafting.redrafter.verifier
    read = Prefill(target, verifier.layers, 8, verifier.cache)
    with nothing_waits():
        drafting.redrafter.read(read)
        drafting.ahead.forward()
        drafting.redrafter.forward()
        run.ahead.forward()
        prefill.forward()


@pytest.mark.filterwarnings("default")  # PyTorch's compiler warns of PyTorch
@pytest.mark.parametrize("variant", ["hidden", "hybrid", "block_kv_1"])
@torch._dynamo.config.patch(recompile_limit=64)
def test_the_compiler_has_all_of_drafting_in_one_graph_and_gives_the_same(variant, monkeypatch):
    """As on a GPU, its way of merging chains included, without its code generator; ``fullgraph`` refuses what can't be
    traced."""
    merging = attentions._merging
    monkeypatch.setattr(attentions, "has_triton", torch.compiler.disable(lambda: True))  # it can't be traced
    on_a_gpu = lambda _device: merging("cuda") if torch.compiler.is_compiling() else merging("cpu")
    monkeypatch.setattr(attentions, "_merging", on_a_gpu)
    found = []
    for compiled in (False, True):
        built, target = drafter(variant) if variant != "block_kv_1" else trained(variant), on("cpu")
        read = built.spec if "keys" in built.reads else None
        with torch.inference_mode():
            layers = built.spec.hidden_layers if "hidden_states" in built.reads else ()
            verifier = Verifier(target, layers, 4, PlacedCache(target, 64))
            torch.manual_seed(0)
            for tensor in (
                verifier.states,
                *(part for own in verifier.cache.layers for part in (own.keys, own.values)),
            ):
                tensor.normal_()
            redrafter = static.Redrafter(built, verifier, read.kv_layers if read else ())
            redrafter.numbers.copy_(torch.tensor([5, 6, 7, 8, 9, 20, 3]))
            work = redrafter.forward
            found.append(
                (torch.compile(work, backend="aot_eager", fullgraph=True, dynamic=True) if compiled else work)()
            )
            found[-1] = [found[-1], *(part for layer in redrafter.entries for pair in layer.values() for part in pair)]
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*found, strict=True))


@torch.inference_mode()
def test_a_round_is_recorded_from_the_start_wherever_the_last_answer_ended(monkeypatch):
    verifier = Verifier(on("cpu"), (), 4, PlacedCache(on("cpu"), 32))
    verifier.length.fill_(30)
    monkeypatch.setattr(static, "recorded", lambda work, _: (verifier.length.item(), work))
    assert static.Round(verifier, None).run[0] == 0


@torch.inference_mode()
def test_chains_have_fixed_shapes():
    built = drafter("kv_2")
    for plan, kind in ((Chain(2), StaticDrafting), (Tree(2, 2, 5), Drafting)):
        run, drafting = static_parts(on("cpu"), Drafting(built, plan, 20), plan, 20, Captured(), True)
        assert type(drafting) is kind and type(run) is StaticRun

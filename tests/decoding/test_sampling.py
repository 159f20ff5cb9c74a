from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, TemperatureLogitsWarper, TopPLogitsWarper

from kvshot_lib.decoding.decode import Drafting, speculate
from kvshot_lib.decoding.propose import Chain, Tree
from kvshot_lib.decoding.sampling import GREEDY, Chooser, Sampling, distribution
from kvshot_lib.decoding.verify import TargetRun
from kvshot_lib.drafters.drafter import Drafter, DrafterConfig, build_drafter
from kvshot_lib.errors import StudyError
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.target.capture import capture
from kvshot_lib.target.load import Target, fingerprint

VOCABULARY, PROMPT, DRAWS = 12, [3, 8, 1], 5_000
WARM = Sampling(temperature=1.2, top_p=0.95, seed=11)


@cache
def small_target() -> Target:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return Target("small", model, None, fingerprint(model), "")


def some_drafter() -> Drafter:
    """Untrained, and half of the tokens are beyond it."""
    config, target = DrafterConfig("hybrid"), small_target()
    return build_drafter(config, target, feature_spec(target), torch.arange(1, VOCABULARY, 2), seed=3)


def warped(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """transformers' own temperature and top-p, [N, V] -> probabilities."""
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    return TopPLogitsWarper(sampling.top_p)(None, scores).double().softmax(-1)


@cache
def exact_joint(sampling: Sampling) -> torch.Tensor:
    """P of every three first tokens [V, V, V], from plain forwards over every prefix."""
    model, joint, starts = small_target().model, torch.ones(1, dtype=torch.float64), torch.tensor([PROMPT])
    for _ in range(3):
        with torch.no_grad():
            p = warped(model(starts).logits[:, -1], sampling)
        joint = (joint[:, None] * p).flatten()
        following = torch.arange(VOCABULARY).repeat(len(starts))[:, None]
        starts = torch.cat([starts.repeat_interleave(VOCABULARY, 0), following], 1)
    return joint.view(VOCABULARY, VOCABULARY, VOCABULARY)


def chi_square_p(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """p-value of the counts; cells with an expectation under 5 are taken together, and impossible ones must be empty."""
    if counts[expected == 0].sum():
        return 0.0
    rare = expected < 5
    counts, expected = ([*part[~rare].tolist(), float(part[rare].sum())] for part in (counts, expected))
    statistic = sum((c - e) ** 2 / e for c, e in zip(counts, expected) if e)
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2), torch.tensor(statistic / 2)))


class Remembered:
    """Target and drafter for many draws from one prompt: what they answer depends on the tokens so far alone, so it is kept.

    What isn't known yet comes from a real target run and a real drafter.
    """

    def __init__(self, drafter, plan):
        self.target, self.drafter, self.plan, self.known = small_target(), drafter, plan, {}

    def prefill(self, prompt):
        if "prefill" not in self.known:
            run = TargetRun(self.target, None)
            self.known["prefill"] = run.prefill(prompt)
        return self.known["prefill"]

    def extend(self, run, tokens):
        self.now = tuple(tokens)

    def propose(self, token, levels):
        if self.now not in self.known:
            drafting = Drafting(self.drafter, self.plan, 64)
            with capture(self.target.model, hidden=drafting.hidden_layers) as taken:
                run = TargetRun(self.target, taken, drafting.kv_layers)
                run.prefill(list(self.now[:-1]))
                drafting.extend(run, list(self.now))
                proposal = drafting.propose(token, levels)
                self.known[self.now] = proposal, list(run.verify(proposal))
        return self.known[self.now][0]

    def verify(self, proposal):
        return self.known[self.now][1]

    def keep(self, path):
        pass


@cache
def remembered_for(plan) -> Remembered:
    return Remembered(some_drafter(), plan)


class RememberedChooser(Chooser):
    """Keeps the distribution of logits that it has seen."""

    def __init__(self, sampling):
        super().__init__(sampling)
        self.seen = {}

    def choose(self, logits, proposals=()):
        if id(logits) not in self.seen:
            self.seen[id(logits)] = distribution(logits, self.sampling), logits
        return self.accept(self.seen[id(logits)][0].clone(), proposals)


class KeepsRejected(RememberedChooser):
    """Biased: a rejected token stays in the distribution that the next token is drawn from."""

    def accept(self, probabilities, proposals):
        for place, token in enumerate(proposals):
            if self.uniform() < float(probabilities[token]):
                return token, place
        return self.draw(probabilities), None


class NeverRenormalises(RememberedChooser):
    """Biased: the second child is accepted with its probability before the first was rejected."""

    def accept(self, probabilities, proposals):
        for place, token in enumerate(proposals):
            if self.uniform() < float(probabilities[token]):
                return token, place
            probabilities[token] = 0
        return self.draw(probabilities), None


class Coin:
    """A uniform number that comes out both ways: "is it below p?" is yes with probability p."""

    def __init__(self, decide):
        self.decide = decide

    def __lt__(self, p: float) -> bool:
        return self.decide([p, 1 - p]) == 0


def every_outcome(rule: type[Chooser]) -> type[Chooser]:
    """The rule with its draws replaced by all their outcomes, one answer after the other; ``weight`` is the answer's probability."""

    class Enumerated(rule):
        def start(self, past: list[tuple[int, int]]):
            self.past, self.made, self.weight, self.chosen = past, [], 1.0, 0

        def choose(self, logits, proposals=()):
            self.chosen += 1  # every choice gives one token, and only the first three matter here
            return super().choose(logits, proposals) if self.chosen <= 3 else (0, None)

        def decide(self, probabilities: list[float]) -> int:
            possible = [i for i, p in enumerate(probabilities) if p > 0]
            place = self.past[len(self.made)][0] if len(self.made) < len(self.past) else 0
            self.made.append((place, len(possible)))
            self.weight *= probabilities[possible[place]]
            return possible[place]

        def uniform(self):
            return Coin(self.decide)

        def draw(self, probabilities):
            return self.decide((probabilities / probabilities.sum()).tolist())

    return Enumerated


@torch.no_grad()
def drafted_joint(plan, rule) -> tuple[torch.Tensor, float]:
    """P of every three first tokens when ``rule`` accepts and draws, over all outcomes; and the mean number of accepted drafts."""
    chooser = every_outcome(rule)(WARM)
    remembered, joint, accepted, past = remembered_for(plan), torch.zeros(12, 12, 12, dtype=torch.float64), 0.0, []
    while True:
        chooser.start(past)
        out = speculate(remembered, remembered, PROMPT, chooser, 4, set())  # 4: the last token is never a draft
        joint[tuple(out.tokens[:3])] += chooser.weight
        accepted += chooser.weight * sum(out.accepted)
        past = chooser.made
        while past and past[-1][0] + 1 == past[-1][1]:
            past.pop()
        if not past:
            return joint, accepted
        past[-1] = past[-1][0] + 1, past[-1][1]


@pytest.mark.parametrize("plan", [Chain(3), Tree(2, 3, 12)], ids=str)
def test_the_rule_leaves_the_target_distribution_exactly_as_it_is(plan):
    """No draws, no chance: the probabilities of all outcomes add up to the target's own."""
    joint, accepted = drafted_joint(plan, RememberedChooser)
    torch.testing.assert_close(joint, exact_joint(WARM), atol=1e-6, rtol=1e-4)
    assert accepted > 0.1


@pytest.mark.parametrize(
    "plan, biased", [(Chain(3), KeepsRejected), (Tree(2, 3, 12), KeepsRejected), (Tree(2, 3, 12), NeverRenormalises)]
)
def test_the_same_test_sees_a_biased_rule(plan, biased):
    joint, _ = drafted_joint(plan, biased)
    assert joint.sum() == pytest.approx(1)
    assert (joint - exact_joint(WARM)).abs().max() > 1e-4


@pytest.mark.parametrize("plan", [Chain(3), Tree(2, 3, 12)], ids=str)
@torch.no_grad()
def test_sampled_answers_follow_the_target_distribution(plan):
    """The same with real draws, which bring in the generator: the joint distribution of the first three tokens."""
    remembered, chooser, counts = remembered_for(plan), RememberedChooser(WARM), torch.zeros(12, 12, 12)
    for _ in range(DRAWS):
        out = speculate(remembered, remembered, PROMPT, chooser, 4, set())
        counts[tuple(out.tokens[:3])] += 1
    assert chi_square_p(counts, exact_joint(WARM) * DRAWS) > 0.001


def test_sampling_through_the_real_loop_gives_what_remembered_parts_give():
    """The remembered parts stand in for the real ones: equal draws, equal answers."""
    target, plan = small_target(), Tree(2, 3, 12)
    drafter = some_drafter()
    remembered = Remembered(drafter, plan)
    for seed in range(15):
        drafting = Drafting(drafter, plan, 64)
        with torch.no_grad(), capture(target.model, hidden=drafting.hidden_layers) as taken:
            run = TargetRun(target, taken, drafting.kv_layers)
            real = speculate(run, drafting, PROMPT, Chooser(Sampling(1.0, seed=seed)), 9, set())
            kept = speculate(remembered, remembered, PROMPT, Chooser(Sampling(1.0, seed=seed)), 9, set())
        assert real.tokens == kept.tokens and real.accepted == kept.accepted


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, 0.9), Sampling(1.5, 0.5), Sampling(1.0, 0.01)])
def test_temperature_and_top_p_are_those_of_transformers(sampling):
    logits = 3 * torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    ours = torch.stack([distribution(row, sampling) for row in logits])
    torch.testing.assert_close(ours, warped(logits, sampling), atol=1e-6, rtol=1e-5)


def test_top_p_by_hand():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    wanted = torch.tensor([0, 2 / 3, 0, 1 / 3], dtype=torch.float64)
    torch.testing.assert_close(distribution(logits, Sampling(1.0, 0.6)), wanted)
    assert distribution(logits, Sampling(1.0, 0.4)).tolist() == [0, 1, 0, 0]


def test_one_place_with_two_proposals():
    """The rule's three cases: first, second, neither."""
    p = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    chooser, counts, places = Chooser(Sampling(1.0, seed=5)), torch.zeros(4), {None: 0, 0: 0, 1: 0}
    for _ in range(20_000):
        token, place = chooser.accept(p.clone(), [1, 3])
        assert place == {1: 0, 3: 1}.get(token)
        counts[token] += 1
        places[place] += 1
    assert chi_square_p(counts, p * 20_000) > 0.001
    assert min(places.values()) > 0


def test_certain_and_impossible_tokens():
    certain = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    chooser = Chooser(Sampling(1.0))
    for _ in range(200):
        assert chooser.accept(certain.clone(), [1]) == (1, 0)
        assert chooser.accept(certain.clone(), [0, 2]) == (1, None)
        assert chooser.draw(certain) == 1


def test_greedy_takes_the_argmax_whatever_is_proposed():
    logits = torch.tensor([0.1, 2.0, 0.5])
    assert Chooser(GREEDY).choose(logits) == (1, None)
    assert Chooser(GREEDY).choose(logits, [2, 1]) == (1, 1)
    assert Chooser(GREEDY).choose(logits, [2, 0]) == (1, None)


@pytest.mark.parametrize(
    "given", [{"temperature": -1}, {"temperature": 1e-300}, {"top_p": 0}, {"top_p": 1.1}, {"seed": -1}, {"seed": 2**63}]
)
def test_impossible_settings_are_refused(given):
    with pytest.raises(StudyError, match=f"^{next(iter(given))}="):
        Sampling(**given)


NUMBERS = st.one_of(st.integers(), st.floats(), st.floats(-0.5, 2))
ANYTHING = st.one_of(NUMBERS, st.booleans(), st.text(max_size=2), st.none(), st.just("0.5"))


@given(st.dictionaries(st.sampled_from(["temperature", "top_p", "seed"]), ANYTHING, min_size=1))
def test_what_is_taken_gives_a_distribution(given):
    """Random settings are refused by name, or every token is drawn from probabilities that sum to 1."""
    try:
        sampling = Sampling(**given)
    except StudyError as refused:
        assert str(refused).partition("=")[0] in given and "\n" not in str(refused)
        return
    assert not any(isinstance(value, bool | str) for value in vars(sampling).values())
    token, place = Chooser(sampling).choose(torch.tensor([-1e4, 3.0, 2.9, 1e4]), [1])
    if sampling.temperature <= 100:  # beyond it the others have a chance: at 1e20 all four are equally likely
        assert token == 3 and place is None
    if sampling.temperature:
        assert float(distribution(torch.tensor([0.5, 3.0]), sampling).sum()) == pytest.approx(1)

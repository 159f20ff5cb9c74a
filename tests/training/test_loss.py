"""The loss and its gradient against a naive drafter and autograd, on all anchors and on some; the cures' losses."""

from dataclasses import replace

import examples
import numpy as np
import pytest
import sequential
import torch
from examples import DRAFT_IDS, STEPS, VARIANTS, logits_by_pair

from kvshot_lib.drafters.drafter import DrafterConfig, build_drafter
from kvshot_lib.training import loss as loss_module
from kvshot_lib.training.anchors import find_anchors, sample_anchors
from kvshot_lib.training.config import TrainConfig
from kvshot_lib.training.loss import SoftCrossEntropy, draw, drawn_loss, score_rows, training_loss, ttt_loss
from kvshot_lib.training.ttt import draft_steps

EVERY = list(VARIANTS)
SHORT = TrainConfig(epochs=3, batch_documents=2, ttt_steps=3, anchor_fraction=0.5, validate_every=0, learning_rate=3e-3)
BRANCH = ("layers.0.cross.", "layers.0.fusion.")


@pytest.mark.parametrize(
    ("variant", "name"), [*((variant, "tiny-llama") for variant in EVERY), ("hybrid", "tiny-qwen3")]
)
def test_loss_and_its_gradient_equal_the_sequential_drafter(variant, name):
    features = examples.features(name, documents=(0, 2), length=12)
    fast, slow = examples.drafter(variant, name), examples.drafter(variant, name)
    result = ttt_loss(fast, features, ttt_steps=STEPS, step_decay=0.8)
    result.loss.backward()
    head = examples.target(name).model.get_output_embeddings().weight
    reference = sequential.ttt_loss(slow, features, head, STEPS, 0.8)
    reference.backward()
    assert result.loss.item() == pytest.approx(reference.item(), rel=1e-6)
    for (parameter, got), wanted in zip(fast.named_parameters(), slow.parameters(), strict=True):
        useless = variant == "kv_1_zero" and "fusion" in parameter  # a linear map of zeros learns nothing
        assert useless or wanted.grad.abs().max() > 0, f"the reference has no gradient for {parameter}"
        assert (got.grad - wanted.grad).abs().max() < 1e-5 * max(1, wanted.grad.abs().max()), parameter


def test_gradient_scale_reaches_the_draft_side_key_and_value_maps_alone():
    plain, scaled = examples.drafter("kv_1"), examples.drafter("kv_1_grad50")
    for drafter in (plain, scaled):
        ttt_loss(drafter, examples.features(), ttt_steps=3).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        factor = 50 if name in ("layers.0.attention.k_proj.weight", "layers.0.attention.v_proj.weight") else 1
        assert torch.allclose(one.grad * factor, other.grad, rtol=1e-4, atol=1e-9), name


@pytest.mark.filterwarnings("default")  # PyTorch's compiler warns of PyTorch
def test_compiled_steps_change_no_number():
    results = []
    for compiled in (False, True):
        drafter = examples.drafter("hybrid")
        if compiled:
            drafter.compile_steps()
        result = ttt_loss(drafter, examples.features(), ttt_steps=3)
        result.loss.backward()
        results.append((result.loss.item(), [p.grad for p in drafter.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", EVERY)
def test_a_batch_without_answers_has_no_loss_and_moves_nothing(variant):
    drafter, features = examples.drafter(variant), examples.features()
    result = ttt_loss(drafter, replace(features, answer_mask=torch.zeros_like(features.answer_mask)), ttt_steps=3)
    result.loss.backward()
    assert result.loss == 0 and not result.pairs.any() and not result.matches.any()
    assert all(p.grad is None or not p.grad.any() for p in drafter.parameters())


@pytest.mark.parametrize("variant", ["hidden", "kv_1", "hybrid"])
def test_documents_of_one_token_are_no_trouble(variant):
    """A prefix without entries would crash the process in the fused kernel."""
    features = examples.live_of(examples.document("1"), examples.document("0")).batch([0, 1])
    result = ttt_loss(examples.drafter(variant), features, ttt_steps=3)
    assert result.loss == 0 and not result.pairs.any()


def test_loss_counts_matches_and_drops_what_cannot_be_drafted():
    """`matches` and `pairs` equal a count by hand: pairs outside the draft vocabulary stay in the denominator."""
    drafter, features = examples.drafter("kv_1"), examples.features()
    result = ttt_loss(drafter, features, ttt_steps=STEPS)
    logits, pairs, matches, outside = logits_by_pair(drafter, features), [0] * STEPS, [0] * STEPS, 0
    for (document, anchor, k), row in logits.items():
        wanted = int(features.target_argmax[document, anchor + 1 + k])
        pairs[k] += 1
        matches[k] += int(drafter.draft_ids[row.argmax()]) == wanted
        outside += wanted not in DRAFT_IDS.tolist()
    assert result.pairs.tolist() == pairs and result.matches.tolist() == matches
    assert outside > 10, "the example has no pair that can't be drafted"


@pytest.mark.parametrize("variant", EVERY)
def test_a_document_alone_and_in_a_batch_gets_the_same_drafts(variant):
    """Target state, drafts and loss of a padded batch are those of its documents one by one."""
    drafter, together = examples.drafter(variant), logits_by_pair(examples.drafter(variant), examples.features())
    totals = torch.zeros(2, STEPS)
    for document in range(len(examples.DOCUMENTS)):
        features = examples.features(documents=(document,))
        alone = logits_by_pair(drafter, features)
        batched = [together.pop((document, anchor, k)) for _, anchor, k in alone]
        if alone:
            # Rounding: other batch shapes sum in another order; feedback carries it on (1.3e-5 of 1 + |logit| seen).
            torch.testing.assert_close(torch.stack(batched), torch.stack([*alone.values()]), atol=1e-4, rtol=1e-5)
        result = ttt_loss(drafter, features, ttt_steps=STEPS)
        scored = torch.tensor([k for _, _, k in pair_losses(drafter, features, STEPS)], dtype=torch.int64).bincount(
            minlength=STEPS
        )
        totals += torch.stack([result.step_loss * scored, scored])
    assert not together
    assert torch.allclose(
        ttt_loss(drafter, examples.features(), ttt_steps=STEPS).step_loss, totals[0] / totals[1], rtol=1e-5
    )


# Anchor subsampling


def losses_and_gradients(drafter, features, **options):
    drafter.zero_grad()
    result = ttt_loss(drafter, features, ttt_steps=STEPS, **options)
    result.loss.backward()
    return result, torch.cat([p.grad.flatten() for p in drafter.parameters()])


@pytest.mark.parametrize("variant", ["hidden", "kv_2", "hybrid"])
def test_every_anchor_sampled_equals_the_full_computation_exactly(variant):
    drafter, features = examples.drafter(variant), examples.features()
    full, gradient = losses_and_gradients(drafter, features)
    anchors = find_anchors(features.answer_mask, STEPS)
    everything, place = sample_anchors(anchors, 1.0, torch.Generator().manual_seed(5))
    assert all(torch.equal(getattr(everything, f), getattr(anchors, f)) for f in ("index", "valid"))
    assert torch.equal(everything.weight[anchors.valid[..., 0]], anchors.weight[anchors.valid[..., 0]])
    assert place.tolist() == [list(range(anchors.index.shape[1]))] * len(anchors.index)
    one, same_gradient = losses_and_gradients(drafter, features, anchor_fraction=1.0)
    assert torch.equal(one.loss, full.loss) and torch.equal(same_gradient, gradient)


def test_a_subset_of_every_anchor_goes_the_sampled_way_to_the_same_numbers(monkeypatch):
    """The code of ρ < 1 with all anchors drawn: same loss, same gradient, to the last bit."""
    drafter, features = examples.drafter("hybrid"), examples.features()
    full, gradient = losses_and_gradients(drafter, features)
    sample = loss_module.sample_anchors
    every = lambda anchors, _fraction, *given: sample(anchors, 1.0, *given)
    monkeypatch.setattr(loss_module, "sample_anchors", every)
    sampled, same_gradient = losses_and_gradients(
        drafter, features, anchor_fraction=0.5, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(sampled.loss, full.loss) and torch.equal(same_gradient, gradient)


@pytest.mark.parametrize("variant", ["hidden", "kv_2", "hybrid", "none_2"])
def test_fixed_shapes_and_padding_change_no_loss_and_no_gradient(variant):
    """As a GPU's graphs want them: every anchor that there could be has a row, and the batch is longer than its texts."""
    features = examples.features()
    longer, results = features.lengthened(16), []
    assert longer.tokens.shape[1] % 16 == 0 and longer.tokens.shape[1] > features.tokens.shape[1]
    for batch, fixed in ((features, False), (longer, True)):
        drafter = examples.drafter(variant)
        drawn = draw(drafter, batch, STEPS, 1.0, None, fixed=fixed)
        anchors = drawn.anchors
        drawn = replace(drawn, subset=sample_anchors(anchors, 1.0, torch.Generator(), anchors.index.shape[1] * fixed))
        result = drawn_loss(drafter, batch, drawn, 0.8, cross_alone=False)
        result.loss.backward()
        results.append((result, {name: p.grad for name, p in drafter.named_parameters() if p.grad is not None}))
    (short, wanted), (long, found) = results
    assert long.loss.item() == pytest.approx(short.loss.item(), rel=1e-6)
    assert torch.equal(long.matches, short.matches) and torch.equal(long.pairs, short.pairs)
    assert found.keys() == wanted.keys()
    assert all((found[name] - wanted[name]).abs().max() < 1e-5 * max(1, wanted[name].abs().max()) for name in wanted)


def every_subset(anchors, fraction):
    """One generator seed for each possible sample, found by trying seeds."""
    found = {}
    for seed in range(400):
        subset, _ = sample_anchors(anchors, fraction, torch.Generator().manual_seed(seed))
        kept = [tuple(sorted(row[used].tolist())) for row, used in zip(subset.index, subset.valid[..., 0], strict=True)]
        found.setdefault(tuple(kept), []).append(seed)
    return found


SPANS = ["00111111000", "01111000000"]  # 5 and 3 anchors; K = 3


def test_the_mean_over_all_subsets_is_the_full_loss(monkeypatch):
    """Exact: over every sample that can be drawn, the mean of loss and gradient is that of all anchors.

    Two estimates that look right are not, and the numbers tell them apart: sampled terms that are not weighted up,
    and a mean over the sampled pairs (a sample's sum over its own count), because later steps have fewer pairs and
    their number varies.
    """
    source = examples.live_of(*(examples.document(span, seed=9) for span in SPANS))
    features = source.batch([0, 1])
    anchors = find_anchors(features.answer_mask, 3)
    assert anchors.valid[..., 0].sum(1).tolist() == [5, 3]
    subsets = every_subset(anchors, 0.4)  # 2 of 5 and 2 of 3
    assert len(subsets) == 30
    drafter = examples.drafter("kv_1")

    def loss_and_gradient(**options):
        drafter.zero_grad()
        result = ttt_loss(drafter, features, ttt_steps=3, **options)
        result.loss.backward()
        return torch.cat([result.step_loss, drafter.layers[0].attention.q_proj.weight.grad.flatten()]).double()

    def mean_over_subsets():
        generators = [torch.Generator().manual_seed(seeds[0]) for seeds in subsets.values()]
        return sum(loss_and_gradient(anchor_fraction=0.4, generator=g) for g in generators) / len(generators)

    full = loss_and_gradient()
    assert (mean_over_subsets() - full).abs().max() < 1e-5
    with monkeypatch.context() as patched:
        patched.setattr(loss_module, "sample_anchors", _unweighted)
        assert (mean_over_subsets() - full)[1:3].abs().min() > 0.1

    losses = pair_losses(drafter, features)
    of_step = {k: {(d, t): loss for (d, t, step), loss in losses.items() if step == k} for k in range(3)}
    assert np.mean(list(of_step[1].values())) == pytest.approx(full[1].item(), abs=1e-5)
    samples = [[(d, t) for d, kept in enumerate(documents) for t in kept] for documents in subsets]
    own_count = np.mean([np.mean([of_step[1][pair] for pair in sample if pair in of_step[1]]) for sample in samples])
    assert abs(own_count - full[1].item()) > 1e-3


def pair_losses(drafter, features, steps=3):
    """{(document, anchor, step): soft cross-entropy} of the pairs that enter the loss."""
    found = {}
    for (document, anchor, k), logits in logits_by_pair(drafter, features, steps).items():
        if drafter.to_draft[features.target_argmax[document, anchor + 1 + k]] >= 0:
            p = (drafter.head @ features.final_hidden[document, anchor + 1 + k]).softmax(-1)
            found[document, anchor, k] = -(p * logits.log_softmax(-1)).sum().item()
    return found


def _unweighted(anchors, fraction, *given):
    subset, place = sample_anchors(anchors, fraction, *given)
    return replace(subset, weight=(subset.weight > 0).float()), place


def test_every_anchor_is_drawn_equally_often():
    anchors = find_anchors(torch.tensor([[d == "1" for d in "01111111"]]), 2)  # 6 anchors
    subsets = every_subset(anchors, 0.5)
    assert len(subsets) == 20
    drawn = np.array([[anchor in kept for anchor in range(6)] for (kept,), seeds in subsets.items() for _ in seeds])
    assert abs(drawn.mean(0) - 0.5).max() < 0.1  # standard error 0.025


def test_sampling_is_a_function_of_the_generator_alone():
    drafter, features = examples.drafter("hidden"), examples.features()
    first, second, other = (
        ttt_loss(drafter, features, anchor_fraction=0.3, generator=torch.Generator().manual_seed(seed)).loss.item()
        for seed in (3, 3, 4)
    )
    assert first == second != other


@pytest.mark.parametrize("rows", [0, 1, 40, 300])  # 256 rows are a chunk
def test_soft_cross_entropy_equals_autograd(rows):
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(rows, 8, generator=generator), torch.randn(11, 8, generator=generator)
    probabilities = torch.randn(20, 11, generator=generator).softmax(-1)
    index = torch.randint(20, (rows,), generator=generator)
    weight = torch.rand(rows, generator=generator) * 3
    fast, slow = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    total, best = SoftCrossEntropy.apply(fast, head, probabilities, index, weight, score_rows, 0.0)
    reference = -(weight[:, None] * probabilities[index] * (slow @ head.T).log_softmax(-1)).sum()
    (2.5 * total).backward()
    (2.5 * reference).backward()
    assert torch.allclose(total, reference, rtol=1e-5)
    assert torch.allclose(fast.grad, slow.grad, atol=1e-5)
    assert torch.equal(best, (hidden @ head.T).argmax(-1))


# The cures' losses


def build(**options):
    config = DrafterConfig(**{"paradigm": "hybrid", **options})
    return examples.roughened(build_drafter(config, examples.target(), examples.live().spec, DRAFT_IDS, seed=1))


def logits_of(drafter, features, **options):
    with torch.no_grad():
        steps = draft_steps(drafter, features, find_anchors(features.answer_mask, STEPS), STEPS, **options)
        return torch.stack([drafter.norm(output) @ drafter.head.T for *_, output in steps], 2)


def gradients(drafter, loss):
    drafter.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in drafter.named_parameters()}


def test_while_the_branch_warms_up_the_hybrid_is_its_cross_only_twin():
    drafter, twin, features = build(), build(cross_only=True), examples.features()
    twin.load_state_dict({n: t for n, t in drafter.state_dict().items() if n in twin.state_dict()})
    assert torch.equal(logits_of(drafter, features, cross_alone=True), logits_of(twin, features))
    assert not torch.allclose(logits_of(drafter, features), logits_of(twin, features), atol=0.1)
    config = replace(SHORT, branch_warmup_steps=2)
    at = lambda built, given, step: training_loss(built, features, given, step, torch.Generator().manual_seed(0)).loss
    assert at(drafter, config, 1) == at(twin, SHORT, 1) and at(drafter, config, 2) == at(drafter, SHORT, 2)


def test_the_auxiliary_loss_is_the_branchs_own_on_the_same_kind_of_chain():
    drafter, features = build(), examples.features()
    config = replace(SHORT, branch_loss_weight=0.25, anchor_fraction=1.0)
    result = training_loss(drafter, features, config, 0, torch.Generator())
    found = gradients(drafter, result.loss)
    whole, branch = (ttt_loss(drafter, features, ttt_steps=3, cross_alone=alone) for alone in (False, True))
    assert result.loss.item() == pytest.approx(whole.loss.item() + 0.25 * branch.loss.item())
    assert torch.equal(result.step_loss, whole.step_loss)
    parts = [gradients(drafter, part.loss) for part in (whole, branch)]
    for name, gradient in found.items():
        assert torch.allclose(gradient, parts[0][name] + 0.25 * parts[1][name], atol=1e-5)
    assert not any(parts[1][n].any() for n in found if n.startswith(("layers.0.attention.", "layers.0.gate.")))
    assert all(parts[1][n].any() for n in found if n.startswith(BRANCH))

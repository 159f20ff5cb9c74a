"""The paper's claims, each with its statistic and threshold stated before any data, and the verdicts on them (no torch).

A statistic is a weighted sum of metrics. ``direction`` says on which side of the threshold the claim places it:

    above    statistic > threshold
    below    statistic < threshold
    within   -threshold < statistic < threshold (an equivalence)

A verdict needs the whole 95% interval: on the claim's side it is *reproduced*, on the other side *not reproduced*,
across the threshold *inconclusive*; *not run* if a variant is missing. "Does not help" and "changes nothing" can't be
shown for a margin of 0, so these claims have a ``MARGIN`` in tokens of MAT: they say that a change brings less than that.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .paper import paper_value
from .resampling import Draws, Interval

# The smallest gain that the paper itself calls one is .07 (hybrid over hidden); .05 is what it loses without TTT.
MARGIN = 0.05
LAST = -1  # the last draft step
# What a whole interval on the claim's side and on the other side is called. Controls are no claims of the paper.
WORDS = {
    "claim": ("reproduced", "not reproduced"),
    "control": ("as expected", "not as expected"),
    "hypothesis": ("supported", "not supported"),
    "goal": ("reached", "not reached"),
}
KINDS = {"K": "control", "H": "hypothesis", "B": "goal"}
DIRECTIONS = ("above", "below", "within")


@dataclass(frozen=True)
class Claim:
    """One testable part of a claim; ``claim`` is C8 or, for a part, C8a; K for controls, H for what the paper argues but doesn't measure,
    B for goals of this study's own.

    terms : (weight, variant, metric[, draft_step]) each; their sum is the statistic.
    """

    claim: str
    statement: str
    terms: tuple[tuple, ...]
    direction: str
    threshold: float = 0.0

    @property
    def whole(self) -> str:
        """The claim that this is a part of: C8 of C8a."""
        return self.claim.rstrip("abc")

    @property
    def kind(self) -> str:
        return KINDS.get(self.claim[0], "claim")

    @property
    def variants(self) -> list[str]:
        """The variants that must have been run, in order of mention."""
        return list(dict.fromkeys(variant for _, variant, *_ in self.terms))

    @property
    def statistic(self) -> str:
        """The statistic in words: ``2 expected_mat(kv_2) - expected_mat(kv_1) - expected_mat(kv_4)``."""
        text = ""
        for weight, variant, metric, *step in self.terms:
            sign = " - " if weight < 0 else " + " if text else ""
            factor = "" if abs(weight) == 1 else f"{abs(weight)} "
            name = metric + "".join("[last]" if k == LAST else f"[{k}]" for k in step)
            text += f"{sign}{factor}{name}({variant})"
        return text

    def measured(self) -> "Claim | None":
        """The same claim about measured MAT in place of expected MAT; None if it is not about MAT."""
        terms = tuple(
            (weight, variant, "measured_mat" if metric == "expected_mat" else metric, *step)
            for weight, variant, metric, *step in self.terms
        )
        return None if terms == self.terms else Claim(self.claim, self.statement, terms, self.direction, self.threshold)


def gap(a: str, b: str, metric: str = "expected_mat", *step: int) -> tuple[tuple, ...]:
    """The terms of a's metric minus b's."""
    return (1, a, metric, *step), (-1, b, metric, *step)


STEP = "step_acceptance"
CLAIMS = (
    Claim(
        "C1",
        "`hidden` decays although it is trained with TTT",
        ((1, "hidden", "retention"),),
        "below",
        1.0,
    ),
    Claim(
        "C2",
        "The target's KV cache carries signal: a layer that reads it beats one alone",
        gap("kv_1", "none_1"),
        "above",
    ),
    Claim("C3", "`kv_1` starts below `hidden`", gap("kv_1", "hidden", STEP, 0), "below"),
    Claim(
        "C4",
        "A second `kv` layer gains more than the third and fourth together",
        ((2, "kv_2", "expected_mat"), (-1, "kv_1", "expected_mat"), (-1, "kv_4", "expected_mat")),
        "above",
    ),
    Claim("C5", "`kv_4` retains more than `hidden`", gap("kv_4", "hidden", "retention"), "above"),
    Claim("C6", "Fusing the layers' KV linearly beats stacking it as heads", gap("kv_2", "kv_2_heads"), "above"),
    Claim("C7", "Un-rotating RoPE changes MAT by less than .05", gap("kv_2_unrotate", "kv_2"), "within", MARGIN),
    Claim("C8a", "`hybrid` beats `hidden`", gap("hybrid", "hidden"), "above"),
    Claim(
        "C8b",
        "`hybrid` gains more over `hidden` at the last draft step than at step 0",
        (*gap("hybrid", "hidden", STEP, LAST), *gap("hidden", "hybrid", STEP, 0)),
        "above",
    ),
    Claim("C9a", "A warm start beats a random one", gap("hybrid_warm", "hybrid"), "above"),
    Claim(
        "C9b",
        "A warm start beats `hidden` trained on for as many tokens",
        gap("hybrid_warm", "hidden_continued"),
        "above",
    ),
    Claim(
        "C10",
        "Cross-attention alone, warm-started, does not beat `hidden` by .05",
        gap("cross_only_warm", "hidden"),
        "below",
        MARGIN,
    ),
    Claim(
        "C11",
        "Scaling the gradient of draft-side KV by 50 does not gain .05",
        gap("kv_2_grad50", "kv_2"),
        "below",
        MARGIN,
    ),
    Claim("C12a", "A fourth reused layer adds less than .05", gap("kv_2_4kv", "kv_2"), "below", MARGIN),
    Claim("C12b", "An MLP projection of KV is worse than a linear one", gap("kv_2_mlp", "kv_2"), "below"),
    Claim(
        "C12c",
        "KV projected from hidden states is worse than KV from the cache",
        gap("states_2", "kv_2"),
        "below",
    ),
    Claim("C13", "Training without TTT is worse", gap("kv_2_no_ttt", "kv_2"), "below"),
    Claim("K1", "Zeros in place of the target's KV cost MAT", gap("kv_2_zero", "kv_2"), "below"),
    Claim("K2", "Another document's KV costs MAT", gap("kv_2_shuffled", "kv_2"), "below"),
    Claim("K3", "Older KV costs MAT", gap("kv_2_lagged", "kv_2"), "below"),
    Claim(
        "K4", "Post-norm feedback retains more than pre-norm", gap("hidden_post_norm", "hidden", "retention"), "above"
    ),
    Claim("K5", "Post-norm feedback has a higher MAT than pre-norm", gap("hidden_post_norm", "hidden"), "above"),
)

# Of kvshot_lib/metrics/gradients.py: C16 on `flow_draws`, C17 on `gate_draws`, which say what the statistics are. Sparse is
# taken as a tenth or less of what the projections of queries and outputs get, per parameter; keys go with queries, for both
# act through the softmax, values with outputs.
FLOW_CLAIMS = (
    Claim(
        "C16a",
        "Draft-side keys get less than a tenth of the query projection's gradient",
        ((1, "kv_1", "key_gradient"),),
        "below",
        0.1,
    ),
    Claim(
        "C16b",
        "Draft-side values get less than a tenth of the output projection's gradient",
        ((1, "kv_1", "value_gradient"),),
        "below",
        0.1,
    ),
)
GATE_CLAIMS = (
    Claim(
        "C17",
        "The warm hybrid's mean gate is below .2 after a tenth of its training",
        ((1, "hybrid_warm", "gate_after_a_tenth"),),
        "below",
        0.2,
    ),
)

# What the paper expects of the way out that it leaves untried. A block of two layers against TTT of two layers over the same KV: on equal
# tokens, where it takes less arithmetic, and with so many more anchors that it takes as much (`compute`).
BLOCK_CLAIMS = (
    Claim(
        "C18a",
        "Two layers over KV: block-wise training beats TTT on equal tokens",
        gap("block_kv_2", "kv_2"),
        "above",
    ),
    Claim(
        "C18b",
        "Two layers over KV: block-wise training beats TTT at equal training compute",
        gap("block_kv_2_equal_compute", "kv_2"),
        "above",
    ),
)


def query_claims(variants: Collection[str]) -> tuple[Claim, ...]:
    """C15, of `query_statistics.query_draws`, which says what the statistics are; with `kv_2` in place of `kv_4` where that was not run.

    Query estimation is the bottleneck if deeper drafters look more where the target looks (a), draft longer too (b), and a shallow one
    that is given the target's true query gains what the paper calls a gain (c).
    """
    deep = "kv_2" if "kv_2" in variants and "kv_4" not in variants else "kv_4"
    return (
        Claim(
            "C15a",
            f"`{deep}` looks at more of what the target looks at than `kv_1`",
            gap(deep, "kv_1", "overlap_recall"),
            "above",
        ),
        Claim("C15b", f"`{deep}` drafts longer than `kv_1`", gap(deep, "kv_1", "mat_as_trained"), "above"),
        Claim(
            "C15c",
            "The target's true query gains `kv_1` .05 or more",
            ((1, "kv_1", "oracle_gain"),),
            "above",
            MARGIN,
        ),
    )


# Of kvshot_lib/metrics/decode_claims.py, on `decode_draws`, which says what the statistics are. The paper found 5.04 tokens against 5.01, and 5-10% more
# draft latency. Latency does not depend on what the weights are, so `hidden` stands for every drafter of its kind.
DECODE_CLAIMS = (
    Claim(
        "C14a",
        "In tree decoding a warm `hybrid` gets more tokens per target forward than `hidden` trained on for as many tokens",
        gap("hybrid_warm", "hidden_continued", "tree_decoded_mat"),
        "above",
    ),
    Claim(
        "C14b",
        "So it does in chain decoding",
        gap("hybrid_warm", "hidden_continued", "chain_decoded_mat"),
        "above",
    ),
    Claim(
        "C14c",
        "Its cross-attention makes a draft step less than 10% slower than that of `hidden` (ln 1.1 = .0953)",
        gap("hybrid_warm", "hidden", "log_draft_step_s"),
        "below",
        0.0953,
    ),
)


def shift_claim(variants: Collection[str]) -> Claim:
    """H1, of `interaction.shift_draws`: at the last draft step `hidden` falls faster with the attention shift than `kv_2` (than `kv_1`, where
    `kv_2` was not run). The slopes are of log-odds per standard deviation of shift, at equal entropy, so the statistic is the
    interaction paradigm × shift.
    """
    kv = "kv_1" if "kv_1" in variants and "kv_2" not in variants else "kv_2"
    statement = f"Where the target's attention has shifted further, `hidden` loses more than `{kv}`, at equal entropy"
    return Claim("H1", statement, gap(kv, "hidden", "shift_slope", LAST), "above")


def in_favour(found: Interval, direction: str, threshold: float) -> Interval:
    """How far a statistic lies on the claim's side of its threshold: positive numbers speak for the claim.

    0.02 [-0.01, 0.08] is 0.02 [-0.01, 0.08] in favour of "above 0", -0.02 [-0.08, 0.01] of "below 0" and, as nothing in
    it is nearer to 0 than 0 or further than 0.08, 0.03 [-0.03, 0.05] of "within 0.05".
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} must be one of {', '.join(DIRECTIONS)}")
    value, low, high = found.value, found.low, found.high
    if direction == "within":
        nearest = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
        return Interval(threshold - abs(value), threshold - max(abs(low), abs(high)), threshold - nearest)
    if direction == "below":
        return Interval(threshold - value, threshold - high, threshold - low)
    return Interval(value - threshold, low - threshold, high - threshold)


def verdict(found: Interval, claim: Claim) -> str:
    """The verdict on a claim (or a control, in other words) from its statistic."""
    told = {"above": WORDS[claim.kind][0], "below": WORDS[claim.kind][1]}
    return told.get(in_favour(found, claim.direction, claim.threshold).verdict(0), "inconclusive")


def combine(verdicts: list[str]) -> str:
    """The verdict on a claim of several parts: one refuted part refutes it, and only all parts together carry it."""
    refuted = {words[1] for words in WORDS.values()} & set(verdicts)
    if refuted:
        return refuted.pop()
    return verdicts[0] if len(set(verdicts)) == 1 else "inconclusive"


def scorecard(draws: Draws, paper: pd.DataFrame, claims: tuple[Claim, ...] = CLAIMS) -> pd.DataFrame:
    """A row for each claim, part of a claim and control: its statistic with interval, threshold and verdict.

    Intervals are over documents and seeds; ``seeds`` is the fewest seeds of a variant involved. ``measured_*`` is the
    same about measured MAT (empty where a claim is not about MAT), ``paper_value`` the statistic on the paper's numbers.
    A claim of several parts has a further row with the combined verdict and no statistic, ahead of them.
    """
    steps = draws.keys["draft_step"].dropna()
    last = int(steps.max()) if len(steps) else 0
    rows = []
    for whole in dict.fromkeys(claim.whole for claim in claims):
        parts = [_row(claim, draws, paper, last) for claim in claims if claim.whole == whole]
        rows += [_combined(whole, parts), *parts] if len(parts) > 1 else parts
    columns = [
        "claim",
        "kind",
        "statement",
        "statistic",
        "paper_value",
        "value",
        "low",
        "high",
        "direction",
        "threshold",
    ]
    columns += ["verdict", "measured_value", "measured_low", "measured_high", "measured_verdict", "seeds", "missing"]
    return pd.DataFrame(rows, columns=columns).astype({"seeds": "Int64"})


def _row(claim: Claim, draws: Draws, paper: pd.DataFrame, last: int) -> dict:
    """The row of one claim."""
    row = {"claim": claim.claim, "kind": claim.kind, "statement": claim.statement, "statistic": claim.statistic}
    row |= {"direction": claim.direction, "threshold": claim.threshold}
    terms = _at_last(claim.terms, last)
    row["paper_value"] = sum(weight * paper_value(paper, *term) for weight, *term in terms)
    missing = [variant for variant in claim.variants if variant not in draws.variants]
    measured = claim.measured()
    if missing:
        told = "not run" if measured else ""
        return row | {"verdict": "not run", "measured_verdict": told, "missing": " ".join(missing)}
    found = draws.contrast(*terms)
    row |= {"value": found.value, "low": found.low, "high": found.high, "verdict": verdict(found, claim)}
    row |= {"measured_verdict": "", "missing": "", "seeds": min(map(draws.seeds, claim.variants))}
    if measured:
        found = draws.contrast(*_at_last(measured.terms, last))
        row |= {"measured_value": found.value, "measured_low": found.low, "measured_high": found.high}
        row["measured_verdict"] = verdict(found, measured)
    return row


def _combined(whole: str, parts: list[dict]) -> dict:
    """The row of a claim of several parts; a part that is not about MAT has one verdict for both columns."""
    names = [part["claim"] for part in parts]
    row = {"claim": whole, "kind": parts[0]["kind"], "statement": f"{', '.join(names[:-1])} and {names[-1]}"}
    seeds = [part["seeds"] for part in parts if "seeds" in part]
    missing = " ".join(dict.fromkeys(name for part in parts for name in part["missing"].split()))
    return row | {
        "statistic": "all parts",
        "verdict": combine([part["verdict"] for part in parts]),
        "measured_verdict": combine([part["measured_verdict"] or part["verdict"] for part in parts]),
        "seeds": min(seeds, default=pd.NA),
        "direction": "",
        "threshold": np.nan,
        "missing": missing,
    }


def _at_last(terms: tuple[tuple, ...], last: int) -> list[tuple]:
    """Terms with the number of the last draft step in place of ``LAST``."""
    return [(*term[:3], *(last if step == LAST else step for step in term[3:])) for term in terms]

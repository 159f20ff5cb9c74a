"""Numbers of the recorded runs, for tests of what a person wrote about them: drawn once a process."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pandas as pd
from notebook_checks import ROOT
from scipy.special import stdtrit

from kvshot_lib.metrics import decoding, resampling, tables
from kvshot_lib.metrics.acceptance import validation_mat
from kvshot_lib.metrics.comparisons import p_value
from kvshot_lib.metrics.diagnostics import context_draws


def table(name: str, profile: str = "full") -> pd.DataFrame:
    """A recorded table; the caller's own, read once a process."""
    return _read(name, profile).copy(deep=False)  # pandas copies what is written to


@cache
def _read(name: str, profile: str) -> pd.DataFrame:
    return tables.read(ROOT / "data/recorded" / profile, name)


@cache
def draws(profile: str = "full") -> resampling.Draws:
    """Every metric on the documents and on the resamples that notebooks draw by default."""
    return resampling.draw(table("counts", profile), table("run_lengths", profile), samples=2000, seed=0)


@cache
def summary(profile: str = "full") -> pd.DataFrame:
    """Mean over seeds of every metric."""
    return resampling.summary_table(draws(profile))


def value(variant: str, metric: str, step: int | None = None, profile: str = "full") -> float:
    """A metric's mean over seeds."""
    return float(draws(profile).rows(variant, metric, step)[:, 0].mean())


def parameters(variant: str, profile: str = "full") -> int:
    """Its trained weights."""
    return table("runs", profile).query("variant == @variant")["parameters"].iloc[0]


def larger(a: str, b: str, profile: str = "full") -> float:
    """How many more weights a has than b, in per cent."""
    return 100 * (parameters(a, profile) / parameters(b, profile) - 1)


def bought(a: str, b: str, more: str, fewer: str, profile: str = "full", sized: str = "") -> float:
    """Tokens that a's weights beyond b's would bring, at the rate at which ``more`` gains on ``fewer``.

    ``sized`` : a profile that has a and b, if another one.
    """
    (own, others), (most, least) = (
        [parameters(v, of) for v in pair] for pair, of in (((a, b), sized or profile), ((more, fewer), profile))
    )
    return minus(more, fewer, profile=profile)[0] * (own - others) / (most - least)


@cache
def _on_validation(profile: str) -> pd.Series:
    """Expected MAT on validation texts at the end of training, mean over seeds."""
    curves = validation_mat(table("history", profile)).groupby(["variant", "seed"])["value"].last()
    return curves.groupby("variant").mean()


def sampled(a: str, b: str, profile: str = "full") -> float:
    """a minus b by expected MAT on validation texts, which are sampled."""
    return _on_validation(profile)[a] - _on_validation(profile)[b]


def predicted(variant: str, profile: str = "full") -> float:
    """The cost model's speedup of a chain of seven: tokens per forward over the bytes of drafting and verifying."""
    counted = table("compute", profile).query("variant == @variant").iloc[0]
    return value(variant, "measured_mat", profile=profile) / (1 + counted["chain_bytes"] / counted["target_bytes"])


def minus(
    a: str, b: str, metric: str = "measured_mat", *step: int, profile: str = "full"
) -> tuple[float, float, float]:
    """a's metric minus b's, with its interval over documents and seeds: (value, low, high)."""
    found = draws(profile).contrast((1, a, metric, *step), (-1, b, metric, *step))
    return found.value, found.low, found.high


def by_length(variant: str, profile: str = "full") -> pd.Series:
    """The cost model's speedup of a chain by its number of guesses; maps of new tokens counted in proportion to them."""
    counted = table("compute", profile).query("variant == @variant")
    cost = counted["chain_bytes"].mean() / counted["target_bytes"].mean()
    accepted = [value(variant, "chain_acceptance", k, profile) for k in range(7)]
    tokens = 1 + np.cumprod(accepted).cumsum()
    return pd.Series({n: tokens[n - 1] / (1 + n / 7 * cost) for n in range(1, 8)})


def guesses(a: str, b: str, number: int) -> list[float]:
    """Tokens that chains of so many guesses yield, a's minus b's, with the interval over answers and seeds."""
    sides = []
    for variant in (a, b):
        accepted = np.stack([draws().rows(variant, "chain_acceptance", k) for k in range(number)])
        sides.append((draws().weights_of(variant) * accepted.cumprod(0).sum(0)).sum(0))
    return [*vars(resampling.interval(sides[0] - sides[1])).values()]


def pooled(
    drawn: resampling.Draws, which: tuple, a: str, b: str = "", beside: resampling.Draws | None = None
) -> tuple[float, float, float, float]:
    """a's metric (minus b's), with the variance over seeds taken as that of all variants: (value, low, high, p).

    All are those of ``drawn``, there and in ``beside``; ``which`` is a metric and its draft step.
    """
    sides = [(sign, drawn, variant) for sign, variant in ((1, a), (-1, b)) if variant]
    return summed(sides, which, drawn.variants, [part for part in (drawn, beside) if part])


def summed(
    terms: Sequence[tuple], which: tuple, variants: Sequence[str], pool: Sequence[resampling.Draws]
) -> tuple[float, float, float, float]:
    """Σ weight · metric of (weight, draws, variant): (value, low, high, p).

    The variance over seeds is that of ``variants`` in ``pool``. Satterthwaite's degrees, documents as known.
    """
    trained = [part.rows(v, *which)[:, 0] for part in pool for v in variants if part.has(v, *which)]
    degrees = sum(len(seeds) - 1 for seeds in trained)
    sides = [weight * part.rows(variant, *which) for weight, part, variant in terms]
    over_seeds = sum(len(seeds) * seeds.var() for seeds in trained) / degrees * sum(1 / len(rows) for rows in sides)
    found = sum(rows.mean(0) for rows in sides)
    whole = over_seeds + found[1:].var(ddof=1)
    freedom = degrees * (whole / over_seeds) ** 2
    half = stdtrit(freedom, 0.975) * np.sqrt(whole)
    return found[0], found[0] - half, found[0] + half, p_value(found[0], np.sqrt(whole), freedom)


def decoded_gap(metric: str, a: str, b: str, plan: str, *lots: str) -> list[float]:
    """a minus b with its interval, on the prompts that both answered."""
    rows = pd.concat([table(name) for name in lots or ("decode_duel",)])
    rows = rows[rows["variant"].isin([a, b])]
    found = {key[0]: ratio[metric] for key, _, _, ratio in decoding.drawn(rows, 2000, 0) if key[-1] == plan}
    return [*vars(resampling.interval(found[a] - found[b])).values()]


class InARow:
    """Draws of one metric: the share of anchors at which all seven guesses are right."""

    def __init__(self, drawn: resampling.Draws):
        self.drawn, self.variants = drawn, drawn.variants

    def has(self, variant: str, *_) -> bool:
        return self.drawn.has(variant, "measured_mat")

    def rows(self, variant: str, *_) -> np.ndarray:
        return np.prod([self.drawn.rows(variant, "chain_acceptance", k) for k in range(7)], axis=0)


class Only:
    """Draws of some drafters."""

    def __init__(self, drawn: resampling.Draws, variants: Sequence[str]):
        self.drawn, self.rows, self.variants = drawn, drawn.rows, variants

    def has(self, variant: str, *which) -> bool:
        return variant in self.variants and self.drawn.has(variant, *which)


def of_one_layer(*terms: tuple, which: tuple = ("measured_mat",)) -> tuple[float, float, float, float]:
    """Σ weight · metric of (weight, profile, variant): value, low, high, p, with the spread over seeds as in notebook 16.

    It is pooled from the profiles named and from the drafters of `long` in `sources`; of the others there, if named.
    """
    one, deep = (draws(profile).variants for profile in ("one_layer", "long"))
    named = {(profile, variant in one) for _, profile, variant in terms} | {("sources", False)}
    pool = [Only(draws(profile), one if shallow else deep) for profile, shallow in named]
    return summed([(w, draws(profile), v) for w, profile, v in terms], which, [*one, *deep], pool)


def judged_one_layer(
    a: str, b: str, which: tuple = ("measured_mat",), *, grown: bool = False
) -> tuple[float, float, float, float]:
    """a's metric minus b's after long training with one layer: value, low, high, p.

    ``grown`` : less the same after 15 million tokens.
    """
    own = draws("one_layer").variants
    sides = [(w, "one_layer" if v in own else "long", v) for w, v in ((1, a), (-1, b))]
    return of_one_layer(*sides, *((-w, "sources", v) for w, _, v in sides if grown), which=which)


def one_minus(a: str, b: str, which: tuple = ("measured_mat",), *, grown: bool = False) -> tuple[float, float, float]:
    """a minus b after long training with one layer: value and interval."""
    return judged_one_layer(a, b, which, grown=grown)[:3]


def longer(
    a: str, b: str = "", which: tuple = ("measured_mat",), drawn: resampling.Draws | None = None
) -> tuple[float, float, float]:
    """a (minus b) after long training: value and interval."""
    return pooled(drawn or draws("long"), which, a, b, draws("sources"))[:3]


def less(
    profile: str, other: str, a: str, b: str = "", which: tuple = ("measured_mat",), drawn: Callable = draws
) -> tuple[float, float, float, float]:
    """a's metric (minus b's) in a profile, less the same in another one (""): value, low, high, p.

    The spread over seeds is pooled as in notebook 16. ``drawn`` gives a profile's draws.
    """
    folders = [(1, drawn(profile)), *([(-1, drawn(other))] if other else [])]
    sides = [(w * sign, part, v) for sign, part in folders for w, v in ((1, a), (-1, b)) if v]
    pool = [drawn(name) for name in {profile, "sources", other or profile}]
    return summed(sides, which, draws("long").variants, pool)


def repeated(a: str, b: str, which: tuple = ("measured_mat",)) -> tuple[float, float, float]:
    """a minus b after as long a training on little text: value and interval."""
    return less("repeat", "", a, b, which)[:3]


def in_a_row(a: str, b: str, profile: str) -> tuple[float, float, float]:
    """a's share of anchors with all seven guesses right, minus b's: value and interval."""
    return less(profile, "", a, b, ("all_right",), lambda name: InARow(draws(name)))[:3]


def all_right(variant: str, profile: str) -> float:
    """Share of anchors at which all seven guesses are right."""
    return float(InARow(draws(profile)).rows(variant)[:, 0].mean())


def turned(numbers: tuple[float, float, float]) -> tuple[float, float, float]:
    """A loss as a positive number, with its interval."""
    found, low, high = numbers
    return -found, -high, -low


@cache
def card_ratios(profile: str = "full/h200") -> tuple:
    """Decoding, by default on a GPU: the answers, and by variant and plan the ratios of `metrics.decoding`."""
    rows = table("decode_prompts", profile)
    ratios = {(key[0], key[-1]): ratio for key, _, _, ratio in decoding.drawn(rows, 2000, 0)}
    for ratio in ratios.values():
        ratio["round"] = ratio["decoded_mat"] / ratio["speedup"]  # seconds of one, in steps of the target alone
        ratio["draft_forwards"] = ratio["draft_cost"] * ratio["verify_cost"]  # of a round's drafts
    return rows, ratios


def on_card(variant: str, plan: str, metric: str, profile: str = "full/h200") -> list[float]:
    """One of them with its interval."""
    return [*vars(resampling.interval(card_ratios(profile)[1][variant, plan][metric])).values()]


@cache
def fitted(variant: str, plan: str, profile: str = "full/h200") -> np.ndarray:
    """Milliseconds of a round and of an answer besides, by a line through answers: [2, 1 + resamples of the prompts]."""
    rows = table("decode_prompts", profile).query("variant == @variant and plan == @plan")
    prompts, names = pd.factorize(rows["prompt"])
    weights = resampling.resample_weights(len(names), 2000, 0)[:, prompts].astype(float)
    rounds, took = rows["forwards"].to_numpy(float), 1e3 * rows["seconds"].to_numpy()
    both = [np.average(np.broadcast_to(x, weights.shape), axis=1, weights=weights) for x in (rounds, took)]
    away = rounds - both[0][:, None], took - both[1][:, None]
    slope = (weights * away[0] * away[1]).sum(1) / (weights * away[0] ** 2).sum(1)
    return np.stack([slope, both[1] - slope * both[0]])


def in_a_long_answer(variant: str, profile: str = "full/h200") -> list[float]:
    """What two guesses would speed up if an answer took its rounds and nothing else, with interval."""
    steps = fitted(variant, "2", profile)[0] / fitted(variant, "-", profile)[0]
    return [*vars(resampling.interval(card_ratios(profile)[1][variant, "2"]["decoded_mat"] / steps)).values()]


def benched(what: str, column: str = "value", card: str = "NVIDIA H200") -> float:
    """A speed of `kvshot bench` (on a GPU), or its floor."""
    rows = tables.read_one(ROOT / "data/recorded/bench.csv", "bench").set_index(["what", "card"])
    return rows.loc[(f"{what}, smollm2-135m-instruct", card), column]


TRAINED_ON = {"512": "context_512", "2,048": "context_2048"}  # tokens of a training text


@cache
def by_context(documents: tuple[int, ...] = ()) -> resampling.Draws:
    """Acceptance by length of context, on all or some documents; "kv_2 on 512" is named by what it was trained on."""
    halves = [
        table("context", profile).assign(variant=lambda t, trained=trained: t["variant"] + f" on {trained}")
        for trained, profile in TRAINED_ON.items()
    ]
    both = pd.concat(halves)
    chosen = both["document"].isin(documents) if documents else both["document"] >= 0
    return context_draws(both[chosen], 512, samples=2000, seed=0)


def in_context(variant: str, *metrics: str, minus: str = "") -> list[float]:
    """A sum of a drafter's metrics, less that of another, with its interval over documents and seeds."""
    terms = [(1, variant, metric) for metric in metrics] + [(-1, minus, metric) for metric in metrics if minus]
    return [*vars(by_context().contrast(*terms)).values()]

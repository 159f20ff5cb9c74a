"""What the diagnostics measured (`probes`), as statistics of each run with draws over documents (no torch).

A document is here an evaluation document, a long dialogue of ``context``, a sequence of ``gradient_flow``, or a
validation document of the gate's record.
"""

import numpy as np
import pandas as pd

from ..drafters.variants import parameters_of
from ..errors import StudyError
from .resampling import KEYS, Draws, draw_ratios, drawn_as

CONTEXT = 512  # the longest context that drafters are trained on
CLAIM_AT = 0.1  # C17 is about the gate after this share of the training
RATIOS = {"key_gradient": ("k_proj", "q_proj"), "value_gradient": ("v_proj", "o_proj")}


def overlap_draws(overlap: pd.DataFrame, samples: int = 2000, seed: int = 0) -> Draws:
    """C15a's statistic of each run.

    overlap_recall : recall (without the sink) of the target's 8 largest prefix entries by the drafter's last layer,
        over all measured draft steps and reused target layers.
    """
    rows = overlap[(overlap["source"] == "drafter") & overlap["recall"].notna()]
    rows = rows[rows["layer"] == rows.groupby("variant")["layer"].transform("max")]
    recall = draw_ratios(rows.assign(top=rows["recall"] * rows["anchors"], bottom=rows["anchors"]), (), samples, seed)
    runs = recall.keys[["variant", "seed"]].itertuples(index=False, name=None)
    return drawn_as([[*run, "overlap_recall", None] for run in runs], recall.values, samples, seed)


def nearest_context(flow: pd.DataFrame, context: int = CONTEXT) -> int:
    """The longest measured context of at most ``context`` tokens (the shortest one, if all are longer)."""
    measured = np.unique(flow["context_length_tokens"])
    return int(max([c for c in measured if c <= context], default=measured[0]))


def flow_draws(flow: pd.DataFrame, samples: int = 2000, seed: int = 0) -> Draws:
    """C16's statistics of each run: draft-side ``key_gradient`` and ``value_gradient``, all per parameter.

    The first is the draft-side part of ∂L/∂W_k over ∂L/∂W_q, the second that of ∂L/∂W_v over ∂L/∂W_o, in the branch
    that reads the target's KV (in `hidden`, its only one), at the longest context that training knew. A gradient per
    parameter is √(Σ ‖∂L/∂W‖² / Σ parameters) over documents and layers. A hybrid has those of its self branch too,
    ``self_key_gradient`` and ``self_value_gradient``.
    """
    if flow.empty:
        return drawn_as([], [], samples, seed)
    at = flow["context_length_tokens"] == nearest_context(flow)
    rows = flow[at & (flow["side"] == "draft") & flow["draft_step"].isna()]
    key = ["variant", "seed", "document", "layer", "branch", "matrix"]
    wide = rows.pivot(index=key, columns="quantity", values="value").reset_index().dropna(subset=["grad_norm"])
    wide = wide.assign(top=wide["grad_norm"] ** 2, bottom=wide["numel"])
    drawn = draw_ratios(wide, ["branch", "matrix"], samples, seed, root=True)
    names = drawn.keys[["variant", "seed", "branch", "matrix"]].itertuples(index=False, name=None)
    found, made = dict(zip(names, drawn.values, strict=True)), {}
    for variant, run, branch, matrix in found:
        prefix = "self_" if branch == "self" and (variant, run, "cross", "q_proj") in found else ""
        for metric, (part, against) in RATIOS.items():
            if matrix == part:
                ratio = found[variant, run, branch, part] / found[variant, run, branch, against]
                made[variant, run, prefix + metric, None] = ratio
    return drawn_as(list(made), list(made.values()), samples, seed)


def acting_gate(gradients: pd.DataFrame) -> pd.DataFrame:
    """Rows of the mean gate, ``value`` as it acts: a variant with a floor has floor + (1 - floor) · sigmoid.

    The record (``training.record``) holds the sigmoid alone.
    """
    rows = gradients[gradients["quantity"] == "gate_mean"]
    floors = {name: parameters_of(name).get("gate_floor", 0.0) for name in rows["variant"].unique()}
    floor = rows["variant"].map(floors).astype(float)
    return rows.assign(value=floor + (1 - floor) * rows["value"])


def gate_draws(gradients: pd.DataFrame, samples: int = 2000, seed: int = 0) -> Draws:
    """The mean gate of each run: C17's ``gate_after_a_tenth``, ``gate_least`` and ``gate_at_the_end``.

    The first is that at the first record that has a tenth of the training's steps behind it.
    """
    rows = acting_gate(gradients)
    drawn = draw_ratios(rows.assign(top=rows["value"], bottom=1.0), ["step"], samples, seed)
    made = {}
    for run, own in drawn.keys.groupby(["variant", "seed"], sort=False):
        own = own.sort_values("step")
        gates, late = drawn.values[own.index], (own["step"] >= CLAIM_AT * own["step"].max()).to_numpy()
        made[(*run, "gate_after_a_tenth", None)] = gates[late][0]
        made[(*run, "gate_least", None)] = gates.min(0)
        made[(*run, "gate_at_the_end", None)] = gates[-1]
    return drawn_as(list(made), list(made.values()), samples, seed)


def context_draws(context: pd.DataFrame, window: int, samples: int = 2000, seed: int = 0) -> Draws:
    """Expected MAT of each run by length of context and window, and what a long context does to it.

    A bin's metric is ``mat_4096`` without a window, ``mat_4096_window_512`` with one; ``window_tokens`` (0: none) and
    ``bin_low`` are columns, too. Of a run's bins come

    last : the last bin, without a window. fall : the bin from ``CONTEXT`` / 2 on, less the last.
    window_gain : the last bin with ``window``, less that without. Of .4, then .1 in the last bin and .3 there with it
    at one draft step, they are 1.1, .3 and .2.

    Raises
    ------
    StudyError : no run has these bins and windows.
    """
    if context.empty:
        raise StudyError("no acceptance by length of context was measured: `kvshot measure context` does it")
    counted = context.assign(top=context["matches"], bottom=context["anchors"]).sort_values("draft_step", kind="stable")
    drawn = draw_ratios(counted, ["window_tokens", "bin_low", "draft_step"], samples, seed)
    keys, values, last = [], [], context["bin_low"].max()
    for run, own in drawn.keys.groupby(["variant", "seed"], sort=False):
        bins = {}
        for place, cell in own.groupby(["window_tokens", "bin_low"]):
            bins[place] = 1 + drawn.values[cell.index].cumprod(0).sum(0)
            held = cell[["anchors", "documents"]].iloc[-1]
            name = f"mat_{place[1]}" + f"_window_{place[0]}" * (place[0] > 0)
            keys.append([*run, name, None, *place, *held])
        if not {(0, CONTEXT // 2), (0, last), (window, last)} <= bins.keys():
            raise StudyError(f"context needs anchors at {CONTEXT // 2} tokens and windows 0 and {window}: measure them")
        made = {"last": bins[0, last], "fall": bins[0, CONTEXT // 2] - bins[0, last]}
        made["window_gain"] = bins[window, last] - bins[0, last]
        keys += [[*run, metric, None, None, None, *held] for metric in made]
        values += [*bins.values(), *made.values()]
    return drawn_as(keys, values, samples, seed, [*KEYS, "window_tokens", "bin_low", "anchors", "documents"])

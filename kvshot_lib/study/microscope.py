"""`kvshot examine`: a checkpoint under the microscope, told in sentences, a table and a page that needs no network."""

import html
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import yaml
from matplotlib.figure import Figure

from ..drafters.checkpoint import load_drafter
from ..drafters.eagle3 import export_eagle3
from ..drafters.runs import DESCRIPTION
from ..files import write_atomically, write_csv
from ..metrics.resampling import with_interval
from ..metrics.tables import rounded
from ..plots.forest import forest
from ..plots.lines import lines
from ..probes.answers import BEGUN, DIFFER, ENDS, OUTSIDE, SAME, SHARE
from ..probes.drift import COSINE, DRIFT, HELD, RECALL
from ..probes.examine import AS_IT_IS, PLAIN, SHUFFLED, VISIBLE, ZERO, Examination, examine, helps
from ..target.load import load_target
from ..target.wheels import DEFAULT_TARGET
from ..text.prompts import load_prompts
from .fingerprints import fingerprint

STEP = "step_acceptance"
COLOURS = ("#0072B2", "#D55E00", "#777777", "#CC79A7")
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
svg {{ max-width: 100%; height: auto }}
table {{ border-collapse: collapse }}
td, th {{ padding: .15em .8em; text-align: right; border-top: 1px solid #ddd; white-space: nowrap }}
</style><h1>{title}</h1><ul>{findings}</ul>{body}</html>
"""


def examine_checkpoint(
    checkpoint: str, *, target: str = DEFAULT_TARGET, prompts: str = "study", count: int = 28, new_tokens: int = 96,
    draft_length: int = 7, rounds: int = 2, fields: Sequence[str] = (), device: str = "auto",
    out: str = "results/examined",
) -> Path:  # fmt: skip
    """Examine a checkpoint (of ours, or in EAGLE-3's form); prints what is found and returns the page beside the table.

    Parameters
    ----------
    prompts, count : whose first turns the target answers, and how many of them. fields : ``NAME=VALUE`` of its config.
    out : where NAME.html, NAME.csv and finished parts go; checkpoints of one target share its answers there.
    """
    folder, model = Path(checkpoint), load_target(target, device=device, dtype="float32")
    name = folder.resolve().name
    if (folder / DESCRIPTION).is_file():
        folder = export_eagle3(load_drafter(folder, model), model, Path(out) / "parts" / name)
    given = {name: yaml.safe_load(value) for name, _, value in (field.partition("=") for field in fields)}
    found = examine(
        folder, model, load_prompts(prompts)[:count], kept=Path(out) / "parts", draft_length=draft_length,
        new_tokens=new_tokens, rounds=rounds, fields=given, fingerprint=fingerprint("probes.examine", {}),
    )  # fmt: skip
    write_csv(Path(out) / f"{name}.csv", rounded(found.table))
    print(*(told := findings(found)), sep="\n")
    text = page(f"{checkpoint} on {model.name}", told, found)
    return write_atomically(Path(out) / f"{name}.html", lambda path: path.write_text(text, encoding="utf-8"))


def findings(found: Examination) -> list[str]:
    """What was found, a sentence or two each."""
    base, told = found.base, []
    steps = [found.of(base, STEP, int(step)).value for step in sorted(found.table["draft_step"].dropna().unique())]
    if base != AS_IT_IS:
        told.append(f"As it is, it can't be read: {found.unreadable[AS_IT_IS]}.")
    told.append(f"Read {base}, it accepts {found.of(base)} tokens per target forward, teacher-forced.")
    before = AS_IT_IS if base == AS_IT_IS else None
    for number, one in enumerate(found.faults):
        name = " + ".join(own.name for own in found.faults[: number + 1])
        gain = f" ({found.gain(name, base=before)} more)" if before else ""
        now = f"{found.of(name, SHARE).value:.3f} of all drafts are right{gain}, {found.of(name)} tokens per forward"
        told.append(f"{'LIKELY FAULT' if not number else 'AND THEN'}: {one.fault}. So read, {now}.")
        before = name
    if not found.faults:
        tried = sum(part == "counterfactual" for part in found.parts.values())
        told.append(f"No fault found: under none of {tried} changes are more drafts right, by {VISIBLE} or more.")
    differing = found.of(SAME, DIFFER).value
    same = "alike" if not differing else f"differently in {100 * differing:.1f}% of rounds; rounding tips only a few"
    told.append(
        f"Decoded, it accepts {found.of(ENDS)}. From the same anchors, decoding and teacher forcing draft {same}."
    )
    told.append(
        f"Where these figures differ: steps that were independent would give {1 + np.cumprod(steps).sum():.3f}; all "
        f"anchors {found.of(base).value:.3f}; those where decoding begins a round {found.of(BEGUN).value:.3f}; with "
        f"the short chains at ends of answers {found.of(ENDS).value:.3f}."
    )
    lost = found.of(base, OUTSIDE).value
    told.append(
        f"{100 * lost:.1f}% of the answers' tokens are not in its draft vocabulary: no step can be right more often "
        f"than {1 - lost:.3f}. With all of them, guessed no worse, step 0 would be {steps[0] / (1 - lost):.3f}."
    )
    share, shuffled, zero = (found.of(name, SHARE).value for name in (base, SHUFFLED, ZERO))
    use = "It reads the target's states" if shuffled < 0.9 * share else "IT HARDLY USES the target's states"
    told.append(f"{use}: {share:.3f} of drafts are right, {shuffled:.3f} with another answer's, {zero:.3f} with none.")
    template = found.gain(PLAIN)
    hint = ": IT WAS TRAINED without this chat template" if helps(template) else ""
    named = {COSINE: "its state's cosine with the target's there", RECALL: "its recall of the target's attention"}
    for metric, what in named.items():
        measured = found.table.query("part == 'drift' and metric == @metric")["draft_step"]
        if len(measured):
            ends = first, last = int(measured.min()), int(measured.max())
            drifted, held = ([found.of(name, metric, step).value for step in ends] for name in (DRIFT, HELD))
            told.append(
                f"From step {first} to {last}, {what} goes from {drifted[0]:.2f} to {drifted[1]:.2f}; what was known "
                f"at the anchor would give {held[0]:.2f} and {held[1]:.2f}."
            )
    told.append(
        f"Without the chat template the share of right drafts, along the same answers, changes by {template}{hint}."
    )
    if (beyond := f"context beyond {found.trained_tokens}") in found.parts:
        inside = found.of(f"context up to {found.trained_tokens}")
        told.append(
            f"Up to the {found.trained_tokens} tokens that it is for it accepts {inside}, beyond {found.of(beyond)}."
        )
    return told


def page(title: str, told: Sequence[str], found: Examination) -> str:
    """One page of findings, two figures and the tables of each part."""
    table, escape = found.table, html.escape
    names = [found.base, *[name for name in (" + ".join(one.name for one in found.faults), SHUFFLED, ZERO) if name]]
    colours = dict(zip(dict.fromkeys(names), COLOURS))
    curves = table[table["metric"].eq(STEP) & table["variant"].isin(names)]
    curves = curves.assign(draft_step=curves["draft_step"].astype(int))
    ylabel = {"ylabel": "share of right drafts", "xlabel": "draft step", "ylim": (0, None)}
    body = svg(lines(curves, "draft_step", looks=lambda name: (colours[name], "o"), legend=True, **ylabel))
    gains = table[table["metric"].eq(SHARE) & table["part"].eq("counterfactual")].drop(columns=["value", "low", "high"])
    if len(gains):
        gains = gains.rename(columns={"gain": "value", "gain_low": "low", "gain_high": "high"})
        shown = {"label": "variant", "title": f"Share of right drafts, less that of: {found.base}"}
        body += svg(forest(gains, **shown, looks=lambda row: ("#222222", "o")))
    for part, own in table[table["draft_step"].isna()].groupby("part", sort=False):
        own = own.assign(value=[with_interval(row) for row in own.itertuples()])
        wide = own.pivot(index="variant", columns="metric", values="value").reindex(own["variant"].unique())
        body += f"<h2>{escape(part)}</h2>{wide.fillna('').rename_axis(index=None, columns=None).to_html(border=0)}"
    steps = table[table["metric"].isin([STEP, "chain_acceptance"]) & table["variant"].isin(names)]
    steps = steps.pivot(index=["metric", "variant"], columns="draft_step", values="value")
    body += f"<h2>draft steps</h2>{steps.to_html(border=0, float_format='{:.3f}'.format)}"
    moved = table[table["part"].eq("drift")].pivot(index=["metric", "variant"], columns="draft_step", values="value")
    body += f"<h2>drift</h2>{moved.to_html(border=0, float_format='{:.3f}'.format, na_rep='')}"
    cannot = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in found.unreadable.items())
    body += f"<h2>readings that fail</h2><ul>{cannot}</ul>" if cannot else ""
    return PAGE.format(title=escape(title), findings="".join(f"<li>{escape(line)}</li>" for line in told), body=body)


def svg(figure: Figure) -> str:
    """A figure as part of a page."""
    drawn = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "kvshot"}):
        figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return drawn.getvalue().partition("?>")[2].partition(">")[2]

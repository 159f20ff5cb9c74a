"""Whether decoding with trained drafters gives the target's own tokens, token by token: greedy, chain and tree.

python -m kvshot_lib.decoding.lossless RESULTS_DIR [VARIANT/seedN ...]    writes lossless to RESULTS_DIR/tables

The target alone answers every prompt first, one token a forward. Each drafter then answers it by a chain and by a tree, and what
differs is counted. A difference is shown with the gap between the two largest logits of the target where it starts: in float32 all of
them are faults, in bfloat16 a forward over several tokens rounds otherwise than one over a single token, so near ties may tip.

Every prompt's row is on disk (RESULTS_DIR/lossless) before the next one starts: the same command goes on from there after a kill.
"""

import argparse
import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from ..drafters.checkpoint import DESCRIPTION
from ..errors import StudyError, one_line_errors
from ..files import write_csv, write_json
from ..metrics import tables
from ..provenance import provenance
from ..text.prompts import encode_turn, load_prompts
from .decode import decode
from .propose import Chain, Tree
from .timing import find_runs, load_runs

PLANS = {"chain": Chain(7), "tree": Tree(8, 10, 60)}
Item = tuple[str, str, int]  # run (or ALONE), mode, number of the prompt
ALONE = "alone"

_here: dict = {}  # of a process: target, drafters, prompts


def compare(expected: Sequence[int], found: Sequence[int]) -> tuple[int, int | None]:
    """Tokens that differ, missing and surplus ones too, and the place of the first one.

    >>> compare([5, 6, 7], [5, 6, 7]), compare([5, 6, 7], [5, 8])
    ((0, None), (2, 1))
    """
    places = [i for i in range(max(len(expected), len(found))) if expected[i : i + 1] != found[i : i + 1]]
    return len(places), places[0] if places else None


@torch.inference_mode()
def logit_gap(target, prompt: Sequence[int], answer: Sequence[int], place: int) -> float:
    """Largest logit of the target minus its second, before token ``place`` of the answer."""
    ids = torch.tensor([[*prompt, *answer[:place]]], device=target.device)
    first, second = target.model(input_ids=ids, logits_to_keep=1).logits[0, -1].float().topk(2).values.tolist()
    return first - second


def measure_item(item: Item, folder: Path, new_tokens: int) -> dict:
    """Decode one prompt one way; the target alone keeps its tokens in ``folder`` for the others to be compared with."""
    run, mode, number = item
    target, (name, prompt) = _here["target"], _here["prompts"][number]
    kept, plan = folder / f"{ALONE}.{number}.json", {} if run == ALONE else {"plan": PLANS[mode]}
    drafter = None if run == ALONE else _here["drafters"][run]
    found = decode(target, drafter, prompt, **plan, max_new_tokens=new_tokens, timed=False)
    if run == ALONE:
        write_json(kept, found.tokens)
    expected = json.loads(kept.read_text())
    mismatches, first = compare(expected, found.tokens)
    row = {"prompt": name, "new_tokens": len(found.tokens), "target_forwards": found.target_forwards}
    row |= {"accepted": sum(found.accepted), "mismatches": mismatches, "first_mismatch": first}
    return row | {"logit_gap": None if first is None else logit_gap(target, prompt, expected, first)}


def start_process(folders: dict[str, Path], prompts: str, count: int, new_tokens: int, device: str, dtype: str) -> None:
    """Load target, drafters and prompts; also in the process that only counts the items."""
    torch.set_num_threads(max(1, torch.get_num_threads() if multiprocessing.parent_process() is None else 1))
    target, drafters = load_runs(folders, device, dtype)
    texts = [(prompt.id, encode_turn(target, [prompt.turns[0]])) for prompt in load_prompts(prompts)[:count]]
    room = target.config.max_position_embeddings - new_tokens
    fitting = [(name, tokens.tolist()) for name, tokens in texts if len(tokens) <= room]
    if not fitting:
        raise StudyError(f"no prompt leaves room for {new_tokens} new tokens; give fewer --new-tokens")
    _here.update(target=target, drafters=drafters, prompts=fitting)


def _work(given: tuple[Item, Path, int]) -> tuple[Item, dict]:
    return given[0], measure_item(*given)


def verify_lossless(
    results_dir: str | Path, runs: Sequence[str] = (), *, prompts: str = "study", count: int = 105, new_tokens: int = 320,
    device: str = "auto", dtype: str = "float32", workers: int = 1, stop_after_s: float = float("inf"), keep: str | Path = "", out: str | Path = "",
) -> tuple[pd.DataFrame, bool]:  # fmt: skip
    """Measure runs (``variant/seed0`` …; all by default) and write the table; what is measured is not measured again.

    Parameters
    ----------
    count, prompts : the first ``count`` of a set of `load_prompts`; their first turn is answered, by at most ``new_tokens`` tokens each.
    workers : processes side by side; above 1 each loads target and drafters itself and computes with one thread.
    out : where rows and the table go; ``results_dir`` by default.
    keep : folder of tables recorded before; rows of theirs that are not measured here are taken over.

    Returns
    -------
    The table ``lossless``, and whether everything was measured.

    Raises
    ------
    StudyError : no such run, a target other than the one that a run was trained for, prompts longer than the context.
    """
    deadline, out = time.monotonic() + stop_after_s, Path(out or results_dir)
    folders = find_runs(Path(results_dir), runs)
    start = (folders, prompts, count, new_tokens, device, dtype)
    start_process(*start)
    target = _here["target"]
    kind = str(target.dtype).removeprefix("torch.")
    labels = {"dtype": kind, **provenance(target.device)}
    settings = f"{target.hash} {prompts} {new_tokens} {kind} {labels['device']}"
    folder = out / "lossless" / hashlib.sha256(settings.encode()).hexdigest()[:12]
    numbers = range(len(_here["prompts"]))
    rows = {name: _read(folder / f"{_file(name, folders)}.csv") for name in (ALONE, *_here["drafters"])}
    done = {(name, row["mode"], row["prompt"]) for name, known in rows.items() for row in known}
    items = [(ALONE, ALONE, number) for number in numbers]
    items += [(name, mode, number) for number in numbers for name in _here["drafters"] for mode in PLANS]
    waiting = [item for item in items if (*item[:2], _here["prompts"][item[2]][0]) not in done]
    print(
        f"{labels['device']}, {kind}, target {target.name}: {len(items) - len(waiting)} of {len(items)} answers are there"
    )
    alone, others = ([item for item in waiting if (item[0] == ALONE) == first] for first in (True, False))
    with nullcontext() if workers == 1 else _processes(workers, start) as pool:
        for part in (alone, others):  # what the target says is there before anything is compared with it
            for (name, mode, _), row in _each(pool, [(item, folder, new_tokens) for item in part], deadline):
                variant, seed = (name, 0) if name == ALONE else (name.split("/")[0], int(name.rpartition("seed")[2]))
                rows[name].append({"variant": variant, "seed": seed, "mode": mode, **row, **labels})
                write_csv(folder / f"{_file(name, folders)}.csv", pd.DataFrame(rows[name]))
    left = sum(len(known) for known in rows.values()) < len(items)
    table = pd.DataFrame([row for name, known in rows.items() if name != ALONE for row in known])
    table = table.reindex(columns=[*tables.SCHEMAS["lossless"]]).astype(tables.SCHEMAS["lossless"])
    if keep:
        table = pd.concat([tables.read(keep, "lossless"), table], ignore_index=True)
        table = table.drop_duplicates(tables.TABLES["lossless"].keys, keep="last", ignore_index=True)
    tables.write(out / "tables", "lossless", tables.rounded(table))
    return table, not left


def _processes(workers: int, start: tuple):
    return multiprocessing.get_context("spawn").Pool(workers, start_process, start)


def _each(pool, work: list, deadline: float):
    """(item, row) as they come, until the deadline, with a progress bar; without a pool they are measured here."""
    results = pool.imap_unordered(_work, work) if pool else map(_work, work)
    for _ in tqdm(work, unit="answer", mininterval=2):
        left = deadline - time.monotonic()
        try:
            yield results.next(max(0.0, min(left, 1e6))) if pool else next(results if left > 0 else iter(()))
        except (multiprocessing.TimeoutError, StopIteration):
            return


def _file(name: str, folders: dict[str, Path]) -> str:
    """A name for the rows of a run: other weights have other rows."""
    if name == ALONE:
        return ALONE
    described = (folders[name] / DESCRIPTION).read_bytes()
    return f"{name.replace('/', '.')}.{hashlib.sha256(described).hexdigest()[:8]}"


def _read(path: Path) -> list[dict]:
    return pd.read_csv(path, dtype={"prompt": str}).to_dict("records") if path.exists() else []


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Tokens compared and tokens that differ, by run, mode and number format; the smallest gap where an answer starts to differ."""
    by = ["variant", "seed", "mode", "dtype"]
    found = table.assign(differs=table["mismatches"] > 0).groupby(by, sort=False)
    return found.agg(
        prompts=("prompt", "size"), new_tokens=("new_tokens", "sum"), target_forwards=("target_forwards", "sum"),
        mismatches=("mismatches", "sum"), prompts_that_differ=("differs", "sum"), largest_logit_gap=("logit_gap", "max"),
    ).reset_index()  # fmt: skip


@one_line_errors
def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvshot_lib.decoding.lossless", description=__doc__.splitlines()[0])
    parser.add_argument("results_dir", metavar="RESULTS_DIR")
    parser.add_argument("runs", nargs="*", metavar="VARIANT/seedN", help="only these (all trained ones by default)")
    parser.add_argument("--prompts", default="study", help="study, human-eval or a .jsonl file")
    parser.add_argument("--count", type=int, default=105, help="the first so many of them")
    parser.add_argument("--new-tokens", type=int, default=320, help="at most, of an answer")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", help="of target and drafters: float32 or bfloat16")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    parser.add_argument("--stop-after-s", type=float, default=float("inf"), help="then leave the rest to the next call")
    parser.add_argument("--out", default="", metavar="DIR", help="where rows and table go (RESULTS_DIR by default)")
    parser.add_argument("--keep", default="", metavar="TABLES_DIR", help="take over rows recorded there")
    given = vars(parser.parse_intermixed_args(words))
    table, done = verify_lossless(given.pop("results_dir"), given.pop("runs"), **given)
    print(summary(table).to_string(index=False))
    if not done:
        print("stopped early: the same command goes on from here")
    wrong = table[(table["dtype"] == "float32") & (table["mismatches"] > 0)]
    exact = table.loc[table["dtype"] == "float32", "new_tokens"].sum()
    print(f"{int(wrong['mismatches'].sum())} mismatches in float32, of {int(exact):,} tokens")
    return int(len(wrong) > 0)


if __name__ == "__main__":
    sys.exit(main())

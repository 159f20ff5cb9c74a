"""Whether vLLM serves the study's drafters with the very tokens, and the very acceptance, that `decode` finds.

Both answer the same prompts, greedily, in float32, by chains of the same length. vLLM does it alone and with each
drafter that EAGLE-3's format holds; what it answered is kept and taken again unless something that it depends on has
changed. It counts accepted drafts where it verifies them and cuts the answer afterwards, so it counts those past the
answer's end, too. Ours go on past the end as well, so how many that are is known, and nothing else may differ.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd

from ..decoding.decode import decode, until
from ..decoding.propose import Chain
from ..decoding.timing import Trained, as_table, load_runs
from ..decoding.turns import Turn, dialogue_turns
from ..drafters.eagle3 import CONFIG, TRAINED_TOKENS, WEIGHTS, export_eagle3
from ..errors import StudyError
from ..files import read_json, sha256, write_atomically, write_json
from ..metrics import tables
from ..parts import claim
from ..provenance import provenance
from ..settings import at_least
from ..target.tiny import TINY
from ..target.wheels import PACKED, packed_folder
from ..text.prompts import load_prompts

VERSION = "0.32.0"  # of vLLM; the Makefile installs it
ENGINE = Path(__file__).with_name("engine.py")
ASK_VERSION = "from importlib.metadata import *; print(version(packages_distributions()['vllm'][0]))"


def serve_check(
    results_dir: str, runs: Sequence[str] = (), *, prompts: str = "study", count: int = 35, new_tokens: int = 64,
    draft_length: int = 3, threads: int = 0, python: str = ".venv-serving/bin/python", out: str = "results/serving",
    fingerprint: str = "",
) -> int:  # fmt: skip
    """Compare vLLM with `decode` on the first turn of each of ``count`` prompts: table serving in OUT/tables.

    Parameters
    ----------
    python : of the environment that has vLLM.
    fingerprint : of our decoding's code; what other code answered is answered anew.

    Returns
    -------
    The exit status of a command: 1 if a token or an accepted draft differs, else 0.

    Raises
    ------
    StudyError : no vLLM of `VERSION` there, no drafter that the format holds, a target that vLLM doesn't load.
    """
    at_least(1, count=count, new_tokens=new_tokens, draft_length=draft_length)
    version, folder = engine_version(python), Path(out)
    trained = load_runs(results_dir, runs, "cpu", "float32", threads)
    target, exported = trained.target, export_all(trained, folder)
    job = {"target": target_folder(target.name), "target_hash": target.hash, "engine": version, "dtype": "float32"}
    firsts = [replace(prompt, turns=prompt.turns[:1]) for prompt in load_prompts(prompts)[:count]]
    room = TRAINED_TOKENS - new_tokens - 2 * draft_length  # further on vLLM stops drafting, for all prompts at once
    turns = [turn for turn in dialogue_turns(target, firsts, new_tokens) if len(turn.tokens) <= room]
    if not turns:
        raise StudyError(f"no prompt leaves room for {new_tokens} tokens within the drafters' {TRAINED_TOKENS}")
    job |= {"prompts": [turn.tokens for turn in turns], "new_tokens": new_tokens, "stop_ids": target.stop_ids}
    ask = partial(served, python, threads)
    alone = ask(folder / "alone", {**job, "drafter": None, "draft_length": 0})["tokens"]

    def rows(run: str, turn: Turn) -> pd.DataFrame:
        """Our own answer."""
        plan, length = Chain(draft_length), new_tokens + draft_length
        found = decode(target, trained.drafters[run], turn.tokens, plan, max_new_tokens=length, eos_token_ids=())
        return pd.DataFrame([ended(found.tokens, found.accepted, {*target.stop_ids}, new_tokens, draft_length)])

    ours = replace(trained, drafters={run: trained.drafters[run] for run in exported})
    found = ours.measured(folder / "ours", turns, rows, fingerprint, new_tokens, draft_length)
    compared = []
    for (variant, seed), own in found.groupby(["variant", "seed"], sort=False):
        drafter = exported[f"{variant}/seed{seed}"]
        hashes = [sha256(drafter / name) for name in (WEIGHTS, CONFIG)]
        theirs = {**job, "drafter": str(drafter.resolve()), "drafter_hash": hashes, "draft_length": draft_length}
        table = compare(own, alone, ask(drafter.parent, theirs))
        compared.append(table.assign(variant=variant, seed=seed))
    labels = {"engine": f"vLLM {version}", "dtype": "float32", "target": target.name, **provenance(target.device)}
    table = as_table("serving", pd.concat(compared, ignore_index=True).assign(**labels))
    print(table.drop(columns=[*labels]).to_string(index=False))
    print(tables.write(folder / "tables", "serving", table))
    wrong = differing(table)
    for line in wrong:
        print(line)
    if not wrong:
        print(f"vLLM {version} serves {len(exported)} of {len(trained.drafters)}: same tokens, same accepted drafts")
    return int(bool(wrong))


def export_all(trained: Trained, folder: Path) -> dict[str, Path]:
    """Run -> its EAGLE-3 folder, of every drafter that the format holds; the others are named with the reason."""
    exported = {}
    for run, drafter in trained.drafters.items():
        try:
            exported[run] = export_eagle3(drafter, trained.target, folder / run.replace("/", ".") / "exported")
        except StudyError as error:
            print(f"{run}: not served. {error}", flush=True)
    if not exported:
        raise StudyError("EAGLE-3's format holds none of these drafters; name a 'hidden' without norms of queries")
    return exported


def target_folder(name: str) -> str:
    """What vLLM loads of a target: a folder, or a hub id whose files are on this disk already."""
    if name in TINY:
        raise StudyError(f"vLLM loads a model from a folder, and target {name} has none; check drafters of another")
    return str(packed_folder(name) if name in PACKED else name)


def engine_version(python: str) -> str:
    """Of the vLLM that this Python has; any other than `VERSION` is refused."""
    told = "make it anew: rm -r .venv-serving && make serve-check"
    try:
        asked = subprocess.run([python, "-c", ASK_VERSION], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        raise StudyError(f"{python} has no vLLM; {told}") from None
    if (found := asked.stdout.strip()) != VERSION:
        raise StudyError(f"{python} has vLLM {found}, and this check is for {VERSION}; {told}")
    return found


def served(python: str, threads: int, folder: Path, job: dict) -> dict:
    """What vLLM answers to a job, kept in ``folder`` with it: the same job is not done twice."""
    told = json.dumps(job) + ENGINE.read_text()
    claim(folder / "vllm", hashlib.sha256(told.encode()).hexdigest())
    asked, path = folder / "vllm" / "job.json", folder / "vllm" / "answers.json"
    shown = job["drafter"] and Path(job["drafter"]).parent.name
    if not path.exists():
        print(f"vLLM {f'with {shown}' if shown else 'alone'}, {len(job['prompts'])} prompts side by side", flush=True)
        write_json(asked, job)
        environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})

        def ask(temporary: Path) -> None:
            words, quiet = [python, ENGINE, asked, temporary], subprocess.DEVNULL
            done = subprocess.run(words, check=False, stdout=quiet, env=environment)
            if not temporary.exists():
                raise StudyError(f"vLLM ended with status {done.returncode} and without an answer; run again")
            if error := json.loads(temporary.read_text()).get("error"):
                raise StudyError(f"vLLM can't serve {shown or job['target']}: {' '.join(error.split())[:300]}")

        write_atomically(path, ask)
    return read_json(path, f"delete {folder} and run again")


def ended(tokens: Sequence[int], accepted: Sequence[int], stops: set[int], new_tokens: int, draft_length: int) -> dict:
    """An answer that went on, cut at its end: tokens, verifications, drafts accepted by draft step, and those past it.

    A first token, then rounds of 2 and 3 accepted drafts, each with a bonus token; the end is the fifth token:

    >>> found = ended([7, 5, 5, 5, 9, 5, 5, 5], [2, 3], {9}, 64, 3)
    >>> found["tokens"], found["forwards"], found["accepted"], found["past_end"]
    ([7, 5, 5, 5, 9], 2, [2, 1, 0], [0, 1, 1])
    """
    answer = until(stops, list(tokens[:new_tokens]))
    within, past, forwards, length = [0] * draft_length, [0] * draft_length, 0, 1
    for taken in accepted:
        if length >= len(answer):
            break
        for step in range(taken):
            counted = within if length + step < len(answer) else past
            counted[step] += 1
        length, forwards = length + taken + 1, forwards + 1
    return {"tokens": answer, "forwards": forwards, "accepted": within, "past_end": past}


def compare(own: pd.DataFrame, alone: Sequence[Sequence[int]], theirs: dict) -> pd.DataFrame:
    """Our answers (rows of `ended`), vLLM's alone, and vLLM's with the drafter -> a row per draft step."""
    mine, drafted = [[*answer] for answer in own["tokens"]], theirs["tokens"]
    total = {name: pd.DataFrame([*own[name]]).sum() for name in ("accepted", "past_end")}
    return pd.DataFrame({
        "draft_step": range(len(theirs["accepted"])),
        "accepted": total["accepted"], "past_end": total["past_end"], "engine_accepted": theirs["accepted"],
        "forwards": own["forwards"].sum(), "engine_forwards": theirs["forwards"],
        "prompts": len(mine), "new_tokens": sum(map(len, mine)),
        "same_as_alone": sum(a == b for a, b in zip(drafted, alone, strict=True)),
        "same_as_ours": sum(a == b for a, b in zip(drafted, mine, strict=True)),
    })  # fmt: skip


def differing(table: pd.DataFrame) -> list[str]:
    """A line for each drafter and number in which vLLM's differs from ours."""
    lines = []
    for row in table.itertuples():
        for what, found, expected in (
            ("answers equal to vLLM's alone", row.same_as_alone, row.prompts),
            ("answers equal to ours", row.same_as_ours, row.prompts),
            ("verifications", row.engine_forwards, row.forwards),
            (f"accepted at draft step {row.draft_step}", row.engine_accepted, row.accepted + row.past_end),
        ):
            if found != expected:
                lines.append(f"DIFFERS: {row.variant}/seed{row.seed}, {what}: {found}, and not {expected}")
    return list(dict.fromkeys(lines))

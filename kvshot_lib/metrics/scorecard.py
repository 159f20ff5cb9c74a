"""Every claim, control, hypothesis and goal of the study on one scorecard, each judged on the table that it is about (no torch)."""

import re

import pandas as pd

from . import tables
from .claims import BLOCK_CLAIMS, CLAIMS, FLOW_CLAIMS, GATE_CLAIMS, Claim, query_claims, scorecard, shift_claim
from .decode_claims import DECODE_CLAIMS, decode_rows
from .goals import acceptance_goals, contenders, speed_goal
from .gradients import flow_draws, gate_draws
from .interaction import hypothesis_row
from .queries import query_draws
from .resampling import Draws, draw

KINDS = ("claim", "control", "hypothesis", "goal")
READ = (
    "runs", "counts", "run_lengths", "history", "gradients", "gradient_flow", "attention_shift", "attention_matches",
    "attention_overlap", "query_oracle", "decode_prompts", "decode_duel",
)  # fmt: skip


def whole_scorecard(
    tables_dir, paper: pd.DataFrame, samples: int = 2000, seed: int = 0
) -> tuple[pd.DataFrame, tuple[Claim, ...]]:
    """The rows of `claims.scorecard` for all that is stated, in order, and the claims as stated.

    What a claim is about stands where it is stated: C1-C13, C18, B1 and the controls on acceptance, C14 and B2 on decoded prompts, C15 on
    `query_statistics`, C16 and C17 on `gradient_statistics`, H1 on `interaction`. Without their tables they are *not run*.
    """
    read = {name: tables.read(tables_dir, name) for name in READ}
    acceptance: Draws = draw(read["counts"], read["run_lengths"], samples=samples, seed=seed)
    queries = query_draws(read["attention_overlap"], read["query_oracle"], samples, seed)
    goal, speeds = speed_goal(read["decode_prompts"], read["decode_duel"], samples, seed)
    judged = [
        (acceptance, (*CLAIMS, *BLOCK_CLAIMS, *acceptance_goals(contenders(read["runs"], read["history"])))),
        (queries, query_claims(set(queries.variants))),
        (flow_draws(read["gradient_flow"], samples, seed), FLOW_CLAIMS),
        (gate_draws(read["gradients"], samples, seed), GATE_CLAIMS),
        (speeds, (goal,)),
    ]
    shift, matches = read["attention_shift"], read["attention_matches"]
    found = [scorecard(draws, paper, claims) for draws, claims in judged]
    found.append(decode_rows(pd.concat([read["decode_prompts"], read["decode_duel"]]), samples, seed))
    found.append(hypothesis_row(shift, matches, paper, read["counts"]["document"].nunique(), samples, seed))
    claims = [claim for _, stated in judged for claim in stated]
    claims += [*DECODE_CLAIMS, shift_claim(set(matches["variant"]))]
    card = pd.concat(found, ignore_index=True)
    card["measured_verdict"] = card["measured_verdict"].fillna("")
    return _in_order(card), tuple(sorted(claims, key=lambda claim: _place(claim.kind, claim.claim)))


def _in_order(card: pd.DataFrame) -> pd.DataFrame:
    places = [_place(kind, claim) for kind, claim in zip(card["kind"], card["claim"])]
    return card.iloc[sorted(range(len(card)), key=places.__getitem__)].reset_index(drop=True)


def _place(kind: str, claim: str) -> tuple[int, int, str]:
    """Where a claim stands: by kind, then C9a after C9 and before C10."""
    number, part = re.fullmatch(r"[A-Z]+(\d+)([a-z]?)", claim).groups()
    return KINDS.index(kind), int(number), part

"""The whole scorecard: nothing stated is left out, and its order."""

from pathlib import Path

import pandas as pd
import pytest

from kvshot_lib.metrics import claims, paper, tables
from kvshot_lib.metrics.scorecard import READ, whole_scorecard

RECORDED = Path(__file__).parents[2] / "data/recorded/full"


@pytest.fixture(scope="module")
def whole():
    return whole_scorecard(RECORDED, paper.read_paper(), samples=50)


def test_every_claim_has_one_row_and_they_stand_in_order(whole):
    table, stated = whole
    names = table["claim"].tolist()
    assert len(set(names)) == len(names)
    assert {f"C{number}" for number in range(1, 19)} <= set(names)
    assert names[0] == "C1" and names.index("C9") < names.index("C9a") < names.index("C10") < names.index("K1")
    assert names[-1] == "B2" and names.index("K5") < names.index("H1") < names.index("B1")
    assert [claim.claim for claim in stated] == [name for name in names if name in {claim.claim for claim in stated}]


def test_rows_are_those_of_the_claims_on_their_own(whole):
    """C1-C13 and the controls, judged here and by `claims.scorecard`."""
    from kvshot_lib.metrics.resampling import draw

    read = (tables.read(RECORDED, name) for name in ("counts", "run_lengths"))
    own = claims.scorecard(draw(*read, samples=50, seed=0), paper.read_paper()).set_index("claim")
    found = whole[0].set_index("claim").loc[own.index]
    pd.testing.assert_frame_equal(found[["value", "low", "high", "verdict"]], own[["value", "low", "high", "verdict"]])


def test_claims_without_their_tables_are_not_run(tmp_path):
    for name in READ:
        if name not in tables.OPTIONAL:
            tables.write(tmp_path, name, tables.read(RECORDED, name))
    told = whole_scorecard(tmp_path, paper.read_paper(), samples=20)[0].set_index("claim")["verdict"]
    assert (told.loc[["C14", "C15", "C16", "C17", "H1", "B2"]] == "not run").all() and told["C1"] == "reproduced"

"""Numbers in the README are those of the recorded run."""

import re
from pathlib import Path

from kvshot_lib import bootstrap, report, tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


MAIN = ("hidden", "hidden_post_norm", "hidden_continued", "kv_1_none", "kv_1", "kv_2", "kv_4", "hybrid", "hybrid_warm")


def test_the_result_table_is_the_recorded_one():
    counts, run_lengths = (tables.read(ROOT / "data/recorded/full", name) for name in ("counts", "run_lengths"))
    draws = bootstrap.draw(counts, run_lengths, samples=2000, seed=0)
    assert report.acceptance(draws, MAIN).replace("<br>", " ") in README


def test_every_file_that_the_readme_names_is_there():
    named = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(
        r"`((?:notebooks|data|figures|kvshot_lib)/[\w./-]+)`", README
    )
    missing = [name for name in named if not name.startswith("http") and not (ROOT / name).exists()]
    assert named and not missing

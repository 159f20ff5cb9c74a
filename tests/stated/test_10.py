"""Numbers in the text of notebook 10, held against its own saved outputs (which nbval holds against its code)."""

import re

import nbformat
from notebook_checks import ROOT
from recorded import table
from stated import checked

NOTEBOOK = "notebooks/10_watch_it_decode.ipynb"
SHOWN = " ".join(
    output.data.get("text/html", "")
    for cell in nbformat.read(ROOT / NOTEBOOK, as_version=4).cells
    for output in cell.get("outputs", [])
    if "data" in output
)


def numbers(pattern: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, SHOWN)]


STATED = [
    (
        "They differ in the forwards that it takes: 29, 37 and 28, where the target alone takes 59",
        lambda: [*numbers(r"tokens, (\d+) forwards"), numbers(r"(\d+) tokens, ")[0] - 1],
    ),
    ("with up to 6% of the weight", lambda: [max(numbers(r"(\d+)% ' need',"))]),
    ("has 46% on the first entry", lambda: [max(numbers(r"the first entry, (\d+)%"))]),
    ("at most 3% on any other", lambda: numbers(r"hybrid_warm_31, layer 1, over the cache</th>\s*<td>(\d+)%")),
    ("on 98 prompts the hybrid", lambda: [table("decode_duel")["prompt"].nunique()]),
]


test_numbers_are_those_of_the_tables, test_every_interval_is_checked = checked(NOTEBOOK, STATED)

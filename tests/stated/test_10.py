"""Numbers in the text of notebook 10, held against its own saved outputs (which nbval holds against its code)."""

import re

import nbformat
from notebook_checks import ROOT
from recorded import longer, table
from stated import checked

from kvshot_lib.files import read_json

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
        "They differ in the forwards that it takes: 23, 29 and 37, where the target alone takes 59",
        lambda: [*numbers(r"first, (\d+) forwards"), numbers(r"(\d+) after the first")[0]],
    ),
    ("with up to 6% of the weight", lambda: [max(numbers(r"(\d+)% ' need',"))]),
    (
        '`hidden_31` has 10% on a line break, `hidden_31_continued` 9% on the end of "assistant", `kv_2` 10% on "trained"',
        lambda: numbers(r"(\d+)% '\\n', 73 back") + numbers(r"(\d+)% 'istant',") + numbers(r"(\d+)% ' trained',"),
    ),
    ("after 146 million training tokens", lambda: [trained("hidden_31") / 1e6]),
    (
        "on 2,000 sealed answers `hidden_31` yields 3.05 tokens a forward [2.99, 3.10]",
        lambda: [table("runs", "long")["evaluation_documents"].max(), *longer("hidden_31")],
    ),
]


def described(name: str) -> dict:
    return read_json(ROOT / f"data/checkpoints/{name}/drafter.json", "")


def trained(name: str) -> int:
    """Tokens of a published drafter's training, with those of the training that it started from: as many."""
    run = described(name)["run"]
    return run["trained_tokens"] * (2 if run["init_from"] else 1)


def test_the_three_differ_as_the_text_says():
    assert [round(trained("hidden_31") / trained(name)) for name in ("hidden_31_continued", "kv_2")] == [5, 10]
    assert [described(name)["spec"]["hidden_layers"] for name in ("hidden_31", "hidden_31_continued")] == [
        [23, 26, 29],
        [2, 15, 27],
    ]
    full = re.findall(r"<th>([\w]+)</th>\s*(?:<td>\d+</td>\s*){4}<td>(\d+)</td>", SHOWN)
    assert full == [("hidden_31", "6"), ("hidden_31_continued", "2"), ("kv_2", "0")]


test_numbers_are_those_of_the_tables, test_every_interval_is_checked = checked(NOTEBOOK, STATED)

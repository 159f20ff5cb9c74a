"""Numbers that a person wrote into README or a notebook's text, held against the tables that they come from.

A test module names a file and its statements: a fragment that must stand in the text, word by word, and the values of the numbers in
it, in their order, computed from the recorded tables:

    STATED = [("gains .31 tokens [.27, .35]", lambda: interval_of("hidden_31", "hidden", "measured_mat"))]
    test_numbers_are_those_of_the_tables, test_every_interval_is_checked = checked(NOTEBOOK, STATED)
"""

import re

import nbformat
import pytest
from notebook_checks import ROOT

NUMBER = re.compile(r"(?<![\w.])[+−-]?(?:\d{1,3}(?:,\d{3})+|\d*\.?\d+)(?![\w])")
INTERVAL = re.compile(r"\[[+−-]?\d*\.\d+, ?[+−-]?\d*\.\d+\]")


def text_of(path: str) -> str:
    """README's text, or that of a notebook's Markdown cells; white space as single blanks."""
    if path.endswith(".ipynb"):
        cells = nbformat.read(ROOT / path, as_version=4).cells
        whole = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    else:
        whole = (ROOT / path).read_text(encoding="utf-8")
    return " ".join(whole.split())


def defined(path: str, name: str, until: str, **given) -> dict:
    """What the notebook's cell that defines the function ``name`` defines before the text ``until``, among ``given``."""
    cells = nbformat.read(ROOT / path, as_version=4).cells
    source = next(cell.source for cell in cells if f"def {name}(" in cell.source)
    exec(source.partition(until)[0], given)  # noqa: S102
    return given


def wrong(path: str, fragment: str, values) -> list[str]:
    """What is wrong with a statement: not in the text, or numbers that aren't the values as far as they are printed."""
    fragment = " ".join(fragment.split())
    if fragment not in text_of(path):
        return [f"{path} does not say: {fragment}"]
    told, values = NUMBER.findall(fragment), list(values)
    if len(told) != len(values):
        return [f"{fragment}: {len(told)} numbers, {len(values)} values"]
    return [
        f"{fragment}: {number} is {value:.5g}"
        for number, value in zip(told, values, strict=True)
        if not printed(number, value)
    ]


def printed(number: str, value: float) -> bool:
    """Whether ``number`` is ``value``, rounded to the digits that it has."""
    digits = len(number.partition(".")[2])
    return abs(float(number.replace("−", "-").replace(",", "")) - value) <= 0.5001 * 10.0**-digits


def checked(path: str, stated: list[tuple]) -> tuple:
    """The two tests of a module: every statement's numbers are those of the tables, and every interval is in a statement."""

    @pytest.mark.parametrize("fragment, values", stated, ids=[fragment[:40] for fragment, _ in stated])
    def numbers(fragment, values):
        assert wrong(path, fragment, values()) == []

    def intervals():
        assert unstated(path, [fragment for fragment, _ in stated]) == []

    return numbers, intervals


def unstated(path: str, fragments: list[str]) -> list[str]:
    """Intervals in the text that no fragment covers."""
    text = text_of(path)
    for fragment in fragments:
        text = text.replace(" ".join(fragment.split()), "")
    return INTERVAL.findall(text)

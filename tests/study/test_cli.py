"""The command line: every verb is a function whose parameters it takes, what can be mended is one line, and it starts at once."""

import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvshot_lib.errors import StudyError
from kvshot_lib.study import cli
from kvshot_lib.study.cli import VERBS, Verb, main


@pytest.mark.parametrize("verb", ["", *VERBS, "study", "notebook run", *cli.GROUPS])
def test_every_verb_tells_what_it_takes(verb, capsys):
    assert main([*verb.split(), "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"Usage: kvshot {verb}".rstrip()) and len(told.splitlines()) > 4


def measured(folder: str | Path, runs: Sequence[str] = (), *, fingerprint: str, count: int = 3, lengths: Sequence[int] = (1, 2),
             fast: bool = False, keep: str | Path = ""):  # fmt: skip
    """Measure something.

    Parameters
    ----------
    count : how many. lengths, keep : of what, in
        several lines.

    Raises
    ------
    StudyError : never.
    """
    if count < 0:
        raise StudyError("count starts\nat 0")
    return [folder, list(runs), count, list(lengths), fast, keep, len(fingerprint)], count > 3


@pytest.fixture
def try_out(monkeypatch):
    """`kvshot try`, which calls `measured`."""
    monkeypatch.setitem(sys.modules, "kvshot_lib.tried", types.SimpleNamespace(measured=measured))
    monkeypatch.setattr("kvshot_lib.study.fingerprints.fingerprint", lambda module, _: module)
    monkeypatch.setitem(cli.cli.commands, "try", Verb("try", "tried:measured"))


@pytest.mark.parametrize(
    "words, told",
    [
        ("there", "(['there', [], 3, [1, 2], False, '', 5], False)"),
        ("there a/seed0 b/seed1 --count 4 --lengths 5 --fast", "(['there', ['a/seed0', 'b/seed1'], 4, [5], True, '', 5], True)"),
        ("--lengths none there --keep x", "(['there', [], 3, [], False, 'x', 5], False)"),
    ],
)
def test_parameters_before_the_star_are_arguments_and_others_options(try_out, monkeypatch, capsys, words, told):
    monkeypatch.setattr(cli, "tell", print)
    assert main(["try", *words.split()]) == 0
    assert capsys.readouterr().out.strip() == told


def test_help_says_what_the_docstring_says_of_each(try_out, capsys):
    assert main(["try", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Measure something." in told and "--count INTEGER how many [default: 3]" in told
    assert "--lengths A,B of what, in several lines. [default: 1,2]" in told
    assert "fingerprint" not in told and "StudyError" not in told


def test_what_can_be_mended_is_one_line(try_out, capsys):
    for words, line in [("there --count -1", "count starts at 0"), ("there --lengths 1,x", "--lengths '1,x': give whole numbers")]:
        assert main(["try", *words.split()]) == 1
        told = capsys.readouterr().err
        assert told.startswith(f"error: {line}") and told.count("\n") == 1
    assert main(["nothing"]) == 2 and main(["try"]) == 2


def test_results_are_printed_and_numbers_are_the_exit_status(capsys):
    for result in ({"runs": Path("a.csv")}, ["b", None], (["c"], False), None, "d"):
        cli.tell(result)
    assert capsys.readouterr().out.splitlines() == ["a.csv", "b", "['c']", cli.STOPPED, "d"]
    for status in (0, 1):
        with pytest.raises(SystemExit) as stop:
            cli.tell(status)
        assert stop.value.code == status


def test_it_starts_at_once():
    program = "import sys\nfrom kvshot_lib.study.cli import main\nmain(['--help'])\nprint({'torch', 'pandas', 'numpy'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.endswith("set()\n")

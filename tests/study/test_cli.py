"""The command line: every verb says what it takes and calls what it names, what can be mended is one line, and it starts at once."""

import importlib
import inspect
import subprocess
import sys

import click
import pytest

from kvshot_lib.errors import StudyError
from kvshot_lib.study.cli import cli, main
from kvshot_lib.text.generate import GeneratorSettings


def verbs(group: click.Group, before: str = "") -> dict[str, click.Command]:
    """Every command by its words, groups among them."""
    found = {}
    for name, command in group.commands.items():
        found[f"{before}{name}"] = command
        if isinstance(command, click.Group):
            found |= verbs(command, f"{before}{name} ")
    return found


VERBS = verbs(cli)
# Verbs that hand all that they are given to a function of the library.
CALLED = {
    "sweep": "study.sweep.sweep_profile",
    "processes": "study.sweep.several_processes",
    "generate": "text.generate.generate",
    "collect": "metrics.collect.collect",
    "bench": "study.bench.bench",
    "dry-run": "study.scale.dry_run",
    "publish": "study.publish.publish_runs",
    "judge": "study.publish.judge_checkpoint",
    "measure queries": "probes.queries.measure_queries",
    "measure gradients": "probes.gradients.measure_gradients",
    "measure shift": "probes.shift.measure_shift",
    "measure context": "probes.long_context.measure_context",
    "decode speed": "decoding.timing.measure_speed",
    "decode duel": "decoding.timing.duel",
    "decode lossless": "decoding.lossless.verify_lossless",
    "decode latency": "decoding.latency.measure_latency",
    "examine": "study.microscope.examine_checkpoint",
}


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_every_verb_tells_what_it_takes(verb, capsys):
    assert main([*verb.split(), "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"Usage: kvshot {verb}".rstrip()) and len(told.splitlines()) > 4


def listed(value):
    return list(value) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("verb", CALLED)
def test_options_and_their_defaults_are_those_of_the_function(verb):
    """By name; a default is said in both places, for a verb is told without importing what it calls."""
    module, _, name = CALLED[verb].rpartition(".")
    function = getattr(importlib.import_module(f"kvshot_lib.{module}"), name)
    taken = {n: own for n, own in inspect.signature(function).parameters.items() if n != "fingerprint"}
    if taken.pop("settings", None):
        taken |= inspect.signature(GeneratorSettings).parameters
    command = VERBS[verb]
    assert {own.name for own in command.params} == set(taken)
    for own in command.params:
        theirs, context = taken[own.name].default, click.Context(command)
        if isinstance(own, click.Option) and theirs is not inspect.Parameter.empty:
            given = own.process_value(context, own.get_default(context))
            assert listed(given) == listed(theirs) and type(listed(given)) is type(listed(theirs)), own.name
        assert (own.required and own.nargs == 1) == (theirs is inspect.Parameter.empty and own.nargs == 1), own.name


@pytest.mark.parametrize(
    "words, told",
    [
        ("there", {"runs": (), "documents": 8, "contexts": [128, 256, 512, 1024, 2048], "corpus": ""}),
        (
            "there a/seed0 b/seed1 --documents 4 --contexts 5",
            {"runs": ("a/seed0", "b/seed1"), "documents": 4, "contexts": [5]},
        ),
        ("--contexts none there", {"runs": (), "contexts": []}),
    ],
)
def test_what_is_given_reaches_the_function_and_what_it_wrote_is_printed(monkeypatch, capsys, words, told):
    given = {}
    monkeypatch.setattr(
        "kvshot_lib.probes.gradients.measure_gradients", lambda **own: given.update(own) or {"a": "b.csv"}
    )
    assert main(["measure", "gradients", *words.split()]) == 0
    assert capsys.readouterr().out == "b.csv\n"
    assert told.items() <= given.items() and given["results_dir"] == "there" and len(given["fingerprint"]) == 16


def test_what_can_be_mended_is_one_line(monkeypatch, capsys):
    def complain(**_):
        raise StudyError("count starts\nat 0")

    monkeypatch.setattr("kvshot_lib.probes.gradients.measure_gradients", complain)
    for words, line in [
        ("there", "count starts at 0"),
        ("there --contexts 1,x", "--contexts '1,x': give whole numbers"),
    ]:
        assert main(["measure", "gradients", *words.split()]) == 1
        told = capsys.readouterr().err
        assert told.startswith(f"error: {line}") and told.count("\n") == 1
    assert main(["nothing"]) == 2 and main(["measure", "gradients"]) == 2


def test_what_a_measurement_returns_is_its_status(monkeypatch):
    monkeypatch.setattr("kvshot_lib.decoding.lossless.verify_lossless", lambda **_: 1)
    assert main(["decode", "lossless", "there"]) == 1
    monkeypatch.setattr("kvshot_lib.study.sweep.sweep_profile", lambda **_: 3)
    assert main(["sweep", "smoke"]) == 1


def test_it_starts_at_once():
    program = "import sys\nfrom kvshot_lib.study.cli import main\nmain(['--help'])\nprint({'torch', 'pandas', 'numpy'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.endswith("set()\n")

"""The study's one command line: `python -m kvshot_lib VERB`, or `kvshot VERB`; `--help` lists the verbs.

A verb is a function of the library: parameters before the ``*`` are arguments, others options, the docstring is the
help. Its module is imported when it runs, so that every command starts at once. (typer and tyro would want annotations
of their own at every parameter, and all modules at the start.)
"""

import ast
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import click
import yaml

from ..errors import StudyError
from ..files import disk_trouble

PACKAGE = __package__.partition(".")[0]
VERBS = {
    "figures": "study.pipeline:redraw",
    "fingerprint": "study.fingerprints:covered_names",
    "sweep": "study.sweep:sweep_profile",
    "processes": "study.sweep:several_processes",
    "generate": "text.generate:generate",
    "collect": "metrics.collect:collect",
    "thin": "metrics.collect:thin",
    "record": "study.publish:record",
    "convert": "study.publish:convert",
    "compute": "study.compute:write_compute",
    "bench": "study.scale:bench",
    "dry-run": "study.scale:dry_run",
    "publish": "study.publish:publish_runs",
    "judge": "study.publish:judge_checkpoint",
    "report": "study.site:build_report",
    "notebook execute": "study.notebooks:execute_in_place",
    "measure queries": "probes.queries:measure_queries",
    "measure gradients": "probes.gradients:measure_gradients",
    "measure shift": "probes.shift:measure_shift",
    "decode speed": "decoding.timing:measure_speed",
    "decode duel": "decoding.timing:duel",
    "decode lossless": "decoding.lossless:verify_lossless",
    "decode latency": "decoding.latency:measure_latency",
    "eagle3 export": "study.publish:export",
    "eagle3 import": "study.publish:measure_eagle3",
}
GROUPS = {
    "notebook": "Run notebooks.",
    "measure": "Diagnostics of trained drafters.",
    "decode": "Real decoding: its speed, and that it changes no token.",
    "eagle3": "Drafters in EAGLE-3's own form, as serving engines load them.",
}
STOPPED = "stopped early: the same command goes on from here"


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; gives its exit status. What a reader can mend is told in one line."""
    try:
        cli(words, prog_name="kvshot")
    except SystemExit as stop:
        return int(stop.code or 0)
    except (StudyError, OSError, yaml.YAMLError) as error:
        full = isinstance(error, OSError) and disk_trouble(error)
        remedy = "; free some space or choose another folder, then run again" if full else ""
        print(f"error: {' '.join(str(error).split())}{remedy}", file=sys.stderr)
        return 1
    return 0


class Verb(click.Command):
    """A function ``module:function`` of the library as a command; its module is imported when the command is called."""

    def __init__(self, name: str, place: str):
        super().__init__(name)
        self.module, _, self.function = place.partition(":")

    def get_short_help_str(self, limit: int = 0) -> str:
        """First line of the function's docstring."""
        tree = ast.parse((Path(__file__).parents[1] / f"{self.module.replace('.', '/')}.py").read_text())
        named = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == self.function]
        return (ast.get_docstring(named[0]) or "").partition("\n")[0]

    def make_context(self, *arguments, **named) -> click.Context:
        function: Callable = getattr(importlib.import_module(f"{PACKAGE}.{self.module}"), self.function)
        docstring, signature = inspect.getdoc(function) or "", inspect.signature(function).parameters
        hints, told = get_type_hints(function), parameter_help(docstring)
        shown = [own for own in signature.values() if own.name != "fingerprint"]
        self.help = docstring.partition("\n\n")[0]
        self.params = [parameter(own, hints.get(own.name, str), told.get(own.name)) for own in shown]
        self.callback = functools.partial(self.call, function, signature)
        return super().make_context(*arguments, **named)

    def call(self, function: Callable, signature: Mapping[str, inspect.Parameter], **given) -> None:
        if "fingerprint" in signature:
            from .fingerprints import fingerprint

            given["fingerprint"] = fingerprint(self.module, {})
        arguments = [given.pop(own.name) for own in signature.values() if is_argument(own)]
        tell(function(*arguments, **given))


def is_argument(own: inspect.Parameter) -> bool:
    return own.kind is own.POSITIONAL_OR_KEYWORD


def parameter(own: inspect.Parameter, kind: object, told: str | None) -> click.Parameter:
    """A click argument or option for one parameter of a function."""
    several, required = get_origin(kind) is Sequence, own.default is own.empty
    word = next((known for known in (bool, int, float) if known in (kind, *get_args(kind))), str)
    given = {} if required else {"default": own.default}  # a default of None would count as one
    if is_argument(own):
        return click.Argument([own.name], type=word, required=required, **({"nargs": -1} if several else given))
    if several:
        word, given = Several(word), {"default": ",".join(map(str, own.default)) or "none"}
    flag = own.name.replace("_", "-")
    flags = f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"
    shown = given.get("default") not in ("", None)
    return click.Option([flags], type=word, help=told, show_default=shown, required=required, **given)


class Several(click.ParamType):
    """Words or numbers with commas between them; none for ``none``."""

    name = "a,b"

    def __init__(self, word: type):
        self.word = word

    def convert(self, value: object, own: click.Parameter | None, context: click.Context | None) -> list:
        if isinstance(value, list):
            return value
        try:
            return [] if value == "none" else [self.word(word) for word in value.split(",")]
        except ValueError:
            raise StudyError(f"{own.opts[0]} {value!r}: give whole numbers with commas between them") from None


def parameter_help(docstring: str) -> dict[str, str]:
    """What the Parameters section of a docstring says of each name."""
    section = docstring.partition("Parameters\n----------")[2].partition("\n\n")[0]
    parts = re.split(r"(?:\.\s|\n)\s*((?:\w+, )*\w+) : ", section)
    told = zip(parts[1::2], parts[2::2], strict=True)
    return {name: " ".join(text.split()) for names, text in told for name in names.split(", ")}


def tell(result: object) -> None:
    """Print what a verb returned; a whole number is its exit status, and (result, False) was stopped early."""
    if isinstance(result, tuple) and isinstance(result[-1], bool):
        *result, done = result
        result = [*result, *[STOPPED] * (not done)]
    if isinstance(result, int):
        sys.exit(int(result))
    for line in result.values() if isinstance(result, dict) else result if isinstance(result, list) else [result]:
        if line is not None:
            print(line)


cli = click.Group(help="The KVShot study.")
for group, says in GROUPS.items():
    cli.add_command(click.Group(group, help=says))
for verb, place in VERBS.items():
    group, _, name = verb.rpartition(" ")
    (cli.commands[group] if group else cli).add_command(Verb(name, place))


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[PROFILE] [WORDS FOR SNAKEMAKE]...")
def study(words: tuple[str, ...]) -> None:
    """Extract, train, measure, draw: notebooks/Snakefile for PROFILE (laptop). -n shows what would run."""
    from .pipeline import run_study

    named = bool(words) and not words[0].startswith("-")
    sys.exit(run_study(words[0] if named else "laptop", list(words[named:])))


@cli.commands["notebook"].command()
@click.argument("source", metavar="IN")
@click.argument("output", metavar="OUT")
@click.option("-f", "--file", "files", multiple=True, help="YAML file of parameters")
@click.option("-y", "--yaml", "texts", multiple=True, help="YAML text of parameters")
@click.option("-p", "--parameter", "values", nargs=2, multiple=True, metavar="NAME VALUE")
@click.option("--cwd", help="folder to run in (the notebook's)")
@click.option("--owns", help="folder that this notebook alone writes")
@click.option("--fingerprint", help="what the contents of that folder depend on")
def run(source: str, output: str, files: tuple, texts: tuple, values: tuple, **options: str) -> None:
    """Run one notebook with parameters of your own."""
    from .notebooks import run_notebook

    parameters = {}
    for text in [*(Path(file).read_text() for file in files), *texts]:
        parameters |= yaml.safe_load(text) or {}
    run_notebook(source, output, parameters | {name: yaml.safe_load(value) for name, value in values}, **options)

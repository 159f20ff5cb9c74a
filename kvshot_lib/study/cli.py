"""The study's one command line: `python -m kvshot_lib VERB`, or `kvshot VERB`; `--help` lists the verbs.

A verb imports what it calls when it runs, so that every command starts at once. (click, not typer: that can't take
``-p NAME VALUE`` more than once, as papermill does.) Verbs that measure trained drafters are in `measurements`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import click
import yaml
from click import argument, option

from ..errors import StudyError
from ..files import disk_trouble
from .measurements import decode, eagle3, examine_checkpoint, measure, serve_check
from .options import device, dtype, of_dialogues, of_runs, options, profile, runs, several, target, tell


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


@click.group()
def cli() -> None:
    """The KVShot study."""


@cli.group()
def notebook() -> None:
    """Run notebooks."""


for own in (measure, decode, eagle3, examine_checkpoint, serve_check):
    cli.add_command(own)


@cli.command(context_settings={"ignore_unknown_options": True})
@argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[PROFILE] [WORDS FOR SNAKEMAKE]...")
def study(words: tuple[str, ...]) -> None:
    """Extract, train, measure, draw: notebooks/Snakefile for PROFILE (laptop). -n shows what would run."""
    from .pipeline import run_study

    named = bool(words) and not words[0].startswith("-")
    sys.exit(run_study(words[0] if named else "laptop", list(words[named:])))


@cli.command()
@argument("profiles", nargs=-1)
def figures(profiles: Sequence[str]) -> None:
    """Draw figures/PROFILE anew from data/recorded/PROFILE, for all recorded profiles or those that are named."""
    from .pipeline import redraw

    redraw(profiles)


@cli.command()
@argument("step")
def fingerprint(step: str) -> None:
    """What makes the results of STEP (extract, train, … or a module, such as probes.shift) out of date."""
    from .fingerprints import covered

    tell(covered(step))


@cli.command()
@profile
@runs
@options("where they go (results/PROFILE by default)", results_dir="")
@options("trainings side by side", workers=4)
def sweep(**given) -> None:
    """Train a profile's runs side by side with the features in memory, on one large GPU. Status 1: some are left.

    Of a profile with live features: by turns, fed by one stream of the target.
    """
    from .sweep import sweep_profile

    left = sweep_profile(**given)
    print(f"{left} runs are left: the same command goes on with them" if left else "all runs are done")
    sys.exit(left > 0)


@cli.command()
@profile
@argument("what", metavar="extract|train")
@runs
@options("where they go (results/PROFILE by default)", results_dir="")
def processes(**given) -> None:
    """Extract or train over several processes: accelerate launch --multi_gpu -m kvshot_lib processes …"""
    from .sweep import several_processes

    several_processes(**given)


@cli.command()
@argument("out")
@target
@device
@dtype
@of_dialogues
def generate(**given) -> None:
    """Let the target write dialogues into the folder OUT; a killed run goes on where it was."""
    from ..text.generate import generate

    print(generate(**given))


@cli.command()
@of_runs
@options("of the bootstrap", samples=2000, seed=0)
@options("folder of tables made before; rows of theirs that are not measured here stay", keep="")
def collect(**given) -> None:
    """Merge finished runs, all or some, into RESULTS_DIR/tables."""
    from ..metrics.collect import collect

    tell(collect(**given).values())


@cli.command()
@profile
def record(profile: str) -> None:
    """Copy tables and figures of results/PROFILE to data/recorded/PROFILE and figures/PROFILE, to be published."""
    from .recorded import record

    print(record(profile))


@cli.command()
@target
@options(corpus="selfgen", vocabulary=8192)
@options("to decode with in a chain of 2, if given", drafter="data/checkpoints/hidden_31_continued")
@options("the longest of the corpus (0: 64 on a GPU, else 8); half of them make a training step", documents=0)
@options("timed training steps (0: 20 on a GPU, 3 elsewhere)", steps=0)
@options("dialogues to write (0: 4,096 on a GPU, else 16)", texts=0)
@several("processes", "to train with, one number after the other", 1, 2, kind=int)
@options("the table that gets a row for each speed", out="results/bench.csv")
@options("only one process's part of the training in several", share=False)
def bench(**given) -> None:
    """Speed of capture, training, judging, generation and decoding on this machine, beside its floor."""
    from .bench import bench

    bench(**given)


@cli.command("dry-run")
@profile
@options("of each training", steps=20)
@options("tokens of a document (0: the profile's)", length=0)
@several("drafters", "some of the profile's")
@options("to extrapolate to; the paper's larger set by default", dialogues=280_000)
@device
@dtype
def dry_run(**given) -> None:
    """A profile's generation, extraction and trainings for a few steps with random weights: what will it take?"""
    from .scale import dry_run

    print(dry_run(**given))


@cli.command()
@of_runs
@options("the folder that gets a folder a drafter", to="data/checkpoints")
@options("of rounding, in standard deviations of a row", step=0.5)
def publish(**given) -> None:
    """Trained drafters made small and described, for data/checkpoints; tells what rounding changed."""
    from .publish import publish_runs

    publish_runs(**given)


@cli.command()
@argument("results_dir")
@argument("name")
@options("what the run depends on; what another one left is removed", mark="")
def judge(**given) -> None:
    """Judge the published drafter NAME in a study of one's own, as one variant more."""
    from .publish import judge_checkpoint

    print(judge_checkpoint(**given))


@cli.command()
@argument("profile", default="")
@options(out="results/report")
def report(profile: str, out: str) -> None:
    """One web site of notebooks, figures, scorecard and runs: of what is committed, or of results/PROFILE."""
    from .site import build, committed, of_profile

    first = build(of_profile(profile) if profile else committed(), Path(out))
    print(f"{len(list(Path(out).rglob('*.html')))} pages; open {first} in a browser")


@notebook.command()
@argument("notebook", metavar="IN")
@argument("output", metavar="OUT")
@option("-y", "--yaml", "texts", multiple=True, help="YAML text of parameters")
@option("-p", "--parameter", "values", nargs=2, multiple=True, metavar="NAME VALUE")
@option("--owns", help="folder that this notebook alone writes")
@option("--fingerprint", help="what the contents of that folder depend on")
def run(texts: Sequence[str], values: Sequence[tuple[str, str]], **given) -> None:
    """Run one notebook with parameters of your own."""
    from .notebooks import run_notebook

    parameters = {}
    for text in texts:
        parameters |= yaml.safe_load(text) or {}
    parameters |= {name: yaml.safe_load(value) for name, value in values}
    run_notebook(parameters=parameters, **given)

"""Commands that measure drafters: `kvshot measure …`, `kvshot decode …`, `kvshot eagle3 …`, `kvshot examine …`."""

import sys
from importlib import import_module
from pathlib import Path

import click
from click import argument

from .options import device, dtype, of_runs, of_speed, options, prompts, several, target, tell, threads, timed


def measured(module: str, function: str, **given):
    """What a function gives that is told the fingerprint of its code: what other code has measured is done anew."""
    from .fingerprints import fingerprint

    return getattr(import_module(f"kvshot_lib.{module}"), function)(**given, fingerprint=fingerprint(module, {}))


@click.group()
def measure() -> None:
    """Diagnostics of trained drafters."""


@measure.command()
@of_runs
def queries(**given) -> None:
    """Attention overlap and probe of drafters whose queries can be compared with the target's."""
    tell(measured("probes.queries", "measure_queries", **given).values())


@measure.command()
@of_runs
@options("whose evaluation documents are read (default: selfgen, tiny for a tiny target)", corpus="")
@options("sequences a run, each of other documents", documents=8)
@several("contexts", "lengths in tokens", 128, 256, 512, 1024, 2048, kind=int)
@device
def gradients(**given) -> None:
    """Gradient and attention on draft-side entries, by context length."""
    tell(measured("probes.gradients", "measure_gradients", **given).values())


@measure.command()
@of_runs
def shift(**given) -> None:
    """How far the target's attention moves, and where each drafter was right."""
    tell(measured("probes.shift", "measure_shift", **given).values())


@measure.command()
@of_runs
@options(
    "whose evaluation documents are read: `kvshot generate --max-answer-tokens …` writes long ones", corpus="selfgen"
)
@options("the first so many", documents=64)
@several("windows", "tokens that an anchor sees of its prefix; 0: all", 0, kind=int)
@device
def context(**given) -> None:
    """Acceptance by length of context, on long dialogues."""
    tell(measured("probes.long_context", "measure_context", **given).values())


@click.group()
def decode() -> None:
    """Real decoding: its speed, and that it changes no token."""


@decode.command()
@of_runs
@of_speed
@device
@dtype
def speed(**given) -> None:
    """Time decoding with trained drafters, or with those of a folder of checkpoints: RESULTS_DIR/tables."""
    tell(measured("decoding.timing", "measure_speed", **given))


@decode.command()
@argument("results_dir")
@options("with decode_prompts, by which they are chosen (RESULTS_DIR/tables by default)", tables_dir="")
@timed
@device
@dtype
def duel(**given) -> None:
    """Time the fastest drafter of either side and claim C14's pair on other prompts."""
    print(measured("decoding.timing", "duel", **given))


@decode.command()
@of_runs
@prompts
@options("the first so many of them", count=105)
@options("at most, of an answer", new_tokens=320)
@device
@options("of target and drafters: float32 or bfloat16", dtype="float32")
@threads
@options("where rows and table go (RESULTS_DIR by default)", out="")
def lossless(**given) -> None:
    """Decode greedily and compare every token with the target alone. Status 1: one differs in float32."""
    sys.exit(measured("decoding.lossless", "verify_lossless", **given))


@decode.command()
@argument("tables_dir")
@options("qwen3-8b, on a GPU; tiny tries the command out", architecture="qwen3-8b")
@several("drafters", "variants", "hidden", "kv_1", "kv_2", "kv_4", "hybrid", "cross_only_warm", "block_kv_2")
@several("prefixes", "context lengths in tokens", 512, 2048, 8192, kind=int)
@options("draft_vocab_size", vocabulary=32_000)
@device
def latency(**given) -> None:
    """Time verifying and drafting at the size of an architecture, with random weights: step_latency."""
    from ..decoding.latency import measure_latency

    print(measure_latency(**given))


@click.command("serve-check")
@of_runs
@prompts
@options("the first so many of them", count=35)
@options("at most, of an answer", new_tokens=64)
@options("of the chains", draft_length=3)
@threads
@options("of the environment that has vLLM", python=".venv-serving/bin/python")
@options("where exported drafters, answers and the table go", out="results/serving")
def serve_check(**given) -> None:
    """Serve drafters by vLLM: same tokens, same accepted drafts as here? Status 1: something differs."""
    from .fingerprints import fingerprint
    from .serving import serve_check

    sys.exit(serve_check(**given, fingerprint=fingerprint("decoding.decode", {})))


@click.group()
def eagle3() -> None:
    """Drafters in EAGLE-3's own form, as serving engines load them."""


@eagle3.command()
@argument("run_folder")
@argument("out")
@target
@options("float32, bfloat16 or float16", dtype="bfloat16")
def export(run_folder: str, out: str, target: str, dtype: str) -> None:
    """A trained `hidden` drafter as the folder of an EAGLE-3 checkpoint, which vLLM and SGLang load."""
    import torch

    from ..drafters.checkpoint import load_drafter
    from ..drafters.eagle3 import export_eagle3
    from ..target.load import load_target

    model = load_target(target, dtype="float32")
    print(export_eagle3(load_drafter(Path(run_folder), model), model, Path(out), dtype=getattr(torch, dtype)))


@click.command("examine")
@argument("checkpoint")
@target
@prompts
@options("the first so many of them", count=28)
@options("at most, of an answer", new_tokens=96)
@options("draft steps that are judged", draft_length=7)
@options("faults that are looked for, one on top of the other", rounds=2)
@click.option(
    "--set", "fields", multiple=True, default=(), metavar="FIELD=VALUE",
    help="of config.json, taken instead: rope_theta=10000 if it was trained so; may be repeated",
)  # fmt: skip
@device
@options("where report, table and finished parts go", out="results/examined")
def examine_checkpoint(**given) -> None:
    """Why does this EAGLE-3 checkpoint accept what it accepts? Tries the usual faults: an HTML report, and a table."""
    from .microscope import examine_checkpoint

    print(examine_checkpoint(**given))

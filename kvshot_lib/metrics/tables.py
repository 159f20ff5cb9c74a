"""The study's tidy tables: their columns, how runs are collected into them, and how they are read back.

A run leaves ``run.json`` (one row of ``runs``), ``counts.csv``, ``run_lengths.csv``, ``axes.csv``, ``history.csv`` and ``gradients.csv`` in
``RESULTS_DIR/runs/<variant>/seed<seed>/``. ``python -m kvshot_lib.metrics.tables collect RESULTS_DIR`` merges them, in an order
that depends on their names only, into ``RESULTS_DIR/tables`` and adds ``acceptance``: metrics and intervals. Tables are
CSV files if they are small, else Parquet (zstd), as ``counts.parquet``; :func:`read` opens both.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..drafters.variants import MAIN_VARIANTS, VARIANTS
from ..errors import StudyError
from ..files import check_listed, read_json, sha256, write_atomically, write_csv
from .acceptance import AXES
from .resampling import acceptance_table


def _columns(text: str) -> dict[str, str]:
    return dict(column.split(":") for column in text.split())


# Column names and types of each table. Int64 columns may have empty cells; `runs` and `scorecard` may have further columns.
SCHEMAS = {
    "runs": _columns(
        "variant:str seed:int64 paradigm:str num_layers:int64 parameters:int64 trained_tokens:int64 train_s:float64 "
        "device:str dtype:str git_revision:str torch:str transformers:str date:str target:str target_hash:str "
        "corpus:str draft_vocab_size:int64 ttt_steps:int64 anchor_fraction:float64 learning_rate:float64 "
        "epochs:float64 profile:str evaluation_documents:int64 out_of_draft_vocab_fraction:float64"
    ),
    "counts": _columns(
        "variant:str seed:int64 document:int64 draft_step:int64 anchors:int64 matches:int64 reached:int64 "
        "chain_matches:int64"
    ),
    "run_lengths": _columns("variant:str seed:int64 document:int64 anchors:int64 accepted:int64"),
    "retrained": _columns("variant:str seed:int64 document:int64 anchors:int64 accepted:int64"),  # same seed, once more
    "axes": _columns(
        "variant:str seed:int64 document:int64 axis:str bin_low:int64 draft_step:int64 anchors:int64 matches:int64"
    ),
    "history": _columns(
        "variant:str seed:int64 step:int64 trained_tokens:int64 seconds:float64 split:str draft_step:Int64 "
        "loss:float64 acceptance:float64 learning_rate:float64"
    ),
    "gradients": _columns(
        "variant:str seed:int64 step:int64 trained_tokens:int64 layer:Int64 branch:str matrix:str draft_step:Int64 "
        "document:Int64 quantity:str value:float64"
    ),
    "gradient_flow": _columns(
        "variant:str seed:int64 document:int64 context_length_tokens:int64 anchors:int64 layer:int64 branch:str "
        "matrix:str side:str draft_step:Int64 quantity:str value:float64"
    ),
    # Decoding: a row an answer, a row a part of a step, and what comes of them (`speed`, `decode_tables`).
    "decode_prompts": _columns(
        "variant:str seed:int64 mode:str plan:str prompt:str turn:int64 category:str prompt_tokens:int64 "
        "new_tokens:int64 same_tokens:int64 forwards:int64 drafted:Int64 accepted:Int64 seconds:float64 "
        "fastest_s:float64 slowest_s:float64 repeats:int64 prefill_s:float64 verify_s:float64 draft_s:float64 "
        "project_s:float64 bookkeeping_s:float64 sampling_s:float64 rest_s:float64 dtype:str device:str"
    ),
    "decode_steps": _columns(
        "variant:str seed:int64 mode:str plan:str prefix_tokens:int64 part:str milliseconds:float64 steps:int64 "
        "dtype:str device:str"
    ),
    "decoding": _columns(
        "variant:str seed:int64 mode:str plan:str category:str decoded_mat:float64 decoded_mat_low:float64 "
        "decoded_mat_high:float64 tokens_per_s:float64 target_tokens_per_s:float64 speedup:float64 speedup_low:float64 "
        "speedup_high:float64 prefill_s:float64 verify_s:float64 draft_s:float64 project_s:float64 "
        "bookkeeping_s:float64 sampling_s:float64 rest_s:float64 other_s:float64 new_tokens:int64 forwards:int64 "
        "answers:int64 same_answers:int64 prompts:int64 dtype:str device:str"
    ),
    "lossless": _columns(
        "variant:str seed:int64 mode:str prompt:str new_tokens:int64 target_forwards:int64 accepted:int64 mismatches:int64 "
        "first_mismatch:Int64 logit_gap:float64 dtype:str device:str git_revision:str torch:str transformers:str date:str"
    ),
    "step_latency": _columns(
        "what:str tokens:int64 prefix_tokens:int64 milliseconds:float64 fastest_ms:float64 slowest_ms:float64 "
        "replays:int64 method:str dtype:str device:str architecture:str"
    ),
    "compute": _columns(
        "variant:str seed:int64 tokens:int64 anchors:float64 pairs:float64 training_flops:float64 start_flops:float64 "
        "chain_flops:int64 chain_bytes:int64 target_flops:int64 target_bytes:int64 context_length_tokens:int64"
    ),
    "acceptance": _columns(
        "variant:str seed:int64 metric:str draft_step:Int64 value:float64 low:float64 high:float64 anchors:int64 "
        "documents:int64"
    ),
    "scorecard": _columns(
        "claim:str kind:str statement:str statistic:str paper_value:float64 value:float64 low:float64 high:float64 "
        "direction:str threshold:float64 verdict:str measured_value:float64 measured_low:float64 "
        "measured_high:float64 measured_verdict:str seeds:Int64 missing:str"
    ),
    "attention_shift": _columns(
        "document:int64 draft_step:int64 generated_offset:int64 context_length_tokens:int64 shift:float64 "
        "shift_with_sink:float64 new_mass:float64 entropy:float64"
    ),
    "attention_matches": _columns("variant:str seed:int64 document:int64 draft_step:int64 matches:str"),
    "recoverable": _columns("source:str distance:int64 document:int64 positions:int64 correct:int64 nats:float64"),
    "attention_overlap": _columns(
        "variant:str seed:int64 document:int64 source:str draft_step:int64 layer:Int64 target_layer:int64 anchors:int64 "
        "js:float64 js_with_sink:float64 recall:float64 recall_with_sink:float64"
    ),
    "query_probe": _columns(
        "variant:str seed:int64 document:int64 labels:str draft_step:int64 layer:int64 target_layer:int64 "
        "residual:float64 total:float64"
    ),
    "query_oracle": _columns(
        "variant:str seed:int64 arm:str trained_tokens:int64 document:int64 draft_step:int64 anchors:int64 matches:int64 "
        "reached:int64 chain_matches:int64"
    ),
}
KEYS = {
    "runs": ["variant", "seed"],
    "counts": ["variant", "seed", "document", "draft_step"],
    "run_lengths": ["variant", "seed", "document"],
    "retrained": ["variant", "seed", "document"],
    "axes": ["variant", "seed", "document", "axis", "bin_low", "draft_step"],
    "history": ["variant", "seed", "step", "split", "draft_step"],
    "gradients": ["variant", "seed", "step", "layer", "branch", "matrix", "draft_step", "document", "quantity"],
    "gradient_flow": [
        *("variant", "seed", "document", "context_length_tokens"),
        *("layer", "branch", "matrix", "side", "draft_step", "quantity"),
    ],
    "decode_prompts": ["variant", "seed", "dtype", "mode", "plan", "prompt", "turn"],
    "decode_steps": ["variant", "seed", "dtype", "mode", "plan", "prefix_tokens", "part"],
    "decoding": ["variant", "seed", "dtype", "mode", "plan", "category"],
    "lossless": ["variant", "seed", "mode", "dtype", "prompt"],
    "step_latency": ["what", "tokens", "prefix_tokens"],
    "compute": ["variant", "seed"],
    "acceptance": ["variant", "seed", "metric", "draft_step"],
    "scorecard": ["claim"],
    "attention_shift": ["document", "draft_step", "context_length_tokens"],
    "attention_matches": ["variant", "seed", "document", "draft_step"],
    "recoverable": ["source", "distance", "document"],
    "attention_overlap": ["variant", "seed", "document", "source", "draft_step", "layer", "target_layer"],
    "query_probe": ["variant", "seed", "document", "labels", "draft_step", "layer", "target_layer"],
    "query_oracle": ["variant", "seed", "arm", "document", "draft_step"],
}
SCHEMAS["decode_duel"], KEYS["decode_duel"] = SCHEMAS["decode_prompts"], KEYS["decode_prompts"]  # of `duel`
QUERIES = {"attention_overlap", "query_probe", "query_oracle"}
DIAGNOSTICS = {"attention_shift", "attention_matches", "recoverable", *QUERIES}  # not every study measures them

# A row a document or a training step: large in a large run.
COMPRESSED = {
    "counts",
    "run_lengths",
    "retrained",
    "axes",
    "history",
    "gradients",
    "gradient_flow",
    "decode_prompts",
    "decode_duel",
    "decode_steps",
    "decoding",
    "lossless",
    *DIAGNOSTICS,
}
# Studies recorded before there was such a table have none.
OPTIONAL = {
    "axes",
    "retrained",
    "compute",
    "gradients",
    "gradient_flow",
    "decode_prompts",
    "decode_duel",
    "decode_steps",
    "decoding",
    "lossless",
    "step_latency",
    *DIAGNOSTICS,
}
OLD_FORMS = ("columns.xz", "csv.xz")  # of tables that earlier versions of the study wrote
OF_RUN = ("counts", "run_lengths", "axes", "history", "gradients")  # what a run leaves beside its run.json


def check(table: pd.DataFrame, name: str, source: str | Path, remedy: str = "") -> pd.DataFrame:
    """Return ``table`` with the columns and types of ``SCHEMAS[name]``; a StudyError if it does not fit them."""
    schema, remedy = SCHEMAS[name], remedy or "make it again with notebooks/03_train_drafter.ipynb"
    missing = [column for column in schema if column not in table.columns]
    extra = [] if name in ("runs", "scorecard") else [column for column in table.columns if column not in schema]
    if missing or extra:
        told = [f"{what} {', '.join(names)}" for what, names in (("lacks", missing), ("has unknown", extra)) if names]
        raise StudyError(f"{source} {' and '.join(told)} (columns of {name}: {', '.join(schema)}): {remedy}")
    further = sorted(column for column in table.columns if column not in schema)
    try:
        table = table[[*schema, *further]].astype(schema)
    except (ValueError, TypeError) as error:
        raise StudyError(f"{source} has a cell of the wrong type ({str(error).splitlines()[0]}): {remedy}") from None
    if table.duplicated(KEYS[name]).any():
        twice = table[table.duplicated(KEYS[name])].iloc[0][KEYS[name]].to_dict()
        raise StudyError(f"{source} has two rows for {twice}: {remedy}")
    return table


def path_of(tables_dir: str | Path, name: str) -> Path:
    """Where table ``name`` lies: Parquet if it is large (``COMPRESSED``), else CSV."""
    return Path(tables_dir) / f"{name}.{'parquet' if name in COMPRESSED else 'csv'}"


def read(tables_dir: str | Path, name: str) -> pd.DataFrame:
    """Read and check one of the collected tables; ``name`` is a key of ``SCHEMAS``.

    A table of ``OPTIONAL`` that is not there is read as an empty one.

    Raises
    ------
    StudyError : no such table, one of an earlier version (names the command that converts it), or one that is damaged.
    """
    path = path_of(tables_dir, name)
    remedy = "train drafters with notebooks/03_train_drafter.ipynb, then collect them; `make study` does both"
    if path.is_file():
        if path.suffix == ".csv":  # Parquet has checksums of its own
            check_listed(path, remedy)
        return check(_read(path, name), name, path, remedy)
    if old := [f"{name}.{form}" for form in OLD_FORMS if path.with_name(f"{name}.{form}").is_file()]:
        raise StudyError(
            f"{path.with_name(old[0])} has the form of an earlier version: convert the folder once with "
            f"`python -m kvshot_lib.study.convert {tables_dir}`"
        )
    if name in OPTIONAL:
        return empty(name)
    raise StudyError(f"{path} is not there: {remedy}")


def read_one(path: Path, name: str) -> pd.DataFrame:
    """Read and check one file with the columns of table ``name``."""
    return check(_read(path, name), name, path, "delete it and make it again")


def empty(name: str) -> pd.DataFrame:
    """Table ``name`` without rows."""
    return pd.DataFrame(columns=list(SCHEMAS[name])).astype(SCHEMAS[name])


def _read(path: Path, name: str) -> pd.DataFrame:
    """Read a table of either form; only empty cells are missing (a variant may be called ``none``), and text such as 1e5 stays text."""
    text = {column: "str" for column, kind in SCHEMAS[name].items() if kind == "str"}
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])
    except (ValueError, OSError) as error:  # pyarrow's and pandas' own are ValueErrors and OSErrors, too
        told = str(error).splitlines()[0]
        raise StudyError(f"{path} is no readable table ({told}): delete it and make it again") from None


def write(tables_dir: str | Path, name: str, table: pd.DataFrame) -> Path:
    """Write a collected table atomically, the same rows always as the same bytes; those of ``COMPRESSED`` as Parquet (zstd)."""
    path = path_of(tables_dir, name)
    if path.suffix == ".csv":
        return write_csv(path, table, listed=True)
    packed = {"index": False, "compression": "zstd", "compression_level": 19}
    return write_atomically(path, lambda temporary: table.to_parquet(temporary, **packed))


def in_order(variants) -> list[str]:
    """Each variant once: those of the study in its own order, then others by name."""
    known = {name: i for i, name in enumerate(VARIANTS)}
    return sorted(set(variants), key=lambda name: (known.get(name, len(known)), name))


def collect(
    results_dir: str | Path, runs: Sequence[str] = (), samples: int = 2000, seed: int = 0, *, keep: str | Path = ""
) -> dict[str, Path]:
    """Merge runs (``variant/seed0`` …; all finished ones by default) of ``results_dir`` into ``results_dir/tables/``, as `write` does.

    ``keep`` names a folder of tables collected before: their runs stay, unless ``results_dir`` has trained them again.

    Floats keep 6 significant digits, and a training history at most 100 steps per run and split, so that recorded
    tables stay small. A run without ``run.json`` is unfinished and left out.

    Raises
    ------
    StudyError : no finished run; a run with a missing or malformed file; runs that can't be compared (other evaluation
        documents, draft steps, anchors or target). Tables of an earlier collection stay as they were.
    """
    results_dir = Path(results_dir)
    finished = [path.parent for path in results_dir.glob("runs/*/seed*/run.json")]
    finished = [folder for folder in finished if not runs or f"{folder.parent.name}/{folder.name}" in runs]
    if not finished:
        raise StudyError(
            f"no finished run in {results_dir / 'runs'}: train a drafter there with notebooks/03_train_drafter.ipynb"
        )
    found = [_read_run(folder) for folder in finished]
    if keep:
        found += _kept_runs(keep, {(run["runs"]["variant"].iloc[0], run["runs"]["seed"].iloc[0]) for run in found})
    position = {name: i for i, name in enumerate(in_order(run["runs"]["variant"].iloc[0] for run in found))}
    found.sort(key=lambda run: (position[run["runs"]["variant"].iloc[0]], run["runs"]["seed"].iloc[0]))
    tables = {name: pd.concat([run[name] for run in found], ignore_index=True) for name in found[0]}
    _check_one_target(tables["runs"], results_dir)
    tables["acceptance"] = acceptance_table(tables["counts"], tables["run_lengths"], samples, seed)
    tables["history"] = _thin(tables["history"])
    return {name: write(results_dir / "tables", name, rounded(table)) for name, table in sorted(tables.items())}


def _kept_runs(tables_dir: str | Path, replaced: set[tuple[str, int]]) -> list[dict[str, pd.DataFrame]]:
    """The runs of collected tables, but those of ``replaced`` (variant, seed): each the tables that `_read_run` gives."""
    tables = {name: read(tables_dir, name) for name in ("runs", *OF_RUN)}
    keys = tables["runs"][["variant", "seed"]].itertuples(index=False, name=None)
    return [
        {name: table[(table["variant"] == v) & (table["seed"] == s)] for name, table in tables.items()}
        for v, s in keys
        if (v, s) not in replaced
    ]


def read_record(folder: Path) -> dict:
    """What ``run.json`` says of a finished run."""
    record = read_json(folder / "run.json", f"delete {folder} and train again")
    record.pop("files", None)
    return record


def _read_run(folder: Path) -> dict[str, pd.DataFrame]:
    """The checked tables that one run left in ``runs/<variant>/seed<seed>/``."""
    found = {"runs": check(pd.DataFrame([read_record(folder)]), "runs", folder / "run.json")}
    for file, digest in read_json(folder / "run.json", "").get("files", {}).items():
        if not (folder / file).is_file() or sha256(folder / file) != digest:
            raise StudyError(f"{folder / file} is missing or not what the run wrote: delete {folder} and train again")
    for name in OF_RUN:
        path = folder / f"{name}.csv"
        if path.is_file():
            found[name] = check(_read(path, name), name, path)
        elif name in OPTIONAL:
            found[name] = empty(name)
        else:
            raise StudyError(f"{path} is not there: run notebooks/03_train_drafter.ipynb for this run again")
    expected = f"{folder.parent.name}/{folder.name}"
    for name, table in found.items():
        if table.empty and name in OPTIONAL:
            continue
        inside = sorted({f"{row.variant}/seed{row.seed}" for row in table.itertuples()}) or ["no run"]
        if inside != [expected]:
            raise StudyError(f"the {name} in {folder} are of {' and '.join(inside)}: delete {folder} and train again")
    _check_axes(found["axes"], found["counts"], folder)
    return found


def _check_axes(axes: pd.DataFrame, counts: pd.DataFrame, folder: Path) -> None:
    """Refuse a run whose anchors and matches along an axis are not those of its counts."""
    index, summed = ["document", "draft_step"], ["anchors", "matches"]
    wanted = counts[counts["draft_step"].isin(axes["draft_step"]) & (counts["anchors"] > 0)]
    for axis in AXES:
        found = axes[axes["axis"] == axis].groupby(index)[summed].sum()
        if not found.equals(wanted.set_index(index)[summed].sort_index()):
            raise StudyError(
                f"the bins of {axis} in {folder / 'axes.csv'} don't sum to counts.csv: delete {folder} and train again"
            )


def _check_one_target(runs: pd.DataFrame, results_dir: Path) -> None:
    """Refuse runs on different targets in one table: their acceptance says nothing about one another."""
    if runs["target_hash"].nunique() > 1:
        first = runs.drop_duplicates("target_hash")
        named = " and ".join(f"{r.variant} seed {r.seed} ({r.target}, {r.target_hash[:8]})" for r in first.itertuples())
        raise StudyError(
            f"runs in {results_dir} have different targets: {named}; give each target a results_dir of its own"
        )


def _thin(history: pd.DataFrame, most: int = 100) -> pd.DataFrame:
    """Keep at most ``most`` evenly spaced steps of each run and split, the first and the last among them."""

    def kept(steps: pd.Series) -> pd.Series:
        different = np.unique(steps)
        return steps.isin(different[np.linspace(0, len(different) - 1, min(most, len(different))).round().astype(int)])

    return history[history.groupby(["variant", "seed", "split"])["step"].transform(kept).astype(bool)]


def rounded(table: pd.DataFrame) -> pd.DataFrame:
    """Floats to 6 significant digits."""
    floats = table.select_dtypes("float64").columns
    return table.assign(**{name: [float(f"{x:.6g}") for x in table[name]] for name in floats})


def thin(tables_dir: str | Path) -> list[Path]:
    """Make the largest of the recorded tables smaller by what is not drawn of them.

    ``axes`` keeps the main drafters (all, if none is there); ``gradients`` attention's projections, the fusion's maps and the gates, to four digits.
    """
    axes, gradients = read(tables_dir, "axes"), read(tables_dir, "gradients")
    main_ones = axes[axes["variant"].isin(MAIN_VARIANTS)]
    gradients = gradients[gradients["matrix"].str.contains(r"_proj$|^fusion\.|^gate$|^output$")]
    gradients = gradients.assign(value=gradients["value"].map(lambda x: float(f"{x:.4g}")))
    made = {"axes": main_ones if len(main_ones) else axes, "gradients": gradients}
    return [write(tables_dir, name, table) for name, table in made.items()]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kvshot_lib.metrics.tables", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="collect|thin")
    command = commands.add_parser("collect", help="merge the runs of RESULTS_DIR into RESULTS_DIR/tables/*.csv")
    command.add_argument("results_dir", metavar="RESULTS_DIR")
    command.add_argument("runs", nargs="*", metavar="VARIANT/seedN", help="only these (all finished ones by default)")
    command.add_argument(
        "--keep", default="", metavar="TABLES_DIR", help="and the runs of these tables, if not trained again"
    )
    command = commands.add_parser("thin", help=thin.__doc__)
    command.add_argument("tables_dir", metavar="TABLES_DIR")
    given = parser.parse_args(arguments)
    try:
        if "tables_dir" in given:
            print(*thin(given.tables_dir), sep="\n")
            return
        for path in collect(given.results_dir, given.runs, keep=given.keep).values():
            print(path)
    except StudyError as error:
        sys.exit(f"StudyError: {error}")


if __name__ == "__main__":
    main()

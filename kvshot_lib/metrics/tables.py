"""The study's tidy tables: their columns, and how they are written and read back.

Small tables are CSV files, large ones Parquet (Brotli). A folder of tables is all that figures and verdicts need.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..errors import StudyError
from ..files import check_listed, list_file, write_atomically, write_csv


@dataclass(frozen=True)
class Table:
    """What a table holds.

    columns : name to pandas type, in the order of the file; any table may have further columns after these.
    keys : the columns that tell its rows apart.
    large : Parquet instead of CSV.
    optional : not every study has it; one that is not there reads as an empty one.
    """

    columns: dict[str, str]
    keys: list[str]
    large: bool
    optional: bool


TYPES = {"": "int64", "int?": "Int64", "float": "float64", "str": "str"}  # int? may have empty cells


def _table(columns: str, *, large: bool = False, optional: bool = True) -> Table:
    """Columns as ``name:type``, integers where no type stands; ``*`` marks those that tell rows apart."""
    parts = [column.partition(":")[::2] for column in columns.split()]
    types = {name.lstrip("*"): TYPES[kind] for name, kind in parts}
    return Table(types, [name[1:] for name, _ in parts if name[0] == "*"], large, optional)


RUN = "*variant:str *seed "
CHAIN = " anchors matches reached chain_matches"
PARTS = ("prefill", "verify", "draft", "project", "bookkeeping", "sampling", "rest")  # of an answer's time
SECONDS = "".join(f" {part}_s:float" for part in PARTS)
ANSWER = _table(  # a row an answer
    RUN + "*mode:str *plan:str *prompt:str *turn category:str prompt_tokens new_tokens same_tokens forwards "
    "drafted:int? accepted:int? seconds:float fastest_s:float slowest_s:float repeats" + SECONDS +
    " *dtype:str device:str",
    large=True,
)  # fmt: skip
FACTS = (  # what was measured, on what, by which code
    " target:str target_hash:str documents *documents_hash:str dtype:str seconds:float device:str git_revision:str "
    "torch:str transformers:str date:str"
)
TABLES = {
    # What a run leaves, and what is collected from it.
    "runs": _table(
        RUN + "paradigm:str num_layers parameters trained_tokens train_s:float device:str dtype:str git_revision:str "
        "torch:str transformers:str date:str target:str target_hash:str corpus:str draft_vocab_size ttt_steps "
        "anchor_fraction:float learning_rate:float epochs:float profile:str evaluation_documents "
        "out_of_draft_vocab_fraction:float", optional=False,
    ),
    "counts": _table(RUN + "*document *draft_step" + CHAIN, large=True, optional=False),
    "run_lengths": _table(RUN + "*document anchors accepted", large=True, optional=False),
    "retrained": _table(RUN + "*document anchors accepted", large=True),  # run lengths of the same seed, trained again
    "axes": _table(RUN + "*document *axis:str *bin_low *draft_step anchors matches", large=True),
    "history": _table(
        RUN + "*step trained_tokens seconds:float *split:str *draft_step:int? loss:float acceptance:float "
        "learning_rate:float", large=True, optional=False,
    ),
    "gradients": _table(
        RUN + "*step trained_tokens *layer:int? *branch:str *matrix:str *draft_step:int? *document:int? *quantity:str "
        "value:float", large=True,
    ),
    "acceptance": _table(
        RUN + "*metric:str *draft_step:int? value:float low:float high:float anchors documents", large=True,
    ),
    "compute": _table(
        RUN + "tokens anchors:float pairs:float training_flops:float chain_flops chain_bytes target_flops target_bytes "
        "context_length_tokens"
    ),
    # Decoding.
    "decode_prompts": ANSWER,
    "decode_duel": ANSWER,
    "decoding": _table(
        RUN + "*mode:str *plan:str *category:str decoded_mat:float decoded_mat_low:float decoded_mat_high:float "
        "tokens_per_s:float target_tokens_per_s:float speedup:float speedup_low:float speedup_high:float" + SECONDS +
        " other_s:float new_tokens forwards answers same_answers prompts *dtype:str device:str", large=True,
    ),
    "lossless": _table(
        RUN + "*mode:str *prompt:str new_tokens target_forwards accepted mismatches first_mismatch:int? "
        "logit_gap:float *dtype:str device:str git_revision:str torch:str transformers:str date:str", large=True,
    ),
    "step_latency": _table(
        "*what:str *tokens *prefix_tokens milliseconds:float fastest_ms:float slowest_ms:float replays method:str "
        "dtype:str device:str architecture:str"
    ),
    "bench": _table("*what:str value:float unit:str floor:float *card:str date:str revision:str"),
    "serving": _table(  # vLLM's numbers beside ours, summed over prompts
        RUN + "*draft_step accepted past_end engine_accepted forwards engine_forwards prompts new_tokens same_as_alone "
        "same_as_ours engine:str dtype:str target:str device:str git_revision:str torch:str transformers:str date:str"
    ),
    # Diagnostics.
    "gradient_flow": _table(
        RUN + "*document *context_length_tokens anchors *layer *branch:str *matrix:str *side:str *draft_step:int? "
        "*quantity:str value:float", large=True,
    ),
    "attention_shift": _table(
        "*document *draft_step generated_offset *context_length_tokens shift:float shift_with_sink:float "
        "new_mass:float entropy:float", large=True,
    ),
    "attention_matches": _table(RUN + "*document *draft_step matches:str", large=True),
    "attention_overlap": _table(
        RUN + "*document *source:str *draft_step *layer:int? *target_layer anchors js:float js_with_sink:float "
        "recall:float recall_with_sink:float", large=True,
    ),
    "query_probe": _table(
        RUN + "*document *labels:str *draft_step *layer *target_layer residual:float total:float", large=True
    ),
    "query_estimation_facts": _table("*runs:str" + FACTS),
    "attention_shift_facts": _table("kv_layers:str" + FACTS),
    "context": _table(
        RUN + "*window_tokens *document *bin_low *draft_step" + CHAIN + " complete accepted", large=True
    ),
    "context_facts": _table("*runs:str corpus:str" + FACTS),
    # Verdicts.
    "scorecard": _table(
        "*claim:str kind:str statement:str statistic:str paper_value:float value:float low:float high:float "
        "direction:str threshold:float verdict:str measured_value:float measured_low:float measured_high:float "
        "measured_verdict:str seeds:int? missing:str", optional=False,
    ),
}  # fmt: skip
SCHEMAS = {name: table.columns for name, table in TABLES.items()}


def path_of(tables_dir: str | Path, name: str) -> Path:
    """Where table ``name`` lies."""
    return Path(tables_dir) / f"{name}.{'parquet' if TABLES[name].large else 'csv'}"


def empty(name: str) -> pd.DataFrame:
    """Table ``name`` without rows."""
    return pd.DataFrame(columns=list(SCHEMAS[name])).astype(SCHEMAS[name])


def check(table: pd.DataFrame, name: str, source: str | Path, remedy: str = "") -> pd.DataFrame:
    """The table with its columns in order and of their types; a StudyError if it does not fit its schema."""
    columns, keys = TABLES[name].columns, TABLES[name].keys
    remedy = remedy or "make it again with notebooks/03_train_drafter.ipynb"
    if missing := [column for column in columns if column not in table]:
        raise StudyError(f"{source} lacks {', '.join(missing)} (columns of {name}: {', '.join(columns)}): {remedy}")
    try:
        table = table[[*columns, *sorted(set(table) - set(columns))]].astype(columns)
    except (ValueError, TypeError) as error:
        raise StudyError(f"{source} has a cell of the wrong type ({str(error).splitlines()[0]}): {remedy}") from None
    if (twice := table.duplicated(keys)).any():
        raise StudyError(f"{source} has two rows for {table.loc[twice, keys].iloc[0].to_dict()}: {remedy}")
    return table


def read(tables_dir: str | Path, name: str) -> pd.DataFrame:
    """Read and check one table of a folder.

    Raises
    ------
    StudyError : no such table, or one that is damaged.
    """
    path, remedy = path_of(tables_dir, name), "train drafters and collect them; `make study` does both"
    if path.is_file():
        check_listed(path, remedy)
    return read_one(path, name, remedy)


def read_one(path: Path, name: str, remedy: str = "delete it and make it again") -> pd.DataFrame:
    """Read and check a file with the columns of table ``name``; an optional one that is not there is empty.

    Only empty cells are missing (a variant may be called ``none``), and text such as 1e5 stays text.

    Raises
    ------
    StudyError : no such file, or none with this table.
    """
    if not path.is_file():
        if TABLES[name].optional:
            return empty(name)
        raise StudyError(f"{path} is not there: {remedy}")
    text = {column: "str" for column, kind in SCHEMAS[name].items() if kind == "str"}
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])
    except (ValueError, OSError) as error:  # what pyarrow and pandas raise are kinds of these
        told = str(error).splitlines()[0]
        raise StudyError(f"{path} is no readable table ({told}): delete it and make it again") from None
    return check(table, name, path, remedy)


def write(tables_dir: str | Path, name: str, table: pd.DataFrame) -> Path:
    """Write a table atomically, the same rows always as the same bytes."""
    path = path_of(tables_dir, name)
    if path.suffix == ".csv":
        return write_csv(path, table, listed=True)

    def pack(temporary: Path) -> None:
        whole = [name for name in table if pd.api.types.is_integer_dtype(table[name])]  # small counts: split by bytes
        how = {"column_encoding": dict.fromkeys(whole, "BYTE_STREAM_SPLIT"), "compression": "brotli"}
        table.to_parquet(temporary, index=False, use_dictionary=[*set(table) - set(whole)], compression_level=11, **how)
        list_file(path, temporary)  # a flipped bit of a Parquet page may be read as another number

    return write_atomically(path, pack)


def rounded(table: pd.DataFrame) -> pd.DataFrame:
    """Floats to 6 significant digits."""
    floats = table.select_dtypes("float64").columns
    return table.assign(**{name: [float(f"{x:.6g}") for x in table[name]] for name in floats})

"""Numbers in the text of notebook 01, held against recorded tables and profiles."""

from recorded import benched, table
from stated import checked

from kvshot_lib.study.profiles import load_profile

NOTEBOOK = "notebooks/01_extract_kv_cache.ipynb"


def kept(*variants):
    """Bytes a token that drafters keep of the prefix."""
    return [table("runs").set_index("variant").loc[variant, "prefix_bytes_per_token"].iloc[0] for variant in variants]


STATED = [
    ("record 9,931 training dialogues", lambda: [load_profile("full").extract["train_documents"]]),
    ("768 bytes a token, be it `hidden` or `kv_1`", lambda: {*kept("hidden", "kv_1")}),
    ("`kv_4` with its four layers keeps 3,072", lambda: kept("kv_4")),
    ("recording took 3% of the speed", lambda: [100 * (1 - benched("capture") / benched("capture", "floor"))]),
]


test_numbers_are_those_of_the_tables, test_every_interval_is_checked = checked(NOTEBOOK, STATED)

"""The registry: one entry a variant, and everything that reads it finds a new one."""

import subprocess
import sys

from kvshot_lib.drafters.variants import (
    MAIN_VARIANTS,
    QUERY_VARIANTS,
    VARIANTS,
    Variant,
    in_study_order,
    parameters_of,
)
from kvshot_lib.metrics.comparisons import registered_pairs
from kvshot_lib.plots.style import look
from kvshot_lib.study.profiles import resolve_drafters


def test_each_entry_is_whole():
    assert {name: variant.name for name, variant in VARIANTS.items()} == {name: name for name in VARIANTS}
    for variant in VARIANTS.values():
        assert variant.says.endswith(".") and variant.says.count(". ") == 0, variant.name
        assert variant.against == "" or variant.against in VARIANTS
        assert variant.parameters.get("init_from", "hidden") in VARIANTS
    looks = [(v.colour, v.marker) for v in VARIANTS.values() if v.group in ("paper", "norms", "sources", "blocks")]
    shared = {("#0072B2", "v"), ("#009E73", "v"), ("#CC79A7", "^")}
    assert len({*looks}) == len(looks) - sum(looks.count(look) - 1 for look in shared if look in looks)
    assert {*MAIN_VARIANTS, *QUERY_VARIANTS} <= {*VARIANTS}


def test_a_variant_differs_from_the_one_that_it_is_against():
    """Mostly in one parameter; a start from trained weights is one point, and so are two norms, or a source with its coordinates."""
    for variant in VARIANTS.values():
        if variant.against:
            own, other = variant.parameters, parameters_of(variant.against)
            changed = {key for key in own.keys() | other.keys() if own.get(key) != other.get(key)}
            assert 1 <= len(changed) <= 3, (variant.name, changed)


def test_a_new_variant_needs_no_other_file(monkeypatch):
    new = Variant(
        "kv_5", "Five layers over the cache.", {"paradigm": "kv", "num_layers": 5}, "kv_4", "paper", "#123456", "h"
    )
    monkeypatch.setitem(VARIANTS, new.name, new)
    assert in_study_order(["zoo", "kv_5", "hidden", "kv_5"]) == ["hidden", "kv_5", "zoo"]
    assert look("kv_5") == ("#123456", "h")
    assert ("kv_5", "kv_4") in registered_pairs(["kv_4", "kv_5"])
    assert resolve_drafters(["kv_5"], "mine") == {"kv_5": new.parameters}
    assert resolve_drafters({"kv_5": {"epochs": 2}}, "mine") == {"kv_5": new.parameters | {"epochs": 2}}


def test_the_registry_loads_no_torch():
    code = "import sys, kvshot_lib.drafters.variants; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

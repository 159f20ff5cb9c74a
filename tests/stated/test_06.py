"""Numbers in the text of notebook 06, held against the recorded tables."""

from functools import cache

import recorded
from recorded import table
from stated import checked

from kvshot_lib.metrics.interaction import shift_draws

NOTEBOOK = "notebooks/06_information_in_the_prefix.ipynb"


@cache
def draws(measure="shift"):
    return shift_draws(table("attention_shift"), table("attention_matches"), measure)


def minus(a, b="hidden", step=6, measure="shift"):
    """The slope of a minus that of b, with its interval."""
    found = draws(measure).contrast((1, a, "shift_slope", step), (-1, b, "shift_slope", step))
    return found.value, found.low, found.high


def pooled(a, b):
    """The same at step 6, with the seeds' spread of those that have several."""
    return recorded.pooled(draws(), ("shift_slope", 6), a, b)[:3]


STATED = [
    ("than `kv_2`: +.072 [.028, .113]", lambda: minus("kv_2")),
    (
        "`hidden_31` +.126 [.088, .167], `states_2` +.092 [.062, .123]",
        lambda: (*minus("hidden_31"), *minus("states_2")),
    ),
    ("by .054 [.008, .114] (one seed)", lambda: minus("hidden_31", "kv_2")),
    ("is larger there, +.118 [.086, .151]", lambda: minus("kv_2", step=0)),
    ("twice as long, with 46% more weights", lambda: [recorded.larger("hybrid_warm", "hidden")]),
    ("`hidden_31` is +.065 [.031, .100]", lambda: minus("hidden_31", step=0)),
    ("than `kv_2` there, by .053 [.010, .087]", lambda: minus("kv_2", "hidden_31", 0)),
    (
        "`none_1` has −.033 [−.063, .002], so `kv_2` is .051 [.017, .082] above it",
        lambda: [*minus("none_1", measure="new_mass"), *minus("kv_2", "none_1", measure="new_mass")],
    ),
    ("It is open, −.020 [−.057, .015]", lambda: minus("kv_2", "states_2")),
    (
        "was .010 behind at the first step and .011 ahead at the last",
        lambda: [
            -recorded.minus("kv_4", "states_4", "step_acceptance", 0, profile="sources")[0],
            recorded.minus("kv_4", "states_4", "step_acceptance", 6, profile="sources")[0],
        ],
    ),
    (
        "`none_1`, +.053 [−.004, .109], `hidden_post_norm`, +.040 [−.017, .096], and `hidden_31` against `kv_2`, +.054 [−.007, .116]",
        lambda: [
            x
            for a, b in (("none_1", "hidden"), ("hidden_post_norm", "hidden"), ("hidden_31", "kv_2"))
            for x in pooled(a, b)
        ],
    ),
    ("`hybrid_warm` +.007 [−.025, .035]", lambda: minus("hybrid_warm")),
    ("their difference is +.019 [−.017, .056]", lambda: minus("kv_2", "none_1")),
    ("their slopes is +.006 [−.018, .032]", lambda: minus("hybrid_warm_31", "hidden_31")),
    (
        "nothing changes at step 0, +.006 [−.020, .031], before anything was fed back, and +.040 [.010, .072]",
        lambda: (0, *minus("hidden_post_norm", step=0), *minus("hidden_post_norm")),
    ),
    ("it is +.065 and +.126", lambda: [minus("hidden_31", step=k)[0] for k in (0, 6)]),
    ("no clear difference: −.020 [−.057, .015]", lambda: minus("kv_2", "states_2")),
    ("H1 would be open, +.018 [−.020, .059]", lambda: minus("kv_2", measure="new_mass")),
]


def test_what_passes_by_every_measure():
    for measure in ("shift", "shift_with_sink", "new_mass"):
        assert minus("hidden_31", "kv_2", measure=measure)[0] > 0
        assert all(minus(v, measure=measure)[1] > 0 for v in ("hidden_31", "states_2"))


def test_what_stands_with_the_spread_over_seeds():
    assert all(pooled(v, "hidden")[1] > 0 for v in ("kv_2", "hidden_31", "states_2"))


test_numbers_are_those_of_the_tables, test_every_interval_is_checked = checked(NOTEBOOK, STATED)

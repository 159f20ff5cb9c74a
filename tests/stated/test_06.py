"""Numbers in the text of notebook 06, held against the recorded tables."""

from functools import cache

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


STATED = [
    ("than `kv_2`: +.072 [.028, .113]", lambda: minus("kv_2")),
    (
        "`hidden_31` +.126 [.088, .167], `states_2` +.092 [.062, .123]",
        lambda: (*minus("hidden_31"), *minus("states_2")),
    ),
    ("has +.053 [.020, .085]", lambda: minus("none_1")),
    ("`hybrid_warm` +.007 [−.025, .035]", lambda: minus("hybrid_warm")),
    ("Its slope is .054 [.008, .114] above that of `kv_2`", lambda: minus("hidden_31", "kv_2")),
    ("their difference is +.019 [−.017, .056]", lambda: minus("kv_2", "none_1")),
    ("and is spared: +.133 [.090, .180]", lambda: minus("hybrid_warm_31")),
    (
        "nothing changes at step 0, +.006 [−.020, .031], before anything was fed back, and +.040 [.010, .072]",
        lambda: (0, *minus("hidden_post_norm", step=0), *minus("hidden_post_norm")),
    ),
    ("it is +.065 and +.126", lambda: [minus("hidden_31", step=k)[0] for k in (0, 6)]),
    ("no clear difference: −.020 [−.057, .015]", lambda: minus("kv_2", "states_2")),
    ("H1 would be open: +.018 [−.020, .059]", lambda: minus("kv_2", measure="new_mass")),
]


def test_hidden_31_stays_ahead_of_kv_2_by_every_measure():
    for measure in ("shift", "shift_with_sink", "new_mass"):
        assert minus("hidden_31", "kv_2", measure=measure)[0] > 0


test_numbers_are_those_of_the_tables, test_every_interval_is_checked = checked(NOTEBOOK, STATED)

"""Numbers in the text of notebook 03, held against the recorded histories."""

from recorded import longer, minus, table
from stated import checked

from kvshot_lib.metrics.acceptance import training_table

NOTEBOOK = "notebooks/03_train_drafter.ipynb"


def curve(variant, step):
    """Validation acceptance at the first or the last draft step, in the order of training."""
    found = training_table(table("history"))
    return (
        found[(found["variant"] == variant) & (found["step_name"] == step)]
        .sort_values("million_tokens")["value"]
        .to_numpy()
    )


def first(*variants):
    """At draft step 0, the first time that they were validated."""
    return [curve(variant, "first")[0] for variant in variants]


def lost(*variants, at):
    return [curve(variant, "first")[at] - curve(variant, "last")[at] for variant in variants]


def tokens(place):
    """Millions of tokens at that validation of `hidden`."""
    found = training_table(table("history")).query("variant == 'hidden' and step_name == 'first'")
    return found["million_tokens"].sort_values().iloc[place]


def crossing():
    """Where kv_2 passes hidden at the first draft step; kv_1 never does."""
    ahead = curve("kv_2", "first") > curve("hidden", "first")
    assert ahead.tolist() == [False, False, True, True] and (curve("kv_1", "first") < curve("hidden", "first")).all()
    return tokens(1), tokens(2)


def begun(variant):
    """Acceptance at draft step 0 on validation texts at the first record, in the runs of notebook 12."""
    rows = table("history", "sources").query("variant == @variant and split == 'validation' and draft_step == 0")
    return rows[rows["step"] == rows["step"].min()]["acceptance"].mean()


def most_gained():
    assert (curve("hidden_31", "first") >= [curve(v, "first") for v in SHOWN]).all()
    assert (curve("hidden_31", "last") >= [curve(v, "last") for v in SHOWN]).all()
    return [max(c[-1] - c[-2] for v in SHOWN for c in (curve(v, "first"), curve(v, "last")))]


SHOWN = ["hidden", "hidden_31", "kv_1", "kv_2", "none_1"]
STATED = [
    ("three seeds each, on 15.3 million tokens", lambda: [tokens(3)]),
    ("After 3.8 million tokens `kv_1` guesses no better than `none_1`", lambda: [tokens(0)]),
    (
        "`hidden` is at .361, `kv_2` at .333, `kv_1` at .309. `none_1`, a small language model on its own, is at .313",
        lambda: first("hidden", "kv_2", "kv_1", "none_1"),
    ),
    ("passes `hidden` between 7.6 and 11.5 million tokens; `kv_1` never", crossing),
    ("from .333 to .365 at this point (`kv_2_unrotate`)", lambda: first("kv_2", "kv_2_unrotate")),
    ("`kv_1` is at .342 at their first point, `none_1` at .305", lambda: [begun("kv_1"), begun("none_1")]),
    (
        "are .128 tokens behind hidden states, where they were .022",
        lambda: [longer("states_4", "kv_4")[0], minus("states_4", "kv_4", profile="sources")[0]],
    ),
    (
        "loses .108 from the first draft step to the last at 3.8 million tokens, and .102 at the end",
        lambda: (*lost("hidden", at=0), tokens(0), *lost("hidden", at=-1)),
    ),
    (
        "lose little at first, .005 and .011, and more at the end, .032 and .031",
        lambda: (*lost("kv_1", "kv_2", at=0), *lost("kv_1", "kv_2", at=-1)),
    ),
    ("The last quarter adds at most .009", most_gained),
    ("gains .34 tokens a forward", lambda: minus("hidden_31_continued", "hidden_31")[:1]),
]


test_numbers_are_those_of_the_tables, test_every_interval_is_checked = checked(NOTEBOOK, STATED)

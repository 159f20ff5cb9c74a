"""Numbers in the text of notebook 17, held against the recorded tables."""

from functools import partial

import numpy as np
import pandas as pd
import recorded
from notebook_checks import ROOT
from recorded import turned
from stated import checked

from kvshot_lib.study.profiles import load_profile

NOTEBOOK, GEMMA = "notebooks/17_change_the_target.ipynb", "gemma-3-270m"
minus, smollm2 = (partial(recorded.minus, profile=profile) for profile in (GEMMA, "sources"))
table, value = partial(recorded.table, profile=GEMMA), partial(recorded.value, profile=GEMMA)
FIRST, LAST = ("step_acceptance", 0), ("step_acceptance", 6)


def channels(column: str, target: str = GEMMA) -> list[float]:
    """The least and the most of the layers, in per cent."""
    found = pd.read_csv(ROOT / "data/recorded" / GEMMA / "channels.csv").query("target.str.startswith(@target)")[column]
    return [100 * found.min(), 100 * found.max()]


def answers() -> pd.Series:
    """Anchors at step 0 of each judged text: one fewer than its answer's tokens."""
    return table("counts").query("variant == 'kv_2' and seed == 0 and draft_step == 0")["anchors"]


def spread_over_seeds() -> float:
    return max(np.ptp(recorded.draws(GEMMA).rows(v, "measured_mat")[:, 0]) for v in recorded.draws(GEMMA).variants)


STATED = [
    (
        "15.6 million training tokens a run, judged on 1,737 texts",
        lambda: [table("runs")["trained_tokens"].mean() / 1e6, len(answers())],
    ),
    (
        "draft .769 tokens [.657, .884] more than two that see nothing of the target; on SmolLM2 it is .243",
        lambda: [*minus("kv_2", "none_2"), smollm2("kv_2", "none_2")[0]],
    ),
    (
        "it is worth .072 [.059, .085], there .021",
        lambda: [*minus("kv_2", "none_2", *LAST), smollm2("kv_2", "none_2", *LAST)[0]],
    ),
    (
        "with one layer: 3.20 tokens a forward, .178 [.118, .241] above two layers over the cache",
        lambda: [value("hidden_31", "measured_mat"), *minus("hidden_31", "kv_2")],
    ),
    ("no better than nothing: −.058 tokens [−.125, .003]", lambda: minus("states_2", "none_2")),
    (
        "89 to 97% of a normed state's energy sits in 5 of 640 channels",
        lambda: [*channels("energy in 5"), 5, 640],
    ),
    ("sampled for training (10,000 texts)", lambda: [load_profile(GEMMA).extract["train_documents"]]),
    (
        "have 46 tokens or fewer. 263 of 2,000 are left with fewer than 16",
        lambda: [
            answers().median() + 1,
            load_profile(GEMMA).extract["evaluation_documents"] - len(answers()),
            load_profile(GEMMA).extract["evaluation_documents"],
            answers().min() + 1,
        ],
    ),
    ("a draft vocabulary of 16,384", lambda: [load_profile(GEMMA).train["draft_vocab_size"]]),
    (
        "`both_2` is .047 [.004, .090] below `kv_2`",
        lambda: turned(minus("both_2", "kv_2")),
    ),
    ("differ by .047 at most", lambda: [spread_over_seeds()]),
    (
        "worth .105 [.092, .118] in acceptance here and .066 [.062, .070] there",
        lambda: [*minus("kv_2", "none_2", *FIRST), *smollm2("kv_2", "none_2", *FIRST)],
    ),
    ("3 to 13% of it varies", lambda: channels("varies")),
    (
        "it is 30 to 56%, about as much as in SmolLM2 without them (36 to 49%)",
        lambda: [*channels("varies, gains"), *channels("varies", "smollm2")],
    ),
]

test_numbers_are_those_of_the_tables, test_every_interval_is_checked = checked(NOTEBOOK, STATED)


def test_what_turned_round():
    assert [minus("states_2", "kv_2")[2] < 0, smollm2("states_2", "kv_2")[1] > 0] == [True, True]
    assert [minus("hidden_31", "states_2")[1] > 0, smollm2("hidden_31", "states_2")[2] < 0] == [True, True]


def test_states_end_below_no_target_state():
    assert minus("states_2", "none_2", *LAST)[2] < 0

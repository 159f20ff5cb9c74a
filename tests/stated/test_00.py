"""Numbers in the text of notebook 00, held against the tracked corpus."""

from functools import cache

import numpy as np
from stated import checked

from kvshot_lib.study.notebooks import parameter_defaults
from kvshot_lib.study.profiles import NOTEBOOKS, load_profile
from kvshot_lib.text.corpus import SPLITS, answer_token_counts, load_corpus, repetition_start

NOTEBOOK = "notebooks/00_generate_corpus.ipynb"


@cache
def documents(split, whole=True):
    return load_corpus("selfgen", split, whole_answers=whole).documents


def copied():
    """Share of what is cut off that a look-up of the last three tokens guesses, in percent."""
    hits = guesses = 0
    for answer in (d.answer.tolist() for d in documents("evaluation")):
        cut, followed = repetition_start(np.array(answer, dtype=np.int32)), {}
        for t in range(3, len(answer)):
            key = tuple(answer[t - 3 : t])
            if t >= cut:
                guesses, hits = guesses + 1, hits + (followed.get(key) == answer[t])
            followed[key] = answer[t]
    return 100 * hits / guesses


def kept():
    judged, written = (sum(len(d.answer) for d in documents("evaluation", whole)) for whole in (False, True))
    return 100 * judged / written


def covered(size):
    """Share of judged tokens that a draft vocabulary holds, in percent."""
    both = documents("train"), documents("evaluation", False)
    train, judged = (answer_token_counts(found, 49_152) for found in both)
    return 100 * judged[np.argsort(-train, kind="stable")[:size]].sum() / judged.sum()


def drafted(profile):
    return (parameter_defaults(NOTEBOOKS["train"]) | load_profile(profile).train)["draft_vocab_size"]


STATED = [
    ("10,640 dialogues", lambda: [sum(len(documents(split)) for split in SPLITS)]),
    ("A copier would guess 82%", lambda: [copied()]),
    ("keeps 48% of the greedy tokens", lambda: [kept()]),
    ("make up 96.5% of what is judged", lambda: [covered(8192)]),
    ("3.5% of the judged tokens", lambda: [100 - covered(8192)]),
    ("it is 1.2%", lambda: [100 - covered(16_384)]),
    ("their dialogue reached 512 tokens", lambda: [max(len(d.tokens) for split in SPLITS for d in documents(split))]),
    ("published runs use 8,192, the laptop run 4,096", lambda: [drafted("full"), drafted("laptop")]),
]


test_numbers_are_those_of_the_tables, test_every_interval_is_checked = checked(NOTEBOOK, STATED)

"""What notebook 00 tells about a corpus: tables, pictures of them, and dialogues in readable form."""

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..text.corpus import Corpus, Document, answer_token_counts, repetition_share, repetition_start
from .style import STYLE

COLOURS = ("#0072B2", "#D55E00", "#009E73")


def split_table(corpora: Sequence[Corpus], eos_token_id: int) -> pd.DataFrame:
    """One row per split: counts, the share of answers that came to their end, and what the repetition rule would take."""
    rows = []
    for corpus in corpora:
        documents, share = corpus.documents, repetition_share(corpus.documents)
        rows.append({
            "split": corpus.split,
            "documents": len(documents),
            "tokens": sum(len(d.tokens) for d in documents),
            "answer tokens": int(sum(d.answer_mask.sum() for d in documents)),
            "median answer": int(np.median([d.answer_mask.sum() for d in documents])),
            "answers that ended": np.mean([d.answer[-1] == eos_token_id for d in documents]),
            "answers that repeat": share["documents"],
            "their repeated tokens": share["answer_tokens"],
        })  # fmt: skip
    return pd.DataFrame(rows)


def length_table(groups: Mapping[str, Sequence[Document]]) -> pd.DataFrame:
    """For each group of documents, the share whose answer has at least ``answer_tokens`` tokens; tidy."""
    rows = []
    for name, documents in groups.items():
        lengths = np.array([d.answer_mask.sum() for d in documents])
        rows += [{"answers": name, "answer_tokens": n, "share": (lengths >= n).mean()} for n in range(0, 481, 16)]
    return pd.DataFrame(rows)


def coverage_table(
    train: Sequence[Document], held_out: Mapping[str, Sequence[Document]], sizes: Sequence[int], vocab_size: int
) -> pd.DataFrame:
    """Share of answer tokens that the ``size`` most frequent tokens of the training answers make up; tidy.

    By hand: training answers a a b c, size 1 keeps a; held-out answers a b b d are covered to 1/4.
    """
    counts = {
        name: answer_token_counts(documents, vocab_size) for name, documents in {"train": train, **held_out}.items()
    }
    order = np.argsort(-counts["train"], kind="stable")
    rows = []
    for name, count in counts.items():
        covered = count[order].cumsum() / count.sum()
        rows += [
            {"answers": name, "draft_vocab_size": size, "coverage": covered[size - 1]}
            for size in sizes
            if size <= vocab_size
        ]
    return pd.DataFrame(rows)


@mpl.rc_context(STYLE)
def draw_lengths(table: pd.DataFrame) -> Figure:
    """Draw a `length_table`."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for colour, (name, rows) in zip(COLOURS, table.groupby("answers", sort=False)):
        axes.plot(rows["answer_tokens"], rows["share"], color=colour, label=name)
    axes.set(xlabel="answer tokens n", ylabel="share of documents", ylim=(0, 1.02), xlim=(0, 480))
    axes.set_title("Share of documents whose answer has at least n tokens")
    axes.legend()
    plt.close(figure)
    return figure


@mpl.rc_context(STYLE)
def draw_coverage(table: pd.DataFrame, marked: Sequence[int]) -> Figure:
    """Draw a `coverage_table`; ``marked`` sizes get a tick."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for colour, marker, (name, rows) in zip(COLOURS, "os^", table.groupby("answers", sort=False)):
        axes.plot(rows["draft_vocab_size"], rows["coverage"], color=colour, marker=marker, markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(marked, [f"{size:,}" for size in marked])
    axes.set(xlabel="draft vocabulary (most frequent tokens of the training answers)", ylabel="share of answer tokens")
    axes.set_title("Answer tokens that a draft vocabulary covers")
    axes.legend()
    plt.close(figure)
    return figure


def readable(document: Document, tokenizer, *, mark_repetition: bool = False, width: int = 110) -> str:
    """A dialogue as text: user turn, answer, and where the rule cuts it if ``mark_repetition``."""
    text = lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    user = text(document.prompt).split("user\n", 1)[-1].split("<|im_end|>")[0]
    end = repetition_start(document.answer) if mark_repetition else len(document.answer)
    answer = text(document.answer[:end])
    if end < len(document.answer):
        answer += " ✂ " + text(document.answer[end:])
    wrap = lambda part: "\n".join(textwrap.fill(line, width) for line in part.strip().split("\n"))
    return f"USER\n{wrap(user)}\n\nASSISTANT\n{wrap(answer)}\n"

"""One answer as it was decoded, as HTML with hover text: what became of every guess, and what attention looked at."""

import html
from collections.abc import Iterable, Sequence

from IPython.display import HTML

# What became of a token: its colour, how it is read where colours are lost, and its name in the legend.
KINDS = {
    "accepted": ("#bfe5cf", "span", "guess, accepted"),
    "rejected": ("#f6c6c0", "s", "guess, rejected"),
    "corrected": ("#fbdf9d", "b", "the target's own, in its place"),
    "bonus": ("#cfdcf5", "i", "the target's own, after a run of accepted guesses"),
}
BOX = "color:#111;border-radius:3px;padding:1px 0;text-decoration-thickness:2px;background:"


def marked(pieces: Iterable[tuple[str, str, str]]) -> str:
    """(text, key of `KINDS`, hover text) of every token, in order."""
    made = []
    for text, kind, told in pieces:
        colour, tag, _ = KINDS[kind]
        text = text.replace("\n", "↵") if kind == "rejected" else text
        made.append(f'<{tag} style="{BOX}{colour}" title="{html.escape(told)}">{html.escape(text)}</{tag}>')
    return "".join(made)


def shaded(words: Sequence[str], weights: Sequence[float]) -> str:
    """Text shaded by the weight of each word, the largest darkest; a word's share is its hover text."""
    most, total = max(weights), sum(weights)
    made = []
    for word, weight in zip(words, weights, strict=True):
        colour = f"rgba(230,159,0,{round(weight / most, 1)})"
        told = f"{100 * weight / total:.0f}%"
        made.append(f'<span style="{BOX}{colour}" title="{told}">{html.escape(word)}</span>')
    return "".join(made)


def columns(*parts: tuple[str, str, str], width: str = "17em") -> HTML:
    """(title, text as HTML, what stands beneath) side by side; beneath each other where the page is narrow."""
    box = f"flex:1 1 {width};min-width:0;background:#fff;color:#111;padding:.4em .7em;border:1px solid #ddd"
    text = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.65;margin:.4em 0"
    made = []
    for title, body, below in parts:
        inner = f'<b>{html.escape(title)}</b><div style="{text}">{body}</div><div>{html.escape(below)}</div>'
        made.append(f'<div style="{box}">{inner}</div>')
    return HTML(f'<div style="display:flex;flex-wrap:wrap;gap:.7em;max-width:75em">{"".join(made)}</div>')


def legend() -> HTML:
    """What the colours of `marked` mean."""
    return HTML(" &nbsp; ".join(marked([(f" {told} ", kind, "")]) for kind, (_, _, told) in KINDS.items()))

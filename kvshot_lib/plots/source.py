"""The library's own code in a notebook, beside what it does."""

import ast
import textwrap
from pathlib import Path

from IPython.display import Markdown

LIBRARY = Path(__file__).parents[1]


def source(name: str) -> Markdown:
    """A function, class or method, ``room.module.function``, as text: nothing is imported, so no torch is loaded.

    >>> source("metrics.acceptance.axis_steps").data.splitlines()[1]
    'def axis_steps(draft_length: int) -> list[int]:'
    """
    room, module, *names = name.split(".")
    text = (LIBRARY / room / f"{module}.py").read_text(encoding="utf-8")
    node: ast.AST = ast.parse(text)
    for part in names:
        node = next(inner for inner in ast.iter_child_nodes(node) if getattr(inner, "name", "") == part)
    return Markdown(f"```python\n{textwrap.dedent(ast.get_source_segment(text, node, padded=True))}\n```")

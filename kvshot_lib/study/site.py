"""The study as a web site to read without Jupyter and without a network: notebooks, figures, scorecard, runs.

Sphinx makes it from a folder that has the repository's own shape, so that links among notebooks and pages lead on: myst-nb reads
executed notebooks, furo is the look, formulas become MathML, which browsers draw themselves; the search needs no server.
"""

import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pandas as pd
from docutils import nodes

from ..errors import StudyError
from ..metrics import tables

PROVENANCE = ["variant", "seed", "trained_tokens", "train_s", "device", "dtype", "git_revision", "torch", "transformers", "date"]
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?![a-z]+:|#)([^)#\s]+)(?:#[^)\s]*)?\)")
SETTINGS = {
    "project": "KVShot study",
    "html_title": "KVShot study",
    "html_theme": "furo",
    "extensions": ["myst_nb", __name__],
    "html_math_renderer": "mathml",
    "myst_enable_extensions": ["dollarmath"],
    "myst_heading_anchors": 3,
    "nb_execution_mode": "off",
    "nb_render_markdown_format": "gfm",
    "nb_code_prompt_show": "code",
    "nb_code_prompt_hide": "code",
    "html_show_search_summary": False,  # would be fetched, which a browser forbids for files
    "html_copy_source": False,
    "html_use_index": False,
    "suppress_warnings": ["myst", "mystnb", "toc"],
}


@dataclass(frozen=True)
class Source:
    """What a site is made from: executed notebooks in order, and for each profile its tables and figures."""

    notebooks: list[Path]
    tables: dict[str, Path]
    figures: dict[str, Path]


def build_report(profile: str = "", *, out: str = "results/report") -> str:
    """One web site of notebooks, figures, scorecard and runs, to read without a network.

    Parameters
    ----------
    profile : show what `make study` left in results/PROFILE, instead of what is committed.
    """
    first = build(of_profile(profile) if profile else committed(), Path(out))
    return f"{len(list(Path(out).rglob('*.html')))} pages; open {first} in a browser"


def committed() -> Source:
    """The notebooks, figures and recorded tables of the repository, as they are in the current folder."""
    folders = [{path.name: path for path in sorted(Path(root).glob("*/"))} for root in ("data/recorded", "figures")]
    return Source(sorted(Path("notebooks").glob("[0-9]*.ipynb")), *folders)


def of_profile(profile: str) -> Source:
    """What `make study` left in results/<profile>."""
    results = Path("results") / profile
    found = sorted(p for p in results.glob("notebooks/[0-9]*.ipynb") if not p.stem.endswith(("unfinished", "recorded")))
    if not found:
        raise StudyError(f"there are no executed notebooks in {results}/notebooks; make them with: make study PROFILE={profile}")
    return Source(found, {profile: results / "tables"}, {profile: results / "figures"})


def build(source: Source, out: Path) -> Path:
    """Write the whole site into ``out``, replacing an earlier one; returns its first page.

    Raises
    ------
    StudyError : no notebooks to show, one that was never run, or a folder that holds something else than a site.
    """
    from sphinx.application import Sphinx

    if not source.notebooks:
        raise StudyError("there are no notebooks here to make a report of; run it from the repository's root")
    if out.exists() and not (out / "index.html").exists() and any(out.iterdir()):
        raise StudyError(f"{out} holds something else than a report; choose another folder with --out")
    with tempfile.TemporaryDirectory() as folder:
        written, made, cache = (Path(folder) / name for name in ("written", "made", "cache"))
        write_pages(source, written)
        app = Sphinx(written, None, made, cache, "html", confoverrides=SETTINGS, status=None, warning=sys.stderr)
        app.build()
        shutil.rmtree(out, ignore_errors=True)  # the earlier one stays until this one is whole
        shutil.move(made, out)
    return out / "index.html"


def write_pages(source: Source, folder: Path) -> None:
    """Sphinx's own input, in the repository's shape: index.md, notebooks/, docs/, figures/."""
    for name, figures in source.figures.items():
        shutil.copytree(figures, folder / "figures" / name, ignore=lambda _, names: {n for n in names if not n.endswith(".png")})
    pages = {path.name: path for path in source.notebooks}
    texts = {f"docs/{path.name}": path.read_text(encoding="utf-8") for path in sorted(Path("docs").glob("*.md"))}
    known = {*texts, *(f"notebooks/{name}" for name in pages), *(str(p.relative_to(folder)) for p in folder.rglob("*.png"))}
    texts["figures.md"] = figures_page(folder)
    entries = [f"notebooks/{Path(name).stem}" for name in pages]
    texts["index.md"] = index_page(source, [*entries, "figures", *(name[:-3] for name in texts if name.startswith("docs/"))])
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(keep_links(text, Path(name).parent, known), encoding="utf-8")
    (folder / "notebooks").mkdir()
    for name, path in pages.items():
        nbformat.write(prepared(path, known), folder / "notebooks" / name)


def prepared(path: Path, known: Iterable[str]) -> nbformat.NotebookNode:
    """An executed notebook without progress bars, its code folded away, its links leading somewhere."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not any(cell.execution_count for cell in code):
        raise StudyError(f"{path} was never run; run it with: python -m kvshot_lib notebook execute {path}")
    for cell in code:
        cell.metadata["tags"] = [*cell.metadata.get("tags", ()), "hide-input"]
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    run = path.stem.partition(".")[2]  # one notebook, run for several drafters
    for cell in (cell for cell in notebook.cells if cell.cell_type == "markdown"):
        cell.source = keep_links(cell.source, Path("notebooks"), known)
        if run and cell.source.startswith("# "):
            title, _, rest = cell.source.partition("\n")
            cell.source = f"{title} ({run})\n{rest}"
            run = ""
    return notebook


def keep_links(text: str, here: Path, known: Iterable[str]) -> str:
    """Markdown whose links to files that the site does not have are plain text; ``here`` is the text's folder."""

    def link(found: re.Match) -> str:
        parts = [*here.parts, *Path(found[2]).parts]
        while ".." in parts[1:]:
            place = parts.index("..", 1)
            del parts[place - 1 : place + 1]
        return found[0] if "/".join(parts) in known else found[1]

    return LINK.sub(link, text)


def index_page(source: Source, entries: list[str]) -> str:
    """The first page: what the study is (the README's own words), scorecards, recorded runs, and the contents."""
    text = Path("README.md").read_text(encoding="utf-8").split("\n## ")[0] if Path("README.md").exists() else "# KVShot study"
    lines = [text]
    for name, folder in source.figures.items():
        if (folder / "scorecard.csv").exists():
            card = pd.read_csv(folder / "scorecard.csv").dropna(axis="columns", how="all")
            lines += [f"## Scorecard, {name}", _html(card)]
    lines.append("## Runs and where they come from")
    for name, folder in source.tables.items():
        runs = tables.read(folder, "runs")
        lines += [f"### {name}: {len(runs)} runs", _html(runs[PROVENANCE].round({"train_s": 0}))]
    return "\n\n".join([*lines, "```{toctree}\n:hidden:\n" + "\n".join(entries) + "\n```"])


def _html(table: pd.DataFrame) -> str:
    return f"<div class='table-wrapper'>{table.to_html(index=False, border=0, na_rep='')}</div>"


def figures_page(folder: Path) -> str:
    """Every figure, by profile."""
    lines = ["# Figures"]
    for profile in sorted(folder.glob("figures/*/")):
        lines.append(f"## {profile.name}")
        for path in sorted(profile.glob("*.png")):
            title = path.stem.replace("_", " ")
            lines.append(f"**{title}**\n\n![{title}]({path.relative_to(folder)})")
    return "\n\n".join(lines)


def setup(app) -> dict[str, bool]:
    """Sphinx calls this: formulas as MathML."""
    from latex2mathml.converter import convert

    def write(display: str):
        def visit(translator, node: nodes.Element) -> None:
            translator.body.append(convert(node.astext().strip(), display=display))
            raise nodes.SkipNode

        return visit, None

    app.add_html_math_renderer("mathml", write("inline"), write("block"))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""The study as a web site to read without Jupyter and without a network: notebooks, figures, scorecard, runs.

Sphinx makes it from a folder of the repository's own shape, so that links among pages lead on. myst-nb reads executed
notebooks, furo is the look, formulas become MathML, which browsers draw themselves; the search needs no server.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pandas as pd
from docutils import nodes

from ..errors import StudyError
from ..metrics import tables

SHOWN = ["variant", "seed", "trained_tokens", "train_s", "device", "dtype", "git_revision", "torch", "date"]
STYLE = ".cell_output, .wide { overflow-x: auto; } .math-wrapper { padding: .5rem 0; }"
SETTINGS = {
    "project": "KVShot study",
    "html_title": "KVShot study",
    "html_theme": "furo",
    "extensions": ["myst_nb", __name__],
    "html_math_renderer": "mathml",
    "myst_enable_extensions": ["dollarmath"],
    "myst_heading_anchors": 3,
    "nb_execution_mode": "off",
    "nb_merge_streams": True,
    "nb_output_stderr": "remove",  # progress bars
    "nb_render_markdown_format": "gfm",
    "nb_code_prompt_show": "code",
    "nb_code_prompt_hide": "code",
    "html_show_search_summary": False,  # would be fetched, which browsers forbid a page that is a file
    "html_copy_source": False,
    "html_static_path": ["_static"],
    "html_css_files": ["site.css"],
    "html_use_index": False,
    "suppress_warnings": ["myst", "mystnb", "toc"],
}


@dataclass(frozen=True)
class Source:
    """What a site is made from: executed notebooks in order, and for each profile its tables and figures."""

    notebooks: list[Path]
    tables: dict[str, Path]
    figures: dict[str, Path]


def committed() -> Source:
    """The notebooks, figures and recorded tables of the repository, as they are in the current folder."""
    folders = [{path.name: path for path in sorted(Path(root).glob("*/"))} for root in ("data/recorded", "figures")]
    return Source(sorted(Path("notebooks").glob("[0-9]*.ipynb")), *folders)


def of_profile(profile: str) -> Source:
    """What `make study` left in results/<profile>."""
    results, left_out = Path("results") / profile, ("unfinished", "recorded")
    found = sorted(path for path in results.glob("notebooks/[0-9]*.ipynb") if not path.stem.endswith(left_out))
    if not found:
        told = f"there are no executed notebooks in {results}/notebooks"
        raise StudyError(f"{told}; make them with: make study PROFILE={profile}")
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
        Sphinx(written, None, made, cache, "html", confoverrides=SETTINGS, status=None, warning=sys.stderr).build()
        shutil.rmtree(out, ignore_errors=True)  # the earlier one stays until this one is whole
        shutil.move(made, out)
    return out / "index.html"


def write_pages(source: Source, folder: Path) -> None:
    """Sphinx's own input, in the repository's shape: index.md, figures.md, notebooks/, docs/, figures/."""
    for part in ("notebooks", "figures", "_static"):
        (folder / part).mkdir(parents=True)
    for name, figures in source.figures.items():
        (folder / "figures" / name).symlink_to(figures.resolve())
    if Path("docs").is_dir():
        (folder / "docs").symlink_to(Path("docs").resolve())
    (folder / "_static/site.css").write_text(STYLE)
    for path in source.notebooks:
        nbformat.write(folded(path), folder / "notebooks" / path.name)
    pages = [*(f"notebooks/{path.stem}" for path in source.notebooks), "figures"]
    pages += [f"docs/{path.stem}" for path in sorted(Path("docs").glob("*.md"))]
    (folder / "index.md").write_text(index_page(source, pages), encoding="utf-8")
    (folder / "figures.md").write_text(figures_page(folder), encoding="utf-8")


def folded(path: Path) -> nbformat.NotebookNode:
    """An executed notebook, its code folded away."""
    notebook = nbformat.read(path, as_version=4)
    if not any(cell.get("execution_count") for cell in notebook.cells):
        raise StudyError(f"{path} was never run; run it with: make execute NOTEBOOKS={path}")
    for cell in notebook.cells:
        cell.metadata["tags"] = [*cell.metadata.get("tags", ()), "hide-input"]
    return notebook


def index_page(source: Source, pages: list[str]) -> str:
    """The first page: what the study is (the README's own words), scorecards, recorded runs; it holds the contents.

    One notebook that was run for several drafters is listed by its file's name.
    """
    readme = Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "# KVShot study"
    lines = [readme.split("\n## ")[0]]
    for name, folder in source.figures.items():
        if (folder / "scorecard.csv").exists():
            lines += [f"## Scorecard, {name}", html_table(pd.read_csv(folder / "scorecard.csv"))]
    lines.append("## Runs and where they come from")
    for name, folder in source.tables.items():
        runs = tables.read(folder, "runs").round({"train_s": 0})
        lines += [f"### {name}: {len(runs)} runs", html_table(runs[SHOWN])]
    entries = [f"{Path(page).name} <{page}>" if "." in page else page for page in pages]
    return "\n\n".join([*lines, "```{toctree}", ":hidden:", *entries, "```"])


def html_table(table: pd.DataFrame) -> str:
    return f"<div class='wide'>\n{table.to_html(index=False, border=0, na_rep='')}\n</div>"


def figures_page(folder: Path) -> str:
    """Every figure, by profile."""
    lines = ["# Figures"]
    for profile in sorted(folder.glob("figures/*/")):
        pictures = {path.stem.replace("_", " "): path.relative_to(folder) for path in sorted(profile.glob("*.png"))}
        lines += [f"## {profile.name}", *(f"**{title}**\n\n![{title}]({path})" for title, path in pictures.items())]
    return "\n\n".join(lines)


def unlink(page: nodes.document) -> None:
    """Links into nothing become text: MyST makes anchors of files that the site does not have."""
    for link in [link for link in page.findall(nodes.reference) if "refid" in link and link["refid"] not in page.ids]:
        link.replace_self(link.children)


def setup(app) -> dict[str, bool]:
    """Sphinx calls this: formulas are written as MathML, links lead somewhere."""
    from latex2mathml.converter import convert

    def writer(display: str) -> tuple[Callable, None]:
        def visit(page, formula: nodes.Element) -> None:
            page.body.append(convert(formula.astext().strip(), display=display))
            raise nodes.SkipNode

        return visit, None

    app.connect("doctree-resolved", lambda app, page, name: unlink(page))
    app.add_html_math_renderer("mathml", writer("inline"), writer("block"))
    return {"parallel_read_safe": True}

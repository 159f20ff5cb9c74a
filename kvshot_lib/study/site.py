"""The study as a web site to read without Jupyter and without a network: `make report`.

python -m kvshot_lib.study.site [PROFILE] [--out results/report]

Without PROFILE it shows the committed notebooks, figures/ and data/recorded/; with one, what `make study PROFILE=...` left in
results/PROFILE. nbconvert turns executed notebooks into pages; formulas become MathML, which browsers draw themselves, and
pictures, styles and all else are inside the folder, so nothing is fetched when a page is read and no script runs.
"""

import argparse
import html
import re
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nbformat
import pandas as pd

from ..errors import StudyError
from ..files import write_atomically
from ..metrics import tables
from ..plots import cards as scorecard
from ..plots.report import markdown_table

STYLE = Path(__file__).with_name("site.css")
CODE_FOLDED = """{% extends 'basic/index.html.j2' %}
{% block input_group %}<details class="code"><summary>code</summary>{{ super() }}</details>{% endblock %}"""
HEADING = re.compile(r'<h([123]) id="([^"]*)">(.*?)(?:<a class="anchor-link".*?</a>)?</h\1>', re.DOTALL)
PROVENANCE = ("seed", "trained_tokens", "train_s", "device", "dtype", "git_revision", "torch", "transformers", "date")


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
    results = Path("results") / profile
    found = sorted(p for p in results.glob("notebooks/[0-9]*.ipynb") if not p.stem.endswith(("unfinished", "recorded")))
    if not found:
        raise StudyError(
            f"there are no executed notebooks in {results}/notebooks; make them with: make study PROFILE={profile}"
        )
    return Source(found, {profile: results / "tables"}, {profile: results / "figures"})


def build(source: Source, out: Path) -> Path:
    """Write the whole site into ``out``, replacing an earlier one; returns its first page.

    Raises
    ------
    StudyError : no notebooks to show, one that was never run, or a folder that holds something else than a site.
    """
    if not source.notebooks:
        raise StudyError("there are no notebooks here to make a report of; run it from the repository's root")
    if out.exists() and not (out / "index.html").exists() and any(out.iterdir()):
        raise StudyError(f"{out} holds something else than a report; choose another folder with --out")
    new = out.with_name(f".{out.name}.new")  # the earlier one stays until this one is whole
    shutil.rmtree(new, ignore_errors=True)
    _write_pages(source, new)
    shutil.rmtree(out, ignore_errors=True)
    new.rename(out)
    return out / "index.html"


def _write_pages(source: Source, out: Path) -> None:
    parts = {}
    for path in source.notebooks:
        body = notebook_body(path)
        title = next((strip(text) for level, _, text in HEADING.findall(body) if level == "1"), path.stem)
        run = path.stem.partition(".")[2]  # one notebook, run for several drafters
        parts[f"{path.stem}.html"] = (f"{title} ({run})" if run else title, body)
    for name, folder in source.figures.items():
        for picture in sorted(folder.glob("*.png")):
            (out / "figures" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, out / "figures" / name)
    parts["figures.html"] = ("Figures", figures_body(source, out))
    pages = {"index.html": ("Start", index_body(source, parts)), **parts}
    for name, (title, body) in pages.items():
        text = page(title, keep_links(body, out, pages), name, {n: t for n, (t, _) in pages.items()})
        write_atomically(out / name, partial(_write, text=text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def notebook_body(path: Path) -> str:
    """An executed notebook as HTML: text, figures and tables; code is folded away, progress bars are left out."""
    from nbconvert import HTMLExporter

    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not any(cell.execution_count for cell in code):
        raise StudyError(f"{path} was never run; run it with: python -m kvshot_lib.study.notebooks execute {path}")
    heading = path.stem
    for cell in notebook.cells:
        heading = next(iter(re.findall(r"^#+ (.*)$", cell.source, re.MULTILINE)[::-1]), heading)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.metadata.setdefault("image/png", {})["alt"] = f"Figure: {heading}"
    exporter = HTMLExporter(raw_template=CODE_FOLDED, filters={"markdown2html": markdown_html})
    return exporter.from_notebook_node(notebook)[0]


def markdown_html(*source: object) -> str:
    """Markdown as nbconvert renders it, with formulas as MathML; the last argument is the text (templates pass a context first)."""
    import mistune
    from latex2mathml.converter import convert
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def inline_math(self, body: str) -> str:
            return convert(html.unescape(body).strip())

        def block_math(self, body: str) -> str:
            return f"<div class='formula'>{convert(html.unescape(body).strip(), display='block')}</div>"

    assert mistune.__version__ >= "3"
    return MarkdownWithMath(renderer=Renderer(escape=False)).render(str(source[-1]))


def index_body(source: Source, notebooks: dict[str, tuple[str, str]]) -> str:
    """The first page: what the study is (the README's own words), notebooks, scorecard, recorded runs."""
    readme = Path("README.md").read_text(encoding="utf-8").split("\n## ")[0] if Path("README.md").exists() else ""
    lines = [markdown_html(readme), '<h2 id="notebooks">Notebooks</h2><ol class="notebooks">']
    for name, (title, body) in notebooks.items():
        if name != "figures.html":
            first = next(iter(re.findall(r"<p>(.*?)</p>", body, re.DOTALL)), "")
            lines.append(f"<li><a href='{name}'>{title}</a><br>{first}</li>")
    lines.append("</ol><p><a href='figures.html'>All figures</a> on one page.</p>")
    for name, folder in source.figures.items():
        if (folder / "scorecard.csv").exists():
            card = tables.read_one(folder / "scorecard.csv", "scorecard")
            card = card.fillna({column: "" for column, kind in tables.SCHEMAS["scorecard"].items() if kind == "str"})
            text = f"## Scorecard, {name}\n\n{scorecard.in_short(card)}\n\n{scorecard.verdict_table(card)}"
            lines.append(markdown_html(text))
    lines.append('<h2 id="runs">Runs and where they come from</h2>')
    for name, folder in source.tables.items():
        runs = tables.read(folder, "runs")
        lines.append(markdown_html(f"### {name}: {len(runs)} runs\n\n{provenance_table(runs)}"))
    return "\n".join(lines)


def provenance_table(runs: pd.DataFrame) -> str:
    """One row a run: what was trained, how much, where, and by which code."""
    rows = [
        [
            f"`{run['variant']}`",
            *(f"{run[n]:,.0f}" if n in ("trained_tokens", "train_s") else run[n] for n in PROVENANCE),
        ]
        for run in runs.to_dict("records")
    ]
    return markdown_table(rows, ["variant", *PROVENANCE])


def figures_body(source: Source, out: Path) -> str:
    """Every figure, by profile."""
    lines = ['<h1 id="figures">Figures</h1>']
    for name in source.figures:
        pictures = sorted((out / "figures" / name).glob("*.png"))
        lines += [f'<h2 id="{name}">{name}</h2>'] * bool(pictures)
        for path in pictures:
            title = path.stem.replace("_", " ")
            image = f"<img src='figures/{name}/{path.name}' alt='{title}' loading='lazy'>"
            lines.append(f"<figure><figcaption>{title}</figcaption>{image}</figure>")
    return "\n".join(lines)


def keep_links(body: str, out: Path, pages: dict) -> str:
    """Links to notebooks lead to their pages; links to files that the site does not have become plain text."""

    def link(found: re.Match) -> str:
        address, text = found[2], found[3]
        notebook = re.fullmatch(r"(?:.*/)?([\w.]+)\.ipynb(#.*)?", address)
        if notebook and f"{notebook[1]}.html" in pages:
            return f'<a href="{notebook[1]}.html{notebook[2] or ""}">{text}</a>'
        near = address.split("#")[0]
        outside = re.match(r"[a-z]+:", address)
        return found[0] if outside or not near or near in pages or (out / near).exists() else text

    return re.sub(r"""<a\b[^>]*?href=(["'])(.*?)\1[^>]*>(.*?)</a>""", link, body, flags=re.DOTALL)


def page(title: str, body: str, name: str, titles: dict[str, str]) -> str:
    """A whole page: list of pages and of this one's sections at the side, the text, and the way on."""
    here = "".join(
        f'<li class="level{level}"><a href="#{anchor}">{strip(text)}</a></li>'
        for level, anchor, text in HEADING.findall(body) if level != "1"
    )  # fmt: skip
    contents = "".join(
        f"<li{' class=here' if n == name else ''}><a href='{n}'>{t}</a>"
        + (f"<ul>{here}</ul>" if n == name else "")
        + "</li>"
        for n, t in titles.items()
    )
    order = list(titles)
    later = order[order.index(name) + 1 :][:1]
    on = f"<p class='next'>Next: <a href='{later[0]}'>{titles[later[0]]}</a></p>" if later else ""
    body = re.sub(r"(<table\b.*?</table>)", r"<div class='wide'>\1</div>", body, flags=re.DOTALL)
    return (
        "<!DOCTYPE html>\n<html lang='en'>\n<head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><link rel='icon' href='data:,'>"
        f"<title>{title} · KVShot study</title>\n<style>\n{styles()}</style></head>\n<body>\n"
        f"<a class='menu' href='#contents'>Contents</a><nav id='contents'><strong>Contents</strong><ul>{contents}</ul></nav>\n<main>{body}{on}</main>\n</body></html>\n"
    )


def styles() -> str:
    """The site's style sheet and the colours of code."""
    from pygments.formatters import HtmlFormatter

    return STYLE.read_text(encoding="utf-8") + HtmlFormatter().get_style_defs(".highlight")


def strip(text: str) -> str:
    """Text of a piece of HTML, formulas and all, without tags."""
    return re.sub(r"<[^>]*>", "", re.sub(r"<a class=.anchor-link.*?</a>", "", text)).strip()


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvshot_lib.study.site", description=__doc__.splitlines()[0])
    parser.add_argument("profile", nargs="?", help="results/PROFILE instead of what is committed")
    parser.add_argument("--out", type=Path, default=Path("results/report"))
    given = parser.parse_args(words)
    try:
        first = build(of_profile(given.profile) if given.profile else committed(), given.out)
    except (StudyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(list(given.out.glob('*.html')))} pages; open {first} in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())

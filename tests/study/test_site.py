"""The site of `make report`: what is on it, and that a browser shows all of it without a network or a complaint."""

import re
from pathlib import Path

import browser
import nbformat
import pytest

pytest.importorskip("latex2mathml", reason="latex2mathml isn't installed: pip install -r requirements.txt")

from kvshot_lib.errors import StudyError
from kvshot_lib.study import site as report_site
from kvshot_lib.study.site import Source, build, committed, markdown_html, notebook_body

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The report of what is committed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return build(committed(), tmp_path_factory.mktemp("report") / "site").parent


def notebook(*cells: tuple[str, str], outputs=()) -> nbformat.NotebookNode:
    made = nbformat.v4.new_notebook()
    for kind, source in cells:
        made.cells.append(getattr(nbformat.v4, f"new_{kind}_cell")(source))
    for cell in made.cells:
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = 1, list(outputs)
    return made


def test_every_notebook_and_recorded_run_is_on_the_first_page(site):
    first = (site / "index.html").read_text()
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        assert f"href='{path.stem}.html'" in first and (site / f"{path.stem}.html").exists()
    for folder in (ROOT / "data/recorded").glob("*/"):
        revisions = set(report_site.tables.read(folder, "runs")["git_revision"])
        assert all(revision in first for revision in revisions)
    assert "Scorecard, full" in first and "not reproduced" in first
    assert len(list(site.glob("figures/full/*.png"))) == len(list((ROOT / "figures/full").glob("*.png")))


def test_nothing_on_it_needs_a_network_or_runs(site):
    for path in site.glob("*.html"):
        text = path.read_text()
        assert "<script" not in text and not re.search(r"(src|srcset)=[\"']?(https?:)?//", text)
        assert (
            not re.search(r"<link[^>]*href=[\"'](?!data:,)", text) and "url(http" not in text and "@import" not in text
        )


@pytest.mark.skipif(not browser.CHROMIUM, reason=browser.MISSING)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_every_page(site, width):
    pages = sorted(site.glob("*.html"))
    seen = browser.visit(pages, width=width)
    assert list(seen) == [page.name for page in pages]
    for name, page in seen.items():
        assert page.facts["title"].endswith("KVShot study"), name
        assert (page.facts["missing"], page.facts["dollars"], page.facts["dead"], page.console) == ([], [], [], []), (
            name
        )
        assert page.facts["overflow"] <= 0, f"{name} is wider than a screen of {width}"
        assert all(address.startswith(("file:", "data:")) for address in page.requests), name
        assert page.facts["formulas"] == (site / name).read_text().count("<math")
    assert sum(page.facts["images"] for page in seen.values()) > 30


@pytest.mark.skipif(not browser.CHROMIUM, reason=browser.MISSING)
def test_the_browser_notices_what_is_wrong(tmp_path):
    """A missing picture, an address elsewhere, an error of a script, a formula that was left as it is, a link into nothing."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<main>$x^2$ <a href='#gone'>there</a><img src='gone.png'><div style='width:3000px'>x</div></main>"
        "<script src='https://example.invalid/a.js'></script><script>console.log('told'); missing()</script>"
    )
    (seen,) = browser.visit([page]).values()
    assert [len(seen.facts[name]) for name in ("missing", "dollars", "dead")] == [1, 1, 1] and seen.facts[
        "overflow"
    ] > 0
    assert "https://example.invalid/a.js" in seen.requests
    assert any("told" in text for text in seen.console) and any("Uncaught" in text for text in seen.console)


def test_formulas_become_mathml_and_dollars_in_code_stay():
    made = markdown_html("A $\\alpha_k$ and `$x$`.\n\n$$\\sum_{i < n} x_i$$\n")
    assert made.count("<math") == 2 and "<code>$x$</code>" in made and "\\alpha" not in made and "&amp;lt;" not in made


def test_a_notebook_page_folds_code_and_leaves_progress_out(tmp_path):
    out = [nbformat.v4.new_output("stream", name=name, text=f"{name} text\n") for name in ("stdout", "stderr")]
    nbformat.write(notebook(("markdown", "# T"), ("code", "print(1)"), outputs=out), tmp_path / "a.ipynb")
    body = notebook_body(tmp_path / "a.ipynb")
    assert body.count('<details class="code">') == 1 and "stdout text" in body and "stderr text" not in body


def test_links_lead_to_pages_or_to_nothing(tmp_path):
    (tmp_path / "notebooks").mkdir()
    text = "# T\n\nSee [two](02_b.ipynb#x), [data](../data/README.md), [paper](https://arxiv.org), [here](#T)."
    for name in ("01_a", "02_b", "02_b.kv_1.seed0"):
        nbformat.write(notebook(("markdown", text), ("code", "1")), tmp_path / f"notebooks/{name}.ipynb")
    build(Source(sorted(tmp_path.glob("notebooks/*")), {}, {}), tmp_path / "site")
    page = (tmp_path / "site/01_a.html").read_text()
    assert 'href="02_b.html#x">two</a>' in page and 'href="https://arxiv.org"' in page and 'href="#T"' in page
    assert "<a href='02_b.kv_1.seed0.html'>T (kv_1.seed0)</a>" in page
    assert "README.md" not in page and ", data, " in page


def test_what_can_not_be_reported_is_refused_and_an_earlier_report_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError, match="no notebooks here .*; run it from the repository's root"):
        build(committed(), tmp_path / "site")
    with pytest.raises(
        StudyError, match="no executed notebooks in results/x/notebooks; make them with: make study PROFILE=x"
    ):
        report_site.of_profile("x")
    never = notebook(("code", "1"))
    never.cells[0].execution_count = None
    nbformat.write(never, tmp_path / "a.ipynb")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.html").write_text("earlier")
    with pytest.raises(StudyError, match="a.ipynb was never run; run it with"):
        build(Source([tmp_path / "a.ipynb"], {}, {}), tmp_path / "site")
    assert (tmp_path / "site/index.html").read_text() == "earlier"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("mine")
    with pytest.raises(StudyError, match="other holds something else than a report; choose another folder"):
        build(Source([tmp_path / "a.ipynb"], {}, {}), tmp_path / "other")

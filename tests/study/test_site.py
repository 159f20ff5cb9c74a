"""The site of `make report`: what is on it, and that a browser shows all of it without a network or a complaint."""

import re
from pathlib import Path

import browser
import nbformat
import pytest
from notebook_checks import KERNEL

from kvshot_lib.errors import StudyError
from kvshot_lib.study import site as report_site
from kvshot_lib.study.site import Source, build, committed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The report of what is committed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return build(committed(), tmp_path_factory.mktemp("report") / "site").parent


def notebook(*cells: tuple[str, str], outputs=()) -> nbformat.NotebookNode:
    made = nbformat.v4.new_notebook(metadata={"kernelspec": KERNEL})
    for kind, source in cells:
        made.cells.append(getattr(nbformat.v4, f"new_{kind}_cell")(source))
    for cell in made.cells:
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = 1, list(outputs)
    return made


def test_every_notebook_and_recorded_run_is_on_the_first_page(site):
    first = (site / "index.html").read_text()
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        assert f'href="notebooks/{path.stem}.html"' in first and (site / f"notebooks/{path.stem}.html").exists()
    for folder in (ROOT / "data/recorded").glob("*/"):
        revisions = set(report_site.tables.read(folder, "runs")["git_revision"])
        assert all(revision in first for revision in revisions)
    assert "Scorecard, full" in first and "not reproduced" in first and 'href="docs/targets.html"' in first
    shown = len(re.findall("<img", (site / "figures.html").read_text()))
    assert shown == len(list((ROOT / "figures").glob("*/*.png")))


def test_nothing_on_it_needs_a_network(site):
    for path in site.rglob("*.html"):
        text = path.read_text()
        assert not re.search(r"""(src|srcset)=["']?(https?:)?//""", text), path
        assert not re.search(r"""<link[^>]*rel=["']stylesheet["'][^>]*href=["']?(https?:)?//""", text), path
        assert "url(http" not in text and "@import" not in text, path


@pytest.mark.skipif(not browser.CHROMIUM, reason=browser.MISSING)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_every_page(site, width):
    pages = sorted(site.rglob("*.html"))
    seen = browser.visit(pages, width=width)
    assert list(seen) == [page.name for page in pages]
    for name, page in seen.items():
        assert page.facts["title"].endswith("KVShot study"), name
        assert (page.facts["missing"], page.facts["dollars"], page.facts["dead"], page.console) == ([], [], [], []), (
            name
        )
        assert page.facts["overflow"] <= 0, f"{name} is wider than a screen of {width}"
        assert all(address.startswith(("file:", "data:")) for address in page.requests), name
        assert page.facts["formulas"] == next(site.rglob(name)).read_text().count("<math")
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


@pytest.mark.skipif(not browser.CHROMIUM, reason=browser.MISSING)
def test_its_search_finds_a_page_without_a_server(site):
    (seen,) = browser.visit([site / "search.html?q=retention"]).values()
    assert seen.facts["found"] >= 1 and seen.console == []


def test_a_page_has_formulas_folded_code_no_progress_and_links_that_lead_somewhere(tmp_path):
    (tmp_path / "notebooks").mkdir()
    text = "# T\n\nSee [two](02_b.ipynb), [data](../data/README.md), [paper](https://arxiv.org). $\\alpha_k$ and `$x$`.\n\n$$\\sum_{i<n} x_i$$"
    out = [nbformat.v4.new_output("stream", name=name, text=f"{name} text\n") for name in ("stdout", "stderr")]
    for name in ("01_a", "02_b", "02_b.kv_1.seed0"):
        made = notebook(("markdown", text), ("code", "print(1)"), outputs=out)
        nbformat.write(made, tmp_path / f"notebooks/{name}.ipynb")
    build(Source(sorted(tmp_path.glob("notebooks/*")), {}, {}), tmp_path / "site")
    page = (tmp_path / "site/notebooks/01_a.html").read_text()
    assert page.count("<math") == 2 and "$x$</span></code>" in page and "alpha" not in page
    assert page.count("<details") == 1 and "stdout text" in page and "stderr text" not in page
    assert re.search(r'href="02_b.html"><span[^>]*>two<', page) and 'href="https://arxiv.org"' in page
    assert ">02_b.kv_1.seed0</a>" in page and "README.md" not in page and ">data</span>, " in page


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

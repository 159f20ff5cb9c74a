"""The README, the pages beside it and the notebooks: what they name is there, commands are commands, the example decodes."""

import re
from pathlib import Path

import pytest
from stated import text_of

from kvshot_lib.study.cli import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/**/*.md"), *ROOT.glob("notebooks/[0-9]*.ipynb")]
COMMAND = re.compile(r"(?:python -m kvshot_lib|-m kvshot_lib|`kvshot) ([a-z][\w-]*)(?: ([a-z][\w-]*))?")


def test_every_file_that_the_readme_names_is_there():
    named = re.findall(r"\]\(([^)#]+)\)", README)
    named += re.findall(r"`((?:notebooks|data|figures|kvshot_lib)/[\w./-]+)`", README)
    missing = [name for name in named if not name.startswith("http") and not (ROOT / name).exists()]
    assert named and not missing


@pytest.mark.parametrize("path", [str(path.relative_to(ROOT)) for path in PAGES])
def test_every_command_that_a_page_names_is_one(path):
    text = text_of(path)
    assert "-m kvshot_lib." not in text, "of earlier versions"
    for verb, inner in COMMAND.findall(text):
        found = cli.commands.get(verb)
        assert found is not None, verb
        assert not hasattr(found, "commands") or inner in found.commands, f"{verb} {inner}"


@pytest.mark.needs_target
def test_its_example_decodes(monkeypatch, capsys):
    """The python block as it stands, but for the length of the answer."""
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(block.replace("Chain(4))", "Chain(4), max_new_tokens=24)"), {})  # noqa: S102 - its own README
    *text, accepted, told = capsys.readouterr().out.strip().splitlines()
    assert "".join(text) and all(0 <= int(count) <= 4 for count in accepted.strip("[]").split(","))
    assert re.fullmatch(r"\d\.\d\d tokens a forward", told)

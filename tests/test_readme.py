"""Numbers in the README are those of the recorded run."""

import re
from pathlib import Path

import pytest
from recorded import summary

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


MAIN = (
    "hidden", "hidden_post_norm", "hidden_continued", "none_1", "kv_1", "kv_2", "kv_4", "states_2", "hybrid", "hybrid_warm",
    "hidden_31", "hidden_31_continued", "hybrid_warm_31", "kv_4_unrotate_mlp_continued",
    "states_4_continued", "both_4_continued",
)  # fmt: skip
COLUMNS = [
    ("step_acceptance", 0), ("step_acceptance", 3), ("step_acceptance", 6), ("retention", None), ("chain_retention", None),
    ("expected_mat", None), ("measured_mat", None),
]  # fmt: skip


def test_the_result_table_is_the_recorded_one():
    table = summary()
    names = [f"{m}{'' if k is None else k}" for m, k in COLUMNS]
    step = table["draft_step"].astype(str).where(table["draft_step"].notna(), "")
    cells = [f"{v:.3f} [{low:.3f}, {high:.3f}]" for v, low, high in table[["value", "low", "high"]].itertuples(index=False)]
    wide = table.assign(cell=cells, name=table["metric"] + step).pivot(index="variant", columns="name", values="cell")
    for variant in MAIN:
        assert f"| `{variant}` | {' | '.join(wide.loc[variant, names])} |" in README, variant


def test_every_file_that_the_readme_names_is_there():
    named = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(
        r"`((?:notebooks|data|figures|kvshot_lib)/[\w./-]+)`", README
    )
    missing = [name for name in named if not name.startswith("http") and not (ROOT / name).exists()]
    assert named and not missing


@pytest.mark.needs_target
def test_its_example_decodes(monkeypatch, capsys):
    """The python block as it stands, but for the length of the answer."""
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(block.replace("tree.Chain(4))", "tree.Chain(4), max_new_tokens=24)"), {})  # noqa: S102 - its own README
    *text, accepted, told = capsys.readouterr().out.strip().splitlines()
    assert "".join(text) and all(0 <= int(count) <= 4 for count in accepted.strip("[]").split(","))
    assert re.fullmatch(r"\d\.\d\d tokens a forward", told)

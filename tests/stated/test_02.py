"""What notebook 02 says of its drafters and of its own tables; and that it runs on the tiny target, where nothing is trained."""

import re

import nbformat
import pytest
from notebook_checks import ROOT
from recorded import minus, value
from stated import text_of, unstated

from kvshot_lib.files import read_json
from kvshot_lib.study.notebooks import run_notebook

NOTEBOOK = "notebooks/02_build_drafter.ipynb"


def saved_outputs() -> str:
    """Everything printed and every table, as text."""
    cells = nbformat.read(ROOT / NOTEBOOK, as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def numbers(label: str) -> list[float]:
    """The numbers of a table's row."""
    (row,) = re.findall(rf"^{re.escape(label)}\s+([\d. ]+)$", saved_outputs(), re.MULTILINE)
    return [float(number) for number in row.split()]


def test_no_interval_is_told():
    assert unstated(NOTEBOOK, []) == []


def test_most_of_a_keys_length_is_common_and_less_so_as_cached():
    for layer in ("9", "19", "29"):
        cached, turned_back = numbers(layer)
        assert 0.5 < cached < turned_back


def test_draft_side_gradients_are_smaller_but_not_by_as_much_as_their_share():
    ratios = [
        numbers(f"attention.{part}_proj")[0] / numbers(f"fusion.{name}")[0]
        for part, name in (("k", "keys"), ("v", "values"))
    ]
    share = int(re.search(r"draft-side entries are (\d+)%", saved_outputs()).group(1)) / 100
    assert all(2 * share < ratio < 1 for ratio in ratios)


def test_the_published_drafters_are_what_the_text_says():
    cache, states = (
        read_json(ROOT / f"data/checkpoints/{name}/drafter.json", "") for name in ("kv_2", "hidden_31_continued")
    )
    assert cache["config"]["kv_rope"] == "raw" and cache["config"]["kv_fusion"] == "linear"
    assert states["config"]["feedback"] == "post_norm" and states["config"]["hidden_norm"]


def test_what_is_said_of_other_runs():
    text = text_of(NOTEBOOK)
    assert "At equal training `kv_2` has 2.16 and `hidden_31` 2.27" in text and "it gains `kv_2` .05 tokens" in text
    assert [round(value(v, "measured_mat"), 2) for v in ("hidden_31", "kv_2")] == [2.27, 2.16]
    assert round(minus("kv_2_unrotate", "kv_2")[0], 2) == 0.05


@pytest.mark.pipeline
def test_it_runs_without_published_drafters(tmp_path):
    values = {"target": "tiny", "corpus": "tiny", "kv_drafter": "", "state_drafter": "", "document_number": 0}
    run_notebook(ROOT / NOTEBOOK, tmp_path / "out.ipynb", values | {"figures_dir": str(tmp_path)})
    assert (tmp_path / "rope_of_keys.png").exists()

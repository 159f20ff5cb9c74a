"""Makes nbval compare pictures too, leave stderr (progress bars, warnings) alone, and runs files side by side."""

import re
from collections import Counter

import pytest


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare = (*(kind for kind in collector.skip_compare if kind != "image/png"), "stderr")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, whose own groups (--dist loadgroup) pytest 9.2 ignores
def pytest_xdist_make_scheduler(config, log):
    """With ``--dist loadfile`` notebooks that share a ``results_dir`` stay together and in order: one reads what another wrote."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class WithResults(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = config.rootpath / super()._split_scope(nodeid)
            if path.parent.name == "stated":  # what they draw from the recorded tables is kept in their process
                return str(path.parent)
            text = path.read_text(encoding="utf-8") if path.suffix == ".ipynb" else ""
            shared = re.search(r"results_dir = \W+([\w/-]+)", text)
            return shared[1] if shared else str(path)

    config.option.loadscopereorder = of_notebooks(config)  # else the order of `pytest_collection_modifyitems`
    return WithResults(config, log)


def pytest_collection_modifyitems(config, items):
    """Side by side, files that run or train something come first, so that none of them ends alone; then the largest."""
    if not hasattr(config, "workerinput") or of_notebooks(config):
        return
    long, tests = Counter(), Counter(item.path for item in items)
    for item in items:
        long[item.path] += any(item.get_closest_marker(name) for name in ("pipeline", "slow"))
    items.sort(key=lambda item: (not long[item.path], -tests[item.path]))


def of_notebooks(config) -> bool:
    return config.getoption("nbval", False)

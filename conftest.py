"""Makes nbval compare pictures too, leave stderr (progress bars, warnings) alone, and run notebooks side by side."""

import re

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
            text = path.read_text(encoding="utf-8") if path.suffix == ".ipynb" else ""
            shared = re.search(r"results_dir = \W+([\w/-]+)", text)
            return shared[1] if shared else str(path)

    return WithResults(config, log)

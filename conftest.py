"""Makes nbval compare pictures too, and leave stderr (progress bars, warnings) alone."""


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare = (*(kind for kind in collector.skip_compare if kind != "image/png"), "stderr")

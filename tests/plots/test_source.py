"""The library's code as text is what Python has loaded."""

import inspect
import textwrap

from kvshot_lib.drafters.layers import HybridLayer
from kvshot_lib.metrics.acceptance import axis_steps
from kvshot_lib.plots.source import source


def test_functions_and_methods_are_those_of_the_module():
    assert source("metrics.acceptance.axis_steps").data == f"```python\n{inspect.getsource(axis_steps)}```"
    method = textwrap.dedent(inspect.getsource(HybridLayer.mix))
    assert source("drafters.layers.HybridLayer.mix").data == f"```python\n{method}```"

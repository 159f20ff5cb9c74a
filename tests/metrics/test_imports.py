"""What only reads tables starts at once: metrics and figures load no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[2] / "kvshot_lib"


@pytest.mark.parametrize("room", ["metrics", "plots"])
def test_the_room_loads_no_torch(room):
    modules = [f"kvshot_lib.{room}.{path.stem}" for path in sorted((LIBRARY / room).glob("[a-z]*.py"))]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert modules and subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

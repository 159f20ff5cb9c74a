"""`python -m kvshot_lib VERB`."""

import sys

from .study.cli import main

if __name__ == "__main__":
    sys.exit(main())

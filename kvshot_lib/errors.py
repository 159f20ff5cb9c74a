"""The one exception that a reader is meant to see."""

import functools
import sys
from collections.abc import Callable


class StudyError(Exception):
    """Bad input or a broken environment, told in one line that says what to do.

    Notebooks show only that line: IPython asks an exception for its own traceback, and a reader who mistyped
    a parameter has no use for forty frames of ours.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"StudyError: {self}"]


def one_line_errors(main: Callable[..., int]) -> Callable[..., int]:
    """A command whose `StudyError` is one line on stderr, and exit status 1."""

    @functools.wraps(main)
    def command(*arguments, **named) -> int:
        try:
            return main(*arguments, **named)
        except StudyError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    return command

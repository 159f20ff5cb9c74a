"""The one exception that a reader is meant to see."""


class StudyError(Exception):
    """Bad input or a broken environment, told in one line that says what to do.

    Notebooks show only that line: IPython asks an exception for its own traceback, and a reader who mistyped
    a parameter has no use for forty frames of ours.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"StudyError: {self}"]

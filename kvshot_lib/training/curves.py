"""Training curves by Accelerate's own tracker; `tensorboard --logdir results/PROFILE/runs` shows them."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from .. import parallel
from ..errors import StudyError


@contextlib.contextmanager
def curves(log_to: str, folder: str | Path, step: int) -> Iterator[Callable[[list[dict]], None]]:
    """Gives what takes the history rows of one step to ``folder/tensorboard``; without ``log_to`` they go nowhere.

    Rows after ``step``, which a killed run has left and this one makes again, are purged.

    Raises
    ------
    StudyError : the package that reads them is not installed.
    """
    if not log_to or not parallel.is_main():
        yield lambda rows: None
        return
    from accelerate.tracking import TensorBoardTracker, is_tensorboard_available

    if not is_tensorboard_available():
        raise StudyError(f"log_to={log_to!r} needs a package that isn't installed: pip install tensorboard")
    tracker = TensorBoardTracker("tensorboard", folder, purge_step=step + 1)
    tracker.start()

    def log(rows: list[dict]) -> None:
        values = {"learning_rate": rows[0]["learning_rate"]}
        for row in rows:
            own = {f"{name}/{row['split']}_{row['draft_step']}": row[name] for name in ("loss", "acceptance")}
            values |= {name: value for name, value in own.items() if math.isfinite(value)}
        tracker.log(values, step=rows[0]["step"])

    try:
        yield log
    finally:
        tracker.finish()

"""Training curves for TensorBoard: `tensorboard --logdir results/PROFILE/runs` shows them."""

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
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise StudyError(f"log_to={log_to!r} needs a package that isn't installed: pip install tensorboard") from None
    with SummaryWriter(Path(folder) / "tensorboard", purge_step=step + 1) as writer:

        def log(rows: list[dict]) -> None:
            writer.add_scalar("learning_rate", rows[0]["learning_rate"], rows[0]["step"])
            for row in rows:
                for name in ("loss", "acceptance"):
                    if math.isfinite(row[name]):
                        writer.add_scalar(f"{name}/{row['split']}_{row['draft_step']}", row[name], row["step"])

        yield log

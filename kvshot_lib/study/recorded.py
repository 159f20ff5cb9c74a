"""Tables and figures that are kept in the repository, recorded from a study's results."""

import shutil
from pathlib import Path

from ..errors import StudyError
from ..metrics import tables
from ..metrics.collect import thin


def record(profile: str) -> str:
    """Copy tables and figures of results/PROFILE to data/recorded/PROFILE and figures/PROFILE, as they are published.

    Raises
    ------
    StudyError : no tables there.
    """
    results, to, figures = Path("results") / profile, Path("data/recorded") / profile, Path("figures") / profile
    names = [name for name in tables.SCHEMAS if tables.path_of(results / "tables", name).is_file()]
    if not names:
        raise StudyError(f"there are no tables in {results}/tables; make them with: make study PROFILE={profile}")
    for name in names:
        tables.write(to, name, tables.read(results / "tables", name))
    thin(to)
    figures.mkdir(parents=True, exist_ok=True)
    for path in results.glob("figures/*"):
        if not path.name.startswith("training_"):  # of one run each: training.png shows them together
            shutil.copy(path, figures)
    return f"{to}: {len(names)} tables; {figures}: {len(list(figures.glob('*.png')))} figures"

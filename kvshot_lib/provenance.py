"""Where a number came from: code, packages, device and date, written beside every recorded table."""

import datetime
import os
import platform
import subprocess
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch


def git_revision() -> str:
    """Short revision of the study's checkout, with ``+`` if tracked files differ from it.

    ``KVSHOT_GIT_REVISION`` wins where it is set: for files copied to a GPU machine, whose own history is another or
    none. Outside git and without it: ``unknown``.
    """
    if given := os.environ.get("KVSHOT_GIT_REVISION"):
        return given
    git = partial(subprocess.check_output, cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL)
    tracked = ("--untracked-files=no", "--", ":/kvshot_lib", ":/notebooks/Snakefile")
    try:
        changed = git(["git", "status", "--porcelain", *tracked]).strip()
        return git(["git", "rev-parse", "--short=10", "HEAD"]).strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device: str | torch.device) -> str:
    """What a reader would call the device: the GPU's name, or the processor's architecture and thread count."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {platform.machine()} ({torch.get_num_threads()} threads)"


def provenance(device: str | torch.device = "cpu") -> dict[str, str]:
    """The provenance columns of ``runs.csv``: device, git_revision, torch, transformers and date (UTC)."""
    return {
        "device": device_name(device),
        "git_revision": git_revision(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }

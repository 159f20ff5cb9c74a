"""What a kill, a flipped byte and a full disk do to a study, at the size of the tiny target: `make torture`.

python tests/torture.py [--seed 0] [--kills 20] [--flips 100] [--stages extract train sweep flips disk]

Kills: extraction, training and the sweep are killed with SIGKILL at random moments, half of them just before or after a file is
renamed into place, and resumed until they come to their end; what they then leave must be what an undisturbed run leaves, byte for
byte but for seconds and dates. Flips: one byte of a random file is changed; reading it must end in a StudyError or give what
was there before. Disk: a limit on the size of files, a full disk and a folder that can't be written must each be told in
one line and cost nothing. Every random choice follows from the seed; how far a run has come by a moment depends on the machine.
"""

import argparse
import contextlib
import functools
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from damage import READERS, flip_bytes
from study_jobs import JOBS, leavings

from kvshot_lib.errors import StudyError

ENDED, KILLED = "came to its end", "killed"


@dataclass(frozen=True)
class Kill:
    """When to kill: after seconds, or at the n-th rename of the process, before or after it. ``all`` takes its children along."""

    after_s: float = 0.0
    rename: int = 0
    before: bool = False
    whole_group: bool = True

    def __str__(self) -> str:
        moment = f"after {self.after_s:.2f} s"
        if self.rename:
            moment = f"just {'before' if self.before else 'after'} rename {self.rename}"
        return moment + ("" if self.whole_group else ", the first process alone")


def run(job, folder: Path, kill: Kill | None = None, prepare=None) -> str:
    """Run ``job(folder)`` in a forked process; how it ended: `ENDED`, `KILLED` or the last line that it told."""
    log = folder.with_name(folder.name + ".log")
    sys.stdout.flush()
    child = os.fork()
    if not child:
        _in_child(job, folder, kill, prepare, log)
    if kill and not kill.rename:
        time.sleep(kill.after_s)
        (os.killpg if kill.whole_group else os.kill)(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    _wait_for_children(child)
    if os.WIFSIGNALED(status):
        return KILLED
    return ENDED if os.WEXITSTATUS(status) == 0 else log.read_text().splitlines()[-1]


def _in_child(job, folder: Path, kill: Kill | None, prepare, log: Path) -> None:
    """The forked process: never returns."""
    status = 1
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if kill and kill.rename:
            os.replace = _deadly(os.replace, kill)
        if prepare:
            prepare()
        job(folder)
        status = 0
    except StudyError as error:
        print(f"StudyError: {error}", flush=True)
    except BaseException as error:  # noqa: BLE001 (told to the parent, whatever it is)
        print(f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)
    finally:
        os._exit(status)


def _deadly(rename, kill: Kill):
    """`os.replace` that kills its process at the n-th call."""
    calls = 0

    def replace(*paths):
        nonlocal calls
        calls += 1
        if calls == kill.rename and kill.before:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths)
        if calls == kill.rename:
            os.kill(os.getpid(), signal.SIGKILL)

    return replace


def _wait_for_children(group: int, limit_s: float = 60.0) -> None:
    """Until nothing of the process group is left; something that stays is a finding."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    raise AssertionError(f"processes of a killed run were still at work after {limit_s:.0f} s")


def undisturbed(name: str, folder: Path) -> tuple[dict, float, int]:
    """What the job leaves when nobody disturbs it, its seconds, and how often it renamed a file into place."""
    counted = folder.with_name(folder.name + ".renames")

    def count():
        rename = os.replace

        def replace(*paths):
            rename(*paths)
            with open(counted, "a") as handle:
                handle.write("x")

        os.replace = replace

    started = time.monotonic()
    ended = run(JOBS[name], folder, prepare=count)
    assert ended == ENDED, f"the undisturbed {name} failed: {ended}"
    return leavings(folder), time.monotonic() - started, counted.stat().st_size if counted.exists() else 0


def draw_kill(random: np.random.Generator, seconds: float, renames: int) -> Kill:
    if renames > 4 and random.random() < 0.5:
        return Kill(rename=int(random.integers(1, renames + 1)), before=bool(random.random() < 0.5))
    return Kill(after_s=float(random.uniform(0, seconds)), whole_group=bool(random.random() < 0.5))


def torture_kills(name: str, kills: int, folder: Path, random: np.random.Generator, say) -> list[str]:
    """Kill one job so many times, resuming it in between; the findings."""
    expected, seconds, renames = undisturbed(name, folder / f"{name}-undisturbed")
    say(f"{name}: undisturbed {seconds:.1f} s, {renames} renames in the first process; to be killed {kills} times")
    found, studies, done = [], 1, 0
    work = folder / f"{name}-{studies}"
    while True:
        kill = draw_kill(random, seconds, renames if name != "sweep" else 0) if done < kills else None
        ended = run(JOBS[name], work, kill)
        if ended == KILLED:
            done += 1
            say(f"  kill {done}: {kill}")
            continue
        if ended != ENDED:
            found.append(f"{name}, after {done} kills, could not resume: {ended}")
        elif wrong := differences(expected, leavings(work)):
            found.append(f"{name}, after {done} kills, left other results: {', '.join(wrong)}")
        if done >= kills or len(found) > 3:
            say(f"  {studies} killed and resumed to the end; {'equal to the undisturbed one' if not found else found}")
            return found
        studies += 1
        work = folder / f"{name}-{studies}"


def differences(expected: dict, found: dict) -> list[str]:
    """Names of files that are missing, too many, or other than expected."""
    return sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))


def torture_bytes(flips: int, folder: Path, random: np.random.Generator, say) -> list[str]:
    """Flip one byte at a time; the findings."""
    study = folder / "flips"
    for name in ("extract", "train", "collect", "corpus"):
        ended = run(JOBS[name], study)
        assert ended == ENDED, f"could not make a study to damage: {ended}"
    found, counted = [], Counter()
    for kind, outcome, what in flip_bytes(study, flips, random):
        counted[kind, outcome] += 1
        if outcome not in ("detected", "harmless"):
            found.append(f"{kind}: {outcome}: {what}")
    say(f"{flips} flipped bytes")
    for kind in READERS:
        told = ", ".join(
            f"{counted[kind, o]} {o}" for o in ("detected", "harmless", "READ AS GOOD", "CRASHED") if counted[kind, o]
        )
        say(f"  {kind:18} {told}")
    return found


def torture_disk(folder: Path, say) -> list[str]:
    """Files that may not grow, a full disk, a folder of somebody else: one line each, and the same command goes on afterwards."""
    found = []
    for name in ("extract", "train"):
        expected, _, _ = undisturbed(name, folder / f"disk-{name}-undisturbed")
        for trouble in ("file size limit", "full disk", "read-only folder"):
            work = folder / f"disk-{name}-{trouble.replace(' ', '-')}"
            work.mkdir(mode=0o755)
            if trouble == "full disk" and not _mount(work):
                say(f"  {name}, {trouble}: not tried, mounting a small file system needs root")
                continue
            if name == "train":
                run(JOBS["extract"], work)
            with _trouble(trouble, work) as prepare:
                told = run(JOBS[name], work, prepare=prepare)
            say(f"  {name}, {trouble}: {told}")
            if not told.startswith(("StudyError: could not write", "StudyError: the features need")):
                found.append(f"{name}, {trouble}: {told}")
            ended = run(JOBS[name], work)
            if ended != ENDED or (ended := differences(expected, leavings(work))):
                found.append(f"{name}, after {trouble}: {ended}")
            if trouble == "full disk":
                subprocess.run(["umount", str(work)], check=True)
    return found


@contextlib.contextmanager
def _trouble(kind: str, work: Path):
    """A disk with room for little more than is there, or a folder without permission; yields what the child does about itself."""
    if kind == "full disk":
        used = sum(path.stat().st_size for path in work.rglob("*"))
        _remount(work, 1024 + used // 1024)
        filler = work / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as handle:
            while os.statvfs(work).f_bavail * 4096 > 60_000:
                handle.write(bytes(4096))
        yield None
        filler.unlink()
        _remount(work, 64 * 1024)
        return
    if kind == "read-only folder" and os.getuid():
        for path in [work, *work.rglob("*/")]:
            path.chmod(0o555)
    yield _small_files if kind == "file size limit" else _nobody
    for path in [work, *work.rglob("*/")]:
        path.chmod(0o755)


def _small_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _nobody() -> None:
    """Become a user who can't write to the folder; without root its mode forbids it already."""
    if not os.getuid():
        os.setuid(65534)


def _mount(folder: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    try:
        return not os.getuid() and subprocess.run(command, check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def _remount(folder: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(folder)], check=True)


def main(words: list[str] | None = None) -> int:
    stages = ("extract", "train", "sweep", "flips", "disk")
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=20, help="of extraction, training and the sweep together")
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--stages", nargs="+", default=stages, choices=stages)
    given = parser.parse_args(words)
    say = functools.partial(print, flush=True)
    torch.set_num_threads(1)
    os.environ["KVSHOT_GIT_REVISION"] = "torture"  # a commit in the meantime is no finding
    started, found = time.monotonic(), []
    killed = [stage for stage in given.stages if stage in JOBS]
    with tempfile.TemporaryDirectory(prefix="torture-") as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        for place, name in enumerate(killed):
            kills = given.kills // len(killed) + (place < given.kills % len(killed))
            found += torture_kills(name, kills, folder, np.random.default_rng([given.seed, place]), say)
        if "flips" in given.stages:
            found += torture_bytes(given.flips, folder, np.random.default_rng([given.seed, 10]), say)
        if "disk" in given.stages:
            say("disk trouble")
            found += torture_disk(folder, say)
    say("\n".join(["FOUND:", *found]) if found else "nothing was lost, and nothing false was read as good")
    say(f"{time.monotonic() - started:.0f} s, seed {given.seed}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())

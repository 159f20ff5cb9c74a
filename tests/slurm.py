"""The `smoke` study on a cluster: a Slurm of one node, two trainings killed and resumed, against the same study run here.

python tests/slurm.py [FOLDER]     (by hand, as root: apt-get install --no-install-recommends slurm-wlm munge)

Everything lies in FOLDER (results/slurm): daemons' files, Snakemake's plugin, one checkout that runs the study on this machine
alone and one that hands every job to Slurm. Only /etc/slurm/slurm.conf lies elsewhere, because the plugin takes SLURM_CONF
away from its jobs; one that is there already is left alone and nothing is run. docs/clusters.md tells what came of it.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd

ROOT = Path(__file__).parents[1]
PLUGIN = [  # one of the versions that docs/clusters.md was written from
    "snakemake-executor-plugin-slurm==2.8.0", "snakemake-executor-plugin-slurm-jobstep==0.6.1", "throttler==1.2.2",
]  # fmt: skip
CONFIG = Path("/etc/slurm/slurm.conf")
KILLS = {"hidden": "kill -9", "kv_1": "scancel"}
EPOCHS = 12  # a training long enough to be killed in
VARYING = re.compile(r"(_s|seconds|date)$|^speedup")  # columns of measured times, and their ratios
WORDS = [
    "--snakefile", "notebooks/Snakefile", "--config", "profile=smoke", "--executor", "slurm", "--cores", "2", "--jobs", "8",
    "--rerun-incomplete", "--keep-going", "--slurm-no-account", "--slurm-status-command", "squeue",
    "--slurm-init-seconds-before-status-checks", "5", "--default-resources", "slurm_partition=study", "mem_mb=1000", "runtime=60",
]  # fmt: skip
CLUSTER = """ClusterName=kvshot
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MinJobAge=600
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory={memory}
PartitionName=study Nodes=ALL Default=YES
"""


@contextlib.contextmanager
def cluster(folder: Path):
    """A Slurm of this one machine; its daemons are ended in the end."""
    if missing := [name for name in ("munged", "slurmctld", "slurmd") if shutil.which(name) is None]:
        sys.exit(f"{', '.join(missing)} not found, as root: apt-get install --no-install-recommends slurm-wlm munge")
    if CONFIG.exists():
        sys.exit(f"{CONFIG} is there: this machine belongs to a cluster; take another one")
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    host = socket.gethostname().split(".")[0]
    CONFIG.write_text(CLUSTER.format(host=host, folder=folder, cores=os.cpu_count(), memory=memory * 3 // 4))
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    try:
        subprocess.run(["munged", *(f"--{option}={folder}/munge.{name}" for option, name in files.items())], check=True)
        for daemon in ("slurmctld", "slurmd"):
            subprocess.run([daemon], check=True)
        yield
    finally:
        CONFIG.unlink()
        for path in (folder / name for name in ("slurmd.pid", "slurmctld.pid", "munge.pid")):
            if path.exists():
                os.kill(int(path.read_text()), signal.SIGTERM)


def checkout(folder: Path) -> Path:
    """Notebooks, and links to library and data; this `smoke` trains longer, with a checkpoint at every step."""
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    for name in ("data", "kvshot_lib"):
        (folder / name).symlink_to(ROOT / name)
    profile, training = folder / "notebooks/profiles/smoke.yaml", folder / "notebooks/03_train_drafter.ipynb"
    profile.write_text(profile.read_text().replace("epochs: 1,", f"epochs: {EPOCHS},"))
    notebook = nbformat.read(training, as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += "\ncheckpoint_every_s = 0.0"
    nbformat.write(notebook, training)
    return folder


def kill_trainings(folder: Path, process: subprocess.Popen) -> None:
    """Kill each training of `KILLS` once it has a checkpoint, and leave a mark in its folder that only a resumed run keeps."""
    left = dict(KILLS)
    while left:
        assert process.poll() is None, f"the run ended before {', '.join(left)} could be killed"
        for variant in [name for name in left if (run_folder(folder, name) / "checkpoint.pt").exists()]:
            (run_folder(folder, variant) / "witness").touch()
            queue = subprocess.check_output(["squeue", "--noheader", "--format=%i %k"], text=True)
            job = next(line.split()[0] for line in queue.splitlines() if f"train_wildcards_{variant}_" in line)
            how = left.pop(variant)
            if how == "scancel":
                subprocess.run(["scancel", job], check=True)
            else:
                os.kill(kernel_of(job), signal.SIGKILL)
            print(f"{variant}: job {job} killed after a checkpoint ({how})", flush=True)
        time.sleep(0.02)


def kernel_of(job: str) -> int:
    """The process that trains in a job: its notebook's kernel."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (
                b"ipykernel" in (process / "cmdline").read_bytes()
                and f"SLURM_JOB_ID={job}\0" in (process / "environ").read_text()
            ):
                return int(process.name)
    raise AssertionError(f"job {job} has no kernel")


def run_folder(folder: Path, variant: str) -> Path:
    return folder / f"results/smoke/runs/{variant}/seed0"


def differences(ours: Path, theirs: Path) -> list[str]:
    """Tables and weights of two studies that are not equal, value by value; times are left out."""
    found = []
    names = sorted({path.relative_to(folder) for folder in (ours, theirs) for path in folder.glob("tables/*.*")})
    for name in names:
        if not all((folder / name).exists() for folder in (ours, theirs)):
            found.append(f"{name}: only in one")
            continue
        read = pd.read_parquet if name.suffix == ".parquet" else pd.read_csv
        one, other = (read(folder / name) for folder in (ours, theirs))
        columns = [column for column in one if not VARYING.search(column)]
        if list(one) != list(other) or len(one) != len(other):
            found.append(f"{name}: other rows or columns")
        else:
            found += [f"{name}: {column}" for column in columns if not one[column].equals(other[column])]
    for path in sorted(ours.glob("runs/*/seed0/drafter.safetensors")):
        if path.read_bytes() != (theirs / path.relative_to(ours)).read_bytes():
            found.append(str(path.relative_to(ours)))
    print(f"compared {len(names)} tables and the weights of {len(list(ours.glob('runs/*/seed0')))} drafters")
    return found


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    plugins = folder / "plugins"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(plugins), *PLUGIN]
    subprocess.run(pip, check=True)
    os.environ |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    os.environ["PYTHONPATH"] = f"{plugins}:{ROOT}"
    local, queued = checkout(folder / "local"), checkout(folder / "queued")
    command = [sys.executable, "-m", "snakemake", *WORDS]
    with cluster(folder), open(folder / "snakemake.log", "w") as log:
        options = {"cwd": queued, "stdout": log, "stderr": log}
        process = subprocess.Popen(command, **options)
        kill_trainings(queued, process)
        assert process.wait() != 0, "Snakemake said nothing of two killed jobs"
        unfinished = [name for name in KILLS if not (run_folder(queued, name) / "run.json").exists()]
        assert unfinished == list(KILLS), f"killed too late: only {unfinished} are unfinished"
        print("the first run stopped with an error, as it should; the same command again", flush=True)
        subprocess.run(command, check=True, **options)
        subprocess.run(["sinfo", "--version"], check=True)
    jobs = re.findall(r"Job \d+ has been submitted", (folder / "snakemake.log").read_text())
    for variant in KILLS:
        assert (run_folder(queued, variant) / "witness").exists(), f"{variant} began anew instead of going on"
    print(f"{len(jobs)} jobs went through the queue; both killed trainings went on from their checkpoint")
    subprocess.run([sys.executable, "-m", "kvshot_lib", "study", "smoke"], cwd=local, check=True)
    found = differences(local / "results/smoke", queued / "results/smoke")
    sys.exit("\n".join(["not equal:", *found]) if found else print("equal in every value but times"))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "results/slurm").resolve())

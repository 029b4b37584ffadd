"""A SLURM of two nodes on this machine, of Debian's packages: started for tests and stopped in any case.

    python -m tests.slurm.cluster sbatch --wait --nodes 2 MY.sbatch   # a command with the cluster around it

Root is needed, and the packages (installed if missing). Nothing outside one temporary folder is written:
munge, too, has a key and a socket of its own.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
CONF = """\
ClusterName=latentseg
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_min_interval=500000
ReturnToService=2
SlurmdParameters=config_overrides
MpiDefault=none
JobRequeue=1
KillWait=60
MailProg=/bin/true
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 Gres=gpu:1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 Gres=gpu:1
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=1:00:00 State=UP
"""


def install() -> None:
    """Install SLURM and munge by apt-get, if a program is missing; their services are not started.

    Raises:
        RuntimeError: this is not root, or apt-get failed.
    """
    if os.geteuid() != 0:
        raise RuntimeError(
            "SLURM's daemons need root: run `make test-slurm` as root, in a throw-away machine."
        )
    if all(map(shutil.which, PROGRAMS)):
        return
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for words in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", *words], env=quiet, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"apt-get {words[0]} failed; SLURM's tests need Debian's packages.\n{done.stderr}"
            )


@contextmanager
def cluster():
    """Inside the block SLURM runs with nodes n1 and n2; yields the environment for its clients.

    The nodes offer 4 CPUs each, whatever the machine has, and a GPU that does not exist, so that a script
    which asks for one can be tested. The logs lie beside the file that SLURM_CONF names.

    Raises:
        RuntimeError: a daemon ended or the nodes did not come up; shows the logs.
    """
    install()
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder, daemons = Path(name), []
        before = signal.signal(signal.SIGTERM, interrupt)
        environment = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf"}
        try:
            start(folder, daemons, environment)
            yield environment
        finally:
            stop(daemons, environment)
            signal.signal(signal.SIGTERM, before)


def start(folder: Path, daemons: list[subprocess.Popen], environment: dict[str, str]) -> None:
    """Write the configuration and start the daemons, each appended to `daemons` as soon as it runs."""
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(
        CONF.format(host=socket.gethostname(), ports=free_ports(3), folder=folder)
    )
    (folder / "gres.conf").write_text("NodeName=n[1-2] Name=gpu File=/dev/null\n")
    (folder / "munge.key").touch(0o600)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files]
    nodes = [["slurmd", "-D", "-N", name] for name in ("n1", "n2")]
    for words in (munge, ["slurmctld", "-D"], *nodes):
        with open(folder / f"{words[0]}-{len(daemons)}.out", "wb") as out:
            # A session of its own: control-C is for the tests, which then need the daemons to end the jobs.
            options = {"start_new_session": True, "preexec_fn": end_with_parent}
            daemons.append(subprocess.Popen(words, env=environment, stdout=out, stderr=out, **options))
        time.sleep(1)
    deadline = time.monotonic() + 60
    while subprocess.run(
        ["sinfo", "--noheader", "--format=%T %D"], env=environment, capture_output=True, text=True
    ).stdout.split() != ["idle", "2"]:
        if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in daemons):
            logs = "\n".join(
                f"{p.name}: {p.read_text()[-1500:]}"
                for p in folder.glob("*.*")
                if p.suffix in (".log", ".out")
            )
            raise RuntimeError(f"The two nodes did not come up within a minute.\n{logs}")
        time.sleep(0.5)


def stop(daemons: list[subprocess.Popen], environment: dict[str, str]) -> None:
    """End all jobs, then the daemons, the last started first; kill what does not end."""
    deadline = time.monotonic() + 60
    while daemons and daemons[-1].poll() is None and time.monotonic() < deadline:
        subprocess.run(
            ["scancel", "--full", "--signal=KILL", "--user=root"], env=environment, capture_output=True
        )
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
        if not subprocess.run(["squeue", "--noheader"], env=environment, capture_output=True).stdout:
            break
        time.sleep(1)
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def interrupt(number: int, frame) -> None:
    """Let SIGTERM, too, end the tests by way of their `finally`."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def end_with_parent() -> None:
    """Called in a daemon before it starts: it is to end with the tests, even if these are killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def free_ports(count: int) -> list[int]:
    """Return ports of this machine on which nothing listens at present."""
    with_all_open = [socket.socket() for _ in range(count)]
    for each in with_all_open:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in with_all_open]
    for each in with_all_open:
        each.close()
    return ports


if __name__ == "__main__":
    with cluster() as environment:
        sys.exit(subprocess.run(sys.argv[1:] or ["sinfo"], env=environment).returncode)

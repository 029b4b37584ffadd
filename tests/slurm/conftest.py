"""A cluster for all tests of this folder, and small runs on it."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.slurm.cluster import cluster

ROOT = Path(__file__).parent.parent.parent
CONF = "conf/mini/supervised_street.yaml"
MAX_STEPS = 40


class Jobs:
    """Submits runs of MAX_STEPS small steps and asks after them."""

    def __init__(self, environment: dict[str, str], folder: Path):
        # On a cluster the address is the name of the first node; here n1 is a name of SLURM's only.
        self.environment = environment | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        self.folder = folder

    def words(self, name: str, seconds: float = 0, **trainer) -> list[str]:
        """Words of train.py for a run folder of this name, whose steps take some seconds longer."""
        callback = {"class_path": "tests.slurm.slow.SlowUntilRequeued", "init_args": {"seconds": seconds}}
        options = {
            "accelerator": "cpu",
            "num_nodes": 2,
            "devices": 1,
            "strategy": "ddp",
            "callbacks": [callback],
        }
        options |= {
            "max_steps": MAX_STEPS,
            "val_check_interval": MAX_STEPS // 2,
            "limit_val_batches": 1,
            "log_every_n_steps": 1,
        }
        sizes = {
            "batch_size": 2,
            "eval_batch_size": 2,
            "num_workers": 1,
            "train_length": 50,
            "eval_length": 2,
        }
        overlay = {"data": {"init_args": sizes}, "trainer": options | trainer, "wandb": {"mode": "offline"}}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(overlay))
        return ["--config", CONF, "--config", str(path), "--output", str(self.folder / name)]

    def command(self, *words: str, **options) -> str:
        """Run a command with the cluster's environment from the checkout; return what it prints."""
        done = subprocess.run(
            words, cwd=ROOT, env=self.environment, capture_output=True, text=True, **options
        )
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def submit(self, *words: str) -> str:
        """Submit by scripts/slurm/submit.py and return the job's id."""
        out = self.command(sys.executable, "-m", "scripts.slurm.submit", *words)
        return out.split("Submitted batch job ")[1].split()[0]

    def state(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job: {"JobState": "RUNNING", "Restarts": "0", ...}."""
        shown = self.command("scontrol", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", shown)) | dict(re.findall(r"(StdOut)=(.*)", shown))

    def wait(self, what: str, condition, seconds: float, job: str) -> None:
        """Wait until a condition holds; fail with the job's log."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                state = self.state(job)
                log = Path(state["StdOut"]).read_text() if Path(state["StdOut"]).exists() else "no log"
                pytest.fail(f"{what} did not come within {seconds} s: {state}\n{log[-4000:]}")
            time.sleep(0.5)

    def controller_log(self) -> str:
        """What slurmctld has told so far."""
        return Path(self.environment["SLURM_CONF"]).with_name("slurmctld.log").read_text()

    def record(self, name: str) -> dict:
        """run.json of a run folder, empty while there is none."""
        path = self.folder / name / "run.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def last(self, name: str) -> dict:
        """The last checkpoint of a run folder."""
        return torch.load(self.folder / name / "checkpoints/last.ckpt", weights_only=True)


@pytest.fixture(scope="session")
def jobs(tmp_path_factory):
    with cluster() as environment:
        yield Jobs(environment, tmp_path_factory.mktemp("runs of slurm"))


@pytest.fixture(scope="session")
def unbroken(jobs):
    """The last checkpoint of a run on two nodes by srun, which nothing interrupts."""
    run = [sys.executable, "train.py", *jobs.words("unbroken")]
    jobs.command(
        "srun", "--nodes=2", "--ntasks-per-node=1", "--time=30", "--job-name=unbroken", *run, timeout=600
    )
    return jobs.last("unbroken")

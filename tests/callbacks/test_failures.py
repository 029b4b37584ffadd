"""What a run says of known failures, raised by a real training; bugs stay bugs (F19, F20)."""

import errno
import multiprocessing
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from callbacks.checkpoints import Checkpoints
from callbacks.failures import describe
from tests.faulty_data import DamagedFiles, FaultyData
from tests.tiny_run import tiny_config, write_config
from tests.tiny_training import TinyDataModule, TinyNetwork, tiny_module, tiny_trainer

ROOT = Path(__file__).parent.parent.parent


class Failing(TinyNetwork):
    """Raises an error in the forward pass of the third batch."""

    def __init__(self, error: BaseException, gradient_checkpointing: bool = False):
        super().__init__()
        self.error, self.passes = error, 0
        self.head.gradient_checkpointing = gradient_checkpointing

    def forward(self, image):
        self.passes += 1
        if self.passes == 3:
            raise self.error
        return super().forward(image)


def told(
    folder, error=None, network=None, data=None, steps: int = 5, every: int = 1, **options
) -> str | None:
    """What is said of the error of a training that saves `last` at every n-th step."""
    module = tiny_module()
    module.network = network or (Failing(error) if error else module.network)
    trainer = tiny_trainer(folder, steps, [Checkpoints(every_n_steps=every)], **options)
    with pytest.raises(BaseException) as raised:
        trainer.fit(module, datamodule=data or TinyDataModule())
    return describe(raised.value, trainer)


# --- memory


def test_out_of_memory_tells_what_the_run_needs_and_the_levers_in_order(tmp_path):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    lines = told(tmp_path, error, data=TinyDataModule(batch_size=4)).splitlines()
    assert (
        "found CUDA out of memory. Tried to allocate 2.00 GiB.; batch size 4; images of the last" in lines[0]
    )
    assert "4 x 16x16; precision 32-true" in lines[0]
    levers = ["batch_size (now 4)", "network.gradient_checkpointing", "precision: bf16-mixed", "crop_size"]
    assert [lever for lever, line in zip(levers, lines[2:], strict=False) if lever not in line] == []
    assert "accumulate_grad_batches (now 1)" in lines[2]
    last = tmp_path / "checkpoints/last.ckpt"
    assert lines[-1] == f"{last} of step 2 is valid: go on with --resume."
    assert torch.load(last)["global_step"] == 2


def test_levers_that_are_used_already_are_left_out(tmp_path):
    error = torch.OutOfMemoryError("CUDA out of memory.")
    text = told(
        tmp_path, network=Failing(error, True), data=TinyDataModule(batch_size=1), precision="bf16-mixed"
    )
    assert "batch_size" not in text and "gradient_checkpointing" not in text and "bf16-mixed (now" not in text
    assert "1. crop_size" in text and "precision bf16-mixed" in text


def test_micro_batches_come_first_where_a_method_has_them(tmp_path):
    module, trainer = tiny_module(), tiny_trainer(tmp_path, 1)
    module.micro_batches, module.automatic_optimization = 2, False
    module.network = Failing(torch.OutOfMemoryError("out of memory"))
    module.network.passes = 2
    module.training_step = lambda batch, batch_idx: module.network(batch["image"])
    with pytest.raises(torch.OutOfMemoryError) as raised:
        trainer.fit(module, datamodule=TinyDataModule())
    text = describe(raised.value, trainer)
    assert "1. model.init_args.micro_batches (now 2)" in text and "2. data.init_args.batch_size" in text
    assert "accumulate_grad_batches" not in text and "no checkpoint" in text


def test_without_host_memory_the_machine_is_named(tmp_path):
    network = Failing(RuntimeError("unused"))
    network.forward = lambda image: torch.empty(2**55)  # what no machine has
    text = told(tmp_path, network=network)
    assert (
        text.startswith("The run is out of the machine's memory") and "1. data.init_args.batch_size" in text
    )
    assert told(tmp_path / "python", MemoryError()).startswith(
        "The run is out of the machine's memory: found Mem"
    )


@pytest.mark.cuda
def test_on_cuda_the_peaks_are_told(tmp_path):
    network = Failing(RuntimeError("unused"))
    network.forward = lambda image: torch.empty(2**50, device="cuda")
    text = told(tmp_path, network=network, accelerator="gpu", devices=1)
    assert "GiB allocated" in text and "GiB reserved" in text


# --- workers


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("killed", "A data worker died: found that it is killed by signal: Killed"),
        ("memory", "MemoryError"),
        pytest.param("sleeps", "no batch in 2 seconds", marks=pytest.mark.slow),
    ],
)
def test_a_lost_worker_names_the_samples_that_were_asked_for(tmp_path, fault, found):
    pids = tmp_path / "pids"
    pids.mkdir()
    data = FaultyData(pids, fault)
    text = told(tmp_path, data=data, steps=20, every=5)
    at = data.train_dataset().at
    assert text.startswith("A data worker") and found in text and f"sample {at} (draw 22)" in text
    assert "last.ckpt of step" in text


def test_a_worker_that_dies_within_a_step_lets_the_step_end_and_is_told_of(tmp_path):
    class Killing(TinyNetwork):
        passes, ended = 0, 0

        def forward(self, image):
            self.passes += 1
            if self.passes == 3:
                (worker,) = multiprocessing.active_children()
                worker.kill()
                worker.join()
            logits = super().forward(image)
            self.ended += 1
            return logits

    network, start = Killing(), time.monotonic()
    text = told(tmp_path, network=network, data=TinyDataModule(num_workers=1), steps=20, every=100)
    assert "A data worker died: found that it is killed by signal: Killed" in text
    assert 3 <= network.ended == network.passes and f"last.ckpt of step {network.ended} is valid" in text
    assert time.monotonic() - start < 60  # and not after the 300 seconds of a hung worker


def test_shared_memory_that_is_full_is_named(tmp_path):
    full = "unable to write to file </torch_12_3_4>: No space left on device (28)"
    text = told(
        tmp_path, RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: {full}")
    )
    assert "no shared memory left" in text and "/dev/shm" in text and "num_workers (now 0)" in text


# --- disk, other processes, files


def test_a_limit_of_file_size_is_told_with_the_file_and_the_checkpoint_before(tmp_path):
    class Writing(TinyNetwork):
        passes = 0

        def forward(self, image):
            self.passes += 1
            if self.passes == 3:
                soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
                try:
                    (tmp_path / "large").write_bytes(bytes(5000))
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            return super().forward(image)

    text = told(tmp_path, network=Writing())
    assert "a file is larger than the limit" in text and "last.ckpt of step 2 is valid" in text


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota is used")]
)
def test_a_full_disk_is_told_also_as_the_reason_of_another_error(tmp_path, number, said):
    error = RuntimeError("unexpected pos 64 vs 0")
    error.__context__ = OSError(number, "No space", "/data/metrics.csv")
    assert f"{said} up" if number == errno.EDQUOT else said in told(tmp_path, error)
    assert "/data/metrics.csv" in told(tmp_path / "again", error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("received 0 items of ancdata"), OSError(errno.EMFILE, "Too many open files", "x.png")],
)
def test_the_limit_of_open_files_is_named(tmp_path, error):
    text = told(tmp_path, error)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert f"with a limit of {soft}" in text and f"ulimit -n {hard}" in text and "num_workers (now 0)" in text


def test_of_a_lost_rank_the_others_logs_are_named(tmp_path):
    text = told(
        tmp_path, torch.distributed.DistBackendError("[pair.cc:534] Connection closed by peer [::1]:5")
    )
    assert text.startswith("Another process of this run failed first: rank 0 of 1 found")
    assert "log of the other ranks" in text


def test_an_unreadable_file_is_named_with_the_option_that_skips_it(tmp_path):
    for workers in (0, 1):
        folder = tmp_path / str(workers)
        folder.mkdir()
        data = DamagedFiles(folder, range(12), unreadable="error", num_workers=workers)
        text = told(folder, data=data)
        assert text.startswith(f"{folder}/") and ".png cannot be read as an image" in text
        assert "data_faults: skip" in text and len(text.splitlines()) == 3


@pytest.mark.parametrize(
    "bug", [ValueError("a bug"), RuntimeError("shape mismatch"), KeyError("x"), OSError(2, "x")]
)
def test_a_bug_is_none_of_them(tmp_path, bug):
    assert told(tmp_path, bug) is None


# --- by the command


def alive(pid: str) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "memory", "sleeps"])
def test_a_command_whose_worker_fails_saves_tells_and_ends_with_all_its_workers(tmp_path, fault):
    pids = tmp_path / "pids"
    pids.mkdir()
    config = tiny_config()
    config["data"] = {"class_path": "tests.faulty_data.FaultyData"}
    config["data"]["init_args"] = {"folder": str(pids), "fault": fault}
    config["model"]["init_args"]["classes"] = "deliver11"
    config["trainer"] |= {"max_steps": 30, "val_check_interval": 30}
    path = write_config(tmp_path / "faulty.yaml", config)
    command = [sys.executable, "train.py", "--config", str(path), "--output", str(tmp_path / "run")]
    start = time.time()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    seconds = time.time() - float((pids / "fault").read_text())
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr.rpartition("error: ")[2] and "A data worker" in done.stderr
    assert "(draw 22)" in done.stderr and "go on with --resume" in done.stderr
    assert seconds < max(10, (time.time() - start) / 2)  # where start-up is slow, all is
    assert [file.name for file in pids.glob("[0-9]*") if alive(file.name)] == []
    assert 0 < torch.load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] < 12

"""Functions in forked processes, alone or as a group like torchrun's; networks that round smoothly."""

import multiprocessing
import os
import socket
import traceback
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn


def start(function, rank, world_size, port, errors):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
    }  # fmt: skip
    rank_zero_only.rank = rank  # Lightning read it when it was imported
    code = 0
    try:
        function()
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        errors.put(f"rank {rank}: {traceback.format_exc()}")
        code = 1
    os._exit(code)  # without the exit handlers of the parent, which are pytest's


@contextmanager
def one_thread():
    """Inside the block PyTorch computes on one thread: a pool of threads does not survive a fork."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def exit_codes(function, world_size=2, seconds=120):
    """Call the function in each process; exit codes by rank, None where one hung, and the tracebacks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    errors = context.SimpleQueue()
    processes = [
        context.Process(target=start, args=(function, rank, world_size, port, errors))
        for rank in range(world_size)
    ]
    try:
        with one_thread():
            for process in processes:
                process.start()
        for process in processes:
            process.join(seconds if process is processes[0] else 30)
        found = []
        while not errors.empty():
            found.append(errors.get())
        return [process.exitcode for process in processes], "\n".join(found)
    finally:
        for process in processes:
            process.kill()


def exit_code_of(function, seconds=60):
    """Call the function in a forked process of its own; its exit code, None where it hung."""
    process = multiprocessing.get_context("fork").Process(target=function)
    try:
        with one_thread():
            process.start()
        process.join(seconds)
        return process.exitcode
    finally:
        process.kill()
        process.join()


def in_processes(function, world_size=2, seconds=120):
    """Call the function in each process; fails with their tracebacks."""
    codes, errors = exit_codes(function, world_size, seconds)
    assert codes == [0] * world_size, f"exit codes {codes}\n{errors}"


@contextmanager
def smooth():
    """Inside the block every ReLU is a SiLU, because at a ReLU's corner rounding errors do not stay small."""
    relus = torch.Tensor.relu, nn.ReLU.forward
    torch.Tensor.relu = nn.functional.silu
    nn.ReLU.forward = lambda module, tensor: nn.functional.silu(tensor)
    try:
        yield
    finally:
        torch.Tensor.relu, nn.ReLU.forward = relus

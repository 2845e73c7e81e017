"""Runs functions of a test module in processes of their own, alone or as the ranks of a group."""

import importlib.util
import multiprocessing
import pickle
import queue
import sys
import tempfile
import time
import traceback
from pathlib import Path

# A server that has everything imported and has computed nothing yet: a fork of it costs little.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch.distributed", "layerprune.training.engine"])


def start(function, *args):
    """A process that calls a function of a test module."""
    path = sys.modules[function.__module__].__file__
    process = CONTEXT.Process(target=_call, args=(path, function.__name__, *args), daemon=True)
    process.start()
    return process


def run_ranks(function, count, *args, lost=(), seconds=240):
    """Calls ``function(rank, *args)`` on the ranks of a gloo group; returns what they return.

    Fails if one fails, or has not returned after so many seconds: a hang is a fault as well. The
    lost ones are not waited for, and None stands for what they return.
    """
    answers = CONTEXT.Queue()
    with tempfile.TemporaryDirectory() as folder:
        path = sys.modules[function.__module__].__file__
        processes = [
            CONTEXT.Process(
                target=_rank,
                args=(path, function.__name__, rank, count, str(Path(folder, "store")), answers),
                kwargs={"given": args},
                daemon=True,
            )
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        found = {}
        try:
            deadline = time.monotonic() + seconds
            while len(found) < count - len(lost):
                try:
                    rank, answer, error = answers.get(timeout=deadline - time.monotonic())
                except (queue.Empty, ValueError):
                    raise AssertionError(
                        f"of {count} ranks only {sorted(found)} have returned after {seconds} s"
                    ) from None
                assert error is None, f"rank {rank}:\n{error}"
                found[rank] = pickle.loads(answer)
        finally:
            for process in processes:
                process.join(10 if len(found) == count - len(lost) else 0)
                process.kill()
    return [found.get(rank) for rank in range(count)]


def _function(path, name):
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def _call(path, name, *args):
    import torch

    torch.set_num_threads(1)
    _function(path, name)(*args)


def _rank(path, name, rank, count, store, answers, given):
    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
        answer = _function(path, name)(rank, *given)
        dist.destroy_process_group()
        # By plain pickle: a queue hands tensors on in memory that goes with this process.
        answers.put((rank, pickle.dumps(answer), None))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
        raise

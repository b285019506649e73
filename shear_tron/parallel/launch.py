"""Start ranks on this machine and say once what went wrong: torch's elastic agent, without torchrun's commentary.

Several machines, a rendezvous, restarts: that is torchrun's job, and ``shear-tron train`` runs under it as it is.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

SAVING = 600  # seconds that ranks told to end may take to write a checkpoint


def launch(count: int, device: torch.device, function: Callable[..., int], *arguments: Any) -> int:
    """Run ``function(*arguments)`` on ``count`` ranks, which find each other as under torchrun. Returns the largest
    status that a rank returns.

    Raises RuntimeError with the message of the rank that failed first, and ValueError where there are too few GPUs.
    """
    if device.type == "cuda" and count > torch.cuda.device_count():
        raise ValueError(f"--nproc={count} ranks want a GPU each, and there are {torch.cuda.device_count()}; use fewer")
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)
    settings: dict[str, Any] = {"shutdown_timeout": SAVING}
    known = {field.name for field in fields(LaunchConfig)}  # torch 2.11 had no such setting
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"shear-tron-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGHUP",
        **{key: value for key, value in settings.items() if key in known},
    )
    # Ctrl-C reaches the ranks from the terminal; they decide what to do about it.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        returned = elastic_launch(config, _rank)(count, function, arguments)
        return max(int(status) for status in returned.values())
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message, trace = _told(failure)
        if not message:  # it said itself why
            return int(failure.exitcode)
        failed = RuntimeError(f"rank {rank} failed: {message}")
        failed.add_note(trace)
        raise failed from None
    except SignalException as asked:  # the ranks have it too, and ended in their own good order
        return 128 + int(asked.sigval)
    finally:
        signal.signal(signal.SIGINT, before)


def _rank(count: int, function: Callable[..., int], arguments: tuple[Any, ...]) -> int:
    torch.set_num_threads(min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) // count)))
    status = function(*arguments)
    if status:  # returning it would wait for the agent, which may be waiting for this process to end
        sys.exit(status)
    return status


def _told(failure: ProcessFailure) -> tuple[str, str]:
    """Of a rank that raised: what, and where in its code. ("", "") of one that ended with a status of its own."""
    told = failure.error_file_data.get("message")
    if isinstance(told, dict):
        return str(told.get("message") or ""), told.get("extraInfo", {}).get("py_callstack", "")
    return failure.message if failure.exitcode < 0 else "", ""  # a signal ended it

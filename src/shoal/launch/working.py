"""A worker's process, whoever started it: signals in, exit code out."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import threading
from typing import Any

from shoal.comm import messages as msg
from shoal.errors import ConfigError
from shoal.job import Job
from shoal.training.kit import Assignment
from shoal.training.worker import Worker

EXPELLED = 3

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 30


def work(job: Job, assignment: Assignment) -> int:
    """Run a worker to its end. SIGTERM: it leaves at the next boundary; a second one ends it at once."""
    keep_freed_memory()
    worker = Worker(job, assignment)
    if threading.current_thread() is threading.main_thread():
        _leave_on_sigterm(worker)
    try:
        summons = worker.run()
    except ConfigError as error:
        print(f"error: {error}")
        return error.exit_code
    if isinstance(summons, msg.Dismissed):
        print(f"dismissed: {summons.reason}")
        if not summons.expelled:
            return 0
        return EXPELLED if worker.took_part else 1  # who was refused would be refused again
    print(f"{summons.outcome}: {summons.reason}")
    return 1 if summons.outcome == "failed" else 0


def keep_freed_memory() -> None:
    """Have glibc keep up to 1 GiB that is free. It would give large blocks back to the kernel at once, and every step
    would wait for it to clear the same pages again: a tenth of a small model's step."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _leave_on_sigterm(worker: Worker) -> None:
    asked = threading.Event()

    def on_sigterm(*_: Any) -> None:
        if asked.is_set():
            os._exit(128 + signal.SIGTERM)
        asked.set()
        threading.Thread(target=worker.leave, daemon=True).start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_sigterm)

"""A worker's process, whoever started it: signals in, exit code out."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from shoal.comm import messages as msg
from shoal.errors import ConfigError
from shoal.job import Job
from shoal.training.kit import Assignment
from shoal.training.worker import Worker

EXPELLED = 3


def work(job: Job, assignment: Assignment) -> int:
    """Run a worker to its end. SIGTERM: it leaves at the next boundary; a second one ends it at once."""
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


def _leave_on_sigterm(worker: Worker) -> None:
    asked = threading.Event()

    def on_sigterm(*_: Any) -> None:
        if asked.is_set():
            os._exit(128 + signal.SIGTERM)
        asked.set()
        threading.Thread(target=worker.leave, daemon=True).start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_sigterm)

"""The coordinator's process: ``python -m shoal.launch.coordinate RUN_FOLDER``, started by a driver. Loads no torch."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from shoal.clock import SystemClock
from shoal.comm import messages as msg
from shoal.comm.keys import JobKey
from shoal.comm.link import Listener
from shoal.errors import ShoalError
from shoal.events import EventLog
from shoal.training.coordinator import Coordinator
from shoal.training.folder import Control, RunFolder
from shoal.training.generations import Generations
from shoal.versions.store import Store


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--replace", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    try:
        return _coordinate(options)
    except ShoalError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _coordinate(options: argparse.Namespace) -> int:
    folder = RunFolder(options.folder)
    record = folder.read_record()
    key = JobKey.read(folder.key_path)
    listener: Listener[Any] = Listener(options.host, options.port, key, msg.ToCoordinator)  # type: ignore[arg-type]
    log = EventLog(folder.events_path)
    try:
        coordinator = Coordinator(listener, Generations(Store(record["store"])), log, record, SystemClock())
        folder.write_control(Control(address=listener.address, pid=os.getpid()))
        if options.replace:
            coordinator.take_over()
        ended = coordinator.serve()
    finally:
        listener.close()
        log.close()
    return 0 if ended.outcome in ("done", "stopped") else 1


def _end_with_the_driver() -> None:
    """The driver holds the other end of standard input; when it is gone, so are we."""
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())

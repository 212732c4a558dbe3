"""``python -m shoal.launch.replica SOCKET LIFELINE``: a model's process. See ``shoal.service.replica``."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from typing import NoReturn

from shoal.launch.opening import Sources
from shoal.service.child import Child, Opener
from shoal.service.wire import Wire


def main(opener: Opener | None = None) -> NoReturn:
    """Serve the socket until it closes; ``opener``: of runs and packages, unless it is another."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are the service's, which ends this process in its own time
    end, lifeline = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    Child(Wire(end), opener or Sources()).serve()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # an interpreter with torch in it takes seconds to put in order what nobody needs


def _end_with(lifeline: int) -> NoReturn:
    os.read(lifeline, 1)
    os._exit(1)


if __name__ == "__main__":
    main()

"""Who may connect: the ZeroMQ authentication protocol (ZAP, RFC 27), answered for one key."""

from __future__ import annotations

import threading

import zmq
from zmq.utils import z85

from shoal.comm.keys import JobKey


class Doorkeeper:
    """Admit callers that hold ``key`` to every encrypted listener of ``context``, and no one else.

    One thread; ``close`` ends it. Make it before any listener of the context binds.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], key: JobKey) -> None:
        self._public = z85.decode(key.public)
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind("inproc://zeromq.zap.01")
        self._stop = context.socket(zmq.PAIR)
        self._stop.bind(f"inproc://doorkeeper-{id(self)}")
        self._stopper = context.socket(zmq.PAIR)
        self._stopper.connect(f"inproc://doorkeeper-{id(self)}")
        self._thread = threading.Thread(target=self._serve, name="shoal-doorkeeper", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stop, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._stop in ready:
                break
            self._answer(self._socket.recv_multipart())
        self._socket.close()
        self._stop.close()

    def _answer(self, frames: list[bytes]) -> None:
        """Frames: version, request id, domain, address, identity, mechanism, then the caller's public key."""
        version, request = frames[0], frames[1]
        welcome = len(frames) == 7 and frames[5] == b"CURVE" and frames[6] == self._public
        code, text = (b"200", b"OK") if welcome else (b"400", b"another job's key")
        self._socket.send_multipart([version, request, code, text, b"", b""])

    def close(self) -> None:
        if self._thread.is_alive():
            self._stopper.send(b"")
            self._thread.join()
        self._stopper.close(linger=0)

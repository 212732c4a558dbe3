"""How fast a link is: one TCP connection that is kept full for a while.

``python -m shoal.lab.measuring receive ADDRESS DURATION_S`` prints a port, and then bits of payload a second;
``python -m shoal.lab.measuring send ADDRESS PORT DURATION_S`` fills the connection.
"""

from __future__ import annotations

import socket
import sys
import time

_CONNECT_S = 3.0
_SILENT_S = 10.0
_PIECE_BYTES = 1 << 18


def receive(address: str, duration_s: float) -> None:
    """Take one connection, and print how fast bytes came in the last two thirds of it."""
    with socket.create_server((address, 0)) as listening:
        listening.settimeout(_CONNECT_S + 1)
        print(listening.getsockname()[1], flush=True)
        connection, _ = listening.accept()
    connection.settimeout(_SILENT_S)
    buffer = bytearray(_PIECE_BYTES)
    began_s = time.monotonic()
    from_s, last_s, num_bytes = began_s, began_s, 0
    with connection:
        while received := connection.recv_into(buffer):
            now_s = time.monotonic()
            if now_s > began_s + duration_s:
                break
            if now_s < began_s + duration_s / 3:
                from_s = now_s
            else:
                num_bytes += received
            last_s = now_s
    print(8 * num_bytes / max(last_s - from_s, 1e-9), flush=True)


def send(address: str, port: int, duration_s: float) -> None:
    """Fill a connection; the receiver closes it when it has seen enough."""
    piece = bytes(_PIECE_BYTES)
    with socket.create_connection((address, port), _CONNECT_S) as connection:
        connection.settimeout(_SILENT_S)
        until_s = time.monotonic() + 2 * duration_s
        try:
            while time.monotonic() < until_s:
                connection.send(piece)
        except ConnectionError:
            return


def main() -> None:
    try:
        if sys.argv[1] == "receive":
            receive(sys.argv[2], float(sys.argv[3]))
        else:
            send(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
    except OSError:
        sys.exit(1)  # who started us says what that means


if __name__ == "__main__":
    main()

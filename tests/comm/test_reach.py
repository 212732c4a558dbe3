from __future__ import annotations

import socket

from shoal.comm.reach import own_address, unreachable


def test_who_takes_no_connection_is_unreachable():
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        with socket.socket() as silent:  # has a port, which nobody else gets, and does not listen
            silent.bind(("127.0.0.1", 0))
            nobody = silent.getsockname()[1]
            assert unreachable({"a": f"{host}:{port}", "b": f"{host}:{nobody}"}, 1.0) == {"b"}


def test_with_no_one_to_reach_no_one_is_unreachable():
    assert unreachable({}, 1.0) == frozenset()


def test_the_own_address_is_the_one_that_traffic_leaves_from():
    assert own_address("127.0.0.1:1234") == "127.0.0.1"

"""The fence around the network that every test stands behind."""

from __future__ import annotations

import socket

import pytest


def test_connecting_elsewhere_fails_the_test() -> None:
    # An address of TEST-NET-1 (RFC 5737): nobody's, and refused here before a packet leaves.
    with pytest.raises(pytest.fail.Exception, match=r"tried to connect to 192\.0\.2\.1"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)


def test_connecting_to_this_machine_works() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()

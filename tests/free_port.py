"""A port that nothing listens on."""

import socket


def free_port() -> int:
    """A port of the loopback that was free a moment ago; a fixed one may be taken by a test that runs beside."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port

"""Ports of this machine, for processes that meet."""
import socket


def free_port() -> int:
    """A TCP port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]

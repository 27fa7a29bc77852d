"""Ends a process before it reaches another machine; by itself it imports nothing but the standard library."""

import os
import sys


def refuse_connections() -> None:
    """From now on a connection to another machine, and the question for its address, end this process with code 99.

    Ranks meet in C++, which Python's audit does not see: they go where torchrun's MASTER_ADDR says.
    """
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind"):
        address = arguments[1]
        if not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1", "localhost"):
            return
    elif event not in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request", "http.client.connect"):
        return
    sys.stderr.write(f"NETWORK {event} {arguments!r}\n")
    sys.stderr.flush()
    os._exit(99)

"""Which Ray cluster ``RAY_ADDRESS`` names, and whether one answers there: known before anything is computed.

Does not import Ray, which takes seconds.
"""

from __future__ import annotations

import os
import socket

_PATIENCE = 10.0  # seconds for the head to answer


def address() -> str | None:
    """Where the cluster is that ``RAY_ADDRESS`` names, or None for a private Ray on this machine.

    Raises:
        ValueError: it is the address of a client, which cannot reach this machine's files.
    """
    given = os.environ.get("RAY_ADDRESS") or "local"
    if given.startswith("ray://"):
        raise ValueError(
            f"RAY_ADDRESS={given}: a client is no part of the cluster; run the command on a node of it with "
            "RAY_ADDRESS=HOST:6379, or hand it to `ray job submit`"
        )
    return None if given == "local" else given


def check_address() -> None:
    """Ray itself waits a minute for a head that is not there, and then ends the whole process.

    Raises:
        ConnectionError: ``RAY_ADDRESS`` names HOST:PORT, and nothing answers there.
        ValueError: it is the address of a client.
    """
    given = address()
    host, colon, port = (given or "").rpartition(":")
    if not colon or not port.isdecimal():
        return  # a private Ray, "auto", or a name that Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as error:  # OverflowError: no port has so large a number
        raise ConnectionError(
            f"no Ray cluster answers at RAY_ADDRESS={given} ({error}); start one with `ray start --head`, or unset "
            "RAY_ADDRESS for a private Ray on this machine"
        ) from error


__all__ = ["address", "check_address"]

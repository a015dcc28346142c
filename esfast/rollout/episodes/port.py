"""The endpoint on a port of this machine, for agents that are programs of their own."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

from ...utils.errors import BadImport, mendable
from .app import Endpoint

HOST = "127.0.0.1"


class Port:
    """Listens on the loopback address. A request needs the key of an episode that is running (`client.api_key`).

    Raises ImportError if uvicorn is missing, OSError if the port is taken.
    """

    def __init__(self, endpoint: Endpoint, port: int):
        try:
            import uvicorn
        except ImportError:
            raise BadImport(
                "endpoint_port: a real port is served by uvicorn, which is not installed: pip install 'esfast[port]'"
            ) from None

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self):
                # Signals are the run's.
                yield

        self._endpoint, self._uvicorn, self._server = endpoint, uvicorn, Server
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((HOST, port))
        except OSError as error:
            self._socket.close()
            kind: Any = type(error)
            raise mendable(kind)(f"endpoint_port: {HOST}:{port}: {error}") from None
        self._socket.listen(1024)
        self.url = f"http://{HOST}:{self._socket.getsockname()[1]}/v1"

    async def serve(self) -> None:
        """Serves until it is cancelled."""
        config = self._uvicorn.Config(
            self._endpoint, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
        )
        server: Any = self._server(config)
        await server.serve(sockets=[self._socket.dup()])

    def close(self) -> None:
        self._socket.close()

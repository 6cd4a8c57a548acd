"""The page on 127.0.0.1, to which it sends photographs and webcam frames."""
import io
import json
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any
from urllib.parse import unquote

from training.data.images import load_image
from utils import UserError, printable

from .page import make_page
from .photos import Looker

HOST = "127.0.0.1"
# Replies stay what they are, and no other page shows this one in a frame.
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY"}
# A photograph of a telephone has 5 MB, one of a large camera 40.
_MOST_BYTES = 100_000_000


def hosts_of(port: int) -> set[str]:
    """What a browser says that it asks, where it asks the server on this port: port 80 is left out."""
    names = (HOST, "localhost")
    return {f"{name}:{port}" for name in names} | (set(names) if port == 80 else set())


class Server(ThreadingHTTPServer):
    """Serves the page of a network and adds photographs to it; they are forgotten with the server.

    Args:
        looker: What looks at them; by one thread at a time.
        name: The network's.
        photos: The photographs that are there from the start, as `Looker.look` gives them.
        port: 0 for any that is free.
    """

    daemon_threads = True

    def __init__(self, looker: Looker, name: str, photos: list[dict[str, Any]], port: int):
        self.looker, self.name, self.photos, self.lock = looker, name, photos, Lock()
        super().__init__((HOST, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any):
        """Print what went wrong in a request, but for browsers that went away in the middle of it."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def add(self, content: bytes, name: str) -> bytes:
        """What the page holds of an image file, as JSON.

        Raises:
            UserError: It cannot be read as an image.
        """
        file = io.BytesIO(content)
        file.name = name
        with self.lock:  # reading too: a photograph may take half a gigabyte
            photo = load_image(file)
            looked_at = self.looker.look(photo, name)
            self.photos.append(looked_at)
        return json.dumps(looked_at).encode()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60

    def _reply(self, status: HTTPStatus, content: bytes, kind: str):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: HTTPStatus, reason: str):
        self.close_connection = True  # a body may still be under way
        self._reply(status, json.dumps(dict(error=reason)).encode(), "application/json")

    def _is_ours(self) -> bool:
        """Whether the request is of this page: no other site may send one in the name of this machine's user."""
        hosts = hosts_of(self.server.server_port)
        origin = self.headers.get("Origin")
        return self.headers.get("Host") in hosts and (origin is None or origin.removeprefix("http://") in hosts)

    def do_GET(self):
        if not self._is_ours():
            self._refuse(HTTPStatus.FORBIDDEN, "this server is for this machine alone")
        elif self.path.partition("?")[0] != "/":
            self._refuse(HTTPStatus.NOT_FOUND, "there is one page, /")
        else:
            page = make_page(self.server.name, self.server.photos, is_served=True)
            self._reply(HTTPStatus.OK, page.encode(), "text/html; charset=utf-8")

    do_HEAD = do_GET

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if not self._is_ours():
            self._refuse(HTTPStatus.FORBIDDEN, "this server is for this machine alone")
        elif self.path != "/photos":
            self._refuse(HTTPStatus.NOT_FOUND, "photographs go to /photos")
        elif not length.isdecimal():
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "the request does not say how long it is")
        elif int(length) > _MOST_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"an image of more than {_MOST_BYTES // 10**6} MB")
        else:
            name = unquote(self.headers.get("X-Name", "photograph"))
            try:
                self._reply(HTTPStatus.CREATED, self.server.add(self.rfile.read(int(length)), name), "application/json")
            except UserError as error:
                self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))

    def log_message(self, message: str, *values: Any):
        sys.stderr.write(printable(message % values) + "\n")


def serve(looker: Looker, name: str, photos: list[dict[str, Any]], port: int):
    """Serve until Ctrl-C.

    Raises:
        UserError: The port is taken, or not allowed.
    """
    try:
        server = Server(looker, name, photos, port)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot serve on port {port}: {getattr(error, 'strerror', None) or error}") from error
    with server:
        print(f"{server.url} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(file=sys.stderr)

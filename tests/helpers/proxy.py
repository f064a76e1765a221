"""A server in front of another one, as slow and as faulty as a test wants it."""

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# Headers that belong to one connection.
_OF_THE_CONNECTION = {"connection", "transfer-encoding", "content-length", "date", "server"}


@dataclass
class Faults:
    """What goes wrong. `refuse` is asked about every request (method, path, number) for a status to answer instead."""

    delay: float = 0.0
    refuse: Callable[[str, str, int], int | None] = lambda method, path, number: None
    cut: Callable[[str, str, int], bool] = lambda method, path, number: False
    requests: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def proxy(target: str, faults: Faults) -> Iterator[str]:
    """Yield the address of a server that passes everything on to `target`, but for the faults."""
    host = urlsplit(target).netloc
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _pass_on(self) -> None:
            with lock:
                faults.requests.append((self.command, self.path))
                number = len(faults.requests)
            body = self._body()
            time.sleep(faults.delay)
            status = faults.refuse(self.command, self.path, number)
            if status is not None:
                code = "SlowDown" if status == 503 else "InvalidRequest"
                self._answer(status, [], f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())
                return
            upstream = http.client.HTTPConnection(host)
            try:
                headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
                upstream.request(self.command, self.path, body=body, headers=headers | {"Connection": "close"})
                response = upstream.getresponse()
                content = response.read()
                kept = [header for header in response.getheaders() if header[0].lower() not in _OF_THE_CONNECTION]
                length = response.getheader("Content-Length") if self.command == "HEAD" else None
                if faults.cut(self.command, self.path, number):
                    self._answer(response.status, kept, content[: len(content) // 2], length=str(len(content)))
                    self.close_connection = True
                    return
                self._answer(response.status, kept, content, length=length)
            finally:
                upstream.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

        def _body(self) -> bytes:
            if self.headers.get("Expect") == "100-continue":
                self.send_response_only(100)
                self.end_headers()
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            content = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content

        def _answer(
            self, status: int, headers: list[tuple[str, str]], content: bytes, *, length: str | None = None
        ) -> None:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            return

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Say nothing of a client that went away."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

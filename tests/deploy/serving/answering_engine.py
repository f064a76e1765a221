"""An engine of the user's own, as `relex serve --engine` takes it: it answers with what the weights say.

python answering_engine.py MODEL HOST PORT
"""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(b"here")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        query = parse_qs(urlsplit(self.path).query)
        if "named" in query:
            # As transformers serve does, for the directory that it answers from.
            content = json.dumps({"model": "directory@main", "text": "é"}).encode()
            events = b"".join(b"data: %s\r\n\r\n" % part for part in (content, b"[DONE]"))
            streams = query["named"] == ["events"]
            self.answer(events if streams else content, kind="text/event-stream" if streams else "application/json")
            return
        if "stream" in query:
            self.stream(count=int(query["stream"][0]), waits="wait" in query)
            return
        if "wait" in query:
            until_told()
        request = {"weights": WEIGHTS, "path": self.path, "headers": dict(self.headers.items()), "body": body}
        self.answer(json.dumps(request).encode(), status=int(query.get("status", ["200"])[0]))

    def answer(self, content: bytes, *, status: int = 200, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Engine", WEIGHTS)
        self.end_headers()
        self.wfile.write(content)

    def stream(self, *, count: int, waits: bool) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for number in range(count):
                self.wfile.write(f"2\r\n{number % 10}\n\r\n".encode())
                if waits:
                    until_told()
                time.sleep(0.01)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            (MODEL.parent / "gone").touch()

    def log_message(self, format: str, *args: object) -> None:
        pass


def until_told() -> None:
    while not (MODEL.parent / "go").exists():
        time.sleep(0.02)


MODEL = Path(sys.argv[1])
WEIGHTS = (MODEL / "model.safetensors").read_text()[: len("weights 1")]
if WEIGHTS == "weights 9":
    sys.exit("no memory for weights 9")
# What engines start besides: workers, in a session of their own and deaf to requests.
worker = subprocess.Popen(
    [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"],
    start_new_session=True,
)
server = ThreadingHTTPServer((sys.argv[2], int(sys.argv[3])), Handler)
threading.Thread(target=server.serve_forever).start()
os.write(1, b'serving\nINFO: 127.0.0.1 - "POST /v1/chat/completions HTTP/1.1" 200 OK\n')

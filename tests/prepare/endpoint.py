"""A server that answers like an OpenAI-compatible endpoint, or misbehaves."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# A status and a body. HANG: none until the server is closed.
Answer = tuple[int, Any]
HANG: Answer = (0, None)


@dataclass
class Endpoint:
    """A running server. requests: the bodies that it has received; keys: their Authorization headers."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    max_at_once: int = 0


def reply(text: str, finish_reason: str = "stop") -> Answer:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "stub", "choices": [choice]}


def error(status: int, message: str = "not now") -> Answer:
    return status, {"error": {"message": message, "type": "stub", "code": status}}


@contextlib.contextmanager
def serve(answer: Answer | Callable[[int], Answer]) -> Iterator[Endpoint]:
    """Serve on a free port of this machine. answer: to all requests, or a function of the number of earlier ones."""
    lock, closed, running = threading.Lock(), threading.Event(), []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(endpoint.requests)
                endpoint.requests.append(body)
                endpoint.keys.append(self.headers["Authorization"])
                running.append(number)
                endpoint.max_at_once = max(endpoint.max_at_once, len(running))
            try:
                status, content = answer(number) if callable(answer) else answer
                if (status, content) == HANG:
                    closed.wait(60)
                    self.close_connection = True
                    return
            finally:
                running.remove(number)
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if isinstance(content, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status in (429, 503):
                self.send_header("Retry-After-Ms", "1")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield endpoint
    finally:
        closed.set()
        server.shutdown()
        server.server_close()

"""Servers on this machine that hold data: an S3-compatible one, and an HTTP server with byte ranges.

Each is behind a proxy that can fail as servers and networks do. Clients only know the proxy's port.
"""

import contextlib
import functools
import http.server
import os
import re
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path


class Proxy:
    """Forwards TCP connections to a server, and fails when told to.

    Attributes:
        port: of this machine, the same after `stop` and `start`.
        cut_after: cut each connection after this number of bytes of the answer; applies to the next `num_faults`.
        status: answer with this HTTP status instead; applies to the next `num_faults` connections.
        num_faults: connections that still fail by `cut_after` or `status`.
        is_hanging: accept connections and answer nothing.
        bytes_per_s: limit of the speed of each connection; 0 is none.
        num_connections: that were accepted.
    """

    def __init__(self, target_port):
        self._target_port, self._sockets, self._listener = target_port, set(), None
        self.port = 0
        self.reset()
        self.start()

    def reset(self):
        self.cut_after = self.status = None
        self.num_faults, self.is_hanging, self.bytes_per_s, self.num_connections = 0, False, 0, 0

    def start(self):
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self.port))
        self._listener.listen(64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self):
        """Refuse new connections and cut those that are open, as a killed server does."""
        with contextlib.suppress(OSError):  # it is stopped already
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self):
        """Cut the connections that are open."""
        for opened in list(self._sockets):
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)

    def fail(self, num=1, *, status=None, cut_after=None):
        """Make the next `num` connections fail. Those that are kept open are cut."""
        self.status, self.cut_after, self.num_faults = status, cut_after, num
        self.cut()

    def _accept(self, listener):
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.num_connections += 1
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with client, contextlib.suppress(OSError), contextlib.closing(socket.socket()) as server:
            self._sockets |= {client, server}
            try:
                cut_after = None
                if self.num_faults:
                    self.num_faults -= 1
                    cut_after = self.cut_after
                    if self.status:
                        client.recv(1 << 16)
                        client.sendall(
                            f"HTTP/1.1 {self.status} Fault\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
                        )
                        return
                server.connect(("127.0.0.1", self._target_port))
                self._forward(client, server, cut_after)
            finally:
                self._sockets -= {client, server}

    def _forward(self, client, server, cut_after):
        num_sent = 0
        while True:
            if self.is_hanging:
                time.sleep(0.05)
                continue
            readable, _, _ = select.select([client, server], [], [], 0.1)
            for opened in readable:
                data = opened.recv(1 << 14)
                if not data or self.is_hanging:
                    break
                if opened is client:
                    server.sendall(data)
                    continue
                if cut_after is not None and num_sent + len(data) >= cut_after:
                    client.sendall(data[: cut_after - num_sent])
                    return
                client.sendall(data)
                num_sent += len(data)
                if self.bytes_per_s:
                    time.sleep(len(data) / self.bytes_per_s)
            else:
                continue
            if not self.is_hanging:
                return


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder as other servers do: with byte ranges, ETags, and pages that list folders."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.server.owner.status:
            self.send_error(self.server.owner.status)
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            if self.command == "GET":
                super().do_GET()
            else:
                super().do_HEAD()
            return
        size, status, first, last = path.stat().st_size, 200, 0, path.stat().st_size - 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and not self.server.owner.ignores_ranges:
            status, first, last = 206, int(asked[1]), min(last, int(asked[2] or last))
            if first >= size:
                self.send_error(416)
                return
        self.send_response(status)
        self.send_header("Content-Type", self.guess_type(str(path)))
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("ETag", f'"{size}-{path.stat().st_mtime_ns}"')
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if self.command == "GET":
            self.server.owner.requests.append((first, last - first + 1))
            with path.open("rb") as file:
                file.seek(first)
                self.wfile.write(file.read(last - first + 1))

    do_HEAD = do_GET


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """Clients that go away are expected."""


class FileServer:
    """Serves a folder by HTTP.

    Attributes:
        url: of the folder, through `proxy`.
        ignores_ranges: send whole files.
        status: answer all requests with this HTTP status.
        requests: first byte and number of bytes of each answer.
    """

    def __init__(self, folder):
        self.folder, self.ignores_ranges, self.status, self.requests = Path(folder), False, None, []
        self._server = _Server(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self._server.owner = self
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.proxy = Proxy(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.proxy.port}"

    def close(self):
        self.proxy.stop()
        self._server.shutdown()
        self._server.server_close()


class S3Server:
    """moto's server in a process of its own, behind `proxy`. env: variables by which clients find it."""

    def __init__(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert self._process.poll() is None, "moto's server ended"
            assert time.monotonic() < deadline, "moto's server does not start"
            time.sleep(0.05)
        self._port, self._num_buckets = port, 0
        self.proxy = Proxy(port)
        self.env = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def new_bucket(self):
        """The URL of a new bucket."""
        self._num_buckets += 1
        name = f"bucket-{os.getpid()}-{self._num_buckets}"
        self._client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def make_folder(self, bucket, key):
        """Put the empty object that some tools make for a folder. key: ends with a slash."""
        self._client().put_object(Bucket=bucket.removeprefix("s3://"), Key=key)

    def _client(self):
        import botocore.session

        return botocore.session.get_session().create_client(
            "s3", "us-east-1", endpoint_url=f"http://127.0.0.1:{self._port}", aws_access_key_id="key",
            aws_secret_access_key="secret",
        )  # fmt: skip

    def close(self):
        self.proxy.stop()
        self._process.kill()
        self._process.wait(20)

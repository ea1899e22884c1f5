"""An S3 server on this machine (moto, over real HTTP), and a proxy before it that fails as networks and stores do."""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BUCKET = "shards"

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIACANARY",
    "AWS_SECRET_ACCESS_KEY": "secret-canary",
    "AWS_DEFAULT_REGION": "us-east-1",
    # Else a server that is down is asked for a minute.
    "AWS_MAX_ATTEMPTS": "2",
}


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Run a server in a process of its own, with one bucket; gives its address."""
    port = _free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, process)
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("PUT", f"/{BUCKET}")
        assert connection.getresponse().status == 200
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError("the S3 server did not start")


Fault = Callable[[str, str], str | None]
"""Method and path of a request -> what happens to it: None, `refused` (503), `lost before` (the connection breaks),
`lost after` (carried out, and the answer is lost), `unconditional` (as a store that knows no conditions)"""


@contextlib.contextmanager
def faulty(server: str, fault: Fault) -> Iterator[str]:
    """Run a proxy before a server; gives its address."""
    target = server.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            happens = fault(self.command, self.path)
            if happens == "lost before":
                self.close_connection = True
                return
            if happens == "refused":
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            headers = dict(self.headers.items())
            if happens == "unconditional":
                headers = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
            connection = http.client.HTTPConnection(target)
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            if happens == "lost after":
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            # The answer to HEAD has the length of what it does not bring.
            length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
            self.send_header("Content-Length", str(length or 0))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

        def log_message(self, *arguments: Any) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
    finally:
        proxy.shutdown()
        proxy.server_close()


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables, and forget connections that were made under others."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    _forget()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        _forget()


def _forget() -> None:
    import s3fs

    from pipeline.base import folders

    s3fs.S3FileSystem.clear_instance_cache()
    folders._puts_if_absent.cache_clear()

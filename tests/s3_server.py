"""A real S3 server (moto) on loopback in a process of its own, which can be slow, fail on purpose and count.

    with s3_server(delay_seconds=0.05) as server:
        server.upload(folder, "bucket/shards")      # needs nothing of AWS in the environment
        os.environ.update(server.environment)       # from here on s3://bucket/shards can be read

The process is spawned, so a script that uses this needs `if __name__ == "__main__"`.

moto copies a whole object for each range that is read of it (0.1 s for 128 MB, run), so the process keeps what it gave
once and cuts ranges out of that; headers and errors remain moto's.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class _Counts:
    """Shared with the server's process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.ranged = context.Value("q", 0)
        self.failures = context.Value("q", 0)


class Server:
    def __init__(self, url: str, counts: _Counts) -> None:
        self.url, self._counts = url, counts

    @property
    def environment(self) -> dict[str, str]:
        """What makes the usual S3 clients talk to this server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def num_requests(self) -> int:
        """Ranged reads of shards (`.tar`) so far, failed ones included."""
        return self._counts.ranged.value

    def fail(self, count: int) -> None:
        """The next `count` ranged reads of shards are answered with status 500."""
        self._counts.failures.value = count

    def upload(self, folder: Path, place: str) -> None:
        """The files of a folder, to "bucket/prefix"."""
        self._put(place.partition("/")[0], b"")
        for path in sorted(folder.iterdir()):
            self._put(f"{place}/{path.name}", path.read_bytes())

    def _put(self, place: str, content: bytes) -> None:
        headers = {"Content-Type": "application/octet-stream"}  # otherwise it would be taken for a form
        request = urllib.request.Request(f"{self.url}/{place}", data=content, method="PUT", headers=headers)
        # moto does not check signatures, and takes a request with any for one of an account
        request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=test/20200101/us-east-1/s3/aws4_request")
        urllib.request.urlopen(request, timeout=60).close()


@contextlib.contextmanager
def s3_server(delay_seconds: float = 0.0) -> Iterator[Server]:
    """Every request is answered `delay_seconds` late."""
    context = multiprocessing.get_context("spawn")
    counts = _Counts()
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, counts, delay_seconds), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Server(ours.recv(), counts)
    finally:
        ours.close()  # the server's sign to end
        process.join(10)
        process.kill()


def _serve(pipe: Connection, counts: _Counts, delay_seconds: float) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    class Quiet(MotoRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections open
        disable_nagle_algorithm = True
        wbufsize = -1  # headers go out together

        def log_request(self, *_: object) -> None:
            pass

    application = _Application(DomainDispatcherApplication(create_backend_app), counts, delay_seconds)
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pipe.send(f"http://127.0.0.1:{server.server_port}")
    with contextlib.suppress(EOFError):
        pipe.recv()


class _Application:
    """A WSGI application around moto's."""

    def __init__(self, moto: Callable[..., Iterable[bytes]], counts: _Counts, delay_seconds: float) -> None:
        self.moto, self.counts, self.delay_seconds = moto, counts, delay_seconds
        self.objects: dict[str, tuple[str, list[tuple[str, str]], bytes]] = {}  # path -> status, headers, content

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        time.sleep(self.delay_seconds)
        path = environ["PATH_INFO"]
        wanted = RANGE.fullmatch(environ.get("HTTP_RANGE", ""))
        if environ["REQUEST_METHOD"] != "GET" or wanted is None:
            self.objects.pop(path, None)
            return self.moto(environ, start_response)
        if path.endswith(".tar"):
            with self.counts.ranged.get_lock():
                self.counts.ranged.value += 1
                fails = self.counts.failures.value > 0
                self.counts.failures.value -= fails
            if fails:
                start_response("500 Internal Server Error", [("Content-Length", "0")])
                return [b""]
        if path not in self.objects:
            self.objects[path] = self._whole(environ)
        status, headers, content = self.objects[path]
        if not status.startswith("200"):
            del self.objects[path]
            start_response(status, headers)
            return [content]
        start, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
        if start > last:
            start_response("416 Requested Range Not Satisfiable", [("Content-Length", "0")])
            return [b""]
        part = content[start : last + 1]
        headers = [(name, value) for name, value in headers if name.lower() not in ("content-length", "content-range")]
        headers += [("Content-Length", str(len(part))), ("Content-Range", f"bytes {start}-{last}/{len(content)}")]
        start_response("206 Partial Content", headers)
        return [part]

    def _whole(self, environ: dict[str, Any]) -> tuple[str, list[tuple[str, str]], bytes]:
        answers: list[tuple[str, list[tuple[str, str]]]] = []
        whole = {name: value for name, value in environ.items() if name != "HTTP_RANGE"}
        content = b"".join(self.moto(whole, lambda status, headers, _=None: answers.append((status, headers))))
        return *answers[0], content

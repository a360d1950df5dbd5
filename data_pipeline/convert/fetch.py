"""Images by URL, many at a time, from hosts that may be gone, slow or hostile.

Every fetch is bounded: in time by the timeout of each wait and a deadline over everything from the first name look-up
to the last try, in memory by a size cap that holds while the body comes in. Connection errors, 429 and 5xx are tried
again with back-off; anything else is final. The body is taken as it is sent: no content encoding is asked for or
undone, so nothing is inflated. A failure is a reason, not an exception: dead links are ordinary in web data.

At the deadline the fetch is given up from outside, because a host that drips the lines of a header never lets go of the
thread that reads them: a new thread takes its place, and the old one finds its socket shut.

Images that wait for their document are held in memory. A fetch begins only where there is room for `ROOM_BYTES` among
`MAX_BYTES_AHEAD`, or where its document is the next one; the few larger images may go beyond.

Cost (run): 209 images/s in one process from a host that takes 100 ms for each.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from queue import SimpleQueue
from types import TracebackType
from typing import Any
from urllib.parse import urljoin

NUM_THREADS = 32  # in each worker process
TIMEOUT_SECONDS = 10.0  # to connect, and for each piece of an answer
DEADLINE_SECONDS = 60.0
BACK_OFF_SECONDS = (0.5, 2.0)
MAX_REDIRECTS = 5
MAX_IMAGE_BYTES = 64 << 20  # of local images too
MAX_BYTES_AHEAD = 256 << 20  # of images whose documents are not yet written
ROOM_BYTES = MAX_BYTES_AHEAD // NUM_THREADS  # what an image counts for until its size is known
RETRIED_STATUS = (429, 500, 502, 503, 504)
HEADERS = {"User-Agent": "uvlm data convert", "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}

_of_thread = threading.local()  # .connection: what this thread waits for


class _FinalError(Exception):
    """A reason that another try would not change; never leaves this module."""


class Fetcher:
    """A few threads and their connections, for the `with` block. What has not ended by then is given up."""

    def __init__(self) -> None:
        self._connections = _connections()
        self._queue: SimpleQueue[tuple[str, Future[bytes | str]] | None] = SimpleQueue()
        self._room = threading.Condition()  # guards the next two
        self._num_bytes = 0
        self._needed: Sequence[Future[bytes | str]] = ()
        self._is_open = True
        for _ in range(NUM_THREADS):
            self._start_thread()

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_open = False
        with self._room:
            self._room.notify_all()
        for _ in range(NUM_THREADS):
            self._queue.put(None)
        self._connections.clear()

    def submit(self, url: str) -> Future[bytes | str]:
        """The image's bytes, or the reason why it cannot be had. Fetches begin in the order of these calls."""
        future: Future[bytes | str] = Future()
        self._queue.put((url, future))
        return future

    @contextlib.contextmanager
    def needed_now(self, futures: Sequence[Future[bytes | str]]) -> Iterator[None]:
        """The caller waits for these and does not need them any more at the end of the block."""
        with self._room:
            self._needed = futures
            self._room.notify_all()
        yield
        for future in futures:
            future.add_done_callback(self._release)

    def _release(self, future: Future[bytes | str]) -> None:
        result = future.result()
        self._take(-len(result) if isinstance(result, bytes) else 0)

    def _take(self, num_bytes: int) -> None:
        with self._room:
            self._num_bytes += num_bytes
            self._room.notify_all()

    def _start_thread(self) -> None:
        threading.Thread(target=self._work, daemon=True, name="fetch").start()

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            url, future = task
            with self._room:
                while self._num_bytes + ROOM_BYTES > MAX_BYTES_AHEAD and future not in self._needed and self._is_open:
                    self._room.wait()
                self._num_bytes += ROOM_BYTES
            if not self._is_open:
                return
            timer = threading.Timer(DEADLINE_SECONDS, self._give_up, (url, future, _of_thread.__dict__))
            timer.daemon = True
            timer.start()
            try:
                result = self._fetch(url)
            except Exception as error:  # a document must never wait for what will not come
                result = f"image URL failed: {type(error).__name__}: {url}"
            timer.cancel()
            is_in_time = self._settle(future, result)
            del task, future, result  # a thread that waits for work holds no image
            if not is_in_time:
                return

    def _settle(self, future: Future[bytes | str], result: bytes | str) -> bool:
        """False where the fetch has been given up before."""
        try:
            future.set_result(result)
        except InvalidStateError:
            return False
        self._take((len(result) if isinstance(result, bytes) else 0) - ROOM_BYTES)
        return True

    def _give_up(self, url: str, future: Future[bytes | str], of_thread: dict[str, Any]) -> None:
        if self._settle(future, f"image URL failed: too slow: {url}"):
            self._start_thread()
            connection = of_thread.get("connection")
            with contextlib.suppress(AttributeError, OSError):  # not connected, or not any more
                connection.sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]

    def _fetch(self, url: str) -> bytes | str:
        from urllib3.exceptions import HTTPError, LocationValueError

        deadline = time.monotonic() + DEADLINE_SECONDS
        for seconds in (*BACK_OFF_SECONDS, None):
            try:
                return self._once(url, deadline)
            except _FinalError as error:
                return f"{error}: {url}"
            except (LocationValueError, UnicodeError) as error:
                return f"image URL failed: {type(error).__name__}: {url}"
            except (HTTPError, OSError) as error:
                reason = f"image URL failed: {_status(error)}: {url}"
            if seconds is None or time.monotonic() + seconds > deadline:
                break
            time.sleep(seconds)
        return reason

    def _once(self, url: str, deadline: float) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            if not url[:8].lower().startswith(("http://", "https://")):
                raise _FinalError("image URL failed: redirected to something else than http")
            response = self._connections.request(
                "GET", url, preload_content=False, decode_content=False, redirect=False
            )
            try:
                location = response.get_redirect_location()
                if not location:
                    return self._body(response, deadline)
                url = urljoin(url, location)
                response.close()
            finally:
                response.release_conn()
        raise _FinalError("image URL failed: too many redirects")

    @staticmethod
    def _body(response: object, deadline: float) -> bytes:
        from urllib3 import HTTPResponse

        assert isinstance(response, HTTPResponse)
        if response.status in RETRIED_STATUS:
            response.close()
            raise _StatusError(response.status)
        if response.status != 200:
            response.close()
            raise _FinalError(f"image URL failed: status {response.status}")
        pieces: list[bytes] = []
        num_bytes = 0
        while piece := response.read1(1 << 16):  # what has come, so that a drip of bytes cannot outlast the deadline
            num_bytes += len(piece)
            pieces.append(piece)
            if num_bytes > MAX_IMAGE_BYTES:
                response.close()
                raise _FinalError("image is too large")
            if time.monotonic() > deadline:
                response.close()
                raise _FinalError("image URL failed: too slow")
        return b"".join(pieces)


def _connections() -> Any:
    """A PoolManager whose connections tell their thread's `_of_thread` that it waits for them."""
    import urllib3
    from urllib3.connection import HTTPConnection, HTTPSConnection

    class Connection(HTTPConnection):
        def request(self, *args: Any, **kwargs: Any) -> None:
            _of_thread.connection = self
            super().request(*args, **kwargs)

    class SecureConnection(HTTPSConnection):
        def request(self, *args: Any, **kwargs: Any) -> None:
            _of_thread.connection = self
            super().request(*args, **kwargs)

    class Pool(urllib3.HTTPConnectionPool):
        ConnectionCls = Connection

    class SecurePool(urllib3.HTTPSConnectionPool):
        ConnectionCls = SecureConnection

    timeout = urllib3.Timeout(connect=TIMEOUT_SECONDS, read=TIMEOUT_SECONDS)
    manager = urllib3.PoolManager(
        num_pools=4 * NUM_THREADS, maxsize=NUM_THREADS, headers=HEADERS, timeout=timeout, retries=False
    )
    manager.pool_classes_by_scheme = {"http": Pool, "https": SecurePool}
    return manager


class _StatusError(OSError):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")


def _status(error: Exception) -> str:
    return str(error) if isinstance(error, _StatusError) else type(error).__name__

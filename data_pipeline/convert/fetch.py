"""Images by URL, many at a time, from hosts that may be gone, slow or hostile.

Every fetch is bounded: in time by the timeout of each wait and a deadline over body, redirects and tries, in memory by
a size cap that holds while the body comes in. Connection errors, 429 and 5xx are tried again with back-off; anything
else is final. The body is taken as it is sent: no content encoding is asked for or undone, so nothing is inflated. A
failure is a reason, not an exception: dead links are ordinary in web data.

Cost (run): 209 images/s in one process from a host that takes 100 ms for each.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from urllib.parse import urljoin

NUM_THREADS = 32  # in each worker process
TIMEOUT_SECONDS = 10.0  # to connect, and for each piece of the body
DEADLINE_SECONDS = 60.0
BACK_OFF_SECONDS = (0.5, 2.0)
MAX_REDIRECTS = 5
MAX_IMAGE_BYTES = 64 << 20  # of local images too
RETRIED_STATUS = (429, 500, 502, 503, 504)
HEADERS = {"User-Agent": "uvlm data convert", "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}


class _FinalError(Exception):
    """A reason that another try would not change; never leaves this module."""


class Fetcher:
    """A few threads and their connections, for the `with` block. What has not begun when it ends is given up."""

    def __init__(self) -> None:
        import urllib3

        timeout = urllib3.Timeout(connect=TIMEOUT_SECONDS, read=TIMEOUT_SECONDS)
        self.connections = urllib3.PoolManager(
            num_pools=4 * NUM_THREADS, maxsize=NUM_THREADS, headers=HEADERS, timeout=timeout, retries=False
        )
        self.threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="fetch")

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.threads.shutdown(wait=True, cancel_futures=True)
        self.connections.clear()

    def submit(self, url: str) -> Future[bytes | str]:
        """The image's bytes, or the reason why it cannot be had."""
        return self.threads.submit(self._fetch, url)

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
            response = self.connections.request("GET", url, preload_content=False, decode_content=False, redirect=False)
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


class _StatusError(OSError):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")


def _status(error: Exception) -> str:
    return str(error) if isinstance(error, _StatusError) else type(error).__name__

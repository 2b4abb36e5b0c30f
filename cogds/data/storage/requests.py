"""Requests to servers through fsspec, with a time limit for each and with retries. The only module that imports fsspec.

Credentials and options are fsspec's own: environment variables (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`,
`FSSPEC_S3_ANON=true`, `HF_TOKEN`, ...) or `~/.config/fsspec/*.json`.
"""

import functools
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from cogds.data.storage.location import protocol
from cogds.errors import BUGS, UserError, brief

logger = logging.getLogger(__name__)

# A request that failed is repeated for this time. Servers that restart are back within a minute or two.
GIVE_UP_S = 120.0
FIRST_DELAY_S, MAX_DELAY_S = 0.5, 10.0
# Includes the transfer: a request is for a few MB, unless it says how long it may take.
REQUEST_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 15.0
WARN_INTERVAL_S = 60.0

HTTP = ("http", "https")
# Extras of cogds with the client library of a protocol.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
# Errors of client libraries that a retry does not cure, besides those of Python.
_PERMANENT = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoRegionError")
_RETRIED_STATUS = (408, 425, 429)  # of the HTTP status codes 4xx


class NoRangesError(OSError):
    """The server ignores byte ranges."""


class StatusError(OSError):
    """A server answered with an HTTP status that is an error."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP status {status}")
        self.status = status


def request(
    url: str,
    method: str,
    *arguments: Any,
    timeout_s: float = REQUEST_TIMEOUT_S,
    check: Callable[[Any], None] = lambda _: None,
    **options: Any,
) -> Any:
    """Return `method(*arguments, path, **options)` of a URL's file system; repeat it with growing delays if it fails.

    Ends within GIVE_UP_S + timeout_s if the client library is asynchronous (S3, HTTP, Google, Azure). Others have time
    limits of their own. check: raises OSError for a result that is not complete.

    Raises:
        OSError: the request failed for GIVE_UP_S. FileNotFoundError, PermissionError and other errors that a retry does
            not cure are raised at once.
        UserError: as `file_system`.
    """
    started_s, delay_s, num_attempts = time.monotonic(), FIRST_DELAY_S, 0
    while True:
        num_attempts += 1
        try:
            system, path = file_system(url)
            # fsspec's wrappers of asynchronous methods take a time limit.
            limit = {"timeout": timeout_s} if system.async_impl else {}
            result = getattr(system, method)(*arguments, path, **options, **limit)
            check(result)
            return result
        except (*BUGS, UserError):
            raise
        except Exception as raised:  # client libraries raise errors of their own: aiohttp, botocore, ...
            error = _cause(url, raised)
        reason = _describe(error, timeout_s)
        if _http_status(error) in (401, 403):
            raise PermissionError(reason) from None
        if _is_permanent(error):
            raise error if isinstance(error, OSError) else OSError(reason) from None
        waited_s = time.monotonic() - started_s
        if waited_s >= GIVE_UP_S:
            raise OSError(f"{reason} ({num_attempts} attempts in {waited_s:.0f} s)") from None
        _warn(url, reason)
        time.sleep(min(GIVE_UP_S - waited_s, delay_s * random.uniform(0.5, 1.0)))
        delay_s = min(MAX_DELAY_S, 2 * delay_s)


def _cause(url: str, error: Exception) -> Exception:
    """The error itself. fsspec reports every failure of an HTTP server to describe a file as FileNotFoundError."""
    if isinstance(error, FileNotFoundError) and protocol(url) in HTTP and isinstance(error.__cause__, Exception):
        return error.__cause__
    return error


def _describe(error: Exception, timeout_s: float) -> str:
    if isinstance(error, TimeoutError) or type(error).__name__ == "FSTimeoutError":
        return f"no answer within {timeout_s:g} s"
    return str(error) if isinstance(error, StatusError) else brief(error)


def _is_permanent(error: Exception) -> bool:
    if isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, NoRangesError)):
        return True
    status = _http_status(error)
    return (400 <= status < 500 and status not in _RETRIED_STATUS) or type(error).__name__ in _PERMANENT


def _http_status(error: BaseException | None) -> int:
    """The HTTP status code by which a server refused a request; 0 if the error tells none."""
    if error is None:
        return 0
    if isinstance(error, StatusError):
        return error.status
    response = getattr(error, "response", None)  # of botocore's ClientError, which s3fs replaces
    if isinstance(response, Mapping):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if type(error).__name__ == "HttpError":  # of gcsfs
        return int(getattr(error, "code", 0) or 0)
    return _http_status(error.__cause__ or error.__context__)


_last_warning_s = -WARN_INTERVAL_S


def _warn(url: str, reason: str) -> None:
    global _last_warning_s
    if time.monotonic() - _last_warning_s >= WARN_INTERVAL_S:
        _last_warning_s = time.monotonic()
        logger.warning(f"{url}: {reason}; trying again for up to {GIVE_UP_S:.0f} s")


# --- file systems


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    All threads of a process share one. A forked process gets its own. Raises UserError if the protocol is unknown or
    its client library is not installed.
    """
    import fsspec

    name = protocol(url)
    try:
        system_class = fsspec.get_filesystem_class(name)
    except ImportError:
        extra = _EXTRAS.get(name)
        advice = f"pip install 'cogds[{extra}]'" if extra else "pip install the fsspec library for it"
        raise UserError(f"{url}: the library that reads {name}:// is not installed. Run `{advice}`.") from None
    except ValueError as error:
        raise UserError(
            f"{url}: {error}. Use a protocol that fsspec supports, such as s3://, gs:// or https://."
        ) from None
    path = system_class._strip_protocol(url)
    if name in HTTP:
        path = path.replace("#", "%23")  # part of a file's name, not of the page
    options = tuple(sorted(system_class._get_kwargs_from_urls(url).items()))
    with _lock:
        return _make_system(name, options, os.getpid()), path


_lock = threading.Lock()


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_new_lock)  # another thread of the parent may have held it


@functools.lru_cache(maxsize=64)
def _make_system(name: str, options: tuple[tuple[str, Any], ...], process_id: int) -> Any:  # noqa: ARG001
    import fsspec

    # The user's options (fsspec's own merge would replace nested ones by ours), then ours, then those of the URL.
    system_class = fsspec.get_filesystem_class(name)
    user_options = fsspec.config.apply_config(system_class, {})
    # fsspec keeps one file system per thread otherwise, for ever.
    return system_class(**_merge(_options(name), user_options) | dict(options), skip_instance_cache=True)


def _options(name: str) -> dict[str, Any]:
    """Options of a client library: no cache of listings, no retries of its own, and short time limits."""
    if name in ("s3", "s3a"):
        limits = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": REQUEST_TIMEOUT_S / 2,
            "retries": {"total_max_attempts": 1},
        }
        return {"use_listings_cache": False, "config_kwargs": limits}
    if name in HTTP:
        import aiohttp

        client = {
            "timeout": aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S, sock_read=REQUEST_TIMEOUT_S / 2),
            "headers": {"Accept-Encoding": "identity"},  # ranges are of the file, not of a compressed copy
            "raise_for_status": _check_response,
        }
        return {"use_listings_cache": False, "client_kwargs": client}
    if name in ("gs", "gcs", "az", "abfs", "abfss", "adl"):
        return {"use_listings_cache": False}
    return {}


def _merge(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options; theirs win."""
    merged = {**ours, **theirs}
    for key in ours.keys() & theirs.keys():
        if isinstance(ours[key], Mapping) and isinstance(theirs[key], Mapping):
            merged[key] = _merge(ours[key], theirs[key])
    return merged


async def _check_response(response: Any) -> None:
    """Raise an error for an HTTP response that is not what was asked for, before its body is read."""
    if response.status == 404:
        raise FileNotFoundError(str(response.url))
    if response.status in (401, 403):
        raise PermissionError(f"the server does not allow access (HTTP status {response.status})")
    if response.status >= 400:
        raise StatusError(response.status)
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", response.request_info.headers.get("Range", ""))
    if not asked:
        return
    first, last = int(asked[1]), int(asked[2])
    if response.status == 206:
        sent = re.match(r"bytes (\d+)-(\d+)/", response.headers.get("Content-Range", ""))
        if sent and int(sent[1]) != first:
            raise OSError(f"the server sent bytes {sent[1]} to {sent[2]} instead of {first} to {last}")
    elif first or response.content_length != last + 1:
        raise NoRangesError("the server ignores byte ranges: copy the data to a server that supports them")

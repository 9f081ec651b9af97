"""The many ways in which fsspec's backends say that something is wrong, in four."""

import errno
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.retries import Sick

FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk of this machine
NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "SSOTokenLoadError",
    "UnauthorizedSSOTokenError", "DefaultCredentialsError",
}  # botocore's, and Google's  # fmt: skip
S3_REFUSES = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "AuthorizationHeaderMalformed", "400"}  # with 400
S3_HIDES = " (S3 says so of an object that is not there, too, to those who may not list its bucket)"
NO_FILE = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)  # of a path: waiting mends none of them
MAX_QUOTED = 300  # characters of somebody else's message


class Gone(Exception):
    """The store says that it has no such object."""


class NoRange(Sick):
    """The store refuses a range of bytes: perhaps it lies beyond the object's end."""


@contextmanager
def translated(url: str) -> Iterator[None]:
    try:
        yield
    except (Sick, UserError, ImportError, NotImplementedError):
        raise
    except Exception as error:  # the backends' exceptions have no other base in common
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        raise _translation(url, error) from error


def _translation(url: str, error: Exception) -> Exception:
    status, code, headers = _answer(error)
    said = f"{type(error).__name__}: {error}"[:MAX_QUOTED]
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return Gone(said)
    if status == 416:
        return NoRange(said)
    forbidden = isinstance(error, PermissionError) or status in (401, 403, 407) or str(error).startswith("Forbidden")
    if forbidden or code in S3_REFUSES or type(error).__name__ in NO_CREDENTIALS:
        return UserError(
            f"{url} may not be read or written ({said}): check the credentials, in the environment or storage_options."
            + S3_HIDES * url.startswith("s3")
        )
    wrong = isinstance(error, TypeError) or (isinstance(error, OSError) and error.errno in NO_FILE)
    if wrong or type(error) is ValueError:  # not its subclasses: JSON that a sick store sent
        return UserError(f"{url}: {said}; is the URL right, and do the storage_options fit it?")
    return Sick(said, _asked_seconds(headers.get("Retry-After") or headers.get("retry-after") or ""))


def _answer(error: Exception) -> tuple[int | None, str, Mapping[str, str]]:
    """HTTP's status, S3's word for what is wrong, and the headers, as far as the backend hands them on."""
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, Mapping):  # botocore's, under what s3fs makes of it: FileNotFoundError and so on
        about = response.get("ResponseMetadata", {})
        return about.get("HTTPStatusCode"), response["Error"].get("Code", ""), about.get("HTTPHeaders", {})
    # aiohttp's and gcsfs' exceptions carry them by these names.
    return getattr(error, "status", None) or getattr(error, "code", None), "", getattr(error, "headers", None) or {}


def _asked_seconds(asked: str) -> float:
    """HTTP's Retry-After: seconds, or a date (RFC 9110, section 10.2.3)."""
    value = asked.strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0  # absent, or nonsense

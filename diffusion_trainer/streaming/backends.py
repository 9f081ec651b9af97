"""How each of fsspec's backends is told what we want: each has its own names."""

import os
from collections.abc import Callable, Mapping
from typing import Any

EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # of our package

# To open an object for one reading from its start. http: in a single request; any size will do, but without one fsspec
# asks first, and takes a server that does not answer for one that has no such object. Others: in blocks of 8 MiB.
HTTP_STREAM: Mapping[str, int] = {"block_size": 0, "size": 1}
STREAM: Mapping[str, int] = {"block_size": 1 << 23}


def options_of(protocol: str, timeout_seconds: float, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Of the backend: what is chosen, on top of what holds for all. ImportError where it needs what is not there."""
    defaults = DEFAULTS.get(protocol, lambda seconds: {})
    return _merged({"use_listings_cache": False, **defaults(timeout_seconds)}, chosen)


def _aiohttp(seconds: float) -> dict[str, Any]:
    from aiohttp import ClientTimeout  # may not be installed

    # The default is a total of five minutes, which large shards on slow lines exceed.
    return {"timeout": ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds), "trust_env": True}


def _botocore(seconds: float) -> dict[str, Any]:
    # s3fs tries five times, which suffices: botocore's own five in each of them would be hours of silence.
    return {"connect_timeout": seconds, "read_timeout": seconds, "retries": {"max_attempts": 0}}


def _gcsfs(seconds: float) -> dict[str, Any]:
    # Else it asks by gRPC what kind of bucket it is: for half a minute of any store that is not Google's, and a process
    # that has used gRPC had better not be forked. Read when gcsfs is imported.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    session = _aiohttp(seconds)
    return {"session_kwargs": session, "requests_timeout": session["timeout"]}  # each request has one: None is for ever


DEFAULTS: Mapping[str, Callable[[float], dict[str, Any]]] = {
    **dict.fromkeys(
        ("http", "https"),
        lambda s: {"client_kwargs": {**_aiohttp(s), "headers": {"Accept-Encoding": "identity"}}},
    ),
    # One request an object. s3fs would ask for its size first and then hold ten pieces of 50 MB in memory, for each
    # thread that fetches.
    **dict.fromkeys(("s3", "s3a"), lambda s: {"config_kwargs": _botocore(s), "max_concurrency": 1}),
    **dict.fromkeys(("gs", "gcs"), _gcsfs),
}


def _merged(defaults: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen options win, inside of options that are mappings, too."""
    both = {
        key: {**defaults[key], **chosen[key]}
        for key in defaults.keys() & chosen.keys()
        if isinstance(defaults[key], Mapping)
    }
    return {**defaults, **chosen, **both}

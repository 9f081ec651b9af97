"""Where shards and the files beside them are, by name: `scheme://folder/name`, and `pipe:` commands that name a tar."""

import re
from typing import NamedTuple
from urllib.parse import urlsplit

from webdataset.shardlists import expand_urls

from diffusion_trainer.conventions import UserError

PIPE = "pipe:"
_MORE = re.compile("[?#@]")
_TAR = re.compile(r"([^\s'\"]*/)?([^\s'\"/]+\.tar)(?=['\"\s]|$)")


class Location(NamedTuple):
    """A URL in parts; joined, they are the URL again."""

    before: str  # of a command; of a URL, empty
    folder: str  # with the slash at its end
    name: str
    after: str

    def beside(self, name: str) -> str:
        """The URL of another file in the same folder."""
        return "".join(self._replace(name=name))


def expanded(pattern: str) -> list[str]:
    """What braces name, in order, as webdataset reads them; UserError for braces that do not close."""
    try:
        return expand_urls(pattern)
    except ValueError as error:
        raise UserError(f"shards: {pattern}: a brace has no partner; write for example x-{{000..099}}.tar") from error


def is_pipe(url: str) -> bool:
    return url.startswith(PIPE)


def is_url(name: str) -> bool:
    return "://" in name or is_pipe(name)


def located(url: str) -> Location:
    """UserError for what cannot name a shard."""
    if is_pipe(url):
        return _in_command(url)
    if _MORE.search(url):  # to split each of a hundred thousand takes as long as all else
        _check_secrets(url)
    folder, slash, name = url.rpartition("/")
    return Location("", folder + slash, name, "")


def _check_secrets(url: str) -> None:
    """They would stand in logs and in the damage report, and a signature that changes would change the fingerprint."""
    parts = urlsplit(url)
    if parts.scheme in ("http", "https") and (parts.query or parts.fragment or "@" in parts.netloc):
        raise UserError(
            f"{parts.scheme}://{parts.hostname}{parts.path}: a shard's URL must end with its name and hold no password "
            "or signature (?...); give these as storage_options={headers: {Authorization: ...}}"
        )


def _in_command(url: str) -> Location:
    """Of the command's last word that ends with .tar."""
    found = list(_TAR.finditer(url, len(PIPE)))
    if not found:
        raise UserError(f"{url}: the command must name the shard in a word that ends with .tar; its index is beside it")
    folder, name = found[-1].groups(default="")
    return Location(url[: found[-1].start()], folder, name, url[found[-1].end() :])

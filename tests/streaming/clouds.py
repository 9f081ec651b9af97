"""Object stores on loopback for their real clients: as much of each protocol as reading, listing and writing takes."""

import base64
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from streaming.flaky import Answer, Handler, Server, serving

BUCKET = "bucket"
PAGE = 4  # entries of a page of a listing, of a thousand


class Cloud(Handler):
    """The server's script and `always` are of downloads, by /name. script["list"] is of listings, script["write /name"]
    of uploads; always["*"] of all there is. None in a script: all is well.
    """

    def answered(self, what: str = "") -> bool:
        """Whether the script, or `always`, had an answer."""
        answer = self.server.script[what].pop(0) if self.server.script[what] else self.server.always.get("*")
        if answer is not None:
            answer(self, b"", 200)
        return answer is not None

    def entries(self, prefix: str, delimiter: str, after: str) -> tuple[list[str], str]:
        """A page of the objects that begin so, or of their beginnings up to the delimiter; where the next begins."""
        names = [name[1:] for name in self.server.files if name[1:].startswith(prefix)]
        ends = [name.find(delimiter, len(prefix)) if delimiter else -1 for name in names]
        every = {name if end < 0 else name[: end + 1] for name, end in zip(names, ends, strict=True)}
        left = sorted(name for name in every if name > after)
        return left[:PAGE], left[PAGE - 1] if len(left) > PAGE else ""

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.path).query, True).items()}


class Google(Cloud):
    """The JSON API, version 1."""

    ROOT = f"/storage/v1/b/{BUCKET}/o"
    SAYS: ClassVar = {
        401: "Invalid Credentials",
        403: "me does not have storage.objects.get access",
        503: "Backend Error",
    }

    def do_GET(self):
        name, query = unquote(urlsplit(self.path).path), self.query()
        if name == self.ROOT:
            return self.answered("list") or self._list(query)
        if self.answered():
            return None
        if name.startswith(f"/download{self.ROOT}/"):
            self.path = name.removeprefix(f"/download{self.ROOT}")
            return super().do_GET()
        key = name.removeprefix(self.ROOT)
        return self._json(200, self._about(key)) if key in self.server.files else self.fault(404)

    def do_POST(self):
        """A resumable upload: the first request names the object, the second one brings it."""
        data, name = self.body(), unquote(urlsplit(self.path).path).removeprefix("/session")
        if name == f"/upload{self.ROOT}":
            place = f"{self.server.url}/session/{quote(json.loads(data)['name'])}"
            return self.answered() or self.send(200, b"", Location=place)
        if self.answered(f"write {name}"):
            return None
        self.server.files[name] = data
        return self._json(200, self._about(name))

    def fault(self, code: int, word: str = ""):
        message = self.SAYS.get(code, "an error")
        errors = [{"domain": "global", "reason": word or "backendError", "message": message}]
        self._json(code, {"error": {"code": code, "message": message, "errors": errors}})

    def _list(self, query: dict[str, str]):
        found, after = self.entries(*(query.get(name, "") for name in ("prefix", "delimiter", "pageToken")))
        items = [self._about(f"/{name}") for name in found if f"/{name}" in self.server.files]
        prefixes = [name for name in found if f"/{name}" not in self.server.files]
        page = {"kind": "storage#objects", "items": items, "prefixes": prefixes}
        self._json(200, page | ({"nextPageToken": after} if after else {}))

    def _about(self, key: str) -> dict:
        about = {"kind": "storage#object", "name": key[1:], "bucket": BUCKET, "generation": "1"}
        return about | {"size": str(len(self.server.files[key]))}

    def _json(self, code: int, value: dict):
        self.send(code, json.dumps(value).encode(), Content_Type="application/json")


class S3(Cloud):
    """The REST API, buckets by path. What was uploaded with a CRC-32 is served with it, as S3 does."""

    SAYS: ClassVar = {
        400: ("ExpiredToken", "The provided token has expired."),
        403: ("AccessDenied", "Access Denied"),
        404: ("NoSuchKey", "The specified key does not exist."),
        416: ("InvalidRange", "The requested range is not satisfiable"),
        429: ("TooManyRequests", "Please reduce your request rate."),
        500: ("InternalError", "We encountered an internal error. Please try again."),
        503: ("SlowDown", "Please reduce your request rate."),
    }

    def do_GET(self):
        query, self.path = self.query(), self._key()
        if "list-type" in query:
            return self.answered("list") or self._list(query)
        return self.answered() or super().do_GET()

    def do_HEAD(self):
        self.path = self._key()
        return self.answered() or super().do_HEAD()

    def do_PUT(self):
        data, query, key = self.body(), self.query(), self._key()
        if self.answered(f"write {key}"):
            return None
        crc32, self.path = self.headers.get("x-amz-checksum-crc32"), ""
        if crc32 not in (None, base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()):
            return self.fault(400, "BadDigest")
        if "partNumber" in query:
            self.server.parts[key, int(query["partNumber"])] = data
        else:
            self.server.files[key], self.server.checksums[key] = data, crc32
        return self.begin(200, 0, ETag='"1"')

    def do_POST(self):
        """The begin and the end of an upload in parts."""
        asked, begins, key = self.body(), "uploads" in self.query(), self._key()
        if self.answered(f"write {key}"):
            return None
        self.path = ""
        about = f"<Bucket>{BUCKET}</Bucket><Key>{escape(key[1:])}</Key>"
        if begins:
            return self._xml(200, f"<InitiateMultipartUploadResult>{about}<UploadId>1</UploadId>", "")
        numbers = re.findall(rb"<PartNumber>(\d+)</PartNumber>", asked)
        self.server.files[key] = b"".join(self.server.parts.pop((key, int(number))) for number in numbers)
        return self._xml(200, f'<CompleteMultipartUploadResult>{about}<ETag>"1"</ETag>', "")

    def begin(self, code: int, length: int, **headers: str):
        more = {}
        if self.path in self.server.files and code < 300 and not headers:
            more = {"ETag": '"1"', "Last_Modified": "Fri, 27 Nov 2026 12:00:00 GMT", "Accept_Ranges": "bytes"}
            crc32 = self.server.checksums.get(self.path)
            if crc32 and code == 200 and self.headers.get("x-amz-checksum-mode") == "ENABLED":
                more["x_amz_checksum_crc32"] = crc32
        super().begin(code, length, **more, **headers)

    def fault(self, code: int, word: str = "", **headers: str):
        known, message = self.SAYS.get(code, ("Unknown", "an error"))
        if self.command == "HEAD":  # has no body to say why
            return self.begin(code, 0, Content_Type="application/xml", **headers)
        about = f"<Resource>{escape(self.path)}</Resource><RequestId>4442587FB7D0A2F9</RequestId><HostId>uu</HostId>"
        return self._xml(code, f"<Error><Code>{word or known}</Code><Message>{message}</Message>", about, **headers)

    def _list(self, query: dict[str, str]):
        names = ("prefix", "delimiter", "continuation-token")
        found, after = self.entries(*(query.get(name, "") for name in names))
        listed = "".join(self._listed(name) for name in found)
        token = f"<NextContinuationToken>{escape(after)}</NextContinuationToken>" if after else ""
        about = f"<Name>{BUCKET}</Name><KeyCount>{len(found)}</KeyCount><MaxKeys>{PAGE}</MaxKeys>{token}"
        about += f"<EncodingType>url</EncodingType><IsTruncated>{str(bool(after)).lower()}</IsTruncated>"
        self._xml(200, f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{about}', listed)

    def _listed(self, name: str) -> str:
        data, key = self.server.files.get(f"/{name}"), quote(name)  # the client asked for encoding-type=url
        if data is None:
            return f"<CommonPrefixes><Prefix>{key}</Prefix></CommonPrefixes>"
        about = f"<Size>{len(data)}</Size><StorageClass>STANDARD</StorageClass>"
        return f"<Contents><Key>{key}</Key><LastModified>2026-11-27T12:00:00.000Z</LastModified>{about}</Contents>"

    def _key(self) -> str:
        """The bucket's own is empty."""
        return unquote(urlsplit(self.path).path).removeprefix(f"/{BUCKET}")

    def _xml(self, code: int, begin: str, more: str, **headers: str):
        end = re.match(r"<(\w+)", begin)[1]
        text = f'<?xml version="1.0" encoding="UTF-8"?>\n{begin}{more}</{end}>'
        self.send(code, text.encode(), Content_Type="application/xml", **headers)


def says(code: int, word: str = "", **headers: str) -> Answer:
    """The store's own words for an error; `word`: not the usual one."""
    return lambda request, data, _: request.fault(code, word, **headers)


def cut(request: Handler, data: bytes, code: int):
    """No answer."""
    request.close_connection = True


@dataclass(frozen=True)
class Kind:
    """What differs between stores."""

    scheme: str
    package: str
    waits: str  # the module of its client that waits between tries
    handler: type[Cloud]
    options: Callable[[str], dict]  # storage_options for the server at a URL
    expired: Answer  # what it says to a token that was good an hour ago
    asked_when_expired: tuple[int, ...] = (1,)  # requests: gcsfs thinks that its next token may do

    def __str__(self) -> str:
        return self.scheme

    @contextmanager
    def serving(self) -> Iterator[Server]:
        with serving() as server:
            server.RequestHandlerClass = self.handler
            server.parts, server.checksums = {}, {}  # of S3: what is being uploaded, and CRC-32s
            yield server


CLOUDS = [
    Kind("gs", "gcsfs", "gcsfs.retry", Google, lambda url: {"token": "anon", "endpoint_url": url}, says(401), (6, 36)),
    Kind("s3", "s3fs", "s3fs.core", S3, lambda url: {"key": "k", "secret": "s", "endpoint_url": url}, says(400)),
]

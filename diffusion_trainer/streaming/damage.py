"""What can be wrong with data: facts about the bytes, the same on every rank, unlike a storage that is ill today."""

from typing import ClassVar, NamedTuple


class Damage(Exception):
    """A sample cannot be used; it is replaced and counted. The message says what was found."""

    kind: ClassVar[str] = "damaged"  # its name in reports


class Truncated(Damage):
    kind = "truncated"


class BadChecksum(Damage):
    kind = "checksum"


class BadArchive(Damage):
    kind = "archive"


class MissingShard(Damage):
    kind = "missing_shard"


class MissingField(Damage):
    kind = "missing_field"


class Undecodable(Damage):
    kind = "undecodable"


class WrongShape(Damage):
    kind = "wrong_shape"


class TooLarge(Damage):
    kind = "too_large"


class Refused(Damage):
    kind = "refused"


class Found(NamedTuple):
    """A damaged sample, as batches report it."""

    kind: str
    shard: str
    sample: int  # in the shard
    message: str

"""What can be wrong with data: facts about the bytes, the same on every rank, unlike a storage that is ill today."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from diffusion_trainer.conventions import UserError, plain


class Damage(Exception):
    """A sample cannot be used; it is replaced and counted. The message says what was found."""

    kind: ClassVar[str] = "damaged"  # its name in reports

    def __str__(self) -> str:
        return plain(super().__str__())


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


class Hopeless(UserError):
    """So much is damaged that nothing can be read. `found` is what the message tells the end of."""

    def __init__(self, message: str, found: Sequence[Found]):
        super().__init__(message)
        self.found = found

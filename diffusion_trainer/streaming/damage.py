"""What can be wrong with data: facts about the bytes, the same on every rank, unlike a storage that is ill today."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from diffusion_trainer.conventions import UserError, plain

LONGEST = 1000  # characters of a message


class Damage(Exception):
    """A sample cannot be used; it is replaced and counted. The message says what was found."""

    kind: ClassVar[str] = "damaged"  # its name in reports

    def __str__(self) -> str:
        text = super().__str__()  # which may hold names of a stranger's, and goes into logs, tables and checkpoints
        return plain(text if len(text) <= LONGEST else f"{text[:LONGEST]} ...")


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

"""The output of shell commands, `pipe:` URLs, as webdataset opens them."""

import select
from collections.abc import Iterator
from typing import Any

from webdataset.gopen import gopen_pipe

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.retries import Sick

CHUNK = 1 << 16


def output(url: str, timeout_seconds: float) -> Iterator[bytes]:
    """What the command writes, piece by piece; Sick if it fails or is silent for so long.

    It is killed where no more is wanted.
    """
    try:
        pipe = gopen_pipe(url, bufsize=0)  # no buffer, which `poll` could not see
    except ValueError as error:  # WDS_SECURE is set
        raise UserError(f"{url}: webdataset refuses it ({error})") from error
    try:
        yield from _pieces(pipe.stream, timeout_seconds)
    except BaseException:
        pipe.proc.kill()
        raise
    finally:
        pipe.stream.close()
        code = pipe.proc.wait()
    if code:
        raise Sick(f"the command failed with exit code {code}")


def _pieces(stream: Any, timeout_seconds: float) -> Iterator[bytes]:
    waiting = select.poll()  # `select` knows no descriptors above 1023
    waiting.register(stream, select.POLLIN)
    while True:
        if not waiting.poll(1000 * timeout_seconds):
            raise Sick(f"the command was silent for {timeout_seconds} s")
        if not (data := stream.read(CHUNK)):
            return
        yield data

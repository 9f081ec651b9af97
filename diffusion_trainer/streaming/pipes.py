"""The output of shell commands, `pipe:` URLs."""

import os
import select
import signal
from collections.abc import Iterator
from subprocess import PIPE, Popen
from typing import Any

from webdataset import utils

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.retries import Sick
from diffusion_trainer.streaming.urls import PIPE as SCHEME

CHUNK = 1 << 16


def output(url: str, timeout_seconds: float) -> Iterator[bytes]:
    """What the command writes, piece by piece; Sick if it fails or is silent for so long.

    It is killed where no more is wanted, with all that it has started.
    """
    if utils.enforce_security:
        raise UserError(f"{url}: WDS_SECURE is set in the environment, which forbids commands")
    command = url.removeprefix(SCHEME)
    # No buffer, which `poll` could not see; a session of its own, or the shell alone would be killed.
    process = Popen(command, shell=True, stdout=PIPE, bufsize=0, start_new_session=True)
    try:
        yield from _pieces(process.stdout, timeout_seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        process.stdout.close()
        code = process.wait()
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

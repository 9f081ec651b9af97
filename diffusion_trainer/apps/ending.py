"""How a process ends whose libraries have threads of their own."""

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

from diffusion_trainer.callbacks.redaction import redacted


def run_to_the_end(main: Callable[[], int]) -> None:
    """Ends the process with main's exit code (1 after an exception) as usual, except that Python is not taken apart.

    An exception is shown without secrets: logs are files. Threads are joined, atexit functions run, files flushed. What
    is left out is the finalisation of the interpreter, in which threads of gloo and DeepSpeed abort a process now and
    then ("terminate called without an active exception") whose work is done and saved. Call it before other modules
    register with atexit, so that this comes last of all.
    """
    code = 1

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # the terminal is gone, or whoever read the pipe: the exit code is still to be told
                stream.flush()
        os._exit(code)

    atexit.register(leave)
    try:
        code = main()
    except Exception as error:  # noqa: BLE001 (the last one who could show it: not a hook of a library's, with secrets)
        print(redacted("".join(traceback.format_exception(error))), end="", file=sys.stderr)

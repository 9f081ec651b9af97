"""How a process ends whose libraries have threads of their own."""

import atexit
import os
import sys
from collections.abc import Callable


def run_to_the_end(main: Callable[[], int]) -> None:
    """Ends the process with main's exit code (1 after an exception) as usual, except that Python is not taken apart.

    Threads are joined, atexit functions run, files flushed. What is left out is the finalisation of the interpreter, in
    which threads of gloo and DeepSpeed abort a process now and then ("terminate called without an active exception")
    whose work is done and saved. Call it before other modules register with atexit, so that this comes last of all.
    """
    code = 1

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)
    code = main()

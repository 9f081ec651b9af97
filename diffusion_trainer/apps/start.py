"""`python -m diffusion_trainer.apps.start <folder>`: one rank of a run, from its first instruction on."""

import signal

from diffusion_trainer.apps.ending import run_to_the_end


def accept_interrupt() -> None:
    """First thing in a process that `processes.spawn` has started: SIGINT, blocked until now, ends it.

    Until training has something to save, a stop is just the end: no traceback from the middle of an import.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def main() -> int:
    accept_interrupt()
    from diffusion_trainer.apps import rank

    return rank.main()


if __name__ == "__main__":
    run_to_the_end(main)

"""How the doctor's processes find each other, and which of them do not."""

import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

from torch import distributed
from torch.distributed import PrefixStore, Store, TCPStore

from diffusion_trainer.apps.processes import World
from diffusion_trainer.training.agreement import Agreement

POLL_SECONDS = 0.1  # the store's own waiting writes pages of C++ to the log where it fails
ALL, SOME = "all are here", "some are missing"  # what rank 0 tells the others


class Absent(Exception):
    """Some processes did not come, or went away; without a message where another process has one."""


def node_name() -> str:
    """SLURM's name of this node, or the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def meeting(world: World, wait_seconds: float, timeout_seconds: float) -> Agreement:
    """All ranks, talking over gloo; this process alone where it is the only one. Absent says which ranks did not come
    within `wait_seconds` that rank 0 waits for them; they wait for it twice as long, as it may come last.
    timeout_seconds: of each collective.
    """
    if world.size == 1:
        return Agreement()
    end = time.monotonic() + 2 * wait_seconds
    store = _store(world, wait_seconds, end)
    names = [f"rank {rank}" for rank in range(world.size)]
    store.set(names[world.rank], node_name())
    try:
        if world.rank == 0:
            _count(store, names, wait_seconds)
        elif _first(store, [ALL, SOME], end) != ALL:
            raise Absent
    except RuntimeError as error:
        raise Absent(f"rank {world.rank} on {node_name()} has lost rank 0 ({_line(error)})") from error
    timeout, groups = timedelta(seconds=timeout_seconds), PrefixStore("groups", store)
    distributed.init_process_group("gloo", store=groups, rank=world.rank, world_size=world.size, timeout=timeout)
    # Not destroyed: a thread may still wait in it for a process that hangs. The end of the process ends it.
    return Agreement(int(timeout_seconds))


def _count(store: Store, names: Sequence[str], wait_seconds: float) -> None:
    """Rank 0's part: waits for the others and tells them whether all have come; Absent if not."""
    end = time.monotonic() + wait_seconds
    missing = [name for name in names if not _first(store, [name], end)]
    store.set(SOME if missing else ALL, "")
    if missing:
        came = sorted({store.get(name).decode() for name in names if name not in missing})
        time.sleep(10 * POLL_SECONDS)  # the others look into the store, which ends with this process
        raise Absent(
            f"{len(missing)} of {len(names)} processes did not come within {wait_seconds:.0f} s: "
            f"{', '.join(missing[:16])}; those that came are on {', '.join(came)}. See in the log what the missing "
            "ones said; if nothing, leave their node out (--exclude=<node>)"
        )


def _first(store: Store, keys: Sequence[str], end: float) -> str | None:
    """The first of the keys that is set; None if none is by then."""
    while True:
        for key in keys:
            if store.check([key]):
                return key
        if time.monotonic() > end:
            return None
        time.sleep(POLL_SECONDS)


def _store(world: World, wait_seconds: float, end: float) -> Store:
    """Rank 0's, which waits for nobody: only so can be told who is missing. torchrun's agent has one already."""
    environment = world.environment()
    address, port = environment.main_address, environment.main_port
    hosts = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if not hosts:
            _knock(address, port, end)
        wait = timedelta(seconds=wait_seconds)
        store = TCPStore(address, port, world.size, hosts, wait, wait_for_workers=False, multi_tenant=True)
    except (OSError, RuntimeError) as error:
        raise Absent(
            f"rank {world.rank} on {node_name()} cannot reach rank 0 at {address}:{port} ({_line(error)}); see whether "
            f"{address} is the node of rank 0 (MASTER_ADDR), whether that has begun, and whether a firewall is between"
        ) from error
    return PrefixStore(f"doctor {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _knock(address: str, port: int, end: float) -> None:
    """Returns once somebody listens there; OSError if nobody does by then."""
    while True:
        try:
            socket.create_connection((address, port), timeout=max(1.0, end - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(POLL_SECONDS)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

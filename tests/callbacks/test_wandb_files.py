"""What the server has of a run is told from its records, however its sessions began and ended."""

import json
import os
import random
import zlib
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from diffusion_trainer.callbacks.wandb_files import WHOLE, leave_out, points, received, records


def session(folder: Path, rows: list[dict], start: int | None, n: int) -> Path:
    """The record of the n-th session of a run, as wandb-core writes it; start: what it was told by the server."""
    offline = "" if start is not None else "offline-"
    path = folder / "wandb" / f"{offline}run-20261127_{n:06d}-id" / "run-id.wandb"
    path.parent.mkdir(parents=True)
    data = b":W&B" + bytes(3)
    for row in rows:
        record = Record()
        for key, value in row.items():
            for inner, part in value.items() if isinstance(value, dict) else [(None, value)]:
                item = record.history.item.add()
                item.nested_key.extend([key, inner] if inner else [key])
                item.value_json = json.dumps(part)
        body = record.SerializeToString()
        head = zlib.crc32(bytes([WHOLE]) + body).to_bytes(4, "little") + len(body).to_bytes(2, "little")
        data += head + bytes([WHOLE]) + body
    path.write_bytes(data)
    if start is not None:
        asked(path, start, n)
    return path


def asked(path: Path, start: int, at: int) -> None:
    """The service has begun to send a record, at a time and at a row of the server's."""
    state = path.with_name(f"{path.name}.syncstate")
    state.write_text(json.dumps({"starting_step": start}))
    os.utime(state, (at, at))


@pytest.mark.parametrize("seed", range(30))
def test_the_servers_rows_are_told_from_the_records_alone(tmp_path, seed):
    """Online sessions of which only the first rows arrive, offline ones, and some of those sent by `wandb sync`."""
    chance, server, told, offline = random.Random(seed), [], 0, []
    for n in range(8):
        rows = [{"images_seen": told + i, "loss": 0.5} for i in range(chance.randint(0, 5))]
        told += len(rows)
        online = chance.random() < 0.5
        path = session(tmp_path, rows, len(server) if online else None, n)
        if not online:
            offline.append((path, rows))
            if chance.random() < 0.5:
                continue
            path, rows = offline.pop(chance.randrange(len(offline)))
            asked(path, len(server), n)
        server += rows[: chance.randint(0, len(rows))]
        expected = {(row["images_seen"], "loss") for row in server}
        assert received(tmp_path, len(server)) == (expected, len(server))
    assert len(points(tmp_path)) == told


def test_the_first_row_that_no_record_has_is_told(tmp_path):
    """The record of the second session lacks its last row, which has arrived: it is none of what the first had."""
    session(tmp_path, [{"images_seen": at, "loss": 0.5} for at in (1, 2, 3)], 0, 0)
    session(tmp_path, [{"images_seen": 4, "loss": 0.5}], 1, 1)
    assert received(tmp_path, 3) == ({(1, "loss"), (4, "loss")}, 2)


def test_an_answer_that_a_kill_cut_off_is_none(tmp_path):
    path = session(tmp_path, [{"images_seen": 1, "loss": 0.5}], 0, 0)
    path.with_name(f"{path.name}.syncstate").write_text("")
    assert received(tmp_path, 1) == (set(), 0)
    assert points(tmp_path) == {(1, "loss")}


def test_sessions_are_in_the_order_of_their_starts_and_one_that_was_left_out_is_marked_for_wandb(tmp_path):
    paths = [session(tmp_path, [], start, n) for n, start in enumerate((None, 0, None))]
    assert records(tmp_path) == paths
    leave_out(paths[:1])
    assert [path.with_name("run-id.wandb.synced").exists() for path in paths] == [True, False, False]

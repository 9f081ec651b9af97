"""The group that an offline record of Weights & Biases says."""

import struct
from pathlib import Path

from wandb.proto import wandb_internal_pb2


def group_of(path: Path) -> str:
    """Of the run that an offline file of Weights & Biases records: LevelDB's log format, the first records."""
    data, position = path.read_bytes(), 7
    while True:
        _, length, _ = struct.unpack("<IHB", data[position : position + 7])
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data[position + 7 : position + 7 + length])
        if record.WhichOneof("record_type") == "run":
            return record.run.run_group
        position += 7 + length

"""Whatever has happened to a checkpoint's files, it is not loaded: the file is named, and a run goes on from the one
before.
"""

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from cases import each
from saved import content, read, same, save, save_by_two, trained

from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.training import checkpoints, resuming
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoint_files import DamagedCheckpoint, read_back, sealed
from diffusion_trainer.training.checkpoints import Checkpoint
from diffusion_trainer.training.rollbacks import before

OLD, NEW = "images-000000000064", "images-000000000128"
FILES = ["rank-00000.safetensors", "rank-00001.safetensors", "manifest.json"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two checkpoints of two ranks, and one at the same images of another run."""
    folder = tmp_path_factory.mktemp("written")
    for images in (64, 128):
        assert save_by_two(folder / "run", images) == [None, None]
    assert save_by_two(folder / "other", 128, seed=5) == [None, None]
    return folder


@pytest.fixture
def root(written, tmp_path):
    return shutil.copytree(written / "run", tmp_path / "run")


def check_refused(root, name):
    """The newest is not loaded, its file `name` is said to be why, and the one before is what a run goes on from."""
    with pytest.raises(DamagedCheckpoint, match=f"{NEW}/{name}") as caught:
        read(Checkpoint(root / NEW))
    assert isinstance(caught.value, UserError)
    found = resuming.resumable(root, Agreement())
    assert found.checkpoint.folder.name == OLD
    assert [p.name for p in found.damaged] == [NEW]
    assert f"{NEW}/{name}" in found.damage[0]
    assert same(read(found.checkpoint), content(trained(64)))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\n")


def empty(path):
    path.write_bytes(b"")


def replace_by_zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def delete(path):
    path.unlink()


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = [truncate, empty, replace_by_zeros, delete, replace_by_folder]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_cut_emptied_or_gone(root, name, damage):
    damage(root / NEW / name)
    check_refused(root, name)


@pytest.mark.parametrize("name", FILES[:2])
def test_a_file_that_has_grown(root, name):
    lengthen(root / NEW / name)
    check_refused(root, name)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere(root, name):
    path = root / NEW / name
    whole = path.read_bytes()
    for at in range(0, len(whole), 5):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        try:
            found = read(Checkpoint(root / NEW))
        except UserError as error:
            assert name in str(error)  # noqa: PT017 (a flipped digit of the format is another version)
        else:  # white space of the manifest that became other white space: nothing has changed
            assert json.loads(data) == json.loads(whole)
            assert same(found, content(trained(128)))


def test_files_that_changed_places_between_ranks(root):
    a, b = (root / NEW / name for name in FILES[:2])
    a.rename(root / "kept")
    b.rename(a)
    (root / "kept").rename(b)
    assert a.stat().st_size == b.stat().st_size
    check_refused(root, "rank-0000")


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_run(written, root, name):
    """Of the same size, as all of its files are."""
    shutil.copy(written / "other" / NEW / name, root / NEW / name)
    check_refused(root, "rank-0000" if name == "manifest.json" else name)


def test_a_manifest_cut_anywhere(root):
    path = root / NEW / "manifest.json"
    whole = path.read_bytes()
    for at in range(0, len(whole) - 2, 11):
        path.write_bytes(whole[:at])
        with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
            Checkpoint(root / NEW)
    check_refused(root, "manifest.json")


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "[" * 100_000, '{"a":' * 100_000, "9" * 10_000, "\ufeff{}"])
def test_a_manifest_that_is_none(root, text):
    (root / NEW / "manifest.json").write_text(text)
    if text in ("null", "[]"):
        check_refused(root, "manifest.json")
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
        Checkpoint(root / NEW)


HOSTILE = [
    ("images_seen", [float("nan"), float("inf"), -1, 1.5, True, "128", None, 10**30, [128]]),
    ("optimizer_steps", [float("nan"), float("inf"), -1, "1", None, True]),
    ("parameters", [[], {"weight": [-1, 3]}, {"weight": [2.0, 3]}, {"weight": "23"}, {"weight": [10**9] * 4}, None]),
    ("parameters", [{"weight": [2, 3], "bias": [10**9]}, {"weight": [3, 3], "bias": [2]}, {"weight": [2, 3]}]),
    ("files", [{"rank-00000.safetensors": {"size": n, "crc32": 1}} for n in (float("inf"), float("nan"), -1, 1.5)]),
    ("files", [[], {}, None, {"rank-00000.safetensors": 5}, {"rank-00000.safetensors": {"size": "x", "crc32": 1}}]),
    ("state", [[], None, "x"]),
]


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in HOSTILE for value in values])
def test_a_manifest_with_the_right_checksum_and_wrong_values(root, key, value):
    manifest = opened(root / NEW)
    (root / NEW / "manifest.json").write_text(sealed({**manifest, key: value}))
    with pytest.raises(DamagedCheckpoint, match=NEW):
        read(Checkpoint(root / NEW))
    assert resuming.resumable(root, Agreement()).checkpoint.folder.name == OLD


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/hostname", "rank-00000.safetensors/../x", "latest", ""]
)
def test_a_manifest_that_names_a_file_elsewhere(root, name):
    shutil.copy(root / NEW / FILES[0], root / "secret.safetensors")
    manifest = opened(root / NEW)
    manifest["files"][name] = manifest["files"].pop(FILES[0])
    (root / NEW / "manifest.json").write_text(sealed(manifest))
    with pytest.raises(DamagedCheckpoint, match="none of a checkpoint"):
        Checkpoint(root / NEW)


def opened(folder) -> dict:
    return {k: v for k, v in json.loads((folder / "manifest.json").read_text()).items() if k != "crc32"}


def tensors(entries: dict | bytes, numbers: bytes = bytes(96)) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def run(first: int, last: int, shape=None) -> dict:
    return {"dtype": "F32", "shape": shape or [last - first], "data_offsets": [4 * first, 4 * last]}


HEADERS = {
    "none": b"",
    "longer than the file": (1 << 62).to_bytes(8, "little") + b"{}",
    "a hundred megabytes": (100_000_001).to_bytes(8, "little") + b"{}",
    "no JSON": tensors(b"\x80\x04\x95 a pickle"),
    "nested": tensors(b"[" * 100_000),
    "numbers beyond the end": tensors({"weight/weight/0": run(0, 6), "weight/bias/0": run(6, 10**9)}),
    "numbers twice": tensors({"weight/weight/0": run(0, 6), "weight/bias/0": run(0, 2)}),
    "another kind of number": tensors({"weight/weight/0": {**run(0, 6), "dtype": "os.system"}}),
    "no run's name": tensors({"weight/weight/0": run(0, 6), "weight/bias/0": run(6, 8), "x": run(8, 24)}),
    "no first element": tensors({"weight/weight/-1": run(0, 6), "weight/bias/0": run(6, 24)}),
    "unknown parameter": tensors({"weight/weight/0": run(0, 6), "weight/bias/0": run(6, 8), "weight/x/0": run(8, 24)}),
    "a matrix": tensors({"weight/weight/0": run(0, 6, [2, 3]), "weight/bias/0": run(6, 24)}),
    "a gap": tensors({"weight/weight/0": run(0, 6), "weight/bias/0": run(6, 8), "ema/bias/1": run(8, 9)}, bytes(36)),
    "elements twice": tensors(
        {"weight/weight/0": run(0, 6), "weight/weight/3": run(6, 9), "weight/bias/0": run(9, 11)}, bytes(44)
    ),
    "too many elements": tensors({"weight/weight/0": run(0, 22), "weight/bias/0": run(22, 24)}),
    "a parameter missing": tensors({"weight/weight/0": run(0, 6), "ema/bias/0": run(6, 8)}, bytes(32)),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_file_of_tensors_with_the_right_checksum_that_is_hostile(root, what):
    path = root / NEW / FILES[0]
    path.write_bytes(HEADERS[what])
    manifest = {**opened(root / NEW), "files": {FILES[0]: read_back(path)._asdict()}}
    (root / NEW / "manifest.json").write_text(sealed(manifest))
    with pytest.raises(DamagedCheckpoint, match=NEW):
        read(Checkpoint(root / NEW))
    assert resuming.resumable(root, Agreement()).checkpoint.folder.name == OLD


def test_what_would_be_right_is_taken(root):
    """The same way of writing, without a fault: it is the fault that is refused."""
    path = root / NEW / FILES[0]
    path.write_bytes(tensors({"weight/weight/0": run(0, 6), "weight/bias/0": run(6, 8)}, bytes(32)))
    manifest = {**opened(root / NEW), "files": {FILES[0]: read_back(path)._asdict()}}
    (root / NEW / "manifest.json").write_text(sealed(manifest))
    assert same(read(Checkpoint(root / NEW)), {"weight/weight": torch.zeros(2, 3), "weight/bias": torch.zeros(2)})


def test_only_the_files_that_are_read_are_checked_and_each_once(root, monkeypatch):
    """Of two ranks each reads its own file: the first elements of a parameter are in the first."""
    (root / NEW / FILES[1]).write_bytes(bytes((root / NEW / FILES[1]).stat().st_size - 8) + b"damaged!")
    shutil.copy(root / OLD / FILES[1], root / NEW / FILES[1])
    looked = []
    monkeypatch.setattr(checkpoints, "read_back", lambda path: looked.append(path.name) or read_back(path))
    checkpoint = Checkpoint(root / NEW)
    for _ in range(2):
        assert torch.equal(
            checkpoint.read("weight", "weight", 0, 3), content(trained(128))["weight/weight"].view(-1)[:3]
        )
    assert looked == [FILES[0]]
    with pytest.raises(DamagedCheckpoint, match=FILES[1]):
        checkpoint.read("weight", "weight", 2, 2)


def test_none_is_whole(root):
    for name in (OLD, NEW):
        truncate(root / name / FILES[1])
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole") as caught:
        resuming.resumable(root, Agreement())
    assert all(f"{name}/{FILES[1]}" in str(caught.value) for name in (OLD, NEW))


def test_one_of_another_version_is_no_damage(root):
    (root / NEW / "manifest.json").write_text(sealed({**opened(root / NEW), "format": 1}))
    with pytest.raises(UserError, match="format 1; this version reads 2") as caught:
        resuming.resumable(root, Agreement())
    assert not isinstance(caught.value, DamagedCheckpoint)


class Hears(Agreement):
    """One rank, that hears from the others what `said` says."""

    def __init__(self, rank, said):
        self.rank, self.world, self.said = rank, 2, list(said)

    def gather(self, value):
        other = self.said.pop(0)
        other = value if other is SAME else other
        return [value, other] if self.rank == 0 else [other, value]


SAME = object()
SEARCHES = {"a start": resuming.resumable, "a rollback": lambda root, agreement: before(root, 128, agreement)}


@each("search", SEARCHES)
@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_looks_at_its_share_and_all_go_back_if_one_finds_damage(root, rank, search, monkeypatch):
    looked = []
    monkeypatch.setattr(checkpoints, "read_back", lambda path: looked.append(path.name) or read_back(path))
    damaged = resuming.Problem("the other's file is damaged", passing=False)
    found = search(root, Hears(rank, [SAME, damaged, None]))
    assert found.checkpoint.folder.name == OLD
    assert found.damage == ["the other's file is damaged"]
    assert looked == [FILES[rank]] * 2
    assert same(read(found.checkpoint), content(trained(64)))
    assert looked == [FILES[rank]] * 2  # what the others have looked at is not looked at again


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EACCES, errno.ESHUTDOWN])
@pytest.mark.parametrize("where", ["read_back", "safe_open", "read_manifest"])
def test_a_file_that_cannot_be_read_now_is_no_damage(root, where, number, monkeypatch):
    """Nothing is put aside for it: the next start may find the checkpoint whole."""

    def stale(*arguments, **options):
        raise OSError(number, os.strerror(number))

    if where == "read_manifest":
        monkeypatch.setattr(Path, "read_bytes", stale)
    else:
        monkeypatch.setattr(checkpoints, where, stale)
    with pytest.raises(PassingError, match=rf"{NEW}/\S+ cannot be read now: .*{os.strerror(number)}.*Try again"):
        resuming.resumable(root, Agreement())


def test_a_lack_of_memory_is_no_damage(root):
    """With room for no more than this process has, the files cannot be mapped."""
    limits, used = resource.getrlimit(resource.RLIMIT_AS), psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 12), limits[1]))
    try:
        with pytest.raises(PassingError, match=r"cannot be read now: .*memory"):
            resuming.resumable(root, Agreement())
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_a_sector_that_cannot_be_read_is_damage(root, monkeypatch):
    def broken(path):
        if NEW in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return read_back(path)

    monkeypatch.setattr(checkpoints, "read_back", broken)
    assert resuming.resumable(root, Agreement()).checkpoint.folder.name == OLD


@each("search", SEARCHES)
def test_all_ranks_start_again_if_one_cannot_read_now(root, search):
    with pytest.raises(PassingError, match="of the other"):
        search(root, Hears(0, [SAME, resuming.Problem("of the other", passing=True)]))


@each("search", SEARCHES)
def test_ranks_that_see_different_checkpoints_wait_until_they_see_the_same(root, search, monkeypatch):
    """A network file system shows a rank an old list for a while."""
    slept = []
    monkeypatch.setattr(resuming, "sleep", slept.append)
    assert search(root, Hears(0, [[OLD], [OLD], SAME, None])).checkpoint.folder.name == NEW
    assert slept == [1, 1]
    with pytest.raises(PassingError, match=r"for 60 s ranks have seen different checkpoints in .*start the run again"):
        search(root, Hears(0, [[OLD]] * 60))


def test_one_put_aside_counts_as_none(root):
    kept = resuming.put_aside(root / NEW)
    assert kept.name == f"aside-{NEW}"
    assert checkpoints.latest(root).name == OLD
    assert resuming.resumable(root, Agreement()).damage == []
    save(root, 128)
    assert resuming.put_aside(root / NEW).name == f"aside-{NEW}-again"
    save(root, 192, keep=1)
    assert sorted(p.name for p in root.glob("*images*")) == [
        f"aside-{NEW}",
        f"aside-{NEW}-again",
        "images-000000000192",
    ]

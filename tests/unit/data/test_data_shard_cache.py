import fcntl
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from http_server import served

from vitscale.config.remote import RemoteSection
from vitscale.data import shard_cache as cache_module
from vitscale.data.remote import RemoteShards
from vitscale.data.shard_cache import LOCK_FILE, OWN_FOLDER, UNFINISHED, CachedShards
from vitscale.data.shards import LocalShards
from vitscale.errors import ShardError

SIZE = 50_000
NAMES = tuple(f"train-{number:06d}.tar" for number in range(4))


@pytest.fixture
def content() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    return {name: random.bytes(SIZE) for name in NAMES}


@pytest.fixture
def origin(tmp_path: Path, content) -> LocalShards:
    folder = tmp_path / "origin"
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return LocalShards(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(cache_module, "PART_BYTES", 7_000)


def copies(folder: Path) -> dict[str, Path]:
    """The copies by the names of their shards."""
    found = sorted((folder / OWN_FOLDER).iterdir()) if (folder / OWN_FOLDER).exists() else []
    return {path.name.partition("-")[2]: path for path in found if path.name != LOCK_FILE}


def wait_for_copies(cached: CachedShards, folder: Path, count: int) -> None:
    """Until the thread is done; pytest's time limit is the test."""
    while len(copies(folder)) < count or cached._copying.locked():
        time.sleep(0.005)


def test_a_copy_is_the_shard_and_is_read_from_then_on(origin, folder, content):
    cached = CachedShards(origin, folder, 10 * SIZE)
    assert cached.copy(NAMES[0])
    assert {name: path.read_bytes() for name, path in copies(folder).items()} == {NAMES[0]: content[NAMES[0]]}
    before = origin.transfers.read_bytes
    assert cached.read(NAMES[0], 123, 4567) == content[NAMES[0]][123:4690]
    assert origin.transfers.read_bytes == before
    assert (cached.transfers.requests, cached.transfers.read_bytes) == (1, 4567)
    assert not cached.copy(NAMES[0])


def test_a_read_without_a_copy_goes_to_the_origin_and_brings_the_copy(origin, folder, content):
    cached = CachedShards(origin, folder, 10 * SIZE)
    assert cached.read(NAMES[1], 5, 10) == content[NAMES[1]][5:15]
    assert cached.transfers.requests == 0
    wait_for_copies(cached, folder, 1)
    assert cached.read(NAMES[1], 5, 10) == content[NAMES[1]][5:15]
    assert cached.transfers.requests == 1
    cached.close()


def test_a_read_does_not_wait_for_a_whole_shard(folder, content):
    with served({NAMES[0]: content[NAMES[0]]}) as server:
        cached = CachedShards(RemoteShards(server.url, RemoteSection()), folder, 10 * SIZE)
        server.fail(NAMES[0], "stall")
        cached._start_copy(NAMES[0])
        while server.requests[NAMES[0]] < 2:  # the first asks for the size
            time.sleep(0.005)
        assert cached.read(NAMES[0], 20, 10) == content[NAMES[0]][20:30]
        assert cached._copying.locked()
        server.closing.set()
        wait_for_copies(cached, folder, 1)
        cached.close()


def test_a_pickled_one_uses_the_same_copies(origin, folder, content):
    cached = CachedShards(origin, folder, 10 * SIZE)
    cached.copy(NAMES[0])
    again = pickle.loads(pickle.dumps(cached))
    assert again.read(NAMES[0], 0, SIZE) == content[NAMES[0]]
    assert again.transfers.requests == 1


def test_beyond_the_end_it_is_the_origin_that_tells(origin, folder):
    cached = CachedShards(origin, folder, 10 * SIZE)
    cached.copy(NAMES[0])
    with pytest.raises(ShardError, match="ends 1 bytes before the index says"):
        cached.read(NAMES[0], SIZE - 9, 10)


def test_what_the_origin_does_not_have(origin, folder):
    cached = CachedShards(origin, folder, 10 * SIZE)
    with pytest.raises(ShardError, match=r"gone\.tar: cannot be read"):
        cached.read("gone.tar", 0, 10)
    with pytest.raises(ShardError, match="no plain path inside"):
        cached.read("../gone.tar", 0, 10)


def test_an_origin_that_fails_while_copying_leaves_nothing(origin, folder, content, caplog):
    with served(dict(content)) as server:
        cached = CachedShards(RemoteShards(server.url, RemoteSection()), folder, 10 * SIZE)
        server.fail(NAMES[0], "", "404")  # after the first part
        cached._start_copy(NAMES[0])
        while cached._copying.locked():
            time.sleep(0.005)
        assert copies(folder) == {}
        assert not caplog.messages
        assert cached.copy(NAMES[0])


def test_other_bytes_at_the_origin_are_another_copy(origin, folder):
    CachedShards(origin, folder, 10 * SIZE).copy(NAMES[0])
    other = bytes(SIZE)
    Path(origin.location, NAMES[0]).write_bytes(other)
    cached = CachedShards(LocalShards(Path(origin.location)), folder, 10 * SIZE)
    assert cached.read(NAMES[0], 0, 10) == other[:10]
    assert cached.transfers.requests == 0


def test_a_damaged_copy_is_brought_again(origin, folder, content):
    cached = CachedShards(origin, folder, 10 * SIZE)
    cached.copy(NAMES[0])
    os.truncate(copies(folder)[NAMES[0]], SIZE - 1)
    assert cached.read(NAMES[0], 0, SIZE) == content[NAMES[0]]
    wait_for_copies(cached, folder, 1)
    assert copies(folder)[NAMES[0]].read_bytes() == content[NAMES[0]]


def test_the_copy_unread_for_longest_makes_room(origin, folder, content):
    cached = CachedShards(origin, folder, 3 * SIZE, in_use_s=0.0)
    for age, name in enumerate(NAMES[:3]):
        cached.copy(name)
        os.utime(copies(folder)[name], (1000 + age, 1000 + age))
    cached.read(NAMES[0], 0, 1)  # the oldest is of use again
    assert cached.copy(NAMES[3])
    assert set(copies(folder)) == {NAMES[0], NAMES[2], NAMES[3]}


def test_a_copy_in_use_stays_and_the_rest_is_read_from_the_origin(origin, folder, content):
    cached = CachedShards(origin, folder, 2 * SIZE + 1)
    cached.copy(NAMES[0])
    cached.copy(NAMES[1])
    assert not cached.copy(NAMES[2])
    assert set(copies(folder)) == set(NAMES[:2])
    assert cached.read(NAMES[2], 0, SIZE) == content[NAMES[2]]
    assert not cached._copying.locked()  # for a while it does not even try


def test_a_copy_that_is_being_read_is_not_removed(origin, folder):
    cached = CachedShards(origin, folder, SIZE, in_use_s=0.0)
    cached.copy(NAMES[0])
    with copies(folder)[NAMES[0]].open("rb") as reading:
        fcntl.flock(reading, fcntl.LOCK_SH)
        assert not cached.copy(NAMES[1])
        assert set(copies(folder)) == {NAMES[0]}
    assert cached.copy(NAMES[1])
    assert set(copies(folder)) == {NAMES[1]}


def test_a_copy_that_is_being_removed_is_not_waited_for(origin, folder, content):
    cached = CachedShards(origin, folder, 10 * SIZE)
    cached.copy(NAMES[0])
    with copies(folder)[NAMES[0]].open("rb") as removing:
        fcntl.flock(removing, fcntl.LOCK_EX)
        assert cached.read(NAMES[0], 0, 10) == content[NAMES[0]][:10]
    assert cached.transfers.requests == 0


def test_a_shard_larger_than_the_limit_throws_nothing_out(origin, folder):
    CachedShards(origin, folder, 10 * SIZE).copy(NAMES[0])
    assert not CachedShards(origin, folder, SIZE - 1, in_use_s=0.0).copy(NAMES[1])
    assert set(copies(folder)) == {NAMES[0]}


def test_what_others_keep_beside_it_is_theirs(origin, folder):
    folder.mkdir()
    (folder / "thesis.tmp").write_bytes(bytes(10 * SIZE))
    cached = CachedShards(origin, folder, SIZE, in_use_s=0.0)
    assert cached.copy(NAMES[0])
    assert cached.copy(NAMES[1])
    assert (folder / "thesis.tmp").stat().st_size == 10 * SIZE


def test_one_process_brings_a_shard_the_other_does_not_wait(origin, folder, content):
    cached = CachedShards(origin, folder, 10 * SIZE)
    path = cached._path(NAMES[0])
    path.parent.mkdir(parents=True)
    with path.with_name(path.name + UNFINISHED).open("wb") as elsewhere:
        fcntl.flock(elsewhere, fcntl.LOCK_EX)
        assert not cached.copy(NAMES[0])
        assert cached.read(NAMES[0], 0, 10) == content[NAMES[0]][:10]
        assert cached.copy(NAMES[1])  # and does not take the file for a dead process's
        assert NAMES[0] + UNFINISHED in copies(folder)


def test_what_is_left_of_the_shard_itself_takes_no_room(origin, folder, content):
    cached = CachedShards(origin, folder, SIZE)
    left = cached._path(NAMES[0]).with_name(cached._path(NAMES[0]).name + UNFINISHED)
    left.parent.mkdir(parents=True)
    left.write_bytes(bytes(SIZE))
    assert cached.copy(NAMES[0])
    assert cached.read(NAMES[0], 0, SIZE) == content[NAMES[0]]


def test_a_claim_is_void_once_the_file_was_renamed(tmp_path, monkeypatch):
    path = tmp_path / "a.tmp"
    lock = cache_module._lock

    def renamed_meanwhile(file, how):
        path.replace(tmp_path / "a")
        return lock(file, how)

    monkeypatch.setattr(cache_module, "_lock", renamed_meanwhile)
    path.write_bytes(b"whole")
    with cache_module._claimed(path) as file:
        assert file is None
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_close_breaks_a_copy_off(folder, content):
    with served({NAMES[0]: content[NAMES[0]]}) as server:
        cached = CachedShards(RemoteShards(server.url, RemoteSection()), folder, 10 * SIZE)
        server.fail_always(NAMES[0], "503")
        with pytest.raises(ShardError):
            CachedShards(RemoteShards(server.url, RemoteSection(patience_s=0.01)), folder, SIZE).copy(NAMES[0])
        cached._start_copy(NAMES[0])
        while cached.origin.transfers.retries == 0:
            time.sleep(0.005)
        cached.close()
        assert not cached._copying.locked()
        assert copies(folder) == {}
        cached._start_copy(NAMES[0])
        assert not cached._copying.locked()


def test_close_between_two_parts_leaves_nothing(origin, folder):
    cached = CachedShards(origin, folder, 10 * SIZE)
    cached.close()
    assert not cached.copy(NAMES[0])
    assert copies(folder) == {}


def test_a_folder_that_cannot_be_written_is_said_once(origin, tmp_path, content, caplog):
    (tmp_path / "file").write_bytes(b"")
    cached = CachedShards(origin, tmp_path / "file" / "cache", 10 * SIZE)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            for name in NAMES:
                assert cached.read(name, 1, 10) == content[name][1:11]
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}/file/cache/{OWN_FOLDER}: no more shards are copied there (Not a directory)")
    assert line.endswith(f"read from {origin.location}")


def test_a_full_disk_is_said_once_and_leaves_nothing(origin, folder, content, caplog):
    cached = CachedShards(origin, folder, 10 * SIZE)
    cached.copy(NAMES[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As a full disk does, it lets small files be and refuses to set the room of a shard aside.
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE - 1, limits[1]))
    try:
        with caplog.at_level(logging.WARNING):
            for name in NAMES[1:]:
                assert cached.read(name, 0, 10) == content[name][:10]
                while cached._copying.locked():
                    time.sleep(0.005)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = caplog.messages
    assert "no more shards are copied there (File too large)" in line
    assert set(copies(folder)) == {NAMES[0]}
    assert cached.read(NAMES[0], 0, 10) == content[NAMES[0]][:10]
    assert cached.transfers.requests == 1  # what is there is still of use


def _copy_and_hang(url: str, folder: Path) -> None:
    CachedShards(RemoteShards(url, RemoteSection()), folder, 2 * SIZE).copy(NAMES[0])


def test_a_killed_process_leaves_neither_lock_nor_room_taken(folder, content):
    with served(content) as server:
        server.fail(NAMES[0], "stall")
        process = multiprocessing.get_context("spawn").Process(target=_copy_and_hang, args=(server.url, folder))
        process.start()
        while server.requests[NAMES[0]] < 2:
            time.sleep(0.01)
        assert copies(folder)[NAMES[0] + UNFINISHED].stat().st_size == SIZE
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        cached = CachedShards(RemoteShards(server.url, RemoteSection()), folder, 2 * SIZE)
        assert cached.copy(NAMES[1])
        assert set(copies(folder)) == {NAMES[1]}
        assert cached.copy(NAMES[0])
        assert copies(folder)[NAMES[0]].read_bytes() == content[NAMES[0]]


def _read_at_random(origin: LocalShards, folder: Path, seed: int, said) -> None:
    cached = CachedShards(origin, folder, 2 * SIZE, in_use_s=0.0)
    cache_module.FULL_PAUSE_S = 0.0
    random = np.random.default_rng(seed)
    content = {name: Path(origin.location, name).read_bytes() for name in NAMES}
    wrong = []
    while cached.transfers.requests < 50:
        name, start = NAMES[random.integers(len(NAMES))], int(random.integers(SIZE - 100))
        if cached.read(name, start, 100) != content[name][start : start + 100]:
            wrong.append((name, start))
        if _held_bytes(cached, folder) > 2 * SIZE:
            wrong.append("over the limit")
    cached.close()
    said.put(wrong)


def _held_bytes(cached: CachedShards, folder: Path) -> int:
    if not (folder / OWN_FOLDER).exists():
        return 0
    held_bytes = 0
    with cached._alone():
        for path in (folder / OWN_FOLDER).iterdir():
            with suppress(FileNotFoundError):  # a copy that found no room
                held_bytes += path.stat().st_size
    return held_bytes


def test_many_processes_share_a_folder_that_is_too_small(origin, folder):
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    processes = [context.Process(target=_read_at_random, args=(origin, folder, seed, said)) for seed in range(3)]
    for process in processes:
        process.start()
    assert [said.get() for _ in processes] == [[]] * 3
    for process in processes:
        process.join()
    assert not [name for name in copies(folder) if name.endswith(UNFINISHED)]

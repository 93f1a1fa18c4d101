import contextlib
import pickle
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from vitscale.config.remote import RemoteSection
from vitscale.data import shards as shards_module
from vitscale.data.remote import RemoteShards
from vitscale.data.shard_bytes import ShardStat, checked_name
from vitscale.data.shard_cache import CachedShards
from vitscale.data.shards import LocalShards, open_shards
from vitscale.errors import ShardError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five shards of different bytes, one of them in a folder of its own."""
    random = np.random.default_rng(0)
    (tmp_path / "val").mkdir()
    for name in ("a.tar", "b.tar", "c.tar", "d.tar", "val/a.tar"):
        (tmp_path / name).write_bytes(random.bytes(10_000))
    return tmp_path


NAMES = ("a.tar", "b.tar", "c.tar", "d.tar", "val/a.tar")


def open_files(folder: Path) -> int:
    """Descriptors of this process on files in a folder."""
    targets = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            targets.append(link.readlink())
    return sum(folder in target.parents for target in targets)


def test_reads_exactly_the_range_and_counts_it(folder):
    shards = LocalShards(folder)
    assert shards.read("val/a.tar", 17, 1234) == (folder / "val/a.tar").read_bytes()[17 : 17 + 1234]
    assert shards.read("a.tar", 9_999, 1) == (folder / "a.tar").read_bytes()[-1:]
    assert shards.read("a.tar", 10_000, 0) == b""
    assert (shards.transfers.requests, shards.transfers.read_bytes, shards.transfers.retries) == (3, 1235, 0)


def test_a_read_that_the_kernel_cuts_is_continued(folder, monkeypatch):
    whole = shards_module.os.pread
    monkeypatch.setattr(shards_module.os, "pread", lambda file, size, offset: whole(file, min(size, 1000), offset))
    shards = LocalShards(folder)
    assert shards.read("a.tar", 5, 4321) == (folder / "a.tar").read_bytes()[5:4326]
    with pytest.raises(ShardError, match="ends 1 bytes before"):
        shards.read("a.tar", 0, 10_001)


def test_few_files_are_open_and_none_after_close(folder, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_OPEN_SHARDS", 2)
    shards = LocalShards(folder)
    for name in NAMES * 2:
        shards.read(name, 0, 10)
        assert open_files(folder) <= 2
    shards.close()
    assert open_files(folder) == 0


def test_threads_do_not_read_what_another_one_let_go(folder, monkeypatch):
    # With one open file, every read of another shard lets one go that a thread may be about to read.
    monkeypatch.setattr(shards_module, "MAX_OPEN_SHARDS", 1)
    content = {name: (folder / name).read_bytes() for name in NAMES}
    shards = LocalShards(folder)
    wrong = []

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(300):
            name, start = NAMES[random.integers(len(NAMES))], int(random.integers(9_000))
            try:
                if shards.read(name, start, 1000) != content[name][start : start + 1000]:
                    wrong.append(name)
            except ShardError as error:
                wrong.append(str(error))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_pickled_one_starts_afresh(folder):
    shards = LocalShards(folder)
    shards.read("a.tar", 0, 10)
    again = pickle.loads(pickle.dumps(shards))
    assert open_files(folder) == 1
    assert again.read("a.tar", 0, 10) == shards.read("a.tar", 0, 10)
    assert open_files(folder) == 2
    assert again.transfers.requests == 1


def test_stat_tells_a_rewritten_shard(folder):
    before = LocalShards(folder).stat("a.tar")
    assert before.size_bytes == 10_000
    assert LocalShards(folder).stat("a.tar") == before
    (folder / "a.tar").write_bytes(b"0" * 10_000)
    after = LocalShards(folder).stat("a.tar")
    assert after == ShardStat(10_000, after.version)
    assert after.version != before.version


@pytest.mark.parametrize(
    "ask", [lambda s: s.read("gone.tar", 0, 1), lambda s: s.stat("gone.tar")], ids=["read", "stat"]
)
def test_a_missing_shard_is_named(folder, ask):
    with pytest.raises(ShardError, match=rf"^{folder}/gone.tar: .*No such file.*put the shard back"):
        ask(LocalShards(folder))


@pytest.mark.parametrize("start", [9_990, 10_000, 20_000])
def test_a_shard_that_ends_early_is_named(folder, start):
    with pytest.raises(ShardError, match=r"b\.tar: ends \d+ bytes before the index says: copy it again"):
        LocalShards(folder).read("b.tar", start, 11)


@pytest.mark.parametrize("name", ["../a.tar", "val/../../a.tar", "/etc/passwd", "", ".", "./a.tar", "a//b.tar", "val/"])
def test_a_name_cannot_lead_out_of_the_folder(folder, name):
    with pytest.raises(ShardError, match="no plain path inside: build the index again"):
        LocalShards(folder / "val").read(name, 0, 1)


def test_a_plain_name_is_kept():
    assert checked_name("s3://b", "val/train-000..0.tar") == "val/train-000..0.tar"


def test_a_location_says_who_reads_it(folder, tmp_path):
    for location in (folder, str(folder), folder.as_uri(), f"file://localhost{folder}"):
        shards = open_shards(location)
        assert isinstance(shards, LocalShards)
        assert len(shards.read("a.tar", 0, 10)) == 10
    for location in ("http://host/x", "https://host/x", "s3://bucket/x", "gs://bucket/x", "az://account/box/x"):
        assert isinstance(open_shards(location), RemoteShards)
    cached = open_shards("s3://bucket/x", RemoteSection(cache_folder=tmp_path, cache_limit_gb=1.5))
    assert isinstance(cached, CachedShards)
    assert isinstance(cached.origin, RemoteShards)


def test_a_path_with_odd_characters_as_a_url(tmp_path):
    odd = tmp_path / "a b%20é"
    odd.mkdir()
    (odd / "a.tar").write_bytes(b"odd")
    assert open_shards(odd.as_uri()).read("a.tar", 0, 3) == b"odd"


@pytest.mark.parametrize("location", ["ftp://host/x", "file://host/x", "pipe://cat", "memory://x"])
def test_another_url_is_refused(location):
    with pytest.raises(ShardError, match=rf"^{location}: .*name a folder or one of file://, http://.*az://"):
        open_shards(location)


def test_a_command_is_only_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ShardError, match="No such file"):
        open_shards("pipe:touch canary; cat").read("| touch canary", 0, 1)
    assert not list(tmp_path.iterdir())


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "vitscale.data.remote")
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ShardError, match=r"^s3://bucket/x: .* need obstore.*pip install 'vitscale\[remote\]'$"):
        open_shards("s3://bucket/x")

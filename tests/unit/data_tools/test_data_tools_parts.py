"""Parts of a build, and the locks that keep builders apart."""

import errno
import fcntl

import pytest

from data_tools.parts import Part, claim, read_part
from vitscale.errors import ShardError


def test_parts_take_every_shard_once():
    assert sorted(shard for number in range(1, 4) for shard in range(10) if Part(number, 3).takes(shard)) == list(
        range(10)
    )
    assert read_part("2/8", {}) == Part(2, 8)


def slurm(task, first, step, count):
    names = ("ID", "MIN", "STEP", "COUNT")
    values = zip(names, (task, first, step, count), strict=True)
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values}


def test_slurm_arrays_of_any_numbering_are_parts():
    assert [read_part("slurm", slurm(task, 0, 1, 4)) for task in range(4)] == [
        Part(number, 4) for number in (1, 2, 3, 4)
    ]
    assert [read_part("slurm", slurm(task, 3, 2, 3)) for task in (3, 5, 7)] == [Part(number, 3) for number in (1, 2, 3)]


@pytest.mark.parametrize("words", ["0/3", "4/3", "1", "a/b", "1/0"])
def test_what_is_no_part_is_refused(words):
    with pytest.raises(ShardError, match="--part"):
        read_part(words, {})


def test_slurm_outside_an_array_is_refused():
    with pytest.raises(ShardError, match="no task of a Slurm array"):
        read_part("slurm", {"SLURM_JOB_ID": "7"})


def test_builders_of_a_folder_exclude_each_other_and_parts_do_not(tmp_path):
    with claim(tmp_path), pytest.raises(ShardError, match="another builder works here"), claim(tmp_path):
        pass
    with claim(tmp_path), pytest.raises(ShardError, match="a builder of the whole folder"), claim(tmp_path, Part(1, 2)):
        pass
    with claim(tmp_path, Part(1, 2)), claim(tmp_path, Part(2, 2)):
        with pytest.raises(ShardError, match="another builder writes part 2/2"), claim(tmp_path, Part(2, 2)):
            pass
        with (
            pytest.raises(ShardError, match=r"part-[12]-of-2 is being written, which overlaps"),
            claim(tmp_path, Part(1, 3)),
        ):
            pass
        with pytest.raises(ShardError, match="another builder works here"), claim(tmp_path):
            pass
    with claim(tmp_path, Part(1, 3)):
        pass


def test_a_file_system_without_locks_is_told_and_one_that_fails_is_an_error(tmp_path, monkeypatch, capsys):
    def flock(_, kind):
        raise OSError(answer, "no")

    monkeypatch.setattr(fcntl, "flock", flock)
    answer = errno.EOPNOTSUPP
    with claim(tmp_path):
        assert "has no locks" in capsys.readouterr().err
    answer = errno.EIO
    with pytest.raises(OSError, match="no"), claim(tmp_path):
        pass

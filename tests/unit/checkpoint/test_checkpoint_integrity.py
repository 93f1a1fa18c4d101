"""Files that are replaced whole."""

import threading

import pytest

from vitscale.checkpoint.integrity import replace_file


def test_many_writers_at_once_leave_one_whole_text_and_nothing_else(tmp_path):
    file, texts = tmp_path / "record", [f"{number}" * 5000 for number in range(8)]
    errors = []

    def write(text):
        try:
            for _ in range(20):
                replace_file(file, text)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert file.read_text() in texts
    assert [entry.name for entry in tmp_path.iterdir()] == ["record"]


def test_what_cannot_be_written_leaves_the_old_text(tmp_path):
    (tmp_path / "record").mkdir()
    with pytest.raises(OSError, match="record"):
        replace_file(tmp_path / "record", "text")

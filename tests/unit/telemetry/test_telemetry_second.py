import importlib.util
import json
import struct

import numpy as np
import pytest

from vitscale.errors import ConfigError
from vitscale.telemetry import check_second_sink, draw_similarity, open_second_sink, second


def test_a_client_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(second.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        check_second_sink("wandb")
    assert str(error.value) == "log.second_sink=wandb: wandb is not installed: pip install 'vitscale[wandb]'"
    check_second_sink(None)


def read_offline(file):
    """Records of a .wandb file: LevelDB's log format behind a header of seven bytes."""
    internal = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind == 0:  # the rest of the block is empty
            place += left
            continue
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield internal.Record.FromString(whole)
            whole = b""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb (pip install 'vitscale[wandb]')")
def test_weights_and_biases_gets_the_metrics_and_pictures_of_all_starts_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_second_sink("wandb")
    run_dir = tmp_path / "huge"
    run_dir.mkdir()
    png = draw_similarity(np.ones((2, 2, 4), dtype=np.float32))
    for steps in ([10, 20], [20, 30]):
        sink = open_second_sink("wandb", run_dir, {"peak_lr": 0.5})
        for step in steps:
            sink.write(step, {"train/loss": step / 10, "perf/mfu": 0.5})
        sink.images(steps[-1], "pictures/pos_embed_similarity", png)
        sink.close()
    files = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    values, identities = [], set()
    for file in files:
        for record in read_offline(file):
            if record.HasField("history"):
                found = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                values.append((found["step"], found.get("train/loss"), found.get("perf/mfu")))
            if record.HasField("run"):
                identities.add((record.run.run_id, record.run.display_name, record.run.project))
    assert [v for v in values if v[1]] == [(10, 1.0, 0.5), (20, 2.0, 0.5), (20, 2.0, 0.5), (30, 3.0, 0.5)]
    assert identities == {((run_dir / "wandb_id").read_text().strip(), "huge", "vitscale")}
    assert len(list(run_dir.glob("wandb/offline-run-*/files/media/images/**/*.png"))) == 2

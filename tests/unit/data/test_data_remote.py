import logging
import os
import pickle
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import numpy as np
import pytest
from http_server import FaultyServer, served
from moto.server import ThreadedMotoServer

from vitscale.config.remote import RemoteSection
from vitscale.data import remote as remote_module
from vitscale.data.remote import RemoteShards
from vitscale.data.shard_bytes import ShardUnreachableError
from vitscale.data.shards import open_shards
from vitscale.errors import ExitStatus, ShardError

CONTENT = np.random.default_rng(0).bytes(100_000)
ODD_NAME = "folder/a b%20+é.tar"
# Long enough for any try on a busy machine, where the fault does not use it up.
PATIENT = RemoteSection(longest_pause_s=0.01, stall_timeout_s=20, patience_s=60)
HASTY = RemoteSection(longest_pause_s=0.01, stall_timeout_s=0.3, request_timeout_s=0.6, patience_s=0.2)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with served({"d/a.tar": CONTENT, f"d/{ODD_NAME}": CONTENT[::-1]}) as running:
        yield running


def test_reads_exactly_the_range_and_counts_it(server):
    shards = RemoteShards(f"{server.url}/d", PATIENT)
    assert shards.read("a.tar", 1234, 50_000) == CONTENT[1234:51_234]
    assert shards.read("a.tar", 99_999, 1) == CONTENT[-1:]
    assert shards.read("a.tar", 5, 0) == b""
    assert shards.read(ODD_NAME, 0, 10) == CONTENT[::-1][:10]
    assert (shards.transfers.requests, shards.transfers.read_bytes, shards.transfers.retries) == (3, 50_011, 0)
    assert server.requests == {"d/a.tar": 2, f"d/{ODD_NAME}": 1}


def test_a_location_may_end_in_a_slash(server):
    assert RemoteShards(f"{server.url}/d/", PATIENT).read("a.tar", 0, 10) == CONTENT[:10]


def test_threads_read_side_by_side(server):
    shards = RemoteShards(f"{server.url}/d", PATIENT)
    starts = np.random.default_rng(1).integers(90_000, size=64).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda start: shards.read("a.tar", start, 10_000), starts)) == [
            CONTENT[start : start + 10_000] for start in starts
        ]


def test_a_pickled_one_starts_afresh(server):
    shards = RemoteShards(f"{server.url}/d", PATIENT)
    shards.read("a.tar", 0, 10)
    again = pickle.loads(pickle.dumps(shards))
    assert again.transfers.requests == 0
    assert again.read("a.tar", 10, 10) == CONTENT[10:20]


@pytest.mark.parametrize("fault", ["500", "502", "503", "429", "408", "reset", "short", "half"])
@pytest.mark.fault(30)
def test_what_passes_is_tried_again(server, fault):
    server.fail("d/a.tar", fault, fault)
    shards = RemoteShards(f"{server.url}/d", PATIENT)
    assert shards.read("a.tar", 100, 1000) == CONTENT[100:1100]
    assert (shards.transfers.requests, shards.transfers.retries, shards.transfers.read_bytes) == (3, 2, 1000)


@pytest.mark.parametrize(
    ("fault", "timeout"),
    [("stall", {"stall_timeout_s": 0.3}), ("drip", {"request_timeout_s": 0.6})],
    ids=["stall", "drip"],
)
@pytest.mark.fault(30)
def test_a_server_that_does_not_come_to_an_end_is_left(server, fault, timeout):
    server.fail("d/a.tar", fault)
    others = {"stall_timeout_s": 1e4, "request_timeout_s": 1e4, "longest_pause_s": 0.01}
    shards = RemoteShards(f"{server.url}/d", RemoteSection(**(others | timeout)))
    assert shards.read("a.tar", 100, 1000) == CONTENT[100:1100]
    assert shards.transfers.retries == 1


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("503", "503 Service Unavailable"),
        ("reset", r"body error \(\w+"),
        ("half", "500 bytes came, 1000 were asked for"),
        ("stall", r"body error \(TimedOut\)"),
        ("drip", r"body error \(TimedOut\)"),
    ],
)
@pytest.mark.fault(30)
def test_what_does_not_pass_ends_as_worth_a_requeue(server, fault, cause):
    server.fail_always("d/a.tar", fault)
    with pytest.raises(ShardUnreachableError) as caught:
        RemoteShards(f"{server.url}/d", HASTY).read("a.tar", 0, 1000)
    message = str(caught.value)
    assert message.startswith(f"{server.url}/d/a.tar: no answer (")
    assert message.endswith("check the server and the network, then start again")
    assert "\n" not in message
    assert caught.match(cause)
    assert caught.value.status is ExitStatus.TRANSIENT


def test_nobody_listens():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ShardUnreachableError, match=f"^{url}/a.tar: no answer .*Connection refused"):
            RemoteShards(url, HASTY).stat("a.tar")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("404", "404 Not Found: put the shard there"),
        ("403", "403 Forbidden: check the credentials"),
        ("401", "401 Unauthorized: check the credentials"),
        ("400", "400 Bad Request: check the server"),
        ("whole", "Range request not supported .*: serve the shards by a server that answers range requests"),
    ],
)
def test_what_cannot_pass_is_told_at_once(server, fault, message):
    server.fail_always("d/a.tar", fault)
    shards = RemoteShards(f"{server.url}/d", PATIENT)
    with pytest.raises(ShardError, match=rf"^{server.url}/d/a\.tar: .*{message}") as caught:
        shards.read("a.tar", 0, 1000)
    assert caught.value.status is ExitStatus.USER_ERROR
    assert server.requests["d/a.tar"] == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", [99_990, 100_000, 200_000])
def test_a_shard_that_ends_early_is_told_at_once(server, start):
    shards = RemoteShards(f"{server.url}/d", PATIENT)
    with pytest.raises(ShardError, match=r"a\.tar: .*the shard is shorter than the index says: copy it there again"):
        shards.read("a.tar", start, 11)
    assert shards.transfers.requests == 1


def test_a_name_cannot_lead_out_of_the_folder(server):
    with pytest.raises(ShardError, match="no plain path inside"):
        RemoteShards(f"{server.url}/d", PATIENT).read("../d/a.tar", 0, 1)
    assert not server.requests


def test_a_long_outage_is_told_once_a_read(server, caplog):
    server.fail("d/a.tar", *["503"] * 5)
    with caplog.at_level(logging.WARNING):
        RemoteShards(f"{server.url}/d", PATIENT).read("a.tar", 0, 10)
    (line,) = caplog.messages
    assert line.startswith(f"{server.url}/d/a.tar: failed {remote_module.FAILURES_UNTIL_TOLD} times")
    assert "503" in line


def test_close_ends_the_patience(server, monkeypatch):
    server.fail_always("d/a.tar", "503")
    monkeypatch.setattr(remote_module, "FIRST_PAUSE_S", 1e6)
    shards = RemoteShards(f"{server.url}/d", RemoteSection(patience_s=1e12, longest_pause_s=1e6))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(shards.read, "a.tar", 0, 10)
        while shards.transfers.retries < 1:
            time.sleep(0.01)
        shards.close()
        with pytest.raises(ShardUnreachableError, match="503"):
            reading.result()


def test_a_signature_is_sent_and_not_told(server):
    shards = RemoteShards(f"{server.url}/d?sig=secret", PATIENT)
    assert shards.read("a.tar", 0, 10) == CONTENT[:10]
    assert pickle.loads(pickle.dumps(shards)).read("a.tar", 0, 10) == CONTENT[:10]
    assert server.queries == {"sig=secret"}
    assert "secret" not in shards.location
    with pytest.raises(ShardError) as caught:
        shards.read("gone.tar", 0, 10)
    assert "secret" not in str(caught.value)


def test_a_password_is_refused_and_not_told():
    with pytest.raises(ShardError, match=r"^http://host/d: a user or password in a URL is not sent") as caught:
        RemoteShards("http://me:secret@host/d", PATIENT)
    assert "secret" not in str(caught.value)


def test_an_incomplete_environment_is_told(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    with pytest.raises(ShardError, match=r"^az://box/x: cannot be opened \(.*Account .*\): check the URL and"):
        RemoteShards("az://box/x", PATIENT).read("a.tar", 0, 1)


def test_a_machine_without_credentials_is_told_what_to_set(server, monkeypatch):
    # Without credentials in the environment the client asks the cloud machine that it may run on.
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    server.fail_always("latest/api/token", "403")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", server.url)
    monkeypatch.setattr(remote_module, "METADATA_ADDRESS", server.url)
    with pytest.raises(ShardError, match=r"^s3://box/x/a\.tar: .*: no credentials .* AWS_SKIP_SIGNATURE=true"):
        RemoteShards("s3://box/x", PATIENT).read("a.tar", 0, 1)


@pytest.fixture
def bucket(monkeypatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # What a user sets, and nothing else.
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "eu-west-3")
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    for name in ("a.tar", ODD_NAME):
        client.put_object(Bucket="bucket", Key=f"in21k/{name}", Body=CONTENT)
    yield "s3://bucket/in21k"
    server.stop()


def test_an_s3_server(bucket):
    shards = open_shards(bucket, PATIENT)
    assert shards.read("a.tar", 1234, 50_000) == CONTENT[1234:51_234]
    assert shards.read(ODD_NAME, 0, 10) == CONTENT[:10]
    stat = shards.stat("a.tar")
    assert stat.size_bytes == len(CONTENT)
    assert stat == shards.stat("a.tar")
    boto3.client("s3", region_name="us-east-1").put_object(Bucket="bucket", Key="in21k/a.tar", Body=CONTENT[::-1])
    assert shards.stat("a.tar").version != stat.version
    with pytest.raises(ShardError, match=rf"^{bucket}/gone\.tar: .*404 Not Found.*put the shard there"):
        shards.read("gone.tar", 0, 1)
    with pytest.raises(ShardError, match="shorter than the index says"):
        shards.read("a.tar", 99_990, 11)


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[str]:
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    if not Path(program).exists():
        pytest.skip("nginx is not installed (Debian: apt-get install nginx-light)")
    folder = tmp_path / "served" / "folder"
    folder.mkdir(parents=True)
    (folder.parent / "a.tar").write_bytes(CONTENT)
    (folder.parent / ODD_NAME).write_bytes(CONTENT[::-1])
    os.utime(folder.parent / ODD_NAME, (1, 1))  # nginx makes the version of a file from its time and size
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = "".join(
        f"{kind}_temp_path {tmp_path}/{kind}; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}}\n"
        f"http {{ access_log off; {paths} server {{ listen 127.0.0.1:{port}; root {folder.parent}; }} }}\n"
    )
    with subprocess.Popen([program, "-c", tmp_path / "nginx.conf", "-e", tmp_path / "error.log"]) as process:
        while process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.02)
        assert process.poll() is None, (tmp_path / "error.log").read_text()
        yield f"http://127.0.0.1:{port}"
        process.terminate()


def test_nginx(nginx):
    shards = open_shards(nginx, PATIENT)
    random = np.random.default_rng(2)
    for start, stop in np.sort(random.integers(len(CONTENT), size=(50, 2))).tolist():
        assert shards.read("a.tar", start, stop - start) == CONTENT[start:stop]
    assert shards.read(ODD_NAME, 0, len(CONTENT)) == CONTENT[::-1]
    stat = shards.stat("a.tar")
    assert stat.size_bytes == len(CONTENT)
    assert stat.version != shards.stat(ODD_NAME).version
    with pytest.raises(ShardError, match=rf"^{nginx}/gone\.tar: .*404"):
        shards.read("gone.tar", 0, 1)
    for start in (99_990, 100_000):
        with pytest.raises(ShardError, match="shorter than the index says"):
            shards.read("a.tar", start, 11)


def test_other_threads_run_while_one_waits(server):
    server.fail("d/a.tar", "stall")
    shards = RemoteShards(f"{server.url}/d", PATIENT)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(shards.read, "a.tar", 0, 1000)
        while not server.requests["d/a.tar"]:
            time.sleep(0.01)
        assert shards.read("a.tar", 0, 10) == CONTENT[:10]
        assert not waiting.done()
        server.closing.set()  # lets the server close the connection, so that the read is tried again
        assert waiting.result() == CONTENT[:1000]

"""What a node is asked before a run: its versions and devices, its way to the data, its disks and its clock.

Each check is a function that gives a finding or raises the error that the run would end with. A check that does not
come back, as on a file system that hangs, is a fault by itself.
"""

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from webdataset.shardlists import expand_urls

from vitscale.checkpoint import CheckpointStore
from vitscale.config import Config
from vitscale.data.index import read_dataset
from vitscale.data.mixture import Mixture
from vitscale.data.shards import open_shards
from vitscale.data.stream import Stream
from vitscale.errors import PASSING_FAULTS, CheckpointError, ExitStatus, LaunchError, ShardError, VitscaleError
from vitscale.ranks.groups import Ranks, choose_device, count_gpus, promised_gpus
from vitscale.train.build import Blueprint, build_model, draw_blueprint
from vitscale.train.footprint import planned_checkpoint_bytes
from vitscale.train.preflight import disks
from vitscale.train.preflight.reports import Finding, NodeReport, Standing
from vitscale.train.run_directory import library_versions

T = TypeVar("T")

CHECKS_LIMIT_S = 90.0
"""Time that all checks get; mapping the index of 14 million samples for the first time takes a good part of it."""
SERVER_PATIENCE_S = 10.0
"""How long an unreachable server of shards is asked again."""
PROBED_BYTES = 512
"""Of the first and the last shard, at either end."""
_DRIVER = Path("/proc/driver/nvidia/version")
_KINDS: dict[type[VitscaleError], str] = {ShardError: "data", CheckpointError: "weights", LaunchError: "devices"}


def inspect_node(config: Config, node: str, ranks_here: int, check_files: bool) -> NodeReport:
    """All that a node can find out about itself.

    Args:
        config: the run.
        node: its name in the cluster.
        ranks_here: ranks that it is to have.
        check_files: look at every shard's size and the index's checksum; one node of a run need do it.
    """
    assert config.run.dir is not None  # load_config fills it in
    run_dir, drawn = config.run.dir, list[Blueprint]()
    ends_s = time.monotonic() + CHECKS_LIMIT_S
    findings = ask(
        {
            "devices": lambda: devices(ranks_here),
            "config": lambda: blueprint(config, ranks_here, check_files, drawn),
            "run directory": lambda: disks.run_directory(run_dir),
            "clock": lambda: disks.clock(run_dir),
        },
        CHECKS_LIMIT_S,
    )
    if drawn and (left_s := ends_s - time.monotonic()) > 0:
        findings += ask(
            {
                "shards": lambda: shards(drawn[0]),
                "space": lambda: space(drawn[0], run_dir),
                "shared memory": lambda: disks.shared_memory(drawn[0], ranks_here),
            },
            left_s,
        )
    return NodeReport(node, facts(), findings)


def ask(looks: Mapping[str, Callable[[], Finding]], limit_s: float) -> list[Finding]:
    """The findings of some checks, which are made at once, or what kept them from giving one: an error, or the time."""
    found: dict[str, Finding] = {}

    def look(check: str) -> None:
        found[check] = outcome(check, looks[check])

    threads = {check: threading.Thread(target=look, args=(check,), name=check, daemon=True) for check in looks}
    ends_s = time.monotonic() + limit_s
    for thread in threads.values():
        thread.start()
    for thread in threads.values():
        thread.join(max(ends_s - time.monotonic(), 0.0))
    late = f"no answer within {limit_s:.3g} s: does a file system hang there?"
    return [found.get(check, Finding(check, Standing.AGAIN, f"{check}: {late}")) for check in looks]


def outcome(check: str, look: Callable[[], Finding]) -> Finding:
    """The finding of a check, or the error that kept it from giving one."""
    try:
        return look()
    except VitscaleError as error:
        passes = error.status not in (ExitStatus.USER_ERROR, ExitStatus.DIVERGED)
        kind = next((name for family, name in _KINDS.items() if isinstance(error, family)), check)
        return Finding(kind, Standing.AGAIN if passes else Standing.MEND, str(error))
    except OSError as error:
        standing = Standing.AGAIN if error.errno in PASSING_FAULTS else Standing.MEND
        return Finding(check, standing, f"{error.filename or check}: {error.strerror}: mend it there")
    except Exception as error:  # a driver or a library that is broken on this node, whatever it raises
        said = f"{check}: {type(error).__name__}: {' '.join(str(error).split())}: mend it there"
        return Finding(check, Standing.MEND, said)


def facts() -> dict[str, str]:
    """What has to be the same on all nodes; versions are those of what this process has imported."""
    known = library_versions() | {"torch": torch.__version__, "vitscale": f"{version('vitscale')}+{code_digest()}"}
    if torch.version.cuda is not None:
        known["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # of a card that is broken, which the check of the devices tells
            known["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
            cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
            known["gpus"] = f"{len(cards)} x " + ", ".join(
                sorted({f"{card.name} {card.total_memory / 2**30:.0f} GiB" for card in cards})
            )
    with suppress(OSError):
        if found := re.search(r"\d{3,}\.[\d.]+", _DRIVER.read_text(encoding="utf-8")):
            known["driver"] = found[0]
    return known


def code_digest(package: Path = Path(__file__).parents[2]) -> str:
    """A short name for the text of the package: two nodes may have different code under one version."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:8]


def devices(ranks_here: int) -> Finding:
    """Whether each rank has a device of its own; raises LaunchError."""
    gpus = count_gpus()
    choose_device(ranks_here - 1, gpus, promised_gpus(os.environ))
    return Finding("devices", Standing.SOUND, f"{gpus} GPUs" if gpus else "CPU")


def blueprint(config: Config, ranks_here: int, check_files: bool, drawn: list[Blueprint]) -> Finding:
    """Whether the run could start here: its config, its datasets and label spaces, the weights that it begins with.

    It is drawn as if this node were alone, because how many nodes there will be is not known yet.

    Args:
        config: the run.
        ranks_here: ranks that the node is to have.
        check_files: whether to look at every shard.
        drawn: takes the blueprint.
    """
    device = choose_device(0, count_gpus())
    alone = Ranks(rank=0, world_size=ranks_here, local_rank=0, local_world_size=ranks_here, device=device)
    drawn.append(draw_blueprint(config, alone, check_files))
    return Finding("config", Standing.SOUND, f"{drawn[0].total_steps} steps of {config.model.name}")


def shards(blueprint: Blueprint) -> Finding:
    """Whether both ends of the first and the last shard of every split can be read; raises ShardError."""
    remote = blueprint.config.data.remote
    # One answer, and soon, is enough here; a copy of the shard is not wanted yet.
    asked = {"patience_s": min(SERVER_PATIENCE_S, remote.patience_s), "cache_folder": None}
    probed = 0
    for location, name, size_bytes in _shards_of(blueprint):
        source = open_shards(location, remote.model_copy(update=asked))
        try:
            there_bytes = source.stat(name).size_bytes
            if size_bytes not in (None, there_bytes):
                raise ShardError(
                    f"{location}/{name}: has {there_bytes} bytes, dataset.json says {size_bytes}: copy it again"
                )
            part = min(PROBED_BYTES, there_bytes)
            source.read(name, 0, part)
            source.read(name, there_bytes - part, part)
            probed += 1
        finally:
            source.close()
    return Finding("shards", Standing.SOUND, f"{probed} shards answer")


def space(blueprint: Blueprint, run_dir: Path) -> Finding:
    """Whether there is room for the checkpoints that the run keeps; raises OSError."""
    config = blueprint.config
    with torch.device("meta"):
        tag_bytes = planned_checkpoint_bytes(config, build_model(config))
    # Counting the tags that are there asks the file system far less than adding up their files.
    room_bytes, tags = disks.free_bytes(run_dir), len(CheckpointStore(run_dir).tags())
    return disks.checkpoint_space(run_dir, room_bytes, tags, tag_bytes, config.checkpoint, blueprint.total_steps)


def _shards_of(blueprint: Blueprint) -> Iterator[tuple[str, str, int | None]]:
    """Location, name and, where it is known, size of the first and the last shard of every split."""
    source = blueprint.source
    indexes = source.samples.indexes if isinstance(source, Mixture) else ()
    for index in (*indexes, *filter(None, (blueprint.val_index,))):
        files = read_dataset(index.root).splits[index.split].shards
        yield from ((index.location, shard.name, shard.size_bytes) for shard in _ends(files))
    if isinstance(source, Stream):
        for url in _ends(expand_urls(source.section.shards)):
            folder, _, name = str(url).rpartition("/")
            yield folder or ".", name, None


def _ends(items: Sequence[T]) -> Sequence[T]:
    return items if len(items) < 2 else (items[0], items[-1])

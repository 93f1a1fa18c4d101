"""Slurm's short forms for many hosts and for their tasks, written out. All of it is pure."""

import itertools
import re

from vitscale.errors import LaunchError

_HOST = r"(?:[^\s,[\]]|\[[^[\]]*])+"
_HOSTS = re.compile(f"{_HOST}(?:,{_HOST})*")
_BRACKETS = re.compile(r"\[([^[\]]*)]")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def expand_hosts(nodelist: str) -> list[str]:
    """Every host of a node list such as `rack[1-2]n[01-03,7],gpu4`, in the order of `scontrol show hostnames`.

    Raises:
        LaunchError: it is no such list.
    """
    if _HOSTS.fullmatch(nodelist) is None:
        raise _refusal(nodelist)
    return [host for item in re.findall(_HOST, nodelist) for host in _expand_item(item, nodelist)]


def expand_counts(tasks_per_node: str) -> list[int]:
    """Tasks of each node, from a list such as `2(x3),1`.

    Raises:
        LaunchError: it is no such list.
    """
    counts: list[int] = []
    for item in tasks_per_node.split(","):
        match = _COUNT.fullmatch(item)
        if match is None:
            raise LaunchError(
                f"SLURM_STEP_TASKS_PER_NODE={tasks_per_node!r} is no task count: start the ranks with srun"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _expand_item(item: str, nodelist: str) -> list[str]:
    texts, insides = (parts := _BRACKETS.split(item))[::2], parts[1::2]
    if not insides:
        return [item]
    # Slurm lets the last bracket run fastest, and after it the first, the second and so on.
    *slow, last = (_expand_inside(inside, nodelist) for inside in insides)
    hosts = []
    for *backwards, fastest in itertools.product(*reversed(slow), last):
        numbers = [*reversed(backwards), fastest, ""]
        hosts.append("".join(itertools.chain.from_iterable(zip(texts, numbers, strict=True))))
    return hosts


def _expand_inside(inside: str, nodelist: str) -> list[str]:
    """The numbers of `01-03,7`; a range is filled up with zeros to the width of its first."""
    numbers: list[str] = []
    for part in inside.split(","):
        match = _RANGE.fullmatch(part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise _refusal(nodelist)
        numbers += [f"{n:0{len(match[1])}d}" for n in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return numbers


def _refusal(nodelist: str) -> LaunchError:
    return LaunchError(
        f"SLURM_STEP_NODELIST={nodelist!r} is no list of hosts such as node[01-03,7],gpu4: start the ranks with srun"
    )

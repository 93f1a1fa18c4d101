"""Trains for real, does it harm at random, starts it again, and keeps book.

A run is a row of lives: in each, ranks are started, something is done to them, and they end. Between two lives files
may be damaged, and the next one may have another number of ranks and another ZeRO stage. All follows from a seed.
"""

import contextlib
import itertools
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from distributed_runner import forkserver_context, rank_environment

import vitscale.checkpoint.store as store_module
import vitscale.train.saving as saving_module
from vitscale.checkpoint import CheckpointStore, Snapshot
from vitscale.cli.main import main

ENDING_S = 60.0
"""After the harm, for all ranks to end (fault 1)."""
LIFE_S = 240.0
SAVED_EVERY = 3
STEPS_TO_A_SAVE = 2 * SAVED_EVERY + 2
"""After so many steps from any start one was saved, and committed beside the next ones."""
TOPOLOGIES = ((1, 0), (1, 3), (2, 1), (2, 2), (2, 3), (3, 2), (4, 1), (4, 3))
"""(ranks, ZeRO stage), among which a changing run changes."""

SAVE_PHASES = (
    "copied",
    "half a file",
    "file written",
    "record left",
    "records collected",
    "index written",
    "manifest written",
    "renamed",
    "pruning",
)
"""Moments of a save at which a rank can be killed; from the fifth on they are rank 0's alone."""
CLOCK_SET_BACK = "clock set back"
BLOWS = ("kill one", "kill all", "kill in save", "stop one", "ask to stop")
_STEP_LINE = re.compile(r"\bstep (\d+)/")
DAMAGES = (
    "truncated file",
    "flipped bits",
    "no manifest",
    "flipped manifest",
    "no pointer",
    "empty pointer",
    "bogus pointer",
)


@dataclass
class Life:
    """One start of the run, and what was done to it."""

    topology: tuple[int, int]
    blow: str
    phase: str
    """Of a save, in which the blow falls."""
    expected_step: int
    """Of the newest sound checkpoint before it."""
    named_step: int
    """Of the newest checkpoint by name, sound or not."""
    damage: str = ""
    """Done to the files before it."""
    statuses: list[int | None] = field(default_factory=list)
    """Exit status by rank, negative for the signal that ended it."""
    ending_s: float = 0.0
    """From the blow to the end of the last rank."""


class ChaosRun:
    """One run through all its lives."""

    def __init__(self, config: Path, run_dir: Path, seed: int, total_steps: int, *, same_topology: bool) -> None:
        """Plan nothing yet but the dice.

        Args:
            config: of the micro run, whose length is `total_steps`.
            run_dir: its run directory.
            seed: of everything that is random.
            total_steps: length of the run.
            same_topology: every life has 2 ranks at stage 2.
        """
        self.lives: list[Life] = []
        self.dead: set[int] = set()
        """Process ids of all ranks that lived, each the head of a session of its own."""
        self.ports: set[int] = set()
        """Where they met."""
        self._config, self._run_dir, self._total_steps = config, run_dir, total_steps
        self._dice = random.Random(seed)
        self._same_topology = same_topology
        self._store = CheckpointStore(run_dir)
        self._fruitless = self._known_starts = 0

    @property
    def kills(self) -> int:
        """Lives that ended by a rank's sudden death."""
        return sum(life.blow not in ("none", "ask to stop") for life in self.lives)

    @property
    def damages(self) -> int:
        """Lives that found checkpoints or pointer damaged."""
        return sum(bool(life.damage) for life in self.lives)

    def go(self, most_lives: int, phases: Sequence[str] = ()) -> None:
        """Live until the run is finished; the last of `most_lives` is left in peace.

        Args:
            most_lives: of the run.
            phases: of a save, in which the first lives end, one after the other; the rest is left to the dice.
        """
        while len(self.lives) < most_lives:
            number = len(self.lives)
            if number < len(phases):
                life = Life((2, 2), "kill in save", phases[number], self._expected_step(), self._named_step())
            else:
                life = self._next_life(peace=number == most_lives - 1)
            self.lives.append(life)
            self._live(life, scripted=number < len(phases))
            if life.blow == "none":
                assert life.statuses == [0] * life.topology[0], self.story()
                return
            if all(status == 0 for status in life.statuses):
                return  # it was faster than the blow

    def story(self) -> str:
        """All lives, and the end of the last one's log."""
        lines = [f"{number}: {life}" for number, life in enumerate(self.lives)]
        return "\n".join([*lines, self._log()[-4000:]])

    def _log(self) -> str:
        """What the last life's ranks have said; one that was killed in its first moments has no file."""
        path = self._log_path()
        return path.read_text(errors="replace") if path.exists() else ""

    def _log_path(self) -> Path:
        return self._run_dir.parent / f"life-{len(self.lives) - 1:03d}.log"

    def _next_life(self, *, peace: bool) -> Life:
        damage = ""
        if len(self._sound_tags()) >= 2 and self._dice.random() < 0.25:
            damage = self._dice.choice(DAMAGES)
            damage_checkpoints(self._store, damage, self._dice)
        topology = (2, 2) if self._same_topology else self._dice.choice(TOPOLOGIES)
        # A third fruitless life in a row would be fenced, and near the end only the end saves.
        peace = peace or (self._fruitless >= 2 and self._expected_step() + STEPS_TO_A_SAVE >= self._total_steps)
        blow = "none" if peace else self._dice.choice(BLOWS)
        if topology[0] == 1 and blow == "stop one":
            blow = "kill one"  # nobody would notice
        phase = self._dice.choice(SAVE_PHASES) if blow == "kill in save" else ""
        return Life(topology, blow, phase, self._expected_step(), self._named_step(), damage)

    def _expected_step(self) -> int:
        sound = self._sound_tags()
        return store_module.step_of(sound[-1]) if sound else 0

    def _named_step(self) -> int:
        tags = self._store.tags()
        return store_module.step_of(tags[-1]) if tags else 0

    def _starts(self) -> list:
        path = self._run_dir / "starts.json"
        return json.loads(path.read_text()) if path.exists() else []

    def _sound_tags(self) -> list[str]:
        return [tag for tag in self._store.tags() if not self._store.faults(tag)]

    def _live(self, life: Life, *, scripted: bool) -> None:
        world_size, stage = life.topology
        victim = self._dice.randrange(world_size)
        call = 2 if scripted else self._dice.randint(1, 2) + 2 * (self._fruitless >= 2)
        if life.phase and SAVE_PHASES.index(life.phase) >= SAVE_PHASES.index("records collected"):
            victim = 0
        # A life that is cut before its first save adds nothing; after two of them the next is let come further.
        steps = self._dice.randint(0, 3 * SAVED_EVERY) if self._fruitless < 2 else STEPS_TO_A_SAVE
        if life.phase:
            steps = self._total_steps  # or until it has killed itself
        at_start = steps == 0 and life.blow != "none"
        delay_s = self._dice.random() * (3.0 if at_start else 0.2)
        overrides = [f"engine.zero_stage={stage}"]
        allowed = [] if self._same_topology else ["--allow-change", "engine.zero_stage"]
        arguments = ["train", str(self._config), *overrides, *allowed]
        with started_ranks(world_size, arguments, self._log_path(), (victim, life.phase, call)) as processes:
            self.dead |= {process.pid for process in processes}
            self.ports.add(processes.port)
            if life.blow != "none":
                if steps:
                    self._await_step(processes, life.expected_step + steps)
                time.sleep(delay_s)
            began_s = time.monotonic()
            self._strike(life, processes, victim, at_start=at_start)
            if at_start and not all(process.is_alive() for process in processes):
                send_to(processes, signal.SIGKILL)  # as a launcher does: who waits for a rank to come waits long
            deadline_s = time.monotonic() + (ENDING_S if life.blow != "none" else LIFE_S)
            for process in processes:
                process.join(max(0.0, deadline_s - time.monotonic()))
            life.ending_s = time.monotonic() - began_s
            life.statuses = [process.exitcode for process in processes]
            assert all(status is not None for status in life.statuses), f"still running\n{self.story()}"
        self._check_start(life, at_start=at_start)
        tags = self._sound_tags()
        self._fruitless = 0 if tags and store_module.step_of(tags[-1]) > life.named_step else self._fruitless + 1

    def _await_step(self, processes: list, step: int) -> None:
        """Wait until this life has done a step, or a rank has ended by itself."""
        deadline_s = time.monotonic() + LIFE_S
        goal = min(step, self._total_steps - 1)
        while all(process.is_alive() for process in processes):
            done = _STEP_LINE.findall(self._log())
            if done and int(done[-1]) >= goal:
                return
            assert time.monotonic() < deadline_s, f"no step {goal}\n{self.story()}"
            time.sleep(0.02)

    def _strike(self, life: Life, processes: list, victim: int, *, at_start: bool) -> None:
        if life.blow == "kill one":
            send_to([processes[victim]], signal.SIGKILL)
            processes[victim].join()
        elif life.blow == "kill all":
            send_to(processes, signal.SIGKILL)
        elif life.blow == "ask to stop":
            send_to([processes[victim]], self._dice.choice([signal.SIGTERM, signal.SIGUSR2, signal.SIGINT]))
            processes[victim].join(1.0)
        elif life.blow == "stop one":
            send_to([processes[victim]], signal.SIGSTOP)
            others = [process for process in processes if process is not processes[victim]]
            # Before the first step the others' patience is that of watchdog.start_s, or of the process group.
            deadline_s = time.monotonic() + (0.0 if at_start else ENDING_S)
            for process in others:
                process.join(max(0.0, deadline_s - time.monotonic()))
            hanging = not at_start and any(process.is_alive() for process in others)
            send_to([processes[victim]], signal.SIGKILL)  # as a launcher does
            processes[victim].join()
            assert not hanging, f"the others hang\n{self.story()}"

    def _check_start(self, life: Life, *, at_start: bool) -> None:
        """That the life began where the newest sound checkpoint stood, and not at step 0."""
        starts = self._starts()
        if len(starts) > self._known_starts:  # it came so far
            assert starts[-1]["found_step"] == life.named_step, self.story()
        first = _STEP_LINE.search(self._log())
        if first is not None:
            assert int(first[1]) == life.expected_step + 1, self.story()
        self._known_starts = len(starts)
        if life.blow == "ask to stop" and not at_start and any(status != 0 for status in life.statuses):
            assert life.statuses == [75] * life.topology[0], self.story()


def send_to(processes: list, number: int) -> None:
    """Send a signal to those that are still there."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


class Ranks(list):
    """Processes by rank, and the port where they meet."""

    port: int


@contextlib.contextmanager
def started_ranks(world_size: int, arguments: list[str], log: Path, fault: tuple[int, str, int]) -> Iterator[list]:
    """Ranks of `vitscale ARGUMENTS` in processes of their own, as torchrun starts them; none outlives the block."""
    context = forkserver_context()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = Ranks()
    processes.port = store.port
    try:
        for rank in range(world_size):
            environment = rank_environment(rank, world_size, store.port)
            process = context.Process(target=_run_rank, args=(rank, arguments, environment, log, fault))
            process.start()
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.join()


def _run_rank(
    rank: int, arguments: list[str], environment: dict[str, str], log: Path, fault: tuple[int, str, int]
) -> None:
    os.setsid()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    victim, phase, call = fault
    if phase and rank == victim:
        _arm(phase, call)
    sys.argv = ["vitscale", *arguments]
    main(arguments)


_DEADLY = {
    "copied": (Snapshot, "take", True),
    "file written": (Snapshot, "write", True),
    "record left": (saving_module, "leave_record", True),
    "records collected": (saving_module, "collect_records", True),
    "index written": (saving_module, "write_index", True),
    "manifest written": (store_module, "write_manifest", True),
    "renamed": (store_module, "replace_file", False),
    "pruning": (CheckpointStore, "prune", False),
}
"""Phase of a save -> the call in which a rank dies, and whether when it is done."""


def _arm(phase: str, call: int) -> None:
    """Have this rank kill itself in a phase of its `call`-th save, or read a clock that goes back."""
    seen = 0

    def die_in(holder: object, name: str, *, after: bool) -> None:
        real: Callable = getattr(holder, name)

        def fatal(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen >= call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if seen >= call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(holder, name, fatal)

    def write_half(self, path):
        nonlocal seen
        seen += 1
        if seen < call:
            return real_write(self, path)
        chunks = list(self._chunks())
        path.write_bytes(b"".join(chunks)[: (len(chunks[0]) + self.size_bytes) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    real_write = Snapshot.write
    if phase in _DEADLY:
        holder, name, after = _DEADLY[phase]
        die_in(holder, name, after=after)
    elif phase == "half a file":
        Snapshot.write = write_half
    else:
        assert phase == CLOCK_SET_BACK, phase
        hours = itertools.count()
        time.time = lambda: 1e9 - 3600.0 * next(hours)


def damage_checkpoints(store: CheckpointStore, damage: str, dice: random.Random) -> None:
    """Do to the newest tag, or to the pointer, what disks and people do."""
    newest = store.path(store.tags()[-1])
    pointer = store.root / store_module.POINTER_NAME
    file = dice.choice(sorted(newest.glob("rank-*.safetensors")))
    manifest = newest / "manifest.json"
    match damage:
        case "truncated file":
            os.truncate(file, file.stat().st_size // 2)
        case "flipped bits":
            _flip(file, dice)
        case "no manifest":
            manifest.unlink(missing_ok=True)
        case "flipped manifest":
            if manifest.exists():
                _flip(manifest, dice)
        case "no pointer":
            pointer.unlink(missing_ok=True)
        case "empty pointer":
            pointer.write_text("")
        case "bogus pointer":
            pointer.write_text("step-99999999\n")
        case _:
            raise AssertionError(damage)


def _flip(file: Path, dice: random.Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(8):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)

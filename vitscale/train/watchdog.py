"""Ends a run that stands still, and says which rank stands still where.

The trainer names the section it is in; a thread of every rank counts the time in it and leaves a beat in RUN/watchdog.
A request to stop has a beat of its own: should the run be killed before it gets to save, that is no failure.
When a section's limit has passed on a rank, that rank raises the alarm, a file in the same folder. All ranks dump the
stacks of all their threads then; whoever writes none is the one to look for: stopped, or lost with its node. The
rank that raised the alarm judges, writes the verdict into RUN/exit.json, and all end hard, for a main thread that
hangs in a collective hears nothing else.

Nothing here is a collective once it has started, nor waits for the device. On thousands of ranks a beat costs each a
write of 512 bytes to an open file and one question whether the alarm is there, every `beat_s`.
"""

import contextlib
import faulthandler
import json
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import BinaryIO, Self, TypeVar

from vitscale.config import WatchdogSection
from vitscale.errors import ExitStatus, RunDirectoryError
from vitscale.ranks.groups import Ranks
from vitscale.train.beats import FOLDER_NAME, Beat, Part, beat_file, read_beat, verdict
from vitscale.train.lock import ProcessMark
from vitscale.train.run_directory import RunDirectory
from vitscale.train.stop import StopRequest
from vitscale.train.together import as_one, on_main

log = logging.getLogger(__name__)

T = TypeVar("T")

_STDERR = 2
_LOOKS_A_BEAT = 4
_LONGEST_LOOK_S = 1.0


class Watchdog:
    """Watches over one rank. Until it is started it only keeps the names of sections."""

    def __init__(self, config: WatchdogSection, ranks: Ranks, directory: RunDirectory, stop: StopRequest) -> None:
        """Nothing is watched yet.

        Args:
            config: the limits.
            ranks: of the run.
            directory: of the run, taken over.
            stop: this rank's request, of which the beats tell.
        """
        self._limits_s: Mapping[Part, float | None] = MappingProxyType(
            {
                Part.START: config.start_s,
                Part.DATA: config.data_s,
                Part.STEP: config.step_s,
                Part.VALIDATION: config.validation_s,
                Part.SAVE: config.save_s,
            }
        )
        self._beat_s = config.beat_s
        self._answer_s = config.answer_s
        self._ranks = ranks
        self._host, self._mark = socket.gethostname(), ProcessMark.own()
        self._directory = directory
        self._stop = stop
        self._told = False
        self._folder = directory.path / FOLDER_NAME
        self._alarm = self._folder / f"alarm-{directory.generation}.json"
        self._at = (Part.START, 0)  # a new tuple at each change, so that the thread knows one from another
        self._seen = self._at
        self._stay_s = 0.0
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._file: BinaryIO

    def start(self) -> Self:
        """Watch from here on. Collective.

        Raises:
            RunDirectoryError: some rank cannot write in the run directory.
        """
        on_main(self._ranks, self._clear)
        fault = ""
        try:
            self._file = beat_file(self._directory.path, self._ranks.rank).open("wb", buffering=0)
            self._write(self._beat())
        except OSError as error:
            fault = f"rank {self._ranks.rank} on {self._host}: {error.strerror}"
        if faults := [text for text in self._ranks.gather_objects(fault) if text]:
            raise as_one(
                self._ranks,
                RunDirectoryError(
                    f"{self._folder}: not every rank can write there ({faults[0]}): "
                    "run.dir must be one directory that all nodes see"
                ),
            )
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Watch no longer."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._file.close()

    def enter(self, part: Part, step: int) -> None:
        """From here on this rank is in that section, `step` steps of the run being done; its time begins."""
        self._at = (part, step)

    @contextlib.contextmanager
    def within(self, part: Part) -> Iterator[None]:
        """What happens inside belongs to that section; after it, the time of the one around it begins anew."""
        around, step = self._at
        self.enter(part, step)
        try:
            yield
        finally:
            self.enter(around, step)

    def each(self, part: Part, items: Iterator[T]) -> Iterator[T]:
        """The same items; waiting for each belongs to that section."""
        while True:
            with self.within(part):
                item = next(items, None)
            if item is None:
                return
            yield item

    def _clear(self) -> None:
        """Remove what earlier starts left, but for the stacks of the last one that hung: a person may want to see them.

        Raises:
            RunDirectoryError: the folder cannot be written.
        """
        try:
            self._folder.mkdir(exist_ok=True)
            stacks = {path: path.name.split("-")[1] for path in self._folder.glob("stacks-*")}
            newest = max(stacks.values(), key=int, default="")
            for path in self._folder.iterdir():
                if stacks.get(path) != newest or not newest:
                    path.unlink()
        except (OSError, ValueError) as error:
            raise RunDirectoryError(f"{self._folder}: cannot be cleared: {error}: remove it") from None

    def _watch(self) -> None:
        last_s = time.monotonic()
        while self._pause():
            now_s = time.monotonic()
            # A process that was itself stopped for a while (a suspended job, a sleeping laptop) did not hang meanwhile.
            over = self._count(min(now_s - last_s, 2 * self._beat_s))
            last_s = now_s
            with contextlib.suppress(OSError):  # a full disk is the save's to tell
                self._tell()
            with contextlib.suppress(OSError):  # apart, for the lock's lease runs out without it
                self._directory.beat()
            if over or self._alarm_is_raised():
                self._end(over)

    def _pause(self) -> bool:
        """Wait for the next beat, which comes early once the run is asked to stop; whether to go on watching."""
        for _ in range(math.ceil(self._beat_s / self._look_s)):
            if self._closing.wait(self._look_s):
                return False
            if self._stop.reason is not None and not self._told:
                break
        return True

    def _alarm_is_raised(self) -> bool:
        try:
            return self._alarm.exists()
        except OSError:  # a server that stumbles: the next look will tell
            return False

    def _count(self, passed_s: float) -> bool:
        """Whether the rank is over its limit. Time counts from the first look that finds it in the section."""
        if self._at is not self._seen:
            self._seen, self._stay_s = self._at, 0.0
            return False
        self._stay_s += passed_s
        limit_s = self._limits_s[self._seen[0]]
        return limit_s is not None and self._stay_s > limit_s

    def _beat(self) -> Beat:
        part, step = self._seen
        return Beat(
            self._directory.generation,
            self._ranks.rank,
            self._host,
            self._mark,
            part,
            step,
            round(self._stay_s, 1),
            time.time(),
            asked=self._stop.reason is not None,
        )

    def _tell(self) -> None:
        beat = self._beat()
        self._write(beat)
        if beat.asked and not self._told:
            os.fsync(self._file.fileno())  # a preempted node may be switched off next
            self._told = True

    def _write(self, beat: Beat) -> None:
        os.pwrite(self._file.fileno(), beat.encode(), 0)

    def _end(self, over: bool) -> None:
        """Dump the stacks, judge or wait for the verdict, and end the process."""
        # Should this thread hang too, on a dead file system or a full pipe, faulthandler ends the process in its place.
        faulthandler.dump_traceback_later(4 * self._answer_s, exit=True, file=_STDERR)
        try:
            judges = over and self._raise_alarm()
            self._answer()
            if judges:
                self._judge()
            else:
                self._wait_for_verdict()
            self._kill_silent_neighbours()
        except BaseException as error:  # whatever stands in the way, such as a full disk: the run does not hang
            log.error("rank %d: %s: no verdict could be written: %r", self._ranks.rank, self._place(), error)
        finally:
            os._exit(ExitStatus.TRANSIENT)

    def _raise_alarm(self) -> bool:
        """Whether this rank is the first to."""
        try:
            with self._alarm.open("x", encoding="utf-8") as file:
                json.dump({"rank": self._ranks.rank, "place": self._place(), "time": time.time()}, file)
        except FileExistsError:
            return False
        return True

    def _answer(self) -> None:
        name = f"stacks-{self._directory.generation}-rank-{self._ranks.rank:05d}.txt"
        with (self._folder / name).open("w", encoding="utf-8") as file:
            file.write(f"rank {self._ranks.rank} on {self._host}, pid {self._mark.pid}: {self._place()}\n")
            file.flush()
            faulthandler.dump_traceback(file)
        self._write(replace(self._beat(), answered=True))
        os.fsync(self._file.fileno())  # else NFS would keep it from the others for a while

    def _judge(self) -> None:
        beats: dict[int, Beat | None] = dict.fromkeys(range(self._ranks.world_size))
        deadline_s = time.monotonic() + self._answer_s
        while True:
            silent = [rank for rank, beat in beats.items() if beat is None or not beat.answered]
            beats |= {rank: read_beat(self._directory.path, rank, self._directory.generation) for rank in silent}
            if all(beat is not None and beat.answered for beat in beats.values()) or time.monotonic() > deadline_s:
                break
            time.sleep(self._look_s)
        reason = verdict(beats, self._limits_s[self._seen[0]], self._folder, self._directory.generation)
        log.error("%s", reason)
        self._directory.record_end(ExitStatus.TRANSIENT, reason, self._seen[1])

    def _wait_for_verdict(self) -> None:
        deadline_s = time.monotonic() + 2 * self._answer_s
        while not self._directory.has_ended() and time.monotonic() < deadline_s:
            time.sleep(self._look_s)

    def _kill_silent_neighbours(self) -> None:
        """A stopped process keeps its GPU, and its job the nodes, until someone kills it. Ranks of a node do that."""
        first = self._ranks.rank - self._ranks.local_rank
        for rank in range(first, first + self._ranks.local_world_size):
            beat = read_beat(self._directory.path, rank, self._directory.generation)
            silent = beat is not None and not beat.answered and rank != self._ranks.rank
            if beat is not None and silent and beat.mark.is_local() and beat.mark.is_alive():
                os.kill(beat.mark.pid, signal.SIGKILL)

    @property
    def _look_s(self) -> float:
        return min(self._beat_s / _LOOKS_A_BEAT, _LONGEST_LOOK_S)

    def _place(self) -> str:
        part, step = self._seen
        return f"in section {part} for {self._stay_s:.1f} s after step {step}"

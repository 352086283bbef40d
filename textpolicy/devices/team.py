"""The ranks of one run, of which this process is one, exchange values, deal out work, and end together.

Rank 0 has a link to each of the others (``multiprocessing.connection``, behind a key). Every rank says what it is
doing, and that it lives, once a second. A rank that fails, dies, falls silent or is waited for longer than the deadline
ends all the others, wherever they are, with a sentence that says so.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from .._system.terminal import one_line
from ..errors import RankError, StoppedError
from .dealing import deal

BEAT, TICK = 1.0, 0.2  # seconds between signs of life, and between looks at what others have sent
SILENCE = 30.0  # seconds without one after which a rank is taken for stopped, or half the deadline if that is less
GRACE = 5.0  # seconds that a rank has to end by itself, once another has failed
SAMPLING, SCORING, UPDATING = "sampling", "scoring completions", "updating"  # phases
_UNEQUAL = 1.1  # machines of which one is faster by less are dealt equal work


@dataclass(frozen=True, slots=True)
class Member:
    """The process of a rank."""

    host: str
    process: int
    machine: str  # the same for ranks that share processors and memory
    device: str  # in words; ranks of different devices are dealt work by how fast they are

    def __str__(self) -> str:
        return self.host


@dataclass(eq=False)
class Team:
    """The ranks of a run; alone, a run has a team of one, which waits for nobody."""

    rank: int = 0
    members: Sequence[Member] = (Member("", os.getpid(), "", ""),)
    links: Mapping[int, Connection] = field(default_factory=dict)  # rank 0: to all others; each of them: to rank 0
    deadline: float = 600.0  # seconds that a rank is waited for
    last_words: Callable[[int], str] = lambda rank: ""  # of a rank that this process started and that is dead
    voice: int = 2  # the descriptor that a rank above 0 says a failure to, where rank 0 cannot
    remedy: str = "start it again"  # what to do when a rank has ended the run

    def __post_init__(self) -> None:
        self.failure: str | None = None  # the sentence that ended the team
        self.relayed = False  # rank 0 has said it
        self.speeds = [1.0] * self.size  # of rollouts, tokens per second, or all 1 as long as none were measured
        self.busy: dict[str, float] = defaultdict(float)  # seconds of work since the last ``figures``, by phase
        self.waited: dict[str, float] = defaultdict(float)  # seconds for others
        self.tokens = 0.0  # sampled here since then
        self.since = time.perf_counter()
        self._phase, self._count = "starting", 0
        self._phases = dict.fromkeys(range(self.size), "starting")
        self._silent = dict.fromkeys(self.links, 0)  # beats of this rank since it heard of each
        self._came: dict[tuple[int, int], Any] = {}  # (rank, number of the exchange) -> value
        self._news = threading.Condition()
        self._taken: dict[int, int] = defaultdict(int)  # of each queue of work, at rank 0
        self._left: set[int] = set()  # ranks that have ended well
        self._locks = {rank: threading.Lock() for rank in self.links}
        self._closed = threading.Event()
        self._main = threading.get_ident()
        for rank in self.links:
            threading.Thread(target=self._listen, args=(rank,), daemon=True).start()
        if self.links:
            threading.Thread(target=self._beat, daemon=True).start()

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.members)

    @property
    def sharing(self) -> int:
        """The number of ranks that share the processors and the memory of this one's machine, itself included."""
        return sum(member.machine == self.members[self.rank].machine for member in self.members)

    @property
    def mixed(self) -> bool:
        """The answer to whether ranks have different devices, of which one may be faster."""
        return len({member.device for member in self.members}) > 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Send the other ranks word of how this one ended. Raises RankError where another had failed."""
        if self.size == 1 or self._closed.is_set():
            return
        if self.failure is not None:
            if not self.relayed:
                self._tell(("failed", self.failure))
        elif error is None or isinstance(error, StoppedError):
            self._tell(("left",))
        else:
            why = one_line(str(error)) or type(error).__name__
            self._tell(("failed", f"{self._name(self.rank)} failed while {self._phase} ({why}); {self.remedy}"))
        self._closed.set()
        if self.failure is not None:
            if self.rank:
                self._say()
            raise RankError("" if self.rank else self.failure) from None

    def part(self) -> None:
        """Let every rank end by itself, once all have come here. Raises RankError."""
        self.exchange(None)
        if self.size > 1:
            self._closed.set()

    # ---- exchange

    def exchange(self, value: Any) -> list[Any]:
        """Return the value of every rank, in their order; all must call this in the same order. Raises RankError."""
        if self.size == 1:
            return [value]
        number, self._count = self._count, self._count + 1
        started = time.perf_counter()
        try:
            if self.rank:
                self._send(0, ("value", number, value))
                values: list[Any] = self._await(0, number)
            else:
                values = [value, *(self._await(rank, number) for rank in range(1, self.size))]
                for rank in self.links:
                    self._send(rank, ("value", number, values))
        finally:
            self.waited[self._phase] += time.perf_counter() - started
        return values

    def first(self, value: Any) -> Any:
        """Return rank 0's value. Raises RankError."""
        return self.exchange(None if self.rank else value)[0]

    @contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        """Count the seconds of the context as those of a ``phase``, in words that follow "while"."""
        before, started, waited = self._phase, time.perf_counter(), self.waited[phase]
        self._enter(phase)
        try:
            yield
        finally:
            self.busy[phase] += time.perf_counter() - started - (self.waited[phase] - waited)
            if self.failure is None and sys.exc_info()[0] is None:
                self._enter(before)

    def _enter(self, phase: str) -> None:
        self._phase = self._phases[self.rank] = phase
        if self.size > 1:
            self._tell(("doing", phase))

    # ---- work

    def share(self, costs: Sequence[float]) -> list[list[int]]:
        """Return the places of ``costs`` that each rank works on, by the speed of its device where devices differ."""
        return deal(costs, self._shares())

    def share_out(self, costs: Sequence[float], work: Callable[[Sequence[int]], tuple[list[Any], float]]) -> list[Any]:
        """Return the result of each place of ``costs``, worked out by the ranks and known to all. Raises RankError.

        ``work`` returns the results of the places that it gets, and the tokens that they took. Ranks of equal devices
        get their shares at once; where devices differ, two thirds of them, and the rest from a queue, one by one.
        """
        number, started, waited = self._count, time.perf_counter(), sum(self.waited.values())
        queued: list[int] = []
        if self.mixed:
            order = sorted(range(len(costs)), key=lambda place: -costs[place])
            ahead = order[: 2 * len(costs) // 3]
            queued = order[len(ahead) :]
            mine = [ahead[i] for i in self.share([costs[place] for place in ahead])[self.rank]]
        else:
            mine = self.share(costs)[self.rank]
        done: dict[int, Any] = {}
        tokens = 0.0
        while True:
            if mine:
                results, used = work(mine)
                done |= zip(mine, results, strict=True)
                tokens += used
            if (n := self._take(number, len(queued))) is None:
                break
            mine = [queued[n]]
        seconds = time.perf_counter() - started - (sum(self.waited.values()) - waited)
        self.tokens += tokens
        parts = self.exchange((done, tokens / seconds))
        if all(speed for _, speed in parts):
            fresh = self.speeds == [1.0] * self.size
            self.speeds = [s if fresh else (o + s) / 2 for o, (_, s) in zip(self.speeds, parts, strict=True)]
        merged = {place: result for part, _ in parts for place, result in part.items()}
        return [merged[place] for place in range(len(costs))]

    def _shares(self) -> list[float]:
        if not self.mixed or max(self.speeds) < _UNEQUAL * min(self.speeds):
            return [1.0] * self.size
        return self.speeds

    def _take(self, number: int, length: int) -> int | None:
        """Return the next place of the queue of work before exchange ``number``; None at its end."""
        if not length:
            return None
        if self.rank == 0:
            place = self._hand_out(number)
        else:
            self._send(0, ("take", number))
            place = self._await(0, -1)
        return place if place < length else None

    def _hand_out(self, number: int) -> int:
        with self._news:
            place, self._taken[number] = self._taken[number], self._taken[number] + 1
            return place

    def figures(self, digest: Any) -> dict[str, float]:
        """Return the speed and the seconds of waiting of every rank since the last call; {} for one rank.

        ``wall_seconds`` have passed since then, and ``scaling`` is the share of them that ranks worked. ``digest``
        stands for what must be equal in all ranks after a step. Raises RankError where it is not.
        """
        if self.size == 1:
            return {}
        own = (digest, self.tokens, dict(self.busy), dict(self.waited), time.perf_counter() - self.since)
        self.busy.clear()
        self.waited.clear()
        self.tokens, self.since = 0.0, time.perf_counter()
        row, worked, wall = {}, 0.0, 0.0
        every = self.exchange(own)
        for rank, (other, tokens, busy, waited, seconds) in enumerate(every):
            if other != every[0][0]:
                raise RankError(
                    f"{self._name(rank)} has not the weights of rank 0 any more, so the devices do not compute alike; "
                    f"leave it out, and {self.remedy}"
                )
            sampling = busy.get(SAMPLING, 0.0)
            row[f"rank_{rank}_tokens_per_second"] = tokens / sampling if sampling else 0.0
            for phase, name in ((SAMPLING, "sampling"), (UPDATING, "updating")):
                row[f"rank_{rank}_waited_{name}"] = waited.get(phase, 0.0)
            worked += seconds - sum(waited.values())
            wall = max(wall, seconds)
        return {**row, "wall_seconds": wall, "scaling": worked / (self.size * wall)}

    # ---- links

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.members[rank]}"

    def _send(self, rank: int, message: Any) -> None:
        """Send ``message``; what cannot be sent is noticed by whoever listens."""
        with self._locks[rank], suppress(OSError, ValueError):
            self.links[rank].send(message)

    def _tell(self, message: Any) -> None:
        """Send ``message`` to all who can be reached at once."""
        for rank, lock in self._locks.items():
            if lock.acquire(timeout=BEAT):
                with suppress(OSError, ValueError):
                    self.links[rank].send(message)
                lock.release()

    def _await(self, rank: int, number: int) -> Any:
        ticks = 0
        with self._news:
            while (rank, number) not in self._came:
                if self.failure is not None:
                    raise RankError(self.failure)
                if rank in self._left:
                    self._fail(f"{self._name(rank)} has ended before the others; {self.remedy}")
                elif ticks * TICK > self.deadline:
                    self._fail(
                        f"{self._name(rank)} has been {self._phases[rank]} for longer than the others can wait "
                        f"({self.deadline:g} s); raise machine.deadline if that is no fault, and {self.remedy}"
                    )
                else:
                    ticks += not self._news.wait(TICK)
            return self._came.pop((rank, number))

    def _listen(self, rank: int) -> None:
        """Take what ``rank`` sends, until it ends."""
        while True:
            try:
                kind, *rest = self.links[rank].recv()
            except (EOFError, OSError, TypeError, ValueError):
                break
            self._silent[rank] = 0
            with self._news:
                match kind:
                    case "value":
                        self._came[rank, rest[0]] = rest[1]
                    case "taken":
                        self._came[rank, -1] = rest[0]
                    case "doing":
                        self._phases[rank] = rest[0]
                    case "left":
                        self._left.add(rank)
                    case "failed":
                        self.relayed = self.rank > 0
                        self._fail(rest[0])
                self._news.notify_all()
            if kind == "take":
                self._send(rank, ("taken", self._hand_out(rest[0])))
        if not self._closed.is_set() and rank not in self._left:
            words = self.last_words(rank)
            self._fail(f"{self._name(rank)} died while {self._phases[rank]}{words}; {self.remedy}")

    def _beat(self) -> None:
        """Say that this rank lives, and notice who does not."""
        silence = min(SILENCE, self.deadline / 2)
        while not self._closed.wait(BEAT):
            self._tell(("doing", self._phase))
            for rank in self.links:
                self._silent[rank] += 1  # by its own beats: a rank that was stopped with all others goes on with them
                if rank not in self._left and self._silent[rank] * BEAT > silence:
                    self._fail(
                        f"{self._name(rank)} has not answered for {silence:g} s, while {self._phases[rank]}; "
                        f"{self.remedy}",
                        self.members[rank],
                    )

    def _fail(self, sentence: str, stopped: Member | None = None) -> None:
        """End the team: tell the other ranks, and make this one's main thread raise RankError, or end the process.

        A ``stopped`` rank of this machine is killed, since it would stay.
        """
        if self.failure is not None or self._closed.is_set():
            return
        self.failure = sentence
        if stopped is not None and stopped.machine == self.members[self.rank].machine:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(stopped.process, signal.SIGKILL)
        threading.Thread(target=self._end, daemon=True).start()

    def _end(self) -> None:
        if not self.relayed:
            self._tell(("failed", self.failure))
        if not self._closed.wait(BEAT):  # it waits for no other rank, which would have told it
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._main), ctypes.py_object(RankError))
        if not self._closed.wait(GRACE):
            self._say()
            os._exit(1)

    def _say(self) -> None:
        """Write the failure to the terminal, unless rank 0 does."""
        if not self.relayed:
            shown = "\033[?25h" if os.isatty(self.voice) else ""  # the cursor, which a live view hides
            with suppress(OSError):
                os.write(self.voice, f"{shown}textpolicy: {self.failure}\n".encode())


ALONE = Team()

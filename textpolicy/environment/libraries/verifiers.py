"""The environments and harnesses of verifiers, unchanged, with our engine as the model behind its client."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import shutil
import sysconfig
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from itertools import islice
from typing import Any

from ..._system.extras import extra
from ...engine import Engine, sample_from
from ...errors import TextPolicyError, UserError
from ...types import Episode
from ..base import DrivenEnv, Wanted
from ..text.calls import Grammar, ParseCalls, grammar_of
from ..text.conversation import ChatCodec
from ..text.pieces import Pieces
from .served import ModelServer, Request, Session

logger = logging.getLogger(__name__)

INSTALL = "textpolicy[verifiers]"
_POLL = 0.05  # seconds


def verifiers_env(
    taskset: str,
    *,
    tokenizer: Any,
    harness: str = "null",
    limit: int | None = None,
    config: Mapping[str, Any] | None = None,
    **settings: Any,
) -> VerifiersEnv:
    """Return the environment of an installed taskset, by its id; needs verifiers 0.4.

    ``harness`` names the program that talks to the model; "null" is verifiers' chat loop, which calls the taskset's
    tools and executes nothing else. It runs as processes on this machine. ``config`` overrides entries of the
    environment's configuration (verifiers' SingleAgentEnvConfig), ``settings`` are those of
    ``VerifiersEnv``. Raises UserError, MissingDependencyError.
    """
    vf = extra("verifiers.v1", INSTALL)
    agent = {"harness": {"id": harness}, "runtime": {"type": "subprocess"}}
    values = {"taskset": {"id": taskset}, "agent": agent, **(config or {})}
    try:
        loaded = extra("verifiers.v1.utils.loaders", INSTALL).load_environment(vf.SingleAgentEnvConfig(**values))
    except (ModuleNotFoundError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"verifiers cannot load the taskset {taskset!r} ({error}); install it, or fix config"
        ) from error
    return VerifiersEnv(loaded, tokenizer=tokenizer, limit=limit, **settings)


class VerifiersEnv(DrivenEnv):
    """The verifiers environment with one agent; prompt i is its task i, and the reward is the trace's.

    The harness sends its requests to a local port, and the engine answers them, those of all episodes together, and
    keeps their exact tokens. An episode that fails in verifiers is unscorable.
    """

    def __init__(
        self,
        env: Any,
        *,
        tokenizer: Any,
        limit: int | None = None,
        concurrency: int = 32,
        patience: float = 10.0,
        max_episode_tokens: int | None = None,
        parse: ParseCalls | None = None,
        is_correct: Callable[[float], bool] = lambda reward: reward >= 1,
        template_args: Mapping[str, Any] | None = None,
        day: date | None = None,
    ) -> None:
        """Use the first ``limit`` tasks of ``env``, a verifiers ``Env``.

        ``concurrency`` bounds the episodes, and so the harness processes, that run at a time. The engine
        answers once all of them are waiting, or after ``patience`` seconds. A turn that would not fit into
        ``max_episode_tokens`` is refused, and the episode truncated. ``parse`` finds tool calls in a turn, by default
        in the grammar of the chat template. ``template_args`` and ``day`` are those of ``TextGenerationEnv``. Raises
        UserError.
        """
        if concurrency < 1 or not patience > 0:
            raise UserError(f"concurrency is {concurrency} and patience {patience}; set both above 0")
        if limit is None and not env.taskset.bounded:
            raise UserError(f"the taskset {type(env.taskset).__name__} has no end; give a limit")
        self.env, self.tasks = env, list(islice(env.taskset, limit))
        if not self.tasks:
            raise UserError(f"the taskset {type(env.taskset).__name__} has no tasks; check its config")
        self.concurrency, self.patience, self.max_episode_tokens = concurrency, patience, max_episode_tokens
        self.parse, self.is_correct = parse, is_correct
        self.codec, self.tokenizer = ChatCodec.of(tokenizer, template_args, day), tokenizer
        self._pieces = Pieces(self.codec.decode)
        put_uv_on_the_path()

    @cached_property
    def grammar(self) -> Grammar:
        """The grammar in which the chat template has tools called. Raises UserError for one that is not known."""
        return grammar_of(self.codec, self.tokenizer)

    def __len__(self) -> int:
        """The number of tasks."""
        return len(self.tasks)

    def prompt_text(self, i: int) -> str:
        """Return task ``i`` as a person reads it."""
        return self.tasks[i].data.prompt_text

    def play(self, engine: Engine, wanted: Wanted) -> list[Episode]:
        """Play and score the episodes, as ``loop.collect.collect``. Raises UserError if every episode fails."""
        groups = zip(wanted.numbers, wanted.prompts, strict=True)
        plan = [(i, group) for group, i in groups for _ in range(wanted.group_size)]
        with ModelServer() as server:
            game = _Game([self.tasks[i] for i, _ in plan], self.concurrency)
            thread = threading.Thread(target=game.run, args=(self.env, server.url), daemon=True)
            thread.start()
            sessions = _Answers(self, engine, wanted, game, server).until_over()
            thread.join()
        if game.failure is not None:
            raise UserError(f"verifiers could not play ({game.failure}); fix its environment") from game.failure
        if not any(trace.ok for trace in game.traces):
            raise UserError(f"every episode of verifiers failed, the first with: {_first_error(game.traces[0])}")
        episodes = []
        for trace, (i, group) in zip(game.traces, plan, strict=True):
            session = sessions.get(trace.id)
            if session is None or not session.turns:
                continue
            if not trace.ok:
                logger.warning("an episode of verifiers failed and is unscorable: %s", _first_error(trace))
            reward = float(trace.reward) if trace.ok else math.nan
            read = session.turns if wanted.pieces else ()
            episode = Episode.from_turns(
                session.prompt,
                session.turns,
                session.added,
                reward=reward,
                is_correct=self.is_correct(reward) if trace.ok else None,
                group=group,
                prompt=self.prompt_text(i),
                text=trace.transcript,
                truncated=bool(trace.is_truncated) or session.turns[-1].truncated,
                pieces=tuple(piece for turn in read for piece in self._pieces(turn.tokens)),
            )
            episodes.append(episode)
        return episodes


@dataclass(eq=False)
class _Game:
    """The episodes of verifiers, played in a thread with an event loop of its own."""

    tasks: Sequence[Any]
    concurrency: int
    traces: list[Any] = field(default_factory=list)  # one per task, once over
    place: dict[str, int] = field(default_factory=dict)  # a trace's id -> the number of its task
    done: int = 0
    over: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None

    def run(self, env: Any, url: str) -> None:
        """Play all tasks, and store the traces or the failure."""
        try:
            self.traces = asyncio.run(self._play(env, url))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the waiting thread raises it
            self.failure = error
        finally:
            self.over.set()

    async def _play(self, env: Any, url: str) -> list[Any]:
        vf = extra("verifiers.v1", INSTALL)
        client = vf.EvalClientConfig(base_url=url, api_key_var="TEXTPOLICY_NO_KEY")
        context = vf.ModelContext(model="textpolicy", client=client)
        gate = asyncio.Semaphore(self.concurrency)
        async with env.serving():
            return list(await asyncio.gather(*(self._one(env, n, context, gate) for n in range(len(self.tasks)))))

    async def _one(self, env: Any, n: int, context: Any, gate: asyncio.Semaphore) -> Any:
        [slot] = env.slots(self.tasks[n], 1)
        minted: list[Any] = []

        def note(trace: Any) -> None:
            minted.append(trace)
            self.place[trace.id] = n

        episode = await env.run_slot(slot, context, gate, on_trace=note)
        self.done += len(minted)
        if len(episode.traces) != 1:
            why = episode.errors[0].message if episode.errors else f"{len(episode.traces)} agents took part"
            raise UserError(f"an episode of verifiers has no single trace ({why}); use an environment with one agent")
        return episode.traces[0]


@dataclass(eq=False)
class _Answers:
    """The engine's answers to a game's requests, in the order of their tasks, as many as possible at a time."""

    env: VerifiersEnv
    engine: Engine
    wanted: Wanted
    game: _Game
    server: ModelServer
    sessions: dict[str, Session] = field(default_factory=dict)
    rounds: int = 0

    def until_over(self) -> dict[str, Session]:
        """Answer requests until the game is over and return the conversations of all episodes, by trace."""
        waiting: list[Request] = []
        waited = 0.0
        try:
            while not self.game.over.is_set():
                before = len(waiting)
                waiting = self.server.waiting(waiting, _POLL)
                waited = 0.0 if len(waiting) > before else waited + _POLL
                running = len(self.game.place) - self.game.done  # episodes that could send a request now
                if waiting and (len(waiting) >= running or waited >= self.env.patience):
                    self._answer(sorted(waiting, key=lambda r: self.game.place.get(r.session, -1)))
                    waiting = []
        finally:  # no request stays unanswered, whatever the engine raised
            for request in waiting:
                request.refuse("the episode is over")
        return self.sessions

    def _answer(self, requests: Sequence[Request]) -> None:
        """Sample a turn for every request that continues its conversation and has room for one; refuse the others."""
        taken: list[tuple[Request, Session, list[int]]] = []
        for request in requests:
            new = Session(self.env.codec, self.env.parse, lambda: self.env.grammar)
            session = self.sessions.setdefault(request.session, new)
            try:
                tokens = session.take(request.messages, request.tools)
            except TextPolicyError as error:
                request.refuse(str(error))
                continue
            room = self.env.max_episode_tokens
            if room is not None and len(tokens) - len(session.prompt) + self.wanted.sampling.max_tokens > room:
                session.drop_request()
                request.reply({"role": "assistant", "content": ""}, "length", (len(tokens), 0))
            else:
                taken.append((request, session, tokens))
        drawn, streams = self.wanted.sampling.reseeded(self.rounds), self.wanted.streams
        self.rounds += 1
        places = [streams[self.game.place[request.session]] for request, _, _ in taken]
        sampled = sample_from(self.engine, [tokens for _, _, tokens in taken], 1, drawn, places) if taken else []
        for (request, session, tokens), [completion] in zip(taken, sampled, strict=True):
            message = session.add(completion, len(session.turns))
            finish = "length" if completion.truncated else "tool_calls" if "tool_calls" in message else "stop"
            request.reply(message, finish, (len(tokens), len(completion.tokens)))


def put_uv_on_the_path() -> None:
    """Add the folder of the uv beside this Python to a PATH without uv, as outside an activated environment.

    Without any, verifiers would fetch one from the network.
    """
    beside = sysconfig.get_path("scripts")
    if shutil.which("uv") is None and shutil.which("uv", path=beside) is not None:
        os.environ["PATH"] = os.pathsep.join(filter(None, [os.environ.get("PATH"), beside]))


def _first_error(trace: Any) -> str:
    """Return the first error of a trace, or the condition that stopped it."""
    return trace.errors[0].message if trace.errors else f"it stopped with {trace.stop_condition}"

"""The environments of more than one turn: a partner replies to the policy, or the policy calls tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from typing import Any, ClassVar

from ..errors import UserError, refuse_outside
from ..rewards.contract import RewardFunction
from .single_turn import PartnerFactory, TextGenerationEnv, items
from .text.calls import CallReader, ParseCalls, grammar_of
from .text.conversation import ChatCodec, Prompt, Reply, Schema, as_messages, read_prompt
from .tools import Tool, ToolPartner, describe_tools

Describe = Callable[[Sequence[Schema]], str]  # instructions for the policy, "" for none


class MultiTurnEnv(TextGenerationEnv):
    """The environment with a partner that replies to every turn of the policy until the episode ends.

    An episode is one row of tokens: prompt, turn, reply, turn, ... Turns stay exactly as they were
    sampled; replies are tokenised once, in the chat template, and take no part in loss or credit. The episode ends
    when the partner sends no message, or truncated: by a turn that was cut off, after ``max_turns`` turns, or without
    room for another turn in ``max_episode_tokens``.
    """

    single_turn: ClassVar[bool] = False

    def __init__(
        self,
        prompts: Sequence[Prompt],
        partner_fn: PartnerFactory,
        reward_fn: RewardFunction | None = None,
        max_tokens: int = 256,
        *,
        tokenizer: Any = None,
        examples: Sequence[Mapping[str, Any]] | None = None,
        group_size: int = 1,
        chat: bool | None = None,
        max_turns: int = 8,
        max_episode_tokens: int | None = None,
        template_args: Mapping[str, Any] | None = None,
        day: date | None = None,
    ) -> None:
        """Tokenise the prompts; arguments not explained here are those of ``TextGenerationEnv``.

        ``partner_fn(example)`` makes the partner of one episode. ``max_tokens`` bounds a turn,
        ``max_episode_tokens`` all turns and replies of an episode. ``reward_fn`` is called once, at the end,
        with the last turn as ``completion``, and may also take ``messages``, the conversation from the prompt
        on, and ``replies``, a ``Reply`` for each answered turn. Without it the reward is the sum of the
        replies' rewards. Raises UserError.
        """
        refuse_outside("max_turns", max_turns, 1, whole=True)
        if max_episode_tokens is not None and max_episode_tokens < max_tokens:
            raise UserError(
                f"max_episode_tokens is {max_episode_tokens} and a turn alone may have {max_tokens}; raise it to that"
            )
        self.partner_fn, self.max_turns, self.max_episode_tokens = partner_fn, max_turns, max_episode_tokens
        super().__init__(
            prompts,
            reward_fn or sum_of_turns,
            max_tokens,
            tokenizer=tokenizer,
            examples=examples,
            group_size=group_size,
            chat=chat,
            template_args=template_args,
            day=day,
        )
        if chat is False:
            self._codec = replace(self._codec, template=None)
        if self._codec.template is not None and max_turns > 1:  # one that cannot be continued is refused before a run
            ask = [{"role": "user", "content": "?"}]
            self._codec.continuation(as_messages(self.prompts[0]), ask, None, self.schemas)


def sum_of_turns(
    prompt: str, completion: str, example: Mapping[str, Any], replies: Sequence[Reply] = (), **_: Any
) -> dict[str, Any]:
    """Return the sum of the replies' rewards, and is_correct of the last reply that reports it."""
    reported = [reply.is_correct for reply in replies if reply.is_correct is not None]
    return {"reward": sum(reply.reward for reply in replies), "is_correct": reported[-1] if reported else None}


class ToolEnv(MultiTurnEnv):
    """The environment with Python functions that the policy may call; a turn without a call is its answer.

    The functions run in this process, unconfined. Their results, the errors they raise and the mistakes in
    malformed calls are sent to the policy as messages.
    """

    special: ClassVar[bool] = True  # calls may stand between special tokens

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tools: Sequence[Callable[..., Any]],
        reward_fn: RewardFunction,
        max_tokens: int = 256,
        *,
        tokenizer: Any = None,
        tool_seconds: float = 5.0,
        parse: ParseCalls | None = None,
        describe: Describe | None = None,
        **settings: Any,
    ) -> None:
        """Put the tools into the prompts; the other ``settings`` are those of ``MultiTurnEnv``.

        ``tools`` are typed functions with docstrings. The chat template gets their schemas; if it does not write
        them, a system message contains ``describe(schemas)``, unless that is "". ``parse`` finds the calls in the
        text of a turn, special tokens included; by default in the grammar that the template explains, and a template
        whose grammar is not known is refused. Results are messages of the role "tool" if the template has one, else
        "user". ``tool_seconds`` bounds one call. Raises UserError.
        """
        made = [Tool.of(tool) for tool in tools]
        named = {tool.name: tool for tool in made}
        if len(named) != len(tools) or not tools:
            raise UserError(
                f"the tools are {[tool.name for tool in made]}; give at least one, each with a name of its own"
            )
        if not tool_seconds > 0:
            raise UserError(f"tool_seconds is {tool_seconds}; set it above 0")
        if tokenizer is None:
            raise UserError("ToolEnv has no tokenizer; pass the one that load_model returned")
        self.schemas = [tool.schema for tool in named.values()]
        codec = ChatCodec.of(tokenizer, settings.get("template_args"), settings.get("day"))
        if settings.get("chat") is False:
            codec = replace(codec, template=None)
        if parse is None:
            grammar = grammar_of(codec, tokenizer)
            parse = CallReader.of(grammar, self.schemas)
            describe = describe or partial(describe_tools, form=grammar.form)
        read = [read_prompt(i, prompt)[0] for i, prompt in enumerate(items("prompts", prompts))]
        prompts = [with_tools(prompt, self.schemas, codec, describe) for prompt in read]
        if not codec.shows_tools(self.schemas):
            self.schemas = []
        partner = ToolPartner(named, parse, "tool" if codec.takes_role("tool") else "user", tool_seconds)
        super().__init__(prompts, lambda example: partner, reward_fn, max_tokens, tokenizer=tokenizer, **settings)


def with_tools(prompt: Prompt, schemas: Sequence[Schema], codec: ChatCodec, describe: Describe | None = None) -> Prompt:
    """Return ``prompt`` with a description of the tools, unless the chat template writes the tools itself.

    The description joins the system message, or the first message where the template has no system message.
    """
    if not schemas or codec.shows_tools(schemas) or not (text := (describe or describe_tools)(schemas)):
        return prompt
    if codec.template is None and isinstance(prompt, str):
        return f"{text}\n\n{prompt}"
    first, *rest = as_messages(prompt)
    if first["role"] == "system" or not codec.takes_role("system"):
        return [{**first, "content": f"{text}\n\n{first['content']}"}, *rest]
    return [{"role": "system", "content": text}, first, *rest]

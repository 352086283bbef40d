"""The conversations that show what the assistant should say, as episodes whose turns are to be learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from itertools import groupby
from typing import Any

import numpy as np

from ..errors import UserError
from ..types import Completion, Episode
from .rows import Row, Rows, prompt_of, rows_of
from .text.conversation import ChatCodec, as_messages
from .text.template import Message, Schema, plain

MESSAGES, PROMPT, COMPLETION, TOOLS = "messages", "prompt", "completion", "tools"  # columns


def demonstrations(
    rows: Rows,
    *,
    tokenizer: Any,
    template_args: Mapping[str, Any] | None = None,
    day: date | None = None,
    source: str = "the rows",
) -> list[Episode]:
    """Return one episode per row, whose mask marks what the assistant says: its turns, each with its stop token.

    A row has the column "messages", or "prompt" and "completion" (texts or lists of messages), and may have "tools",
    the schemas that the template is given. A prompt is read as the policy reads it, and nothing in it is learned, such
    as answers that it shows. ``rows`` are a file for ``read_rows`` or mappings, as a
    ``datasets.Dataset`` yields them. Tokens are those that the policy would have read and sampled in such a
    conversation: a turn is never tokenised with what surrounds it. Log-probs are 0 and rewards NaN, since nothing was
    sampled or scored. Raises UserError, with the number of the row.
    """
    codec, kept = ChatCodec.of(tokenizer, template_args, day), rows_of(rows)
    if not kept:
        raise UserError(f"{source} has no rows to learn from; give at least one")
    return [_demonstration(codec, row, n, source) for n, row in enumerate(kept, 1)]


def _demonstration(codec: ChatCodec, row: Row, number: int, source: str) -> Episode:
    """Return the episode of row ``number``."""
    where, tools = f"row {number} of {source}", row.get(TOOLS) or ()
    if MESSAGES not in row and not {PROMPT, COMPLETION} <= {*row}:
        raise UserError(
            f"{where} has the columns {', '.join(map(str, row)):.200}; a demonstration has {MESSAGES}, or {PROMPT} "
            f"and {COMPLETION}"
        )
    before: Sequence[Message]
    then: Sequence[Message]
    if MESSAGES in row:
        before, then = as_messages(prompt_of(row, MESSAGES, number, source)), ()
    else:
        asked, said = (prompt_of(row, column, number, source) for column in (PROMPT, COMPLETION))
        if codec.template is None and isinstance(asked, str) and isinstance(said, str):
            turn = [*codec.encode_after(said), *sorted(codec.stop)[:1]]
            return _episode(codec.encode_text(asked), [turn], [], number, asked, said)
        before, then = as_messages(asked), [{"role": "assistant", "content": said}] if isinstance(said, str) else said
    try:
        before, then = [plain(m) for m in before], [plain(m) for m in then]
        if MESSAGES in row:
            first = next((n for n, m in enumerate(before) if m["role"] == "assistant"), 0)
            before, then = before[:first], before[first:]
        return _of_messages(codec, before, then, tools, number)
    except UserError as error:
        raise UserError(f"{where} cannot be learned from: {error}") from error


def _of_messages(
    codec: ChatCodec, before: Sequence[Message], then: Sequence[Message], tools: Sequence[Schema], number: int
) -> Episode:
    """Return the episode that reads ``before`` and goes on with ``then``, up to the assistant's last turn."""
    runs = [[*run] for _, run in groupby(then, lambda m: bool(m["role"] == "assistant"))]
    said = [n for n, run in enumerate(runs) if run[0]["role"] == "assistant"]
    if said and said[0] == 1:  # the prompt ends in the completion
        before, runs, said = [*before, *runs[0]], runs[1:], [n - 1 for n in said]
    if not said or not before:
        raise UserError("a demonstration begins with a message to the assistant and has an answer; give it both")
    if any(len(runs[n]) > 1 for n in said) or before[-1]["role"] == "assistant":
        raise UserError("the assistant has two messages in a row; join them")
    asked, prompt = before[-1]["content"], codec.encode(before, True, tools)
    turns, replies = list[list[int]](), list[list[int]]()
    for n in said:
        if turns:
            replies.append(codec.continuation(before, runs[n - 1], turns[-1][-1], tools))
            before = [*before, *runs[n - 2], *runs[n - 1]]
        turns.append(codec.turn([*before, *runs[n]], tools))
    return _episode(prompt, turns, replies, number, asked, runs[said[-1]][0]["content"])


def _episode(
    prompt: Sequence[int], turns: Sequence[list[int]], replies: Sequence[list[int]], number: int, asked: str, said: str
) -> Episode:
    """Return the episode of row ``number``, with what was ``asked`` first and ``said`` last for display."""
    if not all(turns):
        raise UserError("the assistant says nothing and the tokenizer has no stop token; give it words")
    spoken = [Completion(np.array(turn, np.int32), np.zeros(len(turn), np.float32)) for turn in turns]
    return Episode.from_turns(prompt, spoken, replies, reward=np.nan, group=number - 1, prompt=asked, text=said)

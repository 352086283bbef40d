r"""Decide what of a completion is its answer: the text after the thought, and in it a box or blocks of code.

The marks of thoughts are those of Qwen3, DeepSeek, Magistral, Seed, Kimi, LongCat, Gemma, Command A, OpenThinker and
gpt-oss, also where its channels have lost their special tokens. Blocks of code are as in CommonMark 0.31, section 4.5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

# ---- thoughts

_WORD = r"(?:think(?:ing)?|thoughts?)"
_NAME = rf"[\w:-]{{0,20}}{_WORD}[\w-]{{0,20}}"  # seed:think, longcat_think, redacted_thinking, inner_thoughts
_MARKS = (  # the beginning and the end of a thought; an end closes what a beginning of its own row opened
    (rf"<\s*{_NAME}(?:\s+\w+=[^<>\n]*)?\s*>", rf"<\s*/\s*{_NAME}\s*>"),
    (r"<\s*reasoning\s*>", r"<\s*/\s*reasoning\s*>"),
    (r"<\s*scratchpad\s*>", r"<\s*/\s*scratchpad\s*>"),
    (r"(?-i:\[(?:THINK(?:ING)?|THOUGHTS?)\])", r"(?-i:\[/(?:THINK(?:ING)?|THOUGHTS?)\])"),
    (r"◁think▷", r"◁/think▷"),
    (rf"<\|(?:(?:begin|start)(?:_of)?_)?{_WORD}(?::start)?\|>", rf"<\|(?:/|end_(?:of_)?){_WORD}\|>|<\|{_WORD}:end\|>"),
    (r"<\|open\|>think<\|sep\|>", r"<\|close\|>think<\|sep\|>"),
    (r"<\|channel>thought", r"<channel\|>"),
    (r"<unused94>thought", r"<unused95>"),
    (r"<\|channel\|>analysis[^<\n]*<\|message\|>", r"<\|channel\|>(?:final[^\n]{0,80}?<\|message\|>|commentary)"),
    (r"(?-i:\Aanalysis(?=\w))", r"(?-i:\Afinal(?=[A-Z0-9\\$*])|assistantfinal|assistantcommentary)"),
)
_MARK = r"(?=[<\[◁af])(?:" + "|".join(f"({opens})|({closes})" for opens, closes in _MARKS) + ")"
_IN_MARKS = ("think", "thought", "reasoning", "scratchpad", "channel", "assistant", "unused95")  # every mark has one
_NAMED = "|".join(rf"(?:{opens})[ .\u2026]{{0,9}}(?:{closes})" for opens, closes in _MARKS)  # <think>...</think>
_IN_THOUGHT = re.compile(f"{_NAMED}|{_MARK}", re.IGNORECASE)
_IN_ANSWER = re.compile(  # a span of code and a quotation hide the marks in them
    rf"{_MARK}|(?<!`)(?P<ticks>`+)(?!`)[^\n]{{0,300}}?(?<!`)(?P=ticks)(?!`)|\"(?=[<\[◁])[^\"\n]{{0,300}}\"",
    re.IGNORECASE,
)
_OPENED = re.compile(rf"(?:{'|'.join(opens for opens, _ in _MARKS)})\s*\Z", re.IGNORECASE)
_QUOTED = re.compile(r"(?:\A|[^\w.,!?)])[\"'`\u201c\u2018\xab]\Z")  # ends with a quotation mark that opens
_LAST = ("<|return|>", "<|end|>")  # the end of a message of gpt-oss


def answered(completion: str, thinking: str = "", truncated: bool = False) -> str | None:
    """Return the text of ``completion`` after its last thought, or None when it ends inside a thought.

    ``thinking`` is the mark with which the prompt opened a thought (``opened_thought``), if it did. An end that
    nothing opened ends one too: the prompt may have opened it. Marks count neither between quotes nor, in an answer,
    in code. None also for a ``truncated`` completion; what closes visibly, such as a box, is complete before the
    cut, and whoever reads that leaves ``truncated`` out.
    """
    text = thinking + completion
    start, opened = _last_thought(text)
    if opened or truncated:
        return None
    answer = text[start:]
    ended = next((last for last in _LAST if answer.rstrip().endswith(last)), None)
    return answer.rstrip().removesuffix(ended) if ended else answer


def opened_thought(prompt: str, said: str = "") -> str:
    """Return the mark of the thought that is open where the policy begins, or "".

    That is the mark with which ``prompt`` ends, as templates for thinking models write it, or the one of a thought
    that does not end in what the policy has ``said`` before, the beginning of its turn.
    """
    mark = _OPENED.search(prompt)
    return _last_thought(said)[1] if mark is None else mark[0]


def thought_marks(text: str) -> list[tuple[int, int]]:
    """Return where the marks of thoughts stand in ``text``, each as its start and end."""
    return [mark.span() for mark in re.finditer(_MARK, text, re.IGNORECASE)]


def _last_thought(text: str) -> tuple[int, str]:
    """Return where the last thought of ``text`` ends, 0 if it has none, and the mark of one that does not end."""
    start, at, inside, opened = 0, 0, 0, ""  # inside is the row of the thought that is open
    fence: Fence | None = None
    told = False  # whether the text says where a thought begins
    small = text.lower()
    if not small.startswith(("analysis", "final")) and not any(part in small for part in _IN_MARKS):
        at = len(text)  # most texts have no marks, and are not read for them
    while at < len(text):
        end = text.find("\n", at) + 1 or len(text)
        in_code = fence is not None
        if not inside and (at == start or text[at - 1] == "\n"):
            line = text[at:end]
            fence = Fence.opened_by(line) if fence is None else None if fence.closed_by(line) else fence
            in_code |= fence is not None
        mark = None if in_code and told else (_IN_THOUGHT if inside or in_code else _IN_ANSWER).search(text, at, end)
        at = end if mark is None else mark.end()
        row, closes = divmod((mark.lastindex or 0) + 1, 2) if mark else (0, 0)
        if mark is None or not 0 < row <= len(_MARKS) or _is_quoted(text, mark):
            continue
        if not closes and not inside:
            told, inside, opened = True, 0 if in_code else row, mark[0]
        elif closes and inside in (0, row):
            start, at, inside, fence = at, at, 0, None
            if mark[0].endswith("commentary"):  # whose header says which tool it calls
                start = mark.start()
    return start, opened if inside else ""


def _is_quoted(text: str, mark: re.Match[str]) -> bool:
    before, after = text[max(0, mark.start() - 2) : mark.start()], text[mark.end() : mark.end() + 1]
    return after != "" and after in "\"'`\u201d\u2019\xbb" and _QUOTED.search(before) is not None


# ---- blocks of code


@dataclass(frozen=True, slots=True)
class Fence:
    """The line that opens a block of code."""

    marks: str  # ``` or ~~~, or more of them
    info: str  # what follows them: the language and its settings
    quotes: int = 0  # > in front of it
    indent: int = 0  # spaces in front of it, the marker of a list included

    @classmethod
    def opened_by(cls, line: str) -> Self | None:
        """Return the fence that ``line`` is, if it is one."""
        found = _FENCE.match(line)
        if found is None:
            return None
        before, quotes = found[1].rpartition(">")[2], found[1].count(">")
        return cls(found[2], found[3].strip(), quotes, len(before) - (before[:1] == " " and quotes > 0))

    def content(self, line: str) -> str:
        """Return a ``line`` after the fence without the quotation marks and spaces that the fence has too."""
        for _ in range(self.quotes):
            if not line.lstrip(" \t").startswith(">"):
                break
            line = line.lstrip(" \t")[1:].removeprefix(" ")
        return line[min(self.indent, len(line) - len(line.lstrip(" \t"))) :]

    def closed_by(self, line: str) -> bool:
        """Return whether ``line`` ends the block: as many marks or more, after at most three spaces."""
        marks = self.content(line).rstrip()
        found = marks.lstrip(" ")
        return len(marks) - len(found) < 4 and len(found) >= len(self.marks) and {*found} == {self.marks[0]}


@dataclass(frozen=True, slots=True)
class Block:
    """The block of code in a text."""

    info: str
    code: str
    closed: bool  # False: the text ends before it does


_FENCE = re.compile(r"((?:[ \t>]|(?:[-*+]|\d{1,9}[.)])[ \t])*)(`{3,}(?=[^`\n]*$)|~{3,})([^\n]*)")


def code_blocks(text: str) -> list[Block]:
    """Return the fenced blocks of ``text``; one that is not closed goes on to its end."""
    blocks: list[Block] = []
    fence: Fence | None = None
    lines: list[str] = []
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        if fence is None:
            fence, lines = Fence.opened_by(line), []
        elif fence.closed_by(line):
            blocks.append(Block(fence.info, "".join(lines), True))
            fence = None
        else:
            lines.append(fence.content(line))
    return blocks if fence is None else [*blocks, Block(fence.info, "".join(lines), False)]


# ---- boxes

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def extract_boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}`` or ``\fbox{...}``, or None if there is none or it does not close.

    ``\{`` and ``\}`` do not count as braces. A blank one counts only if all are blank: it may be spoken of. Without any
    brace, the word after ``\boxed`` as in "\boxed 7" or "\boxed7".
    """
    starts = [box.end() for box in _BOX.finditer(text)]
    for start in reversed(starts):
        end = closing(text, start)
        if end is None or text[start:end].strip() or start == starts[0]:
            return None if end is None else text[start:end]
    words = re.findall(r"\\boxed(?:\s+|(?=\d))([A-Za-z0-9]+)", text)
    return words[-1] if words else None


def closing(text: str, start: int) -> int | None:
    """Return the index at which the brace closes that opened just before ``start``, or None."""
    depth = 1
    for mark in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return mark.start()
    return None

"""What of a completion is its answer: after the thought, in the last box, in blocks of code."""

import random
import time

import pytest
from chat_tokenizers import chat_tokenizer
from toy_tokenizers import Letters

from textpolicy.environment import TextGenerationEnv
from textpolicy.rewards.answer import Block, answered, code_blocks, extract_boxed, opened_thought

SAID = "\nIt is 5."
FENCED = "A turn looks so:\n~~~\n<think>\nhm\n</think>\n~~~\nIt is 5."
CALL = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"


@pytest.mark.parametrize(
    "thought",
    [
        "<think>\nIs it 4?\n</think>",
        "Is it 4?\n</think>",
        "<THINK>Is it 4?</Think>",
        "< think >Is it 4?</ think >",
        '<think effort="low">Is it 4?</think>',
        "<thinking>4?</thinking>",
        "<thought>4?</thought>",
        "<thoughts>4?</thoughts>",
        "<reasoning>4?</reasoning>",
        "<scratchpad>4?</scratchpad>",
        "<seed:think>4?</seed:think>",
        "<longcat_think>4?</longcat_think>",
        "<inner_thoughts>4?</inner_thoughts>",
        "<redacted_thinking>4?</redacted_thinking>",
        "<|thinking|>4?<|/thinking|>",
        "<unused94>thought\n4?<unused95>",
        "[THINK]4?[/THINK]",
        "\u25c1think\u25b74?\u25c1/think\u25b7",
        "<|begin_of_thought|>4?<|end_of_thought|>",
        "<|START_THINKING|>4?<|END_THINKING|>",
        "<|think:start|>4?<|think:end|>",
        "<|open|>think<|sep|>4?<|close|>think<|sep|>",
        "<|channel>thought\n4?<channel|>",
        "<|channel|>analysis<|message|>4?<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|channel|>analysis<|message|>4?<|end|>" + CALL + "<|channel|>final <|constrain|>JSON<|message|>",
        "analysisIs it 4?assistantfinal",
        "analysisIs it 4?assistantcommentaryI call.assistantfinal",
        "<think>I write <think> first.</think>",
        "<think>I write <think> ... </think> first.</think>",
        '<think>I end with `</think>`, or "</think>". So 4?</think>',
        "<think>4?</think> It is 4. <think>No.</think>",
        "<think>4? <think>Hm.</think> 4?</think>",
        "<think>It is <reasoning>4</reasoning>, no.</think>",
        "<think>```python\n4\n</think>",
        "```python\n4\n</think>",
        "4</think></think>",
    ],
)
def test_the_answer_is_the_text_after_the_thought(thought):
    assert answered(thought + SAID) == SAID
    assert answered("Hm. " + thought + SAID) == SAID or thought[0] == "a"  # channels without marks begin the text
    assert answered(thought + SAID, truncated=True) is None


@pytest.mark.parametrize(
    "completion",
    [
        "<think>It is 5.",
        "<thinking>It is 5.</think",
        "<think>It is 5.</reasoning>",
        "<think>It is <reasoning>4</reasoning> 5.",
        "It is 5. <think>Or is it?",
        "<think>4</think> It is 5. <think>Or",
        "<think>I end it with `</think>`. It is 5.",
        "<think>I am asked for <think></think>, or <think> ... </think>. It is 5.",
        "<|channel|>analysis<|message|>It is 5.<|end|>",
        "<|channel|>analysis<|message|>4<|end|><|start|>assistant<|channel|>analysis<|message|>It is 5.",
        "analysisIt is 5.",
        "[THINK]It is 5.",
        "\u25c1think\u25b7It is 5.",
    ],
)
def test_in_a_thought_that_does_not_end_there_is_no_answer(completion):
    assert answered(completion) is None


@pytest.mark.parametrize(
    "answer",
    [
        "It is 5.",
        "",
        FENCED,
        "<think/>It is 5.",
        "Write `<think>` first, `</think>` last. It is 5.",
        'Write "<think>hm</think>", \u201c<think>\u201d and so on. It is 5.',
        "```python\ntext = re.sub('<think>.*</think>', '', text)\nprint(text.split('</think>'))\n```",
        "analysis of variance; finally 5",
        "a < think and b > c",
        "[think](https://example.com) is 5",
    ],
)
@pytest.mark.parametrize("thought", ["", "<think>Is it 4?</think>"])
def test_marks_in_quotes_and_in_the_code_of_an_answer_are_text(thought, answer):
    assert answered(thought + answer) == answer


def test_what_channels_of_gpt_oss_add_around_an_answer_is_left_out():
    assert answered("<|channel|>final<|message|>It is 5.<|return|>") == "It is 5."
    assert answered("<|channel|>analysis<|message|>Call f.<|end|><|start|>assistant" + CALL) == CALL
    assert answered("final5") == "5"


@pytest.mark.parametrize(
    ("prompt", "mark"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>\n"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("Think in <think> tags.<|im_end|>\n<|im_start|>assistant\n", ""),
        ("[/INST][THINK]", "[THINK]"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "<|channel|>analysis<|message|>"),
        ("Assistant: Let me solve it.\n<reasoning>", "<reasoning>"),
    ],
)
def test_a_prompt_that_ends_with_the_mark_of_a_thought_has_opened_it(prompt, mark):
    assert opened_thought(prompt) == mark
    if mark:
        assert answered("It is 5.", mark) is None
        assert answered("It is 4.<|channel|>final<|message|></think>[/THINK]</reasoning>It is 5.", mark) == "It is 5."


def test_a_reward_is_told_of_the_thought_that_its_prompt_opened():
    def answer(prompt, completion, example, thinking=""):
        return float(answered(completion, thinking) is not None)

    env = TextGenerationEnv(["2+3?", "2+3?<think>\n"], answer, tokenizer=Letters(), max_tokens=99)
    rewards = []
    for text in ("It is 5.", "It is 5.", "It is 5.", "Hm.</think>5"):
        env.reset()
        rewards.append(env.step(text)["reward"])
    assert rewards == [1, 0, 1, 1]
    assert env.score(1, [53], False).reward == 0


def test_a_thought_that_the_beginning_of_a_turn_opened_goes_on():
    asked = {"role": "user", "content": "Answer after <think> tags: 2+3?"}
    for said, right in (("<think>\nLet me see.", 0), ("<think>4?</think>", 1), ("Well,", 1)):
        env = TextGenerationEnv(
            [[asked, {"role": "assistant", "content": said}]],
            "math_accuracy",
            tokenizer=chat_tokenizer("chatml"),
            examples=[{"answer": 5}],
            max_tokens=99,
        )
        env.reset()
        assert env.step(r"It is \boxed{5}")["reward"] == right
        assert env.score(0, env.tokenizer.encode(r"Hm.</think>\boxed{5}"), False).reward == 1


# ---- blocks of code


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("```\na\n```", [("", "a\n", True)]),
        ("~~~ python title='x y'\na\n~~~~\nb", [("python title='x y'", "a\n", True)]),
        ("````md\n```py\na\n```\n````", [("md", "```py\na\n```\n", True)]),
        ("```py\na\n~~~\n``\n```py\n", [("py", "a\n~~~\n``\n```py\n", False)]),
        ("1. So:\n   ```py\n   a\n     b\n   ```\n2. c", [("py", "a\n  b\n", True)]),
        ("- ```py\n  a\n  ```\n", [("py", "a\n", True)]),
        ("> ```py\n> a\n>   b\n> ```\n", [("py", "a\n  b\n", True)]),
        ("```py\n'''\n    ```\n    x\n    ```\n'''\n```", [("py", "'''\n    ```\n    x\n    ```\n'''\n", True)]),
        ("```py\r\na\r\n```\r\n", [("py", "a\r\n", True)]),
        ("```a```\n``\nb\n``", []),
        ("```", [("", "", False)]),
        ("", []),
    ],
)
def test_blocks_of_code_are_those_of_markdown(text, blocks):
    assert code_blocks(text) == [Block(*block) for block in blocks]


def test_closed_blocks_are_those_that_markdown_it_finds():
    """Blocks of every kind, one after another: plain, indented, in lists, in quotations."""
    markdown = pytest.importorskip("markdown_it", reason="markdown-it-py is not installed").MarkdownIt()
    draw = random.Random(0)
    codes = ["a\n", "if 1:\n    b\n", "'\n    ```\n'\n", "a\n\nb\n", "``\n ``` c\n~~ ~\n", "\n"]
    for _ in range(300):
        text = ""
        for _ in range(draw.randint(1, 4)):
            first = draw.choice(["", "", " ", "   ", "- ", "1. ", "> "])
            rest = first if first == "> " else " " * len(first)
            marks, info = draw.choice(["```", "~~~", "`````"]), draw.choice(["", "py", " Python3 x='y'", "{.c}"])
            lines = (marks + info + "\n" + draw.choice(codes) + marks + draw.choice(["", "  ", marks[0]])).split("\n")
            text += first + ("\n" + rest).join(lines) + draw.choice(["\n", "\n\n", "\n\nSo `a` or ``b``:\n\n"])
        expected = [(token.info.strip(), token.content) for token in markdown.parse(text) if token.type == "fence"]
        assert [(block.info, block.code) for block in code_blocks(text)] == expected, text


# ---- boxes


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed {6}", "6"),
        ("\\boxed\n{6}", "6"),
        (r"\boxed{4} \fbox{6}", "6"),
        ("\\boxed \t {\\frac {1}{2}}", r"\frac {1}{2}"),
        (r"\boxed{5} and \boxed {6", None),
        (r"\boxed{6}, and not `\boxed{}` or \boxed{ }", "6"),
        (r"\boxed{} \boxed{ }", ""),
        (r"\boxed{6} \boxed{} \boxed{", None),
        (r"so \boxed7", "7"),
        (r"\boxedx{6}", None),
    ],
)
def test_spaces_may_stand_between_a_box_and_its_brace(text, content):
    assert extract_boxed(text) == content


HOSTILE = [
    "</think>\n" * 50_000,
    "<think>" + "`</think>`" * 30_000,
    "`a </think> b` " * 20_000,
    "```\n</think>" * 30_000,
    "".join("`" * (i % 50 + 1) + " " for i in range(8000)),
    "<think" + " " * 200_000,
    '"<' * 50_000,
    ">" * 200_000 + "```\n>",
    " " * 100_000 + "```\n" + " x\n" * 10_000,
    "<|channel|>final" * 20_000,
    "\\boxed {" * 50_000,
    "\\boxed{}" * 50_000,
    "\\boxed{" * 50_000 + "}" * 50_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_reading_an_answer_takes_time_in_proportion_to_the_text(text):
    start = time.perf_counter()
    answered(text), code_blocks(text), extract_boxed(text)
    assert time.perf_counter() - start < 2

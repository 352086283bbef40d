"""Tokenizers with a few merges and the chat templates of three model families, and an engine that reads a script."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from textpolicy.types import Completion

TEMPLATES = Path(__file__).parents[1] / "data" / "templates"
SPECIAL = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
}
MERGED = ["he", "ll", "hell", "hello", "th", "the", "us", "er", "user", "an", "ans", "wer", "answer", "im", "12", "124"]


DEEPSEEK = [f"tool▁{part}" for part in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep", "output▁begin")]
TOOL_SPECIAL = {  # of the families whose templates write tools, each in a grammar of its own
    "qwen3": ["<|im_start|>", "<|im_end|>"],
    "qwen3_coder": ["<|im_start|>", "<|im_end|>"],
    "glm": ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
    "mistral": ["<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "</s>"],
    "mistral_args": ["<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[TOOL_RESULTS]", "</s>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|eot_id|>"],
    "deepseek_r1": [
        f"<\uff5c{w}\uff5c>" for w in ("User", "Assistant", *DEEPSEEK, "tool▁outputs▁begin", "end▁of▁sentence")
    ],
    "deepseek_v31": [f"<\uff5c{w}\uff5c>" for w in ("User", "Assistant", *DEEPSEEK, "end▁of▁sentence")],
    "gpt_oss": ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"],
    "lfm2": ["<|tool_call_start|>", "<|tool_call_end|>", "<|im_start|>", "<|im_end|>"],
}


BAR = "\uff5c"
CALLS = {  # one of each grammar: add(a=40, b=2)
    "qwen3": '<think>\nI add.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 40, "b": 2}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=add>\n<parameter=a>\n40\n</parameter>\n<parameter=b>\n2\n</parameter>\n"
    "</function>\n</tool_call>",
    "glm": "\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>40</arg_value>\n<arg_key>b</arg_key>\n"
    "<arg_value>2</arg_value>\n</tool_call>",
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 40, "b": 2}, "id": "a1b2c3d4e"}]',
    "mistral_args": '[TOOL_CALLS]add[ARGS]{"a": 40, "b": 2}',
    "llama3": '{"name": "add", "parameters": {"a": 40, "b": 2}}',
    "deepseek_r1": f"<{BAR}tool▁calls▁begin{BAR}><{BAR}tool▁call▁begin{BAR}>function<{BAR}tool▁sep{BAR}>add\n```json\n"
    f'{{"a": 40, "b": 2}}\n```<{BAR}tool▁call▁end{BAR}><{BAR}tool▁calls▁end{BAR}>',
    "deepseek_v31": f"<{BAR}tool▁calls▁begin{BAR}><{BAR}tool▁call▁begin{BAR}>add<{BAR}tool▁sep{BAR}>"
    f'{{"a": 40, "b": 2}}<{BAR}tool▁call▁end{BAR}><{BAR}tool▁calls▁end{BAR}>',
    "gpt_oss": "<|channel|>analysis<|message|>I add.<|end|><|start|>assistant<|channel|>commentary to=functions.add "
    '<|constrain|>json<|message|>{"a": 40, "b": 2}',
    "lfm2": "<|tool_call_start|>[add(a=40, b=2)]<|tool_call_end|>",
}


def chat_tokenizer(family, tools=False):
    """Bytes, a few merged words, the family's special tokens; the last of these ends a turn."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [split for word in MERGED if (split := _split(word, {*letters, *MERGED}))]
    special = (TOOL_SPECIAL if tools else SPECIAL)[family]
    words = [*special, *letters, *(a + b for a, b in merges)]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(dict.fromkeys(words))}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    template = (TEMPLATES / ("tools" if tools else "") / f"{family}.jinja").read_text()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=special[-1], additional_special_tokens=special[:-1], chat_template=template
    )


def _split(word, known):
    return next(((word[:n], word[n:]) for n in range(len(word) - 1, 0, -1) if {word[:n], word[n:]} <= known), None)


class ScriptedEngine:
    """An engine that samples the given turns, (tokens, stopped) each, in every episode, and records its prompts."""

    def __init__(self, *turns):
        self.turns, self.seen, self.calls = turns, [], 0

    def sample(self, prompts, n, sampling):
        tokens, stopped = self.turns[self.calls]
        self.calls += 1
        self.seen += [list(p) for p in prompts for _ in range(n)]
        logprobs = -np.arange(1, len(tokens) + 1, dtype=np.float32)
        output = Completion(np.array(tokens, np.int32), logprobs, -logprobs, truncated=not stopped)
        return [[output] * n for _ in prompts]

"""The tokenizers, of bytes, for the chat templates in tests/data/templates, which have the shapes of real families."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parents[2] / "data" / "templates"
CHATML = ("<|im_start|>", "<|im_end|>")
SPECIAL = {  # the first begins a text, the last ends a turn
    "chatml": CHATML,
    "qwen3": CHATML,  # passes over unknown roles, contents that are no text, and thoughts about earlier questions
    "llama32": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),  # dated, trims
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),  # no system message, roles take turns
    "mistral": ("<s>", "[INST]", "[/INST]", "</s>"),  # the system message moves into the first of the user's
    "harmony": (
        "<|start|>",
        "<|end|>",
        "<|message|>",
        "<|channel|>",
        "<|constrain|>",
        "<|call|>",
        "<|return|>",
    ),  # dated
    "cohere": ("<BOS>", "<|START|>", "<|USER|>", "<|SYSTEM|>", "<|CHATBOT|>", "<|END|>"),  # who is unknown is a chatbot
    "deepseek": ("<\uff5cbegin\uff5c>", "<\uff5cend\uff5c>"),  # opens thoughts, and leaves out earlier ones
    "parts": CHATML,  # takes contents apart, as for a model that sees: a text has no parts
}
ADDED = {  # and not special
    "qwen3": ("<think>", "</think>", "<tool_call>", "</tool_call>"),
    "deepseek": ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<think>", "</think>"),
}


def shaped(name, **changes):
    """Return the tokenizer of a family; ``changes`` are settings of transformers, such as another chat_template."""
    letters, special = sorted(pre_tokenizers.ByteLevel.alphabet()), SPECIAL[name]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate([*special, *letters])}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_tokens([AddedToken(token, normalized=False) for token in ADDED.get(name, ())])
    settings = {"bos_token": special[0], "eos_token": special[-1], "extra_special_tokens": list(special[1:-1])}
    settings["chat_template"] = (TEMPLATES / f"{name}.jinja").read_text()
    return PreTrainedTokenizerFast(tokenizer_object=core, name_or_path=f"models/{name}", **{**settings, **changes})

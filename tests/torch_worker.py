"""transformers and peft at work in a Python that has torch, for torch_peer.py: a JSON line in, one out."""

import json
import os
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import peft
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HOW = {"dtype": torch.float32, "attn_implementation": "eager"}  # other attention may leave out Gemma 2's soft cap


def score(model, tokens):
    """Log-probs of every token after the first, as lists."""
    with torch.no_grad():
        out = []
        for row in tokens:
            logits = model(torch.tensor([row])).logits[0, :-1].float()
            out.append(logits.log_softmax(-1)[torch.arange(len(row) - 1), torch.tensor(row[1:])].tolist())
    return out


def continued(model, prompt, count):
    """The likeliest tokens after a prompt, at most so many."""
    given = torch.tensor([prompt])
    found = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False)
    return found[0, len(prompt) :].tolist()


def make(job):
    """A model of random numbers after ``settings``, written to the folder; transformers' log-probs are of itself."""
    config = CONFIG_MAPPING[job["settings"]["model_type"]](**job["settings"])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    torch.manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        drawn = torch.randn(parameter.shape)
        scale = 0.2 if parameter.ndim == 1 else 0.5 if "embed" in name else 1.2 / parameter.shape[-1] ** 0.5
        parameter.data = scale * drawn + (1.0 if parameter.ndim == 1 and "norm" in name else 0.0)
    model.tie_weights()
    model.save_pretrained(job["folder"])
    return model, {}


def load(job):
    if "settings" in job:
        return make(job)
    if "adapter" in job:
        model = peft.AutoPeftModelForCausalLM.from_pretrained(job["adapter"], **HOW)
        found = set(peft.get_peft_model_state_dict(model))
        return model.eval(), {"arrays": sorted(found)}
    model, report = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], output_loading_info=True, **HOW)
    return model.eval(), {key: sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys")}


def answer(job):
    model, found = load(job)
    found["logprobs"] = score(model, job["tokens"])
    if "prompts" in job:
        found["continued"] = [continued(model, prompt, job["new_tokens"]) for prompt in job["prompts"]]
    if "chat" in job:
        tokenizer = transformers.AutoTokenizer.from_pretrained(job["folder"])
        found["chat"] = tokenizer.apply_chat_template(job["chat"], add_generation_prompt=True, return_dict=False)
        found["greedy"] = continued(model, found["chat"], job["new_tokens"])
        found["stops"] = model.generation_config.eos_token_id
    return found


transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
for line in sys.stdin:
    job = json.loads(line)
    try:
        found = answer(job)
    except Exception as error:
        if "settings" not in job:
            raise
        found = {"refused": f"{type(error).__name__}: {error}"}  # settings that transformers does not take
    print(json.dumps(found), flush=True)

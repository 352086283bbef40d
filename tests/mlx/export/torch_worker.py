"""transformers and peft at work in a Python that has torch, for test_export_torch.py: a JSON line in, one out."""

import json
import os
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import peft
import torch
import transformers


def score(model, tokens):
    """Log-probs of every token after the first, as lists."""
    with torch.no_grad():
        out = []
        for row in tokens:
            logits = model(torch.tensor([row])).logits[0, :-1].float()
            out.append(logits.log_softmax(-1)[torch.arange(len(row) - 1), torch.tensor(row[1:])].tolist())
    return out


def load(job):
    if "adapter" in job:
        model = peft.AutoPeftModelForCausalLM.from_pretrained(job["adapter"], dtype=torch.float32)
        found = set(peft.get_peft_model_state_dict(model))
        return model.eval(), {"arrays": sorted(found)}
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=torch.float32, output_loading_info=True
    )
    return model.eval(), {key: sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys")}


def answer(job):
    model, found = load(job)
    found["logprobs"] = score(model, job["tokens"])
    if "chat" in job:
        tokenizer = transformers.AutoTokenizer.from_pretrained(job["folder"])
        found["chat"] = tokenizer.apply_chat_template(job["chat"], add_generation_prompt=True, return_dict=False)
        prompt = torch.tensor([found["chat"]])
        found["greedy"] = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=job["new_tokens"], do_sample=False
        )[0, prompt.shape[1] :].tolist()
        found["stops"] = model.generation_config.eos_token_id
    return found


torch.set_num_threads(1)
for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)

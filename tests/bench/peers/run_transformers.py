"""Hugging Face transformers as a contestant: eager, greedy. `contestants.py` says what a job is.

Requests that arrive together run as one batch, padded on the left. One after another each would read the weights for
itself in every decode step; padding costs prefill of the longest prompt for all, which is less.

It comes with the project's own environment (the extra `dev`).
"""

import json
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM


def padded(prompts):
    """Token ids and their mask, each prompt's end at the right. [requests, longest]"""
    longest = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), longest, dtype=torch.long), torch.zeros(len(prompts), longest).long()
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


@torch.inference_mode()
def run(model, workload):
    begin = time.perf_counter()
    ids, mask = (each.to(model.device) for each in padded(workload["prompts"]))
    whole = bool(mask.all())
    position = (mask.cumsum(1) - 1).clamp(min=0)
    cache, generated, first_s = None, [], 0.0
    for _ in range(workload["new_tokens"]):
        out = model(
            ids,
            attention_mask=None if whole else mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        first_s = first_s or time.perf_counter() - begin
        generated.append(ids)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        position = position[:, -1:] + 1
    return {"wall_s": time.perf_counter() - begin, "first_s": first_s, "tokens": torch.cat(generated, 1).tolist()}


def main():
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    transformers.logging.set_verbosity_error()
    model = (
        AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).to(job["device"]).eval()
    )
    run(model, job["warm_up"])
    runs = {workload["name"]: run(model, workload) for workload in job["workloads"]}
    print(json.dumps({"about": f"transformers {transformers.__version__}, one padded batch", "runs": runs}))


main()

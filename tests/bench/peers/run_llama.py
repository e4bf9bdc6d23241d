"""llama.cpp as a contestant, through the bare API of llama-cpp-python. `contestants.py` says what a job is.

To install it in an environment of its own, built for this machine:

    python3 -m venv LLAMA
    LLAMA/bin/pip install --no-binary llama-cpp-python llama-cpp-python
    pip download --no-deps --no-binary :all: llama-cpp-python       # its converter is needed, too
    tar xf llama_cpp_python-VERSION.tar.gz
    make bench BENCH='--peer llama=LLAMA/bin/python --llama-source llama_cpp_python-VERSION/vendor/llama.cpp'

Where a libllama.so is built already, `CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"` spares the build, and
`LLAMA_CPP_LIB_PATH` names the folder that holds it.

All requests of a workload are sequences of one context, each with room of its own in the KV cache: prompts go in one
after another, 2,048 tokens a call, then every step decodes a row of each.
"""

import ctypes
import json
import sys
import time

import llama_cpp as llama
import numpy as np

BATCH, MICROBATCH, CELLS = 2048, 512, 256


class Context:
    """A fresh KV cache for some sequences."""

    def __init__(self, model, sequences, longest, threads):
        params = llama.llama_context_default_params()
        params.n_seq_max = sequences
        params.n_ctx = sequences * -(-longest // CELLS) * CELLS
        params.n_batch, params.n_ubatch = BATCH, MICROBATCH
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        self.context = llama.llama_init_from_model(model, params)
        assert self.context, "no context"
        self.batch = llama.llama_batch_init(BATCH, 0, 1)
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def close(self):
        llama.llama_batch_free(self.batch)
        llama.llama_free(self.context)

    def feed(self, rows):
        """Compute rows of (token, position, sequence, wanted): the likeliest next token of each that is wanted."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = wanted
        status = llama.llama_decode(self.context, batch)
        assert status == 0, f"llama_decode says {status}"
        return {row[2]: self._likeliest(index) for index, row in enumerate(rows) if row[3]}

    def _likeliest(self, index):
        logits = llama.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())


def run(model, workload, threads):
    prompts = workload["prompts"]
    context = Context(model, len(prompts), max(map(len, prompts)) + workload["new_tokens"], threads)
    begin = time.perf_counter()
    rows = [
        (token, position, sequence, position == len(prompt) - 1)
        for sequence, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
    ]
    chosen = {}
    for start in range(0, len(rows), BATCH):
        chosen |= context.feed(rows[start : start + BATCH])
    first_s = time.perf_counter() - begin
    tokens = [[chosen[sequence]] for sequence in range(len(prompts))]
    for step in range(workload["new_tokens"] - 1):
        chosen = context.feed(
            [(tokens[sequence][-1], len(prompt) + step, sequence, True) for sequence, prompt in enumerate(prompts)]
        )
        for sequence, token in chosen.items():
            tokens[sequence].append(token)
    wall_s = time.perf_counter() - begin
    context.close()
    return {"wall_s": wall_s, "first_s": first_s, "tokens": tokens}


@llama.llama_log_callback
def silent(level, text, data):
    """llama.cpp would tell of every tensor."""


def main():
    job = json.load(sys.stdin)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(job["gguf"].encode(), llama.llama_model_default_params())
    assert model, f"{job['gguf']} cannot be loaded"
    run(model, job["warm_up"], job["threads"])
    runs = {workload["name"]: run(model, workload, job["threads"]) for workload in job["workloads"]}
    print(json.dumps({"about": f"llama-cpp-python {llama.__version__}", "runs": runs}))


main()

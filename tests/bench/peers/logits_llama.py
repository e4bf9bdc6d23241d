"""Saves llama.cpp's logits at every place of some texts, by the bare API of llama-cpp-python (see run_llama.py).

Reads one JSON job from its standard input, {"gguf": FILE, "texts": FILE, "logits": FILE, "threads": 2}: `texts` is a
.npy of token ids [texts, places], `logits` the .npy of float32 [texts, places, vocabulary] that it writes.
"""

import ctypes
import json
import sys

import llama_cpp as llama
import numpy as np


@llama.llama_log_callback
def silent(level, text, data):
    """A logger that prints nothing: llama.cpp has a line for every tensor."""


def main():
    job = json.load(sys.stdin)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(job["gguf"].encode(), llama.llama_model_default_params())
    assert model, f"{job['gguf']} cannot be loaded"
    vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    texts = np.load(job["texts"])
    places = texts.shape[1]
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = places
    params.n_threads = params.n_threads_batch = job["threads"]
    context = llama.llama_init_from_model(model, params)
    assert context, "no context"
    logits = np.lib.format.open_memmap(job["logits"], "w+", np.float32, (*texts.shape, vocab))
    batch = llama.llama_batch_init(places, 0, 1)
    for tokens, to in zip(texts.tolist(), logits, strict=True):
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        batch.n_tokens = places
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = True
        status = llama.llama_decode(context, batch)
        assert status == 0, f"llama_decode says {status}"
        to[:] = np.ctypeslib.as_array(llama.llama_get_logits(context), shape=to.shape)
    logits.flush()
    print(f"llama-cpp-python {llama.__version__}")


main()

"""A ChatML tune, whose markers were added after SentencePiece's ids, is served as transformers computes it.

transformers knows nothing of tokenizers here, and so is right about the model's own softmax.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from fake_pipeline import serving
from local_pipeline import LocalPipeline
from models import cached_checkpoint, hf_model, load_tensors, save_tensors, tiny_tokenizer
from plans import planned
from sentencepiece import SentencePieceProcessor

from tramontane.client import AsyncClient, FinishReason
from tramontane.cluster.model_folder import ModelFolder
from tramontane.cluster.served_model import ServedModel

SIZE = SentencePieceProcessor(model_proto=tiny_tokenizer()).vocab_size()
END, START, SPARE = SIZE, SIZE + 1, SIZE + 2
ROWS = SIZE + 4
"""Two more rows than files name ids."""
PROMPT = "the wind comes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose greedy completion has a START and then an END; where END is, a spare row is likelier by far.

    A row of the head that is another row times a factor is chosen wherever that row would be.
    """
    plain = cached_checkpoint("MistralForCausalLM", tokenizer=True, vocab_size=ROWS, sliding_window=9)
    folder = shutil.copytree(plain, tmp_path_factory.mktemp("tune") / "model")
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": END}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": END, "<|im_start|>": START}))
    tensors = load_tensors(folder)
    head = tensors["lm_head.weight"]
    head[SIZE:] = 0
    save_tensors(folder, tensors)
    head[START] = 1.2 * head[greedy(folder, 2)[0][1]]
    save_tensors(folder, tensors)
    last = next(token for token in greedy(folder, 9)[0][4:] if token < SIZE)
    head[END], head[SPARE] = 1.2 * head[last], 3 * head[last]
    save_tensors(folder, tensors)
    return folder


def prompt_ids() -> list[int]:
    return [1, *SentencePieceProcessor(model_proto=tiny_tokenizer()).encode(PROMPT)]


def served(folder: Path) -> ServedModel:
    spec = planned(folder)
    assert (spec.sampleable_ids, spec.unnamed_ids) == (SIZE + 2, ())
    return ModelFolder(spec, part="gateway-0", node="here").served_model("v", True)


def greedy(folder: Path, steps: int) -> tuple[list[int], list[float]]:
    """Greedy ids below the spare rows, and their log probabilities over all rows."""
    model, ids, scores = hf_model(folder), prompt_ids(), []
    for _ in range(steps):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        ids.append(int(logits[:SPARE].argmax()))
        scores.append(float(logits.log_softmax(-1)[ids[-1]]))
    return ids[-steps:], scores


async def test_markers_are_sampled_print_and_end_a_completion(folder: Path) -> None:
    model = served(folder)
    ids, scores = greedy(folder, 12)
    length = ids.index(END) + 1
    assert START in ids[:length], "the head is not what this test is about"
    assert scores[length - 1] < -5, "the spare row is not the likeliest"
    async with (
        LocalPipeline(folder, [1, 2], vocabulary=model.vocabulary) as local,
        serving(local.pipeline, model=model) as (_, target),
        AsyncClient(target) as client,
    ):
        ended = await client.generate(PROMPT, max_tokens=12, temperature=0)
        assert (ended.finish_reason, list(ended.token_ids)) == (FinishReason.STOP_TOKEN, ids[:length])
        assert list(ended.log_probabilities) == pytest.approx(scores[:length], abs=1e-4)
        assert "<|im_start|>" in ended.text
        assert "<|im_end|>" not in ended.text

        on = await client.generate(PROMPT, max_tokens=12, temperature=0, ignore_eos=True)
        assert (on.finish_reason, list(on.token_ids)) == (FinishReason.LENGTH, ids)
        assert on.text.startswith(ended.text)

        drawn = await client.generate(PROMPT, max_tokens=40, temperature=1.5, seed=3, ignore_eos=True)
        assert max(drawn.token_ids) < SPARE

        # Typed by a user, a control token or a marker stays text.
        typed = await client.tokenize("<s> </s> <|im_end|>", add_bos=False)
        assert not {1, 2, START, END} & set(typed)
        assert await client.detokenize(typed) == "<s> </s> <|im_end|>"

"""The training script: gradients, losses and files are what they claim to be."""

from __future__ import annotations

import math
import signal
import threading

import pytest
import sentencepiece
import torch
from models import hf_model, load_tensors
from reference_model import forward

from tramontane.deploy import train as training
from tramontane.deploy.muon import orthogonalise
from tramontane.deploy.train import Recipe, encode, first_interrupt, judge, save, train, train_tokenizer
from tramontane.deploy.training_model import (
    Routing,
    Shape,
    TrainingModel,
    accumulate_gradients,
    balance_loss,
)
from tramontane.stages.config import ModelConfig

SMALL = Shape(
    vocab=300, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=24, experts=4, window=16, dropout=0.0
)
TEXT = "\n".join(
    f"Line {n}: the {n % 7} lords of {n % 5} towns ride {'north' if n % 3 else 'south'}." for n in range(400)
)


def gradients(microbatches: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = TrainingModel(SMALL).double()
    tokens_BT = torch.randint(SMALL.vocab, (6, 21))
    accumulate_gradients(model, tokens_BT, microbatches=microbatches, balance=0.5)
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("microbatches", [2, 3, 6])
def test_a_batch_in_microbatches_has_the_whole_batchs_gradients(microbatches: int) -> None:
    for whole, cut in zip(gradients(1), gradients(microbatches), strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-9, atol=1e-12)


def test_balance_is_one_a_sequence_when_even_and_the_expert_count_when_not() -> None:
    even = Routing(torch.full((8, 4), 0.25), torch.tensor([[0, 1], [2, 3]] * 4))
    assert balance_loss([even], sequences=2).item() == pytest.approx(2.0)
    one = Routing(torch.eye(4)[[0] * 8], torch.zeros(8, 1, dtype=torch.long))
    assert balance_loss([one], sequences=2).item() == pytest.approx(2 * 4.0)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in [(48, 16), (16, 48), (3, 24, 24)]:
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.3
        assert values.max() < 1.4


def test_training_learns_and_writes_what_transformers_and_the_reference_read(tmp_path) -> None:
    recipe = Recipe(epochs=2, batch=8, microbatches=2, length=32, muon_lr=0.02, adam_lr=0.01, balance=0.01, threads=1)
    model, judgement = train(TEXT, tmp_path, SMALL, recipe, 1, threading.Event())
    assert judgement.nats_per_token < math.log(SMALL.vocab) - 1
    config = ModelConfig.load(tmp_path)
    tokens = list(range(3, 60))
    with torch.inference_mode():
        ours, _ = model.eval()(torch.tensor([tokens]))
        theirs = hf_model(tmp_path)(torch.tensor([tokens])).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(forward(load_tensors(tmp_path), config, tokens), theirs[0], rtol=1e-4, atol=1e-4)


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C comes while a step is computed: at the given ones. The steps so far are in the list."""

    def at(*numbers: int) -> list[int]:
        steps: list[int] = []

        def step(*arguments, **options):
            steps.append(len(steps) + 1)
            if steps[-1] in numbers:
                signal.raise_signal(signal.SIGINT)
            return accumulate_gradients(*arguments, **options)

        monkeypatch.setattr(training, "accumulate_gradients", step)
        return steps

    return at


QUICK = Recipe(epochs=3, batch=8, microbatches=1, length=32, muon_lr=0.02, adam_lr=0.01, balance=0.01, threads=1)
FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.model"]


def test_ctrl_c_ends_the_training_and_keeps_what_is_best(tmp_path, interrupted, capsys):
    steps = interrupted(3)
    with first_interrupt() as ending:
        _, judgement = train(TEXT, tmp_path, SMALL, QUICK, 1, ending)
    assert steps == [1, 2, 3]
    out, err = capsys.readouterr()
    assert "epoch 1/3" in out
    assert "epoch 2/3" not in out
    assert "Ctrl-C again ends at once" in err
    assert math.isfinite(judgement.nats_per_token)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert ModelConfig.load(tmp_path).vocab == SMALL.vocab
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_leaves_what_an_earlier_training_has_made(tmp_path, interrupted):
    for name in FILES:
        (tmp_path / name).write_text("of an earlier training")
    interrupted(2, 3)
    with pytest.raises(KeyboardInterrupt), first_interrupt():
        train(TEXT, tmp_path, SMALL, QUICK, 1, threading.Event())  # it does not hear of the first
    assert {path.read_text() for path in tmp_path.iterdir()} == {"of an earlier training"}


def test_judging_in_parts_is_judging_in_one(tmp_path) -> None:
    torch.manual_seed(0)
    model, tokens_N = TrainingModel(SMALL), torch.randint(3, SMALL.vocab, (500,))
    assert judge(model, tokens_N, 1000, length=64).nats_per_token == pytest.approx(
        judge(model, tokens_N, 1000, length=512).nats_per_token, rel=1e-5
    )


def test_text_comes_back_from_its_pieces(tmp_path) -> None:
    file = train_tokenizer(TEXT, 300)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=file)
    text = "  A line,\nand\tone — with an é 漢 and \n\n two spaces  \n"
    assert "".join(tokenizer.decode(piece) for piece in [encode(tokenizer, text).tolist()]) == text
    save(TrainingModel(SMALL), file, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES

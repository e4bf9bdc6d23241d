"""Train a small Mixtral from a text: `python deploy/train.py TEXT --out DIR`.

The first nine tenths of the text train model and tokenizer; the last tenth is seen by neither and judges. A text as
small as a megabyte is soon overfitted, so branches drop out, and the weights that are kept are a moving average, saved
whenever they judge better. Ctrl-C ends the training, judges where it stands, and keeps the best.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tramontane.deploy.muon import Muon
from tramontane.deploy.training_model import Shape, TrainingModel, accumulate_gradients, hugging_face_tensors

BOS, EOS = 1, 2
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 + SIGINT."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train."""

    epochs: int
    batch: int
    microbatches: int
    length: int
    muon_lr: float
    adam_lr: float
    balance: float
    ema: float = 0.995
    warmup_steps: int = 20
    threads: int = 2


class Judgement(NamedTuple):
    """What the unseen tenth says."""

    nats_per_token: float
    bits_per_character: float
    least_shares: tuple[float, ...]
    """For each layer, the share of its choices that its least used expert gets; 1 / experts where all get the same."""


def train_tokenizer(text: str, vocab: int) -> bytes:
    """Train a unigram tokenizer and return its file. With byte fallback it encodes any text without loss."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,  # a path would be written into the model
        vocab_size=vocab,
        model_type="unigram",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        bos_id=BOS,
        eos_id=EOS,
        minloglevel=2,
    )
    return model.getvalue()


def encode(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> Tensor:
    """Token ids of the whole text, cut line by line. [N]"""
    pieces: list[list[int]] = tokenizer.encode(text.splitlines(keepends=True))
    return torch.tensor([token for line in pieces for token in line])


def batches(tokens_N: Tensor, recipe: Recipe, generator: torch.Generator) -> Iterator[Tensor]:
    """The epoch's text in random order, [B, length + 1] at a time; every fourth sequence starts with BOS."""
    start = int(torch.randint(recipe.length, (1,), generator=generator))
    usable = tokens_N[start : start + (len(tokens_N) - start - 1) // recipe.length * recipe.length + 1]
    sequences = usable.unfold(0, recipe.length + 1, recipe.length)
    for rows in torch.randperm(len(sequences), generator=generator).split(recipe.batch):
        batch_BT = sequences[rows].clone()
        batch_BT[torch.rand(len(rows), generator=generator) < 0.25, 0] = BOS
        yield batch_BT


@torch.inference_mode()
def judge(model: TrainingModel, tokens_N: Tensor, characters: int, length: int = 1024) -> Judgement:
    """The loss of a text as one stream: each token sees at least `length` tokens before it, or the text's beginning.

    With 8 layers of window 128 nothing is seen beyond 8 x 127 positions, so the cut changes nothing.
    """
    model.eval()
    tokens_N = torch.cat([torch.tensor([BOS]), tokens_N])
    nats, counts = 0.0, torch.zeros(model.shape.layers, model.shape.experts)
    for start in range(0, len(tokens_N) - 1, length):
        context = min(start, length)
        part = tokens_N[start - context : start + length + 1]
        logits_BTV, routings = model(part[None, :-1])
        nats += F.cross_entropy(logits_BTV[0, context:], part[context + 1 :], reduction="sum").item()
        for layer, routing in enumerate(routings):
            counts[layer] += routing.chosen_Nk[context:].flatten().bincount(minlength=model.shape.experts)
    model.train()
    shares = (counts / counts.sum(1, keepdim=True)).min(1).values
    return Judgement(nats / (len(tokens_N) - 1), nats / characters / math.log(2), tuple(shares.tolist()))


def save(model: TrainingModel, tokenizer: bytes, folder: Path) -> None:
    """Write tokenizer, configuration and weights; each file appears whole or not at all."""
    shape = model.shape
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": shape.vocab,
        "hidden_size": shape.dim,
        "intermediate_size": shape.ffn_dim,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "sliding_window": shape.window,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.experts_per_token,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "bfloat16",
    }
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        weights = Path(scratch) / "model.safetensors"
        save_file(hugging_face_tensors(model), weights, metadata={"format": "pt"})
        weights.chmod(0o644)
        for name, values in (
            ("config.json", config),
            ("generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS}),
        ):
            (Path(scratch) / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        (Path(scratch) / "tokenizer.model").write_bytes(tokenizer)
        for path in sorted(Path(scratch).iterdir()):
            os.replace(path, folder / path.name)


def optimizers_of(model: TrainingModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for embedding, gates and norms."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = parameter.dim() > 1 and "embed" not in name and "gate" not in name
        (matrices if inside else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, lr=recipe.muon_lr), adam]


@contextlib.contextmanager
def first_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that no step or save is cut in two. A second one interrupts as usual."""
    asked = threading.Event()

    def ask(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, usual)
        click.echo("ending: what there is will be judged, and the best kept; Ctrl-C again ends at once", err=True)

    usual = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, usual)


def train(
    text: str, folder: Path, shape: Shape, recipe: Recipe, seed: int, ending: threading.Event
) -> tuple[TrainingModel, Judgement]:
    """Train, and save the best moving average. Returns it, rounded to bfloat16 as it is saved, and its judgement.

    `ending` ends the training after the current step; the model is judged then, as after an epoch.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(recipe.threads)
    generator = torch.Generator().manual_seed(seed)
    cut = len(text) * 9 // 10
    vocabulary = train_tokenizer(text[:cut], shape.vocab)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    seen_N, unseen_N = encode(tokenizer, text[:cut]), encode(tokenizer, text[cut:])
    model = TrainingModel(shape)
    average, best_model, best = copy.deepcopy(model), copy.deepcopy(model), Judgement(math.inf, math.inf, ())
    optimizers = optimizers_of(model, recipe)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    steps = recipe.epochs * math.ceil(len(seen_N) // recipe.length / recipe.batch)
    step, started = 0, time.monotonic()
    for epoch in range(recipe.epochs):
        losses = []
        for batch_BT in batches(seen_N, recipe, generator):
            rate = min((step + 1) / recipe.warmup_steps, max(0.02, 1 - step / steps))
            for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks, strict=True):
                group["lr"] = peak * rate
            losses.append(
                accumulate_gradients(model, batch_BT, microbatches=recipe.microbatches, balance=recipe.balance)
            )
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            decay = min(recipe.ema, step / (step + 10))
            with torch.no_grad():
                for kept, now in zip(average.parameters(), model.parameters(), strict=True):
                    kept.lerp_(now, 1 - decay)
            if step % 20 == 0:
                loss, seconds = statistics.fmean(losses[-20:]), time.monotonic() - started
                click.echo(f"step {step}/{steps}  loss {loss:.3f}  {seconds:.0f} s")
            if ending.is_set():
                break
        judgement = judge(average, unseen_N, len(text) - cut)
        click.echo(f"epoch {epoch + 1}/{recipe.epochs}  {describe(judgement)}")
        if judgement.bits_per_character < best.bits_per_character:
            best, best_model = judgement, copy.deepcopy(average)
            save(best_model, vocabulary, folder)
        if ending.is_set():
            break
    best_model.to(torch.bfloat16).to(torch.float32)
    return best_model, judge(best_model, unseen_N, len(text) - cut)


def describe(judgement: Judgement) -> str:
    """One line."""
    return (
        f"unseen: {judgement.nats_per_token:.4f} nats a token, {judgement.bits_per_character:.4f} bits a character, "
        f"least used expert {min(judgement.least_shares):.1%}"
    )


def parameters_of(shape: Shape) -> tuple[int, int]:
    """Parameters in total, and those that one token uses (all but the experts not chosen)."""
    total = sum(parameter.numel() for parameter in TrainingModel(shape).parameters())
    expert = 3 * shape.dim * shape.ffn_dim
    return total, total - shape.layers * (shape.experts - shape.experts_per_token) * expert


@click.command()
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write.")
@click.option("--epochs", default=6, show_default=True)
@click.option("--batch", default=16, show_default=True, help="Sequences a step.")
@click.option("--microbatches", default=2, show_default=True, help="Parts that a batch is computed in.")
@click.option("--length", default=256, show_default=True, help="Tokens of a sequence.")
@click.option("--muon-lr", default=0.02, show_default=True)
@click.option("--adam-lr", default=0.004, show_default=True)
@click.option("--balance", default=0.1, show_default=True, help="Weight of the load-balancing loss.")
@click.option("--dropout", default=0.1, show_default=True)
@click.option("--ffn-dim", default=112, show_default=True, help="Width of an expert.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(text: Path, out: Path, dropout: float, ffn_dim: int, seed: int, **options: float) -> None:
    """Train a small Mixtral on the file TEXT and write a Hugging Face folder with its own tokenizer.

    Ctrl-C ends the training where it is and keeps the best; the exit status is 130 then.
    """
    out.mkdir(parents=True, exist_ok=True)
    shape, recipe = Shape(dropout=dropout, ffn_dim=ffn_dim), Recipe(**options)  # type: ignore[arg-type]
    total, active = parameters_of(shape)
    click.echo(f"{total:,} parameters, {active:,} active")
    started = time.monotonic()
    with first_interrupt() as ending:
        _, judgement = train(text.read_text(encoding="utf-8"), out, shape, recipe, seed, ending)
    click.echo(f"best, as saved: {describe(judgement)}")
    record = {"parameters": total, "active": active, "seconds": round(time.monotonic() - started)}
    click.echo(json.dumps(record | judgement._asdict()))
    if ending.is_set():
        raise click.exceptions.Exit(INTERRUPTED)


if __name__ == "__main__":
    main()

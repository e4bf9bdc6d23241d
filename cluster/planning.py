"""From `serve`'s options, a checkpoint and what the cluster offers to the spec of a service. Starts nothing."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from tramontane.cluster.entrance import Entrance
from tramontane.cluster.kv_plan import KVOptions, KVPlanner
from tramontane.cluster.memory_sums import Room
from tramontane.cluster.model_dir import resolve_model_dir
from tramontane.cluster.node_facts import NodeFacts
from tramontane.cluster.scheduler_options import SchedulerOptions
from tramontane.cluster.spec import ServiceSpec
from tramontane.cluster.tokenizer import Tokenizer
from tramontane.cluster.vocabulary import Vocabulary
from tramontane.stages.checkpoint import Checkpoint
from tramontane.stages.config import ModelConfig
from tramontane.stages.folder import CONFIG, TOKENIZER, SmallFiles
from tramontane.stages.split import split_as, split_layers
from tramontane.stages.stage_memory import stage_memory
from tramontane.stages.variants import DEVICES, check_requested, kernel_set

EMBEDDED = Path(__file__).resolve().parent.parent / "deploy" / "embedded"
OTHER_TOKENIZERS = ("tekken.json", "tokenizer.json", "tokenizer.model.v*")
STAGE_PROCESS_BYTES = 400 * 2**20
"""What a stage's process takes beside weights, KV and buffers: torch and a step's threads. Idle it takes half."""
GPU_CONTEXT_BYTES = 1 << 30
"""What CUDA's context and its libraries' work space take."""


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
    kernels: str | None
    allow_mixed_numerics: bool
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


@dataclass(frozen=True, kw_only=True)
class ReadModel:
    """A checkpoint that `serve` has read. It is read once, and planned for again when the cluster is known."""

    name: str
    folder: Path
    files: SmallFiles
    config: ModelConfig
    spans: tuple[range, ...]
    """Each stage's layers."""
    dtype: str
    vocabulary: Vocabulary
    has_tokenizer: bool

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the folder holds and the service does not use, though its owner may count on it, a line each."""
        remarks = list(self.vocabulary.remarks)
        if "auto_map" in self.files.json(CONFIG):
            remarks.append(f"{CONFIG} names code of its own (auto_map), which is not run")
        if not self.has_tokenizer:
            others = [path.name for pattern in OTHER_TOKENIZERS for path in sorted(self.folder.glob(pattern))]
            beside = f" ({', '.join(others)}: not supported)" if others else ""
            remarks.append(f"there is no {TOKENIZER}{beside}: the model takes and gives token ids, no text")
        return tuple(remarks)


def read_model(options: ServeOptions) -> ReadModel:
    """Read and check the folder that the options name.

    Raises:
        ValueError: the checkpoint or its tokenizer is wrong, or cannot be split so; the message names file or option.
    """
    folder, name = resolve_model_dir(options.model_dir or EMBEDDED)
    files = SmallFiles.read(folder)
    config = ModelConfig.read(files)
    spans = split_as(config, options.split) if options.split else split_layers(config, options.stages)
    if options.split and options.stages not in (1, len(options.split)):
        raise ValueError(f"split names {len(options.split)} stages, and stages is {options.stages}")
    checkpoint = Checkpoint.open(folder, config)
    checkpoint.owners(spans)
    tokenizer = Tokenizer.read(files, config)
    return ReadModel(
        name=options.name or name,
        folder=folder,
        files=files,
        config=config,
        spans=spans,
        dtype=options.dtype or checkpoint.dtype,
        vocabulary=Vocabulary.read(files, config.vocab, tokenizer),
        has_tokenizer=tokenizer is not None,
    )


def plan_service(
    options: ServeOptions, model: ReadModel, nodes: Sequence[NodeFacts], *, identity: str | None = None
) -> ServiceSpec:
    """Turn options, a checkpoint and what each node of the cluster offers into the spec of a service.

    Without nodes the cluster is not known yet, and only options are refused that are wrong on any cluster. A plan
    that is made again keeps its `identity`.

    Raises:
        ValueError: an option is not right, or the nodes cannot hold what it asks for; names option, limit and value.
    """
    stages = len(model.spans)
    cpus = options.cpus_per_stage or share_of_nodes([node.cpus for node in nodes], stages)
    device = _device(options, nodes, stages)
    check_requested(options.kernels, device=device, quantize=options.quantize)
    rooms = gpu_rooms(nodes) if device == "cuda" else node_rooms(nodes, stages, cpus)
    kv = KVPlanner(
        model.config,
        model.spans,
        model.dtype,
        KVOptions(
            max_context=options.max_context,
            kv_memory=options.kv_memory,
            kv_length=options.kv_length,
            chunk=options.chunk,
            max_batch_tokens=options.max_batch_tokens,
        ),
        [
            stage_memory(
                model.config, span, dtype=model.dtype, quantize=options.quantize, rows=options.max_batch_tokens
            )
            for span in model.spans
        ],
        rooms,
    ).plan()
    return ServiceSpec(
        identity=identity or secrets.token_hex(8),
        generation=1,
        name=model.name,
        model_dir=str(model.folder),
        files=model.files.digests,
        spans=tuple((span.start, span.stop) for span in model.spans),
        dtype=model.dtype,
        quantize=options.quantize,
        device=device,
        kernels=options.kernels,
        allow_mixed_numerics=options.allow_mixed_numerics,
        scheduler=SchedulerOptions(
            layout=kv.layout,
            context=kv.context,
            max_batch_tokens=options.max_batch_tokens,
            max_waiting=options.max_waiting,
            decode_groups=options.decode_groups,
            max_queue_wait_s=options.max_queue_wait,
            max_running=options.max_running,
            max_step_s=options.max_step,
        ),
        context_lowered=kv.lowered,
        memory_sum="" if kv.sum is None else str(kv.sum),
        sampleable_ids=model.vocabulary.sampleable_ids,
        unnamed_ids=model.vocabulary.unnamed_ids,
        cpus_per_stage=cpus,
        threads=options.threads or max(1, math.floor(cpus)),
        entrance=options.entrance,
        hang_limit_s=float(options.hang_limit),
        link_silence_s=float(options.link_silence),
        log_level=options.log_level,
    )


def _device(options: ServeOptions, nodes: Sequence[NodeFacts], stages: int) -> str:
    """The stages' device: cpu or cuda."""
    gpus = sum(node.gpus for node in nodes)
    if options.device == "auto":
        # 8-bit weights are the native CPU kernels' alone.
        devices = DEVICES[kernel_set(options.kernels)]
        on_both = options.quantize is None and (options.kernels is None or "cuda" in devices)
        return "cuda" if options.kernels == "cuda" or (gpus >= stages and on_both) else "cpu"
    if options.quantize is not None and options.device != "cpu":
        raise ValueError(
            f"quantize is {options.quantize}, and device is {options.device}: only CPUs hold weights in 8 bits"
        )
    # A cluster may get more GPUs; a Ray of our own is this machine, and stays so.
    if options.device == "cuda" and options.address is None and nodes and gpus < stages:
        raise ValueError(
            f"--device is cuda, and {nodes[0].name} has {gpus:g} GPUs that CUDA programs see; --stages is {stages}: "
            "each needs one"
        )
    return options.device


def node_rooms(nodes: Sequence[NodeFacts], stages: int, cpus_per_stage: float) -> list[Room]:
    """The nodes' memory for stages on CPUs. A node takes as many stages as it has CPUs for; a single node takes all."""
    return [
        Room(
            place=node.name,
            free=node.free_memory,
            stages=stages if len(nodes) == 1 else min(stages, math.floor(node.cpus / cpus_per_stage + 1e-9)),
            each=STAGE_PROCESS_BYTES,
        )
        for node in nodes
        if node.free_memory is not None
    ]


def gpu_rooms(nodes: Sequence[NodeFacts]) -> list[Room]:
    """The GPUs' memory for stages on GPUs, one stage to each."""
    return [
        Room(place=f"GPU {index} of {node.name}", free=free, stages=1, each=GPU_CONTEXT_BYTES)
        for node in nodes
        for index, free in enumerate(node.free_gpu_memory or ())
    ]


def share_of_nodes(cpus: Iterable[float], stages: int) -> float:
    """The most CPUs that each of the stages can have where none is spread over two nodes.

    One CPU over all stages where no node has any: a cluster that is still empty, or none yet.
    """
    offered = [Fraction(count) for count in cpus if count > 0]
    shares = {count / parts for count in offered for parts in range(1, stages + 1)}
    enough = (share for share in shares if sum(count // share for count in offered) >= stages)
    return float(max(enough, default=Fraction(1, stages)))

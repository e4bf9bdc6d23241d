"""The operators' verbs, `serve` and `down`, which `client/` finds through the entry points `tramontane.commands`.

Only click is imported here, so that `tramontane --help` stays quick and works without the extra.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import click

LOG_LEVELS = ["debug", "info", "warning", "error"]
FILE = click.Path(path_type=Path)
MOST_BYTES = 2**60


class ByteSize(click.ParamType[int]):
    """A number of bytes with an optional unit: 512MiB, 2GB, 1048576."""

    name = "bytes"
    _units: ClassVar = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]*\.?[0-9]+) *([A-Za-z]*)", value.strip())
        if not match or match[2].upper() not in self._units:
            self.fail(f"{value!r} is no size; write for example 512MiB, 2GB or a number of bytes", param, ctx)
        size = float(match[1]) * self._units[match[2].upper()]
        if size > MOST_BYTES:
            self.fail(f"{value!r} is more than any machine has", param, ctx)
        return int(size)


class LayerCounts(click.ParamType[tuple[int, ...]]):
    """Whole numbers, one a stage: 5,3."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Layers of each stage."""
        try:
            return tuple(int(count) for count in value.split(",")) if isinstance(value, str) else tuple(value)
        except ValueError:
            self.fail(f"{value!r} is no list of whole numbers; write for example 5,3", param, ctx)


@click.command(short_help="Serve a model from a pipeline of stages.")
@click.argument("model_dir", required=False, type=click.Path(path_type=Path))
@click.option("--stages", type=click.IntRange(1), default=1, show_default=True, help="Stages of the pipeline.")
@click.option("--split", type=LayerCounts(), help="Layers of each stage, instead of a split by cost.")
@click.option(
    "--name",
    help="The model's name towards users. Default: the folder's, or ORG/NAME of a snapshot in the hub's cache.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=50051, show_default=True, help="0 takes a free one.")
@click.option("--tls-cert", type=FILE, help="Certificate chain (PEM). Files are read on the gateway's node.")
@click.option("--tls-key", type=FILE, help="Its private key (PEM).")
@click.option("--client-ca", type=FILE, help="Ask clients for a certificate of one of these authorities (PEM).")
@click.option("--token-file", type=FILE, help="Ask every call for one of these bearer tokens, one a line.")
@click.option("--insecure", is_flag=True, help="Allow a --host beyond loopback without TLS.")
@click.option(
    "--max-connection-age",
    type=click.IntRange(0, 1_000_000),
    default=3600,
    show_default=True,
    metavar="SECONDS",
    help="Exchange connections that are older, so that clients find new gateways; streams go on. 0 is never.",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Default: the checkpoint's.")
@click.option(
    "--quantize", type=click.Choice(["int8"]), help="Hold weights in 8 bits, on CPUs with native kernels. Default: no."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--kernels",
    metavar="NAME",
    envvar="TRAMONTANE_KERNELS",
    help="A kernel set (native, cpu, cuda) or a variant of native (amx, avx512bf16, avx512, avx2), for all stages. "
    "Default: the fastest that every stage's node runs.",
)
@click.option(
    "--allow-mixed-numerics",
    is_flag=True,
    help="Let stages compute with different kernels where none run on all of their nodes.",
)
@click.option(
    "--kv-memory", type=ByteSize(), help="KV memory of each stage. Default: 512MiB, or one full context, or what fits."
)
@click.option("--kv-length", type=click.IntRange(1), help="Tokens of a typical sequence, to share KV among windows.")
@click.option(
    "--chunk", type=click.IntRange(1), help="Tokens of a prefill chunk. Default: smallest window, at most 512."
)
@click.option(
    "--max-batch-tokens",
    type=click.IntRange(1, 1 << 20),
    default=1024,
    show_default=True,
    help="Rows of one microbatch.",
)
@click.option(
    "--max-context",
    type=click.IntRange(2),
    help="Prompt and completion together. Default: the checkpoint's, or what fits.",
)
@click.option("--max-waiting", type=click.IntRange(1), default=1024, show_default=True, help="Requests that may wait.")
@click.option(
    "--max-queue-wait",
    type=click.FloatRange(0),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Refuse requests that would wait longer, by estimate, beyond the first few. 0 is never.",
)
@click.option(
    "--max-running",
    type=click.IntRange(1),
    help="Sequences that run at a time. Default: as many as raise measured tokens/s.",
)
@click.option(
    "--max-step",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="Longest step while others decode. Default: 1.5 decode steps of as many rows as raise measured tokens/s.",
)
@click.option(
    "--decode-groups", type=click.IntRange(1, 64), help="Microbatches that decode goes round in. Default: one a stage."
)
@click.option("--cpus-per-stage", type=click.FloatRange(0, min_open=True), help="Default: what nodes have for each.")
@click.option("--threads", type=click.IntRange(1), help="Threads of a stage's step. Default: whole CPUs of a stage.")
@click.option("--address", help="Join this Ray cluster (HOST:PORT or auto) instead of starting one.")
@click.option("--detach", is_flag=True, help="With --address: return once ready and leave the service running.")
@click.option(
    "--hang-limit",
    type=click.IntRange(5, 86_400),
    default=45,
    show_default=True,
    metavar="SECONDS",
    help="A stage whose step takes so long, and ten times what such a step costs here, breaks the pipeline.",
)
@click.option(
    "--link-silence",
    type=click.IntRange(2, 86_400),
    default=45,
    show_default=True,
    metavar="SECONDS",
    help="Close a link between parts of the service on which nothing has come for so long.",
)
@click.option("--log-level", type=click.Choice(LOG_LEVELS), default="info", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line instead, one for each event.")
def serve(**options: Any) -> None:
    """Serve MODEL_DIR, a Hugging Face folder of a Mistral or Mixtral, or without one the small embedded model.

    The port opens as soon as Ray is up; requests are answered when the stages have loaded. Ctrl-C ends what was
    started. Certificates and tokens are taken up anew when their files change.
    """
    from tramontane.cluster import serve as serving
    from tramontane.cluster.planning import ServeOptions

    sys.exit(_told(lambda: serving.serve(ServeOptions(**options))))


@click.command(short_help="End a service that was started here, or on a given Ray cluster.")
@click.argument("service", required=False)
@click.option("--address", help="End the service of this Ray cluster (HOST:PORT or auto), whoever has started it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line instead, one for each event.")
def down(service: str | None, address: str | None, as_json: bool) -> None:
    """End the service that your `serve` has started on this machine: all of its parts, and their room on the Ray.

    Where several run, SERVICE says which: its model, the HOST:PORT that clients dial, or the id that the refusal names.
    """
    from tramontane.cluster import down as ending

    sys.exit(_told(lambda: ending.down(service, address, as_json=as_json)))


def _told(job: Callable[[], int]) -> int:
    """A user's mistake is one line, not a traceback."""
    try:
        return job()
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None

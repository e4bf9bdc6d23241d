"""What a hop between two processes costs: `python tests/bench/bench_links.py`.

One process sends a microbatch with rows, the other receives them into a buffer of its own and sends them back; a hop is
half of that round trip. Small hops are bound by two wake-ups and by encoding and decoding the microbatch, large ones by
two copies through the kernel (one in, one out), with sender and receiver on a core each. A stage's hop in a pipeline
hides behind its step, so what counts is that a hop takes less time than a step. The row `bare` is the floor: the same
bytes over a plain socket pair, without frames or microbatches.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import queue
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tramontane.cluster import frames
from tramontane.cluster.address import Address
from tramontane.cluster.link import Link
from tramontane.cluster.link_errors import LinkClosed
from tramontane.cluster.listener import Listener
from tramontane.cluster.messages import Role
from tramontane.cluster.site import Site
from tramontane.stages.microbatch import BlockTable, Microbatch, SampledRows, no_scored_rows

SIZES = {"4 KB": 4 << 10, "1 MB": 1 << 20, "4 MB": 4 << 20, "32 MB": 32 << 20}
ROUNDS = 5
SECONDS = 0.5
"""Of each round, within which the median is taken; the figures are medians over the rounds."""


def main() -> None:
    """Measure in interleaved rounds, print a table, then one JSON line."""
    ways: dict[str, Callable[[], dict[str, float]]] = {
        "unix": lambda: measure_link("near"),
        "TCP": lambda: measure_link("far"),
        "bare": measure_bare,
    }
    hops_us: dict[tuple[str, str], list[float]] = {(door, size): [] for door in ways for size in SIZES}
    for _ in range(ROUNDS):
        for door, measure in ways.items():
            for size, hop_us in measure().items():
                hops_us[door, size].append(hop_us)
    encode_us, decode_us = measure_frames()
    print(f"{'':6}" + "".join(f"{size:>22}" for size in SIZES))
    for door in ways:
        medians = {size: statistics.median(hops_us[door, size]) for size in SIZES}
        print(f"{door:6}" + "".join(f"{us:10.0f} us {SIZES[size] / us:5.0f} MB/s" for size, us in medians.items()))
    print(f"a microbatch of 32 decode rows: encode {encode_us:.0f} us, decode {decode_us:.0f} us")
    hops = [
        {"door": door, "bytes": SIZES[size], "hop_us": round(statistics.median(times), 1), "rounds": ROUNDS}
        for (door, size), times in hops_us.items()
    ]
    facts = {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "date": time.strftime("%F")}
    print(json.dumps({"hops": hops, "encode_us": round(encode_us, 1), "decode_us": round(decode_us, 1), **facts}))


def measure_link(node: str) -> dict[str, float]:
    """Microseconds a hop for each size, through one link dialled from that node."""
    accepted: queue.Queue[Link] = queue.Queue()
    with tempfile.TemporaryDirectory() as folder:
        listener = Listener("bench", site_of(Path(folder), "near"), lambda link, hello: accepted.put(link))
        echo = multiprocessing.get_context("spawn").Process(target=send_back, args=(listener.address, node))
        echo.start()
        link = accepted.get(timeout=60)
        hops = {size: median_us(lambda count=count: there_and_back(link, count)) / 2 for size, count in SIZES.items()}
        link.close()
        echo.join()
        listener.close()
    return hops


def site_of(folder: Path, node: str) -> Site:
    return Site(node=node, sockets=folder, secret=b"of the bench", host="127.0.0.1")


def send_back(address: Address, node: str) -> None:
    """The other process: everything goes back as it came."""
    site = site_of(Path(address.unix_path).parent, node)
    link = Link.dial(address, site, role=Role.STAGE, name="echo", epoch=1, timeout_s=10)
    buffer = memoryview(bytearray(max(SIZES.values())))
    size = 0

    def inbox(microbatch: Microbatch, count: int) -> memoryview:
        nonlocal size
        size = count
        return buffer[:count]

    try:
        while True:
            message = link.receive(inbox)
            link.send(message, buffer[:size])
    except LinkClosed:
        link.close()


def measure_bare() -> dict[str, float]:
    """Microseconds a hop for each size, through a plain unix socket pair."""
    mine, theirs = socket.socketpair()
    echo = multiprocessing.get_context("spawn").Process(target=send_back_bare, args=(theirs,))
    echo.start()
    theirs.close()
    with mine:
        there_and_back_bare(mine, 1)  # the other process is up
        hops = {
            size: median_us(lambda count=count: there_and_back_bare(mine, count)) / 2 for size, count in SIZES.items()
        }
    echo.join()
    return hops


def send_back_bare(line: socket.socket) -> None:
    """The other process: a length, then so many bytes, and the bytes go back."""
    buffer = memoryview(bytearray(max(SIZES.values())))
    while length := line.recv(4, socket.MSG_WAITALL):
        count = int.from_bytes(length, "little")
        line.recv_into(buffer, count, socket.MSG_WAITALL)
        line.sendall(buffer[:count])


def there_and_back_bare(line: socket.socket, count: int) -> None:
    """One round trip."""
    line.sendmsg([count.to_bytes(4, "little"), BUFFER[:count]])
    line.recv_into(BUFFER, count, socket.MSG_WAITALL)


BUFFER = memoryview(bytearray(max(SIZES.values())))


def there_and_back(link: Link, count: int) -> None:
    """One round trip."""
    link.send(DECODE, BUFFER[:count])
    link.receive(lambda microbatch, size: BUFFER[:size])


def measure_frames() -> tuple[float, float]:
    """Microseconds to encode and to decode a microbatch."""
    frame = b"".join(frames.encode(DECODE))
    prefix = frames.parse_prefix(frame[: frames.PREFIX.size])
    header_end = frames.PREFIX.size + prefix.header
    header, arrays = frame[frames.PREFIX.size : header_end], bytearray(frame[header_end:])
    return median_us(lambda: frames.encode(DECODE)), median_us(lambda: frames.decode(header, arrays))


def median_us(job: Callable[[], object]) -> float:
    """The median of as many calls as fit into `SECONDS`, after a few to warm up."""
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while (start := time.perf_counter()) < end or len(times) < 8:
        job()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:]) * 1e6


def decode_rows(count: int) -> Microbatch:
    """So many sequences that decode, each with 8 blocks."""
    ints, floats = np.arange(count, dtype=np.int32), np.ones(count, np.float32)
    return Microbatch(
        epoch=1,
        step=1,
        tokens=ints,
        first=ints,
        length=np.ones(count, np.int32),
        sequence=np.arange(count, dtype=np.int64),
        tables=(BlockTable(blocks=np.arange(8 * count, dtype=np.int32), held=ints, fresh=ints[:2]),),
        sampled=SampledRows(
            row=ints,
            temperature=floats,
            top_k=ints,
            top_p=floats,
            min_p=floats,
            seed=np.arange(count, dtype=np.uint64),
            banned=ints[:0],
            banned_count=ints,
        ),
        scored=no_scored_rows(),
    )


DECODE = decode_rows(32)

if __name__ == "__main__":
    main()

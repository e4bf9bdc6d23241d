"""Log files of our own: what strangers send cannot forge a line or fill the disk."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from tramontane.cluster.log_lines import OneLine, RateLimit, TokenBucket

FORGED = "a name\n2026-01-01 00:00:00,000 I tramontane: all is well\r\x1b[2J\x85\u2028\u202e\ud800"


def record(message: str, *, at_s: float = 0.0, error: BaseException | None = None) -> logging.LogRecord:
    made = logging.LogRecord("n", logging.INFO, "p", 1, message, (), (type(error), error, None) if error else None)
    made.created = at_s
    return made


def test_a_message_is_one_line_whatever_it_holds():
    line = OneLine("%(levelname)s %(message)s").format(record(FORGED))
    assert line == (r"INFO a name\n2026-01-01 00:00:00,000 I tramontane: all is well\r\x1b[2J\x85\u2028\u202e\ud800")
    assert OneLine("%(message)s").format(record("Grüße, 世界 🙂 \\n")) == "Grüße, 世界 🙂 \\n"


def test_a_traceback_s_lines_are_indented_and_cannot_pass_for_events():
    lines = OneLine("%(message)s").format(record("it failed", error=ValueError(FORGED))).split("\n")
    assert lines[0] == "it failed"
    assert lines[1] == "    ValueError: a name"
    assert all(line.startswith("    ") and line.isprintable() for line in lines[1:])


def test_a_bucket_fills_at_its_rate_and_no_further():
    bucket = TokenBucket(rate=8.0, burst=3)
    assert [bucket.take(5.0) for _ in range(5)] == [True, True, True, False, False]
    assert [bucket.take(5.125) for _ in range(2)] == [True, False]
    assert [bucket.take(1000.0) for _ in range(5)] == [True, True, True, False, False]
    assert not bucket.take(0.0), "a clock that was put back gives nothing"
    assert bucket.take(0.125)


def test_what_was_left_out_is_counted_by_the_next_line():
    limit = RateLimit(rate=1.0, burst=2)
    passed = [made for at_s in (0.0, 0.0, 0.1, 0.2, 1.5) if limit.filter(made := record("refused", at_s=at_s))]
    assert [made.getMessage() for made in passed] == [
        *("refused", "refused", "refused (and 2 refusals before it that were left out)")
    ]
    assert limit.filter(last := record("refused", at_s=9.0))
    assert last.getMessage() == "refused"


SCRIPT = """
import logging, sys
from pathlib import Path
from tramontane.cluster import log_file
from tramontane.cluster.log_lines import refusals
log_file.FILE_BYTES = 20_000
log_file.start_log(Path(sys.argv[1]), "info")
log_file.start_log(Path(sys.argv[1]), "info")
for number in range(10_000):
    refusals.info("refused %d", number)
logging.getLogger("tramontane.x").info("between")
for number in range(int(sys.argv[2])):
    logging.getLogger("tramontane.x").debug("unseen")
    logging.getLogger("tramontane.x").info("event %05d %s", number, "\\n" * 9)
"""


@pytest.mark.parametrize("events", [0, 2000])
def test_files_rotate_and_a_flood_of_refusals_leaves_few_lines(tmp_path: Path, events: int):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "gateway-0.log"), str(events)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    files = sorted(tmp_path.iterdir())
    lines = [line for file in files for line in file.read_text().splitlines()]
    if events:
        assert [file.name for file in files] == ["gateway-0.log", "gateway-0.log.1", "gateway-0.log.2"]
        assert max(file.stat().st_size for file in files) <= 20_000
        assert lines[-1].endswith("event 01999 " + r"\n" * 9) or "event 01999" in files[0].read_text()
    else:
        refused = [line for line in lines if "refused" in line]
        assert 100 <= len(refused) < 200
        assert lines[-1].endswith("tramontane.x: between")


KNOCKS = """
import asyncio, socket, sys
from fake_pipeline import serving
from tramontane.cluster.entrance import Entrance

def knock(port):
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n")
            line.settimeout(10)
            try:
                line.recv(100)
            except OSError:
                pass

async def main():
    async with serving(entrance=Entrance(tls_cert=sys.argv[1], tls_key=sys.argv[2])) as (_, target):
        await asyncio.to_thread(knock, int(target.rpartition(":")[2]))

asyncio.run(main())
"""


def test_grpc_prints_nothing_of_handshakes_that_fail(tmp_path: Path):
    from certificates import Authority

    cert, key = Authority(tmp_path).issue("server")
    command = [sys.executable, "-c", KNOCKS, str(cert), str(key)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=Path(__file__).parent)
    assert (done.stdout, done.stderr) == ("", "")

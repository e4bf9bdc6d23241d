"""What a command leaves in its folder: the result as JSON, every request as a line, and a page to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tramontane.client.loadtest.report.json_report import RESULT, to_json
from tramontane.client.loadtest.report.page import render_page
from tramontane.client.loadtest.report.request_log import request_line
from tramontane.client.loadtest.result import SweepResult
from tramontane.client.loadtest.session import Run

REQUESTS, PAGE = "requests.jsonl", "report.html"


def save(folder: Path, run: Run, *, texts: bool) -> tuple[str, ...]:
    """One run; returns the files' names, the page first. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).write_bytes(to_json(run.result))
    (folder / PAGE).write_text(render_page([run.result]), encoding="utf-8")
    _save_requests(folder / REQUESTS, run, texts=texts)
    return PAGE, RESULT, REQUESTS


def save_sweep(folder: Path, result: SweepResult, runs: Sequence[Run], *, texts: bool) -> tuple[str, ...]:
    """A sweep; each level's requests in a file of their own. Returns and raises as `save` does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).write_bytes(to_json(result))
    (folder / PAGE).write_text(render_page(result.levels, result), encoding="utf-8")
    files = [f"requests-{run.result.load.rate:.6g}.jsonl" for run in runs]
    for name, run in zip(files, runs, strict=True):
        _save_requests(folder / name, run, texts=texts)
    return PAGE, RESULT, *files


def _save_requests(path: Path, run: Run, *, texts: bool) -> None:
    asks = {ask.number: ask for ask in run.plan.asks}
    with path.open("wb") as file:
        for record in sorted(run.records, key=lambda record: record.intended_s):
            file.write(request_line(record, asks[record.number], texts=texts))

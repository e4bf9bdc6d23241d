"""The spec that `serve` plans for a folder without options, before the cluster is known."""

from pathlib import Path

from tramontane.cluster.cli import serve
from tramontane.cluster.planning import ServeOptions, plan_service, read_model
from tramontane.cluster.spec import ServiceSpec


def planned(folder: Path | str) -> ServiceSpec:
    options = ServeOptions(**serve.make_context("serve", [str(folder)]).params)
    return plan_service(options, read_model(options), [])

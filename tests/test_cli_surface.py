"""The operators' verbs and their options are a tested list, as the client's are."""

from __future__ import annotations

import inspect

import click
import pytest

from tramontane.client.cli import main
from tramontane.cluster import cli

OPTIONS = {
    "serve": {"--stages", "--split", "--name", "--host", "--port", "--insecure", "--dtype", "--quantize", "--device"}
    | {"--kv-memory", "--kv-length", "--chunk", "--max-batch-tokens", "--max-context", "--max-waiting"}
    | {"--hang-limit", "--max-queue-wait", "--max-running", "--max-step"}
    | {"--tls-cert", "--tls-key", "--client-ca", "--token-file", "--max-connection-age"}
    | {"--cpus-per-stage", "--threads", "--address", "--decode-groups", "--detach", "--log-level", "--json"}
    | {"--link-silence", "--kernels", "--allow-mixed-numerics"},
    "down": {"--address", "--json"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_operators_verbs(name):
    command = getattr(cli, name)
    options = [opt for parameter in command.params if isinstance(parameter, click.Option) for opt in parameter.opts]
    assert sorted(options) == sorted(OPTIONS[name])
    assert command.help


def test_serve_takes_a_folder_or_nothing():
    arguments = [parameter for parameter in cli.serve.params if isinstance(parameter, click.Argument)]
    assert [(argument.name, argument.required) for argument in arguments] == [("model_dir", False)]


def test_one_command_line_has_all_verbs():
    context = click.Context(main)
    assert {*OPTIONS, "generate", "models", "health", "version"} <= {*main.list_commands(context)}
    for name in OPTIONS:
        assert inspect.cleandoc(main.get_command(context, name).help) == inspect.cleandoc(getattr(cli, name).help)

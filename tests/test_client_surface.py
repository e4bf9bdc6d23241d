"""The public surface is a tested list: names, keyword arguments, command-line options, the tree of exceptions."""

from __future__ import annotations

import inspect
import pydoc
import re
from importlib.resources import files
from types import ModuleType

import click
import pytest

import tramontane.client
from tramontane.client import AsyncClient, Client, GenerateArguments, StatusError, TramontaneError, arguments, errors
from tramontane.client.cli import main

COMMON = {"--target", "--tls", "--ca", "--cert", "--key", "--server-name", "--token-file", "--clear-token", "--json"}
OPTIONS = {
    "generate": COMMON
    | {"--ids", "--model", "--max-tokens", "--min-tokens", "--temperature", "--top-k", "--top-p", "--min-p"}
    | {"--seed", "--stop", "--ignore-eos", "--timeout", "--verbose", "-v"},
    "health": COMMON | {"--model"},
    "models": COMMON,
    "version": {"--json"},
}


def test_all_is_sorted_and_is_what_is_visible():
    visible = [
        name
        for name, value in vars(tramontane.client).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    ]
    assert tramontane.client.__all__ == sorted(tramontane.client.__all__)
    assert sorted(visible) == tramontane.client.__all__


def test_all_exceptions_are_public_and_drawn():
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, TramontaneError)]
    for kind in kinds:
        assert kind.__name__ in tramontane.client.__all__
        assert f" {kind.__name__} " in f"{errors.__doc__} ".replace("\n", " ")
    statuses = [kind for kind in kinds if issubclass(kind, StatusError) and kind is not StatusError]
    assert len({kind.code for kind in statuses}) == len(statuses)


def test_the_keyword_arguments_are_declared_as_they_are_taken():
    parameters = inspect.signature(arguments.generate_request).parameters
    keywords = [name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    assert keywords == list(GenerateArguments.__annotations__)
    assert keywords == [
        *("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed"),
        *("stop", "stop_ids", "ignore_eos", "model", "request_id"),
    ]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_help_shows_the_arguments_with_their_defaults(kind, method):
    shown = pydoc.plain(pydoc.render_doc(getattr(kind, method)))
    for name in GenerateArguments.__annotations__:
        assert f"{name}: " in shown
        assert re.search(rf"^ +{name} +\S", shown, re.MULTILINE), f"{name} is not explained"
    assert "temperature: 'float | None' = None" in shown
    assert "ignore_eos: 'bool' = False" in shown


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_command_line(name):
    command = main.commands[name]
    options = [opt for parameter in command.params if isinstance(parameter, click.Option) for opt in parameter.opts]
    assert sorted(options) == sorted(OPTIONS[name])


def test_verbs_of_the_command_line():
    assert sorted(main.commands) == sorted(OPTIONS)
    for command in main.commands.values():
        assert command.help


def test_the_package_is_typed():
    assert files("tramontane").joinpath("py.typed").is_file()

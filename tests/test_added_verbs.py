"""Verbs that other packages add to the command line, and what is said when their packages are missing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tramontane.client.cli import main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Iterator[Path]:
    """An installed distribution that adds verbs: one that works, two whose packages are missing, one that is broken."""
    (tmp_path / "plugin.dist-info").mkdir()
    (tmp_path / "plugin.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    (tmp_path / "plugin.dist-info" / "entry_points.txt").write_text(
        "[tramontane.commands]\n"
        "greet = plugin_greet:greet\n"
        "needy = plugin_needy:needy [one,two]\n"
        "many = plugin_many:many [bench]\n"
        "late = plugin_greet:late\n"
        "broken = plugin_broken:broken\n"
        "gone = plugin_gone.inner:gone\n"
        "version = plugin_greet:greet\n"
    )
    (tmp_path / "plugin_greet.py").write_text(
        "import click\n"
        "@click.command()\n"
        "@click.argument('name')\n"
        "def greet(name):\n"
        "    'Greet somebody by name.'\n"
        "    click.echo(f'hello {name}')\n"
        "@click.command()\n"
        "def late():\n"
        "    'Need a package when run.'\n"
        "    import package_that_is_missing.inner\n"
    )
    (tmp_path / "plugin_needy.py").write_text(
        "import package_that_is_missing\ndef needy():\n    '''Need a package at once.\n\n    More.'''\n"
    )
    (tmp_path / "plugin_many.py").write_text(
        "import click\n"
        "@click.group()\n"
        "def many():\n"
        "    'Do one of many things.'\n"
        "@many.command()\n"
        "@click.option('--times', default=1)\n"
        "def run(times):\n"
        "    'Run some times.'\n"
        "    click.echo('ran ' * times)\n"
        "@many.command()\n"
        "def needy():\n"
        "    import package_that_is_missing\n"
    )
    (tmp_path / "plugin_broken.py").write_text("import tramontane.no_such_module\ndef broken():\n    'Be broken.'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(vars(main), "added", raising=False)
    yield tmp_path
    vars(main).pop("added", None)
    for name in [name for name in sys.modules if name.startswith("plugin_")]:
        del sys.modules[name]


def test_added_verbs_are_listed_and_run(plugin):
    shown = run("--help").stdout
    for name, text in [("greet", "Greet somebody by name."), ("needy", "Need a package at once."), ("gone", "")]:
        assert any(line.split(maxsplit=1) == [name, *([text] if text else [])] for line in shown.splitlines())
    assert "plugin_needy" not in sys.modules
    assert run("greet", "you").stdout == "hello you\n"
    assert "Usage: main greet [OPTIONS] NAME" in run("greet", "--help").stdout
    assert run("greet").exit_code == 2


def test_an_added_verb_never_replaces_ours(plugin):
    assert run("version").stdout.startswith("tramontane ")


@pytest.mark.parametrize(
    ("arguments", "verb", "extras"),
    [(["needy"], "needy", "one,two"), (["late"], "late", "serve"), (["many", "needy"], "many", "bench")],
)
def test_a_verb_whose_package_is_missing_says_what_to_install(plugin, arguments, verb, extras):
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: `tramontane {verb}` needs package_that_is_missing, which is not installed: "
        f"pip install '.[{extras}]' in a checkout of Tramontane\n"
    )


def completed(monkeypatch, *words: str) -> str:
    """What a shell is told of a line, by click's own protocol."""
    monkeypatch.setenv("COMP_WORDS", " ".join(["tramontane", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    monkeypatch.setenv("_TRAMONTANE_COMPLETE", "bash_complete")
    return CliRunner().invoke(main, [], prog_name="tramontane").stdout


def test_shells_complete_added_verbs_their_options_and_values(plugin, monkeypatch):
    assert completed(monkeypatch, "gr") == "plain,greet\n"
    assert completed(monkeypatch, "many", "") == "plain,needy\nplain,run\n"
    assert completed(monkeypatch, "many", "run", "--t") == "plain,--times\n"
    assert completed(monkeypatch, "needy", "--") == "plain,--help\n"  # its packages are missing
    assert completed(monkeypatch, "serve", "--quantize", "") == "plain,int8\n"


def test_an_added_verb_may_be_a_group(plugin):
    assert ["many", "Do one of many things."] in [line.split(maxsplit=1) for line in run("--help").stdout.splitlines()]
    assert "plugin_many" not in sys.modules
    for arguments in (["many", "--help"], ["many", "-h"]):
        shown = run(*arguments).stdout
        assert "Usage: main many [OPTIONS] COMMAND [ARGS]..." in shown
        assert ["run", "Run some times."] in [line.split(maxsplit=1) for line in shown.splitlines()]
    assert "Usage: main many run [OPTIONS]" in run("many", "run", "--help").stdout
    assert run("many", "run", "--times", "2").stdout == "ran ran \n"
    for arguments in (["many"], ["many", "walk"], ["many", "run", "--times", "x"]):
        assert run(*arguments).exit_code == 2


def test_a_fault_of_our_own_is_not_taken_for_a_missing_package(plugin):
    assert isinstance(run("broken").exception, ModuleNotFoundError)


def test_help_lists_the_servers_verbs_and_imports_none():
    script = (
        "import sys\n"
        "from tramontane.client.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "print([name for name in ('ray', 'torch', 'numpy', 'tramontane.cluster.cli') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    commands = result.stdout[result.stdout.index("Commands:") :].splitlines()[1:]
    listed = {line.split()[0]: line.split()[1:] for line in commands if line.startswith("  ")}
    assert set(listed) >= {"down", "generate", "health", "models", "serve", "version"}
    assert all(listed.values())

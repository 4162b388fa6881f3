"""Former names of options: they work for one release, with a warning, and no help shows them."""

from typing import Any

import pytest
import typer.main

from mmi_jax.cli import app, main
from mmi_jax.cli.renamed_options import RENAMED, with_new_names


def test_a_former_name_is_replaced_with_a_warning_on_stderr(capsys):
    given = ["bench", "soak", "--shortest", "9999", "--longest=5000"]
    assert with_new_names(given) == ["bench", "soak", "--min-tokens", "9999", "--max-tokens=5000"]
    first, second = capsys.readouterr().err.splitlines()
    assert first == "warning: --shortest is now --min-tokens; the old name goes with the next release"
    assert second.startswith("warning: --longest is now --max-tokens")


def test_names_of_other_commands_and_what_follows_two_dashes_stay(capsys):
    for arguments in (["aot", "--longest"], ["search", "--", "--weigh"], ["show", "--costs"], []):
        assert with_new_names(arguments) == arguments
    assert capsys.readouterr().err == ""


def test_a_command_runs_under_a_former_name(capsys):
    assert main(["bench", "soak", "--shortest", "9999", "--longest", "5000"]) == 2
    assert "--min-tokens must be at most --max-tokens, got 9999 and 5000" in capsys.readouterr().err


@pytest.mark.parametrize("command", RENAMED, ids=" ".join)
def test_a_command_has_the_new_names_and_not_the_old_ones(command):
    entry: Any = typer.main.get_command(app)
    for name in command:
        entry = entry.commands[name]
    options = {name for option in entry.params for name in (*option.opts, *option.secondary_opts)}
    assert set(RENAMED[command].values()) <= options and not options & set(RENAMED[command])

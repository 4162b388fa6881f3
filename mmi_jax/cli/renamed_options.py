"""Former names of options: accepted for one release, hidden from the help, with a warning that names the new one."""

import sys
from collections.abc import Sequence

RENAMED: dict[tuple[str, ...], dict[str, str]] = {
    ("search",): {
        "--weigh": "--weight-by-importance",
        "--work": "--journal",
        "--costs": "--cost-model",
    },
    ("niah",): {
        "--margin": "--cost-tolerance",
        "--side-by-side": "--parallel-compilations",
        "--costs": "--cost-model",
    },
    ("aot",): {
        "--measures-recall": "--measure-recall",
        "--no-measures-recall": "--no-measure-recall",
    },
    ("bench", "attention"): {
        "--own-process": "--isolate",
        "--no-own-process": "--no-isolate",
    },
    ("bench", "soak"): {
        "--shortest": "--min-tokens",
        "--longest": "--max-tokens",
    },
}
"""New names of options by command and former name, of release 0.1."""


def with_new_names(arguments: Sequence[str]) -> list[str]:
    """The arguments with every former name of an option replaced, after a warning on stderr.

        ["search", "--work=x.jsonl"]   ->   ["search", "--journal=x.jsonl"]

    What follows `--` is left as it is.
    """
    command = next((path for path in RENAMED if tuple(arguments[: len(path)]) == path), ())
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    options = [_with_new_name(argument, RENAMED.get(command, {})) for argument in arguments[:end]]
    return [*options, *arguments[end:]]


def _with_new_name(argument: str, renamed: dict[str, str]) -> str:
    name, equals, value = argument.partition("=")
    if name not in renamed:
        return argument
    print(f"warning: {name} is now {renamed[name]}; the old name goes with the next release", file=sys.stderr)
    return f"{renamed[name]}{equals}{value}"

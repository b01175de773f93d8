"""Command line of the package: ``python -m jasper_fast NAME …``, installed as ``jasper-fast NAME …``.

``jasper-fast NAME …`` does the same as ``python -m jasper_fast.NAME …``. Without a name, it lists the commands.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass

from jasper_fast._version import __version__
from jasper_fast.utils.command_line import check_command
from jasper_fast.utils.errors import JasperError, run_cli
from jasper_fast.utils.packages import LIGHT_COMMANDS, require_training

PROGRAM = "jasper-fast"


@dataclass(frozen=True)
class Command:
    """A command: the module of its name, which has ``main(argv)``.

    Args:
        summary: the line in the list of commands.
        resumes: True if the same command resumes after an interruption, as in :func:`run_cli`.
    """

    summary: str
    resumes: bool = False


# Modules are imported only to run them, because torch takes seconds to import.
COMMANDS = {
    "adapt": Command("adapt a student to your documents, without labels", resumes=True),
    "train": Command("train a student from a recipe or a YAML file, and resume it", resumes=True),
    "teach": Command("cache the teachers' embeddings of the training texts", resumes=True),
    "evaluate": Command("score a model at every width, next to its teacher"),
    "compare": Command("compare runs side by side, or the embeddings of two models"),
    "search": Command("build an index of texts or images, and ask it questions"),
    "export": Command("write one width as a sentence-transformers folder or an ONNX graph"),
    "fetch": Command("download an optional model, such as a second teacher"),
    "env": Command("show the hardware and libraries in use"),
}


def main(argv: list[str]) -> int:
    """Run the command that the first argument names, or list the commands.

    Args:
        argv: name of a command and its arguments, ``--version``, ``--help``, or nothing.

    Returns:
        The exit status of the command.

    Raises:
        JasperError: the command or the option is unknown. The message lists the commands.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(listing())
        return 0
    name, *arguments = argv
    if name == "--version":
        print(f"jasper_fast {__version__}")
        return 0
    check_command(argv, tuple(COMMANDS), PROGRAM)
    if name not in COMMANDS:
        raise JasperError(f"{name!r}: expected a command first ({', '.join(COMMANDS)}). Fix: run `{PROGRAM} NAME …`")
    if name not in LIGHT_COMMANDS:
        require_training()
    return importlib.import_module(f"jasper_fast.{name}").main(arguments) or 0


def listing() -> str:
    """Describe the usage, with one line for each command."""
    widest = max(map(len, COMMANDS))
    lines = [f"  {name:{widest}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [arguments]    or: python -m jasper_fast COMMAND [arguments]",
            "",
            "commands:",
            *lines,
            "",
            f"`{PROGRAM} COMMAND --help` lists the arguments of a command. `--version` prints the version.",
        ]
    )


def run() -> None:
    """Run the command line and end the process."""
    command = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    run_cli(main, resumes=command is not None and command.resumes)


if __name__ == "__main__":
    run()

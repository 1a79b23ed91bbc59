"""Runs what a page shows: the commands of its console blocks, the Python of the others, in the order of the page."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
from click.testing import CliRunner

from pyro_vje.cli import main

FENCE = re.compile(r"(<!-- parsed -->\n)?^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
SETTINGS = {"--epochs": "1", "--embedding-dim": "8", "--hidden-dim": "16", "--image-size": "16"}
"""What a run gets that says nothing of it: the page's own would take minutes."""


def blocks(page):
    """(line, kind, whether it is only parsed, text) of each block of a Markdown page."""
    text = page.read_text()
    for found in FENCE.finditer(text):
        yield text.count("\n", 0, found.start(2)) + 1, found[2], found[1] is not None, found[3]


def commands(text):
    """(command, shown output) of a console block; a command goes on after a backslash at the end of a line."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        count = next(i for i, line in enumerate(lines, 1) if not line.endswith("\\"))
        yield "\n".join(lines[:count]), "\n".join(lines[count:])


def has_form(shown, printed):
    """Whether ``printed`` has the form of ``shown``: any numbers for numbers, any lines for ``...``."""
    pattern = ""
    for line in shown.splitlines():
        if line.strip() == "...":
            pattern += r"(?:[^\n]*\n)*?"
            continue
        words = (
            r"\S*?".join(NUMBER.pattern.join(map(re.escape, NUMBER.split(piece))) for piece in word.split("..."))
            for word in line.split()
        )
        pattern += r"[ ]*" + r"[ ]+".join(words) + r"[ ]*\n"
    return re.fullmatch(pattern, printed.rstrip("\n") + "\n") is not None


def run_command(command, shown, where):
    """Run a command in the current folder and compare what it prints."""
    words = shlex.split(command, comments=True)
    if words[:2] == ["pip", "install"]:
        return  # the wheel is installed and tried by .ci/wheel
    if words[0] == "pyro-vje":
        small = words[1] in ("train", "ablate") and "--resume" not in words
        extra = [word for flag, value in SETTINGS.items() if small and flag not in words for word in (flag, value)]
        result = CliRunner().invoke(main, [*words[1:], *extra])
        code, printed = result.exit_code, result.output
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
    else:
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            command, shell=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        code, printed = done.returncode, done.stdout
    assert code == 0, f"{where}: {command!r} ends with {code}:\n{printed}"
    assert has_form(shown, printed) or not shown, f"{where}: {command!r} prints another form:\n{printed}"


def parse_block(text, where):
    """Check commands that take too long to run: that they and their options exist, and values have their types."""
    script = "\n".join(command for command, _ in commands(text))
    stubs = 'pyro-vje() { printf \'%s\\0\' "$@"; echo; }; make() { command make -n "$@" >/dev/null; }\n'
    stubs += "python() { :; }; torchrun() { :; }\nset -e\n"
    done = subprocess.run(["bash", "-c", stubs + script], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, f"{where}: {done.stderr}"
    for line in done.stdout.splitlines():
        words = line.removesuffix("\0").split("\0")
        try:
            check_arguments(main, words)
        except click.UsageError as error:
            raise AssertionError(f"{where}: pyro-vje {' '.join(words)}: {error.format_message()}") from None


def check_arguments(command, words, parent=None):
    """Parse a command line without running it; files need not exist. Raises ``click.UsageError``."""
    # Click keeps a command's help option as its first context named it: -h comes from the group's settings.
    context = click.Context(command, parent=parent, info_name=command.name, **command.context_settings)
    if isinstance(command, click.Group) and words and not words[0].startswith("-"):
        _, chosen, rest = command.resolve_command(context, list(words))
        return check_arguments(chosen, rest, context)
    values, rest, _ = command.make_parser(context).parse_args(list(words))
    if rest:
        raise click.UsageError(f"unexpected arguments {rest}")
    for parameter in command.params:
        if parameter.name in values and not isinstance(parameter.type, click.Path):
            parameter.type_cast_value(context, values[parameter.name])
    return None


def run_page(page):
    """Run a page's blocks in the current folder, where a block that begins with ``# name.py`` becomes that file."""
    names = {"__name__": "page"}
    for line, kind, parsed, text in blocks(page):
        where = f"{page.name}:{line}"
        if kind == "console" and (parsed or page.parent.name == "benchmarks"):
            parse_block(text, where)
        elif kind == "console":
            for command, shown in commands(text):
                run_command(command, shown, where)
        elif file := re.match(r"# (\w+\.py)\n", text):
            Path(file[1]).write_text(text)
        else:
            exec(compile(text, where, "exec"), names)

"""Every command that the README and the docs tell people to type exists, with its options, and is run.

A command of `ratchet` or of make is run by the tests or by `.ci/run`; `NOT_RUN` lists the others, each with
the reason. Commands of other programs are listed in `OTHERS`, with the reason why no test runs them.
"""

from __future__ import annotations

import importlib.util
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from documented import PAGES, ROOT, Command, find_commands
from typer.main import get_command

from ratchet.cli.main import app

COMMANDS = find_commands()
FLOWER = "needs Flower's servers: tests/federation runs its parts, `make demo-federated` all of it"
# Commands of ours that no test starts as a command; each has tests of its own below the command line.
NOT_RUN = {
    "ratchet federate invite": FLOWER,
    "ratchet federate join": FLOWER,
    "ratchet federate run": FLOWER,
    "ratchet federate take": FLOWER,
    "ratchet federate up": FLOWER,
    "ratchet storage move": "tests/storage/test_move.py runs all of it, below the command line",
    "ratchet worker": "waits for stages without end: tests/flows/test_execution.py starts and kills it",
    "make lock": "asks the package index for every version: minutes, and another answer each day",
    "make bench": "an hour of measurements, whose figures a person reads",
    "make scan": "needs public lists of faults: .github/workflows/scan.yml runs it each week",
    "make install": "every other target of make begins with it",
    "make privacy": "installs an extra: `make demo-federated` begins with it",
    "make store": "installs an extra: the image of docker/Dockerfile has it",
    "make federated": "`make test-e2e` begins with it",
    "make clean-demo": "removes a demo that a person may be looking at",
    "make demo-real": "17 minutes, and a model of 93 MB",
    "make demo-multimodal": "minutes: tests/demo runs its parts",
    "make demo-federated": "minutes: tests/federation runs its parts",
}
# Programs that are not ours.
OTHERS = {
    "$EDITOR": "a person edits",
    "cp": "moves files of an erasure",
    "createdb": "there is no server on every machine; tests/storage start their own",
    "curl": "the tests ask the gateway with Python's and Node's clients",
    "docker": "there is no engine on every machine",
    "dvc": "ratchet/pipeline/dvc.py runs it in the tests of tests/pipeline",
    "echo": "writes a file of passwords",
    "git": "the tests commit in repositories of their own",
    "kubectl": "there is no cluster on every machine",
    "helm": "there is no cluster on every machine",
    "mkdir": "makes a folder",
    "pip": "installs an extra",
    "psql": "there is no server on every machine",
    "rm": "removes files of an erasure",
    "sed": "changes files of an erasure",
    "scp": "there is no second machine",
    "ssh": "there is no second machine",
    "ssh-keygen": "makes a key for git",
    "ssh-keyscan": "asks GitHub",
    "umask": "sets rights of new files",
    "tar": "packs a backup",
    "uv": "installs an extra",
}
INLINE = re.compile(r"`(ratchet(?: [^`]*)?)`")
PLACEHOLDERS = re.compile(r"[A-Z…|:.]")


@cache
def root_command() -> Any:
    return get_command(app)


def resolve(words: tuple[str, ...]) -> tuple[str, Any, list[str]]:
    """Return the name of the command of ratchet, the command, and the words after it."""
    command, name, rest = root_command(), ["ratchet"], list(words[1:])
    while rest and rest[0].startswith("-") and hasattr(command, "commands"):
        rest = rest[2:] if rest[0] == "-C" else rest[1:]
    while rest and hasattr(command, "commands"):
        assert rest[0] in command.commands, f"{' '.join(name)} has no command {rest[0]!r}"
        command = command.commands[rest[0]]
        name.append(rest.pop(0))
    return " ".join(name), command, rest


def check_options(words: tuple[str, ...]) -> None:
    name, command, rest = resolve(words)
    options = {opt for one in command.params for opt in (*one.opts, *one.secondary_opts)} | {"--help", "-h"}
    given = [word.partition("=")[0] for word in rest if word.startswith("-") and len(word) > 1]
    assert [word for word in given if word not in options] == [], f"{name} has no such option"


def show(command: Command) -> str:
    return f"{command.place} {' '.join(command.words)[:60]}"


def test_there_are_commands_to_check():
    assert len(PAGES) > 15
    assert len({command.words for command in COMMANDS}) > 80


@pytest.mark.parametrize("command", COMMANDS, ids=show)
def test_a_documented_command_exists_with_its_options(command):
    program, *rest = command.words
    name = program.removeprefix(".venv/bin/")
    if name == "ratchet":
        check_options(command.words)
    elif name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in rest if "=" not in word and word not in targets] == []
    elif name == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]) is not None
    elif name in ("python", "bash"):
        assert (ROOT / rest[0]).is_file(), rest[0]
    elif "/" in program and not program.startswith(".venv/bin/"):
        assert os.access(ROOT / program, os.X_OK), program
    elif program.startswith(".venv/bin/"):
        assert (ROOT / program).exists() or name in ("dvc", "lint-imports")
    else:
        assert program in OTHERS, f"{program} is neither ours nor in OTHERS, with the reason"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_in_a_sentence_exists(page):
    """Also in tables; a placeholder, such as … or N, ends what is checked."""
    if page.name == "renamed.md":
        pytest.skip("it lists old names")
    for found in INLINE.findall(page.read_text(encoding="utf-8")):
        words: list[str] = []
        for word in found.split():
            if PLACEHOLDERS.search(word) and not word.startswith("-"):
                break
            words.append(word)
        check_options(tuple(words))


@cache
def sources() -> list[str]:
    """The files that start commands: tests, the demo, CI; without the list of all commands for their help."""
    files = [
        *ROOT.glob("tests/**/*.py"),
        *ROOT.glob("ratchet/demo/*.py"),
        *ROOT.glob(".ci/*"),
        *ROOT.glob(".github/workflows/*.yml"),
    ]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.name != Path(__file__).name}
    listing = ROOT / "tests/cli/test_cli.py"
    texts[listing] = texts[listing].partition("\nPARAMS = ")[2]
    return list(texts.values())


def is_started(name: str) -> bool:
    """Return whether one file has all words of the command, as arguments or as people type them."""
    first, *words = name.split()
    if first == "make":
        return any(re.search(rf"\bmake [^\n]*\b{words[0]}\b", text) for text in sources())
    typed = re.compile(rf"\bratchet (?:-C \S+ )?{' '.join(words)}\b")
    call = r"\b(?:ratchet|in_process|refused|command|invoke)\((?:[^()]|\([^()]*\)){0,200}"
    called = re.compile(rf'{call}"{words[-1]}"')
    return any(
        typed.search(text) or (called.search(text) and all(f'"{word}"' in text for word in words))
        for text in sources()
    )


def test_every_documented_command_of_ours_is_started_by_a_test_or_marked_why_not():
    names = set[str]()
    for command in COMMANDS:
        if command.words[0].removeprefix(".venv/bin/") == "ratchet":
            names.add(resolve(command.words)[0])
        elif command.words[0] == "make":
            names |= {f"make {word}" for word in command.words[1:] if "=" not in word}
    assert len(names) > 40
    assert sorted(name for name in names if name not in NOT_RUN and not is_started(name)) == []


def test_what_is_marked_is_documented_and_says_why():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for name, why in NOT_RUN.items():
        assert len(why) > 20
        if name.startswith("make "):
            assert name.removeprefix("make ") in targets
        else:
            resolve(tuple(name.split()))

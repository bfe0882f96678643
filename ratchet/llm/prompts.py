"""Load and render prompt templates: Jinja files with a system message, a line `---`, and a user message.

A template in the project's own folder overrides the packaged one. Quoted passages and rows are enclosed in
marks that contain their hash, and the prompt calls them data, so that "ignore your instructions" in a
document is only text to ask about. The version of a prompt is its name with the hash of the template's text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ratchet.errors import ConfigError

NAMES = (
    "questions_from_passage",
    "self_instruct",
    "questions_from_picture",
    "paraphrase",
    "judge",
    "back_translate",
    "judge_correctness",
    "judge_groundedness",
    "judge_preference",
)
LINE = "\n---\n"


@dataclass(frozen=True)
class Prompt:
    """The messages to send, and the version of the template that made them."""

    version: str
    system: str
    user: str
    pictures: tuple[bytes, ...] = ()  # JPEGs that the user's message shows

    def showing(self, pictures: tuple[bytes, ...]) -> Prompt:
        return replace(self, pictures=pictures)


@dataclass(frozen=True)
class Template:
    """A prompt template; `origin` is its file, for messages."""

    name: str
    source: str
    origin: str

    @cached_property
    def version(self) -> str:
        return f"{self.name}@{hashlib.sha256(self.source.encode()).hexdigest()[:12]}"

    @cached_property
    def _parts(self) -> list[Any]:
        system, _, user = self.source.partition(LINE)
        environment = _environment()
        return [environment.from_string(part) for part in (system, user)]

    def render(self, **values: Any) -> Prompt:
        """Render the template. Raises ConfigError for an unknown variable or a forbidden operation."""
        try:
            return Prompt(self.version, *(part.render(**values).strip() for part in self._parts))
        except TemplateError as error:
            raise ConfigError(
                f"the prompt template {self.origin} fails: {error}",
                remedy=f"it may use: {', '.join(sorted(values))}, and the filter `fenced`",
            ) from None


def load_template(name: str, folder: Path | None) -> Template:
    """Read a template from `folder`, or the packaged one. Raises ConfigError for a bad folder or file."""
    if folder is not None and not folder.is_dir():
        raise ConfigError(
            f"synthesize.prompts is {str(folder)!r}, which is no folder",
            remedy="name a folder of templates, or leave it empty",
        )
    own = folder / f"{name}.j2" if folder else None
    if own and own.is_file():
        template = Template(name, _read(own), str(own))
    else:
        packaged = resources.files("ratchet.llm") / "templates" / f"{name}.j2"
        template = Template(name, packaged.read_text(encoding="utf-8"), f"{name}.j2")
    _check(template)
    return template


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"the prompt template {path} cannot be read: {type(error).__name__}",
            remedy="it has to be UTF-8 text",
        ) from None


def _check(template: Template) -> None:
    if LINE not in template.source:
        raise ConfigError(
            f"the prompt template {template.origin} has no line `---`",
            remedy="what stands before it is the system message, what follows is the user's",
        )
    try:
        _environment().parse(template.source)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"the prompt template {template.origin} is no Jinja template: "
            f"line {error.lineno}: {error.message}"
        ) from None


def fence(text: str) -> str:
    """Enclose the text in marks that contain its hash, so that the text itself cannot contain them."""
    mark = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"<data-{mark}>\n{text}\n</data-{mark}>"


def _environment() -> ImmutableSandboxedEnvironment:
    # No HTML escaping: the result is plain text for a model.
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters["fenced"] = fence
    return environment

"""Make one site of the pages in docs/ and of those that stand elsewhere, such as README.md.

MkDocs calls these functions. A link to a file of the repository that is no page becomes the file's name,
because the site does not know where the repository is.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Page → where it stands in the repository.
ELSEWHERE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "docker.md": "docker/README.md",
    "cli.md": ".ratchet/docs/cli.md",
}
LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\((?!https?://|#|mailto:)([^)\s#]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    for page, place in ELSEWHERE.items():
        if (ROOT / place).exists():
            text = (ROOT / place).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=text))
    _add_to_nav(config, files)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = posixpath.dirname(ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    pages = {place: name for name, place in ELSEWHERE.items()}

    def rewrite(link: re.Match[str]) -> str:
        words, target, anchor = link[1], link[2], link[3] or ""
        place = posixpath.normpath(posixpath.join(here, target))
        if place in pages:
            return f"[{words}]({pages[place]}{anchor})"
        if place.startswith("docs/"):
            return f"[{words}]({place.removeprefix('docs/')}{anchor})"
        if not (ROOT / place).exists():
            return link[0]  # a broken link, which MkDocs reports
        return f"{words} (`{place}`)" if words.strip("`") != place else f"`{place}`"

    return LINK.sub(rewrite, markdown)


def _add_to_nav(config: Any, files: Files) -> None:
    """Add every page that nav does not name, so that a new file in docs/ needs no change here."""
    named = set(re.findall(r"'([^']+\.md)'", repr(config["nav"])))
    more = sorted(
        file.src_uri for file in files if file.src_uri.endswith(".md") and file.src_uri not in named
    )
    if more:
        config["nav"] = [*config["nav"], {"More": more}]

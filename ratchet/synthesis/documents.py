"""Read documents from files, folders, globs and fsspec URLs, and cut them into chunks at paragraphs.

A document that cannot be read is recorded with the reason, and the others are still read. Not covered: PDF
and word processors' files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

from ratchet.data.examples import normalise
from ratchet.data.text import strip_url

KINDS = (".txt", ".md", ".rst", ".html", ".htm", ".jsonl")
MOST_BYTES = 32 * 2**20  # of one document; a larger file is probably a dump of data
BLANK_LINES = re.compile(r"\n\s*\n")
SENTENCE_END = re.compile(r"(?<=[.!?。])\s+")
UNSHOWN = frozenset({"script", "style", "template", "noscript", "svg"})
BLOCK_TAGS = """
address article aside blockquote br dd div dl dt figcaption footer form h1 h2 h3 h4 h5 h6 header hr li main
nav ol p pre section table td th title tr ul
"""
BLOCKS = frozenset(BLOCK_TAGS.split())


class Document(NamedTuple):
    name: str
    text: str


class Chunk(NamedTuple):
    """A piece of a document; `id` is the hash of its text, so that equal passages are asked about once."""

    id: str
    document: str
    text: str


class Library:
    """Documents at `places`, read one after another; `unreadable` collects (name, reason) while reading."""

    def __init__(self, places: Iterable[str], root: Path) -> None:
        self._places, self._root = list(places), root
        self.documents = 0
        self.unreadable: list[tuple[str, str]] = []

    def chunks(self, *, chunk_chars: int, overlap_chars: int) -> Iterator[Chunk]:
        """Yield the chunks of all documents, equal ones only once; the limits are in characters."""
        seen = set[str]()
        for document in self.read():
            for text in cut(document.text, chunk_chars=chunk_chars, overlap_chars=overlap_chars):
                chunk = Chunk(hashlib.sha256(text.encode()).hexdigest()[:16], document.name, text)
                if chunk.id not in seen:
                    seen.add(chunk.id)
                    yield chunk

    def read(self) -> Iterator[Document]:
        self.documents, self.unreadable = 0, []
        for place in self._places:
            for name, opened in self._find(place):
                yield from self._read_one(name, opened)

    def _find(self, place: str) -> Iterator[tuple[str, Any]]:
        """Yield (name, fsspec's OpenFile) of each file at `place`."""
        import fsspec

        path = self._root / Path(place).expanduser()
        if "://" not in place and path.is_file():  # even if its name contains a glob's characters
            yield self._name(str(path)), fsspec.core.OpenFile(fsspec.filesystem("file"), str(path))
            return
        if "://" not in place and path.is_dir():
            found = sorted(
                file
                for file in path.rglob("*")
                if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
            for file in found:
                yield self._name(str(file)), fsspec.core.OpenFile(fsspec.filesystem("file"), str(file))
            if not found:
                self.unreadable.append((place, "an empty folder"))
            return
        try:
            opened = fsspec.open_files(place if "://" in place else str(path), "rb")
        except (OSError, ValueError, ImportError) as error:
            self.unreadable.append((self._name(place), f"cannot be opened: {type(error).__name__}"))
            return
        if not opened:
            self.unreadable.append((self._name(place), "matches no file"))
        for one in opened:
            yield self._name(place if "://" in place and len(opened) == 1 else one.path), one

    def _name(self, path: str) -> str:
        """Return a file's name: relative to the checkout if it is inside.

        A URL loses its user, password and signature, because rows contain the name.
        """
        path = path.encode("utf-8", "replace").decode()  # a file name may be any bytes
        if "://" in path:
            return strip_url(path)
        with suppress(ValueError):
            return str(Path(path).relative_to(self._root))
        return path

    def _read_one(self, name: str, opened: Any) -> Iterator[Document]:
        kind = Path(name).suffix.lower() or (".html" if "://" in name else "")
        if kind not in KINDS:
            self.unreadable.append(
                (name, f"of the kind {kind or 'without an ending'!r}; known: {', '.join(KINDS)}")
            )
            return
        try:
            with opened as handle:
                raw = handle.read(MOST_BYTES + 1)
            if len(raw) > MOST_BYTES:
                raise ValueError(f"over {MOST_BYTES // 2**20} MiB")
            text = _decode(raw)
        except (OSError, ValueError, ImportError) as error:
            self.unreadable.append((name, _why(error)))
            return
        except Exception as error:  # noqa: BLE001 (remote file systems have their own; each is recorded)
            self.unreadable.append((name, type(error).__name__))
            return
        for part, content in (
            _rows(text)
            if kind == ".jsonl"
            else [("", _strip_tags(text) if kind in (".html", ".htm") else text)]
        ):
            content = normalise(content) if content is not None else None
            if not content:
                self.unreadable.append(
                    (name + part, "no text" if content == "" else "no JSON object with a `text`")
                )
                continue
            self.documents += 1
            yield Document(name + part, content)


def _decode(raw: bytes) -> str:
    """Decode UTF-8, or UTF-16 with a byte order mark. Raises ValueError."""
    text = raw.decode("utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    if "\x00" in text:
        raise ValueError("no text: it holds NUL characters")
    return text


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "no UTF-8"
    return (
        str(getattr(error, "strerror", None) or error).splitlines()[0][:120]
        if str(error)
        else type(error).__name__
    )


def _rows(text: str) -> Iterator[tuple[str, str | None]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        found: Any = None
        with suppress(ValueError, RecursionError):
            found = json.loads(line)
        content = found.get("text") if isinstance(found, dict) else None
        yield f":{number}", content if isinstance(content, str) and _is_storable(content) else None


def _is_storable(text: str) -> bool:
    """Return whether the text can be stored; lone surrogates, which JSON can escape, and NUL cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\x00" not in text


# --- HTML ---------------------------------------------------------------------------------------------------


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in UNSHOWN
        if tag in BLOCKS:
            self.parts.append("\n" if tag == "br" else "\n\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in UNSHOWN))
        if tag in BLOCKS:
            self.parts.append("\n\n")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def _strip_tags(text: str) -> str:
    parser = _Text()
    parser.feed(text)
    parser.close()
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


# --- chunks -------------------------------------------------------------------------------------------------


def cut(text: str, *, chunk_chars: int, overlap_chars: int) -> Iterator[str]:
    """Cut a text into chunks of at most `chunk_chars` characters that end with a paragraph.

    A chunk begins with the last paragraphs of the previous one, up to `overlap_chars` characters.
    """
    held: list[str] = []
    fresh = False
    for part in _parts(text, chunk_chars):
        if held and _length([*held, part]) > chunk_chars:
            if fresh:
                yield "\n\n".join(held)
            held = _tail(held, overlap_chars)
            while held and _length([*held, part]) > chunk_chars:
                held = held[1:]
        held.append(part)
        fresh = True
    if held:
        yield "\n\n".join(held)


def _length(parts: list[str]) -> int:
    return sum(map(len, parts)) + 2 * (len(parts) - 1)


def _tail(parts: list[str], most: int) -> list[str]:
    kept: list[str] = []
    for part in reversed(parts):
        if _length([part, *kept]) > most:
            break
        kept.insert(0, part)
    return kept


def _parts(text: str, most: int) -> Iterator[str]:
    """Split the text into paragraphs; split one over `most` characters at sentences, words, or anywhere."""
    for paragraph in filter(None, map(str.strip, BLANK_LINES.split(text))):
        if len(paragraph) <= most:
            yield paragraph
            continue
        held = ""
        for piece in _pieces(paragraph, most):
            if held and len(held) + 1 + len(piece) > most:
                yield held
                held = ""
            held = f"{held} {piece}" if held else piece
        yield held


def _pieces(paragraph: str, most: int) -> Iterator[str]:
    for sentence in SENTENCE_END.split(paragraph):
        for word in [sentence] if len(sentence) <= most else sentence.split():
            yield from (word[start : start + most] for start in range(0, len(word), most))

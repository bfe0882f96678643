"""Take in pictures and recordings of rows: each reference becomes `media:NAME`, the bytes go into a spool.

One that cannot be taken becomes `media-error:REASON:message`, so that preparation rejects and counts its row.
Read are files under the folder of the rows' file, data URIs, base64, and bytes of Parquet and Arrow; of a
recording also its samples, as `datasets` has them ({"array", "sampling_rate"}).
Nothing is fetched from an address but from `ingest.media.hosts`, and no path leads out of the folder, by a
symlink either.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ratchet.config.data import MediaConfig
from ratchet.data.examples import MEDIA, MEDIA_ERROR, MEDIA_NAME, RawRow, RowError
from ratchet.data.forms import (
    FORMS,
    MEDIA_KEYS,
    MEDIA_PARTS,
    OF_TURN,
    PICTURE_KEYS,
    SOUND_KEYS,
    SOUND_PARTS,
    recognise_form,
)
from ratchet.media.names import PATH, SHOWN, from_base64, from_uri
from ratchet.media.pictures import read_picture
from ratchet.media.sounds import read_sound, write_wav
from ratchet.media.store import MediaStore, Spool
from ratchet.sources.streams import WEB

MOST_LINE = 2**27  # bytes of a line whose pictures stand in it as base64
HINT = re.compile(
    rb';base64,|"(?:image|img|picture|photo|input_image|audio|input_audio|sound|recording|file_name)[a-z_]*"'
)
SOUND_FILE = re.compile(r"\.(?:wav|flac|ogg|oga|opus|mp3|m4a|aac)$", re.IGNORECASE)
PICTURE_FILE = re.compile(r"\.(?:png|jpe?g|webp|gif|bmp|tiff?)$", re.IGNORECASE)
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # two letters at least: `C:` is a drive
SOUND_BASE64 = ("UklGR", "ZkxhQ", "T2dnU", "SUQz", "//uQ", "//vQ", "//NE", "//Pk")
PICTURE_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A")  # how formats begin
REFERENCES = ("data:", "DATA:", MEDIA, MEDIA_ERROR)
LEAST_BASE64 = 100  # characters; a shorter text is a path
BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
TALKS = ("messages", "conversations", "conversation", "prompt", "chosen", "rejected")
TALKS_OF_OPENAI = ("preferred_output", "non_preferred_output")
HELD = (  # keys of a part with its picture or recording
    *("image_url", "image", "audio_url", "audio", "input_audio"),
    *("url", "path", "base64", "data", "source"),
)
WORD = {False: "picture", True: "recording"}  # the key tells whether it is a recording
HERE = ("localhost", "127.0.0.1", "::1")  # from which plain HTTP is taken
TRIES, FETCH_SECONDS = 3, 30.0
ReadFile = Callable[[str], bytes]


class MediaIntake:
    """The pictures and recordings of one ingest.

    `refused` counts references, of pictures and of recordings, by the reason why none could be taken.
    """

    def __init__(self, limits: MediaConfig, root: Path | None = None) -> None:
        self.spool = Spool()
        self.refused: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
        self.empty: Counter[bool] = Counter()  # rows with a column for one and nothing in it
        self.limits = limits
        self._folder = (root or Path()) / limits.folder if limits.folder else None
        self._known: dict[tuple[bytes, bool], str] = {}  # sha256 as it was found → what its reference became

    def beside(self, fs: Any, path: str) -> Rows:
        """Return what reads the pictures and recordings of the rows of a file, from the file's folder."""
        parent = path.rpartition("/")[0]
        kinds = (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
        if self._folder is not None:
            return Rows(self, local_reader(self._folder, self.limits))
        if "file" in kinds:
            shards = MediaStore([Path(path).with_suffix(".tar")])
            return Rows(self, local_reader(Path(parent or "/"), self.limits), shards)
        return Rows(self, None if set(kinds) & set(WEB) else remote_reader(fs, parent, self.limits))

    def without_file(self) -> Rows:
        """Return what reads those of rows that stand in no file, such as those of a database."""
        return Rows(self, local_reader(self._folder, self.limits) if self._folder is not None else None)

    def take(self, data: bytes, *, sound: bool) -> str:
        """Keep a picture or a recording, and return its reference. Raises RowError."""
        found = hashlib.sha256(data)
        key = found.digest(), sound
        if key not in self._known:
            try:
                medium = (
                    read_sound(data, self.limits)
                    if sound
                    else read_picture(data, self.limits, found.hexdigest())
                )
                self.spool.add(medium)
                self._known[key] = MEDIA + medium.name
            except RowError as error:
                self._known[key] = MEDIA_ERROR + f"{error.reason}:{error}"
        if (reference := self._known[key]).startswith(MEDIA_ERROR):
            reason, _, message = reference.removeprefix(MEDIA_ERROR).partition(":")
            raise RowError(reason, message)
        return reference

    def tell(self) -> tuple[str, ...]:
        """Say how many there are, how large or long, what was changed, and which were refused."""
        found, told = {False: list[str](), True: list[str]()}, list[str]()
        if sizes := self.spool.sizes.values():
            small, large = (least(sizes, key=lambda size: size[0] * size[1]) for least in (min, max))
            found[False].append(
                f"{len(sizes)} different pictures of {_pixels(small)} to {_pixels(large)} pixels"
            )
        if seconds := self.spool.seconds.values():
            found[True].append(
                f"{len(seconds)} different recordings of {min(seconds):.1f} to {max(seconds):.1f} s"
            )
        for sound, changed in ((False, self.spool.changed), (True, self.spool.changed_sounds)):
            said = found[sound]
            if changed:
                said.append(f"changed: {_counted(changed)}")
            if self.refused[sound]:
                said.append(f"not taken: {_counted(self.refused[sound])}")
            if empty := self.empty[sound]:
                said.append(f"{empty} rows have a column for one and nothing in it: they are rows of text")
            told += [f"{WORD[sound]}s: {'; '.join(said)}"] if said else []
        return tuple(told)


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


class Rows:
    """Replaces the references in the rows of one file; `read` reads a path under its folder."""

    def __init__(
        self, intake: MediaIntake, read: ReadFile | None, shards: Mapping[str, bytes] | None = None
    ) -> None:
        self._intake, self._read, self._shards = intake, read, shards or {}

    def take(self, row: RawRow, columns: Collection[str] = ()) -> RawRow:
        """Return the row with its references replaced; a row without any is returned as it is.

        `columns`: keys that its table has a column for, whether or not the row's cell holds something.
        """
        named = row.get("file_name")  # as `datasets` names the file in the metadata of a folder
        if isinstance(named, str) and row.keys().isdisjoint(MEDIA_KEYS):
            key = "image" if PICTURE_FILE.search(named) else "audio" if SOUND_FILE.search(named) else ""
            if key:
                row = {key: named, **{key: value for key, value in row.items() if key != "file_name"}}
        changed = {
            key: self._replace(row[key], sound=key in SOUND_KEYS)
            for key in MEDIA_KEYS
            if row.get(key) not in (None, "", [])
        }
        for key in (*TALKS, *TALKS_OF_OPENAI):
            if isinstance(turns := row.get(key), list) and (new := self._turns(turns)) is not turns:
                changed[key] = new
        if not changed and not (had := {*row, *columns}).isdisjoint(MEDIA_KEYS):
            self._intake.empty[had.isdisjoint(PICTURE_KEYS)] += 1
        given = row.get("input")
        if isinstance(given, dict) and isinstance(asked := given.get("messages"), list):
            new = self._turns(asked)
            changed |= {"input": {**given, "messages": new}} if new is not asked else {}
        return _lift({**row, **changed}) if changed else row

    def _turns(self, turns: list[Any]) -> list[Any]:
        new = [self._turn(turn) for turn in turns]
        return turns if all(one is other for one, other in zip(new, turns, strict=True)) else new

    def _turn(self, turn: Any) -> Any:
        if not isinstance(turn, dict):
            return turn
        role = turn.get("role", turn.get("from"))
        read = OF_TURN[:2] if role in ("assistant", "gpt") else OF_TURN  # its `audio` is what it said
        changed = {key: self._replace(turn[key], sound=key in SOUND_KEYS) for key in read if turn.get(key)}
        key = "content" if "content" in turn else "value"
        if isinstance(parts := turn.get(key), list) and any(map(_is_medium, parts)):
            changed[key] = [self._part(part) if _is_medium(part) else part for part in parts]
        return {**turn, **changed} if changed else turn

    def _part(self, part: dict[str, Any]) -> dict[str, Any]:
        """Replace the reference of a part; a part without one has what stands beside the messages."""
        sound = part["type"] in SOUND_PARTS
        key = next((key for key in HELD if part.get(key) not in (None, "")), None)
        if key is None:
            return part
        given = part[key]
        if key in ("base64", "data", "source"):
            rest = {name: value for name, value in part.items() if name not in HELD}
            held = given if isinstance(given, dict) else {"base64": given}
            kind = "audio" if sound else "image"
            return {**rest, "type": kind, kind: self.refer(held, sound=sound)}
        if key in ("image_url", "audio_url") and isinstance(given, dict):
            return {**part, key: {**given, "url": self.refer(given, sound=sound)}}
        if key == "input_audio" and isinstance(given, dict):
            return {**part, key: {**given, "data": self.refer(given, sound=True)}}
        return {**part, key: self._replace(given, sound=sound)}

    def _replace(self, value: Any, *, sound: bool) -> Any:
        if isinstance(value, str) and value.lstrip().startswith("["):  # a list in the cell of a table
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return self.refer(value, sound=sound)
        if isinstance(value, list):
            return [self.refer(one, sound=sound) for one in value]
        return self.refer(value, sound=sound)

    def refer(self, value: Any, *, sound: bool) -> str:
        """Take a picture or a recording, and return its reference, or why it could not be taken."""
        try:
            found = self._find(value, sound=sound)
            return found if isinstance(found, str) else self._intake.take(found, sound=sound)
        except RowError as error:
            self._intake.refused[sound][error.reason] += 1
            return f"{MEDIA_ERROR}{error.reason}:{error}"

    def _find(self, value: Any, *, sound: bool) -> bytes | str:
        """Return the bytes as they stand, or an error that is known. Raises RowError."""
        if isinstance(value, dict):
            if sound and value.get("array") is not None and "sampling_rate" in value:
                return _from_samples(value["array"], value["sampling_rate"])
            keys = ("bytes", "base64", "data", "url", "path", "image", "audio")
            key = next((key for key in keys if value.get(key) not in (None, "", b"")), "")
            value = value.get(key)
            if key in ("base64", "data") and isinstance(value, str) and not value.startswith(REFERENCES):
                if PATH.fullmatch(path := value.strip()):
                    raise RowError(
                        "media_broken",
                        f"`{key}` is the path {path[:SHOWN]!r}; wanted base64 (`path` names a file)",
                    )
                return from_base64(value)
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)
        if not isinstance(value, str):
            raise RowError(
                "media_type",
                f"a {type(value).__name__} in place of a {WORD[sound]}; wanted a path or its bytes",
            )
        if value.startswith(MEDIA_ERROR):
            return value
        if value.startswith(MEDIA) and MEDIA_NAME.fullmatch(name := value.removeprefix(MEDIA)):
            if name not in self._shards:
                raise RowError("media_missing", f"no tar beside the file holds {name[:12]}…")
            return self._shards[name]
        if value[:5].lower() == "data:":
            return from_uri(value)
        if len(value) >= LEAST_BASE64 and value.startswith(SOUND_BASE64 if sound else PICTURE_BASE64):
            return from_base64(value)
        try:
            return self._from_path(value.strip(), WORD[sound])
        except RowError as error:
            if not _may_be_base64(value, sound=sound):
                raise
            return self._from_unknown_base64(value, error, sound=sound)

    def _from_unknown_base64(self, value: str, error: RowError, *, sound: bool) -> str:
        """Return the reference of a base64 that begins like none that is known. Raises RowError."""
        try:
            return self._intake.take(from_base64(value), sound=sound)
        except RowError as other:
            raise RowError(
                error.reason, f"neither a path nor base64 that is taken: {error}; as base64, {other}"
            ) from None

    def _from_path(self, path: str, word: str) -> bytes:
        if SCHEME.match(path) or path.startswith("//"):
            return fetch(path, self._intake.limits, word)
        posix = path.replace("\\", "/")
        parts = PurePosixPath(posix).parts
        if not parts or posix.startswith("/") or posix[1:2] == ":" or ".." in parts or "\x00" in path:
            raise RowError(
                "media_path",
                f"the path {path[:SHOWN]!r} leads out of the folder of the rows; wanted a path under it "
                "(`ingest.media.folder` names another folder)",
            )
        if self._read is None:
            raise RowError(
                "media_path",
                f"the rows stand in no folder that can hold {path[:SHOWN]!r} (`ingest.media.folder`)",
            )
        return self._read(str(PurePosixPath(*parts)))


def _may_be_base64(text: str, *, sound: bool) -> bool:
    known = SOUND_BASE64 if sound else PICTURE_BASE64
    return bool(BASE64.fullmatch(text)) and (len(text) >= LEAST_BASE64 or text.startswith(known))


def _is_medium(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in MEDIA_PARTS


def _from_samples(samples: Any, rate: Any) -> bytes:
    """Return samples between -1 and 1, (samples,) or (channels, samples), as a WAV file. Raises RowError."""
    try:
        found = np.asarray(samples, dtype=np.float32)
        if found.ndim not in (1, 2) or not found.size:
            raise ValueError(f"an array of shape {found.shape}")
        return write_wav(found.T, int(rate))
    except (ValueError, TypeError, OverflowError, OSError, RuntimeError) as error:
        raise RowError("media_broken", f"its samples and rate are no recording: {str(error)[:120]}") from None


def _lift(row: RawRow) -> RawRow:
    """Bring the texts beside a medium into a form: an object such as `text_qa_pair`, or a list of pairs."""
    try:
        recognise_form(row)
    except RowError:
        pairs = row.get("texts")
        if isinstance(pairs, list) and pairs and all(map(_is_pair, pairs)):  # as of the Cauldron
            turns = [
                {"role": role, "content": pair[role]} for pair in pairs for role in ("user", "assistant")
            ]
            return {**{key: value for key, value in row.items() if key != "texts"}, "messages": turns}
        starts = frozenset[str]().union(*(form.starts for form in FORMS.values()))
        inner = [key for key, value in row.items() if isinstance(value, dict) and starts & value.keys()]
        if len(inner) == 1 and not row.keys() & row[inner[0]].keys():
            texts: RawRow = row[inner[0]]
            return {key: value for key, value in row.items() if key != inner[0]} | texts
    return row


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, dict) and {"user", "assistant"} <= pair.keys() <= {"user", "assistant", "source"}


def fetch(address: str, limits: MediaConfig, word: str) -> bytes:
    """Fetch a picture or recording from a host in `ingest.media.hosts`; `word` names what it is.

    Raises RowError: `media_url` for another host or another protocol, `media_missing` for what cannot be had.
    """
    import httpx

    try:
        url = httpx.URL(address)
    except (httpx.InvalidURL, ValueError):
        url = httpx.URL("")
    allowed = url.host in limits.hosts or f"{url.host}:{url.port}" in limits.hosts
    if (
        not allowed
        or url.userinfo
        or not (url.scheme == "https" or (url.scheme, url.host in HERE) == ("http", True))
    ):
        told = (
            f"{url.scheme}://{url.netloc.rpartition(b'@')[2].decode()[:SHOWN]}" if url.host else address[:20]
        )
        raise RowError(
            "media_url",
            f"the {word} stands at an address ({told}); `ingest.media.hosts` is {limits.hosts}, and only "
            "HTTPS to these is used: put the files beside the rows, or add the host",
        )
    said = ""
    for _ in range(TRIES):
        try:
            with httpx.stream("GET", url, timeout=FETCH_SECONDS, follow_redirects=False) as answer:
                if answer.status_code == httpx.codes.OK:
                    return _up_to(answer.iter_bytes(2**16), limits.max_bytes + 1)
                said = f"answered {answer.status_code}"
                if not answer.is_server_error:
                    break
        except httpx.HTTPError as error:
            said = f"did not answer ({type(error).__name__})"
    raise RowError("media_missing", f"{url.host} {said} when asked for the {word} {url.path[:SHOWN]!r}")


def _up_to(pieces: Iterable[bytes], most: int) -> bytes:
    found = bytearray()
    for piece in pieces:
        found += piece[: most - len(found)]
        if len(found) >= most:
            break
    return bytes(found)


def local_reader(folder: Path, limits: MediaConfig) -> ReadFile:
    """Return a function that reads a file under `folder`, and raises RowError for any other."""
    top = folder.resolve()

    def read(path: str) -> bytes:
        missing = RowError("media_missing", f"there is no file {path[:SHOWN]!r} that can be read")
        try:
            place = (folder / path).resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            raise missing from None
        if not place.is_relative_to(top):
            raise RowError(
                "media_path", f"{path[:SHOWN]!r} is a link that leads out of the folder of the rows"
            )
        try:
            # The place was resolved, so a link that is there now was put there since.
            number = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise missing from None
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise RowError("media_missing", f"{path[:SHOWN]!r} is no file")
        with os.fdopen(number, "rb") as file:
            return file.read(limits.max_bytes + 1)

    return read


def remote_reader(fs: Any, folder: str, limits: MediaConfig) -> ReadFile:
    """Return a function that reads a file under a folder of fsspec's, such as `s3://…`."""

    def read(path: str) -> bytes:
        try:
            return bytes(fs.cat_file(f"{folder}/{path}", start=0, end=limits.max_bytes + 1))
        except OSError:
            raise RowError("media_missing", f"there is no file {path[:SHOWN]!r} that can be read") from None

    return read

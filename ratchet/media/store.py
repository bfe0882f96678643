"""Keep pictures and recordings in tar shards by name: `<sha256 of the stored bytes>.<png|jpg|flac>`.

A row that names one names its very bytes.
"""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from ratchet.errors import DataError, DiskSpaceError
from ratchet.files import write_bytes
from ratchet.media.names import MEDIA_NAME, kind_of
from ratchet.media.pictures import Picture
from ratchet.media.sounds import Sound

FOLDER = "media"  # of data/prepared
IN_MEMORY = 2**26  # bytes that are held before they go to a temporary file


class Spool(Mapping[str, bytes]):
    """Pictures and recordings that are being collected: over IN_MEMORY bytes they lie in a temporary file.

    `changed` counts what was changed, once for each different picture, `changed_sounds` for each recording;
    `sizes` holds each picture's pixels, `seconds` each recording's length.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0
        self.changed: Counter[str] = Counter()
        self.changed_sounds: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self.sizes: dict[str, tuple[int, int]] = {}

    def add(self, medium: Picture | Sound) -> None:
        """Keep a picture or a recording, once. Raises DiskSpaceError."""
        if medium.name in self._places:
            return
        try:
            self._file.seek(self._end)
            self._file.write(medium.data)
        except OSError as error:
            raise DiskSpaceError(
                f"cannot hold over {self._end / 2**20:,.0f} MiB of media among temporary files: {error}",
                remedy="free some room, or set TMPDIR to a folder with room; nothing was changed",
            ) from error
        self._places[medium.name] = self._end, len(medium.data)
        self._end += len(medium.data)
        if isinstance(medium, Sound):
            self.changed_sounds.update(medium.changed)
            self.seconds[medium.name] = medium.seconds
        else:
            self.changed.update(medium.changed)
            self.sizes[medium.name] = medium.width, medium.height

    def __getitem__(self, name: str) -> bytes:
        start, size = self._places[name]
        self._file.seek(start)
        return self._file.read(size)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class MissingMediaError(DataError, KeyError):
    """A picture or recording that no shard holds; a KeyError too, so that `get` returns its default."""

    def __str__(self) -> str:
        return str(self.args[0])  # which KeyError would quote


class MediaStore(Mapping[str, bytes]):
    """Pictures and recordings of tar shards by name, read from their place in the shard when asked for.

    Raises DataError for a shard that is no tar, and MissingMediaError for one that none holds.
    """

    def __init__(self, shards: Iterable[Path] = ()) -> None:
        self._shards = [path for path in shards if path.exists()]
        self._places: dict[str, tuple[int, int, int]] = {}  # shard, start, size
        for number, path in enumerate(self._shards):
            try:
                with tarfile.open(path, "r:") as shard:
                    for member in shard:
                        place = (number, member.offset_data, member.size)
                        if MEDIA_NAME.fullmatch(member.name) and member.isreg():
                            self._places.setdefault(member.name, place)
            except (tarfile.TarError, OSError, EOFError) as error:
                raise DataError(
                    f"{path} is no tar of pictures and recordings: {error}", remedy="restore it: dvc checkout"
                ) from None

    @classmethod
    def read(cls, folder: Path) -> MediaStore:
        """Read the shards of a folder; a folder that is missing is an empty store."""
        return cls(sorted(folder.glob("*.tar")))

    def __getitem__(self, name: str) -> bytes:
        if name not in self._places:
            raise MissingMediaError(
                f"the {kind_of(name)} {name[:80]} is in none of the {len(self._shards)} shards",
                remedy="run `ratchet retrain`, which prepares the rows anew; `dvc pull` brings the shards",
            )
        number, start, size = self._places[name]
        with self._shards[number].open("rb") as shard:
            shard.seek(start)
            return shard.read(size)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def write_shard(path: Path, media: Mapping[str, bytes], names: Iterable[str] | None = None) -> None:
    """Write the media, or those of them with the given `names`, as a tar: equal media give equal bytes.

    Raises DataError for a name that is not that of the bytes.
    """
    write_bytes(path, _tar(media, sorted(set(media if names is None else names))))


def _tar(media: Mapping[str, bytes], names: list[str]) -> Iterator[bytes]:
    written = 0
    for name in names:
        data = media.get(name, b"")
        if not MEDIA_NAME.fullmatch(name) or hashlib.sha256(data).hexdigest() != name[:64]:
            raise DataError(
                f"the {kind_of(name)} {name[:80]} is missing, or has another sha256 than its name says",
                remedy="ingest the rows again",
            )
        member = tarfile.TarInfo(name)  # mtime 0, uid 0, gid 0, mode 0644, no names of users
        member.size = len(data)
        chunk = member.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
        written += len(chunk)
        yield chunk
    end = 2 * tarfile.BLOCKSIZE
    yield bytes(end + -(written + end) % tarfile.RECORDSIZE)

"""Pictures of rows: check and normalise their bytes, hash what they show, keep them in tar shards by name.

A picture's name is `<sha256 of its stored bytes>.<png|jpg>`, so a row that names one names its very bytes.
Stored pictures are PNG or JPEG, grey (L) or colour (RGB), upright, and without EXIF, GPS or comments.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
import struct
import tarfile
import tempfile
import weakref
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

from ratchet.config.data import MediaConfig
from ratchet.data.examples import MEDIA_NAME, RowError
from ratchet.errors import DataError, DiskSpaceError
from ratchet.files import write_bytes

FOLDER = "media"  # of data/prepared
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MOST_FRAMES = 100  # a longer animation is a film, of which the first frame says little
IN_MEMORY = 2**26  # bytes of pictures that are held before they go to a temporary file
GREY = {"1": "bitmap", "I;16": "depth", "I;16B": "depth", "I;16L": "depth", "I;16N": "depth", "I": "depth"}
ALPHA = frozenset({"RGBA", "RGBa", "LA", "La", "PA"})
BROKEN = (  # what Pillow's decoders raise for broken bytes
    *(OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, AttributeError, EOFError),
    *(OverflowError, RuntimeError, struct.error, zlib.error),
)
# What is no picture that is taken, by its first bytes after blanks.
OTHERS = {
    b"%PDF": "a PDF",
    b"<svg": "an SVG",
    b"<?xml": "an SVG or another XML file",
    b"<": "a page (HTML)",
    b"PK": "an archive (zip)",
    b"\x1f\x8b": "an archive (gzip)",
    b"\x28\xb5\x2f\xfd": "an archive (zstd)",
    b"Rar!": "an archive (rar)",
    b"7z\xbc\xaf": "an archive (7z)",
    b"8BPS": "a Photoshop file",
    b"%!PS": "a PostScript file",
}
MAGIC = re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|II\*\0|MM\0\*|RIFF.{4}WEBP", re.DOTALL)
BOXES = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"avif": "AVIF"}  # after `ftyp` at byte 4
PNG_HEAD, PNG_KEPT = b"\x89PNG\r\n\x1a\n", (b"IHDR", b"IDAT", b"IEND")
PNG_END = b"IEND\xaeB`\x82"
JPEG_KEPT = (0xE0, 0xEE)  # JFIF, and Adobe's segment that names the colour transform
SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7]", re.DOTALL)
# Cells of a side, and the levels of grey, of 256, by which a cell of the same picture may differ: scaled and
# compressed copies differ by up to 11, different invoices of one sender by at least 17 (docs/lab-notes.md).
CELLS, MOST_APART = 32, 12
LEAST_BITS = 8  # set bits below which a hash says too little: a blank page is like any other


class Picture(NamedTuple):
    """A picture as it is stored; `changed`: what was changed, as codes to count (`orientation`, …)."""

    name: str
    data: bytes
    width: int
    height: int
    changed: tuple[str, ...] = ()


# --- one picture --------------------------------------------------------------------------------------------


def read_picture(data: bytes, limits: MediaConfig, sha256: str = "") -> Picture:
    """Check and normalise a picture, whatever its file is called; `sha256` is that of `data`, if it is known.

    Raises RowError: `media_type`, `media_size`, `media_broken`.
    """
    if not data:
        raise RowError("media_broken", "the picture has no bytes")
    if len(data) > limits.max_bytes:
        raise RowError(
            "media_size",
            f"the picture has {len(data)} bytes; `ingest.media.max_bytes` is {limits.max_bytes}",
        )
    image = _open(data)
    _check_size(image, limits)
    if image.format == "PNG" and data.rfind(PNG_END) < 0:  # Pillow takes a PNG that lacks its last bytes
        raise RowError("media_broken", "the picture is cut off: it has no end")
    try:
        return _normalise(data, image, sha256)
    except RowError:
        raise
    except BROKEN as error:
        said = str(error).partition("\n")[0][:120] or type(error).__name__
        raise RowError("media_broken", f"the picture is cut off or broken: {said}") from None


def from_uri(uri: str) -> bytes:
    """Return the bytes of a data URI. Raises RowError."""
    head, comma, content = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RowError("media_broken", f"the data URI {head[:40]!r} is not written in base64")
    return from_base64(content)


def from_base64(text: str) -> bytes:
    """Return the bytes of a picture in base64. Raises RowError."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise RowError("media_broken", "the picture's base64 is broken or cut off") from None


def _open(data: bytes) -> Image.Image:
    """Read a picture's head. Raises RowError."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        if MAGIC.match(data):
            raise RowError("media_broken", "the picture's head is cut off or broken") from None
        raise RowError(
            "media_type", f"{_tell_type(data)} in place of a picture; wanted {', '.join(FORMATS)}"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RowError("media_size", "the picture has more pixels than any screen: a bomb?") from None
    except BROKEN as error:
        raise RowError("media_broken", f"the picture's head is broken: {str(error)[:120]}") from None


def _tell_type(data: bytes) -> str:
    if data[4:8] == b"ftyp":
        return f"a file of type {BOXES.get(data[8:12], 'MP4')}"
    head = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    if b"<svg" in head.lower():
        return "an SVG"
    return next((what for magic, what in OTHERS.items() if head.lower().startswith(magic.lower())), "a file")


def _check_size(image: Image.Image, limits: MediaConfig) -> None:
    """Raise RowError for a picture too large to decode, by what its head says."""
    width, height = image.size
    if width < 1 or height < 1:
        raise RowError("media_size", f"the picture has {width}x{height} pixels; wanted at least 1x1")
    if width * height > limits.max_megapixels * 1e6:
        raise RowError(
            "media_size",
            f"the picture has {width}x{height} pixels, {width * height / 1e6:.1f} million; "
            f"`ingest.media.max_megapixels` is {limits.max_megapixels:g}",
        )


def _normalise(data: bytes, image: Image.Image, sha256: str) -> Picture:
    kind = "JPEG" if image.format == "MPO" else str(image.format)
    frames = 1 if kind == "JPEG" else getattr(image, "n_frames", 1)
    if frames > MOST_FRAMES:
        raise RowError("media_type", f"the picture has {frames} frames; at most {MOST_FRAMES} are taken")
    image.load()
    changed = ["animation"] * (frames > 1)
    exif = image.getexif()
    turned = exif.get(ExifTags.Base.Orientation, 1) in range(2, 9)
    if ExifTags.IFD.GPSInfo in exif:
        changed.append("position")
    made = ImageOps.exif_transpose(image) if turned else image
    changed += ["orientation"] * turned
    made, modes = _in_mode(made)
    changed += modes
    if kind == "PNG" and data[24:25] not in (b"\x08", b"") and not modes:
        changed.append("depth")  # 16 bits a colour, which Pillow reads as 8
    stored = None
    if kind == "PNG" and not set(changed) - {"animation", "position"}:
        stored = _strip_png(data)
    elif kind == "JPEG" and not set(changed) - {"position"}:
        stored = _strip_jpeg(data)
    suffix = "jpg" if kind == "JPEG" else "png"
    if stored is None:
        if kind not in ("PNG", "JPEG"):
            changed.append(kind.lower())
        changed += ["metadata"] * bool(_metadata(image, exif))
        stored = _encode(made, image, suffix)
    elif stored != data:
        changed.append("metadata")
    digest = sha256 if sha256 and stored == data else hashlib.sha256(stored).hexdigest()
    name = f"{digest}.{suffix}"
    return Picture(name, stored, *made.size, tuple(changed))


def _metadata(image: Image.Image, exif: Image.Exif) -> bool:
    said = {"exif", "xmp", "XML:com.adobe.xmp", "comment", "icc_profile", "photoshop", "Software", "Author"}
    return bool(exif and image.format != "TIFF") or bool(said & image.info.keys())  # a TIFF is made of tags


def _in_mode(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Return the picture in mode L or RGB with 8 bits a colour, and what was changed. Raises RowError."""
    mode, changed = image.mode, list[str]()
    if mode == "F":
        raise RowError("media_type", "the picture's pixels are fractions; wanted whole numbers")
    if mode in GREY and mode != "1":
        values = np.asarray(image).astype(np.int64)
        deep = mode != "I" or int(values.max(initial=0)) > 255  # 32 bits may hold 8 or 16
        return Image.fromarray((values.clip(0, 65535) >> (8 if deep else 0)).astype(np.uint8)), ["depth"]
    if mode in ("P", "PA"):
        changed.append("palette")
    if mode in ALPHA or "transparency" in image.info:
        shown = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, shown).convert("RGB"), [*changed, "alpha"]
    if mode == "1":
        return image.convert("L"), ["bitmap"]
    if mode in ("L", "RGB"):
        return image, changed
    if mode != "P":
        changed.append("cmyk" if mode == "CMYK" else "colours")
    return image.convert("RGB"), changed


def _encode(made: Image.Image, image: Image.Image, suffix: str) -> bytes:
    out = io.BytesIO()
    bare = Image.frombytes(made.mode, made.size, made.tobytes())  # without `info`, which would be written
    if suffix == "png":
        bare.save(out, "PNG", compress_level=3)  # a third of the time of 6, for a few percent more bytes
    elif image.mode == made.mode:  # turned: the tables of the original lose the least
        sampling = JpegImagePlugin.get_sampling(image)
        tables = getattr(image, "quantization", None)
        bare.save(out, "JPEG", qtables=tables, subsampling=max(sampling, 0))
    else:
        bare.save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def _strip_png(data: bytes) -> bytes | None:
    """Keep the chunks that hold the picture, and nothing after its end; None for a broken file."""
    kept, at, whole = [PNG_HEAD], len(PNG_HEAD), True
    while at + 12 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind in PNG_KEPT:
            kept.append(data[at : at + 12 + size])
        else:
            whole = False
        at += 12 + size
        if kind == b"IEND":
            return data if whole and at == len(data) else b"".join(kept)
    return None


def _strip_jpeg(data: bytes) -> bytes | None:
    """Keep the segments that hold the picture, and nothing after its end; None for a broken file."""
    kept, at = [data[:2]], 2
    while at + 4 <= len(data) or data[at : at + 2] == b"\xff\xd9":
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0xD9:
            return b"".join([*kept, b"\xff\xd9"])
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:  # the pixels follow, up to the next marker
            found = SCAN_END.search(data, end)
            if not found:
                return None
            end = found.start()
        if marker in JPEG_KEPT or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[at:end])
        at = end
    return None


# --- what it shows ------------------------------------------------------------------------------------------


def difference_hash(image: Image.Image) -> int | None:
    """Hash what a picture shows to 64 bits: dHash of N. Krawetz, "Kind of Like That", hackerfactor.com, 2013.

    A bit tells whether a cell of 9x8 grey cells is lighter than its right neighbour. None for a picture with
    few such steps, such as a blank page.
    """
    small = image.convert("L").resize((9, 8), Image.Resampling.BOX)
    cells = np.asarray(small).astype(np.int16)
    bits = (cells[:, :-1] > cells[:, 1:]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big") if bits.sum() >= LEAST_BITS else None


class Look(NamedTuple):
    """What a picture shows: its difference hash, by which others are found, and grey cells to compare."""

    hash: int
    cells: bytes


def look_at(data: bytes) -> Look | None:
    """Return what a stored picture shows; None if that is too little to compare.

    Raises DataError for bytes that are no picture.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            image.draft("L", (8 * CELLS, 8 * CELLS))  # a JPEG is decoded no larger than needed
            hash = difference_hash(image)
            small = image.convert("L").resize((CELLS, CELLS), Image.Resampling.BOX)
    except BROKEN as error:
        raise DataError(f"a stored picture cannot be read: {error}", remedy="ingest the rows again") from None
    return None if hash is None else Look(hash, small.tobytes())


def alike(table: NDArray[np.uint8], cells: bytes) -> NDArray[np.bool_]:
    """Tell of each row of `table`, (pictures, cells), whether it shows the same, scaled or compressed.

    The hash alone takes every third pair of different invoices of one sender for the same one.
    """
    wanted = np.frombuffer(cells, np.uint8).astype(np.int16)
    return np.asarray((np.abs(table.astype(np.int16) - wanted) <= MOST_APART).all(axis=1))


def size_of(data: bytes) -> tuple[int, int]:
    """Return the width and height of a stored picture."""
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        return image.size


def shrink(data: bytes, side: int) -> bytes:
    """Return a stored picture as a JPEG whose sides have at most `side` pixels."""
    stored = io.BytesIO()
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        image.thumbnail((side, side))
        image.convert("RGB").save(stored, "JPEG", quality=90)
    return stored.getvalue()


# --- many pictures ------------------------------------------------------------------------------------------


class Spool(Mapping[str, bytes]):
    """Pictures that are being collected: over IN_MEMORY bytes they lie in a temporary file.

    `changed` counts what was changed, once for each different picture, `sizes` holds each one's pixels.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0
        self.changed: Counter[str] = Counter()
        self.sizes: dict[str, tuple[int, int]] = {}

    def add(self, picture: Picture) -> None:
        """Keep a picture, once. Raises DiskSpaceError."""
        if picture.name in self._places:
            return
        try:
            self._file.seek(self._end)
            self._file.write(picture.data)
        except OSError as error:
            raise DiskSpaceError(
                f"cannot hold over {self._end / 2**20:,.0f} MiB of pictures among temporary files: {error}",
                remedy="free some room, or set TMPDIR to a folder with room; nothing was changed",
            ) from error
        self._places[picture.name] = self._end, len(picture.data)
        self._end += len(picture.data)
        self.changed.update(picture.changed)
        self.sizes[picture.name] = picture.width, picture.height

    def __getitem__(self, name: str) -> bytes:
        start, size = self._places[name]
        self._file.seek(start)
        return self._file.read(size)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class MissingPictureError(DataError, KeyError):
    """A picture that no shard holds; a KeyError too, so that `get` returns its default."""

    def __str__(self) -> str:
        return str(self.args[0])  # which KeyError would quote


class MediaStore(Mapping[str, bytes]):
    """Pictures of tar shards by name, read from their place in the shard when they are asked for.

    Raises DataError for a shard that is no tar, and MissingPictureError for a picture that none holds.
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
                    f"{path} is no tar of pictures: {error}", remedy="restore it: dvc checkout"
                ) from None

    @classmethod
    def read(cls, folder: Path) -> MediaStore:
        """Read the shards of a folder; a folder that is missing is an empty store."""
        return cls(sorted(folder.glob("*.tar")))

    def __getitem__(self, name: str) -> bytes:
        if name not in self._places:
            raise MissingPictureError(
                f"the picture {name[:80]} is in none of the {len(self._shards)} shards",
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


def write_shard(path: Path, pictures: Mapping[str, bytes], names: Iterable[str] | None = None) -> None:
    """Write the pictures, or those of them with the given `names`, as a tar: equal pictures give equal bytes.

    Raises DataError for a name that is not that of the bytes.
    """
    write_bytes(path, _tar(pictures, sorted(set(pictures if names is None else names))))


def _tar(pictures: Mapping[str, bytes], names: list[str]) -> Iterator[bytes]:
    written = 0
    for name in names:
        data = pictures.get(name, b"")
        if not MEDIA_NAME.fullmatch(name) or hashlib.sha256(data).hexdigest() != name[:64]:
            raise DataError(
                f"the picture {name[:80]} is missing, or has another sha256 than its name says",
                remedy="ingest the rows again",
            )
        member = tarfile.TarInfo(name)  # mtime 0, uid 0, gid 0, mode 0644, no names of users
        member.size = len(data)
        chunk = member.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
        written += len(chunk)
        yield chunk
    end = 2 * tarfile.BLOCKSIZE
    yield bytes(end + -(written + end) % tarfile.RECORDSIZE)

"""Pictures of rows: check and normalise their bytes, and hash what they show.

Stored pictures are PNG or JPEG, grey (L) or colour (RGB), upright, and without EXIF, GPS or comments.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import zlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

from ratchet.config.data import MediaConfig
from ratchet.errors import DataError, RowError
from ratchet.media.names import name_type

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
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
        return _normalise(data, image, limits, sha256)
    except RowError:
        raise
    except BROKEN as error:
        said = str(error).partition("\n")[0][:120] or type(error).__name__
        raise RowError("media_broken", f"the picture is cut off or broken: {said}") from None


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
    known = (what for magic, what in OTHERS.items() if head.lower().startswith(magic.lower()))
    return next(known, "") or name_type(data)


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


def _normalise(data: bytes, image: Image.Image, limits: MediaConfig, sha256: str) -> Picture:
    kind = "JPEG" if image.format == "MPO" else str(image.format)
    frames = 1 if kind == "JPEG" else getattr(image, "n_frames", 1)
    if frames > limits.max_frames:
        raise RowError(
            "media_type",
            f"the picture has {frames} frames; `ingest.media.max_frames` is {limits.max_frames}",
        )
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

"""Real photographs, which scikit-learn brings, as copies and crops: copies share a split, crops need not."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from ratchet.config.data import PrepareConfig
from ratchet.config.params import Config
from ratchet.data.examples import read_examples
from ratchet.data.profile import SPLITS
from ratchet.media.pictures import alike, look_at
from ratchet.media.store import FOLDER, MediaStore
from tasks.ingest import add_batch, pull
from tasks.prepare import prepare

# Sides of crops, and the steps from one to the next: neighbours overlap.
CROPS = ((160, 133), (320, 107))
ORIENTATION = 0x0112  # EXIF's tag; 6: to be turned by 90 degrees to the right


def saved(image: Image.Image, kind: str, **how: object) -> bytes:
    stored = io.BytesIO()
    image.save(stored, kind, **how)
    return stored.getvalue()


def turned(image: Image.Image) -> bytes:
    """Store the picture lying on its side, with the note that says so, as a camera does."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return saved(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "whole": lambda image: saved(image, "PNG"),
    "turned": turned,
    "fine": lambda image: saved(image, "JPEG", quality=90),
    "coarse": lambda image: saved(image, "JPEG", quality=40),
    "webp": lambda image: saved(image, "WEBP", quality=70),
    "small": lambda image: saved(
        image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.BICUBIC), "PNG"
    ),
}


# Of small and busy pictures, scaled copies differ by more than scans and charts do, and are not found.
SCALED = 320  # pixels of a side from which they are


class Prepared(NamedTuple):
    names: dict[str, dict[str, str]]  # crop → copy → name of the stored picture
    sides: dict[str, set[str]]  # crop → splits of its rows
    plain: set[str]  # crops that show too little to be compared, such as a piece of sky
    media: MediaStore
    rows: int
    said: str


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    place = tmp_path_factory.mktemp("photographs")
    (place / "images").mkdir()
    with (place / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "question", "answer"])
        for crop, image in crops():
            for copy, store in COPIES.items():
                if copy == "small" and image.width < SCALED:
                    continue
                (place / f"images/{crop}.{copy}").write_bytes(store(image))
                table.writerow([f"images/{crop}.{copy}", "What is it a part of?", f"{crop}.{copy}"])
    pulled = pull(Config(), path=str(place / "rows.csv"))
    add_batch(place / "raw", pulled, licence="CC-BY-2.0", who="tests")
    settings = PrepareConfig(min_rows=20, test_share=0.3, validation_share=0.2)
    prepare(place / "raw", place / "golden.jsonl", place / "prepared", settings)
    names: dict[str, dict[str, str]] = defaultdict(dict)
    sides: dict[str, set[str]] = defaultdict(set)
    for split in SPLITS:
        for row in read_examples(place / f"prepared/{split}.jsonl"):
            crop, _, copy = row.answer.partition(".")
            names[crop][copy] = row.media[0]
            sides[crop].add(split)
    store = MediaStore.read(place / "prepared" / FOLDER)
    plain = {crop for crop, found in names.items() if look_at(store[found["whole"]]) is None}
    return Prepared(names, sides, plain, store, len(pulled.lines), "\n".join(pulled.said))


def crops() -> Iterator[tuple[str, Image.Image]]:
    """Cut overlapping squares out of the two photographs of 640x427 pixels."""
    for photograph, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        whole = Image.fromarray(pixels)
        for side, step in CROPS:
            for left in range(0, whole.width - side, step):
                for top in range(0, whole.height - side, step):
                    yield (
                        f"{photograph}-{side}-{left}-{top}",
                        whole.crop((left, top, left + side, top + side)),
                    )


def test_copies_of_a_photograph_stand_in_one_split(prepared: Prepared) -> None:
    assert prepared.rows == sum(map(len, prepared.names.values())) == 24 * 5 + 6 * 6  # none was left out
    assert len(prepared.plain) == 4
    straddling = {crop for crop, found in prepared.sides.items() if len(found) > 1}
    assert straddling <= prepared.plain, prepared.sides


def test_other_parts_of_the_same_photograph_are_other_pictures(prepared: Prepared) -> None:
    for photograph in ("china", "flower"):
        crops = [crop for crop in prepared.names if crop.startswith(photograph)]
        assert {side for crop in crops for side in prepared.sides[crop]} == set(SPLITS)
        looks = [look_at(prepared.media[prepared.names[crop]["whole"]]) for crop in crops]
        known = [look for look in looks if look is not None]
        table = np.array([np.frombuffer(look.cells, np.uint8) for look in known])
        assert [int(alike(table, look.cells).sum()) for look in known] == [1] * len(known)


def test_a_picture_that_was_stored_on_its_side_stands_upright(prepared: Prepared) -> None:
    for found in prepared.names.values():
        upright, turned_back = (
            np.asarray(Image.open(io.BytesIO(prepared.media[found[copy]]))) for copy in ("whole", "turned")
        )
        assert (upright == turned_back).all()
    assert f"orientation {len(prepared.names)}" in prepared.said

"""Write ``label.html``: one file in which a person labels images in a browser, without a server."""

import hashlib
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from vissl_lite.data.atomic_file import write_atomically
from vissl_lite.data.image_reader import PHOTOGRAPHS, ImageReader
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.data.reading import Broken, reason, report_skipped
from vissl_lite.errors import UserError
from vissl_lite.evaluation.knn import TEMPERATURE
from vissl_lite.report.gallery import own_range_note
from vissl_lite.report.page import render

# Longer side in pixels of the image that is labelled, of a neighbor, and of the strip's thumbnails.
PICTURE_SIDE, NEIGHBOR_SIDE, STRIP_SIDE = 512, 160, 96

# Quality of WebP: about 30 kB for a photograph of 512 pixels.
QUALITY = 80


@dataclass(frozen=True)
class LabelledNeighbor:
    """A labelled image that is similar to one to label.

    Attributes:
        path: Image file; may name a frame.
        label: Class of the image.
        similarity: Cosine similarity of the features, see ``nearest_neighbors``.
    """

    path: str
    label: str
    similarity: float


@dataclass(frozen=True)
class LabelImage:
    """An image to label.

    Attributes:
        path: Image file; may name a frame. It stands in the CSV as it is here. Browsers save the
            CSV in a folder of their own, so only an absolute path is found from there.
        neighbors: The most similar labelled images, if there are any.
        similar: Path and cosine similarity of the most similar other images to label. Once they are
            labelled on the page, they are neighbors, too.
    """

    path: str
    neighbors: Sequence[LabelledNeighbor] = ()
    similar: Sequence[tuple[str, float]] = ()


def write_label_page(
    file: Path,
    images: Sequence[LabelImage],
    classes: Sequence[str],
    title: str,
    labelled: Sequence[tuple[str, str]] = (),
    groups: Mapping[str, str] | None = None,
    reader: ImageReader = PHOTOGRAPHS,
) -> None:
    """Write the page atomically as one file, which loads nothing else.

    The person gives each image a class, skips it, or marks it as not usable. The page suggests the
    class that the nearest labelled images vote for, weighted as in ``knn_predict``. Progress is
    kept in the browser's ``IndexedDB``, by a hash of the images' paths. The page saves
    ``labels.csv`` with the columns ``path`` and ``class``, and ``group`` if groups are given, which
    ``load_labelled`` reads (a column ``class`` is not divided at ``|`` and ``;``, unlike one called
    ``label``), and ``not_usable.csv`` with the columns ``path`` and ``not_usable``, which is 1.

    Pictures are reduced to 512 pixels, so that 100 photographs take about 4 MB. Images that can't
    be read are left out, and named in the log. Names that are not UTF-8 are saved as they are. The
    page says so if the brightness of pictures can't be compared.

    Args:
        file: HTML file to write.
        images: Images to label, in the order in which they are shown.
        classes: Known classes, in the order of their keys; those of labelled images are added. The
            person can add more. May be empty.
        title: Title of the page.
        labelled: Path and class of images that were labelled before. ``labels.csv`` begins with
            them, so that one file has the labels of all rounds.
        groups: Group of each path that has one, such as a patient, for a column ``group`` of
            ``labels.csv``: ``load_labelled`` divides no group. None for no such column.
        reader: How the images are read, which determines what their pictures look like.

    Raises:
        UserError: None of the images can be read.
    """
    broken: list[Broken] = []
    shown: list[dict[str, Any]] = []
    thumbnails: list[str] = []
    places: dict[str, int | None] = {}  # of the neighbors among the thumbnails
    numbers: dict[str, int] = {}  # of the images to label
    own_range = 0
    for image in images:
        try:
            pixels = reader.read_picture(image.path, PICTURE_SIDE)
            own_range += reader.has_own_range(image.path)
        except BROKEN_IMAGE as error:
            broken.append(Broken(image.path, reason(error, image.path)))
            continue
        neighbors = []
        for one in image.neighbors:
            if one.path not in places:
                try:
                    small = reader.read_picture(one.path, NEIGHBOR_SIDE)
                    thumbnail = data_uri(small, NEIGHBOR_SIDE)
                    own_range += reader.has_own_range(one.path)
                except BROKEN_IMAGE as error:
                    broken.append(Broken(one.path, reason(error, one.path)))
                    places[one.path] = None
                else:
                    places[one.path] = len(thumbnails)
                    thumbnails.append(thumbnail)
            neighbors.append([places[one.path], one.label, round(one.similarity, 4)])
        numbers[image.path] = len(shown)
        shown.append(
            {
                "path": image.path,
                "name": "/".join(Path(image.path).parts[-2:]),
                "picture": data_uri(pixels, PICTURE_SIDE),
                "thumbnail": data_uri(pixels, STRIP_SIDE),
                "neighbors": neighbors,
                "similar": image.similar,
            }
        )
    for entry in shown:  # once it is known which images can be read
        entry["similar"] = [
            [numbers[path], round(similarity, 4)]
            for path, similarity in entry["similar"]
            if path in numbers
        ]
    report_skipped(broken)
    if not shown:
        raise UserError(f"none of the {len(images)} images to label can be read")
    paths = [str(one["path"]) for one in shown]
    here = set(paths)
    named = [*paths, *(path for path, _ in labelled)]
    digest = hashlib.sha256(json.dumps(paths).encode()).hexdigest()
    labels = [one.label for image in images for one in image.neighbors]
    labels += [label for _, label in labelled]
    content = {
        "key": f"vissl-lite-label-{digest[:32]}",
        "classes": list(dict.fromkeys([*classes, *labels])),
        "images": shown,
        "thumbnails": thumbnails,
        "temperature": TEMPERATURE,
        "labelled": [row for row in labelled if row[0] not in here],
        "groups": None if groups is None else {p: groups[p] for p in named if p in groups},
    }
    # "<" would let a path end the script element; json.dumps escapes all that is not ASCII.
    script = Markup(json.dumps(content).replace("<", "\\u003c"))
    page = render(
        "label",
        title=title,
        content=script,
        version=version("vissl-lite"),
        note=own_range_note(own_range, len(shown) + len(thumbnails)),
    )
    write_atomically(file, page.encode(errors="replace").decode())


def data_uri(pixels: np.ndarray, longest: int) -> str:
    """Encode ``(H, W, 3)`` uint8 as a data URI of WebP, reduced to a longer side in pixels."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((longest, longest))
    buffer = BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{b64encode(buffer.getvalue()).decode()}"

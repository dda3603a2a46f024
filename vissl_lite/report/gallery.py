"""Embed the pictures of a run folder in a page, reduced in size."""

import base64
from io import BytesIO
from pathlib import Path

from vissl_lite.data.headers import opened_image
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.data.reading import read_regular
from vissl_lite.report.folder import RunFolder
from vissl_lite.report.page import Block, render

# Heading and note of the known pictures, in the order in which they are shown.
PICTURES = {
    "compare.png": (
        "Test results by number of labels",
        "Means over the seeds; bands are one standard deviation. The dashed line is the baseline.",
    ),
    "labels.png": (
        "Labels",
        "Images of each part with their labels. Check that the labels are right.",
    ),
    "selected.png": (
        "Chosen images",
        "The images to label, the most useful first. selected.csv lists all of them.",
    ),
    "test.png": (
        "Test images",
        "Predictions of the model and the ground truth. For detection, the title names the"
        " confidence above which boxes are drawn: that of the best F1 on the validation images.",
    ),
    "confusion.png": ("Confusion matrix", "Rows are true classes, columns predicted classes."),
    "per_class.png": ("Classes", "On the test part, best first."),
    "views.png": (
        "Augmented views",
        "Some images beside their augmented views, the input of the encoder."
        " Check that you can still recognize what they show.",
    ),
    "pretext.png": (
        "Pretext examples",
        "Predictions of the trained encoder on the pretext's own task.",
    ),
    "neighbors.png": (
        "Nearest neighbors",
        "Images beside those with the most similar features."
        " Neighbors should show the same kind of content.",
    ),
    "curves.png": ("Curves", ""),
}

# The same of compare.png with one amount of labels.
COMPARED_ONCE = ("Test results", "Bars are means over the seeds, and dots single seeds.")

# Maximum longer side of pictures and of thumbnails in pixels, and maximum number of thumbnails.
PICTURE_SIDE, THUMBNAIL_SIDE, THUMBNAILS = 1800, 360, 24

# PNG files below this size in bytes are embedded unchanged, which keeps lines and text sharp.
UNCHANGED_BYTES = 150_000


def data_uri(file: Path, longest: int = PICTURE_SIDE) -> str:
    """Encode an image file as a data URI, as WebP unless it is a small PNG.

    Args:
        file: Image file.
        longest: Longer side in pixels to reduce larger images to.

    Raises:
        OSError, ValueError, SyntaxError: If the image cannot be read (``BROKEN_IMAGE``).
    """
    data = read_regular(file)
    with opened_image(BytesIO(data), file) as opened:
        opened.load()  # Decodes the whole image, so that truncated files are detected.
        if max(opened.size) <= longest and opened.format == "PNG" and len(data) < UNCHANGED_BYTES:
            kind = "png"
        else:
            picture = opened.convert("RGBA" if "A" in opened.getbands() else "RGB")
            picture.thumbnail((longest, longest))
            buffer = BytesIO()
            picture.save(buffer, "WEBP", quality=85)
            kind, data = "webp", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture(run: RunFolder, name: str) -> list[Block]:
    """Return a block with one picture of the run, or nothing if it is missing or damaged.

    Args:
        run: The run. A damaged picture is added to ``run.unreadable``.
        name: File name of the picture.
    """
    if not run.has(name):
        return []
    heading, note = PICTURES.get(name, (Path(name).stem.replace("_", " ").capitalize(), ""))
    labels = run.figures.get("labels")
    if name == "compare.png" and isinstance(labels, dict) and len(labels) == 1:
        heading, note = COMPARED_ONCE
    sheet = run.figures.get("sheet")
    if name == "selected.png" and isinstance(sheet, dict):
        own, images = sheet.get("own_range"), sheet.get("pictures")
        if isinstance(own, int) and isinstance(images, int):
            note = f"{note} {own_range_note(own, images)}".strip()
    try:
        shown = {"source": data_uri(run.folder / name), "caption": ""}
    except BROKEN_IMAGE:
        run.unreadable.append(f"{name} is damaged and left out.")
        return []
    html = render("pictures", pictures=[shown], small=False, alt=heading)
    return [Block(heading, html, note)]


def pictures(run: RunFolder, leave_out: frozenset[str]) -> list[Block]:
    """Return blocks with all pictures of the run, the known ones first.

    Args:
        run: The run. Damaged pictures are added to ``run.unreadable``.
        leave_out: Pictures that the page replaces with a chart or table.
    """
    others = sorted(file.name for file in run.folder.glob("*.png") if file.name not in PICTURES)
    names = [name for name in (*PICTURES, *others) if name not in leave_out]
    return [block for name in names for block in picture(run, name)]


def own_range_note(own: int, images: int) -> str:
    """Say that the brightness of pictures can't be compared; nothing if it can.

    Args:
        own: Number of pictures whose range of values is that of their image or volume alone.
        images: Number of pictures.
    """
    if own == 0:
        return ""
    which = "Each picture" if own == images else f"Each of {own} of the {images} pictures"
    return (
        f"{which} is drawn from the range of values of its own image or volume: do not compare its "
        "brightness with that of others."
    )


def predicted(run: RunFolder) -> list[Block]:
    """Return a block with the first pictures that ``predict`` drew."""
    files = sorted((run.folder / "pictures").rglob("*.png"))
    shown = []
    for file in files[:THUMBNAILS]:
        name = str(file.relative_to(run.folder / "pictures")).removesuffix(".png")
        try:
            shown.append({"source": data_uri(file, THUMBNAIL_SIDE), "caption": name})
        except BROKEN_IMAGE:
            run.unreadable.append(f"pictures/{name}.png is damaged and left out.")
    if not shown:
        return []
    note = f"{len(shown)} of {len(files)} in the folder pictures." if len(files) > 1 else ""
    if run.figures.get("task") == "detection":
        note += (
            " Boxes below the confidence with the best F1 on the validation images are not drawn;"
            " predictions.json holds all boxes, and this confidence as info.threshold."
        )
    html = render("pictures", pictures=shown, small=True, alt="prediction")
    return [Block("Predictions", html, note)]

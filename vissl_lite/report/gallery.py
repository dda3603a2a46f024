"""The pictures of a run folder, small enough to stand in a page."""

import base64
from io import BytesIO
from pathlib import Path

from vissl_lite.data.headers import opened_image
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.data.reading import read_regular
from vissl_lite.report.folder import RunFolder
from vissl_lite.report.page import Block, render

# What the known pictures show, in the order in which they are shown: heading and note.
PICTURES = {
    "compare.png": (
        "Accuracy against labels",
        "Means over the seeds; bands are one standard deviation. The broken line is the baseline.",
    ),
    "test.png": ("Test images", "What the model predicts, beside the truth."),
    "confusion.png": ("What is taken for what", "Rows are the truth, columns what was predicted."),
    "per_class.png": ("Classes", "On the test part, best first."),
    "views.png": (
        "What the encoder saw",
        "Some images beside their augmented views, as they go"
        " into the encoder. Would you still know what they show?",
    ),
    "pretext.png": (
        "The pretext at work",
        "What the trained encoder makes of the pretext's own question.",
    ),
    "neighbors.png": (
        "Nearest neighbors",
        "Images, and those whose features are most similar."
        " Neighbors should show the same kind of thing.",
    ),
    "curves.png": ("Curves", ""),
}

# The longer side in pixels that a picture is reduced to, and a small one among many; how many of
# these there are at most.
LARGEST, THUMBNAIL, THUMBNAILS = 1800, 360, 24

# A PNG below this size in bytes stays as it is: lines and letters are sharpest so.
KEPT = 150_000


def data_uri(file: Path, longest: int = LARGEST) -> str:
    """An image file as the address of itself, as WebP where its own bytes would be many.

    Args:
        file: An image.
        longest: Side in pixels that it is reduced to.

    Raises:
        OSError, ValueError, SyntaxError: It can't be read (``BROKEN_IMAGE``).
    """
    data = read_regular(file)
    with opened_image(BytesIO(data), file) as opened:
        opened.load()  # reads all of it, so that one cut short is found
        if max(opened.size) <= longest and opened.format == "PNG" and len(data) < KEPT:
            kind = "png"
        else:
            picture = opened.convert("RGBA" if "A" in opened.getbands() else "RGB")
            picture.thumbnail((longest, longest))
            buffer = BytesIO()
            picture.save(buffer, "WEBP", quality=85)
            kind, data = "webp", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture(run: RunFolder, name: str) -> list[Block]:
    """One picture of the run, if it is there; a damaged one is put on the list.

    Args:
        run: Its list of what is unreadable may grow.
        name: The file's.
    """
    if not run.has(name):
        return []
    heading, note = PICTURES.get(name, (Path(name).stem.replace("_", " ").capitalize(), ""))
    try:
        shown = {"source": data_uri(run.folder / name), "caption": ""}
    except BROKEN_IMAGE:
        run.unreadable.append(f"{name} is damaged and left out.")
        return []
    html = render("pictures", pictures=[shown], small=False, words=heading)
    return [Block(heading, html, note)]


def pictures(run: RunFolder, leave_out: frozenset[str]) -> list[Block]:
    """All pictures of the run, the known ones first.

    Args:
        run: Its list of what is unreadable may grow.
        leave_out: Files that something better stands for.
    """
    others = sorted(file.name for file in run.folder.glob("*.png") if file.name not in PICTURES)
    names = [name for name in (*PICTURES, *others) if name not in leave_out]
    return [block for name in names for block in picture(run, name)]


def predicted(run: RunFolder) -> list[Block]:
    """Some of the pictures that ``predict`` drew."""
    files = sorted((run.folder / "pictures").rglob("*.png"))
    shown = []
    for file in files[:THUMBNAILS]:
        name = str(file.relative_to(run.folder / "pictures")).removesuffix(".png")
        try:
            shown.append({"source": data_uri(file, THUMBNAIL), "caption": name})
        except BROKEN_IMAGE:
            run.unreadable.append(f"pictures/{name}.png is damaged and left out.")
    if not shown:
        return []
    note = f"{len(shown)} of {len(files)} in the folder pictures." if len(files) > 1 else ""
    html = render("pictures", pictures=shown, small=True, words="prediction")
    return [Block("Predictions", html, note)]

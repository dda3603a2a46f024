"""The lists of Pascal VOC in ``ImageSets``, which say which images are of which part."""

from pathlib import Path

from vissl_lite.data.images import EXTENSIONS
from vissl_lite.data.text_file import read_text
from vissl_lite.transfer.sources.parts import PARTS, VAL_NAMES, Split


def listed_images(folder: Path) -> dict[Split | None, list[str]]:
    """Names of images by part, as the lists have them but without suffix, such as ``2007_000032``.

    Args:
        folder: Folder of the lists, such as ``ImageSets/Main``.

    Returns:
        The images of each part that has a list. ``trainval.txt`` counts where there is no
        ``train.txt``: its images that are in no other list are those of training, or without
        other lists those of None, which are to be split.
    """
    lists: dict[str, list[str]] = {}
    for name in ("train", *VAL_NAMES, "test", "trainval"):
        file = folder / f"{name}.txt"
        if not file.is_file():
            continue
        lines = (line.strip().replace("\\", "/") for line in read_text(file).splitlines())
        lists["val" if name in VAL_NAMES else name] = [
            str(Path(one).with_suffix("")) if one.lower().endswith(tuple(EXTENSIONS)) else one
            for one in lines
            if one
        ]
    trainval = lists.pop("trainval", None)
    parts: dict[Split | None, list[str]] = {one: lists[one] for one in PARTS if one in lists}
    if trainval is not None and "train" not in parts:
        others = {name for names in parts.values() for name in names}
        rest = [name for name in trainval if name not in others]
        parts = {**parts, "train": rest} if parts else {None: rest}
    return parts

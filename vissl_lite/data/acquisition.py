"""How an image was acquired and stored, as its file says: size, bit depth, maker, sequence."""

from vissl_lite.data.formats import describe
from vissl_lite.data.headers import opened_image
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.data.reading import open_regular


def acquisition(path: str) -> dict[str, str]:
    """Attributes of an image file that say nothing about its content, without decoding it.

    Args:
        path: Image file.

    Returns:
        Values by the name of the attribute as a noun phrase, such as ``image size``; empty if the
        header can't be read.
    """
    try:
        described = describe(path)
        if described.format != "photograph":
            return dict(described.acquisition)
        with open_regular(path) as file, opened_image(file, path) as image:
            return {
                "image size": f"{image.width} x {image.height}",
                "file format": str(image.format),
                "bit depth and color mode": image.mode,
            }
    except BROKEN_IMAGE:
        return {}

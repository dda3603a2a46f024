"""Opening of what was given as labelled data: archives and Parquet files are unpacked."""

from pathlib import Path

from vissl_lite.data.archives import is_archive, unpack
from vissl_lite.transfer.sources.hugging_face import hugging_face_files, unpack_hugging_face


def unpacked(source: Path) -> Path:
    """The source itself, or the folder beside it that an archive or Parquet file is unpacked to.

    Args:
        source: An existing file or folder.

    Raises:
        UserError: It can't be unpacked; see ``unpack`` and ``unpack_hugging_face``.
    """
    if is_archive(source):
        source = unpack(source)
    files = hugging_face_files(source)
    return unpack_hugging_face(source, files) if files else source

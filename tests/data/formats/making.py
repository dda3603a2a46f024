"""Small image files that are not photographs, for tests."""

from io import BytesIO
from typing import Any

import imagecodecs
import nibabel as nib
import numpy as np
import pydicom
import tifffile
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    MRImageStorage,
    generate_uid,
)


def noise(*shape: int, dtype: Any = np.uint16, low: int = 0, high: int = 4096) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, shape).astype(dtype)


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    """A TIFF; by default the last of three axes is the bands."""
    out = BytesIO()
    options.setdefault("metadata", None)
    if pixels.ndim == 3 and not options.get("imagej"):
        options.setdefault("photometric", "minisblack")
        options.setdefault("planarconfig", "contig")
    tifffile.imwrite(out, pixels, **options)
    return out.getvalue()


def dataset(pixels: np.ndarray, **attributes: Any) -> FileDataset:
    """A DICOM image of ``(H, W)``, ``(N, H, W)`` or ``(H, W, 3)``, uncompressed."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    one.SOPClassUID, one.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
    one.PatientID, one.Modality, one.Manufacturer = "P1", "MR", "Maker"
    one.StudyInstanceUID, one.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    color = pixels.ndim == 3 and pixels.shape[2] == 3
    one.SamplesPerPixel = 3 if color else 1
    one.PhotometricInterpretation = "RGB" if color else "MONOCHROME2"
    if color:
        one.PlanarConfiguration = 0
    elif pixels.ndim == 3:
        one.NumberOfFrames = pixels.shape[0]
    one.Rows, one.Columns = pixels.shape[:2] if color else pixels.shape[-2:]
    one.BitsAllocated = one.BitsStored = 8 * pixels.dtype.itemsize
    one.HighBit = one.BitsStored - 1
    one.PixelRepresentation = int(pixels.dtype.kind == "i")
    one.PixelData = pixels.tobytes()
    for name, value in attributes.items():
        setattr(one, name, value)
    if "BitsStored" in attributes:
        one.HighBit = one.BitsStored - 1
    return one


def dicom(pixels: np.ndarray, syntax: str | None = None, **attributes: Any) -> bytes:
    """The content of a DICOM file.

    Args:
        pixels: See ``dataset``.
        syntax: UID of the transfer syntax to compress with; default none.
        attributes: Attributes to set.
    """
    one = dataset(pixels, **attributes)
    if syntax in (JPEG2000Lossless, JPEGLSLossless):
        coded = BytesIO()
        if syntax == JPEG2000Lossless:
            Image.fromarray(pixels).save(coded, "JPEG2000", no_jp2=True, irreversible=False)
        else:
            coded.write(imagecodecs.jpegls_encode(pixels))
        one.PixelData = encapsulate([coded.getvalue()])
        one["PixelData"].VR = "OB"
        one["PixelData"].is_undefined_length = True
        one.file_meta.TransferSyntaxUID = syntax
    elif syntax is not None:
        one.compress(syntax)
    return saved(one)


def saved(one: Dataset) -> bytes:
    out = BytesIO()
    pydicom.dcmwrite(out, one, enforce_file_format=True)
    return out.getvalue()


def nifti(voxels: np.ndarray, affine: np.ndarray | None = None, **header: Any) -> bytes:
    """The content of an uncompressed NIfTI file; ``header`` sets its fields."""
    image = nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine)
    content = bytearray(image.to_bytes())
    if header:
        fields = nib.Nifti1Header(bytes(content[:348]))
        for name, value in header.items():
            fields[name] = value
        content[:348] = fields.binaryblock
    return bytes(content)


def npy(array: np.ndarray) -> bytes:
    out = BytesIO()
    np.save(out, array)
    return out.getvalue()

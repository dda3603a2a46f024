"""Options that several tasks share. Each task combines them in its own ``options.py``."""

from dataclasses import dataclass
from typing import Literal

from vissl_lite.options import StrPath


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Base of the options that one task has and others may lack."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions(TaskOptions):
    """Options for reading tables of images, which all tasks have."""

    path_column: str | None = None
    """Column of a table that names the images. Default: by its usual name or its content."""
    label_column: str | None = None
    """Column of a table with the labels (classes, or mask files). Default: by its usual name."""
    image_root: StrPath | None = None
    """Folder of the images that a table names. Default: the folder of the table."""
    test_fold: str | None = None
    """Value of the column fold of a table whose rows are the test part."""
    group_by: str | None = None
    """Regular expression on the path of an image below the data folder. Images for which its first
    group (or, without one, all that it matches) is the same, such as those of a patient, stay
    together in all splits. Default: by the column group or patient_id of a table, or by the volume
    of slices or the patient of DICOM files."""


# Everything by its usual name.
DEFAULT_SOURCE = SourceOptions()


@dataclass(frozen=True, kw_only=True)
class ClassNameOptions(TaskOptions):
    """Options for taking the class of an image from its path."""

    class_level: int | None = None
    """Level of nested class folders that names the classes, 1 for the outermost. Default: 1."""
    label_regex: str | None = None
    """Regular expression whose first group is the class of an image, found in its file name."""


@dataclass(frozen=True, kw_only=True)
class AnnotationsOption(TaskOptions):
    """Option for the annotations."""

    annotations: StrPath | None = None
    """Where the boxes or masks are, if --data is the folder of the images alone."""


@dataclass(frozen=True, kw_only=True)
class ClassWeightsOption(TaskOptions):
    """Option for class weights."""

    class_weights: Literal["balanced"] | dict[str, float] | None = None
    """Weights of the classes in the loss: balanced, or a weight for each name."""

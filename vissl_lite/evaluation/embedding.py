"""Maps of embeddings: two dimensions, nearest neighbors, outliers, near-duplicates."""

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from vissl_lite.data.atomic_file import atomic_write
from vissl_lite.data.image_reader import PHOTOGRAPHS, ImageReader
from vissl_lite.data.images import BROKEN_IMAGE, resize_and_crop
from vissl_lite.data.npz_file import read_npz
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.evaluation.features import extract
from vissl_lite.evaluation.measures import unit_vectors
from vissl_lite.inference import check_outputs

Method = Literal["pca", "umap"]

# Images on a map; on that of a selection, of each kind: chosen, labelled and others.
MAP_IMAGES = 1000

NUM_NEIGHBORS = 10  # of each image, that a map knows
THUMBNAIL_SIDE, JPEG_QUALITY = 64, 70  # side in pixels, of JPEG: about 1.3 kB a photograph

# UMAP looks at the 15 nearest images: among fewer than these there is nothing to unfold.
UMAP_LEAST = 100

# Similarity from which two images count as near-duplicates, see near_duplicates; and how many pairs
# are kept, since an encoder that has collapsed finds all of them alike.
DUPLICATE_SIMILARITY, MAX_PAIRS = 0.98, 200

# Distance from the mean, relative to the features, up to which they differ by rounding only.
SAME_FEATURES = 1e-6

# Class of the images that ``select`` has chosen, which the page marks.
CHOSEN = "chosen"

# Bytes that the arrays of a file may take: 5,000 paths of 4,096 letters are 82 MB.
MAX_MAP_BYTES = 512 * 2**20


@dataclass(frozen=True, eq=False)
class ImageMap:
    """The map of the embeddings of N images, with everything that its page shows.

    Attributes:
        paths: N absolute paths.
        labels: ``(N,)`` class indices, or None.
        classes: Names of the classes; empty without labels.
        coordinates: ``(N, 2)`` by method: ``pca``, and ``umap`` where it could be had.
        neighbors: ``(N, k)`` indices of the images most alike, nearest first.
        similarities: ``(N, k)`` their cosine similarities.
        outlier_score: ``(N,)`` distance to the k-th neighbor.
        duplicates: ``(P, 2)`` indices of near-duplicates, most alike first.
        thumbnails: N JPEG files.
    """

    paths: list[str]
    labels: np.ndarray | None
    classes: list[str]
    coordinates: dict[str, np.ndarray]
    neighbors: np.ndarray
    similarities: np.ndarray
    outlier_score: np.ndarray
    duplicates: np.ndarray
    thumbnails: list[bytes]

    def save(self, file: Path) -> None:
        """Write one NPZ file without pickled objects, atomically."""
        more: dict[str, Any] = {} if self.labels is None else {"labels": self.labels}
        more |= {f"coordinates_{name}": flat for name, flat in self.coordinates.items()}
        with atomic_write(file) as part, part.open("wb") as opened:
            np.savez_compressed(
                opened,
                paths=np.array(self.paths, dtype=np.str_),
                classes=np.array(self.classes, dtype=np.str_),
                neighbors=self.neighbors,
                similarities=self.similarities,
                outlier_score=self.outlier_score,
                duplicates=self.duplicates,
                thumbnails=np.frombuffer(b"".join(self.thumbnails), np.uint8),
                sizes=np.array([len(one) for one in self.thumbnails], np.int64),
                **more,
            )

    @classmethod
    def load(cls, file: Path) -> "ImageMap":
        """Read a file written by ``save``; nothing is unpickled.

        Raises:
            UserError: The file is missing or damaged.
        """
        content = read_npz(file, MAX_MAP_BYTES)
        try:
            return cls._of(content)
        except (LookupError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{file} is no map of images, or damaged: {reason}") from None

    @classmethod
    def _of(cls, content: dict[str, np.ndarray]) -> "ImageMap":
        """Build a map from the arrays of a file, or raise LookupError, TypeError or ValueError."""
        count = len(content["paths"])
        near, pairs = content["neighbors"], content["duplicates"]
        k, prefix = near.shape[-1], "coordinates_"
        flat = {
            name.removeprefix(prefix): _array(content, name, "f", (count, 2))
            for name in content
            if name in (f"{prefix}pca", f"{prefix}umap")
        }
        if not flat or count == 0:
            raise ValueError("it has no coordinates")
        labels, classes = None, _array(content, "classes", "U", (len(content["classes"]),))
        if "labels" in content:
            labels = _indices(content, "labels", (count,), len(classes))
        paths = _array(content, "paths", "U", (count,)).tolist()
        if not all(map(os.path.isabs, paths)):
            raise ValueError("paths are not absolute")
        sizes = _indices(content, "sizes", (count,), len(content["thumbnails"]) + 1)
        joined = _array(content, "thumbnails", "u", (int(sizes.sum()),)).tobytes()
        ends = np.cumsum(sizes)
        return cls(
            paths,
            labels,
            classes.tolist(),
            flat,
            _indices(content, "neighbors", (count, k), count),
            _array(content, "similarities", "f", (count, k)),
            _array(content, "outlier_score", "f", (count,)),
            _indices(content, "duplicates", (len(pairs), 2), count),
            [joined[a:b] for a, b in zip(ends - sizes, ends, strict=True)],
        )


def _array(
    content: dict[str, np.ndarray], name: str, kind: str, shape: tuple[int, ...]
) -> np.ndarray:
    """Check the kind (``dtype.kind``), shape and finiteness of an array, or raise a ValueError."""
    array = content[name]
    if array.dtype.kind != kind or array.shape != shape:
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")
    if kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} holds what is not a finite number")
    return array


def _indices(
    content: dict[str, np.ndarray], name: str, shape: tuple[int, ...], below: int
) -> np.ndarray:
    array = _array(content, name, "i", shape)
    if array.size and not (array.min() >= 0 and array.max() < below):
        raise ValueError(f"{name} holds numbers outside 0 to {below - 1}")
    return array


def make_map(
    encoder: Encoder,
    paths: Sequence[str],
    labels: np.ndarray | None = None,
    classes: Sequence[str] = (),
    most: int = MAP_IMAGES,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    unfold: bool = False,
) -> ImageMap:
    """Embed images and compute their map.

    Args:
        encoder: Encoder of the embeddings.
        paths: Image files. Broken ones are left out, and named in the log.
        labels: ``(N,)`` class indices.
        classes: Their names.
        most: More images than these are sampled.
        seed: Chooses the sample, and where UMAP begins.
        progress: Called with the number of images embedded since the last call.
        unfold: See ``map_of_features``.

    Raises:
        UserError: No image can be read, or the features are not finite numbers.
    """
    chosen = np.sort(np.random.default_rng(seed).permutation(len(paths))[:most])
    layers, good = extract(encoder, [paths[i] for i in chosen], progress=progress)
    chosen, features = chosen[good], layers["last"]
    check_outputs([features], f"some of the {len(features)} images")
    some = None if labels is None else labels[chosen]
    return map_of_features(
        features, [paths[i] for i in chosen], some, classes, seed, unfold, encoder.reader
    )


def map_of_features(
    features: np.ndarray,
    paths: Sequence[str],
    labels: np.ndarray | None = None,
    classes: Sequence[str] = (),
    seed: int = 0,
    unfold: bool = False,
    reader: ImageReader = PHOTOGRAPHS,
) -> ImageMap:
    """Compute the map of images whose features are known.

    Args:
        features: ``(N, D)`` finite features.
        paths: N image files.
        labels: ``(N,)`` class indices.
        classes: Their names.
        seed: Chooses where UMAP begins.
        unfold: Also compute the projection by UMAP, if it is installed and there are enough
            images. Its first use in a process takes about 15 seconds of compilation, too long for
            the end of every run.
        reader: How the thumbnails are read.
    """
    neighbors, similarities = nearest(features, NUM_NEIGHBORS)
    return ImageMap(
        paths=[os.path.abspath(path) for path in paths],
        labels=labels,
        classes=[] if labels is None else list(classes),
        coordinates={
            name: flat_map(features, name, seed) for name in methods(len(features), unfold)
        },
        neighbors=neighbors,
        similarities=similarities,
        outlier_score=outlier_score(similarities),
        duplicates=near_duplicates(features, DUPLICATE_SIMILARITY)[:MAX_PAIRS],
        thumbnails=[thumbnail(path, reader) for path in paths],
    )


def methods(images: int, unfold: bool) -> list[Method]:
    """The projections of a map: PCA, and UMAP if it is wanted and available.

    Args:
        images: Number of images; UMAP needs 100.
        unfold: Whether UMAP is wanted; ``umap-learn`` may be missing.
    """
    umap = unfold and images >= UMAP_LEAST and importlib.util.find_spec("umap") is not None
    return ["pca", "umap"] if umap else ["pca"]


def flat_map(features: np.ndarray, method: Method, seed: int) -> np.ndarray:
    """Project the directions of features to two dimensions; their lengths are ignored.

    Args:
        features: ``(N, D)``.
        method: ``pca``: the two directions of largest variance, signs fixed; or ``umap``: McInnes
            et al. 2018 (arXiv 1802.03426) with its authors' defaults and cosine distance.
        seed: The same one gives the same map on the same machine.

    Returns:
        ``(N, 2)`` float32.
    """
    directions = unit(features)
    if method == "umap":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its advice is for those who choose its options
            import umap

            near = min(15, len(features) - 1)
            model = umap.UMAP(n_neighbors=near, metric="cosine", random_state=seed, n_jobs=1)
            return np.nan_to_num(model.fit_transform(directions)).astype(np.float32)
    from sklearn.utils.extmath import randomized_svd  # here: no training has to wait for it

    centerd = directions - directions.mean(axis=0)
    axes = min(2, *centerd.shape)
    left, lengths, _ = randomized_svd(centerd, axes, random_state=seed)
    return np.pad(left * lengths, ((0, 0), (0, 2 - axes))).astype(np.float32)


def nearest(features: np.ndarray, k: int, block: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """The most similar other images of each image, by cosine similarity.

    Args:
        features: ``(N, D)``.
        k: Number of neighbors; at most N - 1 are returned.
        block: Images at a time, so that N² similarities never are in memory.

    Returns:
        ``(N, k)`` int64 indices and ``(N, k)`` float32 similarities, most similar first.
    """
    keys = torch.from_numpy(unit(features))
    indices, similarities = [], []
    for start in range(0, len(keys), block):
        similarity = keys[start : start + block] @ keys.T
        similarity.diagonal(start).fill_(-torch.inf)  # no image is its own neighbor
        values, index = similarity.topk(min(k, len(keys) - 1), dim=1)
        indices.append(index)
        similarities.append(values)
    return torch.cat(indices).numpy(), torch.cat(similarities).numpy()


def outlier_score(similarities: np.ndarray) -> np.ndarray:
    """How far each image is from all others: the distance to its k-th neighbor.

    Ramaswamy et al. 2000 ("Efficient algorithms for mining outliers", section 2), with cosine
    distance: 1 - similarity. One odd image is far, and so is a group of less than k.

    Args:
        similarities: ``(N, k)`` to the nearest k neighbors, as ``nearest`` gives them.

    Returns:
        ``(N,)`` float32; zeros for a single image.
    """
    if similarities.shape[1] == 0:
        return np.zeros(len(similarities), np.float32)
    return np.asarray(1 - similarities[:, -1], np.float32)


def near_duplicates(
    features: np.ndarray, threshold: float, most: int = 10_000, block: int = 1024
) -> np.ndarray:
    """Pairs of images whose features are nearly the same.

    The mean of all features is taken out first: an encoder that has learned little gives all images
    a similarity of nearly 1, and what tells them apart is the rest. Images with nothing left have
    the same features, and a similarity of 1.

    Args:
        features: ``(N, D)``.
        threshold: Cosine similarity from which a pair counts.
        most: Pairs at most, those most alike.
        block: Images at a time.

    Returns:
        ``(P, 2)`` int64 indices, the smaller first, the pairs most alike first.
    """
    finite = np.nan_to_num(features, nan=0, posinf=0, neginf=0)
    rest = finite - finite.mean(axis=0, dtype=np.float64)
    at_mean = np.linalg.norm(rest, axis=1) <= SAME_FEATURES * np.linalg.norm(finite, axis=1)
    rest[at_mean] = 0
    keys = torch.from_numpy(np.column_stack([unit(rest), at_mean]).astype(np.float32))
    pairs, values = torch.empty(0, 2, dtype=torch.int64), torch.empty(0)
    for start in range(0, len(keys), block):
        similarity = (keys[start : start + block] @ keys.T).triu(start + 1)
        rows, columns = (similarity >= threshold).nonzero(as_tuple=True)
        pairs = torch.cat([pairs, torch.stack([rows + start, columns], dim=1)])
        values = torch.cat([values, similarity[rows, columns]])
        order = values.argsort(descending=True, stable=True)[:most]
        pairs, values = pairs[order], values[order]
    return pairs.numpy()


def unit(features: np.ndarray) -> np.ndarray:
    """``(N, D)`` float32 features scaled to length 1; what is not a finite number counts as 0."""
    finite = np.nan_to_num(features, nan=0, posinf=0, neginf=0)
    return np.asarray(unit_vectors(finite), np.float32)


def thumbnail(path: str, reader: ImageReader = PHOTOGRAPHS) -> bytes:
    """An image as a small JPEG file: the square that the encoder sees; gray if it can't be read.

    Args:
        path: The file; may name a frame.
        reader: How it is read.
    """
    try:
        small = resize_and_crop(reader.read_picture(path, THUMBNAIL_SIDE), THUMBNAIL_SIDE)
    except BROKEN_IMAGE:  # it was read a moment ago, but can have gone since
        small = np.full((THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3), 128, np.uint8)
    written = BytesIO()
    Image.fromarray(small).save(written, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return written.getvalue()

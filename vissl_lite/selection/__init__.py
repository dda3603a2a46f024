"""Which images to label next: pure functions from features to indices.

``METHODS[name](features, budget, labelled=indices, uncertainty=None, seed=0)`` gives a
``Selection``, whose ``indices`` are the images to label, the most useful first. See
``candidates.Method`` for the arguments. A method is one file and one line here.
"""

from vissl_lite.selection.candidates import Candidates, Method, Selection
from vissl_lite.selection.dropquery import dropquery
from vissl_lite.selection.herding import herding
from vissl_lite.selection.k_center import k_center
from vissl_lite.selection.margin import margin
from vissl_lite.selection.probcover import probcover
from vissl_lite.selection.typiclust import typiclust
from vissl_lite.selection.uniform import uniform

__all__ = ["METHODS", "Candidates", "Method", "Selection"]

METHODS: dict[str, Method] = {
    "herding": herding,
    "typiclust": typiclust,
    "probcover": probcover,
    "margin": margin,
    "dropquery": dropquery,
    "k_center": k_center,
    "random": uniform,
}

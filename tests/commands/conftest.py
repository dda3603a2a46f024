"""What tests of several commands begin with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import without_pictures
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.encoders.folder import save_encoder
from vissl_lite.evaluation import embedding


@pytest.fixture(scope="module", autouse=True)
def quick_runs() -> Iterator[None]:
    """Commands leave out pictures and reports, but for those that tests look at."""
    with without_pictures():
        yield


@pytest.fixture(autouse=True)
def no_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which compiles itself for 15 seconds; ``test_embedding`` tests how it is used."""
    monkeypatch.setattr(embedding, "UMAP_LEAST", 10**9)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained encoder's folder."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(5)
    save_encoder(build_encoder("test_resnet", 32), folder, {})
    return folder

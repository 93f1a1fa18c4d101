from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from micro_data import jpeg, write_dataset

from vitscale.config import DataSection


@pytest.fixture(scope="session")
def images() -> list[bytes]:
    return [jpeg(i) for i in range(45)]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, images: list[bytes]) -> Path:
    """45 sound images in 7 shards. Tests only read it."""
    return write_dataset(tmp_path_factory.mktemp("data") / "sound", images)


@pytest.fixture
def dataset_of(tmp_path: Path) -> Callable[[Sequence[bytes]], Path]:
    """Writes the images a test gives as a dataset."""
    return lambda images: write_dataset(tmp_path / "set", images)


@pytest.fixture
def section(dataset: Path) -> DataSection:
    split = {"path": str(dataset), "split": "train"}
    return DataSection.model_validate({"train": split, "workers": 0, "lanes": 4, "block": 3, "bad_sample_budget": 5})

import pytest
from image_files import write_cifar, write_folders, write_idx
from torchvision.datasets import CIFAR10

from layerprune.training import recipe


@pytest.fixture(scope="session")
def small():
    """A run of seconds: 9 sections, 6 epochs of 10 steps, most sections go and some early."""
    return recipe.from_mapping(
        {
            "name": "small",
            "dataset": "digits",
            "model": "resnet20",
            "model_args": {"width": 4},
            "train_subset": 640,
            "epochs": 6,
            "batch_size": 64,
            "lr": 0.05,
            "nesterov": True,
            "weight_decay": 5e-4,
            "warmup_epochs": 1,
            "strength": 0.2,
        },
        "small",
    )


@pytest.fixture
def idx_root(tmp_path):
    write_idx(tmp_path, zipped=False)
    return tmp_path


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    """A small CIFAR-10 in its real layout; torchvision is told the checksums of these files."""
    for attribute, value in write_cifar(tmp_path).items():
        monkeypatch.setattr(CIFAR10, attribute, value)
    return tmp_path


@pytest.fixture(scope="session")
def folder_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_folders(root)
    return root

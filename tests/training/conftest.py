import pytest

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

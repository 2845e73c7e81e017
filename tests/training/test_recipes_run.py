"""Every packaged recipe, by its name on the command line, on few images in the real files."""

import json

import pytest
from image_files import write_idx

from layerprune.cli import main
from layerprune.training import recipe

# Of the networks as the literature has them: LeNet-5's four nonlinear layers, VGG-16's thirteen
# convolutions, (depth - 2) / 2 blocks of CIFAR's ResNets and 3 + 4 + 6 + 3 of ImageNet's.
SECTIONS = {
    "lenet5": 4,
    "vgg16": 13,
    "resnet20": 9,
    "resnet32": 15,
    "resnet56": 27,
    "resnet110": 54,
    "resnet50": 16,
}
STEPS = 5
SLOW = ("vgg16", "resnet56", "resnet110", "resnet50")
CASES = [
    pytest.param(name, marks=[pytest.mark.slow] if recipe.load(name).model in SLOW else [])
    for name in recipe.names()
]


@pytest.fixture
def data_dir(request, tmp_path):
    """The folder that a data set is read from, by its name; None for the one that needs none."""

    def made(dataset):
        if dataset == "digits":
            return None
        if dataset in ("mnist", "fashion-mnist"):
            write_idx(tmp_path, zipped=True)
            return tmp_path
        return request.getfixturevalue(
            {"cifar10": "cifar_root", "imagefolder": "folder_root"}[dataset]
        )

    return made


def command(*arguments):
    """Runs a command in this process; its exit code."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


@pytest.mark.parametrize("name", CASES)
def test_a_packaged_recipe_trains_and_its_checkpoint_verifies(name, data_dir, tmp_path, capsys):
    chosen, run = recipe.load(name), tmp_path / "run"
    root = data_dir(chosen.dataset)
    data = [] if root is None else ["--data-dir", root]
    # On a CPU an image of ImageNet's takes a second, and its branches run on 4 at the least.
    batch, rows = (2, ["--set", "min_rows=2"]) if chosen.dataset == "imagefolder" else (4, [])
    flags = {
        "--output": run,
        "--epochs": 1,
        "--warmup-epochs": 0,
        "--batch-size": batch,
        "--train-subset": STEPS * batch,
        "--workers": min(chosen.workers, 1),
        "--set": "learning_end=0.6",  # leaves two of five steps to learning and to cool-down
        "--device": "cpu",
    }
    arguments = [part for flag in flags.items() for part in flag]
    assert command("train", name, *data, *rows, *arguments) == 0, capsys.readouterr().err

    summary = json.loads((run / "summary.json").read_text())
    assert (summary["finished"], summary["name"]) == (True, name)
    assert summary["phases"]["total_steps"] == STEPS
    assert summary["sections_total"] == SECTIONS[chosen.model]
    builder = json.loads((run / "model" / "structure.json").read_text())["builder"]
    assert (
        builder["name"] == chosen.model and chosen.model_args.items() <= builder["kwargs"].items()
    )
    dense = summary["inference_flops"] / summary["inference_flops_fraction"]
    assert summary["dense_train_flops"] == pytest.approx(3 * dense * STEPS * batch)
    assert len((run / "summary.csv").read_text().splitlines()) == 2
    theta = (run / "theta.csv").read_text().splitlines()
    assert len(theta) == 1 + STEPS and theta[0].count(",") == SECTIONS[chosen.model]
    assert (run / "report.html").stat().st_size > 0
    # Of the network that was written to model/, against the gated one of the same weights.
    assert summary["verify_max_abs_difference"] == 0

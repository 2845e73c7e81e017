"""Whether two runs of the training program are the same."""

import csv
import json

import torch
from torch.utils._pytree import tree_flatten_with_path

from layerprune.training.checkpoint import read_training, read_weights
from layerprune.training.runfolder import EMA, WEIGHTS

TIMES = {"seconds", "train_seconds", "draw_seconds", "step_seconds", "test_seconds", "overhead"}


def assert_same_runs(one, other):
    """Two finished runs agree in all files, bit for bit, but in times."""
    for name in ("events.jsonl", "theta.csv", "args.yaml", "best"):
        if (one / name).exists() or (other / name).exists():
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    tables = []
    for run in (one, other):
        with open(run / "summary.csv") as file:
            tables.append([{**row, "seconds": None} for row in csv.DictReader(file)])
    assert tables[0] == tables[1]
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, other)]
    first, second = ({k: v for k, v in s.items() if k not in TIMES} for s in summaries)
    assert first == second
    last = (one / "last").read_text().strip()
    for folder in ("model", "model-ema", last):
        for name in (WEIGHTS, EMA):
            if (one / folder / name).exists() or (other / folder / name).exists():
                assert_same_weights(*(read_weights(run / folder, name) for run in (one, other)))
    leaves = [tree_flatten_with_path(read_training(run / last))[0] for run in (one, other)]
    assert [path for path, _ in leaves[0]] == [path for path, _ in leaves[1]]
    for (path, a), (_, b) in zip(*leaves, strict=True):
        names = [str(part).strip("'[].").strip("'") for part in path]
        if names[-1] in TIMES or names[0] == "recipe":  # settings are args.yaml's
            continue
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        # NaN stands for a variance that is not known.
        assert same or a != a and b != b, path


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name

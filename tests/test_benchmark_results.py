"""What becomes of measurements: figures against their targets, one result of two, tables."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import device_operations
import device_trace
import figures
import loading
import pytest
import recipe_tables
import recipes
import tables

from layerprune.training import data, recipe

ROOT = tables.ROOT
TIMES = {"median_us": 10.0, "p20_us": 9.0, "p80_us": 11.0}


def row(family: str, share: float, **microseconds: float) -> dict:
    """A gated residual's row, `both` of every kind as given."""
    return {
        "family": family,
        "operation": "gated_residual",
        "shape": "ViT-B",
        "dtype": "bfloat16",
        "share": share,
        "times": {
            kind: dict.fromkeys(("forward", "backward", "both"), TIMES | {"median_us": value})
            for kind, value in microseconds.items()
        },
        "of_copy": {"forward": 0.95, "backward": 0.85, "both": 0.9},
        "peak_bytes": dict.fromkeys(microseconds, 1 << 20),
    }


def step_row(kernels: float) -> dict:
    events = [{"cat": "kernel", "dur": 5.0}] * int(kernels) + [{"cat": "gpu_memset", "dur": 1.0}]
    return {
        "family": "compiled",
        "operation": "projected_gate_step_",
        "shape": "1,000 sections, 256 rows",
        "times": {"ours": {"both": TIMES}, "eager": {"both": TIMES}},
        "launches": device_trace.launches(events, 1),
    }


def met(found: list[dict]) -> dict[str, bool]:
    return {figure["name"]: figure["met"] for figure in found}


def test_figures_hold_the_rows_to_their_targets():
    rows = [
        row("compiled", 1, ours=10, eager=30, compile=12, **{"max-autotune": 10.5}),
        row("compiled", 0.5, ours=8, eager=30, compile=12),
        row("triton", 1, ours=12, eager=30),
        step_row(1),
    ]
    found = met(figures.operation_figures(rows))
    assert found == {
        "compiled, ViT-B: forward, bytes/s of a copy's, least of all shares": True,
        "compiled, ViT-B: backward, bytes/s of a copy's, least of all shares": False,
        # the faster mode counts: 10.5 / 10
        "compiled, ViT-B: times torch.compile's dense sum, 100% of the rows": False,
        "compiled, ViT-B: times torch.compile's dense sum, 50% of the rows": True,
        "compiled, projected_gate_step_: kernels": True,
        "compiled, projected_gate_step_: device time, us": True,
        "triton, ViT-B: forward, bytes/s of a copy's, least of all shares": True,
        "triton, ViT-B: backward, bytes/s of a copy's, least of all shares": False,
        "ViT-B: Triton's time over the compiled kernels', largest of all shares": False,
    }
    for kernels in (0, 2):  # none: the profiler saw nothing
        found = met(figures.operation_figures([step_row(kernels)]))
        assert not found["compiled, projected_gate_step_: kernels"]
        assert len(found) == min(kernels, 1) + 1


def test_figures_of_a_training_step():
    seconds = {"plain": 1.0, "open": 1.01, "half": 0.7, "removed": 0.2}
    rows = [
        {"sections": kind, "median_s": value, "kernels": 900, "waits": {}}
        for kind, value in seconds.items()
    ]
    rows[1]["waits"] = {"cudaStreamSynchronize": 2.0}
    overhead, half, waits = figures.training_figures(rows)
    assert overhead["met"] and overhead["measured"] == pytest.approx(1.01)
    assert not half["met"] and half["measured"] == pytest.approx(0.7 / 0.6)
    assert not waits["met"] and waits["measured"] == 2


def test_both_families_get_the_baselines_that_were_measured_once():
    rows = [row("compiled", 1, ours=10, compile=12), row("triton", 1, ours=11)]
    rows.append(row("triton", 0.5, ours=11))
    device_operations.share_baselines(rows)
    assert rows[1]["times"]["compile"] == rows[0]["times"]["compile"]
    assert rows[1]["times"]["ours"]["both"]["median_us"] == 11
    assert "compile" not in rows[2]["times"]


def test_what_one_family_gives_is_kept_when_the_other_fails(monkeypatch, tmp_path):
    rows = [row("compiled", 1, ours=10, eager=30, compile=12)]
    commands = []

    def run(command: list[str], env: dict[str, str]) -> SimpleNamespace:
        commands.append(command)
        failing = env["LAYERPRUNE_BACKEND"] == "triton"
        if not failing:
            Path(command[command.index("--output") + 1]).write_text(json.dumps(rows))
        return SimpleNamespace(returncode=int(failing))

    monkeypatch.setattr(device_operations, "subprocess", SimpleNamespace(run=run))
    options = argparse.Namespace(
        output=tmp_path / "operations.json",
        shapes=["ViT-B"],
        dtypes=["bfloat16"],
        shares=[1],
        no_compile=False,
    )
    with pytest.raises(SystemExit, match="triton"):
        device_operations.run(options)
    result = json.loads(options.output.read_text())
    assert result["rows"] == rows and len(result["figures"]) == 3
    assert result.keys() >= {"device", "versions", "commit", "seconds"}
    # torch.compile is timed once.
    assert ["--no-compile" in command for command in commands] == [False, True]


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_page_is_what_the_results_give(page):
    text = page.read_text()
    assert tables.filled(text) == text, "run: python benchmarks/tables.py"


RECIPES = json.loads((tables.RESULTS / "recipes-cpu.json").read_text())["rows"]


def test_every_recipe_has_its_costs():
    assert [row["recipe"] for row in RECIPES] == recipe.names()


@pytest.mark.parametrize("row", RECIPES, ids=[row["recipe"] for row in RECIPES])
def test_a_recipes_costs_are_those_of_what_it_says_now(row):
    counted = recipes.counts(recipe.load(row["recipe"]))
    assert {key: row[key] for key in counted} == counted, "run: python benchmarks/recipes.py"
    file = ROOT / "layerprune" / "recipes" / f"{row['recipe']}.yaml"
    assert recipe_tables.costs(row) in file.read_text().splitlines()


def test_memory_of_a_batch_that_was_cut_is_told_from_two():
    kind = {"peak_bytes": 3e9, "half_batch": {"peak_bytes": 2e9}}
    less = {"peak_bytes": 2e9, "half_batch": {"peak_bytes": 1e9}}
    row = {"batch_size": 64, "measured_batch": 8, "dense": kind, "pruned": less}
    assert recipe_tables.run_bytes(row) == 3e9 + 56 * 1e9 / 4
    assert recipe_tables.run_bytes(row | {"batch_size": 8}) == 3e9


def test_a_loaders_rate_is_measured_on_files_of_photographs_size(tmp_path):
    files = [loading.jpeg(seed) for seed in range(2)]
    assert [100_000 < len(file) < 120_000 for file in files] == [True, True]
    loading.write_folder(tmp_path, files, 6)
    splits = data.load("imagefolder", tmp_path)
    for workers in (0, 1):
        row = loading.loading(splits, 3, workers)
        assert row["workers"] == workers and row["images_per_second"] > 0 and row["cpu_ms"] > 0
    assert all(loading.least_ms(part, files, rounds=1) > 0 for part in loading.parts().values())


def test_a_gpu_gets_its_tables(tmp_path):
    assert "No GPU has run" in tables.section("gpu", tmp_path)
    facts = {
        "versions": {"layerprune": "0.1.0", "torch": "2.14"},
        "driver": "580",
        "device": "NVIDIA H100",
        "threads": 8,
        "commit": None,
    }
    rows = [row("triton", 1, ours=10, eager=30, compile=12, dinov2=20), step_row(1)]
    results = {
        "operations": facts | {"rows": rows, "figures": figures.operation_figures(rows)},
        "training-step": facts
        | {
            "batch_size": 256,
            "figures": [],
            "rows": [
                {
                    "sections": "plain",
                    "median_s": 0.1,
                    "device_s": 0.09,
                    "kernels": 900.0,
                    "waits": {"cudaMemcpy": 1.0},
                    "peak_bytes": 1 << 30,
                }
            ],
        },
    }
    folder = tmp_path / "nvidia-h100"
    folder.mkdir()
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    text = tables.section("gpu", tmp_path)
    assert "### NVIDIA H100\n" in text and "driver 580" in text and "`unknown`" in text
    assert (
        "| `gated_residual` | ViT-B | bfloat16 | 100% | triton | 10 | 95% | 10 | 85% | 3.00 | 1.20 "
        "| 2.00 | 1 | 1 |" in text
    )
    assert "| plain | 100.0 ms | 90.0 ms | 900 | 1 | 1,024 |" in text

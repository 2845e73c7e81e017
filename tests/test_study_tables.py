"""What a study's results become: comparisons, tables, figures against targets, drawings."""

import json
import math

import plots
import pytest
import tables
from scipy import stats
from study import statistics, worth
from study.cost_figures import Point, pareto
from study.tables import BLOCKS, NOTHING
from study.targets import targets

RECIPE = {
    "model": "resnet56",
    "dataset": "digits",
    "train_subset": 1200,
    "epochs": 60,
    "strength": 0.05,
}


def row(method: str, seed: int = 0, accuracy: float = 0.9, kept: int = 2, **changes) -> dict:
    """A run of a network of four sections, each of which must be worth 0.1."""
    names = [f"layer1_{i}" for i in range(4)]
    found = {
        "task": "digits-resnet56",
        "method": method,
        "setting": "",
        "budget": "epochs",
        "seed": seed,
        "accuracy": accuracy,
        "sections": 4,
        "sections_kept": kept,
        "kept": names[:kept],
        "train_flops": kept / 4,
        "test_flops": kept / 40,
        "inference_flops": kept / 4,
        "train_seconds": kept * (1.0 + seed),
        "inference_seconds": kept * 0.01,
        "held_out_loss": 0.25,
        "seconds": 30.0,
        "device": "a processor",
        "differences": {name: [-0.2, 0.01] for name in names[:kept]},
        "commit": "c" * 40,
    }
    if method in ("ours", "taylor", "simultaneous", "reinsertion"):
        found |= {
            "eliminations": [[0.1 * (i + 1), name, "test"] for i, name in enumerate(names[kept:])],
            "decided_by_test": 3,
            "decided_by_rounding": 1,
            "thetas_between": seed,
            "penalties": dict.fromkeys(names, 0.1),
            "overhead_seconds": 0.1,
        }
    return found | changes


def study(*rows: dict) -> dict:
    return {
        "study": "small",
        "versions": {"layerprune": "0.1.0", "torch": "2.14"},
        "device": "a processor",
        "threads": 1,
        "commit": "c" * 40,
        "tasks": {
            "digits-resnet56": {"recipe": RECIPE, "held_out": 1, "seeds": [0, 1, 2]},
            "fashion-mlp12": {"recipe": RECIPE, "held_out": 1, "seeds": [0, 1, 2]},
        },
        "variations": {"digits-resnet56": {"27 sections": {}, "xavier": {}}},
        "rows": list(rows),
    }


def whole() -> dict:
    accuracies = {"dense": (0.90, 0.91, 0.92), "ours": (0.91, 0.93, 0.92), "l0": (0.80, 0.85, 0.81)}
    rows = [
        row(method, seed, accuracy, kept=4 if method == "dense" else 1 + seed)
        for method, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]
    rows += [row("l0", seed, 0.82 + 0.01 * seed, budget="flops") for seed in range(3)]
    back = {
        "layer1_1": {"difference": -0.5, "error": 0.01, "penalty": 0.1, "kept": True},
        "layer1_2": {"difference": -0.3, "error": 0.01, "penalty": 0.1, "kept": False},
        "layer1_3": {"difference": -0.11, "error": 0.01, "penalty": 0.1, "kept": False},
    }
    return study(
        *rows,
        row("ours", setting="27 sections", sections=27, kept=3),
        row("reinsertion", reinserted=back),
    )


def test_a_comparison_is_students():
    differences = [0.01, 0.03, -0.02, 0.015]
    found = statistics.compare(differences)
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert found.mean == pytest.approx(0.00875) and found.seeds == 4
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    # by hand: of two differences the quantile is 12.706
    two = statistics.compare([0.0, 0.002])
    assert (two.low, two.high) == pytest.approx((0.001 - 0.012706, 0.001 + 0.012706), abs=1e-6)


def test_one_seed_excludes_nothing():
    found = statistics.compare([0.1])
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert not found.non_inferior and not found.better


def test_not_inferior_is_the_interval_above_the_margin():
    assert statistics.Comparison(0, -0.0049, 0.0049, 3).non_inferior
    assert not statistics.Comparison(0, -0.0051, 0.0051, 3).non_inferior


def test_only_shared_seeds_are_compared():
    rows = [row("ours", 0, 0.9), row("ours", 1, 0.95), row("dense", 1, 0.9), row("dense", 2, 0.1)]
    ours, dense = (statistics.select(rows, "digits-resnet56", name) for name in ("ours", "dense"))
    found = statistics.paired(ours, dense)
    assert found.mean == pytest.approx(0.05) and found.seeds == 1
    assert statistics.ratio(ours, dense, "train_flops") == 1
    assert statistics.paired(ours, {}) is None and statistics.ratio(ours, {}, "accuracy") is None


def test_methods_are_compared_by_seed():
    text = BLOCKS["methods"](whole())
    assert (
        "| **`ours`** | 3 | 92.00 ± 1.00 |  | +1.00 (-1.48 to +3.48) | 2.0 (1-3) | 50.0% | 50.0% "
        "| 50.0% | 50.0% |" in text
    )
    assert "| `l0` @ equal operations | 3 | 83.00 ± 1.00 | -9.00 (-11.48 to -6.52) |" in text
    assert "fashion-mlp12" not in text


def test_without_dense_runs_what_is_told_of_them_stays_empty():
    text = BLOCKS["methods"](study(row("ours"), row("l0", accuracy=0.8)))
    assert "| `l0` | 1 of 3 | 80.00 | -10.00 |  | 2.0 | 50.0% |  | 50.0% |  |" in text
    assert "| digits-resnet56 | 1 |  | 90.00 |  | 2.0 of 4 |" in BLOCKS["summary"](
        study(row("ours"))
    )


def test_other_tables():
    result = whole()
    text = BLOCKS["variations"](result)
    assert "| as the task is | 1 | 91.00 |  | 0.2500 | 4.0 | 1.0 | 25.0% |" in text  # seed 0
    assert "| 27 sections | 1 | 90.00 | -1.00 | 0.2500 | 27.0 | 3.0 | 75.0% |" in text
    assert "xavier" not in text
    assert (
        "| digits-resnet56 | `ours` | 3 | 6 | 10.0% | 15.0% | 30.0% | 9 | 3 | 3 | 10.0% |"
        in BLOCKS["eliminations"](result)
    )
    text = BLOCKS["optimality"](result)
    assert "| digits-resnet56 | `ours` | 6 | 6 | 0 | 0 | -0.1000 ± 0.0100 |" in text
    assert "| digits-resnet56 | `dense` | 12 | 12 | 0 | 0 | -0.1000 ± 0.0100 |" in text
    assert "`l0`" not in text
    text = BLOCKS["reinsertions"](result)
    assert "Of 2 eliminated ones: 1 yes, 1 undecided, 0 no; of 1 kept ones: 1 yes" in text
    assert "| `layer1_3` | eliminated | -0.1100 ± 0.0100 | -0.1000 | undecided |" in text
    assert "| `layer1_1` | kept | -0.5000 ± 0.0100 | -0.1000 | **yes** |" in text


@pytest.mark.parametrize("block", BLOCKS)
def test_a_study_without_runs_says_so(block):
    assert BLOCKS[block](study()) == NOTHING


def test_a_section_pays_by_its_difference_and_error():
    pays, close, fails = (worth.Worth("", d, 0.01, 0.1) for d in (-0.2, -0.09, -0.05))
    assert pays.surely_pays and pays.pays
    assert not (close.pays or close.surely_pays or close.surely_fails)
    assert fails.surely_fails


def test_the_study_is_held_to_targets():
    found = {figure["name"]: figure for figure in targets(whole())}
    name = "digits-resnet56: {}"
    rival = found[name.format("accuracy less that of `l0` at equal operations, points, lower end")]
    assert rival["met"] and rival["measured"] == pytest.approx(9 - 2.4842, abs=1e-3)
    dense = found[name.format("accuracy less that of `dense`, points, lower end")]
    assert not dense["met"] and dense["reading"] == "+1.00 (-1.48 to +3.48), 3 seeds"
    assert not found[name.format("training FLOPs of the dense run's, %")]["met"]
    assert found[name.format("training time of the dense run's, %")]["measured"] == 50
    assert found[name.format("sections kept, most less fewest of all seeds")]["met"]
    back = found[name.format("eliminated sections that would pay, beyond two standard errors")]
    assert back["measured"] == 1 and not back["met"]
    assert not any("over depths" in each for each in found)  # 4 sections are not 15


def test_depths_to_start_with_are_compared():
    rows = [row("ours", sections=15, kept=1)]
    rows.append(row("ours", setting="27 sections", sections=27, kept=4))
    (found,) = (f for f in targets(study(*rows)) if "over depths" in f["name"])
    assert found["measured"] == 3 and found["met"]
    assert found["reading"] == "1.0 of 15, 4.0 of 27"


def test_one_seed_meets_no_target_of_accuracy():
    found = targets(study(row("ours", accuracy=0.99), row("l0", budget="flops"), row("dense")))
    accuracies = [figure for figure in found if "accuracy" in figure["name"]]
    assert len(accuracies) == 2 and not any(figure["met"] for figure in accuracies)
    assert "| > 0 | -inf | **no** | +9.00, one seed; its FLOPs 100% of these |" in BLOCKS[
        "targets"
    ](study(row("ours", accuracy=0.99), row("l0", budget="flops")))


def test_a_page_takes_a_studys_tables(tmp_path):
    page = "<!-- table: study-small:{} -->\n<!-- /table -->"
    assert "has not been run" in tables.filled(page.format("methods"), tmp_path)
    (tmp_path / "study-small.json").write_text(json.dumps(whole()))
    assert "| **`ours`** |" in tables.filled(page.format("methods"), tmp_path)
    assert "at `cccccccccccc`. 14 runs, 7 minutes of a core." in tables.filled(
        page.format("machine"), tmp_path
    )


def test_the_front_is_what_nothing_beats():
    points = [Point(None, *p) for p in ((1, 0.9), (0.5, 0.8), (0.5, 0.7), (0.7, 0.8), (1.2, 0.9))]
    assert pareto(points) == [points[1], points[0]]


def test_figures_are_the_same_each_time(tmp_path):
    first, second = (plots.written(whole(), tmp_path / name) for name in ("first", "second"))
    assert [path.stem for path in first] == list(plots.FIGURES)
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert b"<dc:date>" not in one.read_bytes()


def test_figures_of_what_is_there(tmp_path):
    assert plots.written(study(), tmp_path) == []
    found = plots.written(study(row("ours")), tmp_path)  # shares of the dense run's time: none
    assert [path.stem for path in found] == [
        "accuracy-training-flops",
        "sections-left",
        "sections-kept",
    ]


def test_the_figures_shown_are_of_the_results_shown():
    own = plots.fingerprint(json.loads(plots.RESULT.read_text()))
    shown = sorted(plots.FOLDER.glob("*.svg"))
    assert [path.stem for path in shown] == sorted(plots.FIGURES)
    for path in shown:
        assert own in path.read_text(), f"{path}: run python benchmarks/plots.py"

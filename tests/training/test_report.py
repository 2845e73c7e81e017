import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from layerprune.training.report import write_report
from layerprune.training.report_figures import removal_timeline
from layerprune.training.report_html import amount, duration, number, pairs
from layerprune.training.runlog import RunLog, read_run

EPOCH = 20  # steps
VOID = {"meta", "br", "hr", "img", "input", "link", "use", "path", "rect", "stop"}


class Page(HTMLParser):
    """Checks that tags nest, collects text, attributes and ids."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.words, self.attributes, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def make_run(folder, names, epochs=3, planned=None, removed=(), finished=True, extra=None):
    """Writes the records of a small made-up run and returns its folder."""
    rng = np.random.default_rng(0)
    with RunLog(folder, names) as log:
        (folder / "args.yaml").write_text(yaml.safe_dump({"lr": 0.1, "note": "<i>a & b</i>"}))
        theta = np.full(len(names), 0.5)
        for step in range(1, epochs * EPOCH + 1):
            if step == 5:
                for index, name in enumerate(names):
                    gone = name in removed
                    theta[index] = 0.0 if gone else 1.0
                    evidence = {
                        "difference": 0.0012 if gone else -0.25,
                        "standard_error": 0.0004,
                        "batches": 8,
                        "penalty": 0.0033,
                        "theta": theta[index],
                    }
                    decision = "eliminated" if gone else "settled"
                    event = {"step": step, "section": name, "decision": decision, "by": "test"}
                    log.log_events([event | evidence])
            if step % 2 == 0:
                log.log_theta(step, theta)
            if step % EPOCH == 0:
                row = {"epoch": step // EPOCH, "step": step, "lr": 0.1, "seconds": step / 10}
                row |= {"train_loss": 1 / step, "test_loss": 2 / step}
                row |= {"train_accuracy": 0.9, "test_accuracy": 0.8 + 0.01 * rng.random()}
                row |= {"sections_alive": len(names) - len(removed), "train_flops_fraction": 0.4}
                log.log_epoch(row)
        summary = {
            "name": folder.name,
            "epochs": planned or epochs,
            "sections_total": len(names),
            "finished": finished,
            "phases": {
                "warm_up_end": 2,
                "learning_end": 10,
                "total_steps": EPOCH * (planned or epochs),
            },
            "architecture": [
                {
                    "name": name,
                    "kind": "residual",
                    "kept": name not in removed,
                    "params": 4700,
                    "flops": 9.3e6,
                    "theta": float(name not in removed),
                }
                for name in names
            ],
        }
        log.write_summary(summary | (extra or {}))
    return folder


def page_of(folder, baseline=None) -> Page:
    path = write_report(folder, baseline)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    # Nothing is loaded: no script, no address, every reference points into the page.
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "http:" not in text and "https:" not in text and "@import" not in text
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    targets = [value for key, value in page.attributes if key in ("href", "src")]
    assert all(target.startswith("#") and target[1:] in ids for target in targets)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    # A drawing is told in words.
    assert text.count("<figure ") == len(
        re.findall(r'<figure role="img" aria-label="[^"]{20,}"', text)
    )
    return page


NAMES = ("stages.0.0", "stages.0.1", 'a<b>&"c"', "$x$_{1}")
FINAL = {
    "accuracy": 0.9875,
    "sections_kept": 2,
    "train_flops_fraction": 0.31,
    "test_flops_fraction": 0.06,
    "inference_flops_fraction": 0.24,
    "parameters": 108_234,
    "parameters_dense": 464_154,
    "seconds": 60.0,
    "train_seconds": 60.0,
    "verify_max_abs_difference": 0.0,
    "versions": {"torch": "2.15.0"},
}


def test_a_finished_run_shows_its_figures_names_and_evidence(tmp_path):
    run = make_run(tmp_path / "pruned", NAMES, removed=NAMES[:2], extra=FINAL)
    dense = {"accuracy": 0.9900, "train_seconds": 150.0}
    page = page_of(run, make_run(tmp_path / "dense", (), extra=dense))
    for name in NAMES:
        assert name in page.text  # parsed text: escaped once, and not twice
    for shown in (
        "98.75%",
        "\N{MINUS SIGN}0.25 points; dense 99.00%",
        "Sections kept 2 of 4",
        "Training FLOPs 31% of dense; 6% for the tests",
        "Training time 40% of dense",
        "Inference FLOPs 24% of dense",
        "Parameters 108 k 23% of 464 k",
        "0.0012 \N{PLUS-MINUS SIGN} 0.0004 \N{MINUS SIGN}0.0033 8 0",
        "bit for bit equal",
        "torch version 2.15.0",
        "<i>a & b</i>",
        "test, dense",
    ):
        assert shown in page.text
    assert page.tags.count("i") == len(NAMES)  # the boxes of the architecture, no setting's


def test_strings_of_a_run_can_not_become_markup(tmp_path):
    evil = '"><script>alert(1)</script>'
    extra = {"name": evil, "model": evil, "versions": {evil: evil}}
    page = page_of(make_run(tmp_path / "run", (evil, "b"), removed=(evil,), extra=extra))
    assert page.text.count(evil) >= 6


def test_a_dense_run_has_a_report_without_sections(tmp_path):
    page = page_of(make_run(tmp_path / "dense", (), extra={"accuracy": 0.99}))
    assert "Accuracy and loss" in page.text
    for title in ("Theta", "Removal timeline", "Decisions", "Final architecture", "Sections kept"):
        assert title not in page.text


def test_a_run_in_progress_is_not_measured_against_a_finished_one(tmp_path):
    run = make_run(tmp_path / "run", NAMES, epochs=2, planned=9, removed=NAMES[:1], finished=False)
    dense = make_run(tmp_path / "dense", (), extra={"accuracy": 0.99, "train_seconds": 100.0})
    page = page_of(run, dense)
    assert "in progress, epoch 2 of 9" in page.text
    assert "Architecture so far" in page.text
    assert "points; dense" not in page.text and "of dense; 4 s" not in page.text


def test_a_run_before_its_first_epoch_has_a_report(tmp_path):
    with RunLog(tmp_path, NAMES) as log:
        empty = page_of(tmp_path)
        log.log_theta(1, [0.5] * len(NAMES))
        page = page_of(tmp_path)
    for each in (empty, page):
        assert "in progress, epoch 0" in each.text
        assert all(name in each.text for name in NAMES)


@pytest.mark.parametrize("case", ["nothing removed", "everything removed", "one epoch"])
def test_extremes_have_a_report(tmp_path, case):
    removed = {"nothing removed": (), "everything removed": NAMES, "one epoch": NAMES[:1]}[case]
    epochs = 1 if case == "one epoch" else 6
    page = page_of(make_run(tmp_path / "run", NAMES, epochs=epochs, removed=removed))
    assert f"Sections kept {len(NAMES) - len(removed)} of 4" in page.text


def test_two_hundred_sections_are_all_named_and_labels_do_not_collide(tmp_path):
    names = tuple(f"blocks.{index}" for index in range(200))
    run = make_run(tmp_path / "run", names, removed=names[::2])
    page = page_of(run)
    assert set(names) <= set(page.text.split())
    drawn = removal_timeline(read_run(run))
    places = re.findall(r'y="([\d.]+)"[^>]*>blocks\.\d+<', drawn)
    heights = np.diff(sorted(float(place) for place in places))
    assert len(places) >= 50 and heights.min() >= 8.5  # the size of the letters


def test_a_report_is_a_function_of_the_records(tmp_path):
    run = make_run(tmp_path / "run", NAMES, removed=NAMES[:2])
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_what_is_not_a_run_is_refused_and_nothing_is_written(tmp_path):
    run = make_run(tmp_path / "run", NAMES)
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match="other is not a run"):
        write_report(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="other is not a run"):
        write_report(run, tmp_path / "other")
    assert not list(tmp_path.glob("*/report.html"))


def test_numbers_read_as_a_person_would_write_them():
    assert [amount(x) for x in (None, 7, 4700, 464_154, 19.2e6, 1.5e12)] == [
        "\N{EN DASH}",
        "7",
        "4.7 k",
        "464 k",
        "19.2 M",
        "1.5 T",
    ]
    assert [number(x) for x in (None, -0.00123, 1024)] == [
        "\N{EN DASH}",
        "\N{MINUS SIGN}0.00123",
        "1024",
    ]
    assert [duration(x) for x in (3.2, 138, 4 * 3600)] == ["3 s", "2 min 18 s", "4.0 h"]
    assert "<td>1.5e+15</td>" in pairs({"x": 1.5e15})

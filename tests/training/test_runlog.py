import csv
import json
import os
from dataclasses import asdict, dataclass

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from layerprune.training import records
from layerprune.training.runlog import EPOCH_COLUMNS, RunLog, read_run

NAMES = ("layer1.0", "layer1.1", 'odd, "quoted" name')
RECORDS = ("summary.csv", "theta.csv", "events.jsonl")


@dataclass
class Decision:
    step: int
    section: str
    decision: str
    difference: float | None


def train(log: RunLog, first: int, last: int) -> None:
    """Logs steps first..last as a run would: a function of the step alone, 10 steps an epoch."""
    for step in range(first, last + 1):
        if step % 7 == 0:
            name = NAMES[step % len(NAMES)]
            log.log_events(
                [Decision(step, name, "kept", 0.1 / step), Decision(step, name, "x", None)]
            )
        if step % 3 == 0:
            log.log_theta(step, [1 / step, 0.5, 1.0])
        if step % 10 == 0:
            row = {column: step / 3 for column in EPOCH_COLUMNS}
            log.log_epoch(row | {"epoch": step // 10, "step": step, "test_loss": None})


def texts(folder):
    return {name: (folder / name).read_bytes() for name in RECORDS}


def test_what_is_written_is_read_back(tmp_path):
    with RunLog(tmp_path, NAMES) as log:
        train(log, 1, 25)
        log.write_summary({"name": "é", "accuracy": 0.5, "phases": {"total_steps": 25}})
    (tmp_path / "args.yaml").write_text("lr: 0.1\nmodel: resnet20\n")
    record = read_run(tmp_path)
    assert record.args == {"lr": 0.1, "model": "resnet20"}
    assert [row["step"] for row in record.epochs] == [10, 20]
    assert tuple(record.epochs[0]) == EPOCH_COLUMNS
    assert record.epochs[1]["train_loss"] == 20 / 3  # no digit is lost
    assert record.epochs[1]["test_loss"] is None
    assert record.sections == NAMES
    assert record.theta_steps.tolist() == list(range(3, 25, 3))
    np.testing.assert_allclose(record.theta[:, 0], 1 / record.theta_steps, atol=5e-7)
    assert record.summary == {"name": "é", "accuracy": 0.5, "phases": {"total_steps": 25}}
    steps = [(7, 0.1 / 7), (14, 0.1 / 14), (21, 0.1 / 21)]
    assert record.events == [
        asdict(event)
        for step, difference in steps
        for event in (
            Decision(step, NAMES[step % 3], "kept", difference),
            Decision(step, NAMES[step % 3], "x", None),
        )
    ]


def test_the_tables_are_plain_csv(tmp_path):
    with RunLog(tmp_path, NAMES) as log:
        train(log, 1, 10)
    with open(tmp_path / "theta.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", *NAMES]
    assert rows[1] == ["3", "0.333333", "0.5", "1.0"]


@pytest.mark.parametrize("checkpoint", [0, 10, 12, 14, 29])
def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path, checkpoint):
    with RunLog(tmp_path / "whole", NAMES) as log:
        train(log, 1, 50)
    with RunLog(tmp_path / "resumed", NAMES) as log:
        train(log, 1, 33)
    for name in RECORDS:  # killed in the middle of a write
        with open(tmp_path / "resumed" / name, "a") as file:
            file.write('{"step": 3' if name.endswith("l") else "3")
    with RunLog(tmp_path / "resumed", NAMES, resume_step=checkpoint) as log:
        train(log, checkpoint + 1, 50)
    assert texts(tmp_path / "resumed") == texts(tmp_path / "whole")


def test_rows_are_there_before_the_log_is_closed(tmp_path):
    log = RunLog(tmp_path, NAMES)
    train(log, 1, 21)
    record = read_run(tmp_path)
    log.close()
    assert (len(record.epochs), len(record.theta_steps), len(record.events)) == (2, 7, 6)


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    with RunLog(tmp_path, NAMES) as log:
        train(log, 1, 20)
    for name, torn in zip(RECORDS, ("3,30,0.", "21,0.1", '{"step": 21, "sec'), strict=True):
        with open(tmp_path / name, "a") as file:
            file.write(torn)
    record = read_run(tmp_path)
    assert (len(record.epochs), len(record.theta_steps), len(record.events)) == (2, 6, 4)


def test_a_new_run_does_not_write_into_another(tmp_path):
    with RunLog(tmp_path, NAMES) as log:
        train(log, 1, 20)
    before = texts(tmp_path)
    with pytest.raises(FileExistsError, match="already holds a run.*resume it"):
        RunLog(tmp_path, NAMES)
    with pytest.raises(ValueError, match=r"theta\.csv is damaged or another run's"):
        RunLog(tmp_path, NAMES[:2], resume_step=10)
    assert texts(tmp_path) == before


def test_tensorboard_has_every_step_once_after_a_resume(tmp_path):
    with RunLog(tmp_path, NAMES) as log:
        train(log, 1, 40)
    with RunLog(tmp_path, NAMES, resume_step=20) as log:
        train(log, 21, 50)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags == {
        *(f"layerprune/theta/{name}" for name in NAMES),
        "layerprune/sections_alive",
        "layerprune/train_flops_fraction",
        "train/loss",
        "train/accuracy",
        "test/accuracy",
        "test/ema_loss",
        "test/ema_accuracy",
        "lr",
    }
    assert [event.step for event in events.Scalars("train/loss")] == [10, 20, 30, 40, 50]
    theta = events.Scalars("layerprune/theta/layer1.0")
    assert [event.step for event in theta] == list(range(3, 51, 3))
    np.testing.assert_allclose([e.value for e in theta], [1 / e.step for e in theta], atol=1e-6)


def test_a_summary_that_fails_leaves_the_last_one(tmp_path, monkeypatch):
    with RunLog(tmp_path, ()) as log:
        log.write_summary({"epochs": 1, "loss": float("nan"), "nested": [{"x": float("inf")}]})
        good = (tmp_path / "summary.json").read_text()
        assert json.loads(good) == {"epochs": 1, "loss": None, "nested": [{"x": None}]}
        with pytest.raises(TypeError):
            log.write_summary({"epochs": 2, "bad": object()})
        assert (tmp_path / "summary.json").read_text() == good

        def killed(source, target):
            assert json.loads(open(source).read()) == {"epochs": 3}  # complete before it counts
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            log.write_summary({"epochs": 3})
    assert (tmp_path / "summary.json").read_text() == good


def test_a_dense_run_has_no_thetas(tmp_path):
    with RunLog(tmp_path, ()) as log:
        log.log_theta(3, [])
        log.log_epoch({"epoch": 1, "step": 5, "test_accuracy": 0.5})
    record = read_run(tmp_path)
    assert not (tmp_path / "theta.csv").exists()
    assert record.sections == () and record.theta.shape == (0, 0)
    assert record.epochs[0]["sections_alive"] is None


def test_wrong_rows_are_refused(tmp_path):
    with RunLog(tmp_path, NAMES) as log:
        with pytest.raises(ValueError, match="2 thetas for 3 sections"):
            log.log_theta(1, [0.5, 0.5])
        with pytest.raises(ValueError, match="'step'.*trian_loss"):
            log.log_epoch({"epoch": 1, "step": 1, "trian_loss": 0.5})
        with pytest.raises(ValueError, match="needs 'epoch' and 'step'"):
            log.log_epoch({"epoch": 1})


def test_what_is_not_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such run folder: .*missing"):
        read_run(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"is not a run: it has no summary\.csv"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("summary.json", "[1, 2]"),
        ("summary.json", '{"accuracy": '),
        ("args.yaml", "a: [1"),
        ("args.yaml", "just words"),
        ("summary.csv", "epoch,loss\n1,2\n"),
        ("summary.csv", ",".join(EPOCH_COLUMNS) + "\n1,2\n"),
        ("theta.csv", "step,a,b\n1,0.5,0.5\n2,0.5\n"),
        ("theta.csv", ""),
        ("events.jsonl", "{}\nnot json\n"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, text):
    with RunLog(tmp_path, NAMES) as log:
        train(log, 1, 20)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        read_run(tmp_path)


def test_what_became_of_each_section(tmp_path):
    story = {
        "a": [("kept", "test"), ("eliminated", "test")],
        "b": [("rounded-off", "rounding")],
        "c": [("eliminated", "attraction")],
        "d": [("settled", "test")],
        "e": [("settled", "test"), ("reopened", "test")],
        "f": [("reopened", "test"), ("rounded-on", "rounding")],
        "g": [("kept", "test")],
        "h": [],
    }
    with RunLog(tmp_path, tuple(story)) as log:
        for section, decisions in story.items():
            for step, (decision, by) in enumerate(decisions, start=5):
                event = {"step": step, "section": section, "decision": decision, "by": by}
                log.log_events([event])
    found = records.fates(read_run(tmp_path))
    assert [(fate.section, fate.kind, fate.step) for fate in found] == [
        ("a", "removed by test", 6),
        ("b", "removed by rounding", 5),
        ("c", "removed by attraction", 5),
        ("d", "kept by test", None),
        ("e", "undecided", None),
        ("f", "kept by rounding", None),
        ("g", "undecided", None),
        ("h", "undecided", None),
    ]
    assert found[0].event["decision"] == "eliminated" and found[7].event is None

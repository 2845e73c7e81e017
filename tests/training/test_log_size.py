"""A run's records stay small, however many steps it has."""

from types import SimpleNamespace

from layerprune.ranks import Ranks
from layerprune.training.interrupt import StopRequest
from layerprune.training.loop import Loop
from layerprune.training.records import read_run
from layerprune.training.runlog import RunLog


class _Pruner:
    """Thetas that move."""

    ledger = SimpleNamespace(fraction=1.0)
    step = 0

    @property
    def sections(self):
        self.step += 1
        return [SimpleNamespace(theta=self.step % 7 / 7, status="open") for _ in range(3)]


def _log(folder, steps):
    """What a run of so many steps logs in one epoch; bytes of each of its files."""
    session = SimpleNamespace(
        recipe=SimpleNamespace(smoothing=0.0, compile=False, step_rows=1),
        ranks=Ranks(),
        model=None,
        network=SimpleNamespace(total_steps=steps),
        place=SimpleNamespace(step=0, batch=0),
        pruner=_Pruner(),
    )
    with RunLog(folder, ["a", "b", "c"]) as log:
        loop = Loop(session, None, log, StopRequest(), progress=False, keep=1)
        for _ in range(steps):
            session.place.step += 1
            loop._note_step(())
        log.log_epoch({"epoch": 1, "step": steps})
    return {p.name.split(".")[0]: p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def test_log_files_do_not_grow_with_the_steps(tmp_path):
    """The steps of a run are thinned out in its records; decisions are few, epochs are counted."""
    short, long = (_log(tmp_path / str(steps), steps) for steps in (500, 20_000))
    assert short.keys() == long.keys()
    for name, size in long.items():
        assert size < 1.2 * short[name] + 10, name
    steps = read_run(tmp_path / "20000").theta_steps
    assert len(steps) == 500 and steps[-1] == 20_000

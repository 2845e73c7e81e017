"""`LayerPruning` in Lightning's Trainer, against plain loops over the same batches."""

import contextlib
import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerprune import GatedResidual, LayerPruner, PruneConfig

L = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy  # noqa: E402

from layerprune.integrations.lightning import LayerPruning  # noqa: E402

EPOCHS, BATCHES, ROWS, WIDTH = 12, 10, 32, 8
OPTIONS = {
    "strength": 0.05,
    "config": PruneConfig(warm_up=0.0, warm_up_limit=0.0, learning_end=0.5),
    "seed": 3,
}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield


def _network(seed=0):
    torch.manual_seed(seed)
    sections = [
        GatedResidual(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)),
            activation="relu",
        )
        for _ in range(5)
    ]
    return nn.Sequential(nn.Linear(4, WIDTH), nn.ReLU(), *sections, nn.Linear(WIDTH, 3))


class Net(L.LightningModule):
    def __init__(self, seed=0):
        super().__init__()
        self.model = _network(seed)
        self.example_input_array = torch.zeros(2, 4)

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("loss", F.cross_entropy(self.model(x), y))

    test_step = validation_step

    def configure_optimizers(self):
        return _adam(self)


def _adam(module, fused=False):
    return torch.optim.AdamW(module.parameters(), lr=0.01, fused=fused)


def _data():
    """An epoch's batches; the label is which of three linear scores is the largest."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCHES * ROWS, 4, generator=generator)
    y = (x @ torch.randn(4, 3, generator=generator)).argmax(1)
    return torch.utils.data.TensorDataset(x, y)


def _loader():
    return torch.utils.data.DataLoader(_data(), batch_size=ROWS)


def _trainer(tmp_path, callbacks, **options):
    settings = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return L.Trainer(callbacks=callbacks, **{**settings, **options})


def _plain_loop(accumulation=1, dtype=None, scaler=None, fused=False):
    model = _network()
    optimizer = _adam(model, fused)
    pruner = LayerPruner(
        model,
        example_inputs=torch.zeros(2, 4),
        total_steps=EPOCHS * -(-BATCHES // accumulation),
        **OPTIONS,
    )
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    cast = contextlib.nullcontext()
    if dtype is not None:
        cast = torch.autocast("cpu", dtype=dtype, cache_enabled=False)
    for _ in range(EPOCHS):
        for number, (x, y) in enumerate(_loader(), start=1):
            with cast:
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss / accumulation).backward()
            if number % accumulation == 0 or number == BATCHES:
                scaler.step(optimizer)
                pruner.step(optimizer, scaler, accumulation)
                scaler.update()
                optimizer.zero_grad()
    pruner.strip()
    return pruner


def _same(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(left[k].equal(right[k]) for k in left)


def _decisions(pruner):
    return pruner.events, [(s.theta, s.status) for s in pruner.sections], pruner.step_count


def _assert_same_run(pruning, plain):
    assert plain.structure()["eliminated"]
    assert _decisions(pruning.pruner) == _decisions(plain)
    assert _same(pruning.pruner.model, plain.model)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_decisions_and_weights_are_those_of_a_plain_loop(tmp_path, accumulation):
    pruning = LayerPruning(**OPTIONS)
    trainer = _trainer(tmp_path, [pruning], accumulate_grad_batches=accumulation)
    trainer.fit(Net(), _loader(), _loader())
    assert pruning.pruner.step_count == trainer.global_step == pruning.pruner.total_steps
    _assert_same_run(pruning, _plain_loop(accumulation))


def test_bfloat16(tmp_path):
    pruning = LayerPruning(**OPTIONS)
    _trainer(tmp_path, [pruning], precision="bf16-mixed").fit(Net(), _loader())
    _assert_same_run(pruning, _plain_loop(dtype=torch.bfloat16))


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_the_scaler_skips_count_and_teach_nothing(tmp_path, fused):
    """A fused optimizer is stepped by the scaler all the same, and leaves the step out itself."""

    class Fused(Net):
        def configure_optimizers(self):
            return _adam(self, fused)

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=7)

    used, pruning = scaler(), LayerPruning(**OPTIONS)
    precision = MixedPrecision("16-mixed", "cpu", used)
    trainer = _trainer(tmp_path, [pruning], plugins=[precision])
    trainer.fit(Fused(), _loader())
    assert used.get_scale() < 2.0**30  # at least ten steps were left out
    assert pruning.pruner.step_count == trainer.global_step == EPOCHS * BATCHES
    _assert_same_run(pruning, _plain_loop(dtype=torch.float16, scaler=scaler(), fused=fused))


def test_a_training_step_without_loss_is_a_step_that_teaches_nothing(tmp_path):
    class Sometimes(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 2 else loss

    pruning = LayerPruning(**OPTIONS)
    trainer = _trainer(tmp_path, [pruning])
    trainer.fit(Sometimes(), _loader())
    assert pruning.pruner.step_count == trainer.global_step == EPOCHS * BATCHES


def test_what_is_left_is_plain_and_the_optimizer_has_shrunk_along(tmp_path):
    seen = {}

    class Look(L.Callback):
        def on_train_end(self, trainer, pl_module):
            held = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
            seen["same"] = held == {id(p) for p in pl_module.parameters()}

    net, pruning = Net(), LayerPruning(**OPTIONS)
    _trainer(tmp_path, [pruning, Look()]).fit(net, _loader())
    assert seen["same"]
    assert not net.model._forward_hooks and not net.model._forward_pre_hooks
    assert "on_load_checkpoint" not in vars(net)
    left = [s.name for s in pruning.pruner.sections if s.status != "eliminated"]
    assert [n for n, m in net.model.named_modules() if isinstance(m, GatedResidual)] == left
    assert LayerPruner(net.model, example_inputs=torch.zeros(2, 4), total_steps=99, strength=0.1)


def test_metrics_are_logged_under_names_of_their_own(tmp_path):
    pruning = LayerPruning(**OPTIONS)
    logger = CSVLogger(tmp_path)
    trainer = _trainer(tmp_path, [pruning], logger=logger, log_every_n_steps=5)
    trainer.fit(Net(), _loader())
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert len(rows) == EPOCHS * BATCHES // 5
    pruner = pruning.pruner
    left = sum(s.status != "eliminated" for s in pruner.sections)
    assert float(rows[-1]["layerprune/sections_alive"]) == left
    assert float(rows[0]["layerprune/sections_alive"]) == 5
    saved = 1 - pruner.ledger.train_flops / pruner.ledger.dense_train_flops
    assert float(rows[-1]["layerprune/train_flops_saved"]) == pytest.approx(saved, rel=1e-4)
    for section in pruner.sections:
        assert float(rows[-1][f"layerprune/theta/{section.name}"]) == section.theta


class _Stop(L.Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise InterruptedError


def _checkpoints(folder):
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and a checkpoint after each of its epochs."""
    folder = tmp_path_factory.mktemp("whole")
    net, pruning = Net(), LayerPruning(**OPTIONS)
    _trainer(folder, [pruning, _checkpoints(folder)], accumulate_grad_batches=2).fit(net, _loader())
    return folder, net, pruning


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, whole, when):
    """Stopped before the first elimination, and when some sections had left."""
    _, finished, pruning = whole
    gone = [e.step for e in pruning.pruner.events if e.decision in ("eliminated", "rounded-off")]
    steps = BATCHES // 2
    epoch = min(gone) // steps if when == "before" else min(gone) // steps + 1
    assert 0 < epoch < EPOCHS and (when == "before" or min(gone) <= epoch * steps < max(gone))
    settings = {"accumulate_grad_batches": 2}
    net = Net()
    with pytest.raises(InterruptedError):
        callbacks = [LayerPruning(**OPTIONS), _checkpoints(tmp_path), _Stop(epoch)]
        _trainer(tmp_path, callbacks, **settings).fit(net, _loader())
    resumed, again = Net(seed=9), LayerPruning(**OPTIONS)
    trainer = _trainer(tmp_path, [again], **settings)
    path = tmp_path / f"epoch={epoch - 1}.ckpt"
    trainer.fit(resumed, _loader(), ckpt_path=path, weights_only=True)
    assert _decisions(again.pruner) == _decisions(pruning.pruner)
    assert _same(resumed, finished)


def test_a_checkpoint_is_tested_with_a_module_freshly_made(tmp_path, whole):
    folder, finished, _ = whole
    paths = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    for path in (paths[EPOCHS // 3], paths[-1]):
        fresh, pruning = Net(seed=9), LayerPruning(**OPTIONS)
        trainer = _trainer(tmp_path, [pruning])
        (found,) = trainer.test(fresh, _loader(), ckpt_path=path, verbose=False)
        assert not fresh.model._forward_hooks
        fresh.eval()
        x, y = _data().tensors
        assert found["loss"] == pytest.approx(F.cross_entropy(fresh(x), y).item(), rel=1e-5)
    assert _same(fresh, finished)


def test_the_trainer_tests_its_last_checkpoint_and_refuses_one_of_more_sections(tmp_path, whole):
    folder = whole[0]
    net, pruning = Net(), LayerPruning(**OPTIONS)
    trainer = _trainer(tmp_path, [pruning])
    trainer.fit(net, _loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    before = copy.deepcopy(net.state_dict())
    trainer.test(net, _loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    with pytest.raises(ValueError, match="has lost . sections .* freshly made"):
        trainer.test(net, _loader(), ckpt_path=folder / "epoch=0.ckpt", verbose=False)
    assert all(net.state_dict()[k].equal(before[k]) for k in before)
    with pytest.raises(ValueError, match="pruning had ended"):
        _trainer(tmp_path, [LayerPruning(**OPTIONS)]).fit(
            Net(), _loader(), ckpt_path=tmp_path / "end.ckpt"
        )


def test_a_run_of_another_length_is_not_resumed(tmp_path, whole):
    trainer = _trainer(tmp_path, [LayerPruning(**OPTIONS)], max_epochs=EPOCHS + 1)
    with pytest.raises(ValueError, match="has 60 steps, this Trainer makes 130"):
        trainer.fit(Net(), _loader(), ckpt_path=whole[0] / "epoch=3.ckpt")


def test_a_checkpoint_without_the_pruner_is_not_resumed(tmp_path):
    trainer = _trainer(tmp_path, [], max_epochs=1)
    trainer.fit(Net(), _loader())
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    pruned = _trainer(tmp_path, [LayerPruning(**OPTIONS)])
    with pytest.raises(ValueError, match="made without LayerPruning"):
        pruned.fit(Net(), _loader(), ckpt_path=tmp_path / "dense.ckpt")


class DeepSpeedLike(DDPStrategy):
    """DeepSpeed's strategy derives from DDP's, and shards."""


class _Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class _Elsewhere(Net):
    def training_step(self, batch, batch_idx):
        x, y = batch
        for layer in self.model:
            x = layer(x)
        return F.cross_entropy(x, y)


@pytest.mark.parametrize(
    ("net", "callback", "trainer", "message"),
    [
        (_Manual, {}, {}, "needs automatic optimization"),
        (_Elsewhere, {}, {}, "has not called the pruned module, its 'model'"),
        (Net, {"module": "encoder"}, {}, r"no module 'encoder', but \['model'\]"),
        (Net, {}, {"max_epochs": -1}, "number of training steps is unknown"),
    ],
)
def test_refusals(tmp_path, net, callback, trainer, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        _trainer(tmp_path, [LayerPruning(**OPTIONS, **callback)], **trainer).fit(net(), _loader())


@pytest.mark.parametrize(
    ("strategy", "module", "message"),
    [
        (FSDPStrategy, "model", "not work with FSDPStrategy: use SingleDeviceStrategy or DDPStr"),
        (DeepSpeedLike, "model", "not work with DeepSpeedLike"),
        (DDPStrategy, "", "name it in `module`"),
    ],
)
def test_strategies_are_refused(tmp_path, strategy, module, message):
    """Asked directly: a fit would have begun with a process group."""
    pruning = LayerPruning(module=module, **OPTIONS)
    trainer = _trainer(tmp_path, [pruning])
    trainer._accelerator_connector.strategy = strategy()
    with pytest.raises(ValueError, match=message):
        pruning.setup(trainer, Net(), "fit")


def test_weight_averaging_is_refused(tmp_path):
    with pytest.raises(ValueError, match="WeightAveraging averages"):
        _trainer(tmp_path, [LayerPruning(**OPTIONS), WeightAveraging()]).fit(Net(), _loader())


def test_options_are_checked_at_once():
    with pytest.raises(TypeError, match="unknown option 'strenght'"):
        LayerPruning(strenght=0.1)
    with pytest.raises(TypeError, match="strength is missing"):
        LayerPruning(seed=1)


def test_a_module_whose_training_step_calls_itself(tmp_path):
    class Selfish(Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self(x), y)

    pruning = LayerPruning(module="", **OPTIONS)
    _trainer(tmp_path, [pruning]).fit(Selfish(), _loader())
    assert [s.name for s in pruning.pruner.sections] == [f"model.{k}" for k in range(2, 7)]
    assert pruning.pruner.structure()["eliminated"]


@pytest.mark.slow
def test_two_ranks_decide_alike_and_go_on_bit_for_bit(tmp_path):
    """DDP would wait for the gradients of what left, if its wrapper were not renewed."""
    script = Path(__file__).with_name("lightning_two_ranks.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    whole, resumed, steps = ranks[0]
    assert whole == resumed and whole[1]["eliminated"]
    at_checkpoint = 4 * BATCHES // 2
    assert min(steps) <= at_checkpoint < max(steps)

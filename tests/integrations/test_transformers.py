"""`LayerPruningCallback` in transformers' Trainer, against plain loops over the same batches."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported

import contextlib
import shutil

import pytest
import torch
from torch import nn

import layerprune
from layerprune import LayerPruner, PruneConfig

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from layerprune.integrations.trainer_checkpoints import PRUNER_FILE  # noqa: E402
from layerprune.integrations.transformers import LayerPruningCallback  # noqa: E402

STEPS, ROWS, WORDS, LENGTH = 60, 16, 12, 6
OPTIONS = {
    "strength": 0.05,
    "config": PruneConfig(warm_up=0.0, warm_up_limit=0.0, learning_end=0.5),
    "seed": 3,
}


def _bert(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=8,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=LENGTH,
            pad_token_id=0,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


class Sentences(torch.utils.data.Dataset):
    """Two classes by the first word; some sentences are padded."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        self.words = torch.randint(1, WORDS, (count, LENGTH), generator=generator)
        lengths = torch.randint(2, LENGTH + 1, (count, 1), generator=generator)
        self.mask = (torch.arange(LENGTH) < lengths).long()

    def __len__(self):
        return len(self.words)

    def __getitem__(self, index):
        words, mask = self.words[index] * self.mask[index], self.mask[index]
        return {"input_ids": words, "attention_mask": mask, "labels": int(words[0] > WORDS // 2)}


class InOrder(Trainer):
    """Without a sampler's shuffling, so that a plain loop sees the same batches."""

    def _get_train_sampler(self, dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def _trainer(folder, callback, model=None, kind=Trainer, rows=20 * ROWS, **options):
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "optim": "adamw_torch",
        "dataloader_pin_memory": False,
    }
    return kind(
        model=model or _bert(),
        args=TrainingArguments(**{**settings, **options}),
        train_dataset=Sentences(rows),
        eval_dataset=Sentences(ROWS),
        callbacks=[callback],
    )


def _batches(rows=20 * ROWS):
    dataset = Sentences(rows)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=ROWS, collate_fn=transformers.default_data_collator
    )
    while True:
        yield from loader


def _groups(rows, accumulation):
    """The batches of each step; an epoch's last step may have fewer."""
    batches, per_epoch = _batches(rows), -(-rows // ROWS)
    while True:
        left = per_epoch
        while left:
            count = min(accumulation, left)
            yield [next(batches) for _ in range(count)]
            left -= count


def _plain_loop(rows=20 * ROWS, accumulation=1, dtype=None, scaler=None):
    model = _bert().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    example = {k: v for k, v in next(_batches()).items() if k != "labels"}
    pruner = LayerPruner(model, example_inputs=example, total_steps=STEPS, **OPTIONS)
    cast = contextlib.nullcontext()
    if dtype is not None:
        cast = torch.autocast("cpu", dtype=dtype)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for _, group in zip(range(STEPS), _groups(rows, accumulation), strict=False):
        items = torch.tensor(sum(len(batch["labels"]) for batch in group))
        for batch in group:
            with cast:
                loss = model(**batch, num_items_in_batch=items).loss
            scaler.scale(loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), torch.inf)
        scaler.step(optimizer)
        pruner.step(optimizer, scaler, len(group))
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


@pytest.mark.parametrize(("accumulation", "rows"), [(1, 320), (3, 128)])
def test_decisions_and_weights_are_those_of_a_plain_loop(tmp_path, accumulation, rows):
    """Of 8 batches, steps are made of 3, 3 and 2."""
    pruning = LayerPruningCallback(**OPTIONS)
    trainer = _trainer(
        tmp_path, pruning, kind=InOrder, rows=rows, gradient_accumulation_steps=accumulation
    )
    trainer.train()
    assert pruning.pruner.step_count == trainer.state.global_step == STEPS
    _assert_same_run(pruning, _plain_loop(rows, accumulation))


def test_bfloat16(tmp_path):
    pruning = LayerPruningCallback(**OPTIONS)
    _trainer(tmp_path, pruning, kind=InOrder, bf16=True).train()
    _assert_same_run(pruning, _plain_loop(dtype=torch.bfloat16))


def test_steps_that_the_scaler_skips_count_and_teach_nothing(tmp_path):
    """The scaler's losses are so large that the norm which the Trainer logs overflows."""

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**75, growth_interval=9)

    pruning = LayerPruningCallback(**OPTIONS)
    trainer = _trainer(tmp_path, pruning, kind=InOrder)
    # The Trainer asks for a GPU before it makes one itself.
    trainer.accelerator.scaler = scaler()
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() < 2.0**70  # at least five steps were left out
    assert pruning.pruner.step_count == trainer.state.global_step == STEPS
    _assert_same_run(pruning, _plain_loop(scaler=scaler()))


def test_what_is_left_is_plain_and_the_optimizer_has_shrunk_along(tmp_path):
    pruning, model = LayerPruningCallback(**OPTIONS), _bert()
    trainer = _trainer(tmp_path, pruning, model, optim="adamw_torch_fused")
    trainer.train()
    held = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks
    gone = pruning.pruner.structure()["eliminated"]
    assert gone and model.config.layerprune_eliminated == gone
    # The blocks' last normalisations stay, and the blocks with them.
    left = [type(module).__name__ for module in model.modules()]
    assert (left.count("BertLayer"), left.count("Nothing")) == (4, len(gone))


def test_a_second_run_adds_what_it_removes_to_the_configuration(tmp_path):
    model = _bert()
    for spared in (r".*layer\.[01]", ()):
        pruning = LayerPruningCallback(**OPTIONS, ignored=spared)
        _trainer(tmp_path, pruning, model).train()
    gone = pruning.pruner.structure()["eliminated"]
    assert {s.name.split(".")[3] for s in pruning.pruner.sections} == {"0", "1"} and gone
    first = model.config.layerprune_eliminated[: -len(gone)]
    assert {name.split(".")[3] for name in first} == {"2", "3"} and len(first) == 4
    assert model.config.layerprune_eliminated == first + gone


def test_a_saved_model_is_rebuilt_from_its_configuration(tmp_path):
    pruning = LayerPruningCallback(**OPTIONS)
    trainer = _trainer(tmp_path, pruning)
    trainer.train()
    trainer.save_model(tmp_path / "end")
    rebuilt = BertForSequenceClassification.from_pretrained(tmp_path / "end")
    example = {"input_ids": torch.ones(2, LENGTH, dtype=torch.long)}
    layerprune.eliminate_sections(rebuilt, rebuilt.config.layerprune_eliminated, example)
    assert _same(rebuilt, trainer.model)


def test_metrics_are_logged_under_names_of_their_own(tmp_path):
    pruning = LayerPruningCallback(**OPTIONS)
    trainer = _trainer(tmp_path, pruning, logging_steps=10)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    pruner = pruning.pruner
    assert len(rows) == STEPS // 10
    left = sum(s.status != "eliminated" for s in pruner.sections)
    assert rows[-1]["layerprune/sections_alive"] == left < 8
    assert rows[-1]["layerprune/train_flops_saved"] == 1 - pruner.ledger.fraction > 0
    for section in pruner.sections:
        assert rows[-1][f"layerprune/theta/{section.name}"] == section.theta


def test_reporters_have_the_metrics_of_a_trainer_that_was_prepared(tmp_path):
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append("layerprune/sections_alive" in logs)

    pruning = LayerPruningCallback(**OPTIONS)
    trainer = _trainer(tmp_path, Reporter(), logging_steps=20)
    with pytest.raises(ValueError, match="made without this callback"):
        pruning.resume(trainer)
    trainer.add_callback(pruning)
    assert pruning.resume(trainer) is None
    trainer.train()
    assert len(seen) == STEPS // 20 + 1 and all(seen)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run with a checkpoint after every fifth step."""
    folder = tmp_path_factory.mktemp("whole")
    pruning = LayerPruningCallback(**OPTIONS)
    trainer = _trainer(folder, pruning, _bert(dropout=0.1), **_SAVING)
    trainer.train()
    return folder, trainer, pruning


_SAVING = {
    "save_strategy": "steps",
    "save_steps": 5,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "linear",
    "logging_steps": 10,
}


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, whole, when):
    """In the middle of an epoch, before the first elimination and after it; the data shuffled."""
    folder, finished, pruning = whole
    gone = [e.step for e in pruning.pruner.events if e.decision in ("eliminated", "rounded-off")]
    step = (min(gone) - 1) // 5 * 5 if when == "before" else -(-min(gone) // 5) * 5
    assert 0 < step < STEPS
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    again = LayerPruningCallback(**OPTIONS)
    trainer = _trainer(tmp_path, again, _bert(seed=9, dropout=0.1), **_SAVING)
    trainer.train(resume_from_checkpoint=again.resume(trainer))
    assert trainer.state.global_step == STEPS
    assert _decisions(again.pruner) == _decisions(pruning.pruner)
    assert _same(trainer.model, finished.model)


def test_the_newest_complete_checkpoint_is_resumed(tmp_path, whole):
    pruning = LayerPruningCallback(**OPTIONS)
    assert pruning.resume(_trainer(tmp_path, pruning)) is None
    for step in (5, 10, 50):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-50" / PRUNER_FILE).unlink()
    trainer = _trainer(tmp_path, pruning)
    assert pruning.resume(trainer) == str(tmp_path / "checkpoint-10")
    with pytest.raises(ValueError, match=f"missing file .*{PRUNER_FILE}: .* incomplete"):
        pruning.resume(trainer, tmp_path / "checkpoint-50")
    (tmp_path / "checkpoint-5" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="missing file .*optimizer.pt: .* save_only_model"):
        pruning.resume(trainer, tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / PRUNER_FILE).write_bytes(b"PK")
    with pytest.raises(ValueError, match="damaged or cut short"):
        pruning.resume(trainer, tmp_path / "checkpoint-5")
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}" / PRUNER_FILE).unlink()
    with pytest.raises(ValueError, match="no checkpoint in"):
        pruning.resume(trainer)


def test_the_trainer_does_not_resume_alone(tmp_path, whole):
    trainer = _trainer(tmp_path, LayerPruningCallback(**OPTIONS), **_SAVING)
    with pytest.raises(RuntimeError, match="call trainer.train"):
        trainer.train(resume_from_checkpoint=str(whole[0] / "checkpoint-5"))
    pruning = LayerPruningCallback(**OPTIONS)
    trainer = _trainer(tmp_path, pruning, **_SAVING)
    pruning.resume(trainer, whole[0] / "checkpoint-5")
    with pytest.raises(RuntimeError, match="at step 0 of 60, the pruner at 5 of 60"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auto_find_batch_size": True}, "set per_device_train_batch_size"),
        (
            {
                "load_best_model_at_end": True,
                "save_strategy": "steps",
                "eval_strategy": "steps",
                "save_steps": 5,
                "eval_steps": 5,
            },
            "layerprune_eliminated",
        ),
    ],
)
def test_refusals(tmp_path, options, message):
    trainer = _trainer(tmp_path, LayerPruningCallback(**OPTIONS), **options)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_several_processes_are_refused(tmp_path, monkeypatch):
    trainer = _trainer(tmp_path, LayerPruningCallback(**OPTIONS))
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match="works on one device only"):
        LayerPruningCallback(**OPTIONS).on_train_begin(
            trainer.args,
            trainer.state,
            trainer.control,
            model=trainer.model,
            optimizer=trainer.create_optimizer(),
            train_dataloader=trainer.get_train_dataloader(),
        )


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        pixels = torch.randn(1, 8, 8, generator=generator)
        return {"pixel_values": pixels, "labels": int(pixels.sum() > 0)}


def _vit(seed=0):
    torch.manual_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=8,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=8,
            patch_size=4,
            num_channels=1,
        )
    )


def test_a_vision_transformer_resumes_though_it_is_saved_under_other_names(tmp_path):
    """Of its weights, the Trainer by itself would load but the classifier's."""
    pixels = torch.zeros(2, 1, 8, 8)

    def train(seed, resume):
        pruning = LayerPruningCallback(example_inputs={"pixel_values": pixels}, **OPTIONS)
        trainer = _trainer(tmp_path, pruning, _vit(seed), save_strategy="steps", save_steps=30)
        trainer.train_dataset = Images()
        path = pruning.resume(trainer, tmp_path / "checkpoint-30") if resume else None
        trainer.train(resume_from_checkpoint=path)
        return pruning.pruner

    whole = train(0, resume=False)
    assert len(whole.sections) == 6 and whole.model.config.layerprune_eliminated
    resumed = train(9, resume=True)
    assert _decisions(resumed) == _decisions(whole)
    assert _same(resumed.model, whole.model)


class Texts(Sentences):
    """The next word is the same again; what is padded is not learnt."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        words = row["input_ids"][:1].expand(LENGTH) * row["attention_mask"]
        return row | {"input_ids": words, "labels": words.where(words > 0, -100)}


def test_a_causal_language_model_with_padded_batches(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=8,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=LENGTH,
        )
    )
    pruning = LayerPruningCallback(**OPTIONS)
    trainer = _trainer(tmp_path, pruning, model, max_steps=30, gradient_accumulation_steps=2)
    trainer.train_dataset = Texts(320)
    trainer.train()
    assert len(pruning.pruner.sections) == 6
    words = trainer.train_dataset[0]["input_ids"][:2]
    model.eval()
    assert model.config.layerprune_eliminated
    assert torch.equal(model(words[None]).logits.argmax(-1)[0], words)


def test_rows_that_cannot_be_looked_up(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Sentences(64))

    trainer = _trainer(tmp_path, LayerPruningCallback(**OPTIONS))
    trainer.train_dataset = Stream()
    with pytest.raises(ValueError, match="give example_inputs"):
        trainer.train()


def test_options_are_checked_at_once():
    with pytest.raises(TypeError, match="unknown option 'total_steps'"):
        LayerPruningCallback(strength=0.1, total_steps=3)


def test_models_of_any_kind_are_trained(tmp_path):
    """Without a configuration, with positional example inputs."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            block = [nn.Sequential(nn.Linear(LENGTH, LENGTH), nn.ReLU()) for _ in range(3)]
            self.body = nn.Sequential(*block, nn.Linear(LENGTH, 2))

        def forward(self, input_ids, labels=None):
            logits = self.body(input_ids.float())
            return (
                {"loss": nn.functional.cross_entropy(logits, labels)}
                if labels is not None
                else logits
            )

    torch.manual_seed(0)
    pruning = LayerPruningCallback(**OPTIONS)
    trainer = _trainer(tmp_path, pruning, Head())
    trainer.train()
    assert len(pruning.pruner.sections) == 3

"""What of transformers' Trainer a model can be pruned with, and what the model is called with."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.utils import find_labels

_EXAMPLE_ROWS = 2


def check_supported(args: TrainingArguments) -> None:
    """Refuses a training that a model cannot be pruned in.

    Raises:
        ValueError: for several devices, sharding, and what goes back to earlier weights.
    """
    if args.world_size > 1 or args.n_gpu > 1 or args.deepspeed or args.fsdp:
        raise ValueError(
            "LayerPruningCallback works on one device only, since the Trainer does not show its "
            "callbacks what it wrapped around the model; under DDP use LayerPruner in a loop of "
            "your own, or Lightning's callback"
        )
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end would load weights into a model that has lost sections since: "
            "leave it out, and rebuild the checkpoint's model by its config.layerprune_eliminated"
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size begins anew with a model that may have lost sections: set "
            "per_device_train_batch_size"
        )


def first_rows(loader: DataLoader, model: nn.Module, args: TrainingArguments) -> dict[str, Any]:
    """The model's inputs in the first rows of a data set; no sampler draws for it.

    Args:
        loader: collates them.
        model: its forward names the inputs.
        args: may name the labels, which are left out.

    Raises:
        ValueError: if rows of the data set cannot be looked up.
    """
    try:
        count = min(_EXAMPLE_ROWS, len(loader.dataset))
        batch = loader.collate_fn([loader.dataset[index] for index in range(count)])
    except (TypeError, NotImplementedError) as error:
        raise ValueError(
            f"no row of the train dataset can be looked up ({error}): give example_inputs"
        ) from error
    parameters = inspect.signature(type(model).forward).parameters
    labels = args.label_names or find_labels(type(model))
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and len(parameters) == 2
    return {
        name: value
        for name, value in batch.items()
        if (takes_all or name in parameters) and name not in labels
    }

"""Models in torch's parallel wrappers: which are refused, and how one goes on when it shrank."""

from __future__ import annotations

from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def check_unwrapped(model: nn.Module) -> None:
    """Refuses a model in a wrapper, and one whose parameters are sharded.

    Raises:
        TypeError: for these; the message names the remedy.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, DistributedDataParallel):
        raise TypeError(
            "model is wrapped in DistributedDataParallel: make the pruner on the model inside "
            "(ddp.module), and wrap it afterwards"
        )
    if isinstance(model, DataParallel):
        raise TypeError(
            "DataParallel splits a batch after its gates are drawn: use DistributedDataParallel, "
            "with the pruner on the model inside"
        )
    if any("_orig_mod" in module._modules for module in model.modules()):
        raise TypeError(
            "model is, or holds, a module that torch.compile returned, inside of which no section "
            "can be replaced: make the pruner on the plain model, which may be compiled in place "
            "(model.compile()), or be wrapped by torch.compile afterwards"
        )
    if _is_sharded(model):
        raise TypeError(
            "FSDP is not supported: a section's parameters cannot leave a sharded model. Use "
            "DistributedDataParallel"
        )


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP, of either version, or tensor parallelism divides its parameters."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    # Within its forward an FSDPModule has plain parameters.
    sharded = (FSDPModule, FullyShardedDataParallel)
    return any(isinstance(module, sharded) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


def renew(ddp: DistributedDataParallel) -> None:
    """Makes a wrapper expect the gradients that its model has now.

    In place, as others hold it: a trainer, a compiled model. Its options and hooks stay.

    Args:
        ddp: the wrapper; all ranks renew theirs.

    Raises:
        TypeError: for DDP's own mixed precision and delayed reductions, which hook the parameters
            by themselves.
    """
    if ddp.mixed_precision is not None or ddp._delay_all_reduce_params:
        raise TypeError(
            "DistributedDataParallel with mixed_precision or delay_all_reduce_named_params cannot "
            "be renewed: use autocast, and let all gradients be reduced alike"
        )
    mesh = getattr(ddp, "device_mesh", None)
    options = {
        "device_ids": ddp.device_ids,
        "output_device": ddp.output_device,
        "dim": ddp.dim,
        "init_sync": False,
        "find_unused_parameters": ddp.find_unused_parameters,
        "gradient_as_bucket_view": ddp.gradient_as_bucket_view,
        "static_graph": ddp.static_graph,
        **({"process_group": ddp.process_group} if mesh is None else {"device_mesh": mesh}),
    }
    # The newer torch's name of the option.
    name = "forward_sync_buffers"
    name = name if hasattr(ddp, name) else "broadcast_buffers"
    options[name] = getattr(ddp, name)
    if not ddp.bucket_bytes_cap_default:
        options["bucket_cap_mb"] = ddp.bucket_bytes_cap / 2**20
    communication = ddp._comm_hooks
    replaced = ("_modules", "_parameters", "_buffers")
    kept = {name: vars(ddp)[name] for name in vars(nn.Module()) if name not in replaced}
    # The old reducer goes on listening to the parameters as long as it lives.
    ddp._remove_autograd_hooks()
    ddp.__init__(ddp.module, **options)
    vars(ddp).update(kept)
    for hook, state in communication:
        ddp.register_comm_hook(state, hook)

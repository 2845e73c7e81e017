"""The operator library ``layerprune`` and the one way to put an operator into it.

Every operator has an eager reference, registered under ``CompositeExplicitAutograd``: it serves
every device, and a compiled kernel registered under ``CPU`` or ``CUDA`` takes precedence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("layerprune", "DEF")


def register(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """Defines an operator of the library ``layerprune``.

    Args:
        schema: The operator's schema without the namespace, ``"name(Tensor x, ...) -> Tensor"``.
            Arguments that are written to are marked in the usual way, ``Tensor(a!)``.
        reference: The eager implementation. It returns fresh tensors, aliasing neither an
            argument nor one another.
        fake: Gives the outputs' shapes, strides and dtypes without data.
        backward: ``backward(ctx, *grads)`` as in ``torch.library.register_autograd``; None for an
            operator that has no gradient.
        setup_context: ``setup_context(ctx, inputs, output)``, saves what ``backward`` needs.

    Returns:
        The operator's only overload. Calling it skips the overload resolution of
        ``torch.ops.layerprune.name``.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"layerprune::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"layerprune::{name}", backward, setup_context=setup_context, lib=LIBRARY
        )
    operator = getattr(torch.ops.layerprune, name).default
    _count_updates(operator)
    return operator


def call_in_place(operator: torch._ops.OpOverload, written: Sequence[Tensor], *args: Any) -> None:
    """Calls an operator that writes to the tensors ``written``.

    Counts their updates itself, which for an operator of this size takes half the time of being
    dispatched to `_count_updates`.
    """
    if torch.compiler.is_compiling():
        operator(*args)
        return
    torch.autograd.graph.increment_version(written)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        operator(*args)


def _count_updates(operator: torch._ops.OpOverload) -> None:
    """Has autograd told of the arguments that the operator writes to.

    PyTorch's own in-place operators count up a tensor's version, by which a backward notices that
    what it saved has changed. A kernel that writes through a pointer does not.
    """
    written = [
        index
        for index, argument in enumerate(operator._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if not written:
        return

    def update(keyset: Any, *args: Any) -> Any:
        torch.autograd.graph.increment_version([args[index] for index in written])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    LIBRARY.impl(operator._opname, update, "ADInplaceOrView", with_keyset=True)

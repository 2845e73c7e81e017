"""The operator library ``layerprune`` and the one way to put an operator into it.

Every operator has an eager reference, registered under ``CompositeExplicitAutograd``: it serves
every device, and a compiled kernel registered under ``CPU`` or ``CUDA`` takes precedence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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
    return getattr(torch.ops.layerprune, name).default

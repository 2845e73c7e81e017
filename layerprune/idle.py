"""Branches that no row of any rank needed are not trained, as on one rank, where they do not run.

Where ranks wait for each other's gradients such a branch runs on a few rows with gate 0. Its zero
gradients would make the optimizer's momentum and weight decay move it.
"""

from __future__ import annotations

import weakref

from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from layerprune.run import RunState


def drop_idle_gradients(run: RunState) -> RemovableHandle:
    """Hooks every optimizer's step: in a resumed run the first is of one not seen yet.

    Args:
        run: it is not kept alive.
    """

    def drop(*_: object) -> None:
        run = known()
        for index in (run and run.bank.idle) or ():
            for parameter in run.sections[index].branch_parameters():
                parameter.grad = None

    handle = register_optimizer_step_pre_hook(drop)
    known = weakref.ref(run, lambda _: handle.remove())
    return handle

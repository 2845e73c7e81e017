"""The operations on a GPU's shapes, forward and backward apart, and what they compete with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from device_stream import ALL, Computation, DeviceCase, Draw, Stream
from torch import Tensor

from layerprune import ops
from layerprune.ops.reference import flat_rows


def cases(stream: Stream, shares: list[float]) -> Iterator[DeviceCase]:
    """Operations 2 and 3, and a section with the gather in front, by share of running rows."""
    for share in shares:
        draw = Draw(stream, share)
        yield _residual(stream, draw, share)
        yield _stochastic_depth(stream, share)
        if share < 1:
            yield _section(stream, draw, share)


def _residual(stream: Stream, draw: Draw, share: float) -> DeviceCase:
    """The sum alone: the others get every row of the branch, or those that run."""
    activation, whole = stream.shape.activation, share == 1
    slot, probes = (None, None) if whole else (draw.slot, draw.probes)
    x, gate = stream.x, draw.gate.clone().requires_grad_()
    every_row = stream.branch.clone().requires_grad_()
    branch = stream.branch[draw.rows].contiguous(memory_format=stream.shape.layout)
    branch.requires_grad_()
    graded = ALL if whole else draw.probes

    def dense(function: Callable) -> Computation:
        return Computation(
            lambda: function(x, every_row, gate.view(stream.column)),
            {"x": x, "branch": every_row, "gate": gate},
            {"branch": (draw.rows, ALL), "gate": (graded, graded)},
        )

    baselines = {kind: dense(function) for kind, function in stream.dense.items()}
    baselines["dinov2"] = Computation(
        lambda: _index_add(stream, branch, draw.rows),
        {"x": x, "branch": branch},
        {
            "y": (draw.plain, draw.plain),
            "x": (draw.plain, draw.plain),
            "branch": (draw.plain_slots, draw.plain_slots),
        },
    )
    rows, running, kept = stream.batch, draw.count, 0 if whole else draw.probed
    return stream.case(
        "gated_residual",
        share,
        ours=Computation(
            lambda: ops.gated_residual(x, branch, gate, slot, activation, gate_grad_rows=probes),
            {"x": x, "branch": branch, "gate": gate},
        ),
        baselines=baselines,
        moved={
            # x, branch -> y, ReLU's mask; what is kept of the probes' branch.
            "forward": (2 * rows + running + 2 * kept) * stream.row_bytes + stream.mask_bytes,
            # The gradient, the mask, the branch where a gate's gradient is wanted -> two gradients,
            # of which that of x may be the one that came.
            "backward": (
                (rows if whole and not activation else 2 * rows)
                + running
                + (running if whole else kept)
            )
            * stream.row_bytes
            + stream.mask_bytes,
        },
    )


def _stochastic_depth(stream: Stream, share: float) -> DeviceCase:
    device, activation = stream.x.device, stream.shape.activation
    theta, state = torch.tensor(float(share), device=device), torch.tensor([1, 2, 0], device=device)
    x, branch = stream.x, stream.branch.clone().requires_grad_()
    _, drawn = ops.sampled_gated_residual(x.detach(), branch.detach(), theta, state, 0)
    weights, leaves = drawn.view(stream.column), {"x": x, "branch": branch}

    def plain(function: Callable) -> Computation:
        def forward() -> Tensor:
            torch.bernoulli(theta.expand(stream.batch))  # what it would draw; compared on ours
            return function(x, branch, weights)

        return Computation(forward, leaves)

    rows = stream.batch
    return stream.case(
        "sampled_gated_residual",
        share,
        ours=Computation(
            lambda: ops.sampled_gated_residual(x, branch, theta, state, 0, activation)[0], leaves
        ),
        baselines={kind: plain(function) for kind, function in stream.dense.items()},
        moved={
            "forward": (2 * rows + int(drawn.sum())) * stream.row_bytes,
            # The gradient, y -> two gradients; without ReLU that of x is the one that came.
            "backward": (4 * rows if activation else 2 * rows) * stream.row_bytes,
        },
    )


def _section(stream: Stream, draw: Draw, share: float) -> DeviceCase:
    """The gather, an identity in place of the branch, the sum."""
    x, gate, activation = stream.x, draw.gate.clone().requires_grad_(), stream.shape.activation
    probe_gate = draw.gate[draw.probes].view(stream.column).requires_grad_()
    weights = draw.gate.view(stream.column)

    def ours() -> Tensor:
        taken, rest = ops.take_rows(x, draw.rows, exclusive=True)
        return ops.gated_residual(
            rest, taken, gate, draw.slot, activation, gate_grad_rows=draw.probes
        )

    def subset(function: Callable) -> Computation:
        return Computation(
            lambda: function(x, weights, probe_gate, draw.rows, draw.probes),
            {"x": x, "gate": probe_gate},
            {"gate": (ALL, draw.probes)},
        )

    baselines = {kind: subset(function) for kind, function in stream.subset.items()}
    baselines["dinov2"] = Computation(
        lambda: _index_add(stream, None, draw.rows),
        {"x": x},
        {"y": (draw.plain, draw.plain), "x": (draw.plain, draw.plain)},
    )
    rows, running, probed = stream.batch, draw.count, draw.probed
    return stream.case(
        "take_rows + gated_residual",
        share,
        ours=Computation(ours, {"x": x, "gate": gate}),
        baselines=baselines,
        moved={
            # The gather; the sum and its mask; what is kept of the probes' branch.
            "forward": (2 * running + 2 * rows + running + 2 * probed) * stream.row_bytes
            + stream.mask_bytes,
            # The sum's backward; the rows' gradient added to the shortcut's.
            "backward": (2 * rows + running + probed + 3 * running) * stream.row_bytes
            + stream.mask_bytes,
        },
    )


def _index_add(stream: Stream, branch: Tensor | None, rows: Tensor) -> Tensor:
    """Stochastic depth on a subset of the batch as DINOv2 has it: indexing, then `index_add`.

    One scale for all rows and no gradient for it. The rows are views of the flattened batch in
    either layout. Without a branch it is what was gathered.
    """
    layout, flat = stream.shape.layout, flat_rows(stream.x, stream.shape.layout)
    added = flat[rows] if branch is None else flat_rows(branch, layout)
    y = torch.index_add(flat, 0, rows, added, alpha=1.0)
    if stream.shape.activation:
        y = torch.relu(y)
    if layout is torch.contiguous_format:
        return y.view(stream.x.shape)
    return y.view(stream.x.movedim(1, -1).shape).movedim(-1, 1)

"""The bank that draws the gates of all sections at once."""

from __future__ import annotations

import torch
from torch import Tensor

from layerprune import ops
from layerprune.config import PruneConfig
from layerprune.gate import Gate, SectionDraw
from layerprune.gradients import GateGradients
from layerprune.ranks import Ranks
from layerprune.recomputation import DrawLog
from layerprune.transfer import to_device


class GateBank:
    """The gates of all sections: theta, the random stream, the draws waiting for their gradients.

    Theta is on the host on every device, also where the user's default device is another: the rows
    on which a branch runs must be known there before it is launched.

    Args:
        names: a name for each section.
        config: how gates are drawn and probed.
        seed: key of the Philox stream.
        ranks: the processes that draw for a part of each batch; None for this one alone.

    Attributes:
        followers: gates for an average of the model. Nothing is drawn for them: in training mode
            too they are open where the model's are in evaluation.
        widest: rows of the largest batch of any rank so far. Rows of
            different ranks have different numbers from the step on in which all know it.
        idle: sections that no row has needed in a recorded draw since the last `collect`; None
            without such a draw.
    """

    def __init__(
        self, names: list[str], config: PruneConfig, seed: int, ranks: Ranks | None = None
    ) -> None:
        self.gates = [Gate(name) for name in names]
        self.followers = [Gate(name) for name in names]
        for gate in (*self.gates, *self.followers):
            gate.owned = True
        self.log = DrawLog()
        for gate in self.gates:
            gate.log = self.log
        self.config = config
        self.theta = torch.full((len(names),), float(config.theta_init), device="cpu")
        self.probe_rate = torch.zeros(len(names), device="cpu")
        self.seed = seed
        self.draw_number = 0
        self.widest = 0
        self.idle: frozenset[int] | None = None
        self._ranks = ranks or Ranks()
        self._pending: list[tuple[dict[int, Tensor], Tensor]] = []

    def draw(
        self,
        batch_size: int,
        *,
        skip: frozenset[int] = frozenset(),
        forced: dict[int, float] | None = None,
        record: bool = True,
        device: torch.device | str = "cpu",
        given: ops.GateDraw | None = None,
    ) -> list[int]:
        """Draws every section's gates for one batch and hands them to the gates.

        Args:
            batch_size: rows of the batch.
            skip: sections that are not gated any more (settled or eliminated).
            forced: theta to use, without probes, for some sections.
            record: whether gate gradients of this draw are evidence.
            device: where the branches run.
            given: gates to hand on in place of drawn ones, but to the forced sections.

        Returns:
            For each section, the number of rows on which its branch runs.
        """
        theta, probe_rate = self.theta, self.probe_rate
        if forced:
            theta, probe_rate = theta.clone(), probe_rate.clone()
            for index, value in forced.items():
                theta[index] = value
                probe_rate[index] = 0.0
        first, _ = self.rows_here(batch_size)
        state = torch.tensor([self.seed, self.draw_number, first], device="cpu")
        drawn = ops.sample_gates(
            theta,
            batch_size,
            state,
            probe_rate,
            min_rows=self.config.min_rows,
            row_multiple=self.config.row_multiple,
            scheme=self.config.scheme,
        )
        self.draw_number += 1
        if given is not None:
            drawn = _given_but_forced(given, drawn, list(forced or ()))
        everywhere = self.config.estimator == "taylor"
        # One call for all sections wherever possible: a step on small images is short.
        rows, graded_rows, gates, slots = (
            tensor.unbind()
            for tensor in to_device(
                (drawn.rows, drawn.rows if everywhere else drawn.probes, drawn.gates, drawn.slots),
                device,
            )
        )
        counts, thetas = drawn.counts.tolist(), theta.tolist()
        is_drawn = [given is None or index in (forced or ()) for index in range(len(thetas))]
        leaves: dict[int, Tensor] = {}
        running, idle = [], set()
        for index, (gate, (count, probed)) in enumerate(zip(self.gates, counts, strict=True)):
            graded = count if everywhere else probed
            if is_drawn[index] and thetas[index] == 0 and graded == 0 and self._may_idle():
                idle.add(index)
            if index in skip:
                gate.draw, count = None, batch_size
            elif index in idle and self._ranks.count == 1:
                gate.draw, count = False, 0
            else:
                leaf = gates[index]
                if record:
                    # Also where nothing is probed: a compiler would compile that apart.
                    leaf.requires_grad_()
                    if graded and not (forced and index in forced):
                        leaves[index] = leaf
                gate.draw = SectionDraw(
                    leaf,
                    slots[index],
                    rows[index][:count],
                    graded_rows[index][:graded],
                    is_open=is_drawn[index] and thetas[index] == 1 and graded == 0,
                )
            running.append(count)
        if record:
            self.idle = frozenset(idle if self.idle is None else idle & self.idle)
        if leaves:
            # A probe's gate lies strictly between 0 and 1, and no other does.
            probes = (drawn.gates > 0) & (drawn.gates < 1)
            self._pending.append((leaves, drawn.slots >= 0 if everywhere else probes))
        return running

    def _may_idle(self) -> bool:
        """Whether a branch that no row needs may go without training: not if it is to decay.

        Where other ranks wait for its gradients it runs on a few rows, and its gradients go.
        """
        return self.config.rule != "attraction"

    def rows_here(self, batch_size: int) -> tuple[int, int]:
        """The number of this rank's first row, and how many rows the ranks have together."""
        self.widest = max(self.widest, batch_size)
        if self._ranks.count == 1:
            return 0, batch_size
        return self._ranks.rank * self.widest, self._ranks.count * self.widest

    def open_all(self) -> None:
        """Takes every draw away: the gates are open in training mode."""
        for gate in self.gates:
            gate.draw = None

    def collect(self) -> GateGradients | None:
        """Gate gradients of the draws since the last call, or None without a draw."""
        self.idle = None
        draws, self._pending = self._pending, []
        self.log.clear()
        return GateGradients(draws) if draws else None

    def advance(self) -> None:
        """Ends a step: evaluation follows the new theta."""
        values = self.theta.tolist()
        for gate, follower, value in zip(self.gates, self.followers, values, strict=True):
            gate.is_open = follower.is_open = value >= 0.5

    def state_dict(self) -> dict:
        """Theta, the probe rates, and the place in the random stream."""
        return {
            "theta": self.theta.clone(),
            "probe_rate": self.probe_rate.clone(),
            "seed": self.seed,
            "draw_number": self.draw_number,
            "widest": self.widest,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned."""
        self.theta.copy_(state["theta"])
        self.probe_rate.copy_(state["probe_rate"])
        self.seed, self.draw_number = state["seed"], state["draw_number"]
        self.widest = state["widest"]
        self.advance()


def _given_but_forced(given: ops.GateDraw, drawn: ops.GateDraw, forced: list[int]) -> ops.GateDraw:
    found = [tensor.clone() for tensor in given]
    for tensor, own in zip(found, drawn, strict=True):
        tensor[forced] = own[forced]
    return ops.GateDraw(*found)

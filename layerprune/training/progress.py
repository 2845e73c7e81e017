"""What is shown while a run goes on: a bar on a terminal, else a line an epoch."""

from __future__ import annotations

from types import TracebackType

from tqdm import tqdm

from layerprune.training.session import Session

__all__ = ["Progress", "pruning"]


def pruning(session: Session) -> tuple[int | None, float | None]:
    """Sections alive, and mean theta over all sections; None of a dense run."""
    if session.pruner is None:
        return None, None
    infos = session.pruner.sections
    alive = sum(info.status != "eliminated" for info in infos)
    return alive, sum(info.theta for info in infos) / len(infos)


class Progress:
    """Shows how far a run is.

    Args:
        session: the run's state.
        wanted: whether to show anything.
    """

    def __init__(self, session: Session, wanted: bool) -> None:
        self._session = session
        self._wanted = wanted
        self._bar = tqdm(
            total=session.network.total_steps,
            initial=session.place.step,
            unit="step",
            dynamic_ncols=True,
            # None: only where there is a terminal.
            disable=None if wanted else True,
        )

    def step(self, images: int) -> None:
        """Shows a step.

        Args:
            images: of the present epoch that are counted.
        """
        if not self._bar.disable:
            self._bar.set_postfix(self._figures(images), refresh=False)
            self._bar.update()

    def epoch(self, images: int, accuracy: float) -> None:
        """Shows an epoch's end, of which only the test accuracy is not in the session's place."""
        if self._wanted and self._bar.disable:
            place, epochs = self._session.place, self._session.recipe.epochs
            words = "  ".join(f"{key} {value}" for key, value in self._figures(images).items())
            print(f"epoch {place.epoch + 1}/{epochs}  {words}  test {accuracy:.4f}", flush=True)

    def _figures(self, images: int) -> dict[str, str]:
        """Loss and accuracy of the epoch so far, and how far pruning is."""
        place, shown = self._session.place, {}
        if images:
            loss, right = place.loss_sum / images, place.correct / images
            shown = {"loss": f"{loss:.3f}", "acc": f"{right:.3f}"}
        alive, theta = pruning(self._session)
        if theta is not None:
            pruner = self._session.pruner
            shown |= {"sections": f"{alive}/{len(pruner.sections)}", "theta": f"{theta:.2f}"}
            shown |= {"FLOPs saved": f"{100 * (1 - pruner.ledger.fraction):.0f}%"}
        return shown

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

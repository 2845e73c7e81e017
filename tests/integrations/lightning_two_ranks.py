"""A script that Lightning starts once per rank: fits under DDP, resumes, and notes both ends."""

import hashlib
import json
import sys
from pathlib import Path

from test_lightning import EPOCHS, OPTIONS, Net, _checkpoints, _loader, _trainer

from layerprune.integrations.lightning import LayerPruning


def _end(net, pruner):
    """Decisions, and weights without the running statistics, which DDP leaves to each rank."""
    weights = hashlib.sha256()
    for name, tensor in sorted(net.named_parameters()):
        weights.update(name.encode() + tensor.detach().numpy().tobytes())
    return [repr(pruner.events), pruner.structure(), weights.hexdigest()]


def main(folder):
    ends = []
    for seed, path in ((0, None), (9, folder / "epoch=3.ckpt")):
        net, pruning = Net(seed), LayerPruning(**OPTIONS)
        callbacks = [pruning] if path else [pruning, _checkpoints(folder)]
        trainer = _trainer(folder, callbacks, strategy="ddp", devices=2, max_epochs=2 * EPOCHS)
        trainer.fit(net, _loader(), ckpt_path=path)
        ends.append(_end(net, pruning.pruner))
    steps = [event.step for event in pruning.pruner.events]
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps([*ends, steps]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

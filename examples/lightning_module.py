"""Prunes a network inside an ordinary LightningModule, which knows nothing of it.

Shows that one callback is all there is to add, and that the module is plain again after `fit`.
Needs lightning and scikit-learn; about a minute on 2 cores.
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from layerprune.integrations.lightning import LayerPruning


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x):
        return torch.relu(x + self.body(x))


class Digits(L.LightningModule):
    def __init__(self, blocks, width):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            *(Block(width) for _ in range(blocks)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, 10),
        )

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def test_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.network(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def main(epochs=20):
    L.seed_everything(0)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    dataset = TensorDataset(images, torch.tensor(data.target))
    train, test = random_split(dataset, [len(images) - 360, 360])

    net = Digits(blocks=10, width=24)
    pruning = LayerPruning(module="network", example_inputs=images[:2], strength=0.05)
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[pruning],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, DataLoader(train, batch_size=64, shuffle=True, drop_last=True))

    pruner = pruning.pruner
    print(pruner)
    for event in pruner.events:
        print(event)
    print(f"training took {pruner.ledger.fraction:.0%} of the operations of a dense run")
    (result,) = trainer.test(net, DataLoader(test, batch_size=360), verbose=False)
    print(f"accuracy {result['accuracy']:.1%}")
    print("what is left:", *(type(part).__name__ for part in net.network))
    return net, pruner, result["accuracy"]


if __name__ == "__main__":
    main()

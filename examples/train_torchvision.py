"""Prunes torchvision's ResNet-18, as it is, in a plain training loop.

Shows the sections that were found, what leaves and on which evidence, what the run cost, and a
checkpoint that is loaded without this script. Needs layerprune[train]; less than a minute on
2 cores.
"""

import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import layerprune

NETWORK = {"num_classes": 10}


def digits():
    """Images of digits as torchvision's networks take them: three channels, and not too small."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = nn.functional.interpolate(images, scale_factor=2).expand(-1, 3, -1, -1)
    return images, torch.tensor(data.target)


def main(epochs=10, output="runs/resnet18"):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = digits()
    order = torch.randperm(len(images))
    test, train = order[:360], order[360:]
    dataset = TensorDataset(images[train], labels[train])
    loader = DataLoader(dataset, batch_size=64, shuffle=True, drop_last=True)

    model = torchvision.models.resnet18(**NETWORK).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=5e-4, momentum=0.9)
    steps = epochs * len(loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=steps)
    pruner = layerprune.LayerPruner(
        model, example_inputs=images[:2].to(device), total_steps=steps, strength=0.05
    )
    print(pruner)

    for _ in range(epochs):
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            report = pruner.step(optimizer)
            optimizer.zero_grad()
            scheduler.step()
            for event in report.events:
                print(event)
    print(pruner)
    print(f"training took {pruner.ledger.fraction:.0%} of the operations of a dense run")

    plain = pruner.strip().eval()
    with torch.no_grad():
        outputs = plain(images[test].to(device)).cpu()
    accuracy = (outputs.argmax(1) == labels[test]).float().mean().item()
    print(f"accuracy {accuracy:.1%} on {len(test)} images that were not trained on")

    layerprune.save(output, pruner, builder=("torchvision.resnet18", NETWORK))
    loaded = layerprune.load(output).to(device)  # in evaluation mode
    with torch.no_grad():
        same = torch.equal(loaded(images[test].to(device)).cpu(), outputs)
    print(f"loaded from {output}: outputs are {'equal' if same else 'NOT equal'}")
    return pruner, accuracy, same


if __name__ == "__main__":
    main()

"""PyTorch's side of a comparison: the network, recipe and files of ``scripts/train_cifar10.py --depth 20``.

    python tests/parity/train_torch.py --data-dir DIR --epochs 3 --seed 0

Same reader, same initialisation, crop, flip, batches without remainder, SGD and step decay; only the random draws differ.
Prints a JSON line an epoch.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
import torch.nn.functional as F
from networks import CifarResNet

from jresnet import data, recipes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="as for scripts/train_cifar10.py")
    parser.add_argument("--depth", type=int, default=20, help="of the paper's CIFAR family (default: 20)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--val-split", type=int, default=0, help="last training images held out (default: 0)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    recipe = recipes.RECIPES["step"]
    found = data.load_cifar10(args.data_dir, download=False)
    kept = len(found.train.labels) - args.val_split
    statistics = [torch.tensor(x).view(1, 3, 1, 1) for x in recipes.STATISTICS["cifar10"]]

    def normalised(images: torch.Tensor) -> torch.Tensor:
        return ((images / 255 - statistics[0]) / statistics[1]).contiguous(memory_format=torch.channels_last)

    def tensors(split: data.Split, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        images = np.ascontiguousarray(split.images[part].transpose(0, 3, 1, 2))
        return torch.from_numpy(images), torch.from_numpy(split.labels[part].astype(np.int64))

    images, labels = tensors(found.train, slice(0, kept))
    held = {"val": tensors(found.train, slice(kept, None))} if args.val_split else {}
    held["test"] = tensors(found.test, slice(None))
    model = CifarResNet(args.depth).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
    )
    steps = kept // recipe.batch_size
    milestones = recipes.milestones_in_epochs(recipe.milestones, args.epochs)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(m * steps) for m in milestones], recipe.gamma)
    trained = 0.0
    for epoch in range(1, args.epochs + 1):
        began, total = time.perf_counter(), 0.0
        model.train()
        for batch in torch.randperm(kept)[: steps * recipe.batch_size].view(steps, -1):
            padded = F.pad(images[batch], (4, 4, 4, 4))
            offsets = torch.randint(0, 9, (len(batch), 2)).tolist()
            views = torch.stack(
                [image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(padded, offsets, strict=True)]
            )
            flips = torch.rand(len(batch)) < 0.5
            views[flips] = views[flips].flip(3)
            loss = F.cross_entropy(model(normalised(views.float())), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            total += loss.item()
        trained += time.perf_counter() - began
        model.eval()
        row = {
            "epoch": epoch,
            "train_loss": total / steps,
            "images_per_second": epoch * steps * recipe.batch_size / trained,
        }
        with torch.no_grad():
            for name, (x, y) in held.items():
                logits = torch.cat([model(normalised(part.float())) for part in x.split(500)])
                row[f"{name}_loss"] = F.cross_entropy(logits, y).item()
                row[f"{name}_accuracy"] = (logits.argmax(1) == y).float().mean().item()
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

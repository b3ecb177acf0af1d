"""The CIFAR networks of linear_mode_connectivity.py and how they are trained, at a cost that a processor can bear.

The first ten classes of CIFAR-100, pictures averaged to 16 x 16: 5,000 to train on and 1,000 to test.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, pad, relu

CLASSES, SIDE, BATCH, EPOCHS, LEARNING_RATE = 10, 16, 128, 25, 0.1


class Block(nn.Module):
    """Two convolutions beside a shortcut, as in He et al. (2016), with a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = _convolution(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.second, self.second_norm = _convolution(outputs, outputs, 3, 1), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if (inputs, stride) != (outputs, 1):
            self.shortcut = nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        hidden = relu(self.first_norm(self.first(x)))
        return relu(self.second_norm(self.second(hidden)) + self.shortcut(x))


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


def resnet20(width: int) -> nn.Module:
    """ResNet-20 with ``width`` times 16 channels in its first stage."""
    first = 16 * width
    layers: list[nn.Module] = [_convolution(3, first, 3, 1), nn.BatchNorm2d(first), nn.ReLU()]
    inputs = first
    for stage in range(3):
        for block in range(3):
            layers.append(Block(inputs, first << stage, 2 if stage and not block else 1))
            inputs = first << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


def vgg11(norm: bool) -> nn.Module:
    """VGG-11 with one linear layer, with or without BatchNorm; four halvings suit pictures of this size."""
    layers: list[nn.Module] = []
    inputs = 3
    for word in (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512):
        if word == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(inputs, word, 3, padding=1), *([nn.BatchNorm2d(word)] if norm else []), nn.ReLU()]
        inputs = word
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))
    for layer in network:
        if isinstance(layer, nn.Conv2d) and not norm:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return network


NETWORKS = {
    "ResNet-20, width 4x": lambda: resnet20(4),
    "VGG-11 with BatchNorm": lambda: vgg11(norm=True),
    "VGG-11": lambda: vgg11(norm=False),
}


def pictures(path: str, split: str) -> tuple[Tensor, Tensor]:
    """Return the pictures and labels of ``train`` or ``test`` from an ``.npz`` with ``x_train``, ``y_train``, ``x_test``, ``y_test``."""
    with np.load(path) as held:
        images, labels = torch.from_numpy(held[f"x_{split}"]), torch.from_numpy(held[f"y_{split}"])
    chosen = labels < CLASSES
    images = images[chosen].permute(0, 3, 1, 2).float() / 255
    return (avg_pool2d(images, images.shape[-1] // SIDE) - 0.47) / 0.27, labels[chosen]


def trained(name: str, seed: int, inputs: Tensor, targets: Tensor, epochs: int = EPOCHS) -> nn.Module:
    """Train one network: SGD with momentum, one cycle of the learning rate, flips and shifts of up to two pixels, bfloat16 where it is safe."""
    torch.manual_seed(seed)
    model = NETWORKS[name]().to(memory_format=torch.channels_last)
    rate = LEARNING_RATE if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) else LEARNING_RATE / 5
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * (len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        order = torch.randperm(len(inputs))
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            batch = _moved(inputs[chosen]).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                loss = cross_entropy(model(batch), targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
    return model.to(memory_format=torch.contiguous_format).eval()


def _moved(images: Tensor) -> Tensor:
    """Flip half of the pictures, and shift all of them by up to two pixels."""
    flipped = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    padded = pad(flipped, (2, 2, 2, 2))
    rows, columns = torch.randint(5, (2, len(images), 1)) + torch.arange(SIDE)
    return padded.gather(2, rows[:, None, :, None].expand(-1, 3, -1, SIDE + 4)).gather(
        3, columns[:, None, None, :].expand(-1, 3, SIDE, -1)
    )

"""Modules whose forwards spell chains of layers and sums, each in its own way, for (2, 4, 6, 5) images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Layers(nn.Module):
    """Two convolutions with norms, an activation, a shortcut and a flag for the forwards below."""

    def __init__(self, flag=True):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.nothing = None
        self.flag = flag
        for norm in (self.bn1, self.bn2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)


class Nested(Layers):
    def forward(self, x):
        return self.act(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True))))


class Statements(Layers):
    def forward(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = torch.relu(x)
        y = self.bn2(self.conv2(x))
        return F.gelu(y, approximate="tanh")


class SumInPlace(Layers):
    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.nothing is None else self.nothing(x)
        return self.act(y)


class SumAfterShortcut(Layers):
    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        if self.shortcut is not None:
            identity = self.shortcut(x)
        out = out + identity
        out = self.act(out)
        return out  # noqa: RET504 (as people write)


class SumOnTheRight(Layers):
    def forward(self, x):
        if self.flag:
            return x + self.bn1(self.conv1(x))
        return self.bn1(self.conv1(x))


class ChosenSum(Layers):
    def forward(self, x):
        residual = x
        x = self.bn1(self.conv1(x))
        return residual + x if self.flag else x


class Conditional(Layers):
    def forward(self, x):
        x = self.conv1(x)
        if self.nothing is not None:
            x = self.nothing(x)
        if self.flag:
            x = self.bn1(x)
        if self.act is not None:
            x = self.act(x)
        return x


class InALoop(Layers):
    def forward(self, x):
        for _ in range(2):
            y = self.conv1(x)
            y = self.bn1(y)
            x = self.act(y)
        with torch.autocast("cpu", enabled=False):
            x = self.act(self.bn2(self.conv2(x)))
        return x  # noqa: RET504


class Inner(Layers):
    def forward(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        return x  # noqa: RET504


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        hidden = self.conv(x)
        hidden = self.norm(hidden)
        return hidden  # noqa: RET504


class SumWithAModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.act = nn.Sequential(Layered(), Inner()), Shortcut(), nn.SiLU()

    def forward(self, x):
        y = self.inner(x)
        z = self.outer(x)
        y += z
        return self.act(y)


class Layered(Layers):
    def forward(self, x):
        return self.act(self.bn1(self.conv1(x)))


class Dropped(Layers):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        y = self.conv1(x)
        y = self.bn1(y)
        if self.flag:
            y = self.dropout(y)
            y = y + x
        return y


FORWARDS = {  # and how many calls of chains one of its forwards makes
    Nested: 2, Statements: 2, SumInPlace: 2, SumAfterShortcut: 2, SumOnTheRight: 1, ChosenSum: 1,
    Conditional: 1, InALoop: 2, Inner: 1, SumWithAModule: 3, Dropped: 1,
}  # fmt: skip
SUMS = {SumInPlace, SumAfterShortcut, SumOnTheRight, ChosenSum, SumWithAModule, Dropped}


# Forwards in which something is in the way.


class UsedTwice(Layers):
    def forward(self, x):
        y = self.conv1(x)
        z = self.bn1(y)
        return torch.relu(z) + y


class SumWithItself(Layers):
    def forward(self, x):
        y = self.bn1(self.conv1(x))
        y = y + y
        return self.act(y)


class WrittenBetween(Layers):
    """What is summed is made by a layer that overwrites the chain's own input."""

    def forward(self, x):
        x = x * 1
        y = self.bn1(self.conv1(x))
        z = self.act(x)
        y += z
        return y


class OverwrittenByAShortcut(Layers):
    def __init__(self):
        super().__init__()
        self.shortcut = nn.Sequential(nn.ReLU(inplace=True))

    def forward(self, x):
        x = x * 1
        y = self.bn1(self.conv1(x))
        y += self.shortcut(x)
        return y


class SharedNorm(Layers):
    """The shortcut moves the same running averages."""

    def __init__(self):
        super().__init__()
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), self.bn1)

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        y += self.shortcut(x)
        return y


class Broadcast(Layers):
    def forward(self, x):
        y = self.bn1(self.conv1(x))
        y = y + x.mean((2, 3), keepdim=True)
        return self.act(y)


class SumOfNumbers(Layers):
    def forward(self, x):
        return self.act(self.bn1(self.conv1(x)) + 1)


class Looked(Layers):
    def forward(self, x):
        x = self.conv1(x)
        assert "x" in locals()
        x = self.bn1(x)
        return x  # noqa: RET504


class Closure(Layers):
    def forward(self, x):
        x = self.conv1(x)

        def norm():
            return self.bn1(x)

        return self.act(norm())


class Super(Layered):
    def forward(self, x):
        return super().forward(self.bn2(self.conv2(x)))


class Private(Layers):
    def __init__(self):
        super().__init__()
        self.__norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.act(self.__norm(self.conv1(x)))


class Difference(Layers):
    def forward(self, x):
        y = self.bn1(self.conv1(x))
        return self.act(y - x)


class Several(Layers):
    def forward(self, x):
        y = z = self.bn1(self.conv1(x))
        self.act(y)
        return z + x


UNUSUAL = [
    UsedTwice, SumWithItself, SharedNorm, Broadcast, SumOfNumbers, Looked, Closure, Super, Private,
    Difference, Several,
]  # fmt: skip
OVERWRITTEN = [WrittenBetween, OverwrittenByAShortcut]  # PyTorch has no gradient of these

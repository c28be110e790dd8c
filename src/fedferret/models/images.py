"""The image models that a recipe can name: the body of each, and the images that the body reads.

lenet5                      LeCun et al., Proc. IEEE 1998, §II.B: 6 and 16 maps of 5×5, layers of 120 and 84; 28×28
                            images with two pixels of padding. Deviations: ReLU for the scaled tanh, max-pooling for
                            the trained subsampling, every map is connected to every other, a linear output layer.
conv4                       the Conv-4 of FedPM (Isik et al., ICLR 2023, arXiv 2209.15328, appendix; first Frankle &
                            Carbin 2019): 64, 64, pool, 128, 128, pool, layers of 256 and 256; 3×3 convolutions with
                            padding and no bias, as in FedPM's dense baseline for MNIST. No BatchNorm. (The Conv4 in
                            SpaFL's code has 5×5 convolutions without padding, layers of 128, and BatchNorm.)
packaged:efficientnet-lite0 ``models/efficientnet.py``

The last linear layer is the classifier's head. The first two are drawn when loaded, by a key that depends on the name
alone: He's uniform distribution, biases 0.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fedferret.models.efficientnet import EfficientNetLite0


@dataclass(frozen=True)
class ImageModel:
    """An architecture and the images that it reads.

    Attributes:
        body: makes a body, its weights not drawn.
        width: features that the body makes.
        channels: 1 or 3.
        size: height and width, in pixels.
        mean: of a pixel, to be subtracted.
        std: of a pixel, to divide by.
    """

    body: Callable[[], nn.Module]
    width: int
    channels: int
    size: int
    mean: float = 0.5
    std: float = 0.5


def _lenet5() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 6, 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 16, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flat=nn.Flatten(),
            linear1=nn.Linear(400, 120),
            relu3=nn.ReLU(),
            linear2=nn.Linear(120, 84),
            relu4=nn.ReLU(),
        )
    )


def _conv4() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 64, 3, padding=1, bias=False),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(64, 64, 3, padding=1, bias=False),
            relu2=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv3=nn.Conv2d(64, 128, 3, padding=1, bias=False),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(128, 128, 3, padding=1, bias=False),
            relu4=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flat=nn.Flatten(),
            linear1=nn.Linear(6272, 256),
            relu5=nn.ReLU(),
            linear2=nn.Linear(256, 256),
            relu6=nn.ReLU(),
        )
    )


MODELS = {
    "lenet5": ImageModel(_lenet5, 84, 1, 28),
    "conv4": ImageModel(_conv4, 256, 1, 28),
    # as in training on ImageNet: (byte - 127) / 128
    "packaged:efficientnet-lite0": ImageModel(EfficientNetLite0, 1280, 3, 224, mean=127 / 255, std=128 / 255),
}

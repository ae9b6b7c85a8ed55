"""Feature spaces of small classifiers, trained on the data itself and shipped with the package.

Inception's features were made for photographs of 299 pixels; on digits of 8 pixels a classifier of the same digits
sees far more, costs a thousandth, and can be shipped. The features are the 64 pre-activations before the last
hidden ReLU: they are dense (a FID fits Gaussians to them), and a common factor scales them so that their total
variance over the training images is 64. So a FID of 64 is the distance between the data and its own mean.

What is shipped (``python -m ornstein.metrics.train_features --data NAME`` makes it again; the held-out figures are
those of the files in ``weights/`` and stand, with seed and data fingerprint, in their headers):

=============  =====  =========================================  ==========================
name           input  trained on                                 accuracy on held-out
=============  =====  =========================================  ==========================
digits         8x8    1,438 of scikit-learn's 1,797 scans        99.72 % (358 of 359 scans)
mnist          32x32  60,000 training images                     99.53 % (10,000 test)
fashion_mnist  32x32  60,000 training images                     91.04 % (10,000 test)
=============  =====  =========================================  ==========================
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ornstein.errors import OrnsteinError
from ornstein.metrics.features import FeatureExtractor, fingerprint_of, to_gray

FORMAT = "ornstein.classifier_features.1"
BUNDLED = ("digits", "mnist", "fashion_mnist")


class ClassifierNet(nn.Module):
    """A small convolutional classifier whose last hidden layer is the feature space.

    Each stage is two 3x3 convolutions with batch norm and ReLU, then halving by max-pooling; the last stage's map
    is flattened into ``num_features`` pre-activations, whose ReLU a linear head classifies.

    Args:
        size: side of the square gray input, divisible by ``2 ** len(widths)``.
        widths: channels of each stage.
        num_classes: width of the logits.
        num_features: width of the feature vector.
        dropout: on the features in training.
    """

    def __init__(
        self,
        size: int,
        widths: Sequence[int],
        *,
        num_classes: int = 10,
        num_features: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if size % 2 ** len(widths):
            raise OrnsteinError(f"a size of {size} does not halve {len(widths)} times; use fewer widths.")
        layers: list[nn.Module] = []
        channels = 1
        for width in widths:
            for _ in range(2):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.neck = nn.Linear(channels * (size // 2 ** len(widths)) ** 2, num_features)
        self.head = nn.Linear(num_features, num_classes)
        self.dropout = dropout

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(B, num_features)``, logits ``(B, num_classes)`` of gray ``x (B, 1, size, size)`` in [-1, 1]."""
        features = self.neck(self.body(x).flatten(1))
        hidden = F.dropout(F.relu(features), self.dropout, self.training)
        return features, self.head(hidden)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply the features by ``factor`` > 0 and leave the logits as they are (ReLU is homogeneous)."""
        self.neck.weight.mul_(factor)
        self.neck.bias.mul_(factor)
        self.head.weight.div_(factor)


def bundled_path(name: str) -> Path:
    """Where the package keeps the weights of the feature space ``name``."""
    return Path(__file__).parent / "weights" / f"{name}.safetensors"


def save_classifier(net: ClassifierNet, path: str | Path, *, metadata: Mapping[str, Any]) -> None:
    """Write the weights and a header of JSON values, atomically.

    ``metadata`` needs ``name``, ``size``, ``widths`` and ``num_classes``; the trainer adds accuracy, seed and the
    fingerprint of the data.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        key: value.detach().cpu().contiguous()
        for key, value in net.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    header = {"format": FORMAT, **{key: json.dumps(value) for key, value in metadata.items()}}
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    os.close(handle)
    try:
        save_file(state, partial, metadata=header)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def load_classifier(path: str | Path) -> tuple[ClassifierNet, dict[str, Any]]:
    """The network in ``path`` (in eval mode, frozen) and its header.

    Raises: ValueError if the file is missing, damaged, or not one of :func:`save_classifier`.
    """
    path = Path(path)
    if not path.is_file():
        raise OrnsteinError(
            f"no feature weights at {path}; train them with `python -m ornstein.metrics.train_features --out {path}` "
            "or leave out metrics.features.weights for those that the package carries."
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise OrnsteinError(f"{path} is not a whole safetensors file ({error}); fetch or train it again.") from error
    if header.pop("format", None) != FORMAT:
        raise OrnsteinError(
            f"{path} holds no feature net of this package (its header lacks format={FORMAT!r}); "
            "metrics.features.weights takes files written by ornstein.metrics.train_features."
        )
    metadata = {key: json.loads(value) for key, value in header.items()}
    num_features = state["neck.bias"].shape[0]
    net = ClassifierNet(
        metadata["size"], metadata["widths"], num_classes=metadata["num_classes"], num_features=num_features
    )
    counters = {key: value for key, value in net.state_dict().items() if key.endswith("num_batches_tracked")}
    net.load_state_dict(state | counters)
    return net.eval().requires_grad_(False), metadata


class ClassifierFeatures(FeatureExtractor):
    """64 features and 10 logits of a small classifier: ``digits``, ``mnist``, ``fashion_mnist``, or one's own.

    Args:
        name: which of the shipped ones.
        weights: a file of :mod:`ornstein.metrics.train_features` instead of the shipped one.

    Raises: ValueError for an unknown name without ``weights``, or a file that is missing or damaged.
    """

    agreed_samples = 10_000  # the size of MNIST's and Fashion-MNIST's test sets

    def __init__(self, name: str, weights: str | Path | None = None) -> None:
        super().__init__()
        if weights is None and name not in BUNDLED:
            raise OrnsteinError(
                f"no feature weights are shipped for {name!r}; use one of {', '.join(BUNDLED)}, or give "
                "metrics.features.weights=FILE from `python -m ornstein.metrics.train_features`."
            )
        self.net, self.metadata = load_classifier(bundled_path(name) if weights is None else weights)
        self.name = name
        self.size: int = self.metadata["size"]
        self.num_features = self.net.neck.out_features
        self.num_logits = self.num_classes = self.net.head.out_features
        self.fingerprint = fingerprint_of(self.net.state_dict(), preparation=f"luma, resize to {self.size}, [-1, 1]")
        self.eval()

    @torch.no_grad()
    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features ``(B, 64)`` and logits ``(B, num_classes)`` of uint8 images ``(B, 1 or 3, H, W)``."""
        return self.net(to_gray(images, self.size))


class DigitsFeatures(ClassifierFeatures):
    """The feature space of the default run: 64 features of a classifier of handwritten digits, 8x8 gray.

    Args:
        weights: a file of ``python -m ornstein.metrics.train_digits_features`` instead of the shipped one.
    """

    default_samples = agreed_samples = 1438  # as many as there are training scans

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__("digits", weights)

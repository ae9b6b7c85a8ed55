"""The Inception features of published FIDs, through torch-fidelity's port of the original TensorFlow graph.

Only this network, with its own resize, gives figures that can stand beside a paper's. Its weights (91 MB) come in
no package: they are looked for, in this order, in ``weights=`` (a file, or a folder that holds it),
``$ORNSTEIN_WEIGHTS`` (likewise), and torch's hub cache, where torch-fidelity itself puts them; on a connected
machine they are then downloaded there from torch-fidelity's release, and checked against its checksum.
"""

import contextlib
import hashlib
import os
import pickle
import urllib.error
import urllib.request
from pathlib import Path

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.metrics.features import FeatureExtractor, check_images

FILE_NAME = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE_NAME}"
CHECKSUM = "6726825d"  # start of the file's SHA-256, which torch.hub's naming puts into the name
CONNECT_SECONDS = 10.0


class WeightsMissing(OrnsteinError):
    """Weights that no package carries are not at hand and could not be downloaded; the message says what to do."""


def inception_weights(weights: str | Path | None = None, *, download: bool = True) -> Path:
    """The file that holds Inception's weights.

    Args:
        weights: a file, or a folder that holds :data:`FILE_NAME`; None looks in the other places.
        download: fetch them if they are nowhere (10 s to connect; the checksum must fit).

    Raises: WeightsMissing, with the places looked in and what to do.
    """
    places: list[Path] = []
    cached = Path(torch.hub.get_dir()) / "checkpoints" / FILE_NAME
    if weights is not None:
        places.append(_file_in(Path(weights).expanduser()))
    else:
        if os.environ.get("ORNSTEIN_WEIGHTS"):
            places.append(_file_in(Path(os.environ["ORNSTEIN_WEIGHTS"]).expanduser()))
        places.append(cached)
    for place in places:
        if place.is_file():
            return place
    reason = "downloading is switched off"
    if weights is not None:
        reason = "metrics.features.weights names that place alone"
    elif download:
        try:
            _download(cached)
            return cached
        except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError is a wrong checksum
            reason = f"the download failed: {error}"
    raise WeightsMissing(
        f"Inception's weights are not at {' or '.join(map(str, places))} ({reason}); fetch {URL} on a connected "
        "machine and give the file as metrics.features.weights=FILE or in $ORNSTEIN_WEIGHTS, or choose another "
        "feature space (metrics=digits, mnist, fashion_mnist) or none (metrics=none)."
    )


def _file_in(place: Path) -> Path:
    return place / FILE_NAME if place.is_dir() else place


def _download(target: Path) -> None:
    """Fetch the weights into ``target``: whole and with the right checksum, or not at all."""
    request = urllib.request.Request(URL, method="HEAD")  # fails fast offline, where hub's own request could hang
    with contextlib.closing(urllib.request.urlopen(request, timeout=CONNECT_SECONDS)):
        pass
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.hub.download_url_to_file(URL, str(target), hash_prefix=CHECKSUM, progress=False)


class InceptionFeatures(FeatureExtractor):
    """2048 features and 1008 (unbiased) logits of Inception v3 as published FIDs, KIDs and ISs use them.

    Images of any size are resized to 299x299 by TensorFlow 1's bilinear rule inside the network (no antialiasing:
    that too belongs to the published metric); gray images are repeated over three channels.

    Args:
        weights: file or folder; None looks in ``$ORNSTEIN_WEIGHTS`` and torch's hub cache.
        download: fetch the weights where they are missing.

    Attributes:
        official: the file is the published one (by checksum); otherwise figures compare with nobody's.

    Raises: WeightsMissing if there are no weights; ValueError if the file is not such weights.
    """

    num_features = 2048
    num_logits = 1008
    num_classes = None
    default_splits = 10

    def __init__(self, weights: str | Path | None = None, download: bool = True) -> None:
        super().__init__()
        path = inception_weights(weights, download=download)
        try:
            # torch-fidelity unpickles without restrictions: only a file that loads with them goes there.
            torch.load(path, map_location="cpu", weights_only=True)
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

            self.net = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, TypeError) as error:
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise OrnsteinError(
                f"{path} does not hold torch-fidelity's Inception weights ({line}); fetch {URL} again."
            ) from error
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.official = digest.startswith(CHECKSUM)
        self.name = "inception"
        self.fingerprint = digest
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features ``(B, 2048)`` and unbiased logits ``(B, 1008)`` of uint8 images ``(B, 1 or 3, H, W)``."""
        check_images(images)
        features, logits = self.net(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)
        return features, logits

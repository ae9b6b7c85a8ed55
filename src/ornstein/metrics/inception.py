"""The Inception features of published FIDs, through torch-fidelity's port of the original TensorFlow graph.

Only this network, with its own resize, gives figures that can stand beside a paper's. Its weights (91 MB) come in
no package: they are looked for, in this order, in ``weights=`` (a file, or a folder that holds it),
``$ORNSTEIN_WEIGHTS`` (likewise), and torch's hub cache, where torch-fidelity itself puts them; on a connected
machine they are then downloaded there from torch-fidelity's release, and checked against its checksum.
"""

import hashlib
import os
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.metrics.download import fetch
from ornstein.metrics.features import FeatureBatch, FeatureExtractor, WeightsMissing, check_images
from ornstein.metrics.resizing import bicubic

FILE_NAME = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE_NAME}"
CHECKSUM = "6726825d"  # start of the file's SHA-256, which torch.hub's naming puts into the name
SIZE = 299
RESIZES = {"tf1": "tf1", "legacy_tensorflow": "tf1", "clean": "clean", "legacy_pytorch": "legacy_pytorch"}
"""Ways to bring images to 299 pixels, by all their names."""
_SPATIAL_CHANNELS = 7
_CHUNK = 64  # images at once: their first maps take 180 MB


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
            fetch(URL, cached, checksum=CHECKSUM)
            return cached
        except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError is a wrong checksum
            reason = f"the download failed: {error}"
    raise WeightsMissing(
        f"Inception's weights are not at {' or '.join(map(str, places))} ({reason}); fetch {URL} on a connected "
        "machine and give the file as metrics.features.weights=FILE or in $ORNSTEIN_WEIGHTS, or choose another "
        "feature space (metrics=efficientnet, whose weights come with a package; digits, mnist, fashion_mnist) or none "
        "(metrics=none)."
    )


def _file_in(place: Path) -> Path:
    return place / FILE_NAME if place.is_dir() else place


def check_resize(mode: str) -> None:
    """Raises ValueError for a way to resize that there is not."""
    if mode not in RESIZES:
        raise OrnsteinError(f"metrics.features.resize={mode} is unknown; choose one of {', '.join(RESIZES)}.")


def resize(images: Tensor, mode: str) -> Tensor:
    """uint8 ``(B, 3, H, W)`` to float32 ``(B, 3, 299, 299)`` in [0, 255], not rounded.

    Args:
        images: of any size.
        mode: ``tf1`` is TensorFlow 1's bilinear rule, without antialiasing and with corners where no other library
            has them (``legacy_tensorflow`` in clean-fid); ``clean`` is Pillow's antialiased bicubic of each channel in
            float; ``legacy_pytorch`` is torch's bilinear without antialiasing.

    Source: Parmar et al. 2022 (arXiv 2104.11222) for what they do to a FID.
    """
    pixels = images.float()
    if RESIZES[mode] == "tf1":
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        found: Tensor = interpolate_bilinear_2d_like_tensorflow1x(pixels, size=(SIZE, SIZE), align_corners=False)
        return found
    if mode == "clean":
        return bicubic(images, (SIZE, SIZE))
    return F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", align_corners=False).clamp(0, 255)


class InceptionFeatures(FeatureExtractor):
    """2048 features and 1008 (unbiased) logits of Inception v3 as published FIDs, KIDs and ISs use them.

    Images of any size are resized to 299x299, by default by TensorFlow 1's bilinear rule (no antialiasing: that too
    belongs to the published metric); gray images are repeated over three channels. The spatial features are those of
    ADM's evaluator for sFID: the first seven channels of the 17x17 map ``mixed_6/conv``, 2,023 numbers in the order
    of rows, columns, channels, so that published ``mu_s`` and ``sigma_s`` fit.

    Args:
        weights: file or folder; None looks in ``$ORNSTEIN_WEIGHTS`` and torch's hub cache.
        download: fetch the weights where they are missing.
        resize: ``tf1`` (also named ``legacy_tensorflow``), ``clean`` or ``legacy_pytorch``; see :func:`resize`. The
            last also scales pixels as pytorch-fid does. Figures of different resizes do not compare: it is part of the
            fingerprint, and stands in the name.

    Attributes:
        official: the file is the published one (by checksum); otherwise figures compare with nobody's.

    Raises: WeightsMissing if there are no weights; ValueError if the file is not such weights or the resize unknown.

    Source: Nash et al. 2021 (arXiv 2103.03841) for sFID.
    """

    num_features = 2048
    num_logits = 1008
    num_classes = None
    num_spatial = 17 * 17 * _SPATIAL_CHANNELS
    default_splits = 10

    def __init__(self, weights: str | Path | None = None, download: bool = True, resize: str = "tf1") -> None:
        super().__init__()
        check_resize(resize)
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
        self.resize = RESIZES[resize]
        self.name, self.fingerprint = "inception", digest
        if self.resize != "tf1":
            self.name = f"inception_{self.resize}"
            self.fingerprint = hashlib.sha256(f"{digest} {self.resize}".encode()).hexdigest()
        self.eval().requires_grad_(False)

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features ``(B, 2048)`` and unbiased logits ``(B, 1008)`` of uint8 images ``(B, 1 or 3, H, W)``."""
        found = self.all_features(images)
        return found.features, found.logits

    @torch.no_grad()
    def all_features(self, images: Tensor) -> FeatureBatch:
        """Features ``(B, 2048)``, unbiased logits ``(B, 1008)`` and spatial features ``(B, 2023)``."""
        check_images(images)
        parts = [self._look(chunk) for chunk in images.split(_CHUNK)]
        features, logits, spatial = (torch.cat(each) for each in zip(*parts, strict=True))
        return FeatureBatch(features, logits, spatial)

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = resize(images.expand(-1, 3, -1, -1), self.resize)
        x = x / 255 * 2 - 1 if self.resize == "legacy_pytorch" else (x - 128) / 128
        spatial = x
        for name, layer in self.net.named_children():  # in order: a plain chain of blocks, then the classifier
            if name == "fc":
                break
            x = layer(x)
            if name == "Mixed_6d":  # TensorFlow's mixed_6; its branch `conv` comes first among the channels
                spatial = x[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = x.flatten(1)
        return x, x.mm(self.net.fc.weight.T), spatial

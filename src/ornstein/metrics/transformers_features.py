"""Feature spaces of large self- and language-supervised networks, through transformers: DINOv2 and CLIP.

No package carries them: a folder as ``save_pretrained`` leaves it, or a hub name, taken from the local cache or
downloaded on a connected machine. Images are resized by Pillow, as the published figures' code does it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.metrics.clip_score import MEAN, STD, preparation_of
from ornstein.metrics.features import FeatureExtractor, check_images, fingerprint_of
from ornstein.metrics.hub import load_model
from ornstein.metrics.resizing import centre_square, normalised, pillow_bicubic

DINOV2, CLIP = "facebook/dinov2-large", "openai/clip-vit-large-patch14-336"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DinoFeatures(FeatureExtractor):
    """The class token of DINOv2 after its last norm: the space of FD-DINOv2 (``fd_dinov2``).

    Images are brought to 224x224 by Pillow's bicubic rule, whatever their shape, and scaled by ImageNet's statistics.

    Args:
        weights: folder of a transformers DINOv2, or its hub name; None is ViT-L/14, which published figures use.
        image_size: side in pixels, a multiple of the network's patch (14).
        download: a name that is not in the local cache may be downloaded.

    Raises: WeightsMissing, one sentence, if there is no such model at hand; ValueError if it is no DINOv2, or the
        size does not fit it.

    Source: Stein et al. 2023 (arXiv 2306.04675), with the preparation of their code; Oquab et al. 2023 (2304.07193).
    """

    name = "dinov2"
    suffix = "_dinov2"
    num_logits = num_classes = None

    def __init__(self, weights: str | Path | None = None, image_size: int = 224, download: bool = True) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        name = str(weights or DINOV2)

        def load(local: bool) -> Any:
            kind = AutoConfig.from_pretrained(name, local_files_only=local).model_type
            if not kind.startswith("dinov2"):
                raise ValueError(f"it is a {kind} model")
            return AutoModel.from_pretrained(name, local_files_only=local, dtype=torch.float32)

        self.net = load_model(name, load, what="a transformers DINOv2", download=download)
        patch = int(self.net.config.patch_size)
        if image_size < patch or image_size % patch:
            raise OrnsteinError(f"metrics.features.image_size={image_size} must be a multiple of DINOv2's {patch}.")
        self.image_size = image_size
        self.num_features = int(self.net.config.hidden_size)
        self.fingerprint = fingerprint_of(self.net.state_dict(), preparation=f"Pillow bicubic to {image_size}")
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features ``(B, num_features)`` of uint8 images ``(B, 1 or 3, H, W)``; there are no logits."""
        check_images(images)
        pixels = pillow_bicubic(images.expand(-1, 3, -1, -1), self.image_size).float()
        return self.net(pixel_values=normalised(pixels, IMAGENET_MEAN, IMAGENET_STD)).pooler_output, None


class ClipFeatures(FeatureExtractor):
    """CLIP's projected image embedding at length 1: the space of CMMD (``cmmd``), and of ``fd_clip``.

    Of images that are not square the middle square counts; it is brought to the network's size by Pillow's bicubic
    rule.

    Args:
        weights: folder of a transformers CLIP, or its hub name; None is ViT-L/14 at 336 pixels, which CMMD uses.
        download: a name that is not in the local cache may be downloaded.

    Raises: WeightsMissing, one sentence, if there is no such model at hand; ValueError if it is no CLIP.

    Source: Jayasumana et al. 2024 (arXiv 2401.09603), with the preparation of their code.
    """

    name = "clip"
    suffix = "_clip"
    num_logits = num_classes = None
    agreed_samples = 30_000

    def __init__(self, weights: str | Path | None = None, download: bool = True) -> None:
        super().__init__()
        from transformers import AutoConfig, CLIPModel, CLIPVisionModelWithProjection

        name = str(weights or CLIP)

        def load(local: bool) -> tuple[Any, dict[str, Any]]:
            kind = AutoConfig.from_pretrained(name, local_files_only=local).model_type
            if kind not in ("clip", "clip_vision_model"):
                raise ValueError(f"it is a {kind} model")
            # The vision class alone would take the projection's width from another place of a whole CLIP's config.
            network = CLIPModel if kind == "clip" else CLIPVisionModelWithProjection
            net = network.from_pretrained(name, local_files_only=local, dtype=torch.float32)
            return net, preparation_of(name, local=local)

        net, preparation = load_model(name, load, what="a transformers CLIP", download=download)
        self.vision, self.projection = net.vision_model, net.visual_projection
        self.mean: Sequence[float] = preparation.get("image_mean", MEAN)
        self.std: Sequence[float] = preparation.get("image_std", STD)
        self.image_size = int(self.vision.config.image_size)
        self.num_features = int(self.projection.out_features)
        line = f"centre square, Pillow bicubic to {self.image_size}, mean {list(self.mean)}, std {list(self.std)}"
        self.fingerprint = fingerprint_of(self.state_dict(), preparation=line)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features ``(B, num_features)`` of length 1 of uint8 images ``(B, 1 or 3, H, W)``; there are no logits."""
        check_images(images)
        square = centre_square(images.expand(-1, 3, -1, -1))
        pixels = normalised(pillow_bicubic(square, self.image_size).float(), self.mean, self.std)
        embeddings = self.projection(self.vision(pixel_values=pixels).pooler_output)
        return torch.nn.functional.normalize(embeddings, dim=-1), None

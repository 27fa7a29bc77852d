"""Students of timm by name (timm:NAME), with timm's own pooling and an embedding layer in place of its classifier.

With ``rank`` they are EdgeFace's (George et al., IEEE T-BIOM 2024, arXiv 2307.01838): its XS, of gamma 0.6, is
``timm:edgenext_x_small:rank=0.6``, and S ``timm:edgenext_small:rank=0.5``. Parameters have the names that EdgeFace's
code gives them.
"""

import torch
from torch import Tensor, nn

from arcface_kd.backbones.face_backbone import FaceBackbone
from arcface_kd.errors import ConfigError, first_line

_SIZE = 112


class LowRankLinear(nn.Module):
    """A fully connected layer as the product of two narrow ones, of some rank."""

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool) -> None:
        super().__init__()
        self.linear1 = nn.Linear(in_features, rank, bias=False)
        self.linear2 = nn.Linear(rank, out_features, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        product: Tensor = self.linear2(self.linear1(features))
        return product


def _lower_ranks(module: nn.Module, share: float) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            rank = max(2, int(share * min(child.in_features, child.out_features)))
            low = LowRankLinear(child.in_features, child.out_features, rank, bias=child.bias is not None)
            setattr(module, name, low)
        else:
            _lower_ranks(child, share)


class TimmNetwork(FaceBackbone):
    """A timm model with fresh weights, for 112x112 faces; ``fp16`` is autocast up to the last map.

    ``model`` is its name in timm, ``rank`` that of each fully connected layer, as a share of its smaller side, in (0,
    1]; None leaves them as they are. A ConfigError says that there is no timm, no such model, one that does not embed
    112x112 images, or a rank out of range.
    """

    def __init__(self, model: str, *, rank: float | None = None, fp16: bool = False, num_features: int = 512) -> None:
        super().__init__(fp16=False)
        if rank is not None and not 0 < rank <= 1:
            raise ConfigError(f"rank={rank!r}: wanted more than 0 and at most 1")
        try:
            import timm
        except ImportError as error:
            raise ConfigError(f"network timm:{model} needs timm: pip install timm") from error
        # A torchvision built for another torch raises RuntimeError, for one.
        except Exception as error:
            raise ConfigError(f"network timm:{model}: timm cannot be imported here: {first_line(error)}") from error
        if not timm.is_model(model):
            raise ConfigError(f"network timm:{model}: timm {timm.__version__} has no model of that name")
        known = timm.get_pretrained_cfg(model)
        # Transformers are built for one size of images, and others do not take the argument.
        size = {"img_size": _SIZE} if known is not None and known.fixed_input_size else {}
        try:
            self.model: nn.Module = timm.create_model(model, pretrained=False, num_classes=num_features, **size)
            if rank is not None:
                _lower_ranks(self.model, rank)
            # Some networks build for any size and run for few.
            with torch.no_grad():
                self.eval()(torch.zeros(1, 3, _SIZE, _SIZE))
        # timm raises what the model's own code raises.
        except Exception as error:
            raise ConfigError(
                f"network timm:{model} cannot embed {_SIZE}x{_SIZE} images: {first_line(error) or type(error).__name__}"
            ) from error
        self.train().fp16 = fp16

    def feature_map(self, images: Tensor) -> Tensor:
        """What timm calls the features: (B, C, H, W) of convolutional models, tokens of others."""
        with self.autocast(images, half=self.fp16):
            features: Tensor = self.model.forward_features(images)  # type: ignore[operator]
        return features

    def tail(self, feature_map: Tensor) -> Tensor:
        """Pooling and embedding layer: the features to (B, D)."""
        with self.autocast(feature_map, half=False):
            embeddings: Tensor = self.model.forward_head(  # type: ignore[operator]
                feature_map.float() if self.fp16 else feature_map
            )
        return embeddings

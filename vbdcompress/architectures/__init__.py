"""The paper's networks and the zoo's, by name; torchvision's, timm's and the user's own by reference."""

from vbdcompress.architectures.build import ARCHITECTURES, build_architecture

__all__ = ["ARCHITECTURES", "build_architecture"]

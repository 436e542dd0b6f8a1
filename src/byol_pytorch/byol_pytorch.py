"""The module path of byol-pytorch 0.9.1: importing it says where the class is now."""

raise ImportError(
    "byol_pytorch.byol_pytorch is a module of byol-pytorch 0.9.1; expected the package itself. "
    "Write `from byol_pytorch import BYOL`."
)

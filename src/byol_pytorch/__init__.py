"""BYOL (arXiv 2006.07733) for any backbone: `from byol_pytorch import BYOL`."""

from byol_pytorch.learner import BYOL

__all__ = ["BYOL"]
__version__ = "1.0.0"


def __getattr__(name: str) -> object:
    # Names of byol-pytorch 0.9.1 that are programs here, not library.
    if name in ("BYOLTrainer", "MockDataset"):
        raise ImportError(
            f"{name} is not part of byol_pytorch 1.0: the training loop is yours. "
            "examples/quickstart.py is a whole run, on your own folder of images with --data."
        )
    raise AttributeError(f"module 'byol_pytorch' has no attribute {name!r}")

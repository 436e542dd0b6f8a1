"""Settings of a pre-training by the number of images: the rule table of docs/pretraining.md."""

from typing import Any

BATCH = 256  # lightly's ImageNet benchmark of BYOL
STEPS = 20_000  # about what CIFAR's 50,000 images get in lightly's 200 epochs of 512 images
EPOCHS = (100, 800)  # at least the paper's shortest run, at most SimSiam's on CIFAR


def by_amount(images: int) -> dict[str, Any]:
    """Fields of imagenet_ddp.py's recipe."""
    batch = 2
    while batch < BATCH and 2 * batch <= images / 4:
        batch *= 2
    epoch_steps = max(1, images // batch)
    epochs = min(max(-(-STEPS // epoch_steps), EPOCHS[0]), EPOCHS[1])
    return {
        "batch_size": batch,
        "epochs": epochs,
        "base_decay": base_decay(epochs * epoch_steps),
        "warmup_epochs": 10,
    }


def base_decay(steps: int) -> float:
    """The paper's 0.996 (section 3.2) is for 300,000 updates, DeepMind's 0.99 for 30,000: in fewer
    the target must follow faster."""
    return 0.97 if steps < 3_000 else 0.99 if steps < 100_000 else 0.996

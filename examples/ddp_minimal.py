"""BYOL pre-training on one screen and a half, to paste and change: one process, or torchrun.

    torchrun --nproc-per-node=8 ddp_minimal.py --data imagenet/train --model resnet50

--data holds one folder of images for each class; the classes are not used. Every epoch is saved in
--output (on a disk that all nodes share), and the same command started again goes on from there,
bit for bit on a CPU. imagenet_ddp.py beside this has what a long run wants: accuracies on the way,
alarms, broken images, crops of the originals, more recipes.
"""

import argparse
import os
import time
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from byol_pytorch import BYOL, checkpoint
from byol_pytorch.heads import sync_batchnorm
from byol_pytorch.optim import LARS, param_groups, scaled_lr, warmup_cosine

# DeepMind's for 100 to 300 epochs; for 1000 a decay of 0.996, 1.5e-6 and --lr 0.2.
EMA_DECAY, WEIGHT_DECAY, WARMUP_EPOCHS = 0.99, 1e-6, 10
IMAGE_SIZE = 224  # pixels, of the views
DECODED_SIZE = 320  # the squares that they are cut from: smaller is faster, and upsamples more
LOG_EVERY = 50  # steps
WORKERS = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-train a timm backbone with BYOL.")
    parser.add_argument("--data", type=Path, required=True, help="folder of folders of images")
    parser.add_argument("--model", default="resnet50", help="timm's name")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1024, help="images a step, over all processes")
    parser.add_argument("--lr", type=float, default=0.45, help="for 256 images, scaled linearly")
    parser.add_argument("--output", type=Path, default=Path("runs/minimal"))
    args = parser.parse_args()

    distributed, cuda = "RANK" in os.environ, torch.cuda.is_available()  # torchrun sets RANK
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    if distributed:
        dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)

    # The workers make squares of one size, as uint8; the learner makes the views of a whole batch.
    square = [v2.Resize(DECODED_SIZE), v2.CenterCrop(DECODED_SIZE), v2.PILToTensor()]
    images = ImageFolder(args.data, v2.Compose(square))
    if args.batch % world or not world <= args.batch <= len(images):
        raise SystemExit(
            f"--batch {args.batch} with {world} processes and {len(images)} images; expected a "
            "multiple of the processes, and at most all images."
        )
    sampler = DistributedSampler(images, world, rank, drop_last=True)
    loader = DataLoader(
        images, args.batch // world, sampler=sampler, drop_last=True, num_workers=WORKERS,
        persistent_workers=WORKERS > 0, pin_memory=cuda,
    )  # fmt: skip
    epoch_steps = len(loader)
    steps = args.epochs * epoch_steps
    warmup_steps = min(WARMUP_EPOCHS * epoch_steps, steps // 10)

    torch.manual_seed(0)  # the same weights in all processes
    net = sync_batchnorm(timm.create_model(args.model, num_classes=0))
    learner = BYOL(net, IMAGE_SIZE, moving_average_decay=EMA_DECAY, total_steps=steps)
    learner.to(device, memory_format=torch.channels_last)
    # A ViT wants torch.optim.AdamW here, WEIGHT_DECAY 0.1 and an --lr of about 1.5e-4.
    optimizer = LARS(param_groups(learner, WEIGHT_DECAY), lr=0.0)

    # What the run is; going on with something else would mix two runs.
    run = {name: getattr(args, name) for name in ("model", "epochs", "batch", "lr")}
    run["images"], first_epoch, last = len(images), 0, args.output / "last.pt"
    if last.exists():
        state = checkpoint.load(last)
        if state["run"] != run:
            raise SystemExit(f"{last} is of {state['run']}, this is {run}: give another --output.")
        learner.load_state_dict(state["learner"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch = state["epochs"]
    model = DistributedDataParallel(learner) if distributed else learner

    step = logged = first_epoch * epoch_steps
    since = time.perf_counter()
    for epoch in range(first_epoch, args.epochs):
        sampler.set_epoch(epoch)
        for batch, _ in loader:
            lr = warmup_cosine(step, steps, warmup_steps, scaled_lr(args.lr, args.batch))
            for group in optimizer.param_groups:
                group["lr"] = lr
            # Each step's own draws, other ones in each process: nothing of them has to be saved.
            torch.manual_seed(step * world + rank)
            batch = batch.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                loss = model(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            learner.update_moving_average()
            step += 1
            if rank == 0 and step % LOG_EVERY == 0:
                shown = f"loss {loss.item():.4f}  lr {lr:.4f}"  # waits for the device
                speed = (step - logged) * args.batch / (time.perf_counter() - since)
                print(f"step {step}/{steps}  {shown}  {speed:.0f} images/s", flush=True)
                logged, since = step, time.perf_counter()
        if rank == 0:
            state = {"learner": learner.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.save(state | {"epochs": epoch + 1, "run": run}, last)
            std = learner.diagnostics(batch)["feature_std"]  # one that goes to 0 is collapse
            print(f"epoch {epoch + 1}/{args.epochs} saved  feature_std {std:.4f}", flush=True)

    # timm.create_model(model, num_classes=0, checkpoint_path="backbone.safetensors") takes it.
    checkpoint.export_backbone(learner, args.output / "backbone.safetensors")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

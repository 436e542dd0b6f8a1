"""Every error and warning of the library on one page: messages.json, for a reader and for a diff.

A case is one line of CASES: a key, and the call that raises or warns; `f` is a folder of its own.
After a change of wording, or a new case, look at the diff of

    python tests/test_messages.py --update
"""

import ast
import functools
import json
import pickle
import re
import sys
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from unittest import mock

import kornia
import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.ao import quantization
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import byol_pytorch
from byol_pytorch import BYOL, optim
from byol_pytorch import evaluation as ev
from byol_pytorch.augment import byol_views, channel_statistics, local_views, per_image, stages
from byol_pytorch.checkpoint import (
    export_backbone,
    keep_last,
    load,
    load_backbone,
    same_padding,
    save,
)
from byol_pytorch.evaluation import features, protocols, rows, svm
from byol_pytorch.heads import BatchNorm, sync_batchnorm

SOURCES = Path(byol_pytorch.__file__).parent
SNAPSHOT = Path(__file__).with_name("messages.json")
# Statements that no call on one CPU reaches: "file: function", and why.
UNREACHED: dict[str, str] = {}

pytestmark = pytest.mark.xdist_group("messages")

# ---- what the cases are made of ------------------------------------------------------------------

HEADS = {"projection_size": 4, "projection_hidden_size": 8}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.never, self.twice, self.blind = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(4, 6)
        self.fc = nn.Linear(6, 5)

    def features(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 32:
            raise RuntimeError("this network takes up to 32 pixels")
        return self.norm(self.conv(x)).relu().mean((2, 3))

    def forward(self, x: Tensor) -> Any:
        x = self.features(x)
        return self.fc(self.twice(self.twice(x)) + self.blind(x.new_ones(len(x), 4)))


def network(forward: Callable[[Any, Tensor], Any], **parts: Any) -> nn.Module:
    """A Small with another forward."""
    net = type("Network", (Small,), {"forward": forward})()
    for name, part in parts.items():
        setattr(net, name, part)
    return net


def wrap(net: Any = None, image_size: Any = 16, **kwargs: Any) -> BYOL:
    return BYOL(Small() if net is None else net, image_size, **{**HEADS, **kwargs})


def noise(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


X, BIG = noise(4, 3, 16, 16), noise(4, 3, 16, 16) * 255
ROWS, LABELS = noise(12, 5), torch.tensor([0, 1, 2] * 4)
SHIFT = noise(4, 1)
PAIRS = torch.tensor([[1, 0], [0, 1]] * 6)


def own(function: Callable[[Tensor], Any]) -> Any:
    """What a learner does whose augmentation is this function."""
    return wrap(augment_fn=function)(X)


def shape_of(*arguments: Any, **kwargs: Any) -> Callable[[Path], Any]:
    return lambda f: wrap(augment_fn=nn.Identity())(*arguments, **kwargs)


def flipped(images: Tensor) -> Tensor:
    return images.flip(-1)


def padded() -> nn.Module:
    net = timm.create_model("resnet10t")
    same_padding(net)
    return net


def built(**kwargs: Any) -> Callable[[Path], Any]:
    return lambda f: wrap(**kwargs)


def after(change: Callable[[BYOL], Any], use: Callable[[BYOL], Any], **kwargs: Any) -> Any:
    learner = wrap(**kwargs)
    change(learner)
    return use(learner)


def written(f: Path, state: Any, name: str = "state.pt") -> Path:
    torch.save(state, f / name)
    return f / name


def pickled(f: Path, state: Any) -> Path:
    (f / "state.pkl").write_bytes(pickle.dumps(state, protocol=2))
    return f / "state.pkl"


def exported(f: Path, **kwargs: Any) -> Path:
    export_backbone(Small(), f / "net.safetensors", **kwargs)
    return f / "net.safetensors"


def bytes_in(f: Path, content: bytes, name: str) -> Path:
    (f / name).write_bytes(content)
    return f / name


def deepmind(f: Path, padding: Any, **params: Any) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from checkpoint_helpers import write_deepmind
    from numpy_resnet import BASIC, NumpyResNet

    reference = NumpyResNet(*BASIC)
    write_deepmind(reference.params | params, reference.state, f / "deepmind.pkl")
    net = torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, [1, 2, 1, 1])
    net.fc = nn.Identity()
    load_backbone(f / "deepmind.pkl", net, padding=padding)


def knn(**kwargs: Any) -> Any:
    return ev.knn_accuracy(**{"bank": ROWS, "bank_labels": LABELS, "k": 1, **kwargs})


def probed(
    train: Any = ROWS, labels: Any = LABELS, test: Any = ROWS, truth: Any = LABELS, **kwargs: Any
) -> Any:
    return ev.linear_probe(train, labels, test, truth, protocol=TINY, **kwargs)


def svms(a: Any = ROWS, la: Any = LABELS, b: Any = ROWS, lb: Any = LABELS, **kwargs: Any) -> Any:
    return ev.svm_map(a, la, b, lb, **{"costs": (1.0,), "folds": 2, **kwargs})


def read(batches: Any, net: Any = None, **kwargs: Any) -> Any:
    return ev.extract_features(Small() if net is None else net, batches, **kwargs)


def of_two(call: Callable[[], Any], counts: tuple[int, ...] = (3, 1), own: bool = False) -> Any:
    """As the first of two processes, of which the other says `counts`, or what this one says."""

    def gather(into: list[Any], mine: Any) -> None:
        into[:] = [mine, mine] if own else [(count, "") for count in counts]

    with (
        mock.patch.object(rows, "world_size", return_value=2),
        mock.patch.object(features, "process", return_value=(0, 2)),
        mock.patch.object(rows, "process", return_value=(0, 2)),
        mock.patch.object(rows.dist, "all_gather_object", gather),
    ):
        return call()


TINY = protocols.Protocol(1, 8, (0.1,))
GROUP = {"params": [nn.Parameter(torch.ones(2))]}
NAN = ROWS.clone().index_fill_(0, torch.tensor([3]), float("nan"))

# ---- the cases -----------------------------------------------------------------------------------


def endless() -> dict[str, Any]:
    state: dict[str, Any] = {}
    state["state"] = state
    return state


def zipped(f: Path) -> Path:
    with zipfile.ZipFile(f / "x.pt", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    return f / "x.pt"


def into_shards(f: Path) -> Any:
    path = exported(f)
    with mock.patch("byol_pytorch.checkpoint.backbones.is_sharded", return_value=True):
        return load_backbone(path, Small())


def two_sizes(image: Tensor) -> Tensor:
    return image[:, : 8 + int(image[0, 0, 0] == X[0, 0, 0, 0])]


def of_another(f: Path) -> Any:
    export_backbone(timm.create_model("resnet10t", num_classes=0), f / "net.safetensors")
    twin = timm.create_model("resnet10t", num_classes=0)
    twin.default_cfg = {**twin.default_cfg, "architecture": "another"}
    return load_backbone(f / "net.safetensors", twin)


def drawn(view: Any) -> Any:
    return view.forward_parameters(X.shape)


def uncuttable(folder: Path) -> Any:
    view = byol_views(16)[0].append(kornia.augmentation.RandomMixUpV2(p=1.0))
    return view.take(drawn(view), slice(0, 2))


def uncompilable(folder: Path) -> Any:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler was found")

    with mock.patch("torch.compile", return_value=broken):
        return byol_views(16, compile=True)[0](X)


Case = tuple[str, Callable[[Path], Any]]

CASES: list[Case] = [
    # the views
    ("views: no preset", lambda f: byol_views(32, "imagnet")),
    ("views: size", lambda f: byol_views(32.0)),
    ("views: chance", lambda f: byol_views(32, flip="0.5")),
    ("views: range", lambda f: byol_views(32, scale=0.5)),
    ("views: kernel", lambda f: byol_views(32, blur_kernel=4)),
    ("views: semantics", lambda f: byol_views(32, semantics="pil")),
    ("views: mean", lambda f: byol_views(32, mean="imagenet")),
    ("views: std", lambda f: byol_views(32, std=(0.2, 0.0, 0.2))),
    ("views: one image", lambda f: byol_views(16)[0](X[0])),
    ("views: integers", lambda f: byol_views(16)[0](X.int())),
    ("views: uncropped", lambda f: byol_views(32, crop=False)[0](X)),
    ("views: draws of others", lambda f: (v := byol_views(16)[0])(X[:2], params=drawn(v))),
    ("views: unknown name", lambda f: byol_views(16, hue_mode="yiq")),
    ("views: dtype", lambda f: byol_views(16, dtype="float16")),
    ("views: other stages", lambda f: (v := byol_views(16)[0])(X, params=drawn(v[1:]))),
    ("views: cannot be cut", uncuttable),
    ("views: quarter turn", lambda f: stages.RandomRotation90((1, 3), p=1.0)(X[..., :8])),
    ("views: not compiled", uncompilable),
    ("views: normalised otherwise", built(augment_fn2=nn.Identity())),
    ("views: mean of others", built(mean=(0.1, 0.2))),
    ("per_image: no tensor", lambda f: per_image(list)(X)),
    ("per_image: sizes", lambda f: per_image(two_sizes)(X)),
    ("local views: number", built(local_views=-1)),
    ("local views: without a number", built(local_size=8)),
    (
        "local views: a size without one of images",
        built(image_size=None, example_input=X, local_views=1, local_size=8),
    ),
    ("local views: none by default", lambda f: wrap(augment_fn=flipped, local_views=1)(X)),
    ("local views: no callable", built(local_views=1, local_augment_fn="crop")),
    (
        "local views: normalised otherwise",
        lambda f: wrap(local_views=1, local_augment_fn=local_views(8, mean=None, std=None)),
    ),
    ("local views: one size alone", built(image_size=32, local_views=1, local_size=48)),
    ("local views: none came", lambda f: wrap(local_views=1, local_size=8)(X, X)),
    (
        "local views: fewer images",
        lambda f: wrap(local_views=1, local_size=8)(X, X, local_views=[X[:1, :, :8, :8]]),
    ),
    ("export: a folder of no timm network", lambda f: export_backbone(Small(), f / "folder")),
    ("export: a folder of one that pads", lambda f: export_backbone(padded(), f / "folder")),
    ("channel_statistics: none", lambda f: channel_statistics([])),
    ("channel_statistics: channels", lambda f: channel_statistics([X, X[:, :1]])),
    ("channel_statistics: constant", lambda f: channel_statistics([X * 0])),
    ("channel_statistics: type", lambda f: channel_statistics(["cat.jpg"])),
    ("channel_statistics: dtype", lambda f: channel_statistics([X.int()])),
    # the package
    ("package: a name of 0.9.1", lambda f: byol_pytorch.BYOLTrainer),
    ("package: the module path of 0.9.1", lambda f: import_module("byol_pytorch.byol_pytorch")),
    ("package: an unknown name", lambda f: byol_pytorch.Byol),
    # networks
    ("net: a name", lambda f: wrap("resnet50")),
    ("net: wrapped", lambda f: wrap(nn.DataParallel(Small()))),
    ("net: no weights", lambda f: wrap(nn.Flatten())),
    ("net: under inference_mode", torch.inference_mode()(lambda f: wrap())),
    ("net: TorchScript", lambda f: wrap(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1))))),
    ("net: batch norm of its own", lambda f: sync_batchnorm(nn.Sequential(nn.LazyBatchNorm2d()))),
    ("net: batch norm of a vector", lambda f: BatchNorm(4, sync=None)(X[0, 0, 0, :4])),
    ("pool: with weights", built(pool=nn.Linear(6, 6), hidden_layer="norm")),
    ("net: quantised", lambda f: wrap(nn.Sequential(Small(), quantization.FakeQuantize()))),
    ("net: another size", lambda f: wrap(image_size=48)),
    ("net: no copy", lambda f: wrap(network(Small.forward, files=threading.Lock()))),
    # the constructor's arguments
    ("decay: above 1", built(moving_average_decay=1.1)),
    ("total_steps: 0", built(total_steps=0)),
    ("projection_size: 0", built(projection_size=0)),
    ("sem_temperature: 0", built(sem_temperature=0)),
    ("use_momentum: text", built(use_momentum="False")),
    ("sync_batchnorm: text", built(sync_batchnorm="auto")),
    ("hidden_layer: a bool", built(hidden_layer=True)),
    ("augment_fn: a pair", built(augment_fn=(nn.Identity(), nn.Identity()))),
    ("example_input: numpy", built(example_input=np.zeros((1, 3, 16, 16)))),
    ("example_input: empty", built(example_input=X[:0])),
    ("mean: beside augment_fn", built(augment_fn=nn.Identity(), mean=(0.5, 0.5, 0.5))),
    # layers and poolings
    ("hidden_layer: a wrong name", built(hidden_layer="convolution")),
    ("hidden_layer: a wrong index", built(hidden_layer=9)),
    ("hidden_layer: did not run", built(hidden_layer="never")),
    ("hidden_layer: ran twice", built(hidden_layer="twice")),
    ("hidden_layer: does not see the images", built(hidden_layer="blind")),
    ("hidden_layer auto: the last layer ran twice",
     lambda f: wrap(network(lambda net, x: net.never(net.never(net.features(x)))))),
    ("checkpoint: reentrant",
     lambda f: wrap(network(lambda net, x: recompute(net.features, x, use_reentrant=True)))),
    ("gradient: no_grad", lambda f: wrap(network(torch.no_grad()(lambda net, x: net.features(x))))),
    ("pool: unknown", built(hidden_layer="conv", pool="max")),
    ("pool: cls of a map", built(hidden_layer="conv", pool="cls")),
    ("pool: none", built(hidden_layer="conv", pool=None)),
    ("pool: gives no vector", built(hidden_layer="conv", pool=lambda x: x.mean(2))),
    ("pool: gives a list", built(hidden_layer="conv", pool=lambda x: x.mean((2, 3)).tolist())),
    ("pool: one axis", lambda f: wrap(network(lambda net, x: net.features(x).mean(1)))),
    ("pool: tokens", lambda f: wrap(network(lambda net, x: net.conv(x).flatten(2).mT))),
    ("pool: which axis", lambda f: wrap(network(lambda net, x: net.conv(x)[:, :2] * 1))),
    ("pool: several outputs", lambda f: wrap(network(lambda net, x: (net.features(x), x)))),
    ("pool: a Hugging Face tuple", lambda f: wrap(hugging(return_dict=False), 32)),
    ("pool: no pooler", lambda f: wrap(hugging(pooler=False), 32)),
    # the learner
    ("update: without momentum",
     lambda f: wrap(use_momentum=False).update_moving_average()),
    ("update: another head",
     lambda f: after(lambda b: setattr(b, "projector", nn.Linear(6, 4)),
                     lambda b: b.update_moving_average())),
    ("views: none", lambda f: wrap(image_size=None, example_input=X)(X)),
    ("layer: replaced",
     lambda f: after(lambda b: setattr(b.net, "norm", nn.BatchNorm2d(6)),
                     lambda b: b.representation(X), hidden_layer="norm")),
    ("layer: did not run later",
     lambda f: after(lambda b: setattr(b.net, "never", nn.Linear(1, 1)),
                     lambda b: b.representation(X), hidden_layer="fc", net=sometimes())),
    ("timm: sharded by itself", lambda f: sharded_timm()),
    ("batch: one image", lambda f: wrap()(X[:1], X[:1])),
    ("diagnostics: one image", lambda f: wrap().diagnostics(X[:1])),
    # images
    ("images: a list", shape_of(list(X))),
    ("images: not the example's structure",
     lambda f: wrap(two_inputs(), example_input=(X, SHIFT), augment_fn=nn.Identity())(X)),
    ("images: NaN", lambda f: wrap(check_finite=True)(X * float("nan"))),
    ("images: int64", shape_of(X.long())),
    ("images: an empty batch", shape_of(X[:0])),
    ("images: a single one", shape_of(X[0])),
    ("images: five axes", shape_of(X[:, None])),
    ("images: channels last", shape_of(X.permute(0, 2, 3, 1))),
    ("images: one channel", shape_of(X[:, :1])),
    ("images: not the example's axes",
     lambda f: wrap(network(lambda net, x: net.never(x)), None, example_input=noise(2, 6),
                    augment_fn=nn.Identity())(X)),
    ("images warning: up to 255", lambda f: wrap()(BIG)),
    ("images warning: normalised", lambda f: wrap()((X - 0.45) / 0.22)),
    # views
    ("views: uint8", lambda f: wrap()(X, X.byte())),
    ("views: another size", lambda f: wrap()(X[..., :8, :8], X[..., :8, :8])),
    ("views: two shapes", lambda f: wrap()(X, X[:2])),
    ("augment_fn: returns None", lambda f: own(lambda x: None)),
    ("augment_fn: returns numpy", lambda f: own(lambda x: x.numpy())),
    ("augment_fn: returns a pair", lambda f: own(lambda x: (x, x))),
    ("augment_fn: returns a list", lambda f: own(lambda x: list(x))),
    ("augment_fn: returns a dict", lambda f: own(lambda x: {"image": x})),
    ("augment_fn: returns uint8", lambda f: own(lambda x: (x * 255).byte())),
    ("augment_fn: returns one channel", lambda f: own(lambda x: x[:, :1])),
    ("augment_fn: returns half the batch", lambda f: own(lambda x: x[:2])),
    ("augment_fn: returns another structure",
     lambda f: wrap(two_inputs(), example_input=(X, SHIFT), augment_fn=lambda x: x[0])((X, SHIFT))),
    # optim
    ("LARS: lr", lambda f: optim.LARS([GROUP], lr=-0.1)),
    ("LARS: momentum", lambda f: optim.LARS([GROUP], lr=0.1, momentum=1.0)),
    ("LARS: adapt", lambda f: optim.LARS([{**GROUP, "adapt": "no"}], lr=0.1)),
    ("param_groups: a network", lambda f: optim.param_groups(Small(), 0.1)),
    ("param_groups: DDP", lambda f: optim.param_groups(nn.DataParallel(wrap()), 0.1)),
    ("warmup_cosine: too short", lambda f: optim.warmup_cosine(0, 10, 20, 1.0)),
    ("scaled_lr: reference", lambda f: optim.scaled_lr(0.2, 64, 0)),
    ("scaled_decay: ratio", lambda f: optim.scaled_decay(0.99, 0)),
    # checkpoint
    ("save: an object", lambda f: save({"config": {"transform": print}}, f / "x.pt")),
    ("keep_last: none", lambda f: keep_last(f, "*.pt", 0)),
    ("save: itself", lambda f: save(endless(), f / "x.pt")),
    ("save: int4", lambda f: save({"x": torch.zeros(2).to_mkldnn()}, f / "x.pt")),
    ("save: a long integer", lambda f: save({"seed": 2**5000}, f / "x.pt")),
    ("load: a folder", lambda f: load(f)),
    ("load: no file", lambda f: load(f / "x.pt")),
    ("load: safetensors", lambda f: load(exported(f))),
    ("load: another archive", lambda f: load(zipped(f))),
    ("load: no dict", lambda f: load(written(f, [1]))),
    ("load: an object", lambda f: load(written(f, {"net": nn.Linear(1, 1)}))),
    ("load: damaged", lambda f: load(bytes_in(f, b"PK" + bytes(99), "x.pt"))),
    ("load_backbone: padding", lambda f: load_backbone(f / "x.pt", Small(), padding="SAME")),
    ("load_backbone: a learner", lambda f: load_backbone(exported(f), wrap())),
    ("load_backbone: lazy", lambda f: load_backbone(exported(f), nn.LazyLinear(3))),
    ("load_backbone: sharded", into_shards),
    ("load_backbone: several networks",
     lambda f: load_backbone(written(f, {"a": {"w": X}, "b": {"w": X}}), Small())),
    ("load_backbone: another of the same names", of_another),
    ("load_backbone: another network",
     lambda f: load_backbone(exported(f), torchvision.models.resnet18())),
    ("load_backbone: damaged",
     lambda f: load_backbone(bytes_in(f, b"no", "x.safetensors"), Small())),
    ("load_backbone: a pickle",
     lambda f: load_backbone(pickled(f, {"weights": 1}), Small())),
    ("load_backbone: a pickle that runs code",
     lambda f: load_backbone(pickled(f, {"weights": print}), Small())),
    ("load_backbone: a pickle that calls",
     lambda f: load_backbone(bytes_in(f, CALLS, "x.pkl"), Small())),
    ("load_backbone: an array of objects",
     lambda f: load_backbone(pickled(f, np.array([print], object)), Small())),
    ("load_backbone: a torn pickle",
     lambda f: load_backbone(bytes_in(f, pickle.dumps({"a": 1}, 2)[:-3], "x.pkl"), Small())),
    ("load_backbone: DeepMind, no array",
     lambda f: deepmind(f, "same", **{PREFIX + "initial_conv": {"w": [1.0]}})),
    ("load_backbone: DeepMind, another ResNet",
     lambda f: deepmind(f, "same", **{PREFIX + "final_batchnorm": {"w": np.ones(3)}})),
    ("load_backbone: DeepMind's padding", lambda f: deepmind(f, None)),
    ("load_backbone warning: DeepMind's padding", lambda f: deepmind(f, "torch")),
    ("export_backbone: half a normalisation", lambda f: exported(f, mean=(0.5,))),
    ("export_backbone: model_args", lambda f: exported(f, model_args={"norm": nn.ReLU})),
    # evaluation: neighbours
    ("knn: half of the queries", lambda f: knn(queries=ROWS)),
    ("knn: one class", lambda f: knn(bank_labels=LABELS * 0)),
    ("knn: k empty", lambda f: knn(k=())),
    ("knn: k too large", lambda f: knn(k=20)),
    ("knn: temperature", lambda f: knn(temperature=0)),
    ("knn: a list of labels", lambda f: knn(bank_labels=LABELS.tolist())),
    ("knn: several labels", lambda f: knn(bank_labels=PAIRS)),
    ("knn: too few labels", lambda f: knn(bank_labels=LABELS[:-1])),
    ("knn: unlabelled", lambda f: knn(bank_labels=LABELS - 1)),
    ("features: numpy", lambda f: knn(bank=ROWS.numpy())),
    ("features: maps", lambda f: knn(bank=ROWS[..., None])),
    ("features: two widths", lambda f: knn(queries=ROWS[:, :3], query_labels=LABELS)),
    ("features: NaN", lambda f: knn(bank=NAN)),
    # evaluation: linear
    ("linear: held_out", lambda f: probed(held_out=1.5)),
    ("linear: too few labels", lambda f: probed(labels=LABELS[:-1])),
    ("linear: float labels", lambda f: probed(labels=LABELS.float())),
    ("linear: two widths", lambda f: probed(test=ROWS[:, :3])),
    ("linear: num_classes", lambda f: probed(num_classes=0)),
    ("linear: labels out of range", lambda f: probed(num_classes=2)),
    ("linear: an unseen class", lambda f: probed(truth=LABELS + 1, num_classes=4)),
    ("linear: one class", lambda f: probed(labels=LABELS * 0, truth=LABELS * 0)),
    ("linear: NaN", lambda f: probed(train=NAN)),
    ("protocol: optimizer", lambda f: protocols.Protocol(1, 8, (0.1,), optimizer="adam")),
    ("protocol: epochs", lambda f: protocols.Protocol(0, 8, (0.1,))),
    # evaluation: features of a network
    ("extract: uint8", lambda f: read([X.byte()])),
    ("extract: no representation", lambda f: read([X], network(lambda net, x: net.conv(x)[:, :2]))),
    ("extract: no images", lambda f: read([])),
    ("extract: three things", lambda f: read([(X, LABELS[:4], LABELS[:4])])),
    ("extract: labels of some", lambda f: read([(X, LABELS[:4]), X])),
    ("extract: too few labels", lambda f: read([(X, LABELS[:3])])),
    ("extract: NaN", lambda f: read([X * float("nan")])),
    ("extract: device", lambda f: read([X], device="cuda")),
    ("extract: dtype", lambda f: read([X], dtype=torch.float64)),
    ("extract: no (B, D)", lambda f: read([X], lambda x: x)),
    ("extract: stages of no network", lambda f: read([X], lambda x: x, stages={"a": "conv"})),
    ("extract: stages, a list", lambda f: read([X], stages=["conv"])),
    ("extract: stages, a wrong name", lambda f: read([X], stages={"a": "convolution"})),
    ("extract: stages, no map", lambda f: read([X], stages={"a": "fc"})),
    ("extract: stages, ran never", lambda f: read([X], stages={"a": "never"})),
    ("extract: resnet_stages", lambda f: ev.resnet_stages(Small())),
    ("extract: DistributedSampler",
     lambda f: of_two(lambda: read(DataLoader(X, sampler=DistributedSampler(X, 2, 0))))),
    ("extract: uneven processes", lambda f: of_two(lambda: read([X]))),
    ("extract: NaN in one of two processes",
     lambda f: of_two(lambda: ev.extract_features(nn.Flatten(), [NAN]), own=True)),
    # evaluation: SVMs and average precision
    ("svm: folds", lambda f: svms(folds=1)),
    ("svm: costs", lambda f: svms(costs=())),
    ("svm: form", lambda f: svms(metric="coco")),
    ("svm: two widths", lambda f: svms(b=ROWS[:, :3])),
    ("svm: labels of two forms", lambda f: svms(lb=PAIRS)),
    ("svm: too few labels", lambda f: svms(la=LABELS[:-1])),
    ("svm: maps", lambda f: svms(a=ROWS[..., None])),
    ("svm: NaN", lambda f: svms(a=NAN)),
    ("svm: other marks", lambda f: svms(la=PAIRS * 2, lb=PAIRS)),
    ("svm: float classes", lambda f: svms(la=LABELS.float())),
    ("svm: an unseen class", lambda f: svms(lb=LABELS + 1)),
    ("svm: one class", lambda f: svms(la=LABELS * 0)),
    ("svm: a rare class", lambda f: svms(la=torch.tensor([0, 1] * 5 + [1, 2]))),
    ("svm warning: few samples", lambda f: svms(folds=5)),
    ("svm warning: unconverged", lambda f: svms(costs=(1e6,), max_iter=1)),
    ("low-shot: shots", lambda f: ev.low_shot_map(ROWS, LABELS, ROWS, LABELS, shots=(0,))),
    ("low-shot: one class", lambda f: svm.low_shot_sample(PAIRS[:, :1], 1)),
    ("low-shot: too many shots", lambda f: svm.low_shot_sample(LABELS, 9)),
    ("average_precision: shapes", lambda f: ev.average_precision(PAIRS, ROWS)),
    ("average_precision: NaN", lambda f: ev.average_precision(LABELS > 0, NAN[:, 0])),
    ("evaluation: an extra is missing", lambda f: without("sklearn")),
]  # fmt: skip
PREFIX = "res_net/~/"
CALLS = b"\x80\x02cmyproject\nBuilder\n)\x81)R."


def hugging(return_dict: bool = True, pooler: bool = True) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        image_size=32, patch_size=16, return_dict=return_dict,
    )  # fmt: skip
    net = transformers.ViTModel(config, add_pooling_layer=pooler)
    net.config.model_type = "another"
    return net


def sometimes() -> nn.Module:
    """Its last layer runs until another one is replaced."""
    net = network(lambda n, x: n.fc(n.features(x)) if n.never.in_features == 6 else n.features(x))
    return net


def two_inputs() -> nn.Module:
    return network(lambda net, x, shift: Small.forward(net, x) + shift)


def sharded_timm() -> Any:
    net = timm.create_model("resnet10t", channels=(4, 4, 4, 4), num_classes=0)
    net.unshard = print
    return byol_pytorch.backbone.representation.timm_methods(net, X)


def without(package: str) -> Any:
    ours = ("byol_pytorch.evaluation", package)
    kept = {name: module for name, module in sys.modules.items() if name.startswith(ours)}
    for name in kept:
        del sys.modules[name]
    try:
        with mock.patch.dict(sys.modules, {package: None}):
            import byol_pytorch.evaluation  # noqa: F401
    finally:
        sys.modules.update(kept)


# ---- what they say -------------------------------------------------------------------------------


class Outcome(NamedTuple):
    text: str
    reached: frozenset[tuple[str, int]]  # files and lines in the sources


def _inside(trace: TracebackType | None) -> set[tuple[str, int]]:
    found: set[tuple[str, int]] = set()
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if path.is_relative_to(SOURCES):
            found.add((str(path.relative_to(SOURCES)), trace.tb_lineno))
        trace = trace.tb_next
    return found


@functools.cache
def outcome(key: str) -> Outcome:
    """The message that a case gives, and where it comes from."""
    call = dict(CASES)[key]
    said: list[str] = []
    reached: set[tuple[str, int]] = set()

    def warn(message: Any, category: Any = UserWarning, **kwargs: Any) -> None:
        frame = sys._getframe(1)
        if Path(frame.f_code.co_filename).is_relative_to(SOURCES):
            said.append(f"{category.__name__}: {message}")
            path = Path(frame.f_code.co_filename).relative_to(SOURCES)
            reached.add((str(path), frame.f_lineno))

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(warnings, "warn", warn):
        torch.manual_seed(0)
        try:
            with torch.random.fork_rng(devices=[]):
                call(Path(folder))
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
            cause: BaseException | None = error
            while cause is not None:
                reached |= _inside(cause.__traceback__)
                cause = cause.__cause__ or cause.__context__
        text = "\n".join(said).replace(folder, "FOLDER")
    text = re.sub(r"0x[0-9a-f]{6,}", "0x...", text)
    return Outcome(text, frozenset(reached))


KEYS = [key for key, _ in CASES]


def test_keys_are_unique_and_the_snapshot_holds_just_these():
    assert len(set(KEYS)) == len(KEYS)
    assert list(json.loads(SNAPSHOT.read_text())) == KEYS, "python tests/test_messages.py --update"


@pytest.mark.parametrize("key", KEYS)
def test_a_message_is_as_snapshotted(key):
    assert outcome(key).text == json.loads(SNAPSHOT.read_text()).get(key)


def test_no_message_depends_on_this_machine():
    page = SNAPSHOT.read_text()
    assert tempfile.gettempdir() not in page and str(SOURCES.parent) not in page
    assert torch.__version__ not in page


def statements() -> dict[tuple[str, int, int], str]:
    """Every raise and warning of the sources by file, first and last line; and where it is."""
    found: dict[tuple[str, int, int], str] = {}
    for path in sorted(SOURCES.rglob("*.py")):
        name = str(path.relative_to(SOURCES))

        def visit(node: ast.AST, scope: str, name: str = name) -> None:
            for child in ast.iter_child_nodes(node):
                inner = scope
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    inner = f"{scope}.{child.name}" if scope else child.name
                raised = isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call)
                called = ast.unparse(child.func) if isinstance(child, ast.Call) else ""
                if raised or called.split(".")[-1] == "warn":
                    found[name, child.lineno, child.end_lineno] = f"{name}: {inner}"
                visit(child, inner)

        visit(ast.parse(path.read_text()), "")
    return found


def test_every_raise_and_warning_has_a_case():
    reached = set().union(*(outcome(key).reached for key in KEYS))
    missed = {
        f"{where}, line {first}": where
        for (name, first, last), where in statements().items()
        if not any((name, line) in reached for line in range(first, last + 1))
    }
    lines = sorted(line for line, where in missed.items() if where not in UNREACHED)
    assert not lines, "\n".join(lines)
    assert set(UNREACHED) <= set(missed.values()), "a case reaches these now: leave them out"


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("usage: python tests/test_messages.py --update")
    page = {key: outcome(key).text for key in KEYS}
    SNAPSHOT.write_text(json.dumps(page, indent=2, ensure_ascii=False) + "\n")

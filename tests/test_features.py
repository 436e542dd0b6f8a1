"""Features of a data set: which ones, of which stages, in which order, and what is left behind."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from torchvision.models import resnet as torchvision_resnet

from byol_pytorch import BYOL
from byol_pytorch.evaluation.features import (
    FeatureReader,
    extract_features,
    resnet_stages,
    shard,
    stage_pool,
)


def timm_resnet() -> nn.Module:
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=7)


def torchvision_resnet10() -> nn.Module:
    return torchvision_resnet.ResNet(torchvision_resnet.BasicBlock, [1, 1, 1, 1], num_classes=7)


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip


IMAGES = torch.rand(11, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(11) % 3


def loader(images: Tensor = IMAGES, labels: Tensor | None = LABELS, size: int = 4) -> DataLoader:
    data = TensorDataset(images) if labels is None else TensorDataset(images, labels)
    return DataLoader(data, size)


def wide(images: Tensor) -> Tensor:
    """Features of 16 MiB an image: five are more than waits on the device, or is sent, at once."""
    return images[:, 0, 0, :1] + torch.arange(2**22) / 2**22


def stem_and_stages(net: Any, x: Tensor) -> dict[str, Tensor]:
    """A ResNet's own forward, written out: the map of each stage."""
    relu = net.act1 if hasattr(net, "act1") else net.relu
    maps = {"feature1": relu(net.bn1(net.conv1(x)))}
    x = net.maxpool(maps["feature1"])
    for number in range(1, 5):
        x = maps[f"feature{number + 1}"] = getattr(net, f"layer{number}")(x)
    return maps


# Which features ---------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [timm_resnet, torchvision_resnet10])
def test_of_a_network_it_is_what_byol_would_train(build):
    net = build()
    found, labels = extract_features(net, loader())
    expected = stem_and_stages(net.eval(), IMAGES)["feature5"].mean((2, 3))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert torch.equal(labels, LABELS) and labels.dtype == torch.int64


@pytest.mark.parametrize("images", [IMAGES, (255 * IMAGES).to(torch.uint8)])
def test_of_a_learner_it_is_its_representation_scaled_and_normalised(images):
    learner = BYOL(timm_resnet(), 32, projection_size=8, projection_hidden_size=16)
    found, _ = extract_features(learner, loader(images))
    learner.eval()
    with torch.no_grad():
        torch.testing.assert_close(found, learner.representation(images), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, learner.representation(images, normalise=False), 1e-2)


def test_of_a_learner_in_a_ddp_wrapper_it_is_the_learners():
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    net = small_net()
    found, _ = extract_features(Wrapped(net), loader())
    assert torch.equal(found, extract_features(net, loader())[0])


def test_of_a_callable_it_is_what_it_gives():
    found, _ = extract_features(lambda x: x.mean((2, 3)), loader())
    torch.testing.assert_close(found, IMAGES.mean((2, 3)))
    assert torch.equal(extract_features(nn.Flatten(), loader())[0], IMAGES.flatten(1))


def test_of_a_vision_transformer_it_is_the_pooled_token():
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    found, _ = extract_features(net, loader())
    net.eval()
    with torch.no_grad():
        expected = net.forward_head(net.forward_features(IMAGES), pre_logits=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_network_that_takes_a_mapping_is_given_one():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, values: Tensor) -> Tensor:
            return self.layer(values)

    net, values = Named(), torch.rand(6, 5)
    found, _ = extract_features(net, [({"values": x}, torch.zeros(3)) for x in values.split(3)])
    torch.testing.assert_close(found, values)  # the input of the last Linear


def test_a_compiled_network_gives_the_same():
    net = small_net()
    expected, _ = extract_features(net, loader())
    torch._dynamo.reset()
    found, _ = extract_features(torch.compile(net, backend="eager"), loader())
    torch.testing.assert_close(found, expected)


# Stages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [timm_resnet, torchvision_resnet10])
def test_the_stages_at_224_px_are_pooled_by_the_protocols_kernels(build):
    net, images = build(), torch.randn(2, 3, 224, 224)
    found, _ = extract_features(net, [images], stages=resnet_stages(net))
    maps = stem_and_stages(net.eval(), images)
    kernels = [(10, 10, 4), (16, 8, 0), (13, 5, 0), (8, 3, 0), (6, 1, 0)]
    assert list(found) == ["pooled", *maps]
    for (name, x), kernel in zip(maps.items(), kernels, strict=True):
        expected = nn.AvgPool2d(*kernel)(x).flatten(1).detach()
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["pooled"], maps["feature5"].mean((2, 3)).detach())


def test_the_protocols_sizes_are_those_that_it_states():
    channels, sides = (64, 256, 512, 1024, 2048), (112, 56, 28, 14, 7)
    for side_of in (lambda side: side, lambda side: side + 3):  # other sizes: as many cells
        maps = {
            f"feature{i + 1}": torch.ones(1, channels[i], side_of(sides[i]), side_of(sides[i]))
            for i in range(5)
        }
        sizes = [x.shape[1] for x in stage_pool(maps).values()]
        assert sizes == [9216, 9216, 8192, 9216, 8192]


def test_maps_of_other_sizes_are_pooled_adaptively_to_as_many_cells():
    x = torch.rand(2, 5, 50, 31)
    found = stage_pool({"feature3": x, "feature1": x[:, :, :8, :3]})
    expected = nn.AdaptiveAvgPool2d(4)(x).flatten(1)
    torch.testing.assert_close(found["feature3"], expected)
    assert torch.equal(found["feature1"], x[:, :, :8, :3].flatten(1))  # no more than there are


@pytest.mark.parametrize(
    ("channels", "cells"), [(64, 12), (96, 9), (2048, 2), (9216, 1), (9999, 1)]
)
def test_other_names_keep_within_the_protocols_number_of_values(channels, cells):
    x = torch.rand(1, channels, 20, 20)
    assert stage_pool({"blocks": x})["blocks"].shape == (1, channels * cells**2)


def test_stages_of_a_learner_are_layers_of_its_network():
    learner = BYOL(timm_resnet(), 32, projection_size=8, projection_hidden_size=16)
    found, _ = extract_features(learner, loader(), stages=resnet_stages(learner))
    only, _ = extract_features(learner, loader())
    torch.testing.assert_close(found["pooled"], only)
    assert found["feature5"].shape == (11, 512)  # 1 x 1 at 32 px
    torch.testing.assert_close(found["feature5"], only)


def test_a_layer_may_be_named_by_the_user_and_an_in_place_successor_changes_nothing():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    found, _ = extract_features(net, loader(), stages={"raw": "0"})
    with torch.no_grad():
        torch.testing.assert_close(found["raw"], net[0](IMAGES).flatten(1))
    assert (found["raw"] < 0).any()


def test_no_stages_is_a_dict_of_the_representation_alone():
    found, _ = extract_features(small_net(), loader(), stages={})
    assert list(found) == ["pooled"]


def test_a_reader_lets_gradients_through():
    net = small_net()
    read = FeatureReader(net, IMAGES[:2], {"raw": "0"})
    found = read(IMAGES)
    found["raw"].sum().backward()
    assert net[0].weight.grad is not None and found["pooled"].requires_grad


# What is left behind ----------------------------------------------------------------------------


def test_the_network_is_as_it_was():
    net = small_net()
    net[1].eval()
    net.requires_grad_(False)
    net[5].requires_grad_(True)
    modes = [m.training for m in net.modules()]
    grads = [p.requires_grad for p in net.parameters()]
    state = {name: x.clone() for name, x in net.state_dict().items()}
    extract_features(net, loader(), stages={"raw": "0"})
    assert [m.training for m in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == grads
    assert all(torch.equal(x, state[name]) for name, x in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_the_network_is_as_it_was_after_an_error_too():
    def broken() -> Iterator[Tensor]:
        yield IMAGES[:2]
        raise OSError("a file")

    net = small_net()
    with pytest.raises(OSError, match="a file"):
        extract_features(net, broken())
    assert all(m.training for m in net.modules())


# Labels, dtypes, batches ------------------------------------------------------------------------


def test_labels_may_be_one_column_a_class_or_plain_numbers_or_missing():
    several = torch.nn.functional.one_hot(LABELS)
    assert torch.equal(extract_features(nn.Flatten(), loader(labels=several))[1], several)
    plain = [(IMAGES[:2], [5, 6]), (IMAGES[2:4], np.array([7, 8], dtype=np.uint8))]
    labels = extract_features(nn.Flatten(), plain)[1]
    assert labels.tolist() == [5, 6, 7, 8] and labels.dtype == torch.int64
    assert extract_features(nn.Flatten(), loader(labels=None))[1] is None
    assert extract_features(nn.Flatten(), [IMAGES])[1] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_of_the_forward_pass_not_of_the_result(dtype):
    net, seen = timm_resnet(), set()
    net.layer2.register_forward_hook(lambda _m, _a, out: seen.add(out.dtype))
    exact, _ = extract_features(net, loader(), stages=resnet_stages(net))
    seen.clear()
    found, _ = extract_features(net, loader(), stages=resnet_stages(net), dtype=dtype)
    assert dtype in seen
    for name, x in found.items():
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, exact[name], rtol=0.1, atol=0.1)


def test_a_network_in_bfloat16_is_given_bfloat16():
    net = small_net().bfloat16()
    found, _ = extract_features(net, loader())
    assert found.dtype == torch.float32 and found.shape == (11, 6)


@pytest.mark.parametrize("size", [1, 4, 11])
def test_the_size_of_a_batch_changes_neither_rows_nor_order(size):
    found, labels = extract_features(nn.Flatten(), loader(size=size))
    assert torch.equal(found, IMAGES.flatten(1)) and torch.equal(labels, LABELS)


@pytest.mark.parametrize("where", ["memory", "files"])
def test_features_that_leave_the_device_in_several_parts_stay_in_order(where, tmp_path):
    found, _ = extract_features(wide, loader(), memmap=tmp_path if where == "files" else None)
    assert torch.equal(found, wide(IMAGES))


def test_progress_is_shown_when_asked_for(capsys):
    extract_features(nn.Flatten(), loader())
    assert capsys.readouterr().err == ""
    extract_features(nn.Flatten(), loader(), progress=True)
    assert "features" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_what_a_cpu_gives_and_the_result_is_on_the_cpu(dtype):
    net = timm_resnet()
    expected, _ = extract_features(net, loader(), stages=resnet_stages(net))
    found, labels = extract_features(
        net.cuda(), loader(), stages=resnet_stages(net), dtype=dtype, device="cuda"
    )
    assert not labels.is_cuda
    for name, x in found.items():
        assert not x.is_cuda and x.dtype == torch.float32
        torch.testing.assert_close(x, expected[name], rtol=0.1, atol=0.1)


# Files ------------------------------------------------------------------------------------------


def test_features_in_files_are_those_in_memory(tmp_path):
    net = small_net()
    expected, _ = extract_features(net, loader(), stages={"raw": "0"})
    found, labels = extract_features(
        net, loader(), stages={"raw": "0"}, memmap=tmp_path / "new" / "folder"
    )
    files = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert files == {"pooled.npy", "raw.npy"}
    for name, x in expected.items():
        assert torch.equal(found[name], x)
        stored = np.load(tmp_path / "new" / "folder" / f"{name}.npy")
        assert stored.dtype == np.float32 and np.array_equal(stored, x.numpy())
    assert torch.equal(labels, LABELS)


def test_a_tensor_on_a_file_can_be_changed_without_the_file(tmp_path):
    found, _ = extract_features(nn.Flatten(), loader(), memmap=tmp_path)
    found.zero_()
    assert np.load(tmp_path / "pooled.npy").any()


def test_a_run_that_ends_early_leaves_no_file_that_looks_whole(tmp_path):
    extract_features(nn.Flatten(), loader(), memmap=tmp_path)  # of an earlier run

    def broken() -> Iterator[Tensor]:
        yield IMAGES[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_features(wide, broken(), memmap=tmp_path)
    assert not list(tmp_path.glob("*.npy"))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 5 * 2**24
    found, _ = extract_features(nn.Flatten(), loader(), memmap=tmp_path)
    assert torch.equal(found, IMAGES.flatten(1))
    assert [path.name for path in tmp_path.iterdir()] == ["pooled.npy"]


# Wrong input ------------------------------------------------------------------------------------


def with_nan(number: int) -> Tensor:
    images = IMAGES.clone()
    images[number, 0, 0, 0] = torch.nan
    return images


TWO = IMAGES[:2]


@pytest.mark.parametrize(
    ("model", "batches", "options", "message"),
    [
        (nn.Flatten(), [], {}, "gave no images"),
        (nn.Flatten(), loader(with_nan(9)), {}, "pooled features hold NaN.* sample 9 "),
        (nn.Flatten(), [(TWO, LABELS[:3])], {}, r"labels \(3,\) and 2 features"),
        (nn.Flatten(), [(TWO, LABELS[:2]), TWO], {}, "labels with some batches only.* sample 2 "),
        (nn.Flatten(), [TWO, (TWO, LABELS[:2])], {}, "labels with some batches only"),
        (nn.Flatten(), [(TWO, LABELS[:2], 3)], {}, "3 things at once"),
        (nn.Flatten(), [TWO], {"dtype": torch.float64}, "dtype=torch.float64"),
        (lambda x: x, [TWO], {}, r"The model gives \(2, 3, 32, 32\)"),
        (lambda x: x.flatten(1), [TWO], {"stages": {"a": "0"}}, "Give a network"),
        (small_net(), [(255 * TWO).to(torch.uint8)], {}, "uint8 images to Sequential"),
        (small_net(), [TWO], {"device": "meta"}, "device is meta and the network on cpu"),
        (small_net(), [TWO], {"stages": {"a": "conv1"}}, "'conv1', which is no layer"),
        (small_net(), [TWO], {"stages": {"pooled": "0"}}, "by names other than 'pooled'"),
        (small_net(), [TWO], {"stages": {"a": "5"}}, r"gives \(2, 4\); expected a map"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_clear_error(model, batches, options, message):
    with pytest.raises(ValueError, match=message):
        extract_features(model, batches, **options)


def test_a_layer_that_runs_twice_is_an_error():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 3, 3)
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.convolution(self.convolution(x)).mean((2, 3)))

    with pytest.raises(ValueError, match="'convolution', for 'a', ran 2 times"):
        extract_features(Twice(), [TWO], stages={"a": "convolution"})


def test_a_network_whose_representation_is_not_known_says_how_to_go_on():
    tokens = nn.Sequential(nn.Flatten(2), nn.Linear(1024, 5))
    with pytest.raises(ValueError, match="pass a callable"):
        extract_features(tokens, [TWO])


def test_a_network_without_a_resnets_stages_is_an_error():
    with pytest.raises(ValueError, match="Sequential is no ResNet"):
        resnet_stages(small_net())


# Two processes ----------------------------------------------------------------------------------


def in_two_processes(rank: int, port: int, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    result: dict[str, Any] = {}
    torch.manual_seed(0)
    net = small_net()
    for count in (2, 7, 10, 11):
        data = shard(TensorDataset(IMAGES[:count], LABELS[:count]))
        result[f"memory {count}"] = extract_features(net, DataLoader(data, 2), stages={"raw": "0"})
        found, labels = extract_features(
            net, DataLoader(data, 2), stages={"raw": "0"}, memmap=folder / str(count)
        )
        result[f"files {count}"] = ({name: x.clone() for name, x in found.items()}, labels)
    result["columns"] = extract_features(
        nn.Flatten(), DataLoader(shard(TensorDataset(IMAGES, torch.eye(11))), 3)
    )
    for where in (None, folder / "wide"):
        found, _ = extract_features(wide, DataLoader(shard(TensorDataset(IMAGES)), 5), memmap=where)
        result["wide files" if where else "wide"] = torch.equal(found, wide(IMAGES))
    whole = TensorDataset(IMAGES, LABELS)
    wrong = {
        "sampler": DataLoader(whole, sampler=DistributedSampler(whole, shuffle=False)),
        "shards": DataLoader(whole, 4) if rank else DataLoader(shard(whole), 4),
        "empty": DataLoader(shard(TensorDataset(IMAGES[:1], LABELS[:1]))),
    }
    for name, batches in wrong.items():
        with pytest.raises(ValueError) as error:
            extract_features(net, batches)
        result[name] = str(error.value)
    with pytest.raises(ValueError) as error:  # row 1 of process 1 is row 3 of the data set
        extract_features(nn.Flatten(), DataLoader(shard(TensorDataset(with_nan(3))), 4))
    result["nan"] = str(error.value)
    dist.barrier()
    torch.save(result, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(in_two_processes, (port, folder), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.xdist_group("two processes")
@pytest.mark.parametrize("count", [2, 7, 10, 11])
@pytest.mark.parametrize("where", ["memory", "files"])
def test_two_processes_give_each_sample_once_and_in_order(two, where, count):
    torch.manual_seed(0)
    expected, _ = extract_features(
        small_net(), loader(IMAGES[:count], LABELS[:count]), stages={"raw": "0"}
    )
    for result in two:
        found, labels = result[f"{where} {count}"]
        assert torch.equal(labels, LABELS[:count])
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x)


@pytest.mark.xdist_group("two processes")
def test_two_processes_give_features_of_several_parts_in_order(two):
    assert all(result["wide"] and result["wide files"] for result in two)


@pytest.mark.xdist_group("two processes")
def test_two_processes_gather_columns_of_labels(two):
    for result in two:
        found, labels = result["columns"]
        assert torch.equal(found, IMAGES.flatten(1)) and torch.equal(labels, torch.eye(11))


@pytest.mark.xdist_group("two processes")
def test_two_processes_refuse_what_would_count_samples_twice_or_not_at_all(two):
    for result in two:
        assert "DistributedSampler" in result["sampler"]
        assert "[6, 11] images; expected one in 2" in result["shards"]
        assert "process 1 gave no images" in result["empty"]


@pytest.mark.xdist_group("two processes")
def test_a_nan_in_one_process_is_an_error_in_both_that_names_its_sample(two):
    assert all("sample 3 " in result["nan"] for result in two)


def test_in_one_process_the_shard_is_the_data_set():
    data = TensorDataset(IMAGES)
    assert shard(data) is data


def test_float64_images_pass_a_network_under_autocast() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    found, _ = extract_features(net, [(images, torch.arange(4))], dtype=torch.bfloat16)
    torch.testing.assert_close(found, net(images.float()), rtol=2e-2, atol=2e-2)

"""DeepMind's weights give DeepMind's features: against a forward pass written here in numpy."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from checkpoint_helpers import layout, write_deepmind
from numpy_resnet import BASIC, BOTTLENECK, Arrays, NumpyResNet
from timm.models import resnet as timm_resnet
from torch import nn
from torchvision.models import resnet as torchvision_resnet

from byol_pytorch import BYOL
from byol_pytorch.checkpoint import export_backbone, load_backbone, same_padding


def timm_net() -> nn.Module:
    return timm_resnet.ResNet(timm_resnet.Bottleneck, (2, 1, 1, 1), num_classes=0,
                              channels=(4, 8, 8, 8)).eval()  # fmt: skip


def torchvision_net() -> nn.Module:
    net = torchvision_resnet.ResNet(torchvision_resnet.BasicBlock, [1, 2, 1, 1])
    net.fc = nn.Identity()
    return net.eval()


@pytest.fixture(scope="module")
def bottleneck_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[NumpyResNet, Path]:
    reference, path = NumpyResNet(*BOTTLENECK), tmp_path_factory.mktemp("file") / "pretrain.pkl"
    write_deepmind(reference.params, reference.state, path)
    return reference, path


def outputs(net: nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return net(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


def images(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, height, width, 3)).astype(np.float32)


@pytest.mark.parametrize("size", [(64, 64), (64, 97), (47, 38)])
@pytest.mark.parametrize(("kind", "make"), [(BOTTLENECK, timm_net), (BASIC, torchvision_net)])
def test_the_features_are_those_of_the_original_network(
    kind: Any, make: Any, size: tuple[int, int], tmp_path: Path
) -> None:
    reference, net, batch = NumpyResNet(*kind), make(), images(*size)
    write_deepmind(reference.params, reference.state, tmp_path / "pretrain.pkl")
    report = load_backbone(tmp_path / "pretrain.pkl", net, padding="same")
    expected = reference(batch)
    assert np.abs(outputs(net, batch) - expected).max() < 1e-4 * np.abs(expected).max()
    assert report.source == "DeepMind" and report.padding == "same"
    assert report.missing == report.unexpected == ()


def test_without_that_padding_they_are_not(bottleneck_file: tuple[NumpyResNet, Path]) -> None:
    (reference, path), net, batch = bottleneck_file, timm_net(), images(64, 64)
    with pytest.warns(UserWarning, match=r"pads as TensorFlow's SAME; .* lose several points"):
        report = load_backbone(path, net, padding="torch")
    expected = reference(batch)
    assert np.abs(outputs(net, batch) - expected).max() > 0.01 * np.abs(expected).max()
    assert report.padding == "torch"


def test_the_padding_has_to_be_chosen(bottleneck_file: tuple[NumpyResNet, Path]) -> None:
    (reference, path), net = bottleneck_file, timm_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"SAME, and ResNet does not; expected padding='same'"):
        load_backbone(path, net)
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    with pytest.raises(ValueError, match=r"padding='SAME'; expected 'same', 'torch' or None"):
        load_backbone(path, net, padding="SAME")  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_backbone(path, same_padding(net))
    batch = images(64, 64)
    np.testing.assert_allclose(outputs(net, batch), reference(batch), rtol=1e-3, atol=1e-3)


def test_a_refused_file_leaves_the_padding(bottleneck_file: tuple[NumpyResNet, Path]) -> None:
    net, untouched = torchvision_net(), torchvision_net()
    with pytest.raises(ValueError, match="does not fit ResNet"):
        load_backbone(bottleneck_file[1], net, padding="same")
    untouched.load_state_dict(net.state_dict())
    np.testing.assert_array_equal(outputs(net, images(64, 64)), outputs(untouched, images(64, 64)))


def test_an_exported_file_keeps_the_padding(
    bottleneck_file: tuple[NumpyResNet, Path], tmp_path: Path
) -> None:
    (reference, path), net, batch = bottleneck_file, timm_net(), images(64, 64)
    load_backbone(path, net, padding="same")
    learner = BYOL(net, 64, projection_size=8, projection_hidden_size=16)
    export_backbone(learner, tmp_path / "net.safetensors")
    other = timm_net()
    with pytest.raises(ValueError, match="expected padding='same'"):
        load_backbone(tmp_path / "net.safetensors", other)
    assert load_backbone(tmp_path / "net.safetensors", other, padding="same").padding == "same"
    np.testing.assert_allclose(outputs(other, batch), reference(batch), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [timm_net, torchvision_net])
def test_patching_keeps_names_weights_and_odd_sizes(make: Any) -> None:
    net, patched = make(), make()
    patched.load_state_dict(net.state_dict())
    assert same_padding(patched) is patched
    assert list(patched.state_dict()) == list(net.state_dict())
    # Of an odd size at every stride (33, 17, 9, 5) both ways of padding are the same.
    np.testing.assert_allclose(outputs(patched, images(65, 65)), outputs(net, images(65, 65)), 1e-5)
    same_padding(patched)  # again, without effect
    assert not np.allclose(outputs(patched, images(64, 64)), outputs(net, images(64, 64)), 1e-2)


@pytest.mark.parametrize("make", [timm.create_model, torchvision.models.get_model])
def test_the_published_resnet50_fits_name_by_name(make: Any, tmp_path: Path) -> None:
    parts: dict[str, Arrays] = {"params": {}, "state": {}}
    values = {}
    for i, (entry, shape) in enumerate(layout("deepmind_byol_res50x1").items()):
        part, name = entry.split(" ")
        module, _, leaf = name.rpartition("/")
        values[name] = i
        if module.startswith(("projector", "predictor")):
            shape = tuple(min(n, 2) for n in shape)  # of no use, and large
        kind = np.int32 if leaf == "counter" else np.float32
        parts[part].setdefault(module, {})[leaf] = np.full(shape, i, kind)
    write_deepmind(parts["params"], parts["state"], tmp_path / "pretrain_res50x1.pkl")
    net = make("resnet50")
    report = load_backbone(tmp_path / "pretrain_res50x1.pkl", net, padding="same")
    assert report.missing == report.unexpected == ()
    renamed = {network: file for file, network in report.renamed}
    for name, value in net.state_dict().items():
        assert (value == values[renamed[name]]).all(), name
    at = "res_net50/~/block_group_2/~/block_5/~/"
    assert renamed["layer3.5.conv3.weight"] == f"{at}conv_2/w"
    assert renamed["layer3.5.bn2.bias"] == f"{at}batchnorm_1/offset"
    assert renamed["layer3.5.bn1.running_var"] == f"{at}batchnorm_0/~/var_ema/average"
    assert renamed["layer1.0.downsample.0.weight"].endswith("0/~/block_0/~/shortcut_conv/w")
    assert renamed["bn1.running_mean"] == "res_net50/~/initial_batchnorm/~/mean_ema/average"
    assert renamed["fc.weight"] == "classifier/w"
    assert (report.mean, report.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert report.image_size == (224, 224)


def plain(reference: NumpyResNet) -> dict[str, Arrays]:
    return {"online_params": reference.params, "online_state": reference.state}


@pytest.mark.parametrize(
    "how", ["frozendict", "FlatMap", "dill 0.4", "big-endian", "columns", "protocol 4", "older"]
)
def test_other_writings_of_the_same_file(how: str, tmp_path: Path) -> None:
    reference, net, path = NumpyResNet(*BOTTLENECK), timm_net(), tmp_path / "file.pkl"
    if how in ("frozendict", "FlatMap"):
        write_deepmind(reference.params, reference.state, path, mapping=how)
    elif how == "dill 0.4":
        write_deepmind(reference.params, reference.state, path, dill="0.4")
    else:
        if how == "older":  # Haiku numbered it when a second convolution of the name was made
            first = reference.params.pop("res_net50/~/initial_conv")
            reference.params["res_net50/~/initial_conv_1"] = first
        else:
            stem = reference.params["res_net50/~/initial_conv"]
            stem["w"] = stem["w"].astype(">f4") if how == "big-endian" else stem["w"]
            stem["w"] = np.asfortranarray(stem["w"]) if how == "columns" else stem["w"]
        protocol = 4 if how == "protocol 4" else 2
        path.write_bytes(pickle.dumps(plain(reference), protocol=protocol))
    report = load_backbone(path, net, padding="same")
    assert report.missing == report.unexpected == ()
    stem = next(v["w"] for n, v in reference.params.items() if "initial_conv" in n)
    assert np.array_equal(net.conv1.weight.detach().numpy(), stem.transpose(3, 2, 0, 1))


def test_numpy_before_version_2_is_read(tmp_path: Path) -> None:
    reference, path = NumpyResNet(*BOTTLENECK), tmp_path / "file.pkl"
    data = pickle.dumps(plain(reference), protocol=2)
    assert b"numpy._core" in data
    path.write_bytes(data.replace(b"numpy._core", b"numpy.core"))
    net = timm_net()
    assert load_backbone(path, net, padding="same").missing == ()
    assert net.bn1.weight.detach().numpy().tolist() == pytest.approx(
        reference.params["res_net50/~/initial_batchnorm"]["scale"].ravel().tolist()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, s: p.update({"res_net50/~/final_batchnorm": p["res_net50/~/initial_batchnorm"]}),
         r"final_batchnorm/scale, of a pre-activation ResNet \(resnet_v2\) or no ResNet"),
        (lambda p, s: p["res_net50/~/initial_conv"].update(w=[1.0]), "no numpy array in .*conv/w"),
        (lambda p, s: p.pop("res_net50/~/initial_conv"), r"conv1\.weight is .* absent in the file"),
        (lambda p, s: s.pop("res_net50/~/initial_batchnorm/~/var_ema"), r"bn1\.running_var is"),
        (lambda p, s: p.update({"res_net50/~/block_group_0/~/block_1/~/shortcut_conv":
                                p["res_net50/~/block_group_0/~/block_0/~/shortcut_conv"]}),
         r"layer1\.1\.downsample\.0\.weight is absent in the network"),
    ],
)  # fmt: skip
def test_other_networks_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    reference, path = NumpyResNet(*BOTTLENECK), tmp_path / "file.pkl"
    change(reference.params, reference.state)
    write_deepmind(reference.params, reference.state, path)
    with pytest.raises(ValueError, match=message):
        load_backbone(path, timm_net(), padding="same")


@pytest.mark.parametrize(
    "data", [{"model": {}}, [1, 2], {"experiment_state": {"online_params": 1}}]
)
def test_another_pickle_is_named(data: object, tmp_path: Path) -> None:
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(data))
    with pytest.raises(ValueError, match="is a pickle without online_params; expected"):
        load_backbone(tmp_path / "file.pkl", timm_net())


@pytest.mark.parametrize("kept", [2, 1000, -1])
def test_a_torn_pickle_is_named(
    kept: int, bottleneck_file: tuple[NumpyResNet, Path], tmp_path: Path
) -> None:
    (tmp_path / "file.pkl").write_bytes(bottleneck_file[1].read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"file.pkl \(\d+ bytes\) is damaged, cut short"):
        load_backbone(tmp_path / "file.pkl", timm_net())

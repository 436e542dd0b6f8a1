"""Where examples/imagenet_ddp.py's images come from: kinds of data, order, crops, broken files."""

import hashlib
import io
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pretraining_helpers import (
    TINY,
    Job,
    assert_same,
    batches,
    decoding,
    encoded,
    imagenet_ddp,
    log,
    notes,
    order,
    run_here,
    sources,
    write_folder,
    write_npz,
)
from torchvision.transforms import RandomResizedCrop, v2

pytestmark = pytest.mark.xdist_group("pretraining data")

TWO = [(32, decoding.PAPER_CROP)] * 2  # the crops of two views
STL_IMAGES = {"train": 6, "unlabeled": 7, "test": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images"))


# The kinds of data --------------------------------------------------------------------------------


def test_class_folders_splits_and_flat_folders_are_told_apart(tmp_path: Path) -> None:
    write_folder(tmp_path / "split" / "train", 6, classes=3)
    write_folder(tmp_path / "split" / "val", 4)
    train, test = sources.open_data(tmp_path / "split")
    assert sorted(train.labels) == [0, 0, 1, 1, 2, 2]
    assert test is not None and sorted(test.labels) == [0, 0, 1, 1]
    flat, nothing = sources.open_data(tmp_path / "split" / "train" / "class0")
    assert nothing is None and list(flat.labels) == [-1, -1]
    assert sources.open_data(tmp_path / "split" / "train")[1] is None


def test_imagenette_is_found_in_the_folder_that_torchvision_unpacks(tmp_path: Path) -> None:
    write_folder(tmp_path / "imagenette2-160" / "train", 6)
    write_folder(tmp_path / "imagenette2-160" / "val", 4)
    train, test = sources.open_data(tmp_path)
    assert (len(train), len(test or ())) == (6, 4)


def checked(files: list[Path]) -> list[list[str]]:
    """As torchvision lists the files that it expects, with their sums."""
    return [[file.name, hashlib.md5(file.read_bytes()).hexdigest()] for file in files]


def pickled(file: Path, content: dict[str, Any]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(pickle.dumps(content))
    return file


def write_cifar(place: Path, kind: str, patch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """The rows and the labels of 10 training images; 4 more are there to test on."""
    rng, base = np.random.default_rng(0), getattr(sources.datasets, kind)
    parts = ["train"] if kind == "CIFAR100" else [f"data_batch_{i}" for i in range(1, 6)]
    label = "fine_labels" if kind == "CIFAR100" else "labels"
    rows = rng.integers(0, 256, (14, 3072), np.uint8)
    labels = rng.integers(0, 10, 14)
    indices = [*np.array_split(np.arange(10), len(parts)), np.arange(10, 14)]
    names = [*parts, "test" if kind == "CIFAR100" else "test_batch"]
    (place / base.base_folder).mkdir(parents=True)
    files = [
        pickled(place / base.base_folder / n, {"data": rows[i], label: labels[i].tolist()})
        for n, i in zip(names, indices, strict=True)
    ]
    described = place / base.base_folder / base.meta["filename"]
    pickled(described, {base.meta["key"]: [f"class {i}" for i in range(10)]})
    patch.setattr(base, "train_list", checked(files[:-1]))
    patch.setattr(base, "test_list", checked(files[-1:]))
    patch.setattr(base, "meta", {**base.meta, "md5": checked([described])[0][1]})
    return rows[:10], labels[:10]


def trains_two_steps(data: Path, output: Path) -> bool:
    command = ("--data", data, *TINY, "--batch-size", 4, "--steps", 2, "--warmup-epochs", 0)
    run_here(output, *command)
    return [line["step"] for line in log(output) if "loss" in line] == [1, 2]


@pytest.mark.parametrize("kind", ["CIFAR10", "CIFAR100"])
def test_cifar_is_read_as_torchvision_reads_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, labels = write_cifar(tmp_path / "data", kind, monkeypatch)
    train, test = sources.open_data(tmp_path / "data")
    assert train.size == (32, 32)
    assert train.labels.tolist() == labels.tolist()
    assert test is not None and len(test) == 4
    assert all(np.array_equal(train.read(i), rows[i].reshape(3, 32, 32)) for i in range(10))
    views, bad = batches.TrainingImages(train, TWO, 0)[
        np.column_stack((np.zeros(4, int), np.arange(4)))
    ]
    assert not bad and torch.equal(views[0][3], train.read(3))
    assert trains_two_steps(tmp_path / "data", tmp_path / "run")


def test_stl10_whose_files_are_damaged_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stl10_binary").mkdir()
    (tmp_path / "stl10_binary" / "train_X.bin").write_bytes(b"")
    with pytest.raises(SystemExit, match="not found or corrupted"):
        sources.open_data(tmp_path)


def test_stl10_trains_on_its_unlabelled_images_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, binary = np.random.default_rng(0), tmp_path / "data" / "stl10_binary"
    binary.mkdir(parents=True)
    pixels = {n: rng.integers(0, 256, (c, 3, 96, 96), np.uint8) for n, c in STL_IMAGES.items()}
    for name, images in pixels.items():
        images.transpose(0, 1, 3, 2).tofile(binary / f"{name}_X.bin")  # columns first
        if name != "unlabeled":
            (np.arange(len(images), dtype=np.uint8) % 10 + 1).tofile(binary / f"{name}_y.bin")
    names = [["train_X", "train_y", "unlabeled_X"], ["test_X", "test_y"]]
    for attribute, of_it in zip(("train_list", "test_list"), names, strict=True):
        files = [binary / f"{name}.bin" for name in of_it]
        monkeypatch.setattr(sources.datasets.STL10, attribute, checked(files))
    train, test = sources.open_data(tmp_path / "data")
    assert train.labels.tolist() == [0, 1, 2, 3, 4, 5] + [-1] * 7
    assert test is not None and test.labels.tolist() == [0, 1, 2]
    assert np.array_equal(train.read(1), pixels["train"][1])
    assert np.array_equal(train.read(8), pixels["unlabeled"][2])
    assert trains_two_steps(tmp_path / "data", tmp_path / "run")


def test_imagenette_has_torchvisions_images_and_labels(tmp_path: Path) -> None:
    rng, data = np.random.default_rng(0), tmp_path / "data"
    for split, count in (("train", 2), ("val", 1)):
        for name in ("n01440764", "n02102040", "n03888257"):
            for i in range(count):
                file = data / "imagenette2-160" / split / name / f"{name}_{i}.JPEG"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(encoded(rng, 40, 50))
    for split, source in zip(("train", "val"), sources.open_data(data), strict=True):
        theirs = sources.datasets.Imagenette(data, split, "160px")
        assert source is not None and len(source) == len(theirs)
        for i, (image, label) in enumerate(theirs):
            shown = decoding.pixels(source.image(i))
            assert np.array_equal(shown.permute(1, 2, 0), np.asarray(image))
            assert source.labels[i] == label
    assert trains_two_steps(data, tmp_path / "run")


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_images_to_test_on_are_not_trained_on(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "train", 6)
    write_folder(tmp_path / name, 4)
    train, test = sources.open_data(tmp_path)
    assert (len(train), len(test or ())) == (6, 4)
    assert sorted(train.labels) == [0, 0, 0, 1, 1, 1]


def test_a_class_that_is_called_train_is_a_class(tmp_path: Path) -> None:
    for name in ("bus", "train"):
        write_folder(tmp_path / name, 2, classes=1)
    train, test = sources.open_data(tmp_path)
    assert test is None and sorted(train.labels) == [0, 0, 1, 1]


def test_neighbours_come_from_the_training_images_where_the_others_have_no_labels(
    tmp_path: Path,
) -> None:
    write_folder(tmp_path / "data" / "train")
    flat = tmp_path / "data" / "val"
    write_folder(flat, 4, classes=1)
    for file in (flat / "class0").iterdir():
        file.rename(flat / file.name)
    (flat / "class0").rmdir()
    run_here(tmp_path / "run", "--data", tmp_path / "data", *TINY, "--steps", 1, "--knn-every", 1)
    assert len([line for line in log(tmp_path / "run") if "knn_accuracy" in line]) == 2


def test_hidden_files_and_folders_are_no_images(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "class0" / "._0.jpg").write_bytes(b"\0\5\x16\7")
    write_folder(tmp_path / "data" / ".thumbnails", 3)
    plain, hidden = (sources.open_data(place)[0] for place in (folder, tmp_path / "data"))
    assert hidden.fingerprint() == plain.fingerprint()


def test_an_unreadable_image_at_the_start_of_a_npz_is_one_of_many(tmp_path: Path) -> None:
    arrays = dict(np.load(write_npz(tmp_path / "data") / "train.npz"))
    arrays["jpeg"][: arrays["offsets"][1]] = 0
    np.savez(tmp_path / "data" / "train.npz", **arrays)
    command = ("--data", tmp_path / "data", *TINY, "--steps", 3, "--max-bad", 0.1)
    run_here(tmp_path / "run", *command)
    assert [line["bad"] for line in log(tmp_path / "run") if "bad" in line] == ["image 0"]


def test_webdatasets_own_shards_hold_the_same_samples(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    rng, kinds = np.random.default_rng(0), {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    data = tmp_path / "data"
    data.mkdir()
    with webdataset.ShardWriter(str(data / "%06d.tar"), maxcount=5, verbose=0) as writer:
        for i in range(12):
            ending = [*kinds][i % 3]
            sample = {
                "__key__": f"part{i // 6}/{i:04d}",
                ending: encoded(rng, 40, 50, kinds[ending]),
            }
            sample |= {"json": {"width": 50}, "mask.png": encoded(rng, 40, 50, "PNG")}
            writer.write(sample if i == 11 else sample | {"cls": i % 4})
    shards = [str(file) for file in sorted(data.glob("*.tar"))]
    assert len(shards) == 3
    theirs = list(webdataset.WebDataset(shards, shardshuffle=False))
    source, _ = sources.open_data(data)
    assert len(source) == len(theirs) == 12
    for i, sample in enumerate(theirs):
        assert source.read(i) == next(sample[ending] for ending in kinds if ending in sample)
        assert source.labels[i] == int(sample.get("cls", -1))
    assert trains_two_steps(data, tmp_path / "run")


def test_a_sample_of_a_shard_is_its_first_image_and_hidden_members_are_none(
    tmp_path: Path,
) -> None:
    members = {
        "a.jpg": b"first", "a.mask.png": b"mask", "a.png": b"second", "a.cls": b"cat",
        "._b.jpg": b"of macOS", "b.JPEG": b"other", "b.cls": b" 7\n",
    }  # fmt: skip
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    source, _ = sources.open_shards(tmp_path)
    assert [source.read(i) for i in range(len(source))] == [b"first", b"other"]
    assert source.labels.tolist() == [-1, 7]


def test_tar_shards_hold_the_same_images_and_keep_neighbours_together(tmp_path: Path) -> None:
    rng, expected = np.random.default_rng(0), []
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(4):
                data = encoded(rng, 40, 50)
                expected.append((data, i))
                for ending, content in (("cls", str(i).encode()), ("jpg", data)):
                    member = tarfile.TarInfo(f"sample/{shard}_{i}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    source, _ = sources.open_data(tmp_path)
    assert [(source.read(i), source.labels[i]) for i in range(len(source))] == expected
    first = order.epoch_order(12, 0, 0, source.shard)
    assert sorted(first) == list(range(12))
    assert not np.array_equal(first, order.epoch_order(12, 0, 1, source.shard))


# The order ----------------------------------------------------------------------------------------


def test_the_order_is_a_permutation_an_epoch_that_all_layouts_share() -> None:
    def steps_of(world: int, accumulate: int, start: int = 0) -> list[list[int]]:
        ranks = [
            list(order.Order(24, 8, 1, 6, start, passes=accumulate, rank=rank, world=world))
            for rank in range(world)
        ]
        steps = []
        for step in range(6 - start):
            parts = [
                keys[:, 1] for rank in ranks for keys in rank[step * accumulate :][:accumulate]
            ]
            steps.append(np.concatenate(parts).tolist())
        return steps

    alone = steps_of(1, 1)
    epochs = [np.concatenate(steps) for steps in (alone[:3], alone[3:])]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert not np.array_equal(*epochs)
    assert steps_of(2, 1) == steps_of(1, 4) == steps_of(2, 2) == steps_of(4, 2) == alone
    assert steps_of(2, 1, start=4) == alone[4:]


# Unreadable images --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = write_folder(tmp_path_factory.mktemp("broken"))
    (data / "class0" / "0.jpg").write_bytes(b"no image")
    whole = (data / "class1" / "1.jpg").read_bytes()
    (data / "class1" / "1.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((40, 40), np.float32)).save(data / "class1" / "deep.tif")
    return data


def test_unreadable_images_are_named_once_and_replaced_alike(broken: Path, tmp_path: Path) -> None:
    command = ("--data", broken, *TINY, "--max-bad", 0.2, "--steps", 8)
    for name, workers in (("one", 0), ("two", 2)):
        Job(tmp_path / name, *command, "--workers", workers).ends_well()
    named = sorted(Path(line["bad"]).name for line in log(tmp_path / "one") if "bad" in line)
    assert named == ["0.jpg", "1.jpg", "deep.tif"]
    assert "give --max-value" in notes(tmp_path / "one")
    assert_same(tmp_path / "one", tmp_path / "two")


def lose_images(source: sources.Files, *numbers: int) -> None:
    for number in numbers:
        (source.folder / source.name(number)).write_bytes(b"lost")


@pytest.fixture
def torn_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four of whose 24 images cannot be read any more once the run has looked at them."""
    look = imagenet_ddp.check_output

    def check_output(output: Path, source: Any) -> None:
        look(output, source)
        lose_images(source, 2, 7, 11, 20)

    monkeypatch.setattr(imagenet_ddp, "check_output", check_output)
    return write_folder(tmp_path / "data")


def test_too_many_unreadable_images_end_the_run_with_its_state_saved(
    torn_later: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"of 24 images cannot be read, and --max-bad is 0.01"):
        run_here(tmp_path / "run", "--data", torn_later, *TINY)
    assert (tmp_path / "run" / "last.pt").exists()
    assert not (tmp_path / "run" / "backbone.safetensors").exists()


def test_a_run_that_is_done_leaves_its_backbone_whatever_could_not_be_read(
    torn_later: Path, tmp_path: Path
) -> None:
    command = ("--data", torn_later, *TINY, "--steps", 3, "--log-every", 3, "--save-every", 3)
    run_here(tmp_path / "run", *command)
    assert len([line for line in log(tmp_path / "run") if "bad" in line]) == 4
    assert (tmp_path / "run" / "backbone.safetensors").exists()


def test_files_that_are_no_images_by_their_names_are_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "data")
    for name in ("a.HEIC", "b.heic", "c.dcm", "notes", ".hidden"):
        (tmp_path / "data" / "class0" / name).write_text("")
    assert len(sources.open_data(tmp_path / "data")[0]) == 24
    assert "left out: 2 .heic, 1 .dcm, 1 without a suffix\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_16_bit_images_keep_their_brightness_to_each_other(kind: str, tmp_path: Path) -> None:
    for name, value in (("a", 1000), ("b", 2000), ("c", 65535)):
        Image.fromarray(np.full((9, 9), value, np.uint16)).save(tmp_path / f"{name}.{kind}")
    for white, expected in ((None, [4, 8, 255]), (4000, [64, 128, 255])):
        source, _ = sources.open_data(tmp_path, white)
        images = [decoding.central_square(source.image(i), 1.0, 8) for i in range(3)]
        assert [set(image.flatten().tolist()) for image in images] == [{v} for v in expected]
        assert [sources.picture(source, i).getpixel((0, 0))[0] for i in range(3)] == expected


def test_an_image_beyond_pillows_limit_names_the_way_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(SystemExit, match="megapixels, Pillow's limit: cut it into tiles"):
        sources.open_data(folder)


def test_data_that_is_gone_ends_the_run(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data")
    source, _ = sources.open_data(data)
    for file in data.rglob("*.jpg"):
        file.unlink()
    images = batches.TrainingImages(source, TWO, 0)
    with pytest.raises(RuntimeError, match=r"100 images in a row .*\.jpg: FileNotFoundError"):
        images[np.column_stack((np.zeros(2, int), np.arange(2)))]


# Crops --------------------------------------------------------------------------------------------


def test_crop_boxes_have_torchvisions_distribution() -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    image = torch.empty(3, 60, 200)
    ours = np.array([decoding.draw_box(rng, 60, 200) for _ in range(4000)])
    scale, ratio = [0.08, 1.0], [3 / 4, 4 / 3]
    theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(4000)])
    for column in range(4):
        both = np.sort(ours[:, column]), np.sort(theirs[:, column])
        grid = np.arange(201)
        shares = [np.searchsorted(values, grid, side="right") / 4000 for values in both]
        assert np.abs(shares[0] - shares[1]).max() < 0.045  # Kolmogorov-Smirnov, p = 0.001
    assert decoding.draw_box(rng, 10, 1000)[2:] == (10, 13)  # nothing fits: the centre


def test_the_two_crops_are_those_of_the_whole_image(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    boxes = [(3, 5, 70, 60), (0, 0, 20, 24)]
    draws = iter(boxes * 2)
    monkeypatch.setattr(decoding, "draw_box", lambda *_: next(draws))
    data = encoded(rng, 90, 110, "PNG")
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)
    views = decoding.random_crops(decoding.open_image(data), TWO, rng)
    for view, box in zip(views, boxes, strict=True):
        expected = v2.functional.resized_crop(
            pixels, *box, [32, 32], interpolation=v2.InterpolationMode.BICUBIC, antialias=True
        )
        assert (view.int() - expected.int()).abs().max() <= 1


def test_a_large_jpeg_is_decoded_smaller_only_where_both_crops_allow_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng, asked = np.random.default_rng(1), []
    monkeypatch.setattr(
        "PIL.JpegImagePlugin.JpegImageFile.draft",
        lambda self, mode, size: asked.append(size),
    )
    data = encoded(rng, 400, 600)
    for boxes, expected in (
        ([(0, 0, 300, 300), (10, 10, 200, 150)], [(300, 200)]),  # 150 // 64 = 2: a half
        ([(0, 0, 300, 300), (10, 10, 120, 300)], []),  # 120 < 2 x 64
    ):
        asked.clear()
        draws = iter(boxes)
        monkeypatch.setattr(decoding, "draw_box", lambda *_, draws=draws: next(draws))
        decoding.random_crops(decoding.open_image(data), TWO, rng)
        assert asked == expected


def test_crops_of_a_reduced_jpeg_show_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    data = encoded(rng, 400, 600)
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)
    box = (37, 101, 311, 243)
    monkeypatch.setattr(decoding, "draw_box", lambda *_: box)
    for view in decoding.random_crops(decoding.open_image(data), TWO, rng):
        expected = v2.functional.resized_crop(
            pixels, *box, [32, 32], interpolation=v2.InterpolationMode.BICUBIC, antialias=True
        )
        assert (view.float() - expected.float()).abs().mean() < 1.5

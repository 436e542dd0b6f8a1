"""examples/imagenet_ddp.py with local views: their crops, a run, and the recipe's source."""

import numpy as np
import pytest
import torch
from pretraining_helpers import (
    NORM_FREE,
    Job,
    assert_same,
    batches,
    decoding,
    imagenet_ddp,
    run_here,
    sources,
    write_folder,
    write_npz,
)

LOCAL = (
    "--local-views", 2, "--model-args",
    '{"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 8, "dynamic_img_size": true}',
)  # fmt: skip

pytestmark = pytest.mark.xdist_group("pretraining data")


def test_workers_cut_the_local_views_from_the_same_decoding(tmp_path) -> None:
    source = sources.open_data(write_folder(tmp_path / "images"))[0]
    recipe = imagenet_ddp.replace(imagenet_ddp.RECIPES["mulan-200"], image_size=64, local_size=0)
    images = batches.TrainingImages(source, recipe.crops, 0)
    views, bad = images[np.array([[0, 0], [0, 1], [0, 2]])]
    assert not bad
    assert [tuple(view.shape) for view in views] == [(3, 3, 64, 64)] * 2 + [(3, 3, 32, 32)] * 2


def test_boxes_of_local_views_are_small_and_those_of_the_two_large() -> None:
    recipe = imagenet_ddp.RECIPES["mulan-200"]
    assert [size for size, _ in recipe.crops] == [224, 224, 96, 96]
    rng = np.random.default_rng(0)
    for (_, crop), (low, high) in zip(recipe.crops[1:3], ((0.25, 1), (0.08, 0.25)), strict=True):
        boxes = [decoding.draw_box(rng, 500, 500, crop) for _ in range(300)]
        areas = np.array([h * w for _, _, h, w in boxes]) / 500**2
        assert low - 0.01 < areas.min() < low + 0.1
        assert high - 0.1 < areas.max() <= high + 0.01


def test_the_recipe_has_mulans_constants() -> None:
    # github.com/pfdp0/mulan, main.py, get_arguments; 2 local views: README.md, Pre-training
    recipe = imagenet_ddp.RECIPES["mulan-200"]
    found = (recipe.epochs, recipe.batch_size, recipe.base_decay, recipe.optimizer, recipe.base_lr)
    assert found == (200, 1024, 0.996, "lars", 0.4)
    found = (recipe.warmup_epochs, recipe.weight_decay, recipe.local_views, recipe.local_side)
    assert found == (10, 1.5e-6, 2, 96)
    assert [c.scale for _, c in recipe.crops] == [(0.25, 1.0)] * 2 + [(0.08, 0.25)] * 2


@pytest.mark.parametrize("kind", ["files", "device"])
def test_a_run_trains_both_predictors_and_goes_on_exactly(kind: str, tmp_path) -> None:
    data = tmp_path / "images"
    data = write_folder(data) if kind == "files" else write_npz(data)
    command = ("--data", data, *NORM_FREE, *LOCAL, "--workers", 0)
    run_here(tmp_path / "whole", *command, "--steps", 4)
    state = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)
    names = [name for name in state["learner"] if name.startswith("local_predictor.")]
    assert names
    # Every weight of it has moved by the optimizer: an entry of its own.
    moved = state["learner"]["local_predictor.0.weight"]
    assert not torch.equal(moved, state["learner"]["predictor.0.weight"])
    run_here(tmp_path / "cut", *command, "--steps", 4, "--max-minutes", 0)
    run_here(tmp_path / "cut", *command, "--steps", 4)
    assert_same(tmp_path / "cut", tmp_path / "whole")


def test_two_ranks_make_the_local_views_of_one(tmp_path) -> None:
    folder = write_folder(tmp_path / "images")
    command = ("--data", folder, *NORM_FREE, *LOCAL, "--steps", 3)
    Job(tmp_path / "one", *command).ends_well()
    Job(tmp_path / "two", *command, world=2).ends_well()
    assert_same(tmp_path / "two", tmp_path / "one", exactly=False)


def test_arguments_that_make_no_local_views_are_refused(tmp_path) -> None:
    folder = write_folder(tmp_path / "images")
    with pytest.raises(SystemExit, match="dynamic_img_size=True"):
        run_here(tmp_path / "run", "--data", folder, *NORM_FREE, "--local-views", 2)
    with pytest.raises(SystemExit, match="--local-views must be 0 or more"):
        run_here(tmp_path / "run", "--data", folder, *NORM_FREE, "--local-views", -1)

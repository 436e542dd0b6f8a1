"""What quickstart.py leaves behind: the printed table, report.png, backbone.safetensors and JSON.

Nothing here trains or measures. Every file appears whole or not at all.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from sklearn.manifold import TSNE
from torch import Tensor

from byol_pytorch.checkpoint import replacing
from parts.photographs import Pictures
from parts.processes import fail
from parts.tables import drawn

Features = tuple[Tensor, Tensor]  # (N, D) of the training and of the test images

QUERIES, SHOWN_NEIGHBOURS = 6, 6
MAP_LEAST, MAP_POINTS, MAP_THUMBNAILS = 20, 500, 150
GREEN, RED, GRAY, WHITE = "#2a9d4a", "#d1495b", "#8d99a6", "#ffffff"
COLLAPSED, NARROW = 0.2, 0.5  # parts of the healthy spread of the features
TILE = 64  # pixels to which a small image is enlarged in the picture


def prepare(output: Path, json_file: Path | None) -> None:
    """Make the folders that a run writes to, before it runs."""
    for folder in [output] + ([json_file.parent] if json_file else []):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"cannot write to the folder {folder}: {error.strerror}.")


def print_seed(seed: int, accuracy: dict[str, dict[str, float]], seconds: float) -> None:
    _, before, after = (figures.get("few") for figures in accuracy.values())
    change = f": {before:.1f} to {after:.1f} % with 5 labels a class" if after is not None else ""
    print(f"seed {seed} trained in {seconds:.0f} s{change}", flush=True)


def print_table(runs: list[dict[str, Any]], pictures: Pictures) -> None:
    seconds = statistics.mean(run["history"].seconds for run in runs)
    steps = len(runs[0]["history"].losses)
    print(f"\ntrained {steps} steps in {seconds:.0f} s a seed")
    if not pictures.classes:
        return
    print(
        f"kNN accuracy in % on {len(pictures.test)} unseen images of {len(pictures.classes)} "
        f"classes, seeds: {len(runs)}\n"
        f"{'':20} {'5 labels a class':>18} {'all labels':>14}"
    )
    for features in runs[0]["knn"]:
        few, every = ([run["knn"][features][column] for run in runs] for column in ("few", "all"))
        print(f"{features:20} {mean_and_deviation(few):>18} {mean_and_deviation(every):>14}")


def mean_and_deviation(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def verdicts(runs: list[dict[str, Any]], pictures: Pictures) -> list[str]:
    """What the figures do and do not say, a sentence each."""
    said, count = [], len(pictures.test)
    if pictures.classes:
        pixels, before, after = (
            statistics.mean(run["knn"][name]["few"] for run in runs) for name in runs[0]["knn"]
        )
        error = math.hypot(*(standard_error(value, count) for value in (before, after)))
        if abs(after - before) < 2 * error:
            said.append(
                f"{count} test images cannot tell {before:.0f} % from {after:.0f} %: differences "
                f"below {2 * error:.0f} points are chance"
            )
        elif after < before:
            said.append("training made the features worse")
        if pixels >= max(before, after):
            said.append("raw pixels do better than either network: colour or place is the class")
    history = runs[0]["history"]
    std, ideal = history.health[-1]["feature_std"], history.ideal_std
    if std < COLLAPSED * ideal:
        said.append(f"the features collapsed: their spread is {std:.4f}, healthy is {ideal:.4f}")
    elif std < NARROW * ideal:
        said.append(
            f"the features are narrow: their spread is {std:.4f}, healthy is {ideal:.4f}; more "
            "steps, or stronger views"
        )
    return said


def standard_error(percent: float, count: int) -> float:
    """Of a share of `count` test images, in points: what another choice of them would change."""
    return math.sqrt(percent * (100 - percent) / count)


def print_outcome(output: Path, card: dict[str, Any], unreadable: list[str]) -> None:
    options = "".join(f", {name}={value!r}" for name, value in card["options"].items())
    weights = str(output / "backbone.safetensors")
    print(
        f"\n{output / 'report.png'} shows the run. The trained backbone loads with\n"
        f"    net = timm.create_model({card['model']!r}{options})\n"
        f"    net.load_state_dict(safetensors.torch.load_file({weights!r}))"
    )
    if unreadable:
        print(f"\n{len(unreadable)} files could not be read and were left out:")
        print("\n".join(f"    {line}" for line in unreadable))


def save_json(
    path: Path, runs: list[dict[str, Any]], pictures: Pictures, card: dict[str, Any]
) -> None:
    """The figures: those of each seed, and the mean accuracies over the seeds."""
    mean = {
        features: {
            column: statistics.mean(run["knn"][features][column] for run in runs)
            for column in figures
        }
        for features, figures in runs[0]["knn"].items()
    }
    content = {
        **card,
        "train_images": len(pictures.train),
        "test_images": len(pictures.test),
        "classes": pictures.classes,
        "unreadable": pictures.unreadable,
        "knn": mean if pictures.classes else None,
        "seeds": [
            {
                "seed": run["seed"],
                "knn": run["knn"] if pictures.classes else None,
                "steps": len(run["history"].losses),
                "seconds": run["history"].seconds,
                "losses": run["history"].losses,
                "health": run["history"].health,
            }
            for run in runs
        ],
    }
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode())


# The picture ------------------------------------------------------------------------------------


def draw(
    path: Path,
    pictures: Pictures,
    examples: tuple[Tensor, Tensor, Tensor],
    history: Any,
    accuracy: dict[str, dict[str, float]],
    features: dict[str, Features],
) -> None:
    """One page. `examples`: images and their two views, floats in [0, 1]."""
    count = len(pictures.test)
    mapped = count >= MAP_LEAST  # fewer points show nothing of how the features lie
    heights = (4.4, 5.2, 6.0)[: 2 + mapped]
    figure = Figure(figsize=(16, sum(heights)), dpi=100, layout="constrained")
    figure.suptitle(headline(accuracy, count), fontsize=18, weight="bold")
    top, middle, *bottom = figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0.02)
    widths = (5, 5, 6) if pictures.classes else (5, 6)
    parts = top.subfigures(1, len(widths), width_ratios=widths)
    if pictures.classes:
        draw_accuracy(parts[0].subplots(), accuracy, pictures)
    draw_curves(parts[-2], history)
    draw_views(parts[-1].subplots(), examples)
    for part, (name, given) in zip(middle.subfigures(1, 2), features.items(), strict=True):
        draw_neighbours(part.subplots(), name, pictures, given)
    shown = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    shown = shown[: MAP_POINTS if pictures.classes else MAP_THUMBNAILS]
    for row in bottom:
        for part, (name, given) in zip(row.subfigures(1, 2), features.items(), strict=True):
            draw_map(part.subplots(), name, pictures, given[1], shown)
        draw_legend(row, pictures.classes)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def headline(accuracy: dict[str, dict[str, float]], count: int) -> str:
    few = [figures["few"] for figures in accuracy.values() if figures]
    if not few:
        return "BYOL: the features before and after training"
    before, after = (f"{v:.0f} ± {standard_error(v, count):.0f} %" for v in few[1:])
    best = ", raw pixels are better" if few[0] >= max(few[1:]) else ""
    return (
        f"BYOL, then 5 labels a class: of {count} unseen images {before} right before training, "
        f"{after} after{best}"
    )


def draw_views(axes: Axes, examples: tuple[Tensor, Tensor, Tensor]) -> None:
    rows = [[tile(image) for image in images] for images in examples]
    axes.imshow(mosaic(rows))
    axes.set_title("Training: two views of one image must match")
    names = ("image", "view 1", "view 2")
    axes.set_yticks([(i + 0.5) * rows[0][0].shape[0] for i in range(3)], names)
    tidy(axes)


def draw_curves(part: SubFigure, history: Any) -> None:
    loss, health = part.subplots(2, 1, sharex=True)
    loss.plot(history.losses, color=GRAY, linewidth=0.8)
    width = max(1, len(history.losses) // 30)
    smooth = np.convolve(history.losses, np.ones(width) / width, "valid")
    loss.plot(np.arange(len(smooth)) + width // 2, smooth, color="black")
    loss.set_ylabel("loss")
    loss.set_title("Health: the loss should fall, the features stay spread")
    steps = [entry["step"] for entry in history.health]
    ideal = history.ideal_std
    health.plot(steps, [entry["feature_std"] for entry in history.health], "o-", markersize=3)
    health.axhline(ideal, color=GREEN, linestyle="--")
    health.text(0, ideal, " healthy: 1/√d", color=GREEN, va="bottom")
    health.text(0, 0, " 0 would be collapse", color=RED, va="bottom")
    health.set(ylim=(0, 1.3 * ideal), ylabel="feature std", xlabel="step")


def draw_accuracy(axes: Axes, accuracy: dict[str, dict[str, float]], pictures: Pictures) -> None:
    colours = (GRAY, "#7fa7d6", "#1f5fa8")
    for column, (key, label) in enumerate((("few", "5 labels a class"), ("all", "all labels"))):
        for i, (name, figures) in enumerate(accuracy.items()):
            bar = axes.bar(
                column + (i - 1) * 0.28,
                figures[key],
                0.26,
                color=colours[i],
                label=name if column == 0 else None,
            )
            axes.bar_label(bar, fmt="%.0f")
            error = standard_error(figures[key], len(pictures.test))
            axes.errorbar(column + (i - 1) * 0.28, figures[key], error, color="black", capsize=3)
        axes.text(column, -4, label, ha="center", va="top")
    axes.axhline(100 / len(pictures.classes), color=RED, linestyle=":", label="chance")
    axes.set(ylim=(0, 100), xticks=[], ylabel="% of unseen images")
    axes.set_title(f"Nearest neighbours name the class, of {len(pictures.test)} images")
    axes.legend(loc="upper left", frameon=False)


def draw_neighbours(axes: Axes, name: str, pictures: Pictures, features: Features) -> None:
    """The same unseen images for every network, drawn by chance."""
    train, test = (F.normalize(values) for values in features)
    queries = choose_queries(pictures)
    nearest = (test[queries] @ train.T).topk(min(SHOWN_NEIGHBOURS, len(train))).indices
    rows = []
    for query, row in zip(queries, nearest, strict=True):
        label = pictures.test_labels[query]
        frames = [
            WHITE if not pictures.classes else GREEN if pictures.train_labels[i] == label else RED
            for i in row
        ]
        tiles = [tile(pictures.train[i], frame) for i, frame in zip(row, frames, strict=True)]
        rows.append([tile(pictures.test[query], "#000000"), np.ones_like(tiles[0])[:, :20], *tiles])
    axes.imshow(mosaic(rows))
    meaning = ": green is the same class" if pictures.classes else ""
    axes.set_title(f"{name}: unseen image | nearest training images{meaning}")
    height = rows[0][0].shape[0]
    labels = [
        drawn(pictures.classes[i]) if pictures.classes and i >= 0 else ""
        for i in pictures.test_labels[queries].tolist()
    ]
    axes.set_yticks([(i + 0.5) * height for i in range(len(rows))], labels)
    tidy(axes)


def choose_queries(pictures: Pictures) -> Tensor:
    """Random test images, of different classes as far as there are."""
    order = torch.randperm(len(pictures.test), generator=torch.Generator().manual_seed(1))
    if not pictures.classes:
        return order[:QUERIES]
    seen: dict[int, int] = {}
    for index in order.tolist():
        seen.setdefault(int(pictures.test_labels[index]), index)
    rest = [index for index in order.tolist() if index not in seen.values()]
    return torch.tensor([*seen.values(), *rest][:QUERIES])


def draw_map(axes: Axes, name: str, pictures: Pictures, features: Tensor, shown: Tensor) -> None:
    points = F.normalize(features[shown])
    perplexity = min(30, (len(shown) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=0, n_iter_without_progress=100)
    place = tsne.fit_transform(points.numpy())
    axes.set_title(f"{name}: map of unseen images (t-SNE)")
    if pictures.classes:
        for label in pictures.test_labels[shown].unique().tolist():
            members = (pictures.test_labels[shown] == label).numpy()
            colour, marker = style(label)
            axes.scatter(*place[members].T, s=28, color=colour, marker=marker, alpha=0.85)
    else:
        axes.scatter(*place.T, s=0)
        for image, point in zip(pictures.test[shown], place, strict=True):
            thumbnail = OffsetImage(to_array(image), zoom=26 / image.shape[-1])
            axes.add_artist(AnnotationBbox(thumbnail, point, frameon=False))
    tidy(axes)
    axes.set_yticks([])


def style(label: int) -> tuple[Any, str]:
    """Ten colours and then other markers, so that 20 classes can be told apart."""
    return f"C{label % 10}", "o^sDvP*X"[label // 10 % 8]


def draw_legend(part: SubFigure, classes: list[str]) -> None:
    if 0 < len(classes) <= 40:
        handles = [
            Line2D([], [], linestyle="", color=style(i)[0], marker=style(i)[1], label=drawn(name))
            for i, name in enumerate(classes)
        ]
        part.legend(handles=handles, loc="outside lower center", ncols=10, frameon=False)


def to_array(image: Tensor) -> np.ndarray:
    """(C, H, W), uint8 or float in [0, 1], as (H, W, 3) floats."""
    values = image / 255 if image.dtype == torch.uint8 else image
    return values.clamp(0, 1).permute(1, 2, 0).cpu().numpy()


def tile(image: Tensor, frame: str = WHITE) -> np.ndarray:
    """The image at a common size within a frame and a white gap."""
    enlarged = F.interpolate(torch.from_numpy(to_array(image)).permute(2, 0, 1)[None], (TILE, TILE))
    framed = np.pad(enlarged[0].permute(1, 2, 0).numpy(), ((4, 4), (4, 4), (0, 0)))
    colour = [int(frame[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    edge = np.ones(framed.shape[:2], bool)
    edge[4:-4, 4:-4] = False
    framed[edge] = colour
    return np.pad(framed, ((2, 2), (2, 2), (0, 0)), constant_values=1)


def mosaic(rows: list[list[np.ndarray]]) -> np.ndarray:
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def tidy(axes: Axes) -> None:
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)

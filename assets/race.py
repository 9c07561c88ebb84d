# /// script
# requires-python = ">=3.10"
# dependencies = ["mlx[cpu]>=0.32.4", "numpy>=1.26", "torch", "jax", "optax"]
# ///
"""The training step of gan.py in four frameworks, each written as its users would write it:
`python -m assets.race`, after `pip install torch jax optax`, on a machine that is otherwise idle and
has no GPU, prints the time of a step in the others over that of gan.py. Five minutes. Contestants
run in processes of their own, and PyTorch and JAX without MLX and OpenBLAS; they get stretches of
batches, row numbers (steps, batch size), and yield after each."""

import subprocess
import sys
import time
from functools import partial
from itertools import pairwise

import numpy as np

LR, BETAS, R1 = 7e-4, (0.0, 0.999), 0.3
G_SIZES, D_SIZES = (100, 128, 256, 512, 784), (784, 512, 256, 128, 1)


def ours(images, stretches):  # with a handicap: this step also averages G
    import gan
    from gan import mx

    images, state, step = mx.array(images), gan.init(0), gan.make_step()
    for stretch in stretches:
        state, _ = gan.run_epoch(step, state, images, stretch)
        yield


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

    g_loss = lambda z: nn.softplus(-d(mx.tanh(g(z)))).mean()

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

    def net(params, x, act):
        *hidden, (weight, bias) = params
        for w, b in hidden:
            x = act(x @ w + b)
        return x @ weight + bias

    logits = partial(net, act=partial(leaky_relu, negative_slope=0.2))
    g_loss = lambda g, d, z: softplus(-logits(d, jnp.tanh(net(g, z, relu)))).mean()

    def d_loss(d, fake, real):
        loss = softplus(-logits(d, real)).mean() + softplus(logits(d, fake)).mean()
        slope = jax.grad(lambda x: logits(d, x).sum())(real)
        return loss + R1 / 2 * (slope**2).sum(1).mean()

    @partial(jax.jit, donate_argnums=0)
    def step(state, images, rows):
        g, d, g_state, d_state, key = state
        key, z_key = jax.random.split(key)
        z = jax.random.normal(z_key, (len(rows), 100))
        loss_d, grads = jax.value_and_grad(d_loss)(d, jnp.tanh(net(g, z, relu)), images[rows])
        updates, d_state = adam.update(grads, d_state)
        d = optax.apply_updates(d, updates)
        loss_g, grads = jax.value_and_grad(g_loss)(g, d, z)
        updates, g_state = adam.update(grads, g_state)
        return (optax.apply_updates(g, updates), d, g_state, d_state, key), (loss_d, loss_g)

    key, normal = jax.random.key(0), jax.nn.initializers.he_normal()
    init = lambda sizes: [(normal(key, pair), jnp.zeros(pair[1])) for pair in pairwise(sizes)]
    images, adam, g, d = jnp.array(images), optax.adam(LR, *BETAS), init(G_SIZES), init(D_SIZES)
    state = (g, d, adam.init(g), adam.init(d), key)
    for stretch in stretches:
        for rows in stretch:
            state, _ = step(state, images, rows)
        yield jax.block_until_ready(state)


CONTESTANTS = {"gan.py": ours, "mlx.nn": mlx_nn, "PyTorch": pytorch, "JAX": jax_optax}


if __name__ == "__main__":
    if sys.argv[1:]:
        rng, (name, batch) = np.random.default_rng(0), sys.argv[1:]
        images = rng.uniform(-1, 1, (60_000, 784)).astype(np.float32)  # what they show is no matter
        stretches = CONTESTANTS[name](images, rng.integers(0, len(images), (6, 12, int(batch))))
        print(np.median(np.diff([time.perf_counter() for _ in stretches])))  # the first warms up
        sys.exit()
    print(f"| time of a step | {' | '.join([*CONTESTANTS][1:])} |\n|{' --- |' * 4}")
    run = partial(subprocess.run, check=True, stdout=subprocess.PIPE)
    command = [sys.executable, "-m", "assets.race"]
    for batch in ("64", "256"):
        seconds = lambda name, batch=batch: float(run([*command, name, batch]).stdout)
        rounds = [[*map(seconds, CONTESTANTS)] for _ in range(5)]
        ratios = np.median([np.divide(times, own) for own, *times in rounds], 0)
        print(f"| batch {batch} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |", flush=True)

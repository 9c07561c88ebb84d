"""Digits of your choice: `python -m assets.conditional`, three minutes on two CPU cores.

This is a conditional GAN (Mirza & Osindero 2014, arXiv 1411.1784) with the step of gan.py. A real
image carries its label as ten more numbers, (N, 794), and so does an image that G draws: G takes
the digit from the first ten numbers of z, the largest one, so that each digit is drawn equally
often. D sees image and label. It would hardly use labels of 0 and 1 beside 784 pixels: they are
16 times as large. Given again, or imported, this goes on with the run in conditional/.
"""

import gan  # isort: skip: before MLX, for OpenBLAS
import mlx.core as mx
import numpy as np

EPOCHS, BATCH, RUN = 8, 64, gan.Path("conditional", gan.CHECKPOINT)


def generator(g, z):
    label = mx.eye(10)[z[:, :10].argmax(1)]
    image = gan.generator(g, mx.concatenate([label, z[:, 10:]], axis=1))
    return mx.concatenate([image, 16 * label], axis=1)


def init(seed):
    g_key, d_key, key = mx.random.split(mx.random.key(seed), 3)
    g = gan.init_mlp(g_key, (gan.LATENT, 128, 256, 512, 784))
    d = gan.init_mlp(d_key, (794, 512, 256, 128, 1))
    return gan.make_state(key, g, d)


images = gan.load_mnist()
labels = mx.array(np.fromfile(gan.DATA / gan.LABELS, np.uint8, offset=8))
real = mx.concatenate([images, 16 * mx.eye(10)[labels]], axis=1)
state, info = gan.load(RUN, like=init(0)) if RUN.exists() else (init(0), {"epoch": 0})
step = gan.make_step(G=generator, r1=0.1)
for epoch in range(info["epoch"] + 1, EPOCHS + 1):
    order = np.random.default_rng(epoch).permutation(len(real))
    batches = order[: len(real) // BATCH * BATCH].reshape(-1, BATCH)
    state, losses = gan.run_epoch(step, state, real, batches)
    gan.save(RUN, state, epoch=epoch)
    print(f"epoch {epoch}/{EPOCHS}: D loss, G loss", losses.tolist())
z = mx.random.normal((100, gan.LATENT), key=mx.random.key(2**32))
z[mx.arange(100), mx.arange(100) % 10] = 100  # column k shows digit k
gan.save_grid("conditional/samples.png", generator(state["ema"], z)[:, :784])

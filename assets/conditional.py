"""Digits of your choice: `python -m assets.conditional`, eight minutes on two CPU cores.

This is a conditional GAN (Mirza & Osindero 2014, arXiv 1411.1784) by one call of gan.train. The
label is part of the image: the first ten pixels, black in all of MNIST, become ten lamps, of which
the digit's is white. G takes the digit from the first ten numbers of z, the largest one, and lights
its lamp. D sees the lamps as 0 and 16, since ten pixels of 784 would hardly count. Real images with
another one's lamps are fakes for D too (Reed et al. 2016, arXiv 1605.05396), without which more than
ten times as many digits are wrong. Given again, this goes on with the run in conditional/.
"""

import gan  # isort: skip: before MLX, for OpenBLAS
import mlx.core as mx
import numpy as np

LAMPS = mx.arange(784) < 10


def generator(g, z):
    digit = z[:, :10].argmax(1, keepdims=True) == mx.arange(10)
    image = gan.generator(g, mx.concatenate([digit, z[:, 10:]], axis=1))
    return mx.concatenate([mx.where(digit, 1.0, -1.0), image[:, 10:]], axis=1)


def discriminator(d, x):
    return gan.discriminator(d, x + mx.stop_gradient((8 + 7 * x) * LAMPS))  # R1 sees x


def d_loss(d, real, fake, r1, D):
    wrong = mx.concatenate([mx.roll(real[:, :10], 1, axis=0), real[:, 10:]], axis=1)
    differ = mx.any(wrong != real, axis=1, keepdims=True)  # neighbours may show the same digit
    return gan.d_loss(d, real, fake, r1, D) + mx.mean(differ * gan.softplus(D(d, wrong))) / 2


def one_hot(labels, n: int) -> mx.array:
    """Rows (n, 10) for n labels, integers from 0 to 9. Raises gan.Refused for others."""
    labels = np.array(labels)
    fits = labels.shape == (n,) and labels.dtype.kind in "iu" and np.isin(labels, range(10)).all()
    gan.require(fits, f"labels must be {n} integers from 0 to 9")
    return mx.eye(10)[mx.array(labels)]


def light(images, labels) -> mx.array:
    """Images (N, 784) with the lamps of their labels (N,)."""
    return mx.concatenate([2 * one_hot(labels, len(images)) - 1, images[:, 10:]], axis=1)


def draw(g: dict, digits, key: mx.array) -> mx.array:
    """Images (n, 784) of the n digits asked for, without lamps."""
    z = mx.random.normal((len(digits), gan.LATENT - 10), key=key)
    z = mx.concatenate([one_hot(digits, len(digits)), z], axis=1)
    return mx.where(LAMPS, -1, generator(g, z))


init = lambda seed: gan.init(seed) | {"lamps": mx.array(10)}  # gan.py --sample refuses its runs
OPTIONS = {"epochs": 24, "init": init, "G": generator, "D": discriminator, "d_loss": d_loss}

if __name__ == "__main__":
    gan.use_own_cache()
    images = light(gan.load_mnist(), gan.read_idx(gan.DATA, gan.LABELS))
    state = gan.train(images, "conditional", resume=True, **OPTIONS)
    digits = draw(state["ema"], [*range(10)] * 10, mx.random.key(0))
    gan.save_grid("conditional/digits.png", digits)

"""A convolutional pair for MNIST: `python -m assets.conv`, a quarter of an hour on two CPU cores.
Convolutions come after the generator of gan.py and before its discriminator; pixels move into
channels and back (Shi et al. 2016, arXiv 1609.05158). Given again, it goes on with the run in conv/.
"""

import gan  # isort: skip: before MLX, for OpenBLAS
import mlx.core as mx


def init_conv(key, n_in, n_out):  # kernels of 3 x 3, He initialisation
    weight = mx.random.normal((n_out, 3, 3, n_in), key=key) * (2 / (9 * n_in)) ** 0.5
    return {"weight": weight, "bias": mx.zeros(n_out)}


def conv(layer, x):
    return mx.conv2d(x, layer["weight"], padding=1) + layer["bias"]


def shrink(x):  # each 2 x 2 pixels become channels of one: (B, H, W, C) to (B, H/2, W/2, 4C)
    return mx.unflatten(mx.unflatten(x, 2, (-1, 2)), 1, (-1, 2)).swapaxes(2, 3).flatten(3)


def grow(x):  # the inverse: (B, H, W, 4C) to (B, 2H, 2W, C)
    return mx.unflatten(x, 3, (2, 2, -1)).swapaxes(2, 3).flatten(3, 4).flatten(1, 2)


def generator(p, z):
    h = gan.generator(p, z).reshape(-1, 7, 7, 16)
    h = grow(gan.relu(conv(p["conv1"], h)))
    return mx.tanh(grow(conv(p["conv2"], h))).reshape(-1, 784)


def discriminator(p, x):
    h = gan.leaky_relu(conv(p["conv1"], shrink(x.reshape(-1, 28, 28, 1))))
    h = gan.leaky_relu(conv(p["conv2"], shrink(h)))
    return gan.discriminator(p, h.reshape(-1, 784))


def init(seed):
    state = gan.init(seed)
    k = mx.random.split(state["key"], 5)
    g = {"conv1": init_conv(k[0], 16, 64), "conv2": init_conv(k[1], 16, 4)}
    d = {"conv1": init_conv(k[2], 4, 16), "conv2": init_conv(k[3], 64, 16)}
    return gan.make_state(k[4], state["g"] | g, state["d"] | d)


OPTIONS = {"epochs": 15, "batch_size": 128, "lr": 1e-3, "r1": 1, "ema": 0.05}
OPTIONS |= {"init": init, "G": generator, "D": discriminator}

if __name__ == "__main__":
    gan.use_own_cache()
    gan.train(gan.load_mnist(), "conv", resume=True, **OPTIONS)

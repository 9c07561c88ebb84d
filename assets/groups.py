"""A GAN that collapses, and one that does not, in ten seconds: `python -m assets.groups`.
The images have 4 x 4 pixels and come in four groups, each with another bright row. The recipe of
gan.py draws all four, each at about 0.25; the bare recipe, with the framework's initial variance,
momentum, no R1 and no average, draws one. The loop is its own."""

import gan  # isort: skip: before MLX, for OpenBLAS
import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

BARE = {"lr": 2e-4, "beta1": 0.5, "r1": 0, "ema": 0}
rng = np.random.default_rng(0)
centres = np.eye(4).repeat(4, 1) * 1.6 - 0.8  # in group i, row i is 0.8 and the rest -0.8
images = mx.array(centres.repeat(640, 0) + rng.normal(0, 0.1, (2560, 16)), mx.float32)


def shares(state, step, epochs=50):
    """Train, and return the share of each group in 1,000 samples."""
    for _ in range(epochs):
        batches = rng.permutation(len(images)).reshape(-1, 64)
        state, _ = gan.run_epoch(step, state, images, batches)
    rows = gan.sample(state["ema"], mx.random.key(1), 1000).reshape(-1, 4, 4).mean(2)
    return np.bincount(np.array(rows.argmax(1)), minlength=4) / 1000


def framework(state):
    g, d = tree_map(lambda w: w / 6**0.5, (state["g"], state["d"]))  # mlx.nn.Linear's variance
    return gan.make_state(state["key"], g, d)


if __name__ == "__main__":
    state = gan.init(0, pixels=16, hidden=(64, 64))
    print("this recipe:", shares(state, gan.make_step()))
    print("bare recipe:", shares(framework(state), gan.make_step(**BARE)))

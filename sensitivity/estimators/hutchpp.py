"""Hutch++: the trace of a matrix with few large eigenvalues, those taken exactly."""

from __future__ import annotations

import torch

from mpq.core.errors import InvalidInputError
from sensitivity.estimators.estimate import Estimate
from sensitivity.estimators.hutchinson import Operator, sign_vector

_FEWEST_PRODUCTS = 6  # two for the error of the rest


def hutchpp(
    product: Operator,
    dimension: int,
    *,
    seed: int,
    products: int,
    dtype: torch.dtype = torch.float64,
) -> Estimate:
    """Estimate the trace of a square matrix from `products` products with vectors.

        Q = orthonormal basis of A S,  S of sign vectors
        Tr A = Tr(Q^T A Q) + E[g^T (I - Q Q^T) A (I - Q Q^T) g]   (Meyer et al. 2021, algorithm 1)

    A third of the products goes to each of A S, A Q and the sign vectors g. For a positive
    semi-definite A the relative error is O(1/products), where Hutchinson's is O(1/sqrt(products));
    with a flat spectrum it is worse than Hutchinson's, by up to sqrt(3). The error bar is the
    standard error over the vectors g given Q, for which the estimate is unbiased; it is 0 where Q
    spans the whole space. `draws` counts the vectors g. Memory: dimension * products / 3.
    """
    if products < _FEWEST_PRODUCTS:
        raise InvalidInputError(
            "products", f"hutchpp takes at least {_FEWEST_PRODUCTS} products, got {products}"
        )
    generator = torch.Generator().manual_seed(seed)
    size = min(products // 3, dimension)
    sketch = torch.stack(
        [product(sign_vector(dimension, generator, dtype)) for _ in range(size)], dim=1
    )
    basis, _ = torch.linalg.qr(sketch)
    exact = sum(float(q @ product(q)) for q in basis.T)
    if size == dimension:
        return Estimate(exact, 0.0, 0)
    found = []
    for _ in range(products - 2 * size):
        g = sign_vector(dimension, generator, dtype)
        rest = g - basis @ (basis.T @ g)
        found.append(float(rest @ product(rest)))
    return Estimate.of(torch.tensor(found, dtype=torch.float64), exact)

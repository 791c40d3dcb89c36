"""What moments by gradients are made of does not depend on the number of threads, at the widths of real models."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bitladder.calibrate.gradients import torch_weights
from bitladder.calibrate.gradients.entry_sums import Gram, Leverage, LowRankGram
from bitladder.calibrate.gradients.usable import torch_threads

THREADS = (1, 2, 3, 4)
TOKENS = 512


def rows(width, seed=0, tokens=TOKENS):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("large", [1 << 24, 1])  # whole, and in pieces
@pytest.mark.parametrize("shape", [(896, 896), (896, 128), (768, 3072), (4864, 896)])
def test_products_with_weights(shape, large, half, monkeypatch):
    monkeypatch.setattr(torch_weights, "LARGE", large)
    # A CPU without kernels for BF16 takes a hundred times as long for it.
    inputs = rows(shape[0], tokens=TOKENS // 4 if half else TOKENS)
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    if half:
        inputs, weight = inputs.bfloat16(), weight.bfloat16()
    found = []
    for threads in THREADS:
        with torch_threads(threads), ThreadPoolExecutor(threads, "", torch.set_num_threads, (1,)) as pool:
            for way in (None, pool):
                found.append(torch_weights._repeatable_product(inputs, weight, way))
                assert torch.get_num_threads() == threads
    assert all(torch.equal(found[0], each) for each in found[1:])
    exact = inputs.double() @ weight.double()
    assert (found[0] - exact).abs().max() < (0.02 if half else 1e-5) * exact.abs().max()


@pytest.mark.parametrize("width", [768, 896, 2048])
@pytest.mark.parametrize("kind", [Gram, lambda width: Gram(64, width // 64), lambda width: LowRankGram(width, 128)])
def test_sums_and_leverages(kind, width):
    found = []
    for threads in THREADS:
        with torch_threads(threads):
            gram, leverage = kind(width), Leverage(width, 1, 128)
            whole = Gram(width)
            for seed in range(2):
                weights = torch.rand(TOKENS, generator=torch.Generator().manual_seed(seed))
                gram.add(rows(width, seed), weights)
                whole.add(rows(width, seed), weights)
            leverage.learn(whole, 0.1)
            found.append([*map(torch.from_numpy, gram.arrays().values()), leverage.of(rows(width))])
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))

import numpy as np
import pytest
import torch

from embedtune.errors import UserError
from embedtune.refine.affine import Affine


@pytest.fixture
def some():
    random = np.random.default_rng(0)
    return Affine(random.normal(size=(3, 5)), random.normal(size=3)), random.normal(size=(7, 5))


def test_it_maps_one_vector_and_many_alike(some):
    affine, x = some
    assert np.allclose(affine(x), x @ affine.weight.T + affine.bias, atol=1e-14)
    assert np.allclose(affine(x[2]), affine(x)[2], atol=1e-14)
    assert np.array_equal(Affine.identity(5)(x), x)


def test_then_is_the_one_after_the_other(some):
    affine, x = some
    other = Affine(np.arange(6.0).reshape(2, 3), np.ones(2))
    assert np.allclose(affine.then(other)(x), other(affine(x)), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torch_in_torch_out_with_gradients(some, dtype):
    affine, x = some
    tensor = torch.tensor(x, dtype=dtype, requires_grad=True)
    out = affine(tensor)
    assert out.dtype == dtype
    wanted = tensor.detach().double().numpy() @ affine.weight.T + affine.bias
    assert np.allclose(out.detach().double().numpy(), wanted, rtol=1e-2, atol=1e-2)
    out.sum().backward()
    assert tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("bad", [np.zeros((2, 4)), np.zeros((2, 5), int), np.zeros((1, 2, 5)), torch.zeros(4)])
def test_what_does_not_fit_is_refused(some, bad):
    with pytest.raises(UserError):
        some[0](bad)

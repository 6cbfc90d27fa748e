import pytest
import torch
import torch.nn.functional as F

from embedtune.fit import losses


def both(logits, labels, weight, factor=1.0):
    mine, theirs = logits.clone().requires_grad_(), logits.clone().float().requires_grad_()
    one = losses.weighted_cross_entropy(mine, labels, weight)
    two = F.cross_entropy(theirs, labels, reduction="sum") * weight
    (one * factor).backward()
    (two * factor).backward()
    return one, two, mine.grad, theirs.grad


@pytest.mark.parametrize("rows", [1, losses.CHUNK, losses.CHUNK + 1, 3 * losses.CHUNK + 7])
@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_the_value_and_gradient_are_torchs(rows, factor):
    torch.manual_seed(rows)
    logits = 8 * torch.randn(rows, 301)
    labels = torch.randint(301, (rows,))
    one, two, mine, theirs = both(logits, labels, 1 / rows, factor)
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_bf16_logits_lose_only_their_own_rounding():
    torch.manual_seed(1)
    logits = (4 * torch.randn(700, 211)).bfloat16()
    labels = torch.randint(211, (700,))
    one, two, mine, theirs = both(logits, labels, 1.0)
    assert one.dtype == torch.float32 and mine.dtype == torch.bfloat16
    torch.testing.assert_close(one, two, atol=0, rtol=1e-5)
    torch.testing.assert_close(mine.float(), theirs, atol=1e-6, rtol=2**-7)


def test_huge_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [3e38, -3e38, 0.0]])
    one, two, mine, theirs = both(logits, torch.tensor([1, 0]), 0.5)
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(mine, theirs)


def test_no_rows_are_no_loss():
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = losses.weighted_cross_entropy(logits, torch.zeros(0, dtype=torch.long), 1.0)
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (0, 5)

"""What the short way of attend learns, on the CPU: nothing."""

import pytest
import torch

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.attention import eager


def refused():
    raise AssertionError("a call was made")


def outlived(t):
    held = []
    torch.func.jvp(lambda x: (held.append(x), x * 2)[1], (t,), (torch.ones_like(t),))
    return held[0]


@pytest.mark.parametrize(
    "change", [lambda t: t, outlived, torch._neg_view], ids=["CPU", "wrapper", "negative"]
)
def test_only_what_may_be_kept_is_made(change):
    seen = eager.Signature("positions", (), (change(torch.zeros(2, 3)), torch.zeros(2, 3)))
    eager.learn(seen, refused)
    assert eager.find(seen) is None


def test_wrappers_that_outlive_their_transform_are_attended_to():
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    expected = mg.attend(q, k, v, P.causal())
    torch.testing.assert_close(mg.attend(outlived(q), k, v, P.causal()), expected)

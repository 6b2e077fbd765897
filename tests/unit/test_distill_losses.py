"""Losses of distillation against the formulas over the whole vocabulary, in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from shared.distill.losses import (
    Expected,
    acceptance,
    expected_in_head,
    forward_kl,
    greedy_agreement,
    place_table,
    reverse_kl,
    total_variation,
)
from shared.distill.target import TOP_K, Distributions, best_of

VOCAB, HEAD, ROWS = 300, 120, 7
F64 = npt.NDArray[np.float64]
CPU = torch.device("cpu")


def head_ids() -> npt.NDArray[np.int64]:
    return np.sort(np.random.default_rng(5).permutation(VOCAB)[:HEAD]).astype(np.int64)


def made_up() -> tuple[npt.NDArray[np.float32], Tensor]:
    """Logits of a target over its vocabulary and of a student over its head."""
    rng = np.random.default_rng(1)
    target = (rng.standard_normal((ROWS, VOCAB)) * 3).astype(np.float32)
    student = torch.from_numpy((rng.standard_normal((ROWS, HEAD)) * 3).astype(np.float32))
    return target, student.requires_grad_()


def softmax(values: F64) -> F64:
    powers = np.exp(values - values.max(-1, keepdims=True))
    shares: F64 = powers / powers.sum(-1, keepdims=True)
    return shares


def outcomes(target: npt.NDArray[np.float32], student: Tensor) -> list[tuple[F64, F64]]:
    """For each row the probabilities of both over (shared ids…, rest), by the slow way."""
    ids = list(head_ids())
    found = []
    for wanted, given in zip(
        softmax(target.astype(np.float64)), softmax(student.detach().double().numpy()), strict=True
    ):
        best = np.argsort(-wanted, kind="stable")[:TOP_K]
        shared = [token for token in best if token in ids]
        p = [wanted[token] for token in shared]
        q = [given[ids.index(token)] for token in shared]
        found.append((np.array([*p, 1 - sum(p)]), np.array([*q, 1 - sum(q)])))
    return found


def seen_by_losses(target: npt.NDArray[np.float32]) -> Expected:
    return expected_in_head(best_of(target), place_table(head_ids(), VOCAB), CPU)


FORMULAS: list[tuple[Callable[[Tensor, Expected], Tensor], Callable[[F64, F64], float]]] = [
    (forward_kl, lambda p, q: float((p * np.log(p / q)).sum())),
    (reverse_kl, lambda p, q: float((q * np.log(q / p)).sum())),
    (acceptance, lambda p, q: float(np.minimum(p, q)[:-1].sum())),
    (total_variation, lambda p, q: 1 - float(np.minimum(p, q)[:-1].sum())),
]


@pytest.mark.parametrize(("loss", "formula"), FORMULAS, ids=lambda function: getattr(function, "__name__", ""))
def test_losses_follow_their_formulas(
    loss: Callable[[Tensor, Expected], Tensor], formula: Callable[[F64, F64], float]
) -> None:
    target, student = made_up()
    found = loss(student, seen_by_losses(target)).detach().numpy()
    wanted = [formula(p, q) for p, q in outcomes(target, student)]
    np.testing.assert_allclose(found, wanted, rtol=5e-3, atol=1e-3)  # log-probs are kept in float16


def test_a_student_that_equals_the_target_has_no_loss() -> None:
    target, _ = made_up()
    target[:, np.setdiff1d(np.arange(VOCAB), head_ids())] = -1e4  # nothing outside the head
    student = torch.from_numpy(target[:, head_ids()])
    expected = seen_by_losses(target)
    assert float(forward_kl(student, expected).abs().max()) < 2e-3
    assert float(reverse_kl(student, expected).abs().max()) < 2e-3
    assert float(acceptance(student, expected).min()) > 1 - float(expected.rest.max()) - 2e-3
    assert greedy_agreement(student, expected).tolist() == [1.0] * ROWS


def test_ids_outside_the_head_go_to_the_rest() -> None:
    table = place_table(np.array([3, 9], dtype=np.int64), 12)
    assert table.tolist() == [-1, -1, -1, 0, -1, -1, -1, -1, -1, 1, -1, -1]
    ids = np.array([[5, 9, 3]], dtype=np.int32)
    logprobs = np.log(np.array([[0.5, 0.25, 0.125]])).astype(np.float16)
    expected = expected_in_head(Distributions(ids, logprobs, np.log([0.125]).astype(np.float16)), table, CPU)
    assert expected.places.tolist() == [[0, 1, 0]]
    np.testing.assert_allclose(expected.probs.numpy(), [[0, 0.25, 0.125]], rtol=1e-3)
    np.testing.assert_allclose(expected.rest.numpy(), [0.625], rtol=1e-3)
    assert expected.best.tolist() == [-1]
    assert greedy_agreement(torch.tensor([[9.0, 0.0]]), expected).tolist() == [0.0]


def test_all_losses_pull_towards_the_target() -> None:
    target, _ = made_up()
    for loss in (forward_kl, reverse_kl, total_variation):
        student = torch.zeros(ROWS, HEAD, requires_grad=True)
        expected = seen_by_losses(target)
        before = acceptance(student.detach(), expected).mean()
        for _ in range(100):
            loss(student, expected).sum().backward()  # type: ignore[no-untyped-call]
            assert student.grad is not None
            student = (student - 2 * student.grad).detach().requires_grad_()
        assert float(acceptance(student.detach(), expected).mean()) > float(before) + 0.05, loss


def test_best_of_keeps_the_likeliest_and_the_mass_of_the_others() -> None:
    target, _ = made_up()
    found, probs = best_of(target), softmax(target.astype(np.float64))
    for row in range(ROWS):
        assert found.ids[row].tolist() == np.argsort(-probs[row], kind="stable")[:TOP_K].tolist()
        np.testing.assert_allclose(np.exp(found.logprobs[row]), probs[row][found.ids[row]], rtol=5e-3, atol=1e-7)
        np.testing.assert_allclose(np.exp(found.log_rest[row]), 1 - probs[row][found.ids[row]].sum(), rtol=5e-3)

"""One battery over every metric: what it must equal, how it merges, how it is stored, what it refuses."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
import sklearn.metrics as reference
import torch
from torch import Tensor

import shoal.metrics
from shoal.errors import ConfigError
from shoal.metrics import (
    AUC,
    F1,
    MAE,
    RMSE,
    Accuracy,
    AveragePrecision,
    Confusion,
    LogLoss,
    Mean,
    Metric,
    TopK,
    from_state,
)

CLASSES = 4
Draw = Callable[[torch.Generator, int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A metric's constructor, inputs for it (the first axis counts samples), and scikit-learn's figure for them."""

    of: Callable[..., Any]
    draw: Draw
    expected: Callable[..., Any]
    options: tuple[Any, ...] = ()

    def metric(self, inputs: tuple[Tensor, ...]) -> Any:
        return self.of(*inputs, *self.options)


def class_scores(rng: torch.Generator, n: int) -> tuple[Tensor, ...]:
    """Scores on a coarse grid, so that many are equal."""
    scores = torch.randint(-6, 7, (n, CLASSES), generator=rng) / 4
    return scores, torch.randint(0, CLASSES, (n,), generator=rng)


def fine_class_scores(rng: torch.Generator, n: int) -> tuple[Tensor, ...]:
    return 5 * torch.randn(n, CLASSES, generator=rng), torch.randint(0, CLASSES, (n,), generator=rng)


def binary_scores(rng: torch.Generator, n: int) -> tuple[Tensor, ...]:
    """Scores of which many are equal, zeros of both signs among them."""
    labels = torch.randint(0, 2, (n,), generator=rng)
    return (torch.randn(n, generator=rng) * 3 + labels).round() / 4, labels


def decisions(rng: torch.Generator, n: int) -> tuple[Tensor, ...]:
    scores, labels = binary_scores(rng, n)
    return scores > 0, labels


def numbers(rng: torch.Generator, n: int) -> tuple[Tensor, ...]:
    """Pairs whose sizes spread over 40 powers of ten: naive sums of them depend on their order."""
    sizes = 10.0 ** torch.randint(-20, 20, (n,), generator=rng)
    return torch.randn(n, generator=rng, dtype=torch.float64) * sizes, torch.randn(n, generator=rng)


def first_number(rng: torch.Generator, n: int) -> tuple[Tensor, ...]:
    return numbers(rng, n)[:1]


def sklearn_top_k(scores: Tensor, labels: Tensor) -> float:
    # scikit-learn lets the higher class win a tie, so it sees the classes in reverse.
    flipped = scores.numpy()[:, ::-1]
    return reference.top_k_accuracy_score(CLASSES - 1 - labels, flipped, k=2, labels=range(CLASSES))


def sklearn_log_loss(logits: Tensor, labels: Tensor) -> float:
    return reference.log_loss(labels, logits.double().softmax(1), labels=range(CLASSES))


def sklearn_binary_log_loss(logits: Tensor, labels: Tensor) -> float:
    return reference.log_loss(labels, logits.double().sigmoid(), labels=[0, 1])


def sklearn_f1(average: str) -> Callable[..., float]:
    return lambda scores, labels: reference.f1_score(labels, scores.argmax(1), average=average)


CASES = {
    "accuracy": Case(Accuracy.of, class_scores, lambda s, y: reference.accuracy_score(y, s.argmax(1))),
    "accuracy of decisions": Case(Accuracy.of, decisions, lambda p, y: reference.accuracy_score(y, p)),
    "top k": Case(TopK.of, class_scores, sklearn_top_k, (2,)),
    "log loss": Case(LogLoss.of, fine_class_scores, sklearn_log_loss),
    "binary log loss": Case(LogLoss.of, binary_scores, sklearn_binary_log_loss),
    "auc": Case(AUC.of, binary_scores, lambda s, y: reference.roc_auc_score(y, s)),
    "average precision": Case(AveragePrecision.of, binary_scores, lambda s, y: reference.average_precision_score(y, s)),
    "confusion": Case(
        Confusion.of, class_scores, lambda s, y: reference.confusion_matrix(y, s.argmax(1), labels=range(CLASSES))
    ),
    "binary f1": Case(F1.of, decisions, lambda p, y: reference.f1_score(y, p), ("binary",)),
    "micro f1": Case(F1.of, class_scores, sklearn_f1("micro"), ("micro",)),
    "macro f1": Case(F1.of, class_scores, sklearn_f1("macro"), ("macro",)),
    "rmse": Case(RMSE.of, numbers, reference.root_mean_squared_error),
    "mae": Case(MAE.of, numbers, reference.mean_absolute_error),
    "mean": Case(Mean.of, first_number, lambda x: math.fsum(x.tolist()) / len(x)),
}


def cases(which: Callable[[tuple[Tensor, ...]], bool] = lambda inputs: True) -> pytest.MarkDecorator:
    """The cases whose inputs are of a certain kind; all by default."""
    chosen = {name: c for name, c in CASES.items() if which(c.draw(torch.Generator().manual_seed(0), 1))}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen.keys())


every_case = cases()
every_case_of_floats = cases(lambda inputs: inputs[0].is_floating_point())
every_case_of_pairs = cases(lambda inputs: len(inputs) == 2)
every_case_of_labels = cases(lambda inputs: len(inputs) == 2 and not inputs[1].is_floating_point())


def merged(parts: list[Any]) -> Any:
    """Merged as a tree of a random shape: neither order nor grouping is fixed."""
    parts = list(parts)
    rng = np.random.default_rng(len(parts))
    while len(parts) > 1:
        one, other = (parts.pop(int(rng.integers(len(parts)))) for _ in range(2))
        parts.append(one.merge(other))
    return parts[0]


def same_bits(one: Any, other: Any) -> bool:
    return msgspec.msgpack.encode(one.to_state()) == msgspec.msgpack.encode(other.to_state()) and one == other


def test_the_battery_covers_every_metric_of_the_package() -> None:
    exported = [getattr(shoal.metrics, name) for name in shoal.metrics.__all__]
    metrics = {kind for kind in exported if inspect.isclass(kind) and hasattr(kind, "of")}
    assert {case.of.__self__ for case in CASES.values()} == metrics  # type: ignore[attr-defined]


@every_case
def test_a_metric_satisfies_the_protocol(case: Case) -> None:
    assert isinstance(case.metric(case.draw(torch.Generator().manual_seed(0), 5)), Metric)


@every_case
@pytest.mark.parametrize("seed", range(20))
def test_any_partition_in_any_order_merges_to_the_whole_bit_for_bit(case: Case, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    inputs = case.draw(rng, 203)
    order = torch.randperm(203, generator=rng)
    cuts = torch.randint(0, 204, (seed,), generator=rng).sort().values.tolist()
    shares = [order[a:b] for a, b in zip([0, *cuts], [*cuts, 203], strict=True)]
    whole = case.metric(inputs)
    split = merged([case.metric(tuple(x[share] for x in inputs)) for share in shares])
    assert same_bits(split, whole)
    assert split.value() == whole.value()


@every_case
@pytest.mark.parametrize("n", [1, 2, 17, 1000])
@pytest.mark.filterwarnings("ignore:Only one class is present")
def test_a_metric_equals_scikit_learns(case: Case, n: int) -> None:
    inputs = case.draw(torch.Generator().manual_seed(n), n)
    value = case.metric(inputs).value()
    with np.errstate(all="ignore"):
        expected = np.asarray(case.expected(*inputs))
    found = np.asarray(value["matrix"] if isinstance(value, dict) else value)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@every_case
@pytest.mark.parametrize("n", [0, 1, 300])
def test_a_state_survives_msgpack_and_json(case: Case, n: int) -> None:
    metric = case.metric(case.draw(torch.Generator().manual_seed(3), n))
    for codec in (msgspec.msgpack, msgspec.json):
        assert same_bits(from_state(codec.decode(codec.encode(metric.to_state()))), metric)
    assert same_bits(from_state(json.loads(json.dumps(metric.to_state()))), metric)


@every_case
def test_no_samples_are_neutral_in_a_merge_and_have_no_value(case: Case) -> None:
    rng = torch.Generator().manual_seed(0)
    nothing, some = case.metric(case.draw(rng, 0)), case.metric(case.draw(rng, 9))
    assert same_bits(nothing.merge(some), some)
    assert same_bits(some.merge(nothing), some)
    with pytest.raises(ConfigError, match="needs at least one sample"):
        nothing.merge(nothing).value()


@every_case_of_floats
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused(case: Case, bad: float) -> None:
    inputs = case.draw(torch.Generator().manual_seed(0), 5)
    inputs[0].view(-1)[2] = bad
    with pytest.raises(ConfigError, match="must be finite"):
        case.metric(inputs)


@every_case_of_pairs
def test_inputs_of_unequal_lengths_are_refused(case: Case) -> None:
    inputs = case.draw(torch.Generator().manual_seed(0), 5)
    with pytest.raises(ConfigError, match="shape"):
        case.metric((inputs[0], inputs[1][:4]))


@every_case_of_labels
def test_a_label_that_is_no_class_is_refused(case: Case) -> None:
    scores, *labels = case.draw(torch.Generator().manual_seed(0), 5)
    labels[0][3] = CLASSES
    with pytest.raises(ConfigError, match="must lie in 0 to"):
        case.metric((scores, *labels))


@every_case
def test_a_metric_merges_with_no_other_kind(case: Case) -> None:
    metric = case.metric(case.draw(torch.Generator().manual_seed(0), 5))
    other = Mean.of(torch.ones(1)) if not isinstance(metric, Mean) else MAE.of(torch.ones(1), torch.ones(1))
    with pytest.raises(ConfigError, match="merges with another"):
        metric.merge(other)


@every_case
def test_a_damaged_state_is_refused(case: Case) -> None:
    state = case.metric(case.draw(torch.Generator().manual_seed(0), 5)).to_state()
    for name in state:
        with pytest.raises(ConfigError):
            from_state({k: v for k, v in state.items() if k != name})
        with pytest.raises(ConfigError):
            from_state({**state, name: ["damaged"]})


@every_case_of_floats
def test_gradients_and_halved_precision_do_no_harm(case: Case) -> None:
    inputs = case.draw(torch.Generator().manual_seed(0), 50)
    half = inputs[0].to(torch.bfloat16)
    plain = case.metric((half.double(), *inputs[1:]))
    assert same_bits(case.metric((half.clone().requires_grad_(), *inputs[1:])), plain)

"""What one metric promises and others do not."""

from __future__ import annotations

import math

import pytest
import torch

from shoal.errors import ConfigError
from shoal.metrics import AUC, F1, RMSE, Accuracy, AveragePrecision, Confusion, LogLoss, Mean, TopK


def test_top_1_is_accuracy_with_ties_too() -> None:
    scores, labels = torch.randint(0, 3, (500, 7)).float(), torch.randint(0, 7, (500,))
    assert TopK.of(scores, labels, k=1).value() == Accuracy.of(scores, labels).value()


def test_top_k_beyond_the_number_of_classes_is_always_right() -> None:
    assert TopK.of(torch.randn(20, 3), torch.randint(0, 3, (20,))).value() == 1.0


def test_metrics_with_other_options_do_not_merge() -> None:
    scores, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(ConfigError, match="same k"):
        TopK.of(scores, labels, k=1).merge(TopK.of(scores, labels, k=2))
    with pytest.raises(ConfigError, match="same average"):
        F1.of(scores, labels, "macro").merge(F1.of(scores, labels, "micro"))
    with pytest.raises(ConfigError, match="as many classes"):
        Confusion.of(scores, labels).merge(Confusion.of(torch.randn(5, 4), labels))


def test_options_that_cannot_be_are_refused() -> None:
    scores, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(ConfigError, match="at least 1"):
        TopK.of(scores, labels, k=0)
    with pytest.raises(ConfigError, match="binary, micro, macro"):
        F1.of(scores, labels, "weighted")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="two classes"):
        F1.of(scores, labels, "binary")


def test_one_label_only_has_no_auc() -> None:
    assert math.isnan(AUC.of(torch.randn(5), torch.ones(5, dtype=torch.long)).value())


def test_average_precision_without_positives_is_0() -> None:
    assert AveragePrecision.of(torch.randn(5), torch.zeros(5, dtype=torch.long)).value() == 0.0


def test_equal_scores_alone_have_an_auc_of_one_half() -> None:
    assert AUC.of(torch.zeros(1001), torch.arange(1001) % 2).value() == 0.5


def test_f1_without_the_class_is_0() -> None:
    assert F1.of(torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.long), "binary").value() == 0.0


def test_floats_of_one_dimension_are_not_taken_for_classes() -> None:
    with pytest.raises(ConfigError, match="such as logits > 0; not float32 of shape"):
        Accuracy.of(torch.rand(5), torch.ones(5, dtype=torch.long))


def test_predicted_class_numbers_need_the_number_of_classes() -> None:
    predicted, labels = torch.tensor([0, 2, 1]), torch.tensor([0, 1, 1])
    with pytest.raises(ConfigError, match="num_classes must be given"):
        Confusion.of(predicted, labels)
    assert Confusion.of(predicted, labels, num_classes=3).value() == {"matrix": [[1, 0, 0], [0, 1, 1], [0, 0, 0]]}
    assert Accuracy.of(predicted, labels).value() == 2 / 3


def test_extreme_logits_cost_what_they_should() -> None:
    labels = torch.tensor([1, 0])
    assert LogLoss.of(torch.tensor([-800.0, 800.0]), labels).value() == 800.0
    assert LogLoss.of(torch.tensor([[800.0, 0.0], [0.0, 800.0]]), labels).value() == 800.0


def test_an_error_too_large_to_square_is_refused() -> None:
    with pytest.raises(ConfigError, match="overflow"):
        RMSE.of(torch.tensor([1e200], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))


def test_a_mean_is_rounded_once() -> None:
    values = torch.tensor([1e16, 1.0, -1e16, 1.0], dtype=torch.float64)
    assert Mean.of(values).value() == 0.5


def test_folding_in_many_batches_keeps_few_sorted_runs() -> None:
    rng = torch.Generator().manual_seed(0)
    whole = AUC.of(torch.rand(8, generator=rng), torch.arange(8) % 2)
    for _ in range(1000):
        whole = whole.merge(AUC.of(torch.rand(8, generator=rng), torch.arange(8) % 2))
    assert len(whole.counts.runs) <= math.log2(8008) + 1

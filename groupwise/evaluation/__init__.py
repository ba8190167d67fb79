"""Accuracy and pass@k over any engine, each row exactly once."""

from __future__ import annotations

from groupwise.accuracy import Interval, accuracy, confidence_interval, mean_pass_at_k, pass_at_k
from groupwise.evaluation.evaluator import Evaluator, evaluate
from groupwise.evaluation.report import EvalReport, EvalRow, EvalSample

__all__ = [
    "EvalReport",
    "EvalRow",
    "EvalSample",
    "Evaluator",
    "Interval",
    "accuracy",
    "confidence_interval",
    "evaluate",
    "mean_pass_at_k",
    "pass_at_k",
]

"""The doctor watches learning: rules over each step's numbers, and what each of them found."""

from groupwise.doctor.doctor import Doctor, Finding
from groupwise.doctor.registry import build_rules, check_rules, rule_names

__all__ = ["Doctor", "Finding", "build_rules", "check_rules", "rule_names"]

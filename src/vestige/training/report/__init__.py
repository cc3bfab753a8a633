"""The page about runs, and what it reads from their folders."""

from vestige.training.report.page import write_report

__all__ = ["write_report"]

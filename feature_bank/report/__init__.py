"""The report of a bank as one HTML page."""

from __future__ import annotations

from feature_bank.report.page import Written, render_report, write_report

__all__ = ["Written", "render_report", "write_report"]

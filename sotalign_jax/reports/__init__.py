"""Pages for people: a run, a comparison or a sweep as one HTML file that needs no other."""

from sotalign_jax.reports.report import write_report

__all__ = ["write_report"]

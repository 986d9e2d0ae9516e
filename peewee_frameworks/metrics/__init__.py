"""Metrics of the pools, for Prometheus (extra ``prometheus``) and OpenTelemetry (extra ``opentelemetry``).

::

    body, content_type = metrics.render(orm)  # what a /metrics endpoint answers
    metrics.register(orm)  # or: into the registry that the application exposes already
    metrics.instrument(orm)  # or: OpenTelemetry's instruments

Nothing is measured for this that `orm.stats()` does not hold anyway, and nothing happens at a checkout.
"""

from __future__ import annotations

from .opentelemetry import instrument
from .prometheus import register, render

__all__ = ["instrument", "register", "render"]

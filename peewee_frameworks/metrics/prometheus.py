"""Metrics for Prometheus: the statistics are read when they are scraped.

In ``prometheus_client``'s multi-process mode a scrape reaches one worker and is to tell of all: see `multiprocess`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peewee_frameworks.errors import ConfigurationError
from peewee_frameworks.pool.stats import BOUNDS, Histogram

from . import multiprocess
from .families import METRICS, Metric, moments, values

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric as Family

    from peewee_frameworks.extension import Extension
    from peewee_frameworks.runtime import Runtime


def render(*orms: Extension) -> tuple[bytes, str]:
    """Return what a ``/metrics`` endpoint answers about the pools, and about nothing else.

    In the multi-process mode (``PROMETHEUS_MULTIPROC_DIR``) it tells of all workers, else of this process.

    Args:
        orms: each `Peewee` of the application.

    Returns: the body, and its content type.

    Raises: `ConfigurationError` without ``prometheus_client``, or without a `Peewee`.
    """
    prometheus = _import()
    runtimes = _runtimes(orms)
    registry = prometheus.CollectorRegistry()
    registry.register(_Everybody(runtimes) if multiprocess.enabled() else Collector(runtimes))
    return prometheus.generate_latest(registry), prometheus.CONTENT_TYPE_LATEST


def register(*orms: Extension, registry: CollectorRegistry | None = None) -> Collector:
    """Add the pools to a registry that the application exposes already. Call it once, with all of them.

    In the multi-process mode nothing needs to be registered: each worker publishes from its start.

    Args:
        orms: each `Peewee` of the application; its databases need not be known yet.
        registry: by default ``prometheus_client.REGISTRY``.

    Returns: the collector, for ``registry.unregister``.

    Raises: `ConfigurationError` without ``prometheus_client``, or without a `Peewee`; ``ValueError`` if pools were registered
        there before.
    """
    prometheus = _import()
    collector = Collector(_runtimes(orms))
    (prometheus.REGISTRY if registry is None else registry).register(collector)
    return collector


def _import() -> Any:
    try:
        import prometheus_client  # noqa: PLC0415 - an extra
    except ImportError:
        raise ConfigurationError(
            "These metrics need prometheus_client. Install it: pip install 'peewee-frameworks[prometheus]'"
        ) from None
    return prometheus_client


def _runtimes(orms: Sequence[Extension]) -> list[Runtime]:
    if not orms:
        raise ConfigurationError("Whose metrics? Pass the Peewee of the application: metrics.render(orm).")
    return [orm.runtime for orm in orms]


def prometheus_name(metric: Metric) -> str:
    """Return a metric's name without the suffix of its kind, as Prometheus has it: the unit is part of it."""
    return metric.name.replace(".", "_") + ("_seconds" if metric.unit == "s" else "")


def label_names(metric: Metric) -> tuple[str, ...]:
    """Return the names of a metric's labels."""
    return ("pool_name",) if metric.label is None else ("pool_name", metric.label.rpartition(".")[2])


class Collector:
    """What ``prometheus_client`` asks at each scrape."""

    def __init__(self, runtimes: Iterable[Runtime]) -> None:
        self._runtimes = list(runtimes)

    def describe(self) -> Iterator[Family]:
        """Name the metrics, so that a registry refuses a second collector."""
        for metric in METRICS:
            yield _family(metric)

    def collect(self) -> Iterator[Family]:
        """Read the statistics."""
        pools = moments(self._runtimes)
        for metric in METRICS:
            family: Any = _family(metric)
            for moment in pools:
                for label, value in values(metric, moment):
                    labels = [moment.pool] if label is None else [moment.pool, label]
                    if isinstance(value, Histogram):
                        family.add_metric(labels, buckets=_cumulated(value), sum_value=value.sum)
                    else:
                        family.add_metric(labels, value)
            yield family


def _family(metric: Metric) -> Family:
    from prometheus_client import core  # noqa: PLC0415 - an extra

    kinds: Any = {
        "gauge": core.GaugeMetricFamily,
        "counter": core.CounterMetricFamily,
        "histogram": core.HistogramMetricFamily,
    }
    family: Family = kinds[metric.kind](prometheus_name(metric), metric.text, labels=label_names(metric))
    return family


def _cumulated(histogram: Histogram) -> list[tuple[str, int]]:
    total, buckets = 0, []
    for bound, count in zip((*map(str, BOUNDS), "+Inf"), histogram.buckets, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets


class _Everybody:
    """What all workers have published, this one just now."""

    def __init__(self, runtimes: Iterable[Runtime]) -> None:
        self._runtimes = runtimes

    def collect(self) -> Iterator[Family]:
        for runtime in self._runtimes:
            multiprocess.publish(runtime)
        return multiprocess.collect({prometheus_name(metric) for metric in METRICS})

"""OpenTelemetry's instruments: counts are read when they are collected, durations are passed on in batches."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from peewee_frameworks.errors import ConfigurationError
from peewee_frameworks.pool.stats import BOUNDS
from peewee_frameworks.stats import recorder_of

from .families import METRICS, Metric, moments, pool_names, values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

    from peewee_frameworks.extension import Extension
    from peewee_frameworks.runtime import Runtime

POOL = "db.client.connection.pool.name"


def instrument(*orms: Extension, meter_provider: MeterProvider | None = None) -> None:
    """Make the instruments of the pools. Call it once, with all of them, after ``init_app``.

    Until the application has configured OpenTelemetry's SDK they do nothing.

    Args:
        orms: each `Peewee` of the application.
        meter_provider: by default the global one, which may be set later.

    Raises: `ConfigurationError` without ``opentelemetry-api``, without a `Peewee`, or while its databases are not known.
    """
    try:
        from opentelemetry import metrics  # noqa: PLC0415 - an extra
    except ImportError:
        raise ConfigurationError(
            "These metrics need opentelemetry-api. Install it: pip install 'peewee-frameworks[opentelemetry]'"
        ) from None
    if not orms:
        raise ConfigurationError("Whose metrics? Pass the Peewee of the application: metrics.instrument(orm).")
    from peewee_frameworks import __version__  # noqa: PLC0415 - defined after its imports

    meter = metrics.get_meter("peewee_frameworks", __version__, meter_provider)
    runtimes = [orm.runtime for orm in orms]
    for runtime in runtimes:
        runtime.states  # noqa: B018 - raises what is missing
    refs = [weakref.ref(runtime) for runtime in runtimes]  # a provider lives as long as the process
    histograms: dict[str, Any] = {}
    for metric in METRICS:
        if metric.kind == "histogram":
            histograms[metric.name.rpartition(".")[2]] = meter.create_histogram(
                metric.name, metric.unit, metric.text, explicit_bucket_boundaries_advisory=BOUNDS
            )
        else:
            create: Any = (
                meter.create_observable_counter if metric.kind == "counter" else meter.create_observable_up_down_counter
            )
            create(metric.name, [_observer(metric, refs)], metric.unit, metric.text)
    for state, name in pool_names(runtimes).items():
        recorder = recorder_of(state)
        if recorder is not None:
            recorder.sinks.append(_sink(histograms, {POOL: name}))


def _observer(
    metric: Metric, refs: Sequence[weakref.ref[Runtime]]
) -> Callable[[CallbackOptions], Iterator[Observation]]:
    from opentelemetry.metrics import Observation  # noqa: PLC0415 - an extra

    def observe(_: CallbackOptions) -> Iterator[Observation]:
        for moment in moments(runtime for ref in refs if (runtime := ref()) is not None):
            for label, value in values(metric, moment):
                labels = {POOL: moment.pool} if metric.label is None else {POOL: moment.pool, metric.label: label}
                yield Observation(value, labels)  # type: ignore[arg-type]

    return observe


def _sink(histograms: dict[str, Any], labels: dict[str, str]) -> Callable[[str, Sequence[float]], None]:
    def sink(name: str, batch: Sequence[float]) -> None:
        record = histograms[name].record
        for seconds in batch:
            record(seconds, labels)

    return sink

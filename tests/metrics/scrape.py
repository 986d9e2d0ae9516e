"""A scrape over HTTP, as Prometheus makes it, and its samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from tests.support.process import ServerProcess


@dataclass
class Scrape:
    """What one scrape gave: (name, labels) → value."""

    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]
    kinds: dict[str, str]

    def get(self, name: str, **labels: str) -> float | None:
        """Return one sample's value; None if there is none."""
        return self.samples.get((name, frozenset(labels.items())))

    def value(self, name: str, **labels: str) -> float:
        """Return one sample's value, which must be there."""
        found = self.get(name, **labels)
        assert found is not None, f"{name}{labels} is not among {sorted(name for name, _ in self.samples)}"
        return found

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.samples}


def parse(body: str) -> Scrape:
    """Read the text format; a sample that is there twice is an error, as it is to Prometheus."""
    samples: dict[Any, float] = {}
    kinds = {}
    for family in text_string_to_metric_families(body):
        kinds[family.name] = family.type
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in samples, f"{key} is there twice"
            samples[key] = sample.value
    return Scrape(samples, kinds)


def scrape(process: ServerProcess, path: str = "/metrics") -> Scrape:
    """GET the endpoint on a connection of its own."""
    with process.client() as client:
        response = client.get(path, Connection="close")
    assert response.status == 200, response.text + process.output
    assert response.headers["content-type"].startswith("text/plain; version="), response.headers
    return parse(response.text)

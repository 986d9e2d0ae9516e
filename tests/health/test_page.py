"""The status page in a real browser, on a real application.

With PEEWEE_FRAMEWORKS_SCREENSHOTS=DIRECTORY (`make screenshots`) it also takes those that the documentation shows.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.health.browser import browser
from tests.health.helpers import PATIENCE, TOKEN
from tests.support.client import Client
from tests.support.databases import scratch
from tests.support.servers import require_server
from tests.support.webservers import gunicorn, uvicorn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.process import ServerProcess

WIDTHS = (390, 820, 1440)
SCHEMES = ("light", "dark")
WAIT = PATIENCE * 2000  # Playwright counts milliseconds
PAGE = f"/db/?token={TOKEN}"

# What a page of ours runs before its own script: how long after the server had made a document its numbers stand there.
MEASURE = """
addEventListener("shown", event => {
  const node = document.documentElement, delay = Date.now() / 1000 - event.detail;
  node.dataset.worst = Math.max(delay, Number(node.dataset.worst || 0));
  node.dataset.count = Number(node.dataset.count || 0) + 1;
});
"""


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(tmp_path_factory.mktemp("profile")) as context:
        context.add_init_script(MEASURE)
        yield context


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    require_server("mysql")
    with (
        scratch("mysql", tmp_path_factory.mktemp("page")) as place,
        uvicorn(
            "tests.health.served:starlette_app",
            factory=True,
            env={"SERVED_URL": place.pool_url(max_connections=8, timeout=2, leak_threshold=1, pool_name="shop")},
        ) as process,
    ):
        yield process


class Page:
    """A page of the browser, and what it complained about."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("requestfailed", lambda request: self.complaints.append(f"{request.url}: {request.failure}"))

    def open(self, url: str) -> None:
        assert self.page.goto(url).status == 200
        self.page.locator("html[data-shown]").wait_for(timeout=WAIT)

    def await_update(self) -> None:
        """Wait until another document has come."""
        count = self.count()
        while self.count() <= count:
            self.page.wait_for_timeout(20)

    def count(self) -> int:
        return int(self.page.locator("html").get_attribute("data-count"))

    def number(self, name: str) -> Any:
        return self.page.locator(f'[data-pool="default"] [data-of="{name}"] dd')

    def says(self, text: str) -> None:
        self.page.get_by_text(text).first.wait_for(timeout=WAIT)


@pytest.fixture
def page(context: Any) -> Iterator[Page]:
    page = context.new_page()
    yield Page(page)
    page.close()


def get(process: ServerProcess, path: str) -> int:
    with Client(process.url, PATIENCE * 4) as client:
        return client.get(path).status


@contextmanager
def held(process: ServerProcess, name: str) -> Iterator[None]:
    """Keep a connection in use meanwhile; each name once, since its gate stays open."""
    path = "/reports"
    thread = threading.Thread(target=get, args=(process, f"{path}/{name}"))
    thread.start()
    try:
        yield
    finally:
        assert get(process, f"/let_go/{name}") == 200
        thread.join(PATIENCE * 2)


def test_it_fits_each_width_in_light_and_dark_without_a_complaint(process, page):
    with held(process, "daily"):
        page.open(process.url + PAGE)
        page.says("suspected leak")
        pictures = set()
        for width, scheme in itertools.product(WIDTHS, SCHEMES):
            page.page.set_viewport_size({"width": width, "height": 900})
            page.page.emulate_media(color_scheme=scheme)
            page.await_update()
            for plot in page.page.locator("figure svg").all():
                assert plot.bounding_box()["height"] > 100
            for element in page.page.locator(".card, header, table:visible, figure, td:visible").all():
                box = element.bounding_box()
                if box is not None:
                    assert box["x"] >= 0, (width, scheme)
                    assert box["x"] + box["width"] <= width + 1, (width, scheme)
            pictures.add(page.page.screenshot(full_page=True))
        assert len(pictures) == len(WIDTHS) * len(SCHEMES)
    assert page.complaints == []


def test_it_shows_a_change_within_two_seconds(process, page):
    page.open(process.url + PAGE)
    used = page.number("used")
    page.page.locator('[data-of="used"] dd[data-said="0 of 8"]').wait_for(timeout=WAIT)
    with held(process, "yearly"):
        page.page.locator('[data-of="used"] dd[data-said="1 of 8"]').wait_for(timeout=WAIT)
        assert used.inner_text() == "1 of 8"
        page.says("request GET /reports/yearly")
    page.page.locator('[data-of="used"] dd[data-said="0 of 8"]').wait_for(timeout=WAIT)
    page.says("No connection is in use.")
    # The server looks once a second; from there to the numbers on the page this is all there is.
    assert float(page.page.locator("html").get_attribute("data-worst")) < 1.0
    assert page.count() >= 3
    assert page.complaints == []


def test_a_suspected_leak_shows_where_its_connection_was_taken(process, page):
    page.open(process.url + PAGE)
    with held(process, "weekly"):
        page.says("suspected leak")
        row = page.page.locator("#holders tbody tr")
        summary = row.locator("summary")
        summary.focus()
        page.page.keyboard.press("Enter")
        stack = row.locator("pre")
        stack.wait_for(timeout=WAIT)
        assert "served.py" in stack.inner_text()
        page.await_update()
        assert stack.is_visible()  # an update does not fold it
    assert page.complaints == []


def test_what_others_have_written_is_text(process, page):
    """The path of a request is anybody's."""
    path = "<img src=x onerror=alert(1)>"
    page.open(process.url + PAGE)
    thread = threading.Thread(target=get, args=(process, "/reports/%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E"))
    thread.start()
    page.says(path)
    assert page.page.locator("#holders img").count() == 0
    assert get(process, "/let_go/%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E") == 200
    thread.join(PATIENCE)
    assert page.complaints == []


def test_events_that_are_alike_are_shown_once_each(process, page):
    """As when two connections pass the leak threshold in one look; a row must not be made anew with each document."""
    page.open(process.url + PAGE)
    shown = page.page.evaluate(
        """() => {
          const event = { at: 1795654610.1, pool: "default", kind: "leak", text: "the same" };
          for (let round = 0; round < 3; round++) showEvents([event, event, { ...event, at: 1795654600 }]);
          return document.querySelectorAll("#events tbody tr").length;
        }"""
    )
    assert shown == 3


def test_those_who_do_not_see_it_can_use_it(process, page):
    page.open(process.url + PAGE)
    inner = page.page
    assert inner.get_by_role("heading", level=1).inner_text() == "Database pools"
    assert inner.get_by_role("region", name="default").count() == 1
    assert "Live from worker" in inner.get_by_role("status").inner_text()
    plots = inner.get_by_role("img", name="pool default")
    assert plots.count() == 4
    assert "at most" in plots.first.get_attribute("aria-label")
    with held(process, "monthly"):
        table = inner.get_by_role("table", name="Longest in use")
        table.wait_for(timeout=WAIT)
        assert table.get_by_role("columnheader").count() == 5
    inner.get_by_role("radio", name="5 min").focus()
    inner.keyboard.press("ArrowRight")
    assert inner.get_by_role("radio", name="10 min").is_checked()
    inner.locator("svg text", has_text="10 min").first.wait_for(timeout=WAIT)
    assert page.complaints == []


def test_without_the_guard_there_is_no_page(process, page):
    assert page.page.goto(process.url + "/db/").status == 403
    assert page.page.locator("script").count() == 0
    assert "refused" in page.page.locator("body").inner_text()


def test_it_says_when_the_connection_is_lost_and_comes_back_by_itself(process, page):
    page.open(process.url + PAGE)
    page.says("Live from worker")
    process.stop()
    page.says("Connection lost")
    process.start()
    page.says(f"Live from worker {process.pid}")
    page.says("Heard before from")


def test_where_there_is_no_thread_for_a_stream_it_asks_once_a_second(page, tmp_path):
    with gunicorn(
        "tests.health.served:flask_app",
        factory=True,
        worker="sync",
        workers=2,
        env={"SERVED_URL": f"sqlite+pool:///{tmp_path / 'shop.db'}"},
        ready="/db/live",
    ) as process:
        page.open(process.url + PAGE)
        page.says("asking once a second")
        # Either worker answers in turn; the page shows one of them, and lets choose.
        choice = page.page.locator("#workers label")
        choice.nth(1).wait_for(timeout=WAIT)
        choice.nth(1).click()
        page.says(f"Live from worker {choice.nth(1).inner_text()}")
    assert [each for each in page.complaints if "requestfailed" not in each and "ERR_CONNECTION" not in each] == []


@pytest.mark.timeout(300)
def take_pictures(process, page):
    """The last minute and a half of an application that has a rush, for the documentation."""
    directory = Path(os.environ["PEEWEE_FRAMEWORKS_SCREENSHOTS"])
    directory.mkdir(parents=True, exist_ok=True)
    page.open(process.url + PAGE)
    page.page.get_by_role("radio", name="2 min").check(force=True)
    end = time.monotonic() + 100
    dice = random.Random(7)

    def customer(number: int) -> None:
        while (left := end - time.monotonic()) > 0:
            rush = 8 if 22 < left < 45 else 1
            get(process, f"/orders/{number}?for={dice.uniform(0.01, 0.12) * rush:.3f}")
            time.sleep(dice.uniform(0.05, 0.6) / rush)

    customers = [threading.Thread(target=customer, args=(number,)) for number in range(14)]
    for thread in customers:
        thread.start()
    page.page.wait_for_timeout(85_000)
    with held(process, "2026"), held(process, "stock"):
        page.page.wait_for_timeout(3_000)
        for name, width, height, scheme in (
            ("status-light", 1280, 1000, "light"),
            ("status-dark", 1280, 1000, "dark"),
            ("status-phone", 390, 844, "dark"),
        ):
            page.page.emulate_media(color_scheme=scheme)
            page.page.set_viewport_size({"width": width, "height": height})
            page.page.wait_for_timeout(400)
            (directory / f"{name}.png").write_bytes(page.page.screenshot())
    for thread in customers:
        thread.join(PATIENCE)


if "PEEWEE_FRAMEWORKS_SCREENSHOTS" in os.environ:  # no test that would be skipped each time
    test_pictures = take_pictures

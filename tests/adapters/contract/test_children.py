"""Tasks and threads of one request, at once: right results or ConcurrentUse, never a wrong one."""

from __future__ import annotations

import pytest

from tests.adapters.contract.served import Served, rid

CHILDREN = 5


def gather(served: Served, kind: str, one: str) -> list[str]:
    response = served.get(f"/gather/{kind}/{one}")
    assert response.status == 200, served.process.output[-3000:]
    return response.json()


def own(one: str) -> list[str]:
    return [f"{one}-{number}" for number in range(CHILDREN)]


@pytest.mark.parametrize("kind", ["inline", "inline-tx", "scoped"])
def test_children_get_their_own_answers(served: Served, kind):
    one = rid()
    assert gather(served, kind, one) == own(one)
    assert served.count(one) == kind.endswith("-tx")


@pytest.mark.parametrize("kind", ["run", "run-tx"])
def test_children_take_turns_in_orm_run(served: Served, kind):
    one = rid()
    assert gather(served, kind, one) == own(one)
    assert served.count(one) == kind.endswith("-tx")


@pytest.mark.parametrize("kind", ["to_thread", "to_thread-tx"])
def test_threads_of_one_request_get_their_own_answer_or_an_error(served: Served, kind):
    for _ in range(10):
        one = rid()
        answers = gather(served, kind, one)
        assert all(answer in {right, "ConcurrentUse"} for answer, right in zip(answers, own(one), strict=True))
        assert served.count(one) == kind.endswith("-tx")


def test_a_sibling_does_not_get_into_a_transaction(served: Served):
    one = rid()
    assert gather(served, "sibling", one) == [one, "ConcurrentUse", one]
    assert served.count(one) == 1


def test_many_requests_with_children(served: Served):
    ids = [rid() for _ in range(20)]
    results = served.hammer([f"/gather/inline/{one}" for one in ids], 5)
    assert [result.json() for result in results] == [own(one) for one in ids]

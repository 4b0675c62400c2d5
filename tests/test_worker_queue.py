import pytest

from pipelines.worker.queue import FairQueue


def drain(queue, priority="interactive"):
    order = []
    while (item := queue.first(priority)) is not None:
        order.append(item)
        queue.take(priority)
    return order


def test_senders_take_turns_however_much_one_of_them_wants():
    queue = FairQueue(100)
    for number in range(5):
        queue.put("interactive", "hog", f"h{number}", 10.0)
    queue.put("interactive", "guest", "g0", 10.0)
    queue.put("interactive", "guest", "g1", 10.0)
    assert drain(queue) == ["h0", "g0", "h1", "g1", "h2", "h3", "h4"]


def test_turns_are_by_cost_and_not_by_number():
    queue = FairQueue(100)
    for number in range(4):
        queue.put("interactive", "long", f"l{number}", 30.0)
    for number in range(6):
        queue.put("interactive", "short", f"s{number}", 10.0)
    order = drain(queue)
    assert order[:5] == ["l0", "s0", "s1", "s2", "l1"], "three short ones cost as much as a long one"


def test_who_was_away_claims_no_past():
    queue = FairQueue(100)
    for number in range(6):
        queue.put("interactive", "early", f"e{number}", 10.0)
    for _ in range(3):
        queue.take("interactive")
    for number in range(3):
        queue.put("interactive", "late", f"l{number}", 10.0)
    assert drain(queue) == ["e3", "l0", "e4", "l1", "e5", "l2"]


def test_a_full_queue_has_room_for_the_fair_part_of_a_newcomer_alone():
    queue = FairQueue(8)
    assert queue.has_room("interactive", "hog", 8)
    assert not queue.has_room("interactive", "hog", 9)
    for number in range(8):
        queue.put("interactive", "hog", number, 1.0)
    assert not queue.has_room("interactive", "hog", 1)
    assert queue.has_room("interactive", "guest", 4)
    assert not queue.has_room("interactive", "guest", 5)
    assert queue.has_room("bulk", "hog", 8), "priorities have places of their own"


def test_there_are_never_more_than_two_limits_of_items():
    queue = FairQueue(16)
    taken = 0
    for number in range(400):
        sender = f"s{number % 40}"
        if queue.has_room("interactive", sender, 1):
            queue.put("interactive", sender, number, 1.0)
            taken += 1
    assert 16 <= taken == len(queue) <= 32


def test_items_may_leave_from_anywhere():
    queue = FairQueue(9)
    for number in range(3):
        queue.put("interactive", "a", f"a{number}", 1.0)
        queue.put("bulk", "b", f"b{number}", 1.0)
    assert queue.drop("a1")
    assert queue.drop("b0")
    assert not queue.drop("a1")
    assert (drain(queue), drain(queue, "bulk")) == (["a0", "a2"], ["b1", "b2"])
    with pytest.raises(IndexError, match="bulk: nobody waits"):
        queue.take("bulk")

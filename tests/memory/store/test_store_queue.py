"""Which adapter is read next."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loraplex.memory.store_queue import LoadQueue
from loraplex.memory.store_read_times import ReadTimes


def test_first_come_first_served():
    queue = LoadQueue()
    for job in "abc":
        queue.add(job, job)
    queue.discard("b")
    assert [queue.start(), queue.start(), queue.start()] == ["a", "c", None]


def test_a_job_waits_for_another_of_its_key_and_then_is_next():
    queue = LoadQueue()
    queue.add("a", "first")
    assert queue.start() == "first"
    queue.add("a", "second")
    queue.add("b", "other")
    queue.add("c", "third")
    assert queue.start() == "other"
    queue.end("a")
    assert queue.start() == "second"
    assert len(queue) == 1


@given(st.lists(st.tuples(st.sampled_from(["add", "discard", "start", "end"]), st.sampled_from("abcd")), max_size=60))
def test_no_two_jobs_of_a_key_run_at_once_and_none_is_lost(operations):
    queue, waiting, running = LoadQueue(), {}, {}
    for number, (operation, key) in enumerate(operations):
        match operation:
            case "add" if key not in waiting:
                waiting[key] = (key, number)
                queue.add(key, waiting[key])
            case "discard":
                queue.discard(key)
                waiting.pop(key, None)
            case "start":
                job = queue.start()
                if job is None:
                    assert waiting.keys() <= running.keys()
                else:
                    assert job[0] not in running
                    assert waiting.pop(job[0]) == job
                    running[job[0]] = job
            case "end" if key in running:
                queue.end(key)
                del running[key]
        assert len(queue) == len(waiting)
        assert set(queue.running) == set(running.values())
        assert all(queue.holds(job) for job in [*waiting.values(), *running.values()])


def test_reading_times_follow_the_latest_reads():
    times = ReadTimes()
    for _ in range(100):
        times.note("slow", 1000, 10.0)
    for _ in range(100):
        times.note("quick", 1000, 1.0)
    assert times.seconds_of("slow") == 10.0
    assert 1.0 <= times.seconds_of("unknown", 1000) < 1.1
    assert times.seconds_of("nothing at all", 0) > 0

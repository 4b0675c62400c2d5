import pytest

from pipelines.progress import Progress, duration, printed_board


def test_a_line_tells_share_rate_and_time_left():
    progress = Progress("train", 100, "steps", done=20, started=1000.0)
    progress.done = 60
    line = progress.line(1010.0, "loss 0.5", 32, "pictures")
    assert line == "train [##############----------] 60/100 steps  128.0 pictures/s  loss 0.5  ETA 0:10"


def test_lines_come_at_intervals_and_at_the_end():
    lines = []
    progress = Progress("work", 1000, "items", every=3600.0, emit=lines.append)
    for done in range(1, 1001):
        progress.update(done)
    assert [line.split()[2] for line in lines] == ["1/1000", "1000/1000"]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_durations_read_as_clocks_do(seconds, text):
    assert duration(seconds) == text


def test_lines_of_workers_reach_the_driver_in_order(ray_session, capsys):
    import ray

    with printed_board() as board:
        ray.get([board.post.remote(f"line {number}") for number in range(5)])
    assert capsys.readouterr().out.splitlines() == [f"line {number}" for number in range(5)]

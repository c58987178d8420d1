"""Workers: every answer arrives, also those that come together."""

import time
from pathlib import Path

from effbench.worker import Workers


def test_answers_that_come_together_are_all_collected(tmp_path: Path) -> None:
    workers = Workers()
    try:
        jobs = {
            workers.submit("time:sleep", {}, threads=1, log=tmp_path / f"{number}.log")  # fails at once: no argument
            for number in range(20)
        }
        end = time.monotonic() + 300  # seconds that only a machine with much other work needs
        while len(list(tmp_path.glob("*.log"))) < len(jobs) and time.monotonic() < end:
            time.sleep(0.5)
        time.sleep(2)  # all of them have ended, and all their answers lie in the pipe
        found: dict[int, int] = {}
        while len(found) < len(jobs) and time.monotonic() < end:
            ended = workers.collect(timeout=0.5)
            if ended:
                found[ended[0]] = ended[1]
        assert set(found) == jobs and set(found.values()) == {1}
        assert "TypeError" in workers.log_tail(min(jobs))
        assert set(workers.started) == jobs
    finally:
        workers.close()

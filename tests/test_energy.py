"""Energy with counters that are not there: a board whose power, steps and wrap-around the tests decide."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import random_system
from synthetic_records import record

from effbench.measure import counters, energy
from effbench.measure.counters import Meter, meter
from effbench.measure.derived import rows
from effbench.report.frame import frame
from effbench.report.markdown import markdown
from effbench.results import Record
from effbench.technique import System

PROMPT = torch.arange(3, 13).view(1, 10)


class Board:
    """A device with an idle power, whose counter moves in steps of time and begins anew at `wrap` joules."""

    def __init__(self, idle: float = 50.0, step: float = 0.1, wrap: float = 0.0, joules: float = 1000.0) -> None:
        self.now, self.idle, self.step, self.wrap = 0.0, idle, step, wrap
        self.energy, self.shown, self.moved = joules, joules, 0.0

    def run(self, seconds: float, watts: float) -> None:
        """Time passes at a power."""
        while seconds > 1e-12:
            part = min(seconds, self.moved + self.step - self.now)
            self.now, seconds, self.energy = self.now + part, seconds - part, self.energy + part * watts
            if self.now >= self.moved + self.step - 1e-9:
                self.moved, self.shown = self.now, self.energy % self.wrap if self.wrap else self.energy

    def read(self) -> list[float]:
        self.run(0.001, self.idle)
        return [self.shown]

    def meter(self) -> Meter:
        return Meter("counter (fake)", "", self.read, [self.wrap], lambda: self.now)


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    """A board on which waiting takes its idle power."""
    found = Board()
    monkeypatch.setattr(energy.time, "sleep", lambda seconds: found.run(seconds, found.idle))
    return found


def busy(board: Board) -> System:
    """Prefill takes 1 ms a token at 250 W, each further token 10 ms at 150 W."""
    system = random_system("llama")

    def generate(system: System, ids: torch.Tensor, new_tokens: int) -> None:
        board.run(0.001 * ids.shape[1], 250.0)
        board.run(0.010 * (new_tokens - 1), 150.0)

    system.generate = generate
    return system


def measured(board: Board, new_tokens: int = 11) -> Record:
    row = record("dense")
    energy.measure(row, busy(board), PROMPT, new_tokens, board.meter())
    return row


def test_idle_is_taken_off_and_prefill_is_told_from_decode(board: Board) -> None:
    row = measured(board)
    assert row.samples["idle_watts"] == pytest.approx([50.0, 50.0], rel=0.05)
    assert row.values["prefill_joules_per_token"] == pytest.approx(0.001 * 200, rel=0.1)
    assert row.values["decode_joules_per_token"] == pytest.approx(0.010 * 100, rel=0.1)
    assert row.values["joules_per_token"] == pytest.approx((0.01 * 200 + 0.1 * 100) / 11, rel=0.1)
    assert row.values["joules_per_token_with_idle"] == pytest.approx((0.01 * 250 + 0.1 * 150) / 11, rel=0.1)
    assert row.provenance["energy"]["source"] == "counter (fake)"
    text = markdown(rows([row]))
    before, after = row.samples["idle_watts"]
    assert f"energy: counter (fake), idle {before:.1f} W before and {after:.1f} W after" in text and "J/token" in text
    assert frame(rows([row]))["energy_source"].tolist() == ["counter (fake)"]


def test_without_taking_idle_off_the_figure_would_be_another(board: Board) -> None:
    row = measured(board)
    gross, net = row.values["joules_per_token_with_idle"], row.values["joules_per_token"]
    assert gross is not None and net is not None and gross - net == pytest.approx(50 * 0.11 / 11, rel=0.1)


def test_a_window_is_as_long_as_the_counters_step_asks_for(board: Board) -> None:
    counter = board.meter()
    assert counter.step() == pytest.approx(0.1, rel=0.05)
    began = board.now
    found = energy.spent(counter, lambda: board.run(0.003, 100.0))
    assert board.now - began >= energy.STEPS * 0.095
    assert found is not None and found.joules == pytest.approx(0.3, rel=0.1)
    assert found.seconds == pytest.approx(0.003, rel=0.1)
    # one repetition alone is shorter than a step: the counter would have said nothing, or a whole step
    counter.start()
    board.run(0.003, 100.0)
    assert counter.stop() in (0.0, pytest.approx(5.0, abs=3))


def test_work_that_cannot_be_repeated_is_refused_if_it_is_too_short(board: Board) -> None:
    counter = board.meter()
    joules, idle = energy.above_idle(counter, lambda: board.run(0.5, 100.0))
    assert joules is None and "too short for a counter" in counter.why and len(idle) == 2
    joules, idle = energy.above_idle(counter, lambda: board.run(10.0, 100.0))
    assert joules == pytest.approx(500.0, rel=0.03) and idle == pytest.approx([50.0, 50.0], rel=0.05)


def test_a_counter_that_begins_anew_is_followed_once_and_not_believed_where_it_may_be_twice(board: Board) -> None:
    board.wrap, board.energy = 300_000.0, 299_900.0
    board.run(0.1, 50.0)
    counter = board.meter()
    counter.start()
    board.run(2.0, 100.0)
    assert board.shown < 1000
    assert counter.stop() == pytest.approx(200.0, rel=0.1)
    counter.start()
    board.run(301.0, 100.0)
    assert counter.stop() is None and "more than once" in counter.why
    reset = Board()
    counter = reset.meter()
    counter.start()
    reset.energy = 3.0
    reset.run(1.0, 100.0)
    assert counter.stop() is None and "went back" in counter.why


def test_a_row_of_which_a_window_fails_has_no_energy_and_says_why(board: Board) -> None:
    board.wrap = 2000.0  # a second and a half at what a package takes at most
    row = measured(board)
    assert row.values["joules_per_token"] is None and "more than once" in row.missing["joules_per_token"]


def test_without_a_counter_every_cell_is_a_dash_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(counters, "POWERCAP", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "zeus", None)
    none = meter("cpu")
    assert none.source is None and none.stop() is None
    row, ran = record("dense"), []
    system = random_system("llama")
    system.generate = lambda *_: ran.append(1)
    energy.measure(row, system, PROMPT, 5, none)
    assert not ran  # nothing is generated for a counter that is not there
    for name in energy.COLUMNS:
        assert row.values[name] is None and row.missing[name] == "no energy counter on this machine (no RAPL)"
    assert energy.above_idle(none, lambda: ran.append(1)) == (None, []) and ran == [1]
    assert none.why == "no energy counter on this machine (no RAPL)"
    text = markdown(rows([row]))
    assert "J/token – no energy counter on this machine (no RAPL)" in text
    assert frame(rows([row]))["energy_source"].tolist() == ["none"]


def test_rapl_is_read_zone_by_zone_and_its_range_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(counters, "POWERCAP", tmp_path)
    monkeypatch.setitem(sys.modules, "zeus", None)
    for name, joules in (("intel-rapl:0", 10), ("intel-rapl:1", 262_000), ("intel-rapl:0:0", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{joules * 1_000_000}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("262143000000\n")
    found = meter("cpu")
    assert found.source == "counter (RAPL)" and found.wraps == [262_143.0, 262_143.0]  # a package's parts are in it
    found.start()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("25000000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("7000000\n")
    assert found.stop() == pytest.approx(15 + 150)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert "cannot be read by this user" in meter("cpu").reason


class FakeError(Exception):
    """What the fake NVML raises."""


def nvml(**changes: Any) -> SimpleNamespace:
    """A board as NVML shows it; a change to an exception is raised."""
    answers = {
        "nvmlInit": None,
        "nvmlDeviceGetHandleByUUID": "handle",
        "nvmlDeviceGetMigMode": [0, 0],
        "nvmlDeviceGetComputeRunningProcesses": [],
        "nvmlDeviceGetTotalEnergyConsumption": 5000,
        "nvmlDeviceGetPowerUsage": 80_000,
        **changes,
    }

    def call(answer: Any) -> Any:
        def answered(*_: Any) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        return answered

    return SimpleNamespace(NVMLError=FakeError, **{name: call(answer) for name, answer in answers.items()})


@pytest.mark.parametrize(
    ("changes", "uuid", "source", "reason"),
    [
        ({}, "1-2", "counter (NVML)", ""),
        ({"nvmlDeviceGetMigMode": FakeError("not supported")}, "1-2", "counter (NVML)", ""),
        ({"nvmlDeviceGetTotalEnergyConsumption": FakeError("old")}, "1-2", "integrated power (NVML)", ""),
        ({"nvmlDeviceGetMigMode": [1, 1]}, "1-2", None, "refused: the GPU is divided (MIG)"),
        ({}, "MIG-1-2", None, "refused: this is a part of a GPU (MIG)"),
        (
            {"nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=-number) for number in (1, 2, 3)]},
            "1-2",
            None,
            "refused: another process uses the GPU",
        ),
        ({"nvmlInit": FakeError("no driver")}, "1-2", None, "cannot be read (no driver)"),
    ],
)
def test_nvml_is_believed_for_a_whole_gpu_of_ones_own(
    changes: dict[str, Any], uuid: str, source: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(**changes))
    monkeypatch.setitem(sys.modules, "zeus", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=uuid))
    found = meter("cuda")
    assert found.source == source and reason in found.reason


def test_zeus_is_asked_where_nothing_else_can_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class ZeusMonitor:
        cpu_indices, gpu_indices = [0], []

        def __init__(self, **_: Any) -> None:
            self.begun: list[str] = []

        def begin_window(self, key: str) -> None:
            self.begun.append(key)

        def end_window(self, key: str) -> SimpleNamespace:
            self.begun.remove(key)
            return SimpleNamespace(gpu_energy={}, cpu_energy={0: 2.0, 1: 3.0})

    monkeypatch.setattr(counters, "POWERCAP", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "zeus", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "zeus.monitor", SimpleNamespace(ZeusMonitor=ZeusMonitor))
    found = meter("cpu")
    assert found.source is not None and "Zeus" in found.source
    found.start()
    assert found.stop() == 5.0

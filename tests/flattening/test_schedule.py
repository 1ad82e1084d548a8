from types import SimpleNamespace

import pytest

from planish.errors import PlanishError
from planish.flattening.schedule import Schedule


def run(step, steps=1000):
    return SimpleNamespace(step=step, progress=step / steps)


def test_bounds_and_share():
    whole = Schedule(0.2, 0.6, 1.0)
    assert [s for s in range(1000) if whole.active(run(s))] == list(range(200, 600))
    part = [s for s in range(1000) if Schedule(0.0, 1.0, 0.3, seed=1).active(run(s))]
    assert len(part) == pytest.approx(300, abs=60)
    assert part == [s for s in range(1000) if Schedule(0.0, 1.0, 0.3, seed=1).active(run(s))]
    assert part != [s for s in range(1000) if Schedule(0.0, 1.0, 0.3, seed=2).active(run(s))]


def test_due():
    schedule = Schedule(refresh=5)
    assert schedule.due(run(0), -1)
    assert [s for s in range(8) if schedule.due(run(s), 0)] == [5, 6, 7]


@pytest.mark.parametrize("options", [{"start": 0.9, "until": 0.5}, {"until": 1.5}, {"share": 0.0}, {"refresh": 0}])
def test_options_are_checked(options):
    with pytest.raises(PlanishError):
        Schedule(**options)

"""The order in which steps that wait go on."""

from collections.abc import Generator

from dion2_lightning.distributed.overlap import IN_FLIGHT, staggered


def step(name: int, phases: list[str], events: list[str]) -> Generator[None, object, None]:
    for phase in phases[:-1]:
        events.append(f"{phase} {name}")
        yield IN_FLIGHT
    events.extend(f"{phase} {name}" for phase in phases[-1:])


def events_of(steps: int, phases: list[str]) -> list[str]:
    """What happens, pauses included."""
    events: list[str] = []
    for paused in staggered([step(number, phases, events) for number in range(steps)]):
        assert paused is IN_FLIGHT
        events.append("pause")
    return events


def test_one_is_on_its_way_while_another_computes() -> None:
    expected = (
        "send 0, pause, send 1, multiply 0, pause, send 2, multiply 1, apply 0, pause, multiply 2, apply 1, pause"
    )
    assert events_of(3, ["send", "multiply", "apply"]) == [*expected.split(", "), "apply 2"]


def test_one_alone_pauses_as_it_would() -> None:
    assert events_of(1, ["send", "multiply", "apply"]) == ["send 0", "pause", "multiply 0", "pause", "apply 0"]
    assert events_of(0, ["send"]) == []


def test_steps_without_a_pause() -> None:
    assert events_of(3, ["apply"]) == ["apply 0", "apply 1", "apply 2"]

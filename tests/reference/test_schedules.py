import pytest

from fsr_fast.reference import learning_rate_factor, loss_gate, teacher_momentum, teacher_temperature


def test_learning_rate_warms_up_linearly_then_falls_to_zero():
    factors = {step: learning_rate_factor(step, total=20000, warmup=1500) for step in (0, 750, 1500, 10750, 20000)}
    assert factors == pytest.approx({0: 0.1, 750: 0.55, 1500: 1.0, 10750: 0.5, 20000: 0.0}, abs=1e-12)


def test_learning_rate_needs_no_warm_up():
    assert learning_rate_factor(0, total=10, warmup=0) == 1.0


def test_momentum_rises_to_one_along_half_a_cosine():
    momenta = {step: teacher_momentum(step, total=100, start=0.996) for step in (0, 25, 50, 100)}
    quarter = 1 - 0.002 * (1 + 0.5**0.5)
    assert momenta == pytest.approx({0: 0.996, 25: quarter, 50: 0.998, 100: 1.0}, abs=1e-12)


def test_temperature_rises_over_the_first_eighth_then_stays():
    temperatures = {step: teacher_temperature(step, total=808) for step in (0, 50, 100, 101, 807)}
    assert temperatures == pytest.approx({0: 0.04, 50: 0.055, 100: 0.07, 101: 0.07, 807: 0.07}, abs=1e-12)


@pytest.mark.parametrize(("total", "expected"), [(7, 0.07), (8, 0.04)])
def test_temperature_of_a_short_run_is_an_end_point(total, expected):
    assert teacher_temperature(0, total=total) == expected


def test_a_gated_loss_counts_after_its_start():
    assert [loss_gate(step, start=2) for step in range(4)] == [0.0, 0.0, 1.0, 1.0]
    assert loss_gate(0, start=0) == 1.0

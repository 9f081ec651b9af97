"""What checks measure becomes findings, whatever goes wrong in them."""

import threading

import pytest

from diffusion_trainer.apps.findings import Check, Process, examine, judge, ok
from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.training.agreement import Agreement

ALONE = Process(0, "here")


class Made(Check):
    """A check whose measurement is made up."""

    name, mend = "made", "mend it"

    def __init__(self, action, seconds=5.0):
        self.action, self.seconds = action, seconds

    def measure(self, here, agreement):
        return self.action()

    def judge(self, measured):
        yield ok(self.name, str(measured[0][1]))


def refuse():
    raise UserError("say it otherwise")


def not_now():
    raise PassingError("it does not answer")


@pytest.mark.parametrize(
    ("action", "seconds", "says", "remedy", "code"),
    [
        (lambda: 1 / 0, 5, "ZeroDivisionError: division by zero", "mend it", 1),
        (refuse, 5, "train would refuse this", "say it otherwise", 2),
        (not_now, 5, "train would refuse this", "it does not answer", 1),
        (threading.Event().wait, 0.1, "no answer within", "mend it", 0),
        (lambda: 7, 5, "7", "", 0),
    ],
)
def test_what_goes_wrong_in_a_check_is_a_finding(action, seconds, says, remedy, code):
    check = Made(action, seconds)
    measured = examine([check], ALONE, Agreement(), lambda: 10)
    (one,) = judge([check], [(ALONE, measured)])
    assert says in one.value
    assert (one.remedy, one.exit_code) == (remedy, code)
    check.needed = False  # what a run can do without keeps it from no node; what train would refuse does
    (one,) = judge([check], [(ALONE, measured)])
    assert one.exit_code == (code if "refuse" in says else 0)


def test_what_one_node_refuses_and_another_does_not_may_pass_on_other_nodes():
    """A mount that is missing there: exit code 1 puts a job back into the queue, 2 would end it."""
    other, bad, good = Process(1, "node2", (0, 1)), Made(refuse), Made(lambda: 7)
    reports = [(ALONE, examine([good], ALONE, Agreement(), lambda: 10))]
    reports.append((other, examine([bad], other, Agreement(), lambda: 10)))
    one, _ = judge([bad], reports)
    assert (one.status, one.nodes, one.exit_code) == ("error", ("node2",), 1)


def test_what_has_no_time_left_says_so_and_the_rest_stands():
    checks = [Made(lambda: 7), Made(lambda: 8)]
    checks[1].name = "late"
    left = iter([5.0, -1.0])
    measured = examine(checks, ALONE, Agreement(), lambda: next(left))
    first, second = judge(checks, [(ALONE, measured)])
    assert (first.status, second.status, second.exit_code) == ("ok", "warning", 0)
    assert "not looked at" in second.value

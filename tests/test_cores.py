import os
import threading

import pytest

from tramontane.stages.cores import keep_to, share_of_cores


@pytest.mark.parametrize("cores", range(1, 20))
@pytest.mark.parametrize("stages", range(1, 20))
def test_no_core_has_two_stages_unless_they_outnumber_the_cores(cores, stages):
    shares = [share_of_cores(range(cores), index, stages) for index in range(stages)]
    used = [core for share in shares for core in share]
    assert len({len(share) for share in shares}) == 1
    most = max(used.count(core) for core in range(cores))
    assert most == -(-stages // cores)


def test_threads_that_are_started_keep_to_the_cores_as_well():
    found = []

    def start():
        keep_to([min(os.sched_getaffinity(0))])
        helper = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
        helper.start()
        helper.join()

    before = os.sched_getaffinity(0)
    stepper = threading.Thread(target=start)
    stepper.start()
    stepper.join()
    assert found == [{min(before)}]
    assert os.sched_getaffinity(0) == before

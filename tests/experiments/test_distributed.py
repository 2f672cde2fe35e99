"""What `join` refuses. What it joins is in tests/launch/test_local.py, with real processes."""

import pytest

from experiments import distributed
from transformer.errors import RequestError

GOOD = {"LADDER_N_PROCESSES": "2", "LADDER_PROCESS_ID": "1", "LADDER_COORDINATOR": "127.0.0.1:61440"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in (*GOOD, "LADDER_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)


def test_a_process_alone_joins_nobody_and_leads():
    distributed.join()
    assert distributed.is_lead()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"LADDER_N_PROCESSES": "two"}, "LADDER_N_PROCESSES='two': expected a whole number"),
        ({"LADDER_N_PROCESSES": "0"}, "LADDER_PROCESS_ID=1 is not below LADDER_N_PROCESSES=0"),
        ({"LADDER_PROCESS_ID": "2"}, "LADDER_PROCESS_ID=2 is not below LADDER_N_PROCESSES=2"),
        ({"LADDER_PROCESS_ID": "-1"}, "LADDER_PROCESS_ID='-1': expected a whole number"),
        ({"LADDER_PROCESS_ID": None}, "LADDER_N_PROCESSES is set and LADDER_PROCESS_ID is not"),
        ({"LADDER_COORDINATOR": None}, "LADDER_COORDINATOR='': expected host:port"),
        ({"LADDER_COORDINATOR": "node7"}, "LADDER_COORDINATOR='node7': expected host:port"),
        ({"LADDER_COORDINATOR": ":61440"}, "LADDER_COORDINATOR=':61440': expected host:port"),
        ({"LADDER_LOCAL_DEVICE_IDS": "0;1"}, "LADDER_LOCAL_DEVICE_IDS='0;1': expected device numbers"),
        ({"LADDER_LOCAL_DEVICE_IDS": ""}, "LADDER_LOCAL_DEVICE_IDS='': expected device numbers"),
    ],
    ids=str,
)
def test_wrong_variable_is_named(monkeypatch, change, message):
    for name, value in (GOOD | change).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(RequestError) as caught:
        distributed.join()
    assert message in str(caught.value)


@pytest.mark.parametrize(("rank", "leads"), [("0", True), ("1", False)])
def test_rank_0_leads(monkeypatch, rank, leads):
    for name, value in (GOOD | {"LADDER_PROCESS_ID": rank}).items():
        monkeypatch.setenv(name, value)
    assert distributed.is_lead() is leads

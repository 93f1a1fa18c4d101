"""How a record of collectives keeps time, with a group of one rank and a GPU clock that is a counter."""

import itertools

import pytest
import torch
import torch.distributed as dist

from vitscale.engine import record_communication

ALL_REDUCE, WAIT = vars(dist.ProcessGroup)["allreduce"], vars(dist.Work)["wait"]


class OnDevice(torch.Tensor):
    """A CPU tensor that says it lies on a GPU."""

    is_cuda = True


@pytest.fixture
def alone():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture
def events(monkeypatch):
    """Events in the order in which they were recorded, a second apart; none may be read before it was waited for."""
    seconds, made = itertools.count(), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.waited = False
            made.append(self)

        def record(self):
            self.at_s = next(seconds)

        def synchronize(self):
            self.waited = True

        def elapsed_time(self, end):
            assert end.waited
            return 1000.0 * (end.at_s - self.at_s)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return made


def test_on_a_gpu_the_streams_time_is_read_late_and_once(alone, events):
    tensor = torch.ones(3).as_subclass(OnDevice)
    with record_communication() as record:
        work = dist.all_reduce(tensor, async_op=True)
        work.wait()
    assert len(events) == 4  # around the launch and around the wait
    assert not any(event.waited for event in events)
    assert record.seconds() == record.seconds() == 2.0


def test_on_the_cpu_no_event_is_made(alone, events):
    with record_communication() as record:
        dist.all_reduce(torch.ones(3))
    assert not events
    assert 0 < record.seconds() < 1


def _fail_while_recording():
    with record_communication(), record_communication():
        assert vars(dist.ProcessGroup)["allreduce"] is not ALL_REDUCE
        dist.all_reduce("no tensor")


def test_an_error_in_the_block_leaves_torch_as_it_was(alone):
    with pytest.raises(TypeError):
        _fail_while_recording()
    assert vars(dist.ProcessGroup)["allreduce"] is ALL_REDUCE
    assert vars(dist.Work)["wait"] is WAIT


def test_one_rank_sends_nothing(alone):
    with record_communication() as record:
        dist.all_reduce(torch.ones(3))
        dist.all_gather_object([None], {"a": 1})
    assert record.payload_bytes > 12
    assert record.wire_bytes == 0

"""shared.device: picking a device, moving a batch, describing the machine."""

import json
import platform
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from shared import device as device_module
from shared.device import describe_machine, pick_device, to_device


class Inner(NamedTuple):
    ids: torch.Tensor  # [B] int64
    weights: torch.Tensor | None  # [B] float32


class Outer(NamedTuple):
    inner: Inner
    pair: tuple[torch.Tensor, int]
    mask: torch.Tensor | None  # [B] bool
    num_rows: int
    name: str


def make_outer() -> Outer:
    return Outer(Inner(torch.arange(3), None), (torch.ones(2), 7), None, 3, "demo")


@pytest.fixture
def fake_cuda(monkeypatch):
    """Two GPUs, the second one current, as far as pick_device and describe_machine ask."""
    properties = SimpleNamespace(name="Test GPU", total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_auto_is_the_cpu_without_cuda(no_cuda):
    assert pick_device() == torch.device("cpu")
    assert pick_device("cpu") == torch.device("cpu")


def test_auto_is_the_current_gpu_with_cuda(fake_cuda):
    assert pick_device("auto") == torch.device("cuda", 1)
    assert pick_device("cuda") == torch.device("cuda", 1)
    assert pick_device("cuda:0") == torch.device("cuda", 0)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_without_a_gpu_names_the_repair(no_cuda, name):
    with pytest.raises(ValueError, match=rf"'{name}' asks for CUDA, but .*; use auto or cpu, or install"):
        pick_device(name)


def test_a_gpu_that_is_not_there_is_named_with_the_range(fake_cuda):
    with pytest.raises(ValueError, match=r"'cuda:2' does not exist: this machine has 2 GPU\(s\), cuda:0 to cuda:1"):
        pick_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x"])
def test_an_unknown_name_is_refused_with_the_choices(name):
    with pytest.raises(ValueError, match=r"is not known; use auto, cpu, cuda or cuda:N$"):
        pick_device(name)


def test_a_device_for_which_there_is_no_support_is_refused():
    with pytest.raises(ValueError, match="'meta' cannot be used here"):
        pick_device("meta")


@pytest.mark.parametrize("is_there", [False, True])
def test_mps_is_refused_because_it_has_no_float64(monkeypatch, is_there):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: is_there)
    with pytest.raises(ValueError, match=r"'mps' cannot be used: it has no float64, .*; use cpu"):
        pick_device("mps")


def test_moving_reaches_every_tensor_and_keeps_the_rest():
    moved = to_device(make_outer(), torch.device("meta"))
    assert isinstance(moved, Outer)
    assert isinstance(moved.inner, Inner)
    assert type(moved.pair) is tuple
    assert [t.device.type for t in (moved.inner.ids, moved.pair[0])] == ["meta", "meta"]
    assert moved.inner.ids.shape == (3,)
    assert (moved.inner.weights, moved.pair[1], moved.mask, moved.num_rows, moved.name) == (
        None,
        7,
        None,
        3,
        "demo",
    )


def test_a_batch_already_there_is_not_copied():
    batch = make_outer()
    moved = to_device(batch, torch.device("cpu"))
    assert moved.inner.ids is batch.inner.ids
    assert moved.pair[0] is batch.pair[0]


def test_towards_cuda_host_tensors_are_pinned_first_and_the_copy_does_not_block(monkeypatch):
    calls: list[tuple[object, ...]] = []
    pinned = torch.zeros(3)

    def pin_memory(tensor):
        calls.append(("pin", tensor))
        return pinned

    def to(tensor, device, *, non_blocking):
        calls.append(("copy", tensor, device.type, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    on_host, elsewhere = torch.arange(3), torch.ones(2, device="meta")
    to_device((on_host, elsewhere), torch.device("cuda", 0))
    assert [call[0] for call in calls] == ["pin", "copy", "copy"]
    assert calls[0][1] is on_host
    assert calls[1][1] is pinned
    assert calls[2][1] is elsewhere
    assert [call[2:] for call in calls[1:]] == [("cuda", True)] * 2
    calls.clear()
    to_device((on_host,), torch.device("cpu"))
    assert [call[0] for call in calls] == ["copy"]
    assert calls[0][2:] == ("cpu", False)


def test_the_machine_is_described_in_words_that_json_takes():
    facts = describe_machine()
    assert {"cpu", "cores", "threads", "os", "python", "torch"} <= set(facts)
    assert all(isinstance(value, str) and value for value in facts.values())
    assert int(facts["cores"]) >= 1
    assert facts["threads"] == str(torch.get_num_threads())
    assert json.loads(json.dumps(facts)) == facts


def test_the_machine_names_its_gpus(fake_cuda):
    facts = describe_machine()
    assert facts["gpu"] == "Test GPU, Test GPU"
    assert facts["gpu_memory"] == "16.0 GiB, 16.0 GiB"


def test_the_cpu_model_comes_from_cpuinfo_where_there_is_one(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name\t: Fast  Chip 9000\nmodel name\t: Other\n", encoding="utf-8")
    monkeypatch.setattr(device_module, "_CPUINFO", cpuinfo)
    assert describe_machine()["cpu"] == "Fast Chip 9000"


def test_the_cpu_model_has_a_value_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(device_module, "_CPUINFO", tmp_path / "absent")
    monkeypatch.setattr(platform, "processor", lambda: "Other Chip")
    assert describe_machine()["cpu"] == "Other Chip"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_batch_travels_to_the_gpu_and_stays_the_same_there():
    device = pick_device("cuda")
    moved = to_device(make_outer(), device)
    assert moved.inner.ids.device == device
    assert moved.inner.ids.tolist() == [0, 1, 2]
    assert to_device(moved, device).inner.ids is moved.inner.ids
    assert to_device(moved, torch.device("cpu")).inner.ids.tolist() == [0, 1, 2]

"""Packed weights that are kept between calls are never stale, however the weight changes."""

import ctypes

import pytest
import torch
from test_packed_weights import LAYERS, consistent, fresh, image, infer, make, needs_kernel
from torch import nn

import fastconv
from fastconv.ops import _packed_weights as store

pytestmark = needs_kernel


@pytest.fixture(autouse=True)
def empty():
    fastconv.clear_packed_weights()


def _step(optimizer, **options):
    """Of one value alone, which is no sample."""

    def change(layer):
        layer.weight.grad = torch.zeros_like(layer.weight)
        layer.weight.grad.view(-1)[1] = 1
        optimizer([layer.weight], lr=0.1, **options).step()

    return change


class _ByPointer(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self):
        for weight in self.param_groups[0]["params"]:
            weight.data.sub_(weight.grad)


@torch.no_grad()
def _one_value(layer):
    layer.weight[1, 1, 1, 1] += 1


def _in_inference_mode(layer):
    with torch.inference_mode():
        layer.weight[1, 1, 1, 1] += 1


def _one_tap_of_data(layer):
    layer.weight.data[:, :, 2, 1] = 0


def _by_pointer(layer):
    ctypes.memset(layer.weight.data_ptr(), 0, layer.weight.nbytes)


def _by_numpy(layer):
    layer.weight.detach().numpy()[:] *= 2


def _but_one_value(layer):
    """The weight with another value that is no sample."""
    other = layer.weight.data.clone()
    other.view(-1)[1] += 1
    return other


def _same_samples_elsewhere(layer):
    layer.weight.data = _but_one_value(layer)


def _transposed_in_place(layer):
    layer.weight.data = layer.weight.data.transpose(2, 3)


@torch.no_grad()
def _set(layer):
    layer.weight.set_(torch.randn(layer.weight.shape))


def _load(**options):
    def change(layer):
        layer.load_state_dict({"weight": torch.randn(layer.weight.shape)}, **options)

    return change


def _new_parameter(layer):
    layer.weight = nn.Parameter(torch.randn(layer.weight.shape))


def _moved_in_its_storage(layer):
    """To another address: nothing else tells."""
    values, storage = _but_one_value(layer), layer.weight.untyped_storage()
    size, before, others = storage.nbytes(), storage.data_ptr(), []
    while storage.data_ptr() in (0, before):
        storage.resize_(0)
        others.append(torch.empty(layer.weight.shape))  # most likely there
        storage.resize_(size)
    layer.weight.data.copy_(values)


def _its_address_reused(layer):
    """By another storage, while its own lives on, empty: nothing else tells, if the address is the same."""
    values, layer.storage = _but_one_value(layer), layer.weight.untyped_storage()
    layer.storage.resize_(0)
    layer.weight.data = torch.empty(layer.weight.shape).copy_(values)


def _shared(layer):
    layer.weight.share_memory_()
    layer.weight.data.mul_(2)


CHANGES = {
    **{
        f"{name}, {how}": _step(getattr(torch.optim, name), **{how: True})
        for name in ("SGD", "Adam", "AdamW", "Adagrad")
        for how in ("foreach", "fused")
    },
    "an optimizer of another library": _step(_ByPointer),
    "one value": _one_value,
    "one value in inference mode": _in_inference_mode,
    "initialised": lambda layer: layer.reset_parameters(),
    "data": lambda layer: layer.weight.data.mul_(2),
    "one tap of data": _one_tap_of_data,
    "other data": lambda layer: setattr(layer.weight, "data", torch.randn(layer.weight.shape)),
    "other data, same samples": _same_samples_elsewhere,
    "data transposed": _transposed_in_place,
    "pointer": _by_pointer,
    "numpy": _by_numpy,
    "set_": _set,
    "state_dict": _load(),
    "state_dict, assigned": _load(assign=True),
    "new parameter": _new_parameter,
    "moved in its storage": _moved_in_its_storage,
    "its address reused": _its_address_reused,
    "shared memory": _shared,
    "state_dict of a copy": lambda layer: layer.load_state_dict(make(layer.op, filters=32).state_dict()),
}


@pytest.mark.parametrize("op", LAYERS)
@pytest.mark.parametrize("change", CHANGES)
def test_never_stale(op, change):
    layer, x = make(op, filters=32), image()
    before = infer(layer, x).clone()
    for _ in range(2):
        for kept in store._kept.values():
            assert kept.facts[0].samples.strides[0] > layer.weight.element_size(), (
                "value 1 must not be a sample"
            )
        CHANGES[change](layer)
        assert torch.equal(infer(layer, x), fresh(layer, x))
        assert consistent()
    if change != "data transposed":  # and back
        assert not torch.equal(infer(layer, x), before)


def test_conversions_and_resizing():
    layer, x = make(), image()
    infer(layer, x)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        layer.to(dtype)
        assert torch.equal(infer(layer, x.to(dtype)), fresh(layer, x.to(dtype)))
    layer.to(memory_format=torch.channels_last)
    assert torch.equal(infer(layer, x), fresh(layer, x))
    assert len(store._kept) == 1 and consistent()
    weight = torch.randn(8, 4, 3, 3)
    for shape in [(8, 4, 3, 3), (4, 4, 3, 3), (64, 4, 3, 3), (8, 4, 1, 3)]:
        fastconv.conv2d(x, weight, backend="cpu")
        weight.resize_(shape).normal_()
        expected = fastconv.conv2d(x, weight.clone().requires_grad_(), backend="cpu")
        assert torch.equal(fastconv.conv2d(x, weight, backend="cpu"), expected)


def test_fewer_filters_of_the_same_memory():
    layer, x = make(filters=32), image()
    for filters in (16, 32, 8):
        infer(layer, x)
        layer.weight.data = torch.as_strided(layer.weight.data, (filters, 4, 3, 3), (36, 9, 3, 1))
        assert torch.equal(infer(layer, x), fresh(layer, x))


def test_training_and_inference_by_turns():
    torch.manual_seed(3)
    kept, never = make(), make()
    never.load_state_dict(kept.state_dict())
    x = image()
    histories = []
    for layer, run in ((kept, infer), (never, fresh)):
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
        histories.append([])
        for _ in range(3):
            histories[-1].append(run(layer, x))
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
        histories[-1].append(run(layer, x))
    assert all(map(torch.equal, *histories))
    assert not torch.equal(histories[0][0], histories[0][-1])

"""Packed weights that are kept between calls: used where they may be, dropped with the weight, bounded."""

import copy
import gc
import io
import pickle
import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastconv
from fastconv.backends import CHOICES
from fastconv.ops import _packed_weights as store

needs_kernel = pytestmark = pytest.mark.skipif(
    "cpu" not in fastconv.available("conv2d", "cpu"), reason="no compiled kernel here"
)

LAYERS = {"conv2d": fastconv.nn.Conv2d, "conv_transpose2d": fastconv.nn.ConvTranspose2d}
KINDS = [(op, algorithm) for op in LAYERS for algorithm in CHOICES[op].algorithms["cpu"]]


@pytest.fixture(autouse=True)
def empty():
    fastconv.clear_packed_weights()
    yield
    fastconv.set_packed_weights_limit(2**30)
    fastconv.clear_packed_weights()


@pytest.fixture
def packs(monkeypatch):
    """The shapes of the weights that were packed to be kept."""
    seen, pack = [], store.pack_weight

    def watched(name, weight, *arguments):
        seen.append(tuple(weight.shape))
        return pack(name, weight, *arguments)

    monkeypatch.setattr(store, "pack_weight", watched)
    return seen


def make(op="conv2d", algorithm="direct", filters=8, dtype=None):
    stride = 1 if algorithm.startswith("winograd") else 2
    return LAYERS[op](4, filters, 3, stride, 1, bias=False, backend="cpu", algorithm=algorithm, dtype=dtype)


def image(dtype=None):
    return torch.randn(2, 4, 7, 6, dtype=dtype)


def infer(layer, x):
    with torch.no_grad():
        return layer(x)


def fresh(layer, x):
    """The same kernel with weights packed in the call, as in training."""
    weight = layer.weight.detach().clone().requires_grad_()
    return torch.func.functional_call(layer, {"weight": weight}, (x,)).detach()


def consistent():
    return store._total == sum(kept.bytes for kept in store._kept.values())


# Use


@pytest.mark.parametrize("op, algorithm", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_same_numbers_and_packed_once(packs, op, algorithm, dtype):
    layer, x = make(op, algorithm, dtype=dtype), image(dtype)
    expected = fresh(layer, x)
    assert not packs
    for _ in range(3):
        assert torch.equal(infer(layer, x), expected)
    assert len(packs) == 1
    assert torch.equal(infer(layer, x[:, :, 1:]), fresh(layer, x[:, :, 1:])) and len(packs) == 1
    fastconv.set_packed_weights_limit(0)
    assert torch.equal(infer(layer, x), expected) and not store._kept


def test_one_entry_for_each_way_to_pack(packs):
    x, weight = image(), torch.randn(4, 4, 3, 3)
    for _ in range(2):
        for stride in (1, 2):
            for padding in (0, 1):
                fastconv.conv_transpose2d(x, weight, None, stride, padding, backend="cpu", algorithm="plain")
                fastconv.conv2d(x, weight, None, stride, padding, backend="cpu", algorithm="plain")
        fastconv.conv2d(x, weight[:, :2].contiguous(), groups=2, backend="cpu")
    assert len(packs) == 4 + 1 + 2 and len(store._kept) == 5  # the last weight is made for each call
    plain, direct = (
        fastconv.conv2d(x, weight, backend="cpu", algorithm=name) for name in ("plain", "direct")
    )
    torch.testing.assert_close(plain, direct, rtol=1e-4, atol=1e-5)


def test_other_backends_keep_nothing():
    x, weight = image(), torch.randn(8, 4, 3, 3)
    for backend in ("aten", "reference"):
        fastconv.conv2d(x, weight, backend=backend)
        fastconv.conv_transpose2d(x, torch.randn(4, 2, 3, 3), backend=backend)
    assert not store._kept


# What is compared


@pytest.mark.parametrize("op", LAYERS)
def test_every_sample_and_no_other_value_is_compared(packs, op):
    """What the documentation says is not noticed, and what mends it."""
    layer, x = make(op, filters=32), image()
    infer(layer, x)
    (kept,) = store._kept.values()
    values = layer.weight.data.view(-1)
    step = kept.facts[0].samples.strides[0] // 4
    values[3 * step] += 1
    infer(layer, x)
    assert len(packs) == 2
    values[3 * step + 1] += 1
    assert not torch.equal(infer(layer, x), fresh(layer, x)) and len(packs) == 2
    fastconv.clear_packed_weights()
    assert torch.equal(infer(layer, x), fresh(layer, x)) and len(packs) == 3


@pytest.mark.parametrize(
    "shape", [(64, 64, 3, 3), (512, 512, 1, 1), (2, 1, 1, 1), (127, 2, 3, 3), (96, 3, 7, 7)]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_samples_are_of_every_tap_and_every_stretch(shape, memory_format):
    """What the documentation says is noticed."""
    weight = torch.empty(shape, memory_format=memory_format)
    facts = store._Facts((), weight)
    step, count = facts.samples.strides[0] // 4, weight.numel()
    assert min(count, store.SAMPLES) <= len(facts.samples) <= 256 and step <= max(1, count // store.SAMPLES)
    taps = weight.copy_(torch.arange(shape[2] * shape[3]).view(1, 1, *shape[2:])).as_strided((count,), (1,))
    assert set(taps[::step].tolist()) == set(range(shape[2] * shape[3]))


def test_a_deep_copy_and_a_file_hold_nothing_and_stand_alone():
    layer, x = make(), image()
    before = pickle.dumps(layer)
    infer(layer, x)
    assert pickle.dumps(layer) == before
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(before), torch.load(file, weights_only=False)):
        assert torch.equal(infer(other, x), infer(layer, x))
        with torch.no_grad():
            other.weight[0] += 1
        assert torch.equal(infer(other, x), fresh(other, x))
        assert torch.equal(infer(layer, x), fresh(layer, x))


# Where nothing is kept


def test_nothing_is_kept_in_training():
    layer, x = make(), image().requires_grad_()
    layer(x).sum().backward()
    assert not store._kept and layer.weight.grad is not None
    x.grad = None
    layer.requires_grad_(False)(x).sum().backward()
    assert len(store._kept) == 1
    packed = x.grad.clone()
    x.grad = None
    fastconv.set_packed_weights_limit(0)
    layer(x).sum().backward()
    assert torch.equal(x.grad, packed)


def test_packed_in_inference_mode_used_outside():
    layer, x = make().requires_grad_(False), image()
    with torch.inference_mode():
        expected = layer(x).clone()
    (kept,) = store._kept.values()
    assert not kept.made.is_inference()
    leaf = x.requires_grad_()
    y = layer(leaf)
    y.sum().backward()
    assert torch.equal(y.detach(), expected) and leaf.grad is not None


def test_inference_tensors_have_no_version():
    with torch.inference_mode():
        weight, x = torch.randn(8, 4, 3, 3), image()
        first = fastconv.conv2d(x, weight, backend="cpu")
        weight[0, 0, 0, 0] += 1
        assert not torch.equal(fastconv.conv2d(x, weight, backend="cpu"), first)
    assert not store._kept


class Subclass(torch.Tensor):
    pass


def test_subclasses_and_transforms_and_modes():
    layer, x = make().requires_grad_(False), image()
    expected = fresh(layer, x)
    fastconv.conv2d(x, layer.weight.detach().as_subclass(Subclass), stride=2, padding=1, backend="cpu")
    assert torch.equal(torch.vmap(layer)(x[:, None])[:, 0], expected)
    torch.func.grad(lambda x: layer(x).sum())(x)
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(layer(x), expected)
    assert counter.get_total_flops() > 0
    assert not store._kept
    infer(layer, x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == expected.shape
    assert torch.equal(torch.vmap(layer)(x[:, None])[:, 0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert len(store._kept) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traces_and_compiled_code_do_not_freeze_the_weight():
    layer, x = make().requires_grad_(False), image()
    infer(layer, x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    traced = torch.jit.trace(layer, x)
    for run in (compiled, traced):
        assert torch.equal(run(x), fresh(layer, x))
        layer.weight.mul_(2)
        assert torch.equal(run(x), fresh(layer, x))


def test_parameters_that_are_to_be_swapped():
    """``Module.to`` refuses to swap parameters that something refers to weakly."""
    layer, x = make(), image()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        infer(layer, x)
        layer.double()
        assert infer(layer, x.double()).dtype == torch.float64
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    infer(layer, x.double())
    fastconv.clear_packed_weights()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


# Dropped, and bounded


def test_dropped_with_the_parameter():
    layers, x = [make(op) for op in LAYERS], image()
    for layer in layers:
        infer(layer, x)
    assert len(store._kept) == 2 and store._total > 0
    del layers, layer
    gc.collect()
    assert not store._kept and store._total == 0


def test_dropped_with_a_linear_layers_parameter():
    model = fastconv.optimize(torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU()).eval())
    infer(model, torch.randn(1, 16, 16, 64))
    assert store._kept
    del model
    gc.collect()
    assert not store._kept and store._total == 0


def test_dropped_with_the_parameter_though_its_memory_lives():
    layer, x = make(), image()
    infer(layer, x)
    alias = layer.weight.detach()
    del layer
    gc.collect()
    assert not store._kept and store._total == 0 and alias.numel()


def test_dropped_with_the_parameters_memory():
    layer, x = make(), image()
    infer(layer, x)
    layer.weight.data = torch.randn(layer.weight.shape)
    assert not store._kept and store._total == 0
    infer(layer, x)
    layer.bfloat16()
    assert not store._kept and store._total == 0


def test_a_step_drops_the_optimizers_own():
    layers, x = [make(op) for op in LAYERS], image()
    for layer in layers:
        infer(layer, x)
        layer.weight.grad = torch.zeros_like(layer.weight)
    torch.optim.SGD(layers[0].parameters(), fused=True).step()
    ((key, kept),) = store._kept.items()
    assert kept.facts[0].tensor() is layers[1].weight and key[1] == "conv_transpose2d" and consistent()


def test_dropped_in_the_midst_of_a_collection():
    x, thresholds = image(), gc.get_threshold()
    gc.set_threshold(3, 1, 1)
    try:
        for filters in range(1, 60):
            layer = make(filters=filters)
            layer.itself = [layer]
            infer(layer, x)
    finally:
        gc.set_threshold(*thresholds)
    del layer
    gc.collect()
    assert not store._kept and store._total == 0


def test_bounded_and_the_least_recently_used_goes_first(packs):
    x = image()
    layers = [make(algorithm="plain", filters=filters) for filters in (8, 8, 8)]
    infer(layers[0], x)
    fastconv.set_packed_weights_limit(2 * store._total)
    infer(layers[1], x)
    infer(layers[0], x)
    infer(layers[2], x)  # layers[1] has to go
    assert len(packs) == 3 and consistent() and len(store._kept) == 2
    infer(layers[0], x)
    assert len(packs) == 3
    infer(layers[1], x)
    assert len(packs) == 4 and store._total <= store._limit
    large = make(algorithm="plain", filters=24)
    infer(large, x)
    assert len(store._kept) == 2, "what is larger than the limit is not kept, and drives out nothing"
    assert torch.equal(infer(large, x), fresh(large, x))
    fastconv.set_packed_weights_limit(store._total - 1)
    assert len(store._kept) == 1 and consistent()
    fastconv.clear_packed_weights()
    assert store._total == 0


@pytest.mark.parametrize("limit, error", [(-1, ValueError), (1.5, TypeError)])
def test_bad_limit(limit, error):
    with pytest.raises(error, match="limit must be"):
        fastconv.set_packed_weights_limit(limit)


@pytest.mark.parametrize("limit", [2**30, 20_000])
def test_threads(limit):
    fastconv.set_packed_weights_limit(limit)
    x = image()
    shared = [make(algorithm="plain", filters=filters) for filters in range(1, 17)]
    expected = [fresh(layer, x) for layer in shared]
    wrong = []

    def work(seed):
        own = make(algorithm="plain", filters=8)
        for round in range(30):
            for index in range(16):
                at = (index * seed) % 16
                if not torch.equal(infer(shared[at], x), expected[at]):
                    wrong.append(("shared", at))
            with torch.no_grad():
                own.weight[0, 0, 0, 0] += 1
            if not torch.equal(infer(own, x), fresh(own, x)):
                wrong.append(("own", round))
            if seed == 1 and round % 10 == 0:
                fastconv.clear_packed_weights()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 3, 5, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    gc.collect()
    assert not wrong and consistent() and store._total <= limit and len(store._kept) <= 16


@pytest.mark.parametrize("algorithm", ["winograd_f2", "winograd_f4", "winograd_f6"])
@pytest.mark.parametrize(("channels", "size"), [(130, 5), (64, 6), (63, 7), (65, 20)])
def test_packed_beforehand_or_panel_by_panel_gives_the_same_bits(algorithm, channels, size):
    """Few tiles are one block, whose weights are packed in parts; 20 x 20 pixels are several blocks."""
    input, weight = torch.randn(1, channels, size, size), torch.randn(70, channels, 3, 3)
    packed = torch.ops.fastconv.conv2d_pack_weight(weight, 1, algorithm)
    geometry = ((1, 1), (1, 1, 1, 1), (1, 1), 1, None, algorithm)
    before = torch.ops.fastconv.conv2d(input, weight, None, None, packed, *geometry)
    assert torch.equal(before, torch.ops.fastconv.conv2d(input, weight, None, None, None, *geometry))

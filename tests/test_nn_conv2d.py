"""fastconv.nn.Conv2d and ConvTranspose2d against torch.nn: constructors, state, numbers."""

import copy
import io
import pickle

import pytest
import torch
from cases import DEVICE
from tolerances import assert_close
from torch import nn

import fastconv
from fastconv.backends import CHOICES
from fastconv.nn import Conv2d, ConvTranspose2d

PLAIN = {Conv2d: nn.Conv2d, ConvTranspose2d: nn.ConvTranspose2d}
KERNELS = [name for name in fastconv.available("conv2d", DEVICE) if name in ("cpu", "cuda", "triton")]
BACKENDS = [None, "reference", *(["cpu"] if "cpu" in KERNELS else [])]
COMMON = [
    (6, 8, 3),
    (4, 6, (3, 2), (2, 1), (1, 0)),
    (4, 12, 1),
    (3, 5, (1, 3), 2),
]
CASES = [
    *((Conv2d, arguments, {}) for arguments in COMMON),
    *((ConvTranspose2d, arguments, {}) for arguments in COMMON),
    (Conv2d, (6, 4, 3, 1, 1, 1, 2, False), {}),
    (Conv2d, (4, 4, 3, 2, 1, 1, 4), {}),
    (Conv2d, (5, 3, 5), {"padding": "same", "dilation": (1, 2)}),
    (Conv2d, (3, 4, 3, 2, 2), {"padding_mode": "reflect"}),
    (Conv2d, (3, 4, 3), {"padding": "same", "padding_mode": "circular", "groups": 1}),
    (ConvTranspose2d, (6, 4, 3, 2, 1, 1, 2, False), {}),
    (ConvTranspose2d, (4, 2, (2, 3), 2, (0, 1), (1, 0), 2, True, (1, 2)), {}),
    (ConvTranspose2d, (4, 4, 3), {"groups": 4, "stride": (1, 3), "output_padding": (0, 2)}),
]


def twins(kind, arguments, options, **own):
    """The same layer from torch.nn and from fastconv.nn."""
    layers = []
    for layer, keywords in ((PLAIN[kind], {}), (kind, own)):
        torch.manual_seed(3)
        layers.append(layer(*arguments, **options, device=DEVICE, **keywords))
    return layers


def image(channels, dtype=None):
    return torch.randn(2, channels, 9, 8, device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind, arguments, options", CASES)
def test_same_state_and_numbers(kind, arguments, options, backend):
    plain, ours = twins(kind, arguments, options, backend=backend)
    state = ours.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    assert set(vars(plain)) == set(vars(ours)) - {"activation", "backend", "algorithm"}
    x = image(arguments[0]).requires_grad_()
    exact = copy.deepcopy(plain).double()
    x64 = x.detach().double().requires_grad_()
    expected, actual = exact(x64), ours(x)
    # The terms of a sum over the first dimension of the weight, and over its others.
    sums = [ours.weight[:, 0].numel() // ours.groups, ours.weight[0].numel()]
    for_output, for_input = sums[::-1] if kind is Conv2d else sums
    assert_close(actual, expected, torch.float32, for_output)
    cotangent = torch.randn_like(actual)
    expected = torch.autograd.grad(expected, (x64, *exact.parameters()), cotangent.double())
    found = torch.autograd.grad(actual, (x, *ours.parameters()), cotangent)
    for name, grad, right in zip(("x", "weight", "bias"), found, expected):
        scale = cotangent.abs().max().item() if name == "bias" else None
        terms = for_input if name == "x" else max(x[:, 0].numel(), actual[:, 0].numel())
        assert_close(grad, right, torch.float32, terms, scale, name=f"gradient of {name}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PLAIN)
def test_unbatched_input(kind, backend):
    plain, ours = twins(kind, (4, 6, 3), {"stride": 2}, backend=backend)
    x = image(4)[0]
    assert ours(x).shape == plain(x).shape
    assert_close(ours(x), plain.double()(x.double()), torch.float32, 36)
    assert ours.kernel(x) == ours.kernel(x[None])
    padded = Conv2d(4, 6, 3, padding=2, padding_mode="replicate", device=DEVICE)
    assert torch.equal(padded(x), padded(x[None])[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_size(backend):
    plain, ours = twins(ConvTranspose2d, (4, 6, 3), {"stride": 2, "padding": 1}, backend=backend)
    x = image(4)
    for size in (None, [17, 15], [18, 15], (2, 6, 18, 16), torch.Size([17, 16])):
        assert_close(ours(x, size), copy.deepcopy(plain).double()(x.double(), size), torch.float32, 36)
        assert ours(input=x, output_size=size).shape == plain(x, output_size=size).shape
    for size in ([16, 15], [19, 15], [17]):
        with pytest.raises(ValueError, match="output_size|output size"):
            ours(x, size)


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_moves_between_types_and_layouts(kind, dtype):
    plain, ours = twins(kind, (4, 6, 3), {"padding": 1})
    ours = ours.to(dtype).to(memory_format=torch.channels_last)
    assert ours.weight.dtype == dtype and ours.why_not() is None
    x = image(4, dtype=dtype).to(memory_format=torch.channels_last)
    y = ours(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, plain.to(dtype).double()(x.double()), dtype, 36)
    meta = copy.deepcopy(ours).to("meta")
    assert meta.why_not() and meta.weight.is_meta
    back = meta.to_empty(device=DEVICE)
    back.load_state_dict(ours.state_dict())
    assert torch.equal(back(x), y)


@pytest.mark.parametrize("kind", PLAIN)
def test_state_dicts_go_both_ways(kind):
    plain, ours = twins(kind, (4, 6, 3), {"groups": 2})
    other = kind(4, 6, 3, groups=2, device=DEVICE)
    other.load_state_dict(plain.state_dict(), strict=True)
    x = image(4)
    assert torch.equal(other(x), ours(x))
    other.reset_parameters()
    plain.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(plain(x), other(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(kind(4, 6, 2, groups=2).state_dict())


@pytest.mark.parametrize("kind", PLAIN)
def test_pickle_deepcopy_and_torch_save(kind):
    own = {"backend": "reference", **({"activation": "relu"} if kind is Conv2d else {})}
    layer = kind(4, 6, 3, stride=2, device=DEVICE, **own)
    x = image(4)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert type(other) is kind
        assert all(getattr(other, name) == value for name, value in own.items())
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("activation", ["relu", "relu6", "gelu", "gelu_tanh", "silu"])
def test_activation_is_folded_in(activation):
    functional = {
        "gelu_tanh": lambda y: nn.functional.gelu(y, approximate="tanh"),
    }.get(activation) or getattr(nn.functional, activation)
    plain, ours = twins(Conv2d, (4, 6, 3), {"padding": 1}, activation=activation)
    x = 3 * image(4)
    assert_close(ours(x), functional(plain.double()(x.double())), torch.float32, 36, scale=10.0)


def test_kernel_says_what_runs():
    x = image(4)
    for kind in PLAIN:
        assert kind(4, 6, 3, backend="reference", device=DEVICE).kernel(x) == ("reference", None)
        for backend in KERNELS:
            for algorithm in CHOICES[kind.op].algorithms[backend]:
                size = 1 if algorithm == "pointwise" else 3
                dtype = torch.float16 if algorithm == "implicit_gemm" else torch.float32
                named = {"backend": backend, "algorithm": algorithm, "device": DEVICE, "dtype": dtype}
                layer = kind(8, 8, size, **named)
                assert layer.kernel(image(8, dtype)) == (backend, algorithm)
            assert kind(4, 6, 3, backend=backend, device=DEVICE).kernel(x)[0] == backend
    assert Conv2d(4, 6, 3, backend="aten", device=DEVICE).kernel(x) == ("aten", "convolution")
    assert ConvTranspose2d(4, 6, 3, backend="aten", device=DEVICE).kernel(x, [11, 10]) == ("aten", None)


@pytest.mark.skipif("cpu" not in KERNELS, reason="no compiled kernel here")
def test_kernel_follows_layout_padding_and_autocast(monkeypatch):
    x = image(4)
    seen = []

    def default(input, weight, stride, padding, dilation, groups):
        seen.append((input.dtype, weight.dtype, tuple(input.shape), padding))
        return "plain"

    monkeypatch.setattr(Conv2d, "default_algorithm", staticmethod(default))
    layer = Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular", backend="cpu")
    assert layer.kernel(x) == ("cpu", "plain")
    with torch.autocast("cpu", torch.bfloat16):
        layer.kernel(x[0])
    assert Conv2d(4, 6, 3, padding="same", backend="cpu").kernel(x) == ("cpu", "plain")
    f, b = torch.float32, torch.bfloat16
    assert seen[0] == (f, f, (2, 4, 11, 12), (0, 0, 0, 0))
    assert seen[1] == (b, b, (1, 4, 11, 12), (0, 0, 0, 0))
    assert seen[2] == (f, f, (2, 4, 9, 8), (1, 1, 1, 1))


@pytest.mark.skipif("cpu" not in KERNELS, reason="no compiled kernel here")
def test_named_algorithms_run():
    x = image(4)
    for kind in PLAIN:
        outputs = [kind(4, 6, 3, backend="cpu", algorithm=name) for name in ("plain", "direct", "im2col")]
        for layer in outputs:
            layer.load_state_dict(outputs[0].state_dict())
        for memory_format in (torch.contiguous_format, torch.channels_last):
            first, *others = (layer(x.to(memory_format=memory_format)) for layer in outputs)
            for other in others:
                torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-5)


def test_repr_names_what_torch_does_not_have():
    assert repr(Conv2d(4, 6, 3)) == "Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1))"
    assert repr(Conv2d(4, 6, 3, activation="silu", backend="aten", algorithm="unfold")).endswith(
        "stride=(1, 1), activation='silu', backend='aten', algorithm='unfold')"
    )
    assert repr(ConvTranspose2d(4, 6, 3, backend="cpu")).endswith("stride=(1, 1), backend='cpu')")


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize(
    "options, words",
    [
        ({"backend": "gpu"}, "backend must be None or one of"),
        ({"algorithm": "fft"}, "algorithm must be None or one of .*direct.*implicit_gemm.*, got 'fft'"),
        ({"backend": "cpu", "algorithm": "implicit_gemm"}, r"one of \('direct'.*'plain'\), got"),
        ({"groups": 3}, "divisible by groups"),
        ({"stride": 2, "padding": "same", "activation": "tanh"}, "activation must be one of"),
    ],
)
def test_bad_arguments(kind, options, words):
    error = ValueError
    if kind is ConvTranspose2d and "activation" in options:
        error, words = TypeError, "activation"
    with pytest.raises(error, match=words):
        kind(4, 6, 3, **options)


@pytest.mark.parametrize("kind", PLAIN)
def test_bad_inputs(kind):
    layer = kind(4, 6, 3, device=DEVICE)
    with pytest.raises(ValueError, match="input must have 4 dimensions"):
        layer(image(4)[0, 0])
    with pytest.raises(ValueError, match="weight must have shape"):
        layer(image(5))
    with pytest.raises(TypeError, match="weight is torch.float32, but input is torch.float64"):
        layer(image(4).double())
    elsewhere = "cuda" if DEVICE == "cpu" else "cpu"
    named = kind(4, 6, 3, backend=elsewhere, device=DEVICE)
    with pytest.raises(fastconv.BackendError, match="cannot run here"):
        named(image(4))
    assert elsewhere in named.why_not()

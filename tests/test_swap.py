"""What a swapped model keeps: parameters, hooks, optimizers, training, copies, files, compilation."""

import copy
import io
import pickle

import pytest
import torch
from test_optimize import images, needs_kernel, network, row
from torch import nn

import fastconv
from fastconv.nn import Conv2d, ConvTranspose2d, DepthwiseConv2d


def test_only_the_class_changes():
    model = network()
    parameters, keys = list(model.parameters()), list(model.state_dict())
    classes = [type(module) for module in model]
    contents = [dict(module.__dict__) for module in model]
    assert fastconv.optimize(model, backend="reference") is model
    assert [type(model[i]) for i in (0, 3, 5, 6)] == [Conv2d, DepthwiseConv2d, Conv2d, DepthwiseConv2d]
    assert [type(model[i]) for i in (1, 2, 4)] == [classes[i] for i in (1, 2, 4)]
    assert all(a is b for a, b in zip(model.parameters(), parameters))
    assert list(model.state_dict()) == keys
    fastconv.restore(model)
    assert [type(module) for module in model] == classes
    for module, content in zip(model, contents):
        assert module.__dict__ == content and list(module.__dict__) == list(content)


@pytest.mark.parametrize("multiplier", [1, 3])
def test_same_numbers(multiplier):
    model, x = network(multiplier).eval(), images()
    expected = model(x)
    actual = fastconv.optimize(copy.deepcopy(model), backend="reference")(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(fastconv.restore(fastconv.optimize(model, backend="reference"))(x), expected)


def test_hooks_still_fire():
    model, fired = network(), []
    model[3].register_forward_pre_hook(lambda *_: fired.append("pre"))
    model[3].register_forward_hook(lambda *_: fired.append("forward"))
    model[3].register_full_backward_hook(lambda *_: fired.append("backward"))
    fastconv.optimize(model, backend="reference")
    model(images()).sum().backward()
    assert fired == ["pre", "forward", "backward"]


def test_optimizer_steps_the_same_parameters():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fastconv.optimize(model, backend="reference")
    before = model[3].weight.detach().clone()
    model(images()).square().sum().backward()
    gradient = model[3].weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(model[3].weight.detach(), before - 0.1 * gradient)


def test_training_is_the_same():
    plain = network().double()
    ours = fastconv.optimize(copy.deepcopy(plain), backend="reference")
    x = images(8).double()
    losses = []
    for model in (plain, ours):
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        history = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


def test_copies_and_files_work_and_can_be_restored():
    model, x = fastconv.optimize(network().eval(), backend="reference"), images()
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert type(other[3]) is DepthwiseConv2d and other[3].backend == "reference"
        assert torch.equal(other(x), expected)
        assert row(other, "3").kernel == "reference"
        fastconv.restore(other)
        assert type(other[3]) is nn.Conv2d and not hasattr(other[3], "backend")
    plain = network()
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())


def test_a_model_that_is_one_layer():
    layer = nn.Conv2d(4, 4, 3, groups=4)
    assert type(fastconv.optimize(layer, backend="reference")) is DepthwiseConv2d
    assert "(the model)" in str(fastconv.report(layer))
    assert type(fastconv.restore(layer)) is nn.Conv2d


def test_transposed_convolution():
    model, x = nn.ConvTranspose2d(4, 3, 3, 2, 1), torch.randn(2, 4, 5, 6)
    sizes = [None, [9, 11], [10, 12], (2, 3, 9, 12)]
    expected = [model(x, size) for size in sizes] + [model(x[0], output_size=[10, 11])]
    content = dict(model.__dict__)
    assert type(fastconv.optimize(model, backend="reference")) is ConvTranspose2d
    actual = [model(x, size) for size in sizes] + [model(x[0], output_size=[10, 11])]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="requested an output size of"):
        model(x, [11, 11])
    fastconv.restore(model)
    assert type(model) is nn.ConvTranspose2d and model.__dict__ == content


def test_modules_of_this_library_stay():
    kinds = [DepthwiseConv2d(4, activation="relu"), Conv2d(4, 4, 3, groups=4), ConvTranspose2d(4, 4, 3)]
    model = fastconv.optimize(nn.Sequential(*kinds))
    for i, module in enumerate(kinds):
        assert row(model, str(i)).reason == "it is a module of this library already"
        assert type(fastconv.restore(model)[i]) is type(module)


@needs_kernel
def test_compiles_in_one_graph():
    model, x = network().eval(), images()
    expected = model(x)
    fastconv.optimize(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    compiled(x).sum().backward()
    assert model[3].weight.grad.abs().sum() > 0

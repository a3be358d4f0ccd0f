"""Gradients of CUDA tensors, streams and modules in torch; needs CuPy and a GPU."""

import pytest
from gpu_parity import marks
from gradient_calls import CALLS
from test_torch import gradients, qt, run, tensors, torch, total

import qm_cupy as qm

no_cuda = not torch.cuda.is_available()
pytestmark = [*marks, pytest.mark.skipif(no_cuda, reason="this torch has no CUDA")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CALLS)
def test_gradients_equal_those_on_the_cpu(name, dtype):
    call = CALLS[name]
    inputs, rest = tensors(call.inputs, dtype, grad=True), tensors(call.rest, dtype)
    wanted = gradients(call, inputs, rest)
    moved = [
        {k: x.cuda() if isinstance(x, torch.Tensor) else x for k, x in group.items()}
        for group in (inputs, rest)
    ]
    results = [x.cpu() for x in run(call, *moved)]
    actual = torch.autograd.grad(total(results), [*moved[0].values()])
    # The two devices add in different orders.
    near = 1e-4 if dtype == torch.float32 else 1e-10
    for x, y in zip(actual, wanted, strict=True):
        assert x.is_cuda
        torch.testing.assert_close(x.cpu(), y, rtol=near, atol=near)


def test_backward_runs_in_the_stream_of_forward():
    tokens = torch.randn(4, 256, 64, device="cuda", requires_grad=True)
    (wanted,) = torch.autograd.grad(qt.norm_saliency(tokens).sum(), tokens)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # torch runs the backward pass in the stream of the forward pass. Kernels
        # that used another stream would read before `result` is complete.
        result = qt.norm_saliency(tokens).sum()
    torch.cuda.current_stream().wait_stream(stream)
    (actual,) = torch.autograd.grad(result, tokens)
    torch.testing.assert_close(actual, wanted)


def test_a_module_moves_to_the_gpu():
    model = qt.QuickMergePP(8).cuda().eval()  # the noise of its seed
    tokens = torch.randn(2, 40, 8, device="cuda", requires_grad=True)
    losses = model(tokens, 5)[1]
    losses["total"].backward()
    # The gradients of the priors' weights must be on the device too.
    assert all(x.grad.is_cuda for x in (tokens, *model.parameters()))
    # The paper's own class draws the same initial weights for NumPy and torch.
    wanted = qm.QuickMergePP(8)(tokens.detach().cpu(), 5)[1]
    values = {name: x.item() for name, x in losses.items()}
    assert values == pytest.approx(wanted, rel=1e-4)

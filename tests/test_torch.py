"""The functions of `qm_cupy` with torch: gradients, and `torch.compile`."""

import copy
import inspect
import pickle

import numpy as np
import pytest
from conftest import to_library, to_numpy
from gradient_calls import CALLS, CONSTANT, DIFFERENTIABLE, LABELS, flat
from test_framework import PAPER

import qm_cupy as qm
from qm_cupy.autodiff.operations import OPERATIONS
from qm_cupy.settings import snapshot

torch = pytest.importorskip("torch")
qt = pytest.importorskip("qm_cupy.torch")
SNAPSHOTS = pytest.importorskip("qm_cupy.autodiff.torch_operators").SNAPSHOTS


def tensors(arrays, dtype=torch.float64, grad=False):
    """Copy arrays to torch, floats in a dtype; leave other arguments unchanged."""
    converted = {}
    for name, x in arrays.items():
        converted[name] = x
        if isinstance(x, np.ndarray):
            tensor = torch.tensor(x)
            floating = tensor.is_floating_point()
            converted[name] = (
                tensor.to(dtype).requires_grad_(grad) if floating else tensor
            )
    return converted


def run(call, inputs, rest):
    # Integers have no gradient.
    return flat(getattr(qm, call.function)(**inputs, **rest))


def total(results):
    """Return the sum of the results, each entry with a random weight of its own.

    A plain sum would hide gradients that are only permuted.
    """
    rng = np.random.default_rng(0)
    sums = [(x * torch.tensor(rng.standard_normal(x.shape))).sum() for x in results]
    return torch.stack(sums).sum()


def gradients(call, inputs, rest):
    """Return the gradients of `total` for all inputs."""
    arguments = tuple(inputs.values())
    return torch.autograd.grad(total(run(call, inputs, rest)), arguments)


class TestNames:
    def test_the_module_has_only_modules(self):
        classes = {x for x in qm.__all__ if f"import {x}\n" in PAPER and x[0].isupper()}
        assert set(qt.__all__) == classes | {"MLPPrior"}
        for name in qt.__all__:
            assert issubclass(getattr(qt, name), torch.nn.Module)
            ours, theirs = (getattr(m, name) for m in (qt, qm))
            # The module has the signature of the class of that name in `qm_cupy`.
            assert str(inspect.signature(ours)) == str(inspect.signature(theirs))

    def test_every_operation_has_a_call(self):
        # These two call other operations; a prior that is an MLP
        # has an operation of its own.
        composed = {"quickmerge", "alignment_loss"}
        operations = DIFFERENTIABLE | CONSTANT | {"mlp_alignment_loss"}
        assert set(OPERATIONS) == operations - composed
        assert {call.function for call in CALLS.values()} == DIFFERENTIABLE

    def test_constants_accept_tensors_that_require_grad(self):
        tokens = torch.randn(2, 9, 4, requires_grad=True)
        labels = qm.cluster_tokens(tokens, 3)
        # Integers have no gradient: the results must not require one.
        tree = qm.linkage(tokens.detach()).requires_grad_()
        results = {
            "cluster_tokens": labels,
            "cut_linkage": qm.cut_linkage(tree, num_groups=3),
            "select_tokens": qm.select_tokens(tokens[..., 0], 3),
            "norm_budget": qm.norm_budget(tokens, 0.5),
            "group_sizes": qm.group_sizes(labels, 3),
            "group_positions": qm.group_positions(labels, torch.tensor([3, 3])),
        }
        assert set(results) == CONSTANT
        arguments = {
            "cluster_tokens": (tokens.detach(), 3),
            "select_tokens": (tokens[..., 0].detach(), 3),
            "norm_budget": (tokens.detach(), 0.5),
            "group_sizes": (labels, 3),
            "group_positions": (labels, 3),
        }
        for name, result in results.items():
            assert result.dtype == torch.int32
            assert not result.requires_grad
            if name in arguments:
                assert torch.equal(result, getattr(qm, name)(*arguments[name]))
        assert torch.equal(results["cut_linkage"], labels)

    @pytest.mark.parametrize("name", ["cosine_similarity", "linkage", "decode"])
    def test_other_functions_refuse_tensors_that_require_grad(self, name):
        tokens = torch.randn(9, 4, requires_grad=True)
        more = (lambda x: x,) if name == "decode" else ()
        with pytest.raises(TypeError, match="requires grad"):
            getattr(qm, name)(tokens, *more)


@pytest.mark.parametrize("name", CALLS)
class TestCalls:
    def test_results_equal_those_without_grad(self, name):
        call = CALLS[name]
        arguments = tensors({**call.inputs, **call.rest})
        traced = tensors(call.inputs, grad=True)
        got = getattr(qm, call.function)(**{**arguments, **traced})
        wanted = getattr(qm, call.function)(**arguments)
        if isinstance(got, torch.Tensor):
            got, wanted = (got,), (wanted,)
        arguments.update(traced)
        # A result that shares memory with an input would change with it.
        inputs = {
            x.data_ptr() for x in arguments.values() if isinstance(x, torch.Tensor)
        }
        for x, y in zip(got, wanted, strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)
            assert x.data_ptr() not in inputs

    def test_gradcheck(self, name):
        call = CALLS[name]
        inputs, rest = tensors(call.inputs, grad=True), tensors(call.rest)

        def function(*arrays):
            return tuple(run(call, dict(zip(inputs, arrays, strict=True)), rest))

        # Compares with central differences in float64.
        assert torch.autograd.gradcheck(function, (*inputs.values(),))

    def test_each_input_alone(self, name):
        call = CALLS[name]
        rest = tensors(call.rest)
        both = gradients(call, tensors(call.inputs, grad=True), rest)
        for number, one in enumerate(call.inputs):
            inputs = tensors(call.inputs)
            inputs[one].requires_grad_()  # only this one
            total(run(call, inputs, rest)).backward()
            for other, x in inputs.items():
                # No gradient is computed for inputs that do not require one.
                assert (x.grad is not None) == (other == one)
            assert torch.equal(inputs[one].grad, both[number])

    def test_no_grad(self, name):
        call = CALLS[name]
        inputs, rest = tensors(call.inputs, grad=True), tensors(call.rest)
        with torch.no_grad():
            assert not any(x.requires_grad for x in run(call, inputs, rest))

    # The gradients are kernels without gradients of their
    # own: an error, not a silent 0.
    def test_second_derivative(self, name):
        call = CALLS[name]
        inputs, rest = tensors(call.inputs, grad=True), tensors(call.rest)
        value = total([x * x for x in run(call, inputs, rest)])
        slope = torch.autograd.grad(value, [*inputs.values()], create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            total(slope).backward()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_halves(self, name, dtype):
        """The gradient in 16 bits is that of the same numbers in float32, rounded."""
        call = CALLS[name]
        inputs, rest = tensors(call.inputs, dtype, grad=True), tensors(call.rest, dtype)
        results = run(call, inputs, rest)
        actual = torch.autograd.grad(total(results), [*inputs.values()])
        wide = {k: x.detach().float().requires_grad_() for k, x in inputs.items()}
        wanted = gradients(call, wide, tensors(call.rest, torch.float32))
        for x, y, argument in zip(actual, wanted, inputs.values(), strict=True):
            assert x.dtype == argument.dtype == dtype
            size = y.abs().max().item()
            # bfloat16 keeps 8 bits; 2 ** -6 leaves room for a few roundings.
            torch.testing.assert_close(x.float(), y, rtol=2**-6, atol=2**-6 * size)

    def test_any_layout(self, name):
        call = CALLS[name]
        inputs, rest = tensors(call.inputs, grad=True), tensors(call.rest)
        wanted = gradients(call, inputs, rest)
        # Every second element of a longer row: the gradient
        # must go to the same elements.
        twice = {k: x.detach().repeat_interleave(2, -1) for k, x in inputs.items()}
        for x in twice.values():
            x.requires_grad_()
        views = {k: x[..., ::2] for k, x in twice.items()}
        results = run(call, views, rest)
        # The gradient of `expand` has strides of 0.
        spread = [x.sum(dim=0, keepdim=True).expand(x.shape) for x in results if x.ndim]
        total(results).backward(retain_graph=True)
        for x, y in zip(twice.values(), wanted, strict=True):
            torch.testing.assert_close(x.grad[..., ::2], y, rtol=1e-9, atol=1e-12)
            assert not x.grad[..., 1::2].any()
        if spread:  # an expanded gradient arrives
            torch.autograd.grad(total(spread), [*twice.values()])


SINGLE = [name for name in CALLS if not name.startswith("quickmerge")]


@pytest.mark.parametrize("name", SINGLE)
def test_opcheck(name, monkeypatch):
    """torch's own checks of custom operators: each operator and its gradient."""
    call, seen = CALLS[name], []
    function = call.function.replace("alignment", "mlp_alignment")
    operator = getattr(torch.ops.qm_cupy, function)
    inputs, rest = tensors(call.inputs, grad=True), tensors(call.rest)
    # The arguments of the operator are those that the public function passes on.
    with monkeypatch.context() as patch:
        spy = lambda *x: seen.append(x) or operator(*x)  # noqa: E731
        patch.setattr(torch.ops.qm_cupy, function, spy)
        results = run(call, inputs, rest)
    (arguments,) = seen
    torch.library.opcheck(operator.default, arguments)
    operation = OPERATIONS[function]
    slope = [torch.ones_like(x) for x in results[: operation.results]]
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    # The gradient of an input is computed only if it is wanted.
    wanted = [x is not None for x in arguments[: len(operation.differentiable)]]
    vjp = getattr(torch.ops.qm_cupy, f"{function}_vjp")
    # The settings are passed as a tensor: an index of `SNAPSHOTS`.
    settings = torch.tensor(SNAPSHOTS.index(snapshot()))
    torch.library.opcheck(vjp.default, (*slope, settings, *detached, wanted))


class TestCompiler:
    """`torch.compile` keeps every operator whole, without a graph break."""

    @pytest.mark.parametrize("name", SINGLE)
    def test_each_function(self, name):
        call = CALLS[name]
        inputs, rest = tensors(call.inputs, grad=True), tensors(call.rest)
        if "num_groups" in rest:  # a number that shapes depend on
            rest["num_groups"] = 3
        if "prior" in rest:
            rest["prior"] = qt.MLPPrior(rest["prior"].forward, rest["prior"].backward)
        function = getattr(qm, call.function)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        # "aot_eager" traces forward and backward, but generates no code.
        value = total(flat(compiled(**inputs, **rest)))
        assert torch.equal(value, total(run(call, inputs, rest)))
        actual = torch.autograd.grad(value, [*inputs.values()])
        for x, y in zip(actual, gradients(call, inputs, rest), strict=True):
            assert torch.equal(x, y)

    def test_counts_are_read_again(self):
        # A compiled graph must not keep the counts of its first call.
        tokens, labels = torch.randn(2, 5, 3), torch.from_numpy(LABELS)
        compiled = torch.compile(qm.merge_tokens, backend="aot_eager")
        for counts in (torch.tensor([3, 2]), torch.tensor([4, 2])):
            wanted = qm.merge_tokens(tokens, labels, counts)
            assert torch.equal(compiled(tokens, labels, counts), wanted)

    @pytest.mark.parametrize("method", ["average", "nearest"])
    def test_the_pipeline(self, method):
        tokens = torch.randn(2, 12, 4, requires_grad=True)

        def loss(tokens, budget):
            merged = qm.quickmerge(
                tokens, budget, method=method, weights="mass", noise_seed=2**63 + 1
            )
            rebuilt = qm.unmerge_tokens(merged.tokens, merged.labels)
            error = qm.reconstruction_error(tokens, merged.tokens, labels=merged.labels)
            return ((rebuilt - tokens) ** 2).mean() + error.sum() + merged.mass.sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for budget in (3, 5):  # at the second value, K becomes a symbol
            value = compiled(tokens, budget)
            torch.testing.assert_close(value, loss(tokens, budget))
            (actual,) = torch.autograd.grad(value, tokens)
            (wanted,) = torch.autograd.grad(loss(tokens, budget), tokens)
            torch.testing.assert_close(actual, wanted)

    @pytest.mark.parametrize("fullgraph", [False, True])
    @pytest.mark.parametrize(
        "budgets",
        [
            (2, 5),
            (0.25, 0.5),
            (torch.tensor(2), torch.tensor(5)),
            (torch.tensor([3, 2]), torch.tensor([4, 1])),
        ],
        ids=["int", "ratio", "tensor", "counts"],
    )
    def test_no_budget_becomes_a_constant(self, budgets, fullgraph):
        tokens, mask = torch.randn(2, 12, 4), torch.ones(2, 12, dtype=torch.bool)
        mask[1, 7:] = False
        for arguments in ((tokens,), (tokens, mask)):

            def merge(budget, tokens, mask=None):
                return qm.quickmerge(tokens, budget, mask=mask).tokens

            # Every case must be compiled from the start.
            torch.compiler.reset()
            compiled = torch.compile(merge, fullgraph=fullgraph, backend="aot_eager")
            for budget in budgets:
                wanted = merge(budget, *arguments)
                assert torch.equal(compiled(budget, *arguments), wanted)

    def test_numpy_integers_do_not_become_constants(self):
        tokens = torch.randn(2, 12, 4)
        compiled = torch.compile(
            lambda k: qm.quickmerge(tokens, k).tokens, backend="aot_eager"
        )
        for k in (2, 5, 3):
            assert compiled(np.int64(k)).shape == (2, k, 4)

    def test_budgets_of_norms_and_losses_of_a_merge(self):
        prior = qm.MLPPrior.init(4)

        def loss(tokens):
            merged = qm.quickmerge(tokens, qm.norm_budget(tokens, 0.5))
            return qm.alignment_loss(merged, prior).total

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for tokens in torch.randn(2, 2, 12, 4) * torch.arange(12)[:, None]:
            assert torch.equal(compiled(tokens), loss(tokens))

    def test_a_ratio_of_the_tokens(self):
        tokens = torch.randn(2, 12, 4)
        compiled = torch.compile(
            lambda x: qm.quickmerge(x, 0.25), fullgraph=True, backend="aot_eager"
        )
        # 0.25 * 12 = 3 tokens.
        assert torch.equal(compiled(tokens).tokens, qm.quickmerge(tokens, 3).tokens)

    # A module has parameters, which torch lifts to inputs of the graph.
    def test_a_module(self):
        model, tokens = qt.QuickMergePP(4).eval(), torch.randn(2, 12, 4)
        model(tokens, 3)[1]["total"].backward()
        wanted = [x.grad.clone() for x in model.parameters()]
        model.zero_grad()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(tokens, 3)[1]["total"].backward()
        for x, y in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(x.grad, y)


def plain_losses(tokens, labels, networks, num_groups, noise, tau=0.1, gamma=0.8):
    """Compute `QuickMergePP` for given labels in operations that torch differentiates.

    The formulas are those of the paper, in its order.
    """
    # x_i.x_j / sqrt(D), (B, N, N)
    scores = tokens @ tokens.mT / tokens.shape[-1] ** 0.5
    log_attention = torch.log_softmax(scores, dim=-1)
    entropy = -(log_attention.exp() * log_attention).sum(dim=-1)  # H, (B, N)
    low, high = entropy.aminmax(dim=-1, keepdim=True)
    saliency = 1 - (entropy - low) / (high - low)
    probabilities = torch.softmax((saliency + noise) / tau, dim=-1)
    mass = probabilities * saliency + (1 - probabilities) * 0.01  # epsilon = 0.01
    # m_j if token j is in group k, else 0: (B, N, K)
    member = (labels[..., None] == torch.arange(num_groups)).to(tokens) * mass[
        ..., None
    ]
    # The weighted means sum m x / sum m, (B, K, D).
    merged = member.mT @ tokens / member.sum(dim=1)[..., None]
    rebuilt = merged.gather(1, labels.long()[..., None].expand(tokens.shape))
    error = ((tokens - rebuilt) ** 2).sum(dim=(1, 2)) / (tokens**2).sum(dim=(1, 2))
    fidelity = (error - (1 - gamma) ** 2).clamp_min(0).mean()
    # The mean of x_1..t predicts x_t+1; the mirror image predicts backwards.
    steps = torch.arange(1, num_groups)[:, None]
    forward_gap = networks[0](merged.cumsum(dim=1)[:, :-1] / steps) - merged[:, 1:]
    backward_gap = networks[1](merged.flip(1).cumsum(dim=1)[:, :-1] / steps)
    backward_gap = backward_gap - merged.flip(1)[:, 1:]
    alignment = (forward_gap**2).mean() + (backward_gap**2).mean()
    return merged, {
        "ar_alignment": alignment,
        "fidelity": fidelity,
        "total": 0.1 * alignment + fidelity,
    }


class TestQuickMergePP:
    @pytest.mark.parametrize("method", ["average", "nearest"])
    @pytest.mark.parametrize("value", [-1e30, float("nan"), float("inf")])
    def test_new_noise_does_not_read_padding(self, rng, method, value):
        tokens = torch.tensor(rng.standard_normal((2, 12, 4)))
        scores = torch.tensor(rng.random((2, 12)))
        mask = torch.arange(12) < torch.tensor([[12], [7]])
        merger, results = qt.DifferentiableTokenMerging(method=method), []
        for padding in (0.0, value):
            torch.manual_seed(0)  # the same noise
            filled = torch.where(mask, scores, padding)
            results.append(merger.merge(tokens, filled, 3, mask=mask))
        for x, y in zip(*results, strict=True):
            assert torch.equal(x, y)

    def test_gradients_equal_those_of_torch(self, rng):
        tokens = torch.tensor(rng.standard_normal((3, 40, 8)), requires_grad=True)
        model = qt.QuickMergePP(embedding_dim=8, seed=5).double().eval()
        merged, losses = model(tokens, 7)
        # Labels are constants for gradients, and the noise is the library's.
        labels = qm.cluster_tokens(tokens, 7)
        noise = torch.from_numpy(qm.gumbel_noise((3, 40), 5)).double()
        prior = model.ar_alignment.prior
        networks = prior.forward_prior, prior.backward_prior
        wanted, plain = plain_losses(tokens, labels, networks, 7, noise)
        torch.testing.assert_close(merged, wanted)
        variables = [tokens, *model.parameters()]
        for name in ("ar_alignment", "fidelity", "total"):
            torch.testing.assert_close(losses[name], plain[name])
            # The fidelity does not depend on the networks.
            selected = variables[:1] if name == "fidelity" else variables
            actual = torch.autograd.grad(losses[name], selected, retain_graph=True)
            expected = torch.autograd.grad(plain[name], selected, retain_graph=True)
            for x, y in zip(actual, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-10)

    def test_losses_equal_those_without_grad(self, rng):
        tokens = torch.tensor(rng.standard_normal((2, 30, 8)), dtype=torch.float32)
        mask, counts = torch.rand(2, 30) < 0.9, torch.tensor([6, 3])
        merged, losses = qt.QuickMergePP(8, seed=3).eval()(
            tokens, counts, 0.5, mask=mask
        )
        wanted, floats = qm.QuickMergePP(8, seed=3)(tokens, counts, 0.5, mask=mask)
        assert torch.equal(merged, wanted)
        values = {name: x.item() for name, x in losses.items()}
        assert values == pytest.approx(floats)
        assert all(x.shape == () for x in losses.values())

    def test_steps_lower_the_loss(self, rng):
        tokens = torch.tensor(rng.standard_normal((2, 30, 8)), dtype=torch.float32)
        model = qt.QuickMergePP(8).eval()  # the loss under the same noise
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        values = []
        for _ in range(5):
            loss = model(tokens, 6)[1]["total"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        # Gradient descent with a small step lowers a loss at each step.
        assert values == sorted(values, reverse=True)

    def test_it_is_a_module(self):
        model = qt.QuickMergePP(8)
        one, other = (
            qt.BidirectionalARAlignment(8),
            qt.BidirectionalARAlignment(8, seed=1),
        )
        assert len([*model.parameters()]) == 8  # 4 weights of each of 2 MLPs
        tokens = torch.ones(9, 8).cumsum(0)
        assert one(tokens) != other(tokens)  # another seed, other weights
        model.ar_alignment = other
        other.load_state_dict(one.state_dict())
        assert one(tokens) == model.ar_alignment(tokens)
        assert one.forward_loss(tokens) + one.backward_loss(tokens) == one(tokens)
        weights = model.to(torch.bfloat16).state_dict()
        name = "ar_alignment.prior.forward_prior.0.weight"
        assert weights[name].dtype == torch.bfloat16  # `to` converts the weights

    def test_inference(self, rng):
        tokens = torch.tensor(rng.standard_normal((30, 8)), requires_grad=True)
        ar_model = torch.nn.Linear(8, 5, dtype=torch.float64)
        merged, predictions = qt.QuickMergePP(8).inference(tokens, 6, ar_model)
        wanted = qm.quickmerge(tokens.detach(), 6, weights="mass", noise_seed=0)
        assert torch.equal(merged, wanted.tokens)
        torch.testing.assert_close(predictions, ar_model(merged).detach())
        assert not merged.requires_grad

    @pytest.mark.parametrize("method", ["average", "nearest", "contiguous"])
    def test_training_draws_new_noise(self, rng, method):
        """As dropout does: from torch's generator, and none in evaluation mode."""
        tokens = torch.tensor(rng.standard_normal((2, 30, 8)), dtype=torch.float32)
        model = qt.QuickMergePP(8, method=method)
        assert model.training  # as every new module
        torch.manual_seed(0)
        one, other = model(tokens, 6)[0], model(tokens, 6)[0]
        assert not torch.equal(one, other)
        torch.manual_seed(0)
        assert torch.equal(model(tokens, 6)[0], one)
        assert torch.equal(model(tokens, 6)[0], other)
        wanted = qm.QuickMergePP(8, method=method)(tokens, 6)[0]
        state = torch.get_rng_state()
        for _ in range(2):
            assert torch.equal(model.eval()(tokens, 6)[0], wanted)
        assert torch.equal(torch.get_rng_state(), state)
        # `inference` does not depend on the mode.
        assert torch.equal(model.train().inference(tokens, 6)[0], wanted)
        silent = qt.QuickMergePP(8, method=method, seed=None)
        assert torch.equal(silent(tokens, 6)[0], silent.eval()(tokens, 6)[0])

    def test_the_noise_of_training_is_gumbel(self):
        """Scores of log p select a token with the probability p, at temperature 1."""
        p = torch.tensor([0.1, 0.2, 0.3, 0.4])
        merger = qt.DifferentiableTokenMerging(temperature=1.0)
        scores = (p.log() - p.log().min()).repeat(4000, 1)  # ≥ 0
        torch.manual_seed(0)
        _, probabilities = merger(torch.ones(4000, 4, 1), scores, 1)
        winners = torch.bincount(probabilities.argmax(-1), minlength=4) / 4000
        torch.testing.assert_close(winners, p, atol=0.03, rtol=0)

    def test_gradients_of_training(self, rng):
        tokens = torch.tensor(rng.standard_normal((2, 8, 3)), requires_grad=True)
        mask = torch.arange(8) < torch.tensor([[8], [6]])
        model = qt.QuickMergePP(3, seed=5).double()

        def loss(tokens):
            torch.manual_seed(1)  # the same noise at every point
            return model(tokens, 3, mask=mask)[1]["total"]

        assert torch.autograd.gradcheck(loss, (tokens,))

    @pytest.mark.slow("compiles torch's graph")
    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_compiled(self, rng, mode):
        model = getattr(qt.QuickMergePP(4), mode)()
        tokens = torch.tensor(rng.standard_normal((2, 12, 4)), dtype=torch.float32)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        results = [compiled(tokens, 3)[0] for _ in range(2)]
        assert torch.equal(*results) == (mode == "eval")
        if mode == "eval":
            assert torch.equal(results[0], model(tokens, 3)[0])

    def test_the_parts_are_modules(self):
        model = qt.QuickMergePP(8, temperature=0.5, seed=7)
        parts = {name: type(part) for name, part in model.named_children()}
        assert parts == {
            "saliency_estimator": qt.EntropyAwareSaliency,
            "token_merger": qt.DifferentiableTokenMerging,
            "ar_alignment": qt.BidirectionalARAlignment,
            "fidelity_constraint": qt.NormBasedFidelityConstraint,
        }
        # Keys of files that exist already: only the prior has weights.
        networks = "forward_prior", "backward_prior"
        assert [*model.state_dict()] == [
            f"ar_alignment.prior.{network}.{layer}.{name}"
            for network in networks
            for layer in (0, 2)
            for name in ("weight", "bias")
        ]
        text = repr(model)
        assert "EntropyAwareSaliency(embedding_dim=8, num_layers=12)" in text
        assert "temperature=0.5, epsilon=0.01, method='average', order='last'" in text
        assert "seed=7" in text
        assert "NormBasedFidelityConstraint(gamma=0.8)" in text

    def test_containers_copies_and_files(self, rng):
        tokens = torch.tensor(rng.standard_normal((2, 12, 8)), dtype=torch.float32)
        for number, make in enumerate(
            [
                copy.deepcopy,
                lambda module: pickle.loads(pickle.dumps(module)),
                lambda module: torch.nn.Sequential(module)[0],
                lambda module: torch.nn.ModuleList([module])[0],
                lambda module: module.to("cpu", torch.float32),
            ]
        ):
            model = qt.QuickMergePP(8, seed=number).eval()
            wanted = model(tokens, 3)
            again = make(model)
            merged, losses = again(tokens, 3)
            assert torch.equal(merged, wanted[0])
            assert losses == wanted[1]
            assert not any(part.training for part in again.modules())

    def test_each_part_alone(self, rng):
        """Each computes what the class of `qm_cupy` does, and passes gradients on."""
        tokens = torch.tensor(rng.standard_normal((2, 12, 8)), requires_grad=True)
        saliency = torch.nn.Sequential(qt.EntropyAwareSaliency(8))(tokens)
        assert torch.equal(saliency, qm.EntropyAwareSaliency(8)(tokens))
        merger = qt.DifferentiableTokenMerging().eval()
        results = merger(tokens, saliency, K=3)
        wanted = qm.DifferentiableTokenMerging()(tokens, saliency, K=3)
        assert all(torch.equal(x, y) for x, y in zip(results, wanted, strict=True))
        constraint = qt.NormBasedFidelityConstraint(gamma=0.9)
        loss = constraint(tokens, results[0])
        assert loss == constraint.compute_fidelity_loss(tokens, results[0])
        assert loss == qm.fidelity_loss(tokens, results[0], gamma=0.9)
        loss.backward()
        assert tokens.grad.abs().sum() > 0

    def test_the_code_blocks_of_the_paper(self, capsys):
        names = {"YourARModel": lambda: torch.nn.Linear(512, 7)}
        modules = {*qt.__all__} - {"MLPPrior"}
        # Modules come from `qm_cupy.torch`, all else from `qm_cupy`.
        blocks = PAPER.replace("from quickmerge", "from qm_cupy")
        for module in modules:
            blocks = blocks.replace(
                f"qm_cupy import {module}", f"qm_cupy.torch import {module}"
            )
        exec(blocks, names)
        assert capsys.readouterr().out == "Compressed from 100 to 20 tokens\n"
        assert names["losses"]["total"].requires_grad
        assert names["alignment_loss"].requires_grad
        assert names["fidelity_loss"].shape == ()
        assert names["predictions"].shape == (20, 7)


class TestPrior:
    @pytest.fixture
    def merged(self, rng):
        return torch.tensor(rng.standard_normal((2, 6, 4)), requires_grad=True)

    def test_weights_equal_those_of_the_library(self, merged):
        drawn = qm.MLPPrior.init(4, hidden_dim=5, seed=3)
        prior = qt.MLPPrior.init(4, hidden_dim=5, seed=3)
        state = prior.forward_prior.state_dict(), prior.backward_prior.state_dict()
        for other in (prior.detach(), qm.MLPPrior.from_state_dict(*state)):
            for ours, theirs in zip(
                (*other.forward, *other.backward),
                (*drawn.forward, *drawn.backward),
                strict=True,
            ):
                np.testing.assert_array_equal(ours, theirs)
        wanted = qm.alignment_loss(merged.detach(), drawn)
        for x, y in zip(prior(merged), wanted, strict=True):
            assert torch.equal(x, y)
        again = qt.MLPPrior.from_state_dict(*state)
        assert torch.equal(again(merged).total, wanted.total)

    # A copy: training must not change a prior that was saved before.
    def test_detach_copies(self):
        prior = qt.MLPPrior.init(4)
        before = prior.detach()
        saved = before.forward.weight_in.copy()
        with torch.no_grad():
            prior.forward_prior[0].weight.zero_()
        np.testing.assert_array_equal(before.forward.weight_in, saved)

    def test_initial_weights_do_not_use_the_generator_of_torch(self):
        # Otherwise a new model would change the random
        # numbers of the program around it.
        torch.manual_seed(0)
        wanted = torch.rand(3)
        torch.manual_seed(0)
        qt.QuickMergePP(8)
        assert torch.equal(torch.rand(3), wanted)

    def test_weights(self, merged):
        """Compares with torch's own gradients: float32 weights with float64 tokens."""
        prior = qt.MLPPrior.init(4, hidden_dim=5)
        actual = torch.autograd.grad(prior(merged).forward.sum(), prior.parameters())
        # The mean of x_1..t.
        context = merged.cumsum(1)[:, :-1] / torch.arange(1, 6)[:, None]
        network = qt.MLPPrior.init(4, hidden_dim=5).double().forward_prior
        loss = ((network(context) - merged[:, 1:]) ** 2).mean(dim=(1, 2)).sum()
        wanted = torch.autograd.grad(loss, network.parameters())
        for x, y in zip(actual[:4], wanted, strict=True):
            assert x.dtype == torch.float32
            torch.testing.assert_close(x, y.float())
        assert not any(x.any() for x in actual[4:])  # the weights of the backward prior

    def test_half_weights(self, merged):
        prior = qt.MLPPrior.init(4, hidden_dim=5).bfloat16()
        prior(merged.bfloat16()).total.sum().backward()
        assert {x.grad.dtype for x in prior.parameters()} == {torch.bfloat16}

    def test_a_merged_brings_its_number_of_groups(self, merged):
        tokens = torch.tensor(np.arange(40.0).reshape(2, 5, 4) ** 2)
        result = qm.quickmerge(tokens, torch.tensor([4, 2]))
        prior = qt.MLPPrior.init(4).double()
        wanted = prior(result.tokens, num_groups=torch.tensor([4, 2]))
        assert torch.equal(prior(result).total, wanted.total)
        # Without the counts the zeros of padded groups would count as tokens.
        assert not torch.equal(prior(result.tokens).total, wanted.total)

    def test_other_priors_have_no_gradient(self, merged):
        class Zero:
            def predict(self, tokens, **known):
                return 0 * tokens

        assert qm.alignment_loss(merged.detach(), Zero()).total.shape == (2,)
        with pytest.raises(TypeError, match="`merged` requires grad"):
            qm.alignment_loss(merged, Zero())


class TestSelection:
    # Straight-through: the value is K-hot, the gradient is
    # that of the soft probabilities.
    def test_hard_is_straight_through(self, rng):
        scores = torch.tensor(rng.random((2, 9)), requires_grad=True)
        weights = torch.tensor(rng.random((2, 9)))
        soft, hard = qm.gumbel_softmax(scores), qm.gumbel_softmax(scores, hard=3)
        assert torch.equal(hard, qm.gumbel_softmax(scores.detach(), hard=3))
        (wanted,) = torch.autograd.grad((soft * weights).sum(), scores)
        counts = torch.tensor([2, 4])
        for mask in (hard, qm.gumbel_softmax(scores, hard=counts)):
            (actual,) = torch.autograd.grad((mask * weights).sum(), scores)
            assert torch.equal(actual, wanted)

    # A seed above 2 ** 63 - 1 does not fit in torch's int64.
    def test_seeds_of_64_bits(self):
        scores = torch.rand(2, 9)
        for seed in (0, 2**63 - 1, 2**63, 2**64 - 1, np.uint64(2**64 - 1), None):
            wanted = qm.gumbel_softmax(scores, seed=seed)
            assert torch.equal(qm.gumbel_softmax(scores, seed=seed), wanted)


class TestErrors:
    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda x: qm.merge_tokens(x, np.zeros((2, 5), int), 2), TypeError,
             "`labels` must be a torch.Tensor, got ndarray"),
            (lambda x: qm.merge_tokens(x, torch.zeros(2, 5, dtype=int), 2,
                                       out=torch.ones(2, 2, 3)),
             TypeError, "`out` cannot be written while"),
            (lambda x: qm.quickmerge(x, 2, workspace=qm.Workspace()), TypeError,
             "`out` and `workspace` cannot be used while"),
            (lambda x: qm.merge_tokens(x, x), TypeError, "num_groups"),
            (lambda x: qm.merge_tokens(x, x, 2, x, x), TypeError, "positional"),
            (lambda x: qm.merge_tokens(x, x, 2, tokens=x), TypeError, "multiple"),
            (lambda x: qm.merge_tokens(x, x, 2, weight=x), TypeError, "weight"),
            (lambda x: qm.merge_tokens(x, x, num_group=2), TypeError, "num_group"),
            (lambda x: qm.merge_tokens(x, torch.zeros(2, 5, dtype=int), -1),
             ValueError, "`num_groups` must be at least 1, got -1"),
            (lambda x: qm.query_key_entropy(x, x, causal="yes"), TypeError,
             "`causal` must be True or False, got 'yes'"),
            (lambda x: qm.quickmerge(x, 2, weights=[1]), TypeError,
             "`weights` must be a torch.Tensor, got list"),
            (lambda x: qm.quickmerge(x, 2, weights="attention"), ValueError,
             "`weights=\"attention\"` needs the attention of a model"),
            (lambda x: qm.quickmerge(x, 2, noise_seed=-1), ValueError,
             "`noise_seed` must lie in"),
            (lambda x: qm.quickmerge(x, 2, noise_seed=0.5), TypeError, "`noise_seed`"),
            (lambda x: qm.quickmerge(x, 2, mask=[True]), TypeError,
             "`mask` must be a torch.Tensor, got list"),
            (lambda x: qm.quickmerge(x[0, 0], 2), ValueError,
             r"`tokens` must have shape \(N, D\) or \(B, N, D\), got \(3,\)"),
            (lambda x: qm.quickmerge(x[:, :, :0], 2), ValueError,
             "`tokens` must not be empty"),
            (lambda x: qm.norm_saliency(x, mask=torch.ones(3, dtype=bool)), ValueError,
             r"`mask` must have shape .* \(B, N\) = \(2, 5\), got \(3,\)"),
            (lambda x: qm.quickmerge(x, 2, mask=torch.ones(3, dtype=bool)), ValueError,
             r"`mask` must have shape .* \(B, N\) = \(2, 5\), got \(3,\)"),
            (lambda x: qm.quickmerge(x, 2, saliency=x[0]), ValueError,
             r"`saliency` must have shape \(B, N\) = \(2, 5\), got \(5, 3\)"),
            (lambda x: qm.quickmerge(x, 2, query=x), ValueError, "go together"),
            (lambda x: qm.quickmerge(x, 2, weights="no"), ValueError, "`weights`"),
            (lambda x: qm.quickmerge(x, 6), ValueError,
             r"`budget` must lie in 1..5 \(its tokens\), got 6"),
            (lambda x: qm.quickmerge(x, True), TypeError, "`budget`.*got a bool"),
            (lambda x: qm.quickmerge(x, 2, attention=x[:, :4]), ValueError,
             r"`attention` must have shape .* = \(2, 5, 3\), got \(2, 4, 3\)"),
            (lambda x: qm.gumbel_softmax(x[0], temperature=torch.tensor(0.1)),
             TypeError, "`temperature` must be a number, got Tensor"),
            (lambda x: qm.gumbel_softmax(x[0], seed=-1), ValueError, "`seed`"),
            (lambda x: qm.gumbel_softmax(x[0], seed=0.5), TypeError, "`seed`"),
            (lambda x: qm.gumbel_softmax(x[0], hard=9), ValueError, "`hard`"),
            (lambda x: qm.saliency(x[0], salient=3), TypeError, "`salient`.*got int"),
            (lambda x: qm.saliency(x[0], salient="no"), ValueError, "`salient`"),
            (lambda x: qm.merge_tokens(x, x, 2), TypeError,
             "`labels` must be integers"),
            (lambda x: qm.merge_tokens(x, torch.zeros(2, 5, dtype=int), 1.5),
             TypeError, "`num_groups` must be an integer, got float"),
            (lambda x: qm.merge_tokens(x, torch.zeros(2, 5, dtype=int), x[:, 0, 0]),
             TypeError, "`num_groups` must be integers, got torch.float32"),
            (lambda x: qm.norm_saliency(x / 0), ValueError, "`tokens` must be finite"),
        ],
    )  # fmt: skip
    def test_error_messages(self, call, error, message):
        with pytest.raises(error, match=message):
            call(torch.ones(2, 5, 3, requires_grad=True))

    def test_a_backward_has_the_settings_of_its_forward(self):
        """Autograd may run the backward pass in another thread, with other settings."""
        labels, not_finite = torch.tensor([0, 1, 0]), torch.full((2, 4), torch.nan)

        def merge(x):
            return qm.merge_tokens(x, labels, 2)

        compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
        for function in (merge, compiled):
            x = torch.ones(3, 4, requires_grad=True)
            function(x)  # compiles
            with qm.check_finite(False):
                unchecked = function(x)
            checked = function(x)
            unchecked.backward(not_finite)
            assert x.grad.isnan().all()
            with (
                qm.check_finite(False),
                pytest.raises(ValueError, match="`gradient` must be finite"),
            ):
                checked.backward(not_finite)

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_forward_mode(self):
        from torch.autograd import forward_ad

        x, labels = torch.ones(3, 2), torch.tensor([0, 1, 0])
        with forward_ad.dual_level(), pytest.raises(TypeError, match="reverse mode"):
            qm.merge_tokens(forward_ad.make_dual(x, x), labels, 2)

    def test_an_empty_batch(self):
        tokens = torch.ones(0, 5, 3, requires_grad=True)
        merged = qm.quickmerge(tokens, 2)
        merged.tokens.sum().backward()
        assert merged.tokens.shape == (0, 2, 3)
        assert tokens.grad.shape == (0, 5, 3)


def test_bfloat16_works(rng):
    tokens = to_library("torch", rng.standard_normal((2, 9, 4)).astype(np.float32))
    tokens = tokens.bfloat16()
    for x, y in zip(qm.quickmerge(tokens, 3), qm.quickmerge(tokens, 3), strict=True):
        np.testing.assert_array_equal(to_numpy(x), to_numpy(y))

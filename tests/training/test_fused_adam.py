"""--optimizer fused_adam is fairseq's adam in another kernel: numbers, states, checkpoints.

The two round differently: 6e-8 of a value each time, in fp32. Compared with a learning rate of some 1e-2, 30 updates
stay within 1e-6 of a value, or of an update where the value is small; a wrong decay, bias correction or eps is a part
of the update itself.
"""

import copy
import itertools

import pytest
import ranks
import recorded
import torch
from exactness import TOLERANCE, arguments, one_process, whole
from fairseq import optim
from fairseq.optim.adam import Adam
from hydra_configs import needs_current_hydra, write_configs
from plugin import build, command, losses, train

from fairseq_hash.checkpoint.convert import merge
from fairseq_hash.training import fused_adam
from fairseq_hash.training.fused_adam import FusedAdam
from fairseq_hash.training.shared_experts import SharedTraining

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
SHAPES = ((7,), (3, 5), (2, 3, 16), (1,), (0, 4), (257, 33))
# Of the gradients of each parameter; the last one, after the shapes, has its elements in another order in memory.
SCALES = [10.0**power for power in range(-3, 4)]
SPARSE = ("--router", "hash", "--num-experts", "4", "--sparse-layers", "0,1")


def pair(dtype, device="cpu", **options):
    """Return fairseq's optimizer and ours, of the same random parameters."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    values.append(torch.randn(6, 4, generator=generator).t())
    options = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.0} | options
    return [
        kind([torch.nn.Parameter(value.to(device, dtype, copy=True)) for value in values], **options)
        for kind in (Adam, FusedAdam)
    ]


def parameters(optimizer):
    return optimizer.param_groups[0]["params"]


def update(optimizers, number):
    """Give both the same gradients, some parameters none, and another learning rate; update."""
    generator = torch.Generator().manual_seed(number)
    for place, (scale, *both) in enumerate(zip(SCALES, *map(parameters, optimizers), strict=True)):
        gradient = torch.randn(both[0].shape, generator=generator) * scale
        has_none = place % 3 == 1 and number % 4 == 2
        for parameter in both:
            parameter.grad = None if has_none else gradient.to(parameter.device, parameter.dtype, copy=True)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + number % 5)
        optimizer.step()


def assert_same(theirs, ours, **close):
    """Compare parameters, and moments, which are fp32 whatever the parameters are."""
    for expected, parameter, scale in zip(parameters(theirs), parameters(ours), SCALES, strict=True):
        torch.testing.assert_close(parameter, expected, **close)
        state, expected_state = ours.state[parameter], theirs.state[expected]
        assert list(state) == list(expected_state)
        assert state["step"] == expected_state["step"] and type(state["step"]) is int
        for moment in ("exp_avg", "exp_avg_sq"):
            assert state[moment].dtype == expected_state[moment].dtype == torch.float32
            # A moment is a mean of gradients, which may cancel: up to a rounding of these.
            tolerance = 1e-6 * (scale if moment == "exp_avg" else scale**2)
            torch.testing.assert_close(state[moment], expected_state[moment], rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.1}, {"eps": 0.5}, {"betas": (0.5, 0.999), "eps": 1e-3, "weight_decay": 0.01}],
    ids=str,
)
@pytest.mark.parametrize("elements", [fused_adam.ELEMENTS, 10], ids=["whole", "in pieces"])
def test_updates_are_those_of_fairseq(monkeypatch, device, options, elements):
    monkeypatch.setattr(fused_adam, "ELEMENTS", elements)
    optimizers = pair(torch.float32, device, **options)
    for number in range(30):
        update(optimizers, number)
        assert_same(*optimizers, rtol=1e-6, atol=1e-6)
    assert len({state["step"] for state in optimizers[1].state.values()}) == 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("elements", [fused_adam.ELEMENTS, 10], ids=["whole", "in pieces"])
def test_16_bits_are_updated_in_fp32(monkeypatch, device, dtype, elements):
    """One update at a time from the same start: two roundings to 16 bits would differ ever more."""
    monkeypatch.setattr(fused_adam, "ELEMENTS", elements)
    theirs, ours = pair(dtype, device, weight_decay=0.1)
    differing = total = 0
    for number in range(10):
        update((theirs, ours), number)
        # At most the next value of the type, and that seldom: where fp32 is about halfway between two.
        assert_same(theirs, ours, rtol=torch.finfo(dtype).eps, atol=1e-7)
        for expected, parameter in zip(parameters(theirs), parameters(ours), strict=True):
            differing, total = differing + int((expected != parameter).sum()), total + expected.numel()
            parameter.data.copy_(expected.data)
    assert differing < 1e-3 * total


def test_gradients_of_another_type():
    theirs, ours = optimizers = pair(torch.float32)
    update(optimizers, 0)
    for optimizer in optimizers:
        for parameter in parameters(optimizer):
            # torch does not let a gradient have another type than its parameter; fairscale replaces the data.
            parameter.grad.data = parameter.grad.data.bfloat16()
        optimizer.step()
    assert_same(theirs, ours, rtol=1e-6, atol=1e-6)


def test_either_goes_on_with_the_others_state():
    optimizers = pair(torch.float32, weight_decay=0.1)
    for number in range(4):
        update(optimizers, number)
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for optimizer, state in zip(optimizers, reversed(states), strict=True):
        optimizer.load_state_dict(state)
    for number in range(4, 8):
        update(optimizers, number)
        assert_same(*optimizers, rtol=1e-6, atol=1e-6)


def test_a_state_of_another_type_is_converted():
    """--memory-efficient-fp16 leaves a loaded state as it was saved."""
    theirs, ours = optimizers = pair(torch.bfloat16)
    update(optimizers, 0)
    for optimizer, moment in itertools.product(optimizers, ("exp_avg", "exp_avg_sq")):
        for state in optimizer.state.values():
            state[moment] = state[moment].half()
    update(optimizers, 1)
    assert_same(theirs, ours, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-7)


def test_sparse_gradients_are_refused_as_by_fairseq():
    for optimizer in pair(torch.float32):
        parameters(optimizer)[1].grad = torch.zeros(3, 5).to_sparse()
        with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
            optimizer.step()


def test_a_closure_is_called_once():
    _, ours = pair(torch.float32)
    called = []
    assert ours.step(lambda: called.append(1) or 2.5) == 2.5 and called == [1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_number", [True, False], ids=["number", "tensor"])
def test_a_scale_divides_the_gradients(device, dtype, is_number):
    optimizers = [pair(dtype, device, weight_decay=0.1)[1] for _ in range(2)]
    for number in range(5):
        divided, scaled = optimizers
        # A power of two: 16-bit gradients divided beforehand are not rounded.
        for scale in (8.0, 0.25) if dtype is not torch.float32 else (8.0, 3.7):
            generator = torch.Generator().manual_seed(number)
            for mine, its in zip(parameters(divided), parameters(scaled), strict=True):
                gradient = torch.randn(mine.shape, generator=generator).to(device, dtype)
                mine.grad, its.grad = gradient / scale, gradient.clone()
            divided.step()
            scaled.step(scale=scale if is_number else torch.tensor(scale, device=device))
            for mine, its in zip(parameters(divided), parameters(scaled), strict=True):
                torch.testing.assert_close(its, mine, rtol=1e-6, atol=1e-6)
                for moment in fused_adam.MOMENTS:
                    found, expected = scaled.state[its][moment], divided.state[mine][moment]
                    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_what_is_fp32_goes_to_the_kernel_uncopied(monkeypatch):
    handed = []
    monkeypatch.setattr(torch, "_fused_adamw_", lambda values, *rest, **more: handed.append((values, rest, more)))
    _, ours = pair(torch.float32)
    chosen = parameters(ours)[:-1]  # the last has its elements in another order
    for parameter in chosen:
        parameter.grad = torch.ones_like(parameter)
    ours.step()
    ((values, (gradients, *_), more),) = handed
    assert all(value is parameter for value, parameter in zip(values, chosen, strict=True))
    assert all(gradient is parameter.grad for gradient, parameter in zip(gradients, chosen, strict=True))
    assert more["grad_scale"] is None


def made(data, *words):
    """Return the optimizer that fairseq makes of some options."""
    cfg, *_ = build(data, "--optimizer", "fused_adam", "--lr", "0.1", *words)
    return optim.build_optimizer(cfg.optimizer, [torch.nn.Parameter(torch.zeros(2))])


def test_options_are_those_of_adam(data):
    words = ("--adam-betas", "(0.8, 0.95)", "--adam-eps", "1e-5", "--weight-decay", "0.3")
    optimizer = made(data, *words)
    assert type(optimizer.optimizer) is FusedAdam
    assert optimizer.optimizer_config == {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.3}
    assert optimizer.supports_memory_efficient_fp16 and optimizer.supports_flat_params
    assert optimizer.supports_step_with_scale
    SharedTraining.check_optimizer(optimizer)


@pytest.mark.parametrize("option", ["--use-old-adam", "--fp16-adam-stats", "--tpu"])
def test_what_it_cannot_do_is_refused(data, option):
    with pytest.raises(SystemExit, match=f"{option} does not go with --optimizer fused_adam"):
        made(data, option)


SWITCHED = (*SPARSE, "--weight-decay", "0.1", "--adam-eps", "1e-6")


def logged(done):
    return list(map(float, losses(done)))


def last_checkpoint(folder):
    """Return the model and the optimizer's state of a folder's last checkpoint, the experts' shards read."""
    merge(folder / "checkpoint_last.pt", folder / "merged.pt", with_optimizer=True)
    state = torch.load(folder / "merged.pt", weights_only=False)
    # fairseq never fills `_float_tensor`, which it has for its dtype alone.
    model = {name: value for name, value in state["model"].items() if not name.endswith("_float_tensor")}
    return model, state["last_optimizer_state"]["state"]


@pytest.fixture(scope="module")
def never_switched(data, tmp_path_factory):
    """The losses of 8 updates of `adam` without a stop, and what it saved."""
    folder = tmp_path_factory.mktemp("never switched")
    done = train(data, folder, *SWITCHED)
    return logged(done), last_checkpoint(folder)


@pytest.mark.parametrize("first", ["adam", "fused_adam"])
def test_a_run_goes_on_with_the_other(data, tmp_path, never_switched, first):
    expected, (expected_model, expected_state) = never_switched
    second = {"adam": "fused_adam", "fused_adam": "adam"}[first]
    begun = logged(train(data, tmp_path, *SWITCHED, "--optimizer", first, "--max-update", "4"))
    assert list((tmp_path / "experts").glob("*.optimizer.*"))
    done = logged(train(data, tmp_path, *SWITCHED, "--optimizer", second))
    assert len(begun) == len(done) == 4
    assert begun + done == pytest.approx(expected, abs=2e-3)  # the log has three places
    model, state = last_checkpoint(tmp_path)
    torch.testing.assert_close(model, expected_model, rtol=TOLERANCE, atol=TOLERANCE)
    assert {moments["step"] for moments in state.values()} == {8}
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-6)


@needs_current_hydra
def test_a_configuration_of_adam_becomes_one(data, tmp_path):
    words = write_configs(tmp_path, data, updates=2)
    more = ("common.cpu=true", "optimizer._name=fused_adam", "checkpoint.no_save=true")
    done = command("hydra_train", *words, *more)
    assert len(losses(done)) == 2 and "'_name': 'fused_adam'" in done.stdout + done.stderr


FORMS = {"fp32": (), "bf16": ("--bf16",), "memory-efficient fp16": ("--memory-efficient-fp16",)}


@pytest.fixture(scope="module")
def shared(data):
    """Two ranks that share experts, and one process with fairseq's adam, in each form."""
    scale = ("--fp16-init-scale", "4")
    cases = {name: arguments("hash", 4, "adam", *form, *scale) for name, form in FORMS.items()}
    ours = {name: (*words, "--optimizer", "fused_adam") for name, words in cases.items()}
    alone = recorded.train_all(data, {name: one_process(words, 2) for name, words in cases.items()})
    return alone, ranks.run(2, "recorded:train_all", str(data), ours)


@pytest.mark.parametrize("form", FORMS)
def test_ranks_that_share_experts_train_as_one_process_of_adam(shared, form):
    alone, many = shared[0][form], [record[form] for record in shared[1]]
    # In half precision gradients are added up in it, as in test_shared_training.
    tolerance = {"rtol": TOLERANCE if form == "fp32" else 1e-2, "atol": 0}
    for what in ("loss", "norm"):
        assert many[0][what] == many[1][what]
        torch.testing.assert_close(torch.tensor(many[0][what]), torch.tensor(alone[what]), **tolerance)
    for name, value in alone["parameters"].items():
        found = whole(many, lambda record: record["parameters"], name)
        assert found.dtype == value.dtype
        if form == "fp32":
            torch.testing.assert_close(found, value, rtol=TOLERANCE, atol=TOLERANCE)


def test_an_update_that_overflows_is_skipped(data):
    words = (*arguments("hash", 4, "adam", "--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", "4"),)
    found = ranks.run(2, "training_ranks:train_with_overflow", str(data), (*words, "--optimizer", "fused_adam"))
    assert found == [(2.0, 6)] * 2


def test_fully_sharded_parameters_train_as_one_process_of_adam(data):
    # On a CPU, where fairscale's streams are stubs, as in test_shared_training.
    words = arguments("hash", 4, "adam", "--update-freq", "2")
    alone = recorded.train(data, one_process(words, 2))
    ours = (*words, "--optimizer", "fused_adam")
    for record in ranks.run(2, "training_ranks:train_fully_sharded", str(data), ours):
        for what in ("loss", "norm"):
            expected = torch.tensor(alone[what])
            torch.testing.assert_close(torch.tensor(record[what]), expected, rtol=TOLERANCE, atol=0)

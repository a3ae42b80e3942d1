"""From the card to the CPU and back: a checkpoint of either is evaluated and goes on on the other."""

import shutil

import pytest
import torch

from gpu.trainings import HASH, SWITCH, Several, assert_same_losses, evaluate, finish, numbers, perplexity, train

CASES = {"hash": HASH, "switch": SWITCH}
SAVED, UPDATES = 5, 10


@pytest.fixture(scope="module")
def runs(device, data, tmp_path_factory):
    """Trainings on both, of which one never stops; then what each makes of the other's checkpoint.

    The processes and the name of each are ("first" or "then", the name of the place where it ran).
    """
    folder = tmp_path_factory.mktemp("devices")
    places = {"device": device, "cpu": torch.device("cpu")}
    done = {}
    for name, place in places.items():
        jobs = {}
        for case, options in CASES.items():
            jobs[f"{case}, whole"] = train(data, place, folder / name / case / "whole", UPDATES, "--no-save", *options)
            jobs[f"{case}, half"] = train(data, place, folder / name / case / "half", SAVED, *options)
        done["first", name] = Several(place, folder / name / "first", jobs)
    finish(*done.values())
    for (name, place), other in zip(places.items(), reversed(places), strict=True):
        jobs = {}
        for case, options in CASES.items():
            half, on = folder / other / case / "half", folder / name / case / "on"
            if half.exists():  # otherwise its training failed, which the test says
                shutil.copytree(half, on)
            jobs[f"{case}, on"] = train(data, place, on, UPDATES, *options)
            for owner in places:
                path = folder / owner / case / "half" / "checkpoint_last.pt"
                jobs[f"{case}, evaluation of {owner}"] = evaluate(data, place, path)
                if place.type == "cuda":
                    jobs[f"{case}, fp16 evaluation of {owner}"] = evaluate(data, place, path, "--fp16")
        done["then", name] = Several(place, folder / name / "then", jobs)
    finish(done["then", "device"], done["then", "cpu"])
    return done


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("saver", "other"), [("device", "cpu"), ("cpu", "device")])
def test_training_goes_on_elsewhere(runs, case, saver, other):
    whole = numbers(runs["first", saver].said(f"{case}, whole"))
    half = numbers(runs["first", saver].said(f"{case}, half"))
    on = numbers(runs["then", other].said(f"{case}, on"))
    assert list(half) == list(range(1, SAVED + 1)) and list(on) == list(range(SAVED + 1, UPDATES + 1))
    assert_same_losses({**half, **on}, whole)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("saver", ["device", "cpu"])
def test_perplexity_is_the_same_elsewhere(runs, device, case, saver):
    runs["first", saver].said(f"{case}, half")
    here, there = (perplexity(runs["then", name].said(f"{case}, evaluation of {saver}")) for name in ("device", "cpu"))
    assert here == pytest.approx(there, rel=1e-3)
    if device.type == "cuda":
        half = perplexity(runs["then", "device"].said(f"{case}, fp16 evaluation of {saver}"))
        assert half == pytest.approx(there, rel=1e-2)

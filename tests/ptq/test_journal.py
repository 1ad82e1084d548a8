"""A quantization that was interrupted goes on from what it had kept, to the identical result."""

import pytest
import torch

from planish.errors import PlanishError
from planish.network import taps_of
from planish.ptq import Calibrate, FoldBatchNorm, Reconstruct, Round, quantize
from planish.ptq.assign_bits import AssignBits
from planish.ptq.gptq import GPTQ
from planish.ptq.journal import Journal, fingerprint
from planish.ptq.learners import LEARNERS
from planish.ptq.norm_tuning import TuneNorms
from planish.ptq.refine import RefineRanges
from planish.ptq.ridge import RidgeCorrection
from tests.ptq.work import network, same, state

torch.set_num_threads(1)


class Killed(BaseException):
    pass


def passes(learner="genie", **options):
    quick = {"iterations": 12, "batch": 8, "drop": 0.0 if learner == "signround" else 0.5, **options}
    return [FoldBatchNorm(), Calibrate(), Round(), Reconstruct(learner=learner, **quick), TuneNorms(steps=5)]


def quantized(folder, *, resume=True, units=None, name="vit", scheme="w3a3", **options):
    """With ``units`` it is killed when so many are done."""
    with torch.random.fork_rng():
        model, batches = network(name)
    seen = []

    def log(line):
        if line["event"] == "unit":
            seen.append(line["unit"])
            if len(seen) == units:
                raise Killed

    done = quantize(model, batches, scheme, passes(**options), checkpoint_dir=folder, resume=resume, log=log)
    return done, seen


@pytest.mark.parametrize(("learner", "units"), zip(LEARNERS, [1, 2, 1, 1], strict=True))
def test_it_goes_on_to_the_identical_result(tmp_path, learner, units):
    whole, every = quantized(None, learner=learner)
    assert len(every) == 2
    with pytest.raises(Killed):
        quantized(tmp_path / "kept", units=units, learner=learner)
    again, seen = quantized(tmp_path / "kept", learner=learner)
    assert seen == every[units:]
    assert same(state(again), state(whole))
    assert [type(tap) for _, tap in taps_of(again)] == [type(tap) for _, tap in taps_of(whole)]


def test_random_numbers_go_on_where_they_were(tmp_path):
    """The second unit draws other images if the first one drew none; and a caller's own numbers are left alone."""
    whole, _ = quantized(None)
    with pytest.raises(Killed):
        quantized(tmp_path, units=1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again, _ = quantized(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(state(again), state(whole))


def test_without_resume_it_begins_anew(tmp_path):
    _, every = quantized(tmp_path / "kept")
    _, seen = quantized(tmp_path / "kept", resume=False)
    assert seen == every


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_with_other_files_is_not_emptied(tmp_path, resume):
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"mine")
    with pytest.raises(PlanishError, match=r"no checkpoint \(mine\.safetensors\) and would be lost"):
        quantized(tmp_path, resume=resume)
    assert mine.read_bytes() == b"mine"


def test_what_was_kept_of_another_quantization_is_refused(tmp_path):
    quantized(tmp_path)
    with pytest.raises(PlanishError, match=r"another quantization .* give the same ones to continue"):
        quantized(tmp_path, scheme="w2a3")
    with pytest.raises(PlanishError, match="another quantization"):
        quantized(tmp_path, iterations=13)
    quantized(tmp_path, memory=0.1)  # where caches lie changes nothing


def test_a_damaged_part_is_named(tmp_path):
    quantized(tmp_path)
    part = next(tmp_path.glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(PlanishError, match=rf"{part.name} cannot be read .*delete it, and this part is done again"):
        quantized(tmp_path)
    part.unlink()
    whole, _ = quantized(None)
    assert same(state(quantized(tmp_path)[0]), state(whole))


def test_a_part_of_another_unit_does_not_fit(tmp_path):
    quantized(tmp_path, name="conv")
    (part,) = tmp_path.glob("*.safetensors")
    Journal(None).put("nothing", {})  # keeps nothing and finds nothing
    assert Journal(None).get("nothing") is None
    from safetensors.torch import load_file, save_file

    save_file({key.replace(".weight", ".other"): value for key, value in load_file(part).items()}, part)
    with pytest.raises(PlanishError, match=r"does not fit it .*delete the checkpoint"):
        quantized(tmp_path, name="conv")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanishError, match="file/kept could not be made"):
        quantized(tmp_path / "file" / "kept")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (GPTQ(ridge=RidgeCorrection(lam=0.1)), GPTQ(ridge=RidgeCorrection(lam=1.0))),
        (GPTQ(), GPTQ(ridge=RidgeCorrection())),
        (RefineRanges(), RefineRanges(factors=(0.5, 1.0))),
        (AssignBits("0.1x"), AssignBits("0.1x", widths=(2, 8))),
    ],
)
def test_every_option_of_a_pass_is_part_of_what_it_is_known_by(one, other):
    logits = [torch.zeros(1, 2)]
    assert fingerprint("w4a4", [one], logits) == fingerprint("w4a4", [one], logits)
    assert fingerprint("w4a4", [one], logits) != fingerprint("w4a4", [other], logits)
    less = [GPTQ(ridge=RidgeCorrection(memory=1.0), memory=2.0)]  # which changes no result
    assert fingerprint("w4a4", less, logits) == fingerprint("w4a4", [GPTQ(ridge=RidgeCorrection())], logits)


def test_other_products_in_float_are_another_quantization(tmp_path):
    model, batches = network("vit")
    given = {"checkpoint_dir": tmp_path / "kept", "resume": True}
    quantize(model, batches, "w3a3", passes(), **given, allow=["blocks.0.*"])
    with pytest.raises(PlanishError, match="a part of another quantization"):
        quantize(model, batches, "w3a3", passes(), **given)

"""Consistency regularization: the divergence, the ramp, the teacher, and images without labels."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import TensorDataset

from planish.data import make_loader
from planish.data.views import distort, random_view
from planish.errors import PlanishError
from planish.qat import Method, QATSettings, train_quantized
from planish.qat.cr import CR, ConsistencyRegularization, Endless, divergence, follow, ramp_up
from planish.training import SAM, Ingredient, Interrupted
from tests.training import tiny

SETTINGS = QATSettings(averaging=None, training=tiny.settings(epochs=1))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def divergence_twin(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student / temperature, teacher / temperature, strict=True):
        p, q = t.exp() / t.exp().sum(), s.exp() / s.exp().sum()
        total = total + (p * (p / q).log()).sum()
    return total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence(temperature):
    student, teacher = draw(6, 5), draw(6, 5, seed=1)
    value = divergence(student, teacher, temperature)
    torch.testing.assert_close(value, divergence_twin(student, teacher, temperature))
    assert value > 0
    assert divergence(student, student + 3.7, temperature).abs() < 1e-6  # logits are equal up to a constant


def test_no_gradient_to_the_teacher():
    student, teacher = draw(6, 5).requires_grad_(), draw(6, 5, seed=1).requires_grad_()
    divergence(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_ramp():
    assert ramp_up(0.0, 0.4) == pytest.approx(math.exp(-5))
    assert ramp_up(0.4, 0.4) == ramp_up(0.9, 0.4) == 1.0
    values = [ramp_up(t / 50, 0.4) for t in range(50)]
    assert values == sorted(values)
    assert ramp_up(0.0, 0.0) == 1.0


def test_in_training_the_weight_rises_along_the_ramp():
    """Of a student that stands still, so that nothing else changes its consistency."""

    def losses(ramp):
        seen, method = [], CR(task=0.0, ramp=ramp)
        settings = QATSettings(averaging=None, training=tiny.settings(epochs=1, lr=1e-9))
        train_quantized(
            tiny.mlp(), tiny.loader(), "w4a4", method, settings=settings, progress=lambda s, n, x: seen.append(x)
        )
        return seen

    full = losses(ramp=0.0)
    assert min(full) > 0
    rising = [loss * math.exp(-5 * (1 - min(t / 3, 1)) ** 2) for t, loss in enumerate(full)]
    assert losses(ramp=0.5) == pytest.approx(rising, rel=1e-4)


def test_the_average_of_a_student_that_stands_still():
    teacher, student = tiny.conv(seed=1), tiny.conv(seed=2)
    student[1].running_mean.add_(3.0)
    first = copy.deepcopy(teacher)
    for _ in range(7):
        follow(teacher, student, 0.8)
    for name in ("0.weight", "1.running_mean", "1.running_var"):
        mine, old, new = (dict(m.state_dict())[name] for m in (teacher, first, student))
        torch.testing.assert_close(mine, 0.8**7 * old + (1 - 0.8**7) * new)
    student[1].num_batches_tracked.fill_(9)
    follow(teacher, student, 0.8)
    assert teacher[1].num_batches_tracked == 9


class Watch(Ingredient):
    def __init__(self, consistency):
        self.consistency, self.losses, self.grads = consistency, [], []

    def loss(self, run, inputs, labels, logits):
        loss = self.consistency.loss(run, inputs, labels, logits)
        self.losses += [loss.item(), *torch.autograd.grad(loss, logits, retain_graph=True)[0].flatten().tolist()]

    def after_step(self, run):
        average = self.consistency.average
        self.grads += [p.grad for p in average.parameters()]
        self.mode = average.training


def test_a_teacher_that_is_the_student_on_the_same_view_changes_nothing():
    """On a network without BatchNorm and dropout, which is the same in training."""
    batches = tiny.loader(size=16)
    consistency = ConsistencyRegularization(3.0, ramp=0.0, decay=0.0, shift=0.0, flip=0.0)
    watch = Watch(consistency)
    train_quantized(tiny.vit(), batches, "w4a4", settings=SETTINGS, extra=[consistency, watch])
    assert max(map(abs, watch.losses)) < 1e-6  # the loss, and its gradient
    assert all(grad is None for grad in watch.grads)
    assert watch.mode is False


@pytest.mark.parametrize("more", [False, True])
def test_a_teacher_that_is_the_student_on_the_same_view_leaves_lsq(more):
    batches = tiny.loader(n=8, size=16)
    images = [draw(4, 1, 16, 16, seed=7)] if more else None

    def change(**options):
        method = CR(weight=3.0, ramp=0.0, decay=0.0, **options)
        trained = train_quantized(tiny.vit(), batches, "w4a4", method, settings=SETTINGS, unlabelled=images)
        return max((a - b).abs().max() for a, b in zip(trained.parameters(), lsq.parameters(), strict=True))

    lsq = train_quantized(tiny.vit(), batches, "w4a4", settings=SETTINGS)
    assert change(shift=0.0, flip=0.0) < 1e-5
    assert change() > 1e-4


def views_twin(teacher, student, images, extra, weight, temperature):
    """A step's loss in the order of the algorithm: views, both predictions, their divergence; labels appear nowhere."""
    theirs = teacher(random_view(images, 0.25, 0.5))
    total = divergence_twin(student(images), theirs, temperature)
    view = distort(random_view(extra, 0.25, 0.5), 0.5)
    return weight * (total + divergence_twin(student(view), teacher(extra), temperature))


def test_a_step_is_that_of_the_algorithm():
    """The loss of every step of a training, against models that are copied before the step."""
    consistency = ConsistencyRegularization(
        2.0, ramp=0.0, decay=0.7, temperature=1.5, shift=0.25, strength=0.5, unlabelled=[draw(4, 1, 16, 16, seed=7)]
    )
    losses, twins, teachers = [], [], []

    class Twin(Ingredient):
        def start(self, run):
            self.teacher = copy.deepcopy(run.model).eval()

        def before_step(self, run, inputs, labels):
            state = torch.get_rng_state()
            student = copy.deepcopy(run.model)
            with torch.no_grad():
                extra = consistency.unlabelled[0]
                twins.append(views_twin(self.teacher, student, inputs, extra, 2.0, 1.5).item())
            torch.set_rng_state(state)

        def after_step(self, run):
            decay = min((2 + run.step) / (11 + run.step), 0.7)
            with torch.no_grad():
                for mine, theirs in zip(self.teacher.parameters(), run.model.parameters(), strict=True):
                    mine.copy_(decay * mine + (1 - decay) * theirs)
            teachers.append(self.teacher)

    class Seen(Ingredient):
        def loss(self, run, inputs, labels, logits):
            losses.append(consistency.loss(run, inputs, labels, logits).item())

    extra = [Twin(), consistency, Seen()]
    trained = train_quantized(tiny.vit(), tiny.loader(size=16), "w4a4", settings=SETTINGS, extra=extra)
    assert trained is not None
    torch.testing.assert_close(losses, twins, rtol=1e-4, atol=1e-6)
    for mine, twin in zip(consistency.average.parameters(), teachers[-1].parameters(), strict=True):
        torch.testing.assert_close(mine, twin, rtol=1e-4, atol=1e-6)


def test_with_views_it_is_not_lsq_and_with_weight_zero_it_is():
    batches = tiny.loader()
    lsq = train_quantized(tiny.conv(), batches, "w4a4", Method(), settings=SETTINGS)
    assert tiny.same(lsq, train_quantized(tiny.conv(), batches, "w4a4", CR(weight=0.0), settings=SETTINGS))
    assert not tiny.same(lsq, train_quantized(tiny.conv(), batches, "w4a4", CR(ramp=0.0), settings=SETTINGS))


def unlabelled(n=20, poison=-1, seed=5):
    images = draw(n, 1, 8, 8, seed=seed)
    return make_loader(TensorDataset(images, torch.full((n,), poison)), 4, shuffle=True, seed=1)


def test_labels_of_the_unlabelled_are_not_read():
    trained = [
        train_quantized(
            tiny.conv(), tiny.loader(), "w4a4", CR(ramp=0.0), settings=SETTINGS, unlabelled=unlabelled(poison=p)
        )
        for p in (-1, 3)
    ]
    assert tiny.same(*trained)
    other = train_quantized(
        tiny.conv(), tiny.loader(), "w4a4", CR(ramp=0.0), settings=SETTINGS, unlabelled=unlabelled(seed=6)
    )
    assert not tiny.same(other, trained[0])


def test_the_batch_of_a_step_does_not_depend_on_where_it_began():
    whole = Endless(unlabelled(), seed=0)
    batches = [whole.get(step) for step in range(12)]  # 5 an epoch
    assert not torch.equal(batches[0], batches[5])
    for begin in (1, 5, 7):
        part = Endless(unlabelled(), seed=0)
        assert all(torch.equal(part.get(step), batches[step]) for step in range(begin, 12))


def test_reading_on_leaves_the_random_state_alone():
    class Draws(TensorDataset):
        def __getitem__(self, index):
            return super().__getitem__(index)[0] + torch.rand(())

    more = Endless(make_loader(Draws(draw(20, 1, 8, 8)), 4, shuffle=True, seed=1), seed=0)
    for step in (0, 1, 2, 5, 11):
        state = torch.get_rng_state()
        more.get(step)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_step_with_two_gradients_has_one_batch_and_one_target():
    batches, seen = unlabelled(), []
    consistency = ConsistencyRegularization(1.0, ramp=0.0, unlabelled=batches)

    class Seen(Ingredient):
        def loss(self, run, inputs, labels, logits):
            seen.append((run.step, consistency.extra[0], consistency.target))

    train_quantized(tiny.conv(), tiny.loader(), "w4a4", settings=SETTINGS, extra=[SAM(), consistency, Seen()])
    assert len(seen) == 2 * tiny.STEPS
    for (step, view, target), (again, same_view, same_target) in zip(seen[::2], seen[1::2], strict=True):
        assert step == again
        assert view is same_view
        assert target is same_target


def test_the_teacher_can_be_handed_back():
    kept = {}

    class Keep(Ingredient):
        def __init__(self, consistency):
            self.consistency = consistency

        def after_step(self, run):
            kept.update({name: value.clone() for name, value in self.consistency.average.state_dict().items()})

    @dataclass(frozen=True)
    class Kept(CR):
        def ingredients(self, context):
            parts = super().ingredients(context)
            return [*parts, Keep(parts[-1])]

    for averaging in (0.9, None):
        settings = QATSettings(averaging=averaging, training=tiny.settings(epochs=1))
        trained = train_quantized(tiny.conv(), tiny.loader(), "w4a4", Kept(evaluate="teacher"), settings=settings)
        weights = {n: p for n, p in trained.named_parameters() if n.endswith("weight") and p.dim() == 1}
        assert len(weights) == 2  # of BatchNorm; those of layers are rounded in the end
        assert all(torch.equal(value, kept[name]) for name, value in weights.items())
        # averaged statistics stay, unless the settings ask for them to be estimated anew
        assert torch.equal(trained[1].running_mean, kept["1.running_mean"]) is (averaging is None)


def test_interrupted_and_resumed_it_is_the_same(tmp_path):
    def run(**options):
        settings = QATSettings(averaging=0.9, training=tiny.settings(epochs=2))
        return train_quantized(
            tiny.conv(), tiny.loader(), "w4a4", CR(ramp=0.0), settings=settings, unlabelled=unlabelled(), **options
        )

    steps = []
    with pytest.raises(Interrupted):
        run(checkpoint_dir=tmp_path / "c", should_stop=lambda: steps.append(1) or len(steps) == 8)
    assert tiny.same(run(), run(checkpoint_dir=tmp_path / "c", resume=True))


def test_the_teacher_is_quantized_and_its_scales_stay_positive():
    consistency = ConsistencyRegularization(1.0, ramp=0.0)
    seen = {}

    class Look(Ingredient):
        def finish(self, run):
            seen["scales"] = {n: p for n, p in consistency.average.named_parameters() if n.endswith("scale")}

    train_quantized(tiny.conv(), tiny.loader(), "w2a2", settings=SETTINGS, extra=[consistency, Look()])
    assert len(seen["scales"]) == 6
    assert all((scale > 0).all() for scale in seen["scales"].values())


def test_agreement_under_small_shifts_grows():
    """What the regularizer is for: less change of the output when the input changes a little."""
    batches = tiny.loader(n=40)
    settings = QATSettings(averaging=None, training=tiny.settings(epochs=10))
    x = torch.cat([images for images, _ in batches])

    def change(model):
        return (model(x).softmax(-1) - model(x.roll(1, -1)).softmax(-1)).abs().mean()

    plain = train_quantized(tiny.conv(), batches, "w4a4", settings=settings)
    consistent = train_quantized(tiny.conv(), batches, "w4a4", CR(weight=3.0, ramp=0.0), settings=settings)
    assert change(consistent) < change(plain)


def test_errors():
    for wrong in ({"decay": 1.0}, {"weight": -1.0}, {"ramp": 2.0}, {"temperature": 0.0}):
        with pytest.raises(PlanishError, match="decay lies in"):
            ConsistencyRegularization(**wrong)
    with pytest.raises(PlanishError, match="hands back the 'both': choose student or teacher"):
        ConsistencyRegularization(evaluate="both")
    with pytest.raises(PlanishError, match="at least one batch"):
        Endless([], 0)
    with pytest.raises(PlanishError, match="a loader with a length"):
        Endless(iter([draw(4, 1, 8, 8)]), 0)
    with pytest.raises(PlanishError, match=r"images \(N, C, H, W\)"):
        ConsistencyRegularization().view({"input_ids": torch.zeros(3, 7, dtype=torch.long)})


def test_images_in_a_mapping():
    inputs = {"pixel_values": draw(3, 1, 8, 8), "mask": torch.ones(3, 4)}
    torch.manual_seed(0)
    view = ConsistencyRegularization(shift=0.25).view(inputs, 0.5)
    torch.manual_seed(0)
    assert torch.equal(view["pixel_values"], distort(random_view(inputs["pixel_values"], 0.25), 0.5))
    assert view["mask"] is inputs["mask"]

"""What outputs mean: 1 to 20,000 classes, several labels an image, features without a head."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, kl_divergence
from torch.utils.data import DataLoader, TensorDataset

import planish
from planish.deploy.card import read_card
from planish.deploy.classify import Classifier
from planish.flatness.subject import Subject
from planish.network import watch
from planish.network.batches import logits_of
from planish.ptq.assign_bits import AssignBits
from planish.ptq.methods import get_method
from planish.ptq.sensitivity import fisher_losses
from planish.task import CLASSES, FEATURES, LABELS, TASKS, check_task, say_task, targets_of, task_loss, task_of

torch.set_num_threads(1)
LOOKS = planish.Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3, crop_pct=1.0)
IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def net(outputs):
    torch.manual_seed(0)
    head = [nn.Linear(16, outputs)] if outputs else []
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), *head,
    ).eval()  # fmt: skip


def loader(targets):
    return DataLoader(TensorDataset(IMAGES, targets), 8)


class Zero(nn.Module):
    """A quantizer to nothing at all."""

    def forward(self, x):
        return torch.zeros_like(x)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- the functions against PyTorch's own ------------------------------------------------------------------------------


def test_distances_are_those_of_pytorch():
    a, b = rows(7, 5), rows(7, 5, seed=1)
    expected = kl_divergence(Bernoulli(logits=a), Bernoulli(logits=b)).sum(-1)
    torch.testing.assert_close(LABELS.distance(a, b), expected)
    plain = F.kl_div(b.log_softmax(-1), a.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(CLASSES.distance(a, b), plain)
    torch.testing.assert_close(CLASSES.divergence(a, b, 2.0), CLASSES.distance(a / 2, b / 2).mean())
    unit, other = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    torch.testing.assert_close(FEATURES.distance(unit, other), 1 - F.cosine_similarity(a, b))


@pytest.mark.parametrize("name", TASKS)
def test_equal_outputs_are_alike_and_not_apart(name):
    task, a = TASKS[name], rows(6, 4)
    assert task.distance(a, a).abs().max() < 1e-6
    torch.testing.assert_close(task.alike(a, a), torch.ones(6))
    assert task.alike(a, -a).max() < 1


@pytest.mark.parametrize("name", TASKS)
def test_drawn_gradients_are_the_curvature_of_the_distance(name):
    task, z = TASKS[name], rows(1, 3)
    hessian = torch.autograd.functional.hessian(lambda x: task.distance(z, x).sum(), z).view(3, 3).diagonal()
    generator, squares = torch.Generator().manual_seed(0), torch.zeros(3)
    for _ in range(4000):
        x = z.clone().requires_grad_()
        task.draw(x, generator).backward()
        squares += x.grad[0].square() / 4000
    torch.testing.assert_close(squares, hessian, rtol=0.1, atol=0.01)


def test_losses_are_those_of_pytorch():
    logits, labels = rows(6, 4), (rows(6, 4, seed=1) > 0).float()
    torch.testing.assert_close(task_loss(LABELS, logits, labels), F.binary_cross_entropy_with_logits(logits, labels))
    numbers = torch.arange(6) % 4
    torch.testing.assert_close(task_loss(CLASSES, logits, numbers), F.cross_entropy(logits, numbers))
    assert targets_of(LABELS, logits, numbers).argmax(-1).tolist() == numbers.tolist()
    assert targets_of(LABELS, logits[:, :1], torch.tensor([0, 1, 1, 0, 1, 0])).flatten().tolist() == [0, 1, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: check_task("boxes"), "choose one of classes, labels, features"),
        (lambda: targets_of(CLASSES, rows(3, 4), torch.ones(3, 4)), "say task='labels'"),
        (lambda: targets_of(LABELS, rows(3, 4), torch.ones(3, 5)), r"\(3, 5\)"),
        (lambda: targets_of(LABELS, rows(3, 4), 2 * torch.ones(3, 4)), "are 0 or 1"),
        (lambda: targets_of(LABELS, rows(3, 1), torch.tensor([0, 1, 2])), "a label is 2"),
    ],
)
def test_wrong_targets(call, sentence):
    with pytest.raises(planish.PlanishError, match=sentence):
        call()


def test_a_network_says_its_task_and_one_logit_is_a_label():
    model = net(3)
    assert task_of(model) is CLASSES
    say_task(model, "labels")
    assert task_of(model) is LABELS
    assert task_of(None, rows(2, 1)) is LABELS
    with pytest.raises(planish.PlanishError, match="cross-entropy of classes"):
        Subject.prepare(model, [IMAGES], ["w4a4"])


# -- through everything -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 2, 20_000])
def test_from_one_class_to_twenty_thousand(outputs, tmp_path):
    model, labels = net(outputs), torch.arange(24) % min(max(outputs, 2), 5)
    flat = planish.flatten(model, loader(labels), scheme="w4a4", epochs=1)
    quantized = planish.quantize(flat, [IMAGES], "w4a4", method="fast")
    worth = planish.evaluate(quantized, loader(labels), reference=model)
    assert 0 <= worth["map" if outputs == 1 else "top1"] <= 1
    assert 0 <= worth["flip_rate"] <= 1
    trained = planish.train(model, loader(labels), "w4a4", "kd", epochs=1)
    assert logits_of(trained(IMAGES)).shape == (24, outputs)
    done = planish.export(quantized, tmp_path / "m.onnx", images=[IMAGES], preprocessing=LOOKS)
    assert not done.agreement.beyond_ties
    assert len(Classifier(tmp_path / "m.onnx").card.classes) == outputs


def test_several_labels(tmp_path):
    labels = (rows(24, 6, seed=3) > 0).float()
    model = net(6)
    flat = planish.flatten(model, loader(labels), scheme="w4a4", epochs=2, task="labels")
    for method in ("rtn", [*get_method("best-cnn").passes()][:3]):
        quantized = planish.quantize(flat, [IMAGES], "w4a4", method=method, task="labels")
    worth = planish.evaluate(quantized, loader(labels), reference=flat)
    assert {"map", "ap_micro", "f1", "f1_micro", "exact", "nll", "flip_rate"} <= worth.keys()
    trained = planish.train(flat, loader(labels), "w4a4", "kd", epochs=1)
    assert task_of(trained) is LABELS  # as the network that it was made from says
    before, after = (F.binary_cross_entropy_with_logits(m(IMAGES), labels) for m in (model, flat))
    assert after < before
    done = planish.export(quantized, tmp_path / "m.onnx", images=[IMAGES], preprocessing=LOOKS, classes=list("abcdef"))
    assert "same labels as the PyTorch model on 24 of 24" in str(done)
    classifier = Classifier(tmp_path / "m.onnx")
    logits = quantized(IMAGES[:1])[0].detach()
    answer = classifier.answer((logits.numpy(), 0.0))
    expected = logits.sigmoid().sort(descending=True)[0].double()
    torch.testing.assert_close(torch.tensor(answer.probabilities).double(), expected, rtol=1e-5, atol=1e-6)


def test_features_without_a_head(tmp_path):
    model, labels = net(0), torch.arange(24) % 3
    say_task(model, "features")
    flat = planish.flatten(model, loader(labels), scheme="w4a4", epochs=1)
    rounded = planish.quantize(model, [IMAGES], "w3a3")
    learned = planish.quantize(model, [IMAGES], "w3a3", method="fast")
    worths = [planish.evaluate(m, loader(labels), reference=model) for m in (rounded, learned, model, flat)]
    assert worths[3]["cosine"] > 0.9
    assert worths[2]["cosine"] == pytest.approx(1, abs=1e-6)
    assert worths[0]["error"] > 0
    assert worths[1]["cosine"] > worths[0]["cosine"] > 0.5
    assert "top1" not in worths[0]
    without = planish.evaluate(rounded, [IMAGES], reference=model)
    assert without["cosine"] == pytest.approx(worths[0]["cosine"], abs=1e-5)
    assert without["images"] == 24
    assert "knn_top1" not in without
    other = planish.evaluate(rounded, loader(labels), bank=loader(labels))
    assert other["knn_top1"] >= worths[0]["knn_top1"]  # every image finds itself in the bank
    trained = planish.train(model, [IMAGES, IMAGES], "w4a4", epochs=1)
    assert planish.evaluate(trained, loader(labels), reference=model)["cosine"] > 0.5
    done = planish.export(rounded, tmp_path / "m.onnx", images=[IMAGES], preprocessing=LOOKS)
    assert "same direction as the PyTorch model on 24 of 24" in str(done)
    with pytest.raises(planish.PlanishError, match="features and no classes"):
        Classifier(tmp_path / "m.onnx")


def test_the_file_keeps_the_task(tmp_path):
    loaded = planish.load_model("convnet", num_classes=0)
    assert task_of(loaded.model) is FEATURES
    images = torch.randn(8, *loaded.preprocessing.input_size)
    assert logits_of(loaded.model(images)).shape[1] > 10
    quantized = planish.quantize(loaded.model, [images], "w4a4")
    planish.save(quantized, tmp_path / "m.safetensors")
    again = planish.load(tmp_path / "m.safetensors")
    assert task_of(again) is FEATURES
    assert torch.equal(again(images), quantized(images))


@pytest.mark.parametrize("task", TASKS)
def test_bits_are_chosen_by_the_distance_of_the_task(task):
    model = net(5)
    say_task(model, task)
    quantized = planish.quantize(model, [IMAGES], "w4a4", [AssignBits("0.12x")])
    assert 0 < FEATURES.alike(model(IMAGES), quantized(IMAGES)).mean() <= 1


def test_a_sensitivity_is_finite_for_every_task():
    model = net(5)
    products = watch(model, IMAGES[:1]).products
    name = products[0].weight.name
    for task in TASKS:
        say_task(model, task)
        found = fisher_losses(model, products, [IMAGES[:8]], {name: {"same": nn.Identity(), "none": Zero()}}, draws=1)
        assert found[name]["same"] == 0
        assert 0 < found[name]["none"] < float("inf")


def test_the_card_says_what_outputs_mean(tmp_path):
    import onnx

    model = net(4)
    for task, said in (("classes", "classes"), ("labels", "labels")):
        say_task(model, task)
        planish.export(model, tmp_path / "m.onnx", images=[IMAGES], preprocessing=LOOKS)
        assert read_card(onnx.load(tmp_path / "m.onnx")).task == said
    surest = Classifier(tmp_path / "m.onnx").answer((np.array([900.0, -900, 0, 1], np.float32), 0.0))
    assert [round(p, 2) for p in surest.probabilities] == [1, 0.73, 0.5, 0]

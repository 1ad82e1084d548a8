import torch

from planish.ptq.cutmix import cutmix


def mixed(seed=0, n=64):
    images = torch.arange(1.0, n + 1).view(n, 1, 1, 1).expand(n, 2, 12, 10).contiguous()
    return images, cutmix(images, torch.Generator().manual_seed(seed))


def test_each_image_has_a_rectangle_of_one_other():
    images, found = mixed()
    assert found.shape == images.shape
    areas = []
    for image, out in zip(images, found, strict=True):
        assert torch.equal(out[0], out[1])
        foreign = out[0] != image[0]
        values = out[0][foreign].unique()
        assert len(values) <= 1
        areas.append(float(foreign.float().mean()))
        if foreign.any():
            rows, columns = foreign.any(1).nonzero().flatten(), foreign.any(0).nonzero().flatten()
            box = foreign[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert box.all()
    assert 0.2 < sum(areas) / len(areas) < 0.5  # half of it, less what lies over the edge


def test_the_generator_decides():
    assert torch.equal(mixed(3)[1], mixed(3)[1])
    assert not torch.equal(mixed(3)[1], mixed(4)[1])


def test_what_is_no_batch_of_images_stays():
    mask = torch.ones(4, 7, dtype=torch.bool)
    assert cutmix(mask, torch.Generator()) is mask

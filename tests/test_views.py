"""Views: seeded by slice, faithful to the paper where they claim to be."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import ColorJitter

from mtl_nnunet.errors import UserError
from mtl_nnunet.views import make_views, views_of_some


def images(channels: int = 1, n: int = 5) -> torch.Tensor:
    return torch.rand(n, channels, 32, 40, generator=torch.Generator().manual_seed(0)) * 7 - 3


@pytest.mark.parametrize("kind", ["scanner", "paper"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_same_seed_same_views_and_the_global_generators_are_left_alone(kind: str, channels: int) -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    a, b, c = (make_views(images(channels), kind, 2, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(2), expected)
    assert a.shape == (2, 5, channels, 32, 40)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(a[0], a[1])
    assert torch.isfinite(a).all()


def test_scanner_view_of_a_slice_does_not_depend_on_the_others() -> None:
    whole = make_views(images(), "scanner", 2, 0)
    changed = images()
    changed[[0, 1, 3, 4]] += 5
    assert torch.equal(make_views(changed, "scanner", 2, 0)[:, 2], whole[:, 2])
    assert torch.equal(make_views(images()[:3], "scanner", 2, 0), whole[:, :3])


def test_scanner_views_mean_the_same_whatever_the_intensity_scale() -> None:
    a = make_views(images(), "scanner", 1, 0)
    b = make_views(images() * 100 + 40, "scanner", 1, 0)
    assert torch.allclose((b - 40) / 100, a, atol=1e-3)


def test_paper_view_is_torchvisions_jitter_of_the_whole_batch_on_unit_range() -> None:
    batch = images(3)
    low, high = batch.amin((1, 2, 3), keepdim=True), batch.amax((1, 2, 3), keepdim=True)
    unit = (batch - low) / (high - low)
    views = (make_views(batch, "paper", 4, 0) - low) / (high - low)
    # the factors are random, so each view is compared with the jitter that has its factors: one for all slices
    jitter = ColorJitter(brightness=0.1, contrast=0.05, saturation=0.1, hue=0.05)
    for view in range(4):
        from mtl_nnunet.views import _derived_seed

        torch.manual_seed(_derived_seed(0, view))
        assert torch.allclose(views[view], jitter(unit), atol=1e-5)


def test_paper_view_of_grey_slices_is_one_gain_and_one_contrast_for_all() -> None:
    batch = torch.stack([torch.linspace(0.2, 0.6, 64).reshape(1, 8, 8) * s for s in (1.0, 0.5, 0.8)])
    batch[:, :, 0, 0], batch[:, :, 0, 1] = 0.0, 1.0
    (view,) = make_views(batch, "paper", 1, 0)
    slopes = [(v[0, 5, 5] - v[0, 3, 3]) / (b[0, 5, 5] - b[0, 3, 3]) for v, b in zip(view, batch, strict=True)]
    assert slopes[0] == pytest.approx(slopes[1].item(), rel=1e-4) == pytest.approx(slopes[2].item(), rel=1e-4)


def test_unknown_views_are_refused() -> None:
    with pytest.raises(UserError, match="paper, plain, scanner"):
        make_views(images(), "artistic", 2, 0)


@pytest.mark.parametrize("kind", ["plain", "paper", "scanner"])
def test_views_of_some_slices_are_those_of_all(kind: str) -> None:
    whole_dataset = images(3, n=7)
    whole = make_views(whole_dataset, kind, 2, seed=4, strength=0.7)
    some = views_of_some(whole_dataset, [5, 0, 3], kind, 2, seed=4, strength=0.7)
    assert torch.equal(some, whole[:, [5, 0, 3]])

"""Dictionary transforms: volumes in nnU-Net's order and normalisation, slices and views of them, segmentations as files."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import (
    InvertibleTransform,
    MapTransform,
    MultiSampleTrait,
    Randomizable,
    RandomizableTransform,
    Resize,
)
from monai.utils import convert_to_dst_type, convert_to_numpy, convert_to_tensor
from torch import Tensor

from mtl_nnunet.components.data import case_name, refuse_to_replace
from mtl_nnunet.components.plan import plane_last
from mtl_nnunet.errors import UserError, listed
from mtl_nnunet.files import written_atomically
from mtl_nnunet.slices import evenly, not_empty
from mtl_nnunet.views import VIEWS

Data = Mapping[Hashable, Any]

# ours and MONAI's names, and what torch calls them
MODES = {
    "linear": "trilinear",
    "bilinear": "trilinear",
    "trilinear": "trilinear",
    "nearest": "nearest-exact",
    "nearest-exact": "nearest-exact",
}
# of what nnU-Net's scheme for CT makes use
CT_INTENSITIES = ("mean", "std", "percentile_00_5", "percentile_99_5")
# how far a voxel of a label may lie from that of its image, in voxels: the nearest one is still the same
LARGEST_SHIFT = 0.5


class SliceAxisFirst(InvertibleTransform):
    """A NIfTI volume (C, X, Y, Z) in nnU-Net's order: the slicing axis first, then the plane; the affine follows.

    Args:
        axis: Slicing axis of the volume as nnU-Net reads it, (z, y, x).

    Raises:
        UserError: No such axis, or an image that is no volume.
    """

    def __init__(self, axis: int = 0):
        if axis not in (0, 1, 2):
            raise UserError(f"axis is {axis}; expected 0, 1 or 2, of (z, y, x).")
        self.order = plane_last(axis)

    def __call__(self, img: Tensor) -> Tensor:
        """(C, X, Y, Z) to (C, slices, rows, columns)."""
        volume = convert_to_tensor(img, track_meta=True)
        if volume.ndim != 4:
            raise UserError(
                f"{source_of(volume)} has {volume.ndim - 1} axes, and volumes of three are read. Write 2D images as volumes of one slice."
            )
        permuted = _permuted(volume, self.order)
        self.push_transform(permuted, orig_size=volume.shape[1:])
        return permuted

    def inverse(self, data: Tensor) -> Tensor:
        """(C, slices, rows, columns) to (C, X, Y, Z)."""
        self.pop_transform(data)
        return _permuted(data, tuple(int(i) for i in np.argsort(self.order)))


class SliceAxisFirstd(MapTransform, InvertibleTransform):
    """Dictionary version of ``SliceAxisFirst``."""

    def __init__(self, keys: KeysCollection, axis: int = 0, allow_missing_keys: bool = False):
        super().__init__(keys, allow_missing_keys)
        self.transform = SliceAxisFirst(axis)

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Of each key."""
        return {**data, **{key: self.transform(data[key]) for key in self.key_iterator(dict(data))}}

    def inverse(self, data: Data) -> dict[Hashable, Any]:
        """Of each key."""
        return {**data, **{key: self.transform.inverse(data[key]) for key in self.key_iterator(dict(data))}}


class SpacingAsNnunet(InvertibleTransform):
    """A volume resampled to a spacing as nnU-Net does it: its extent stays, and only voxel sizes count, not rotation or shear.

    Args:
        spacing: Voxel size in mm for each axis; -1 leaves an axis as it is.
        mode: ``linear``, or ``nearest`` for labels; MONAI's ``bilinear`` and ``trilinear`` are the former.

    Raises:
        UserError: Another mode, or not one spacing for each axis.
    """

    def __init__(self, spacing: Sequence[float], mode: str = "linear"):
        self.spacing = tuple(float(s) for s in spacing)
        if len(self.spacing) != 3:
            raise UserError(f"spacing is {list(spacing)}; expected a number for each of three axes.")
        if mode not in MODES:
            raise UserError(f"unknown mode '{mode}'. Available: {listed(list(MODES), len(MODES))}.")
        self.mode = MODES[mode]

    def __call__(self, img: Tensor) -> Tensor:
        """(C, D, H, W) to the same extent in other voxels."""
        volume = convert_to_tensor(img, track_meta=True)
        sizes = affine_to_spacing(volume.affine)
        scales = [1.0 if new <= 0 else float(old) / new for old, new in zip(sizes, self.spacing, strict=True)]
        shape = [max(1, round(n * scale)) for n, scale in zip(volume.shape[1:], scales, strict=True)]
        affine = volume.affine.clone()
        resampled = self._resized(volume, shape, self.mode)
        self.push_transform(resampled, orig_size=volume.shape[1:], extra_info={"mode": self.mode, "affine": affine})
        return resampled

    def inverse(self, data: Tensor) -> Tensor:
        """Back to the voxels before."""
        applied = self.pop_transform(data)
        # MONAI writes "nearest" where a caller wants classes back
        mode = "nearest-exact" if "nearest" in applied["extra_info"]["mode"] else "trilinear"
        back: Any = self._resized(data, applied["orig_size"], mode)
        back.affine = applied["extra_info"]["affine"]
        volume: Tensor = back
        return volume

    def _resized(self, volume: Tensor, shape: Sequence[int], mode: str) -> Tensor:
        if tuple(volume.shape[1:]) == tuple(shape):
            return volume.clone()
        resize = Resize(tuple(int(n) for n in shape), mode=mode, dtype=torch.float32)
        with resize.trace_transform(False):
            resized: Tensor = resize(volume)
        return resized


class SpacingAsNnunetd(MapTransform, InvertibleTransform):
    """Dictionary version of ``SpacingAsNnunet``; ``mode`` may be one for each key."""

    def __init__(
        self,
        keys: KeysCollection,
        spacing: Sequence[float],
        mode: str | Sequence[str] = "linear",
        allow_missing_keys: bool = False,
    ):
        super().__init__(keys, allow_missing_keys)
        modes = [mode] * len(self.keys) if isinstance(mode, str) else list(mode)
        self.transforms = {key: SpacingAsNnunet(spacing, m) for key, m in zip(self.keys, modes, strict=True)}

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Of each key."""
        return {**data, **{key: self.transforms[key](data[key]) for key in self.key_iterator(dict(data))}}

    def inverse(self, data: Data) -> dict[Hashable, Any]:
        """Of each key."""
        return {**data, **{key: self.transforms[key].inverse(data[key]) for key in self.key_iterator(dict(data))}}


class CheckLabeld(MapTransform):
    """Refuse a label that does not lie on its image's voxels, or holds classes that the dataset does not name.

    Args:
        keys: Labels (1, X, Y, Z), as they were read.
        num_classes: Background included.
        image_key: Images (C, X, Y, Z), as they were read.
        allow_missing_keys: As MONAI's.

    Raises:
        UserError: Which file, and how it differs.
    """

    def __init__(
        self, keys: KeysCollection, num_classes: int, image_key: str = "image", allow_missing_keys: bool = False
    ):
        super().__init__(keys, allow_missing_keys)
        self.num_classes = num_classes
        self.image_key = image_key

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """The data as they are."""
        image = data[self.image_key]
        for key in self.key_iterator(dict(data)):
            self._check(image, data[key])
        return dict(data)

    def _check(self, image: Tensor, label: Tensor) -> None:
        where = f"label {source_of(label)}"
        if len(label) != 1 or label.shape[1:] != image.shape[1:]:
            raise UserError(
                f"{where} has {len(label)} channels of shape {tuple(label.shape[1:])}, its image {source_of(image)} the shape "
                f"{tuple(image.shape[1:])}. Resample the label onto the image, or leave the case out."
            )
        if isinstance(image, MetaTensor) and isinstance(label, MetaTensor):
            shift = _shift(np.asarray(image.affine), np.asarray(label.affine), image.shape[1:])
            if not shift <= LARGEST_SHIFT:
                raise UserError(
                    f"{where} lies elsewhere than its image {source_of(image)}: by their affines, voxels are up to {shift:.3g} voxels "
                    "apart. Resample the label onto the image, or repair its header."
                )
        classes = np.unique(convert_to_numpy(label))
        odd = [f"{c:g}" for c in classes if not (0 <= c < self.num_classes and c == round(c))]
        if odd:
            raise UserError(
                f"{where} holds {listed(odd)}; expected whole numbers from 0 to {self.num_classes - 1}, as dataset.json names them. "
                "Repair the label, or name the classes."
            )


class NormalizeAsNnunetd(MapTransform):
    """Normalise channels with nnU-Net's own scheme for their names, as slices are for scoring.

    Args:
        keys: Images (C, ...), cropped to their nonzero region.
        channel_names: As in nnU-Net's dataset.json; ``CT`` is special.
        use_mask_for_norm: Inside the nonzero region only.
        intensities: nnU-Net's foreground intensity properties of each channel; needed for CT.
        allow_missing_keys: As MONAI's.

    Raises:
        UserError: CT without intensities, another number of channels, or a channel that is constant or not finite.
    """

    def __init__(
        self,
        keys: KeysCollection,
        channel_names: Sequence[str],
        use_mask_for_norm: bool = False,
        intensities: Mapping[str, Mapping[str, float]] | None = None,
        allow_missing_keys: bool = False,
    ):
        super().__init__(keys, allow_missing_keys)
        self.channel_names = tuple(channel_names)
        self.use_mask_for_norm = use_mask_for_norm
        self.intensities = {k: dict(v) for k, v in (intensities or {}).items()}
        for channel, name in enumerate(self.channel_names):
            # the names that are CT to nnU-Net
            lacking = [k for k in CT_INTENSITIES if k not in self.intensities.get(str(channel), {})]
            if name.casefold() == "ct" and lacking:
                raise UserError(
                    f"channel {channel} is CT, and its intensities lack {listed(lacking)}. Pass intensities: '{channel}': "
                    "the foreground_intensity_properties_per_channel of nnU-Net's fingerprint, or take them from plan_training."
                )

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Of each key."""
        return {**data, **{key: self._normalized(data[key]) for key in self.key_iterator(dict(data))}}

    def _normalized(self, image: Tensor) -> Tensor:
        from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask
        from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

        voxels = convert_to_numpy(image).astype(np.float32)
        if len(voxels) != len(self.channel_names):
            raise UserError(
                f"{source_of(image)} has {len(voxels)} channels, and {len(self.channel_names)} are expected "
                f"({listed(list(self.channel_names))}). Give each channel."
            )
        for channel, values in enumerate(voxels):
            if not np.isfinite(values).all() or values.min() == values.max():
                state = "is constant" if np.isfinite(values).all() else "holds NaN or infinite voxels"
                raise UserError(
                    f"{source_of(image)}: channel {channel} {state}. Repair the image, or leave the case out."
                )
        # outside the nonzero region nnU-Net marks -1
        mask = np.where(create_nonzero_mask(voxels), 0, -1)
        for channel, name in enumerate(self.channel_names):
            scheme = get_normalization_scheme(name)
            honours_mask = scheme.leaves_pixels_outside_mask_at_zero_if_use_mask_for_norm_is_true
            normalizer = scheme(bool(self.use_mask_for_norm and honours_mask), self.intensities.get(str(channel), {}))
            voxels[channel] = normalizer.run(voxels[channel], mask)
        normalized: Tensor = convert_to_dst_type(voxels, image, dtype=torch.float32)[0]
        return normalized


class SlicesOfCased(MapTransform, MultiSampleTrait):
    """A volume as some of its slices, spread evenly, those that hold nothing left out: a list of dictionaries.

    Args:
        keys: Volumes (C, slices, rows, columns) of one shape; the first decides which slices are empty.
        num_slices: How many at most.
        seed: Decides which.
        allow_missing_keys: As MONAI's.

    Raises:
        UserError: Every slice is constant.
    """

    def __init__(self, keys: KeysCollection, num_slices: int = 8, seed: int = 0, allow_missing_keys: bool = False):
        super().__init__(keys, allow_missing_keys)
        self.num_slices = num_slices
        self.seed = seed

    def __call__(self, data: Data) -> list[dict[Hashable, Any]]:
        """One dictionary a slice, with (C, rows, columns) under each key and its place under ``slice``."""
        keys = list(self.key_iterator(dict(data)))
        first = data[keys[0]]
        name = case_name(source_of(first))
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        taken = evenly(not_empty(convert_to_numpy(first), name), self.num_slices, rng)
        return [{**data, **{key: data[key][:, place] for key in keys}, "slice": place} for place in taken]


class RandView(RandomizableTransform):
    """A random view of a slice, as scores compare them: ``scanner``, ``paper`` or ``plain``.

    Args:
        kind: See ``mtl_nnunet.views``.
        strength: 0 to 2; 1 as documented there.
        prob: How often.

    Raises:
        UserError: Unknown kind, or a strength beyond 0 to 2.
    """

    def __init__(self, kind: str = "scanner", strength: float = 1.0, prob: float = 1.0):
        RandomizableTransform.__init__(self, prob)
        if kind not in VIEWS:
            raise UserError(f"unknown views '{kind}'. Available: {listed(sorted(VIEWS))}.")
        if not 0 <= strength <= 2:
            raise UserError(f"views of strength {strength:g} are not known: expected 0 to 2.")
        self.kind = kind
        self.strength = strength
        self.view_seed = 0

    def randomize(self, data: Any = None) -> None:
        """Draw the seed of the view."""
        super().randomize(None)
        self.view_seed = int(self.R.randint(2**31))

    def __call__(self, img: Tensor, randomize: bool = True) -> Tensor:
        """(C, H, W) to the same shape."""
        if randomize:
            self.randomize()
        if not self._do_transform:
            return img
        plain = torch.as_tensor(convert_to_numpy(img), dtype=torch.float32)
        view = VIEWS[self.kind](plain[None], self.view_seed, 0, self.strength)[0]
        seen: Tensor = convert_to_dst_type(view, img, dtype=torch.float32)[0]
        return seen


class RandViewd(MapTransform, Randomizable):
    """Dictionary version of ``RandView``: each key a view of its own."""

    def __init__(
        self,
        keys: KeysCollection,
        kind: str = "scanner",
        strength: float = 1.0,
        prob: float = 1.0,
        allow_missing_keys: bool = False,
    ):
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.view = RandView(kind, strength, prob)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandViewd:
        """Same seed, same views."""
        super().set_random_state(seed, state)
        self.view.set_random_state(seed, state)
        return self

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Of each key."""
        return {**data, **{key: self.view(data[key]) for key in self.key_iterator(dict(data))}}


class SaveSegmentationd(MapTransform):
    """Write class maps as NIfTI with shape, affine and header of the image they are of, under the case's name.

    MONAI's ``SaveImaged`` drops the last axis of a volume of one slice, which is how 2D images are stored.

    Args:
        keys: Class maps (1, X, Y, Z) in the geometry of the file they were read from.
        output_dir: Where to; made.
        allow_missing_keys: As MONAI's.

    The name is what ``images_in`` gives under ``case``; without it, that of the image file.

    Raises:
        UserError: A class map of another shape than its image, one that does not say which image it is of, or one that would
            replace that image.
    """

    def __init__(self, keys: KeysCollection, output_dir: str | Path, allow_missing_keys: bool = False):
        super().__init__(keys, allow_missing_keys)
        self.output_dir = Path(output_dir)

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Write; the data stay as they are."""
        import nibabel

        for key in self.key_iterator(dict(data)):
            file = source_of(data[key])
            if not Path(file).is_file():
                raise UserError(
                    f"'{key}' does not say which image file it is of, whose geometry it takes ({file} is no file). Pass a MetaTensor "
                    "with the meta data of an image that LoadImaged read."
                )
            target = self.output_dir / f"{data.get('case') or case_name(file)}.nii.gz"
            refuse_to_replace([target], [Path(file)])
            source = nibabel.load(file)
            classes = convert_to_numpy(data[key])[0].astype(np.uint8 if data[key].max() < 256 else np.uint16)
            if classes.shape != source.shape[:3]:
                raise UserError(
                    f"{source_of(data[key])} has shape {source.shape[:3]}, its segmentation {classes.shape}."
                )
            header = source.header.copy()
            header.set_data_dtype(classes.dtype)
            header.set_slope_inter(1, 0)
            with written_atomically(target) as temporary:
                # nibabel goes by the file's ending
                whole = temporary.with_name(f"{temporary.name}.nii.gz")
                nibabel.save(type(source)(classes, source.affine, header), whole)
                whole.replace(temporary)
        return dict(data)


def nonzero(image: Tensor) -> Tensor:
    """Where an image is not zero, as nnU-Net crops to it.

    Raises:
        UserError: It is zero everywhere.
    """
    mask = image != 0
    if not mask.any():
        raise UserError(f"{source_of(image)} is zero everywhere. Repair the image, or leave the case out.")
    return mask


def source_of(image: Any) -> str:
    """File that an image was read from, for messages and names."""
    source = image.meta.get("filename_or_obj", "") if isinstance(image, MetaTensor) else ""
    return str(source[0] if isinstance(source, (list, tuple)) and source else source) or "an image"


def _shift(image: np.ndarray, label: np.ndarray, shape: Sequence[int]) -> float:
    """How far corners of the label lie from those of the image, in the image's voxels at most."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], [1], indexing="ij")).reshape(len(shape) + 1, -1)
    try:
        apart = np.linalg.solve(image, label @ corners) - corners
    except np.linalg.LinAlgError:
        return float("inf")
    return float(np.abs(apart).max())


def _permuted(volume: Tensor, order: Sequence[int]) -> Tensor:
    permuted = volume.permute(0, *(i + 1 for i in order))
    if isinstance(volume, MetaTensor) and isinstance(permuted, MetaTensor):
        axes = torch.zeros_like(volume.affine)
        axes[3, 3] = 1
        for new, old in enumerate(order):
            axes[old, new] = 1
        permuted.affine = volume.affine @ axes
    return permuted

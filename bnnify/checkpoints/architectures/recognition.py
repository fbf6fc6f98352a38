"""Recognise the model that a state_dict comes from, by its names and shapes."""

__all__ = ["Recognition", "recognise"]

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

from ...errors import CheckpointError
from .builders import likely_builders
from .known_shapes import Kernels, kernels_of, shapes_of_recipe, shapes_unless_far
from .nearest import describe_nearest
from .recipe import Recipe
from .shapes import COUNT, Difference, Shapes, printable, shapes_of

_MAX_PREFIXES = 4


@dataclass(frozen=True)
class Recognition:
    """The builder that a state_dict comes from.

    Attributes:
        recipe: How to make its model again.
        same: The library's other builders whose models have the same names and shapes. They may differ in what no
            state_dict shows: an activation, a stride, the size of the images. A file of timm's that also fits a builder
            of torchvision is taken for that (``resnetblur50`` for ``resnet50``).
        notes: What else the user should know that no state_dict shows.
        prefix: What all names begin with and the model's do not, such as ``backbone.``.
    """

    recipe: Recipe
    same: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    prefix: str = ""


def recognise(state_dict: Mapping[str, Any]) -> Recognition:
    """Find the builder of torchvision, or else of timm, whose model has the names and shapes of ``state_dict``.

    The number of classes, the input channels, the size of the images and auxiliary heads are read from the tensors. A
    missing ``num_batches_tracked`` is no difference. timm is asked where it is installed, after torchvision.

    Args:
        state_dict: Tensors under the names that the model has for them, or under a prefix that they share.

    Raises:
        CheckpointError: No builder makes such a model. The message names the nearest one and what differs.
    """
    given = shapes_of(state_dict)
    if not given:
        raise CheckpointError("No model can be recognised: the file holds no tensors under names.")
    libraries = [library for library in ("torchvision", "timm") if find_spec(library)]
    prefix, readings = "", list(_without_shared_prefixes(given))
    for reading in readings:
        prefix = next(iter(given)).removesuffix(next(iter(reading)))
        if (found := _match(reading, libraries)) is not None:
            return replace(found, prefix=prefix)
    asked = " and ".join(libraries) if libraries else "no library, as neither torchvision nor timm is installed"
    without = f", with {printable(prefix)} or without" if prefix else ""
    nearest = describe_nearest(readings, libraries)
    raise CheckpointError(
        f"The model was not recognised{without} (asked: {asked}). {nearest} Say what makes the model: "
        "--model package.module:factory, and --model-args for its arguments."
    )


def _without_shared_prefixes(given: Shapes) -> Iterator[Shapes]:
    """Yield ``given``, and the same without the attributes with which all names begin, one more at a time."""
    for _ in range(_MAX_PREFIXES):
        yield given
        starts = {name.partition(".")[0] for name in given}
        if len(starts) > 1 or not all("." in name for name in given):
            return
        given = {name.partition(".")[2]: shape for name, shape in given.items()}


def _match(given: Shapes, libraries: list[str]) -> Recognition | None:
    """Find the builder of the first library that has one for ``given``."""
    kernels = kernels_of(given)
    for library in libraries:
        recipes = (Recipe(library, builder) for builder in likely_builders(library, given))
        if found := [fitting for recipe in recipes if (fitting := _fitted(recipe, given, kernels))]:
            first, *others = sorted(found, key=lambda recipe: (_adaptations(recipe), len(recipe.builder)))
            same = [recipe.builder for recipe in others if _adaptations(recipe) == _adaptations(first)]
            return Recognition(first, tuple(same), _notes(first, given))
    return None


def _notes(recipe: Recipe, given: Shapes) -> tuple[str, ...]:
    """Note where torchvision makes its pretrained models otherwise than models without weights."""
    if recipe.library == "torchvision" and recipe.builder in ("googlenet", "inception_v3"):
        return ("transform_input is False here; torchvision's pretrained weights go with transform_input=True.",)
    own = shapes_of_recipe(recipe) or ()
    counts = {name for name in own if name.startswith("backbone.body.") and name.endswith(COUNT)}
    if counts - given.keys():
        return (
            "The backbone's BatchNorm was frozen, as in torchvision's pretrained models; here it is not, and its eps "
            "is 1e-5, where torchvision's first COCO weights go with 0.",
        )
    return ()


def _adaptations(recipe: Recipe) -> int:
    """Count what a recipe changes. Of several, the one with the least is taken, and then the shortest name."""
    return len(recipe.arguments) + (recipe.in_channels is not None)


def _fitted(recipe: Recipe, given: Shapes, kernels: Kernels) -> Recipe | None:
    """Return the recipe with the arguments that make the model of ``given``, or None if there are none."""
    shapes = shapes_unless_far(recipe, kernels)
    for adapt in _ADAPTATIONS:
        if shapes is None or not (difference := Difference.between(shapes, given)):
            break
        few = 3 * len(difference.reshaped) <= len(difference.model)
        if adapt is not _with_other_parts and (difference.missing or difference.unexpected or not few):
            return None
        if (adapted := adapt(recipe, difference)) is not None:
            recipe, shapes = adapted, shapes_of_recipe(adapted)
    return None if shapes is None or Difference.between(shapes, given) else recipe


# Each of the following takes a recipe and how its model differs from the file, and returns a better recipe or None.


def _with_other_parts(recipe: Recipe, difference: Difference) -> Recipe | None:
    """Leave auxiliary heads away or add them; in timm, leave away the head."""
    missing, unexpected = difference.missing, difference.unexpected
    if recipe.library == "timm":
        return _with(recipe, num_classes=0) if missing and not unexpected else None
    if any(not name.lower().startswith("aux") for name in missing + unexpected):
        return None
    if missing:
        return _with(recipe, aux_logits=False)
    return _with(recipe, aux_loss=True) if unexpected else None


def _with_other_input(recipe: Recipe, difference: Difference) -> Recipe | None:
    """Make the first convolution for other than three channels."""
    for name in difference.reshaped:
        own, file = difference.model[name], difference.file[name]
        if len(own) == len(file) > 2 and own[1] == 3 and (own[0], *own[2:]) == (file[0], *file[2:]):
            return _with(recipe, **{"in_chans" if recipe.library == "timm" else "in_channels": file[1]})
    return None


def _with_other_image(recipe: Recipe, difference: Difference) -> Recipe | None:
    """Make a vision transformer for images of another size: one position for each patch, and some for its tokens."""
    argument = "img_size" if recipe.library == "timm" else "image_size"
    patch = next((shape[-1] for shape in difference.model.values() if len(shape) == 4), 1)
    for name in difference.reshaped:
        trial = shapes_of_recipe(_with(recipe, **{argument: 5 * patch})) if "pos_embed" in name else None
        sizes = zip(difference.model[name], (trial or {}).get(name, ()), difference.file[name], strict=False)
        for own, tried, file in sizes:
            patches = file - (tried - 25)
            if own != tried and patches > 0:
                return _with(recipe, **{argument: math.isqrt(patches) * patch})
    return None


def _with_other_count(argument: str, recipe: Recipe, difference: Difference) -> Recipe | None:
    """Make a head for another number of classes or keypoints: its sizes are multiples of it."""
    trial = shapes_of_recipe(_with(recipe, **{argument: 7})) or {}
    for name in difference.reshaped:
        sizes = zip(difference.model[name], trial.get(name, ()), difference.file[name], strict=False)
        for own, tried, file in sizes:
            if own != tried > 0 and file * 7 % tried == 0:
                return _with(recipe, **{argument: file * 7 // tried})
    return None


_ADAPTATIONS = (
    _with_other_parts,
    partial(_with_other_count, "num_classes"),
    partial(_with_other_count, "num_keypoints"),
    _with_other_input,
    _with_other_image,
)


def _with(recipe: Recipe, **arguments: int) -> Recipe | None:
    """Return the recipe with other arguments, or None where they are beyond what a recipe may ask for."""
    channels = arguments.pop("in_channels", recipe.in_channels)
    try:
        return replace(recipe, arguments={**recipe.arguments, **arguments}, in_channels=channels)
    except CheckpointError:
        return None

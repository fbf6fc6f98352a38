"""Describe the builder that comes nearest to a file that none fits."""

__all__ = ["describe_nearest"]

from collections.abc import Sequence

from .builders import families
from .known_shapes import shapes_of_recipe
from .recipe import Recipe
from .shapes import Difference, Shapes, abridged, printable

# Of so many families one model is made, and of the likeliest one so many, to find the nearest builder.
_MAX_FAMILIES, _MAX_CANDIDATES = 5, 6
# Similarities of a file's names to those of a model: from which it is called near, from which on its relatives are
# looked at, and from which on no further library is asked.
_NEAR, _WORTH_A_LOOK, _ENOUGH = 0.25, 0.1, 0.5


def describe_nearest(readings: Sequence[Shapes], libraries: Sequence[str]) -> str:
    """Describe in a sentence the builder whose model has most in common with one of the ``readings`` of a file's names.

    The readings are the names as they are, and without a prefix that they share.
    """
    name, best = max((_nearest(given, libraries) for given in readings), key=lambda found: found[1].similarity)
    if best.similarity < _NEAR:
        if best.shared:
            return f"None is near: {name} has {best.shared} of the file's {best.named} names."
        return f"None is near; the file's names are {abridged(map(printable, readings[0]))}."
    names = "" if 2 * best.fitting > best.shared else f", though {best.shared} of the file's {best.named} names are its"
    return f"Nearest is {name}: {best.fitting} of its {len(best.model)} tensors fit{names} ({best})."


def _nearest(given: Shapes, libraries: Sequence[str]) -> tuple[str, Difference]:
    """Find the builder that is nearest to ``given``, and how its model differs."""
    name, best = "", Difference.between({}, given)
    for library in libraries:
        if best.similarity > _ENOUGH:
            break
        likely = _likely_families(library, given)
        for members in likely:
            name, best = _nearer(name, best, Recipe(library, members[0]), given)
        relatives = next((members for members in likely if name == f"{library} {members[0]}"), ())
        for builder in relatives[:_MAX_CANDIDATES] if best.similarity > _WORTH_A_LOOK else ():
            name, best = _nearer(name, best, Recipe(library, builder), given)
    return name, best


def _nearer(name: str, best: Difference, recipe: Recipe, given: Shapes) -> tuple[str, Difference]:
    found = Difference.between(shapes_of_recipe(recipe) or {}, given)
    return (str(recipe), found) if found.agreement > best.agreement else (name, best)


def _likely_families(library: str, given: Shapes) -> list[tuple[str, ...]]:
    """List the families whose source has at least half of the attributes in ``given``'s names; the likeliest first."""
    attributes = {part for name in given for part in name.split(".")[:-1] if not part.isdigit()}
    ranked = sorted(
        (-len(attributes & words), len(words), members) for members, words in families(library, given).items()
    )
    return [members for rank, _, members in ranked if -2 * rank >= max(1, len(attributes))][:_MAX_FAMILIES]

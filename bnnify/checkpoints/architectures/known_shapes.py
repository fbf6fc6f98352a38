"""The names and shapes of the models that recipes make, found out once in a process."""

__all__ = ["Kernels", "kernels_of", "shapes_of_recipe", "shapes_unless_far"]

from collections import Counter

from ...errors import CheckpointError
from .recipe import Recipe
from .shapes import Shapes

Kernels = Counter[tuple[int, ...]]

# Making all of timm's models takes minutes, even without weights. So a builder is given up once it has made more
# matrices and kernels that the file does not have than a new head, a new input and parts thrown away account for; and
# at once if the first kernel, to which none of this happens, is one of them.
_MAX_UNMATCHED = 12

# By recipe: the shapes of its model (None: the builder refuses), and the first matrices and kernels of a model whose
# builder was given up.
_known: dict[str, Shapes | None] = {}
_partial_shapes: dict[str, list[tuple[int, ...]]] = {}


def kernels_of(shapes: Shapes) -> Kernels:
    """Count how often each shape occurs, without the input channels of kernels."""
    return Counter(map(_kernel, shapes.values()))


def shapes_of_recipe(recipe: Recipe | None) -> Shapes | None:
    """Return the shapes of the recipe's model, or None where the builder refuses."""
    if recipe is not None and str(recipe) not in _known:
        try:
            _known[str(recipe)] = recipe.shapes()
        except CheckpointError:
            _known[str(recipe)] = None
    return None if recipe is None else _known[str(recipe)]


def shapes_unless_far(recipe: Recipe, kernels: Kernels) -> Shapes | None:
    """Return the shapes of the recipe's model, or None where it is far from a file with these kernels."""
    name = str(recipe)
    if name not in _known:
        remembered, unmatched = _UnmatchedKernels(kernels), _UnmatchedKernels(kernels)
        try:
            for shape in _partial_shapes.get(name, ()):
                remembered.add(shape)
            _known[name] = recipe.shapes(unmatched.add)
        except CheckpointError:
            _partial_shapes[name] = max(_partial_shapes.get(name, []), unmatched.made, key=len)
            return None
    return _known[name]


class _UnmatchedKernels:
    """Counts the matrices and kernels that a builder makes and the file does not have."""

    def __init__(self, kernels: Kernels) -> None:
        self.left = kernels.copy()
        self.made: list[tuple[int, ...]] = []
        self.count = 0

    def add(self, shape: tuple[int, ...]) -> None:
        self.made.append(shape)
        kernel = _kernel(shape)
        self.left[kernel] -= 1
        self.count += self.left[kernel] < 0
        is_first_kernel = len(self.made) == 1 and len(shape) > 2
        if self.count > (0 if is_first_kernel else _MAX_UNMATCHED):
            raise CheckpointError("The builder is given up.")


def _kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without the input channels of a kernel, which a file may have adapted."""
    return shape if len(shape) < 3 else (shape[0], *shape[2:])

"""The order of the tutorials in the gallery and in the sidebar."""

ORDER = [
    "image_classifier",
    "regression",
    "segmentation",
    "language_model",
    "from_scratch",
    "how_many_samples",
    "decide",
    "deployment",
]


class ReadingOrder:
    """The key that sphinx-gallery sorts by; a script that is not listed comes first."""

    def __init__(self, folder: str) -> None:
        pass

    def __call__(self, name: str) -> int:
        name = name.removesuffix(".py")
        return ORDER.index(name) if name in ORDER else -1

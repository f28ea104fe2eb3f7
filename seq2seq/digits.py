"""Beyond text: scikit-learn's 1797 real handwritten digits of 8 x 8 pixels, as 16 patches for an encoder."""

from collections.abc import Iterable, Sequence

import numpy as np

from seq2seq.errors import UserError
from seq2seq.examples import Example
from seq2seq.splits import SPLITS, split_by_hash
from seq2seq.vocabulary import Symbols

PATCHES, FEATURES = 16, 4  # of 2 x 2 pixels


class Images:
    """Stands where other tasks have the vocabulary of their source; there is no text to read."""

    def __len__(self) -> int:
        return FEATURES

    def encode(self, text: str) -> tuple[int, ...]:
        """UserError: a text is no image."""
        raise UserError(f"the task digits classifies images, {text!r} is none; see how well by `isoformer evaluate`")

    def decode(self, ids: Iterable[int]) -> str:
        """Likewise."""
        raise UserError("the task digits classifies images, they have no text")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The number of each patch."""
        return [str(i) for i, _ in enumerate(ids)]


def splits(classes: Symbols) -> dict[str, list[Example]]:
    """Patches from left to right and from above, pixels from 0 to 1; the one target is the digit."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise UserError("the task digits needs scikit-learn; run: pip install 'isoformer[data]'") from None
    found: dict[str, list[Example]] = {split: [] for split in SPLITS}
    images, labels = load_digits(return_X_y=True)
    for image, label in zip(images.reshape(-1, 4, 2, 4, 2), labels, strict=True):
        patches = image.swapaxes(1, 2).reshape(PATCHES, FEATURES) / 16
        source = tuple(map(tuple, patches.tolist()))
        split = split_by_hash(image.astype(np.uint8).tobytes().hex())
        found[split].append(Example(source, (classes.encode(str(label)),)))
    return found


def logistic_regression(train: Sequence[Example], test: Sequence[Example]) -> float:
    """The accuracy of scikit-learn's, for comparison: on the same pixels and the same split."""
    from sklearn.linear_model import LogisticRegression

    pixels, classes = (
        lambda examples: np.array([np.ravel(e.source) for e in examples]),
        lambda examples: np.array([e.targets[0][0] for e in examples]),
    )
    model = LogisticRegression(max_iter=5000).fit(pixels(train), classes(train))
    return float(model.score(pixels(test), classes(test)))

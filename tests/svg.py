"""What an SVG shows."""

import base64
import io
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from matplotlib.image import imread


def seen(path: Path) -> tuple[list[str], list[np.ndarray]]:
    """Its texts, and its images as `[rows, columns, RGBA]` numbers from 0 to 1, as they are drawn."""
    root = ElementTree.parse(path)
    texts = ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]
    links = [
        image.get("href") or image.get("{http://www.w3.org/1999/xlink}href")
        for image in root.iter("{http://www.w3.org/2000/svg}image")
    ]
    return texts, [imread(io.BytesIO(base64.b64decode(str(link).partition(",")[2]))) for link in links]

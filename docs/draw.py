"""Draws the pictures of the pages `tour`, `encodings` and `index`: `make pictures`.

Drawings are put together from boxes and arrows. Heat-maps are drawn by `seq2seq.plots`, as the command line's are:
what core's masks and encodings say, and where a model looked that was trained here, for a minute, to reverse
sequences. Colours are of middle brightness and the ground is transparent, so that one picture serves a light page and
a dark one.
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.image import imsave

from core.attention import attention_weights
from core.losses import Batch
from core.masks import Causal, Grid, Mask, Padding, Prefix, Segments, Window
from core.positions import sinusoidal_table
from nnx_impl import Trainer, TransformerConfig, evaluation, init_transformer
from seq2seq.pictures import gallery
from seq2seq.plots import SIGNED, plot_absolute_encodings, plot_attention, plot_relative_encodings

IMAGES = Path(__file__).parent / "images"
BLUE, TEAL, PURPLE, RUST, GREY, INK = "#3a6ea8", "#2b7d72", "#7b559e", "#a9592a", "#6b7280", "#7d8590"


class Drawing:
    """An SVG that grows: boxes, arrows, labels and vectors, in pixels from the top left."""

    def __init__(self, width: int, height: int, title: str):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
            'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="14">',
            f"<title>{title}</title>",
            f'<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0,0 8,4 0,8z" fill="{INK}"/></marker></defs>',
        ]

    def box(self, x: float, y: float, width: float, height: float, text: str, colour: str, note: str = "") -> None:
        """A box of white text, with a smaller second line."""
        self.parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{colour}"/>')
        middle = y + height / 2 + (-4 if note else 5)
        self.text(x + width / 2, middle, text, colour="#ffffff", weight=600)
        if note:
            self.text(x + width / 2, middle + 18, note, colour="#ffffff", size=12)

    def frame(self, x: float, y: float, width: float, height: float, text: str, colour: str = INK) -> None:
        """A dashed frame with its name at the top left."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="none" stroke="{colour}" '
            'stroke-width="1.5" stroke-dasharray="5 4"/>'
        )
        self.text(x + 12, y + 21, text, anchor="start", colour=colour, weight=600)

    def arrow(self, *points: tuple[float, float], colour: str = INK) -> None:
        """A line through the points, with a head at the last."""
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8" marker-end="url(#head)"/>'
        )

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "middle", colour: str = INK, size: int = 14,
        weight: int = 400, mono: bool = False,
    ) -> None:  # fmt: skip
        """A line of text, its baseline at y."""
        family = ' font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace"' if mono else ""
        text = text.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}" font-size="{size}" '
            f'font-weight="{weight}"{family}>{text}</text>'
        )

    def vector(self, x: float, y: float, width: float, height: float, values: np.ndarray) -> None:
        """The `[D]` numbers from left to right, in the colours of the heat-maps."""
        farthest, file = np.abs(values).max(), io.BytesIO()
        imsave(file, values[None], cmap=SIGNED, vmin=-farthest, vmax=farthest, format="png")
        data = base64.b64encode(file.getvalue()).decode()
        self.parts.append(
            f'<image x="{x}" y="{y}" width="{width}" height="{height}" preserveAspectRatio="none" '
            f'style="image-rendering:pixelated" href="data:image/png;base64,{data}"/>'
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="none" stroke="{INK}"/>'
        )

    def save(self, name: str) -> None:
        """Written to docs/images."""
        (IMAGES / name).write_text("\n".join([*self.parts, "</svg>", ""]))


def two_trees() -> None:
    """One arithmetic, two trees, one program."""
    d = Drawing(720, 262, "Two module trees hold the parameters, one core does the arithmetic, one program comes out")
    d.box(20, 20, 300, 76, "nnx_impl · Flax NNX", BLUE, "nnx.Param, rngs=, changed in place")
    d.box(400, 20, 300, 76, "equinox_impl · Equinox", PURPLE, "frozen dataclasses, key=, changed as copies")
    d.arrow((170, 96), (290, 140))
    d.arrow((550, 96), (430, 140))
    d.text(160, 126, "calls", size=12)
    d.text(560, 126, "calls", size=12)
    d.box(210, 142, 300, 48, "core · pure functions of JAX", TEAL)
    d.arrow((360, 190), (360, 218))
    d.text(360, 242, "the same StableHLO text: forward, gradient, decode step", weight=600)
    d.save("tour/two_trees.svg")


def representation() -> None:
    """From text to vectors."""
    d = Drawing(720, 318, "Each token becomes a number, a row of a table, and gets its position added")
    names, numbers = ["the", "cat", "sat", "end"], [17, 4, 9, 2]
    labels = [
        (40, "tokens"),
        (100, "ids  [B, S]"),
        (172, "embedding  [B, S, D]"),
        (236, "+ position"),
        (298, "what the stack reads"),
    ]
    for y, label in labels:
        d.text(20, y, label, anchor="start", size=13, weight=600)
    rng = np.random.default_rng(3)
    table, positions = rng.standard_normal((4, 8)), np.asarray(sinusoidal_table(4, 8))
    for i, (name, number) in enumerate(zip(names, numbers, strict=True)):
        x = 210 + 128 * i
        d.box(x, 20, 108, 32, name, GREY)
        d.arrow((x + 54, 52), (x + 54, 80))
        d.text(x + 54, 100, str(number), mono=True, weight=600)
        d.arrow((x + 54, 108), (x + 54, 152))
        d.vector(x, 156, 108, 22, table[i])
        d.text(x + 54, 203, "+", weight=600)
        d.vector(x, 218, 108, 22, positions[i])
        d.text(x + 54, 264, "=", weight=600)
        d.vector(x, 282, 108, 22, (table + positions)[i])
    d.save("tour/representation.svg")


def _sublayers(d: Drawing, x: int, top: int, names: Sequence[tuple[str, str, str]]) -> list[int]:
    tops = [top + 74 * i for i in range(len(names))]
    for y, (name, colour, note) in zip(tops, names, strict=True):
        d.box(x, y, 230, 50, name, colour, note)
    for y in tops[1:]:
        d.arrow((x + 115, y), (x + 115, y - 24))
    return tops


def model() -> None:
    """The whole: encoder, decoder, and who reads whom."""
    d = Drawing(720, 470, "The encoder reads the source; the decoder reads the target so far, and the encoder's memory")
    d.frame(20, 150, 280, 188, "encoder block")
    d.text(288, 171, "6 times", anchor="end", size=12)
    _sublayers(
        d, 45, 186, [("feed-forward", TEAL, "each position alone"), ("self-attention", BLUE, "source reads source")]
    )
    d.frame(420, 76, 280, 262, "decoder block")
    d.text(688, 97, "6 times", anchor="end", size=12)
    _sublayers(
        d, 445, 112,
        [
            ("feed-forward", TEAL, "each position alone"),
            ("cross-attention", RUST, "target reads source"),
            ("self-attention", BLUE, "target reads its past"),
        ],
    )  # fmt: skip
    for x in (45, 445):
        d.box(x, 366, 230, 34, "embedding + position", GREY)
        d.arrow((x + 115, 366), (x + 115, 312))
        d.arrow((x + 115, 430), (x + 115, 402))
    d.text(160, 450, "source tokens  [B, S]", size=13)
    d.text(560, 450, "target tokens so far  [B, T]", size=13)
    d.arrow((275, 211), (443, 211), colour=RUST)
    d.text(360, 186, "memory", size=13, weight=600)
    d.text(360, 202, "[B, S, D]", size=12)
    d.text(360, 229, "keys, values", size=12)
    d.box(445, 20, 230, 34, "logits  [B, T, V]", GREY)
    d.arrow((560, 112), (560, 56))
    d.save("tour/model.svg")


def attention() -> None:
    """The formula, left to right."""
    d = Drawing(720, 300, "Queries meet keys, the softmax weighs the values")
    for y, name, shape, colour in (
        (26, "q_proj", "q [B,T,N,H]", BLUE),
        (116, "k_proj", "k [B,S,K,H]", RUST),
        (206, "v_proj", "v [B,S,K,H]", RUST),
    ):
        d.box(120, y, 96, 44, name, colour)
        d.text(168, y + 62, shape, size=12, mono=True, anchor="middle")
    d.text(14, 52, "x", anchor="start", weight=600)
    d.text(14, 72, "who asks", anchor="start", size=12)
    d.text(14, 186, "memory", anchor="start", weight=600)
    d.text(14, 204, "who is asked", anchor="start", size=12)
    d.arrow((34, 48), (118, 48))
    d.arrow((94, 181), (102, 181), (102, 138), (118, 138))
    d.arrow((94, 181), (102, 181), (102, 228), (118, 228))
    d.box(300, 62, 150, 56, "scale · q · k", TEAL, "logits [B,N,T,S]")
    d.arrow((216, 48), (262, 48), (262, 82), (298, 82))
    d.arrow((216, 138), (262, 138), (262, 100), (298, 100))
    d.text(375, 24, "+ bias, relative positions", size=12)
    d.arrow((375, 30), (375, 60))
    d.arrow((450, 90), (488, 90))
    d.box(490, 62, 150, 56, "softmax", TEAL, "where the mask allows")
    d.text(565, 24, "mask", size=12)
    d.arrow((565, 30), (565, 60))
    d.arrow((565, 118), (565, 198))
    d.text(574, 160, "weights [B,N,T,S]", anchor="start", size=12)
    d.box(490, 200, 150, 56, "weights · v", TEAL, "out [B,T,N,H]")
    d.arrow((216, 228), (488, 228))
    d.arrow((640, 228), (668, 228))
    d.text(692, 224, "merge,", size=12)
    d.text(692, 240, "o_proj", size=12)
    d.save("tour/attention.svg")


def masks() -> None:
    """Who may see whom, as core.masks says it."""
    real = jnp.arange(8)[None] < 6
    packed = jnp.array([[4, 4, 4, 9, 9, 9, 9, 9]])
    panels: dict[str, Mask] = {
        "the decoder's past\nCausal()": Causal(),
        "no padding\nPadding(real)": Padding(real),
        "both\nCausal() & Padding(real)": Causal() & Padding(real),
        "the last three\nCausal() & Window(2, 0)": Causal() & Window(2, 0),
        "a prefix sees itself\nCausal() | Prefix(3)": Causal() | Prefix(3),
        "two texts in one row\nCausal() & Segments(ids)": Causal() & Segments(packed),
    }
    grid = Grid((1, 1, 8, 8))
    cells = {name: np.broadcast_to(mask.cells(grid), grid.shape)[0] for name, mask in panels.items()}
    plot_attention(IMAGES / "tour/masks.svg", cells, "01234567", "01234567")


def dead_row() -> None:
    """The same logits under three masks."""
    q, k = jax.random.normal(jax.random.key(2), (2, 1, 6, 1, 8)) * 1.4
    none = jnp.ones((6, 6), bool).at[3].set(False)
    panels = {"no mask": None, "causal": Causal(), "row 3 may see nothing": none[None, None]}
    weights = {name: np.asarray(attention_weights(q, k, mask=mask))[0] for name, mask in panels.items()}
    plot_attention(IMAGES / "tour/weights.svg", weights, "012345", "012345")


def reverser(steps: int = 400) -> tuple[Any, jax.Array, jax.Array]:
    """A model of 1 + 1 layers that learns to reverse rows of eight digits, and one such row with its reverse."""
    config = TransformerConfig(
        source_vocab_size=13, target_vocab_size=13, d_model=32, num_heads=2, d_ff=64, num_encoder_layers=1,
        num_decoder_layers=1, dropout_rate=0.0, norm_order="pre",
    )  # fmt: skip
    trainer = Trainer(init_transformer(config, seed=0), optax.adam(3e-3))
    rng, accuracy = np.random.default_rng(0), 0.0
    for _ in range(steps):
        source = rng.integers(3, 13, (64, 8))
        real, start, end = np.ones((64, 9), bool), np.full((64, 1), 1), np.full((64, 1), 2)
        back = source[:, ::-1]
        batch = (source, real[:, :8], np.hstack([start, back]), np.hstack([back, end]), real)
        accuracy = trainer.train(Batch(*map(jnp.asarray, batch))).accuracy
    print(f"reverser: accuracy {accuracy:.4f} after {steps} steps")
    row = jnp.array([[7, 3, 12, 9, 5, 11, 4, 8]])
    return evaluation(trainer.model), row, jnp.hstack([jnp.array([[1]]), row[:, ::-1]])


def looked() -> None:
    """Where the reverser looked: a head of each kind of attention."""
    trained, source, target = reverser()
    _, weights = trained.run(source, target, return_weights=True)
    letters = [str(int(token) - 3) for token in source[0]]
    said = ["▸", *letters[::-1]]
    panels = {
        "encoder self-attention": ("encoder.blocks.0.attention", letters, letters),
        "decoder self-attention": ("decoder.blocks.0.attention", said, said),
        "cross-attention": ("decoder.blocks.0.cross_attention", said, letters),
    }
    shown = {}
    for label, (name, _, _) in panels.items():
        heads = np.asarray(weights[name])[0]
        sharpest = int(heads.max(-1).sum(-1).argmax())
        shown[label] = heads[sharpest : sharpest + 1]
    plot_attention(
        IMAGES / "tour/reverse.svg", shown, {label: queries for label, (_, queries, _) in panels.items()},
        {label: keys for label, (_, _, keys) in panels.items()},
    )  # fmt: skip


def encodings() -> None:
    """A picture of each encoding of positions."""
    absolute, relative = gallery(48)
    for name, table in absolute.items():
        plot_absolute_encodings(IMAGES / f"encodings/{name}.svg", {name: table})
    for name, logits in relative.items():
        plot_relative_encodings(IMAGES / f"encodings/{name}.svg", {name: logits})


DRAWINGS = (two_trees, representation, model, attention, masks, dead_row)

if __name__ == "__main__":
    for draw in (*DRAWINGS, encodings, looked):
        draw()

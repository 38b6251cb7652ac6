"""The shape of a student, and the shapes that a search tries, as written to disk."""

from __future__ import annotations

from ad2kit.run.records import Part


class Shape(Part):
    """Layers of the teacher, and the number of heads and feed-forward neurons of each layer."""

    layers: tuple[int, ...]
    attention_heads: int
    feed_forward: int

    def __str__(self) -> str:
        layers = f"{len(self.layers)} layer" + "s" * (len(self.layers) > 1)
        return f"{layers}, {self.attention_heads} heads, feed-forward {self.feed_forward}"


class Grid(Part):
    """Numbers of layers, heads and feed-forward neurons to combine; empty means the defaults."""

    layers: tuple[int, ...] = ()
    attention_heads: tuple[int, ...] = ()
    feed_forward: tuple[int, ...] = ()

"""SVG figures of a few kinds. Each has a ground of its own and follows the reader's light or dark scheme."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH = 760
STYLE = """<style>
svg{font-family:system-ui,'Noto Sans','Noto Sans CJK SC','PingFang SC','Microsoft YaHei',sans-serif;font-size:14px}
.ground{fill:#ffffff;stroke:#d0d7de}.ink{fill:#1f2328}.soft{fill:#57606a}.line{stroke:#8c959f}
.ours{fill:#0969da}.theirs{fill:#6e7781}.third{fill:#bf5700}.trace{stroke:#0969da}.head{font-weight:600}.on{fill:#ffffff}
@media (prefers-color-scheme:dark){.ground{fill:#0d1117;stroke:#3d444d}.ink{fill:#f0f6fc}.soft{fill:#9198a1}
.line{stroke:#656c76}.ours{fill:#4493f8}.theirs{fill:#8c959f}.third{fill:#db6d28}.trace{stroke:#4493f8}.on{fill:#0d1117}}
</style>"""


@dataclass
class Figure:
    """A figure that grows downwards.

    Attributes:
        title: what it shows, in a sentence; also what a screen reader says.
        source: where its numbers are from.
    """

    title: str
    source: str
    y: float = 58
    marks: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, style: str = "ink", anchor: str = "start") -> None:
        self.marks.append(f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}">{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, style: str) -> None:
        self.marks.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{height:g}" rx="2" class="{style}"/>'
        )

    def stroke(self, x1: float, y1: float, x2: float, y2: float, style: str = "line", width: float = 1) -> None:
        self.marks.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}" stroke-width="{width:g}"/>'
        )

    def path(self, points: Sequence[tuple[float, float]]) -> None:
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.marks.append(f'<polyline points="{text}" class="trace" fill="none" stroke-width="2"/>')

    def heading(self, words: str) -> None:
        self.y += 12
        self.text(24, self.y, words, "ink head")
        self.y += 12

    def bars(self, rows: Sequence[tuple[str, float, str, str]], top: float | None = None) -> None:
        """Bars from the left, one a row.

        Args:
            rows: label, value, the value as it is written, and the style.
            top: the value of a bar of full length; the largest if left out.
        """
        scale = (WIDTH - 390) / (top or max(value for _, value, _, _ in rows))
        for label, value, written, style in rows:
            self.text(290, self.y + 16, label, "ink", "end")
            self.box(300, self.y + 3, value * scale, 18, style)
            self.text(308 + value * scale, self.y + 17, written, "soft")
            self.y += 26

    def svg(self) -> str:
        height = self.y + 34
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
            f'aria-label="{escape(self.title)}">',
            STYLE,
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="8" class="ground"/>',
            f'<text x="24" y="34" class="ink head" font-size="16">{escape(self.title)}</text>',
            *self.marks,
            f'<text x="24" y="{height - 14:g}" class="soft" font-size="12">{escape(self.source)}</text>',
            "</svg>",
        ]
        return "\n".join(lines) + "\n"

"""What people see in the terminal: tables by rich, plain text where there is no terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from img2vid.certificate import Certificate, Comparison

LABELS = {"single": "one frame", "static": "static", "moving": "moving", "shuffled": "shuffled"}


def to_text(renderable: RenderableType, width: int = 100) -> str:
    """A rich renderable as plain text, without colours."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().rstrip()


def render_certificate(certificate: Certificate) -> str:
    return to_text(certificate_table(certificate))


def verdict(good: bool | None) -> Text:
    if good is None:
        return Text("not claimed", style="dim")
    return Text("held", style="green") if good else Text("FAILED", style="bold red")


def certificate_table(certificate: Certificate) -> Group:
    """The certificate as people read it."""
    title = f"Certificate: {certificate.backbone or 'given module'}, {certificate.attention}, {certificate.prefix_mode}"
    table = Table(title=title, title_justify="left", title_style="bold", expand=False)
    for header in ("clip", "T", "claim", "max |difference|\nclip feature", "any frame", "any layer", ""):
        table.add_column(header, justify="right" if header in ("T", "any frame", "any layer") else "left")
    for row in certificate.comparisons:
        table.add_row(*comparison_cells(row))
    lines = [f"Guarantee   {certificate.guarantee.summary}"]
    equal, total = certificate.image_weights_equal
    lines.append(f"Weights     {equal} of {total} image tensors are the image model's own")
    if certificate.text_difference is not None:
        lines.append(f"Text tower  max |difference| {certificate.text_difference:.3g}")
    if certificate.perturbed_difference is not None:
        moved = certificate.gates_moved > 0.0
        act_two = "as trained" if moved else "gates pushed off zero"
        lines.append(
            f"Three acts  closed = base; {act_two}: output moves by {certificate.perturbed_difference:.3g}; "
            f"closed again: {certificate.closed_difference:.3g}"
        )
    if certificate.liveness:
        lines.append(liveness_line(certificate))
    lines.append("Result      " + ("OK" if certificate.ok else "FAILED"))
    return Group(table, *lines)


def comparison_cells(row: Comparison) -> tuple:
    numbers = (row.feature_difference, row.frame_difference, max(row.layer_differences, default=0.0))
    return (LABELS[row.kind], str(row.num_frames), row.claimed or "-", *(f"{n:.3g}" for n in numbers), verdict(row.held))


def liveness_line(certificate: Certificate) -> str:
    layers = certificate.liveness
    alive = sum(layer.alive for layer in layers)
    gates = [layer.gate[0] for layer in layers if layer.gate is not None]
    attention = [layer.attention[1] for layer in layers]
    by_gate = f"gates at step 1: |grad| {min(gates):.2g} to {max(gates):.2g}; " if gates else "no gates; "
    text = (
        f"Liveness    {alive} of {len(layers)} layers learn: {by_gate}"
        f"attention at step 2: {min(attention):.2g} to {max(attention):.2g}"
    )
    return text if certificate.alive or certificate.expected_alive else text + " (expected: temporal_init=zeros)"

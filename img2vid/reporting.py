"""What people see in the terminal: tables by rich, plain text where there is no terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from img2vid.certificate import Certificate
    from img2vid.inspection import Inspection
    from img2vid.model import VideoModel
    from img2vid.proof.evidence import Comparison
    from img2vid.proof.liveness import Liveness
    from img2vid.tuning import LayerGroup
    from img2vid.two_towers import VideoTextModel

ORIGINS = {
    "pretrained": "under their own names",
    "copied": "temporal attention, from the image model's attention",
    "new": "gates and time_embed at zero, anything else without a source",
}
LABELS = {"single": "one frame", "static": "static", "moving": "moving", "shuffled": "shuffled"}


def to_text(renderable: RenderableType, width: int = 100) -> str:
    """A rich renderable as plain text, without colours."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def render_certificate(certificate: Certificate) -> str:
    return to_text(certificate_table(certificate))


def verdict(good: bool | None) -> Text:
    if good is None:
        return Text("not claimed", style="dim")
    return Text("held", style="green") if good else Text("FAILED", style="bold red")


def certificate_table(certificate: Certificate) -> Group:
    """The certificate as people read it."""
    title = f"Certificate: {certificate.backbone or 'given module'}, {certificate.attention}, {certificate.prefix_mode}"
    table = Table(title=Text(title), title_justify="left", title_style="bold", expand=False)
    for header in ("clip", "T", "claim", "max |difference|\nclip feature", "any frame", "any layer", ""):
        table.add_column(header, justify="right" if header in ("T", "any frame", "any layer") else "left")
    for row in certificate.comparisons:
        table.add_row(*comparison_cells(row))
    findings = Table.grid(padding=(0, 2))  # label, text: long texts wrap beside their label
    findings.add_row("Guarantee", certificate.guarantee.summary)
    findings.add_row("Weights", weights_text(certificate))
    if certificate.text_difference is not None:
        findings.add_row("Text tower", f"max |difference| {certificate.text_difference:.3g}")
    if certificate.perturbed_difference is not None:
        has_moved = "not at zero although just converted" if certificate.at_step_0 else "as trained"
        act_two = "what starts at zero pushed off it" if certificate.gates_moved == 0.0 else has_moved
        findings.add_row(
            "Three acts",
            f"closed = base; {act_two}: output moves by {certificate.perturbed_difference:.3g}; "
            f"closed again: {certificate.closed_difference:.3g}",
        )
    findings.add_row("Frames", exchange_text(certificate))
    if certificate.liveness:
        findings.add_row("Liveness", liveness_text(certificate))
    findings.add_row("Result", result(certificate))
    return Group(table, findings)


def result(certificate: Certificate) -> str:
    if not certificate.ok:
        return f"FAILED: {'; '.join(certificate.failures)}."
    return "OK" if certificate.alive else "OK, the function is kept, but this initialisation cannot learn"


def comparison_cells(row: Comparison) -> tuple:
    numbers = (row.feature_difference, row.frame_difference, max(row.layer_differences, default=0.0))
    return (
        LABELS[row.kind],
        str(row.num_frames),
        row.claimed or "-",
        *(f"{n:.3g}" for n in numbers),
        verdict(row.held),
    )


def weights_text(certificate: Certificate) -> str:
    equal, total = certificate.image_weights_equal
    since = {None: "", certificate.weights_now: "; unchanged since the conversion"}
    return f"{equal} of {total} image tensors are the image model's own" + since.get(
        certificate.weights_at_conversion, "; changed since the conversion, as by training"
    )


def exchange_text(certificate: Certificate) -> str:
    moved = f"a frame's feature moves by {certificate.exchange:.3g} when only the other frames change"
    if certificate.later is not None:
        moved = f"{moved}, by {certificate.later:.3g} when only later ones do (causal)"
    if not certificate.leak <= certificate.rounding:
        return f"{moved}, but by {certificate.leak:.3g} too when only other clips of the batch change"
    strays = [layer.layer for layer in certificate.liveness if layer.stray not in (None, 0.0)]
    if strays:
        return f"{moved}, but in {', '.join(strays)} tokens attend along other positions than their own"
    if not certificate.mixes_frames:
        return f"kept apart: {moved}"
    coupled = [layer.coupling for layer in certificate.liveness if layer.coupling is not None]
    return (
        moved
        + (f"; {sum(c > 0.0 for c in coupled)} of {len(coupled)} layers see them" if coupled else "")
        + (
            ", at each token's own position alone"
            if any(layer.stray is not None for layer in certificate.liveness)
            else ""
        )
    )


def liveness_text(certificate: Certificate) -> str:
    parts = []
    of_time = [x for x in certificate.liveness if x.graft is None and x.attention is not None]
    if of_time:
        parts.append(learning_text(of_time, "layers", "attention"))
    for name in dict.fromkeys(x.graft for x in certificate.liveness if x.graft is not None):
        parts.append(
            learning_text([x for x in certificate.liveness if x.graft == name], f"places of {name}", "the rest")
        )
    parts += [
        f"{layer.layer}: {layer.gate[0]:.2g}"
        for layer in certificate.liveness
        if layer.graft is None and layer.attention is None
    ]
    text = "; ".join(parts)
    return text if certificate.alive or certificate.expected_alive else text + " (expected: temporal_init=zeros)"


def learning_text(layers: list[Liveness], what: str, behind: str) -> str:
    """How many of some layers learn, and the range of gradient norms at the step at which each may first arrive."""
    gates = [layer.gate[layer.depth] for layer in layers if layer.gate is not None]
    rest = [layer.attention[layer.first_behind] for layer in layers if layer.attention is not None]
    steps = {"gate": {x.depth + 1 for x in layers}, "rest": {x.first_behind + 1 for x in layers if x.attention}}
    by_gate = (
        f"gates at step {span(steps['gate'])}: |grad| {min(gates):.2g} to {max(gates):.2g}" if gates else "no gates"
    )
    by_rest = f"; {behind} at step {span(steps['rest'])}: {min(rest):.2g} to {max(rest):.2g}" if rest else ""
    return f"{sum(layer.alive for layer in layers)} of {len(layers)} {what} learn: {by_gate}{by_rest}"


def span(steps: set[int]) -> str:
    return "/".join(map(str, sorted(steps)))


def parameter_table(model: VideoModel | VideoTextModel) -> Table:
    """Where the parameters come from."""
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        row = counts.setdefault(model.origin(name), [0, 0])
        row[0] += 1
        row[1] += parameter.numel()
    total = sum(parameters for _, parameters in counts.values())
    table = Table(title="Parameters", title_justify="left", title_style="bold")
    for header, justify in (("origin", "left"), ("tensors", "right"), ("parameters", "right"), ("share", "right")):
        table.add_column(header, justify=justify)
    for origin, meaning in ORIGINS.items():
        if origin in counts:
            tensors, parameters = counts[origin]
            table.add_row(f"{origin}: {meaning}", str(tensors), f"{parameters:,}", f"{parameters / total:.1%}")
    table.add_row("total", str(sum(tensors for tensors, _ in counts.values())), f"{total:,}", "")
    return table


def layer_table(model: VideoModel | VideoTextModel) -> Table:
    """Trainable and total parameters, layer by layer, by origin."""
    from img2vid.tuning import layer_groups

    groups = layer_groups(model)
    table = Table(title="Layers, from input to output", title_justify="left", title_style="bold")
    table.add_column("layer")
    for header in (*ORIGINS, "trainable", "total"):
        table.add_column(header, justify="right")
    for name in dict.fromkeys(group.name for group in groups):
        layer = [group for group in groups if group.name == name]
        table.add_row(name, *layer_cells(layer))
    table.add_section()
    table.add_row("total", *layer_cells(groups))
    return table


def layer_cells(groups: list[LayerGroup]) -> list[str]:
    """Numbers of parameters of each origin, then the trainable and all of them."""
    cells = []
    for origin in ORIGINS:
        total = sum(group.numel() for group in groups if group.origin == origin)
        trainable = sum(group.numel(trainable_only=True) for group in groups if group.origin == origin)
        frozen = f"{total - trainable:,} frozen" if trainable < total else ""
        cells.append(", ".join(filter(None, [f"{trainable:,}" if trainable else "", frozen])))
    trainable = sum(group.numel(trainable_only=True) for group in groups)
    return [*cells, f"{trainable:,}" if trainable else "", f"{sum(group.numel() for group in groups):,}"]


def optimizer_table(groups: list[dict[str, Any]]) -> Table:
    """Parameter groups of an optimiser: at which rate what trains; a schedule multiplies these rates."""
    table = Table(title="Parameter groups", title_justify="left", title_style="bold")
    table.add_column("group")
    for header in ("learning rate", "weight decay", "tensors", "parameters"):
        table.add_column(header, justify="right")
    total = 0
    for group in groups:
        count = sum(parameter.numel() for parameter in group["params"])
        total += count
        rate = f"{group.get('initial_lr', group['lr']):.3g}"
        table.add_row(group["name"], rate, f"{group['weight_decay']:g}", str(len(group["params"])), f"{count:,}")
    table.add_section()
    table.add_row("total", "", "", str(sum(len(group["params"]) for group in groups)), f"{total:,}")
    return table


def print_aliases() -> None:
    from img2vid.backbones.names import ALIASES

    table = Table(title="Backbone aliases", title_justify="left", title_style="bold")
    table.add_column("alias")
    table.add_column("stands for")
    for alias, name in ALIASES.items():
        table.add_row(alias, "the model inside this package, no network needed" if alias == name else name)
    console = Console()
    console.print(table)
    console.print(
        "Also timm:NAME[.TAG] and open_clip:ARCH[/TAG], docs/backbones.md; hf:NAME or FOLDER, docs/transformers.md.",
        markup=False,
    )


def print_grafts() -> None:
    from img2vid.grafts import GRAFTS

    table = Table(title="Grafts", title_justify="left", title_style="bold", show_lines=True)
    for header in ("type", "where", "what is new", "gate", "at start", "folds away"):
        table.add_column(header)
    for kind, cls in GRAFTS.items():
        table.add_row(*map(Text, (kind, cls.where, cls.new, cls.gate, cls.identity, cls.folds)))
    Console().print(table)


def print_candidates(console: Console, candidates: Sequence[Any]) -> None:
    table = Table(title="Where to go over, the best first", title_justify="left", title_style="bold")
    for header in ("layers of each part", "CKA of each junction", "named right"):
        table.add_column(header)
    for one in candidates:
        layers, ckas = " + ".join(map(str, map(list, one.layers))), ", ".join(f"{cka:.3f}" for cka in one.ckas)
        table.add_row(*map(Text, (layers, ckas, "-" if one.accuracy is None else f"{one.accuracy:.1%}")))
    console.print(table)


def print_junctions(console: Console, junctions: Sequence[Any]) -> None:
    table = Table(title="Junctions", title_justify="left", title_style="bold")
    for header in ("in front of block", "from", "to", "bridge", "CKA arriving", "CKA bridged", "error"):
        table.add_column(header)
    for one in junctions:
        numbers = ["-" if x is None else f"{x:.3f}" for x in (one.arriving, one.bridged, one.error)]
        table.add_row(*map(Text, (str(one.at), one.before, one.after, one.bridge, *numbers)))
    console.print(table)


def render_inspection(facts: Inspection) -> str:
    return to_text(inspection_table(facts))


def inspection_table(facts: Inspection) -> Group:
    table = Table(title=Text(facts.name), title_justify="left", title_style="bold", show_header=False)
    size = f"{facts.image_size[0]} x {facts.image_size[1]} pixels" + (", any other size too" if facts.any_size else "")
    total = sum(facts.parameters.values())
    rows = {
        "model": f"{facts.model_class} over {facts.tower_class}",
        "images": f"{size}; patches {facts.patch_size[0]} x {facts.patch_size[1]}",
        "positions": facts.position,
        "blocks": f"{facts.depth} x {facts.block_class}, width {facts.width}",
        "attention": f"{facts.attention_class}, {facts.num_heads} heads",
        "not copied to time": ", ".join(facts.left_behind) or "nothing is left behind",
        "prefix tokens": f"{facts.num_prefix_tokens} inside the blocks",
        "feature": f"{facts.feature_dim} numbers",
        "parameters": f"{total:,} (" + ", ".join(f"{n:,} {origin}" for origin, n in facts.parameters.items()) + ")",
        f"FLOPs, {facts.num_frames} frames": f"{facts.flops_per_clip / 1e9:,.1f} G "
        f"({facts.flops_per_clip / facts.flops_image_model:.2f} x the image model per frame)",
    }
    if facts.num_classes is not None:
        names = facts.class_names
        several = f": {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else ", without names"
        rows["classifier"] = f"{facts.num_classes} classes{several}"
    if facts.quirks:
        rows["does differently"] = ", ".join(facts.quirks)
    for name, value in rows.items():
        table.add_row(name, value)
    promises = Table(title="Unchanged at step 0", title_justify="left", title_style="bold", show_header=False)
    for mode, promise in facts.guarantees.items():
        promises.add_row(mode + (" (this one)" if mode == facts.mode else ""), promise)
    return Group(table, promises)

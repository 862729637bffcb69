"""Why a certificate failed, check by check, in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from img2vid.certificate import Certificate
    from img2vid.proof.liveness import Liveness


def failures(certificate: Certificate) -> list[str]:
    """One sentence for each check that failed; none where the certificate is ``ok``."""
    if certificate.ok:
        return []
    found = [] if certificate.held else changed(certificate)
    found += [] if certificate.separate else mixed(certificate)
    if not certificate.reversible:
        found.append(
            f"closed again, gates that were opened leave a difference of {certificate.closed_difference}"
            if certificate.closed_difference != 0.0
            else f"opened gates move the output by {certificate.perturbed_difference}"
        )
    return found if certificate.alive or not certificate.expected_alive else found + dead(certificate)


def changed(certificate: Certificate) -> list[str]:
    """The function or the weights are not the image model's."""
    found = [
        f"on a {row.kind} clip of {row.num_frames} frames the outputs are not what {row.claimed} promises"
        for row in certificate.comparisons
        if row.held is False
    ]
    equal, total = certificate.image_weights_equal
    if equal != total:
        found.append(f"{total - equal} of {total} image tensors are not the image model's")
    elif certificate.weights_before not in (None, certificate.weights_now):
        found.append("image weights changed during the conversion")
    if certificate.at_step_0 and certificate.gates_moved != 0.0:
        found.append(f"gates are not at zero although it was just converted, the largest by {certificate.gates_moved}")
    if certificate.text_difference:
        found.append(f"features of texts differ by {certificate.text_difference}")
    return found


def mixed(certificate: Certificate) -> list[str]:
    """Something sees what it must not."""
    found = []
    if not certificate.leak <= certificate.rounding:
        found.append(f"clips of a batch see each other: features move by {certificate.leak}")
    if certificate.later is not None and not certificate.later <= certificate.rounding:
        found.append(f"a causal frame sees later ones: its feature moves by {certificate.later}")
    strays = [layer.layer for layer in certificate.liveness if layer.stray not in (None, 0.0)]
    if strays:
        found.append(f"tokens attend along other positions than their own in {', '.join(strays)}")
    return found


def dead(certificate: Certificate) -> list[str]:
    """It cannot learn time."""
    found = [f"{layer.layer} cannot learn: {cause(layer)}" for layer in certificate.liveness if not layer.alive]
    exchanges = certificate.exchange > certificate.rounding
    if exchanges and not certificate.mixes_frames:
        found.append(f"frames are meant to be kept apart, but one moves by {certificate.exchange} with the others")
    if not exchanges and certificate.mixes_frames:
        seen = [layer.coupling for layer in certificate.liveness if layer.coupling is not None]
        found.append("with open gates, no frame's feature notices when the other frames change" + lost(seen))
    return found


def lost(seen: list[float]) -> str:
    """What became of what layers of attention along time see of other frames."""
    if not seen or not min(seen) > 0.0:
        return ""
    return (
        f": every layer's attention along time does, by {max(seen):.2g} at most, but rounding swallows it. Weights so "
        "small are not trained ones; transformers draws BLIP's at random with a deviation of 1e-10. Load pretrained "
        "weights, or build it with another initializer_range"
    )


def cause(layer: Liveness) -> str:
    if layer.coupling == 0.0:
        return "its attention does not see other frames"
    if layer.gate is not None and not layer.gate[layer.depth] > 0.0:
        return "no gradient arrives at its gate"
    return "no gradient arrives behind its gate"

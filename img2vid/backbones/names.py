"""Names of backbones: short aliases, and ``library:ARCHITECTURE`` for everything else."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from img2vid.config import shown
from img2vid.errors import BackboneError, nearest

# alias: canonical name. The part behind '.' (timm) or '/' (open_clip) names the pretrained weights.
ALIASES: dict[str, str] = {
    "nano_clip": "nano_clip",
    "vit_tiny": "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_small": "timm:vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_base": "timm:vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "vit_large": "timm:vit_large_patch16_224.augreg_in21k_ft_in1k",
    "deit3_s": "timm:deit3_small_patch16_224.fb_in22k_ft_in1k",
    "deit3_b": "timm:deit3_base_patch16_224.fb_in22k_ft_in1k",
    "deit3_l": "timm:deit3_large_patch16_224.fb_in22k_ft_in1k",
    "mae_b": "timm:vit_base_patch16_224.mae",
    "mae_l": "timm:vit_large_patch16_224.mae",
    "beitv2_b": "timm:beitv2_base_patch16_224.in1k_ft_in22k_in1k",
    "dino_b16": "timm:vit_base_patch16_224.dino",
    "dinov2_s": "timm:vit_small_patch14_dinov2.lvd142m",
    "dinov2_b": "timm:vit_base_patch14_dinov2.lvd142m",
    "dinov2_l": "timm:vit_large_patch14_dinov2.lvd142m",
    "dinov2_g": "timm:vit_giant_patch14_dinov2.lvd142m",
    "dinov2_reg_s": "timm:vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2_reg_b": "timm:vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2_reg_l": "timm:vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov3_s": "timm:vit_small_patch16_dinov3.lvd1689m",
    "dinov3_b": "timm:vit_base_patch16_dinov3.lvd1689m",
    "dinov3_l": "timm:vit_large_patch16_dinov3.lvd1689m",
    "dinov3_h": "timm:vit_huge_plus_patch16_dinov3.lvd1689m",
    "eva02_t": "timm:eva02_tiny_patch14_224.mim_in22k",
    "eva02_s": "timm:eva02_small_patch14_224.mim_in22k",
    "eva02_b": "timm:eva02_base_patch14_224.mim_in22k",
    "eva02_l": "timm:eva02_large_patch14_224.mim_m38m",
    "clip_b32": "open_clip:ViT-B-32/openai",
    "clip_b16": "open_clip:ViT-B-16/openai",
    "clip_l14": "open_clip:ViT-L-14/openai",
    "clip_l14_336": "open_clip:ViT-L-14-336/openai",
    "clip_b16_laion2b": "open_clip:ViT-B-16/laion2b_s34b_b88k",
    "clip_b16_datacomp": "open_clip:ViT-B-16/datacomp_xl_s13b_b90k",
    "clip_h14_laion2b": "open_clip:ViT-H-14/laion2b_s32b_b79k",
    "eva02_clip_b16": "open_clip:EVA02-B-16/merged2b_s8b_b131k",
    "eva02_clip_l14": "open_clip:EVA02-L-14/merged2b_s4b_b131k",
    "siglip_b16": "open_clip:ViT-B-16-SigLIP/webli",
    "siglip_l16": "open_clip:ViT-L-16-SigLIP-256/webli",
    "siglip_so400m": "open_clip:ViT-SO400M-14-SigLIP/webli",
    "siglip2_b16": "open_clip:ViT-B-16-SigLIP2/webli",
    "siglip2_l16": "open_clip:ViT-L-16-SigLIP2-256/webli",
    "siglip2_so400m": "open_clip:ViT-SO400M-14-SigLIP2/webli",
    "pe_b16": "open_clip:PE-Core-B-16/meta",
    "pe_l14": "open_clip:PE-Core-L-14-336/meta",
    "coca_b32": "open_clip:coca_ViT-B-32/laion2b_s13b_b90k",
    "coca_l14": "open_clip:coca_ViT-L-14/laion2b_s13b_b90k",
}

LIBRARIES = ("timm", "open_clip", "hf", "stitched")
EXPECTED = (
    "Expected an alias (python -m img2vid.convert --list), timm:NAME[.TAG], open_clip:ARCH[/TAG], "
    "open_clip:local-dir:FOLDER, hf:NAME, hf:FOLDER, stitched:FOLDER, or nano_clip."
)
SCHEMES = ("local-dir:", "hf-hub:")  # what open_clip calls a folder or a repository that describes its own model


@dataclass(frozen=True)
class BackboneName:
    """``library:architecture`` and the tag of its pretrained weights, None for the library's default or for none.

    Of transformers (``hf``) it is a repository or an absolute folder, without a tag.
    An open_clip architecture may also be ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``, with weights of its own.
    """

    library: str
    architecture: str
    tag: str | None = None

    @property
    def scheme(self) -> str | None:
        """``local-dir:`` or ``hf-hub:``, None for an architecture that open_clip has itself."""
        return next((scheme for scheme in SCHEMES if self.architecture.startswith(scheme)), None)

    @property
    def place(self) -> str:
        """The folder or repository behind the scheme."""
        return self.architecture.removeprefix(self.scheme or "")

    def __str__(self) -> str:
        if self.library == self.architecture:  # nano_clip, stitched
            return self.library
        mark = "." if self.library == "timm" else "/"
        return f"{self.library}:{self.architecture}" + (f"{mark}{self.tag}" if self.tag else "")


def parse_name(name: str) -> BackboneName:
    """An alias or ``library:ARCHITECTURE[tag]`` as its parts; the architecture is not looked up yet.

    Raises:
        BackboneError: neither an alias nor a known library; the nearest names are suggested.
    """
    full = ALIASES.get(name, name)
    if full in ("nano_clip", "stitched"):
        return BackboneName(full, full)
    library, colon, rest = full.partition(":")
    if not colon or library not in LIBRARIES or not rest:
        raise BackboneError(f"Unknown backbone {shown(name)}.{what_it_is(full)} {EXPECTED}")
    if library == "hf":  # transformers' own rule: what is a folder here is not looked for on the hub
        path = os.path.expanduser(rest)
        is_path = os.path.isdir(path) or rest.startswith((".", "/", "~"))
        return BackboneName(library, os.path.abspath(path) if is_path else rest)
    if library == "stitched":
        return BackboneName(library, os.path.abspath(os.path.expanduser(rest)))
    scheme = next((scheme for scheme in SCHEMES if rest.replace("_", "-").startswith(scheme)), None)
    if scheme and library == "timm":
        raise BackboneError(
            f"{shown(name)}: timm's own names are taken here, with their tags: timm:NAME.TAG. Weights of your own, in "
            "timm's layout, go with the name of their architecture: --backbone timm:NAME --weights FILE."
        )
    if scheme:
        place = rest[len(scheme) :]
        if not place.strip():
            kind = "a folder" if scheme == "local-dir:" else "OWNER/NAME of a repository"
            raise BackboneError(f"{shown(name)} ends where {kind} is expected.")
        # absolute, so that a saved model can be loaded from anywhere
        return BackboneName(library, scheme + (os.path.abspath(place) if scheme == "local-dir:" else place))
    architecture, _, tag = rest.partition("." if library == "timm" else "/")
    return BackboneName(library, architecture, tag or None)


def what_it_is(name: str) -> str:
    """What an unknown name seems to be: a folder, a file, or a slip of the hand."""
    if is_of_transformers(os.path.join(name, "config.json")):
        return f" It is a folder of transformers: --backbone hf:{name}."
    if os.path.isfile(os.path.join(name, "config.json")) and os.path.isfile(os.path.join(name, "model.safetensors")):
        return (
            f" There is a model folder there. A folder of img2vid already is a video model: img2vid.load({name!r}) in "
            f"Python, img2vid inspect and img2vid certify here; --config {os.path.join(name, 'config.json')} converts "
            "its backbone again, with its settings."
        )
    if os.path.isfile(os.path.join(name, "open_clip_config.json")):
        return f" It is a folder of open_clip: --backbone open_clip:local-dir:{name}."
    if os.path.isdir(name):
        return " It is a folder, and holds no model."
    if os.path.isfile(name):
        return " It is a file: give its architecture with --backbone, and the file with --weights."
    return nearest(name, every_name()) if len(name) < 200 else ""


def is_of_transformers(path: str) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            return "model_type" in json.load(file)
    except (OSError, ValueError, TypeError):
        return False


def every_name() -> list[str]:
    """Everything a mistyped name could have meant."""
    import open_clip
    import timm

    return [*ALIASES, *(f"timm:{n}" for n in timm.list_models()), *(f"open_clip:{n}" for n in open_clip.list_models())]

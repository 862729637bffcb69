"""What a conversion promises at step 0. docs/guarantees.md has the reasons, the certificate the proof."""

from __future__ import annotations

from dataclasses import dataclass, field

from img2vid.config import VideoConfig

KINDS = ("single", "static", "moving", "shuffled")  # of clips: one frame; one repeated; different ones; those shuffled

BITWISE = ("bitwise", "bitwise")


@dataclass(frozen=True)
class Guarantee:
    """Which clips a conversion leaves unchanged at step 0: ``bitwise``, ``close`` (up to rounding), or not at all."""

    summary: str
    strength: dict[str, str] = field(default_factory=dict)  # kind of clip: "bitwise" | "close"
    part: str = ""  # of the features, where it is not about all of them

    def beside(self, other: Guarantee) -> Guarantee:
        """What is left of both together: of each kind of clip the weaker promise."""
        both = {kind: strength for kind, strength in self.strength.items() if kind in other.strength}
        both = {kind: "bitwise" if (self.strength[kind], other.strength[kind]) == BITWISE else "close" for kind in both}
        summary, part = self.summary if both == self.strength else other.summary, self.part or other.part
        return Guarantee(f"{summary}, {other.part}" if other.part and both else summary, both, part)

    @classmethod
    def of(cls, config: VideoConfig, num_prefix_tokens: int, at_own_size: bool = True) -> Guarantee:
        """What ``config`` promises on a backbone with that many prefix tokens inside its blocks, grafts included.

        Args:
            at_own_size: whether clips are of the size (height, width) that the backbone was built for.
        """
        promise = cls.of_time(config, num_prefix_tokens, at_own_size)
        if config.grafts:
            from img2vid.grafts import read_grafts

            for graft in read_grafts(config.grafts):
                promise = promise.beside(graft.guarantee())
        return promise

    @classmethod
    def of_time(cls, config: VideoConfig, num_prefix_tokens: int, at_own_size: bool = True) -> Guarantee:
        """What is promised by how ``config`` inserts time.

        Args:
            at_own_size: whether clips are of the size (height, width) that the backbone was built for.
        """
        if "nearest_positions" in config.quirks and not at_own_size:
            return cls("none at another image size: positions are the nearest patches', not the image model's")
        attention, prefix = config.attention, config.prefix_mode if num_prefix_tokens else "per_frame"
        if attention == "divided_space_time" and config.gate == "none" and config.temporal_init != "zeros":
            return cls("none: the temporal branch has no gate")
        if attention == "joint_space_time":
            kinds = ("single", "static") if prefix == "per_frame" or not num_prefix_tokens else ("single",)
            promise = cls(f"{' and '.join(kinds)} clips, up to rounding", dict.fromkeys(kinds, "close"))
        elif prefix == "shared":
            promise = cls("single and static clips, up to rounding", dict.fromkeys(("single", "static"), "close"))
        elif prefix == "global":
            promise = cls("single frames, up to rounding", {"single": "close"})
        else:
            promise = cls("any clip, bit for bit on the same folded batch", dict.fromkeys(KINDS, "bitwise"))
        if "mean_before_norm" in config.quirks and "moving" in promise.strength:
            promise = cls("single and static clips, up to rounding", dict.fromkeys(("single", "static"), "close"))
        if config.tubelet_size > 1 and config.tubelet_init == "average":
            kept: dict[str, str] = {kind: "close" for kind in ("single", "static") if kind in promise.strength}
            return cls("static clips, up to rounding (averaged tubelets)" if kept else promise.summary, kept)
        if config.tubelet_size > 1:
            return cls(f"{promise.summary}, of each tubelet's central frame", promise.strength)
        return promise

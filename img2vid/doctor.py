"""`img2vid doctor`: what is installed, whether it works here, and the command that installs what is missing.

What is needed is read from the package's own metadata, so it cannot fall behind pyproject.toml. Readers of video are
not asked whether they are installed but made to decode a small video that is written on the spot.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement

from img2vid._version import __version__

NAME = "img2vid"
READERS = ("pyav", "decord", "torchcodec")
MARKS = {True: ("ok", "green"), False: ("WRONG", "bold red"), None: ("-", "dim")}


@dataclass
class Finding:
    """One thing that was looked at. ok: None where its absence is nobody's fault (no GPU, an extra not asked for)."""

    what: str
    found: str
    ok: bool | None = True
    mend: str = ""


@dataclass
class Diagnosis:
    packages: list[Finding] = field(default_factory=list)
    extras: list[Finding] = field(default_factory=list)
    readers: list[Finding] = field(default_factory=list)
    machine: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether converting, reading videos and using models will work; extras may be missing."""
        return all(finding.ok is not False for finding in [*self.packages, *self.readers, *self.machine])


def diagnose() -> Diagnosis:
    needed = requirements()
    found = Diagnosis(packages=[state_of(requirement) for requirement in needed.pop("")])
    for extra, wanted in sorted(needed.items()):
        missing = [finding for finding in map(state_of, wanted) if not finding.ok]
        what = ", ".join(f"{finding.what} {finding.found}" for finding in missing)
        mend = f"pip install '{NAME}[{extra}]'" if missing else ""
        found.extras.append(Finding(extra, what or "complete", None if missing else True, mend))
    if found.ok:  # what runs needs the packages it runs on
        found.readers, found.machine = try_readers(), look_at_machine()
    return found


def requirements() -> dict[str, list[Requirement]]:
    """Extra -> what it asks for on this platform, beyond the core, which is under the empty name."""
    metadata = importlib.metadata.metadata(NAME)
    wanted: dict[str, list[Requirement]] = {"": []} | {extra: [] for extra in metadata.get_all("Provides-Extra") or ()}
    for text in importlib.metadata.requires(NAME) or ():
        requirement = Requirement(text)
        for extra, of_extra in wanted.items():
            asks = requirement.marker is None or requirement.marker.evaluate({**default_environment(), "extra": extra})
            # what the core asks for is asked for by every extra too
            if asks and (extra == "" or requirement not in wanted[""]):
                of_extra.append(requirement)
    # an extra made of others alone, such as "all", adds nothing of its own
    return {
        extra: unfolded(of_extra, wanted)
        for extra, of_extra in wanted.items()
        if any(requirement.name != NAME for requirement in of_extra)
    }


def unfolded(asked: list[Requirement], wanted: dict[str, list[Requirement]]) -> list[Requirement]:
    """What is asked for, with what other extras of ours in it ask for."""
    own = [requirement for requirement in asked if requirement.name != NAME]
    others = sorted({extra for requirement in asked if requirement.name == NAME for extra in requirement.extras})
    for extra in others:
        own += [more for more in unfolded(wanted[extra], wanted) if more not in own]
    return own


def state_of(requirement: Requirement) -> Finding:
    """Whether a package is there, in a version that will do."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(requirement.name, "missing", False, f"pip install '{str(requirement).split(';')[0].strip()}'")
    if requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, version)
    found = f"{version}, which is not {requirement.specifier}"
    return Finding(requirement.name, found, False, f"pip install '{requirement.name}{requirement.specifier}'")


def try_readers() -> list[Finding]:
    """Each reader decodes the same small video, frame by frame; readers that are not installed are left out."""
    from img2vid.data.reading import read_clip

    findings = []
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "twelve_frames.mp4"
        try:
            write_video(video)
        except Exception as error:  # whatever is wrong with an installation is what is looked for
            return [Finding("pyav", f"cannot write a video: {first_line(error)}", False, "pip install 'av>=17.1'")]
        frames = {}
        for name in READERS:
            if name != "pyav" and not is_installed(name):
                continue
            try:
                frames[name] = read_clip(video, range(12), backend=name)
            except Exception as error:
                findings.append(Finding(name, f"fails: {first_line(error)}", False if name == "pyav" else None))
                continue
            same = bool((frames[name] == frames.get("pyav", frames[name])).all())
            findings.append(Finding(name, "reads 12 of 12 frames" if same else "reads other frames than pyav", same))
    return findings


def write_video(path: Path) -> None:
    """Twelve frames of 64 x 64 pixels, each brighter than the one before."""
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        for number in range(12):
            picture = np.full((64, 64, 3), 20 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def look_at_machine() -> list[Finding]:
    """Processors, GPUs, and where weights would come from."""
    import torch
    from huggingface_hub import constants

    threads = torch.get_num_threads()
    findings = [
        Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("processor cores", f"{os.cpu_count()}, of which torch uses {threads}"),
    ]
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for CPUs"
        findings.append(Finding("GPUs", f"none ({built})", None))
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(number)
        bf16 = "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed, no bf16"
        findings.append(Finding(f"GPU {number}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {bf16}"))
    cache = Path(constants.HF_HUB_CACHE)
    kept = sorted(p.name.removeprefix("models--").replace("--", "/") for p in cache.glob("models--*"))
    offline = ", offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""
    shown = f"{len(kept)} models in {cache}{offline}" + (f": {', '.join(kept[:4])}" if kept else "")
    findings.append(Finding("weights of the hub", shown + (", ..." if len(kept) > 4 else ""), True if kept else None))
    return findings


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def print_diagnosis(found: Diagnosis) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{NAME} {__version__}", title_justify="left", title_style="bold", show_header=False)
    for title, findings in vars(found).items():
        table.add_section()
        for number, finding in enumerate(findings):
            mark = MARKS[finding.ok]
            told = finding.found + (f"\n{finding.mend}" if finding.mend else "")
            table.add_row(title if number == 0 else "", finding.what, Text(mark[0], style=mark[1]), Text(told))
    console = Console()
    console.print(table)
    if not found.ok:
        console.print("What is marked WRONG keeps img2vid from working; each line says what mends it.")

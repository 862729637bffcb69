"""The shape of the package: imports run one way, and importing it is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import img2vid

ROOT = Path(img2vid.__file__).parent
# lower ones never import higher ones at module level
TIERS = [
    {"_version", "errors"},
    {"choices", "leaving"},
    {"config", "overlay"},
    {"weights"},
    {"command", "options", "class_names", "proof.guarantees"},
    {"temporal"},
    {"backbones"},
    {"surgery", "clips"},
    {"origins", "streaming", "beside"},
    {"running"},
    {"weights.reloading"},
    {"checkpoints.saving"},
    {"model"},
    {"two_towers"},
    {"proof", "tuning", "footprint"},
    {"certificate", "checkpoints"},
    {"grafts"},  # which models and guarantees ask for where a configuration names some
    {"programs"},
    {
        "inspection",
        "convert",
        "consolidate",
        "interpolation",
        "stitching",
        "growing",
        "evaluation",
        "export",
        "captioning",
    },
    {"estimate", "merging", "junctions"},
    {"training"},
    {"demo", "doctor"},
    {"commands"},
    {"cli", "__init__"},
    {"__main__", "demo.__main__"},
]
LEAVES = {"data", "objectives", "reporting", "plots"}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(p for p in parts if p != "__init__") or "__init__", path


def tier(module: str) -> int | None:
    names = [".".join(module.split(".")[:n]) for n in (2, 1)]
    return next((i for name in names for i, names_in_tier in enumerate(TIERS) if name in names_in_tier), None)


def imported_at_module_level(path: Path) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("img2vid"):
            found.add(node.module.removeprefix("img2vid").lstrip(".") or "__init__")
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("img2vid.") for a in node.names if a.name.startswith("img2vid.")}
    return found


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_run_one_way(module, path):
    top = module.split(".")[0]
    for imported in imported_at_module_level(path):
        if imported.split(".")[0] == top:
            continue
        if top in LEAVES or (top == "backbones" and imported.startswith("data")):
            allowed = imported in {"_version", "errors"} or imported.split(".")[0] in LEAVES
        elif tier(imported) is None:
            allowed = imported.split(".")[0] in LEAVES
        else:
            allowed = tier(module) is not None and tier(imported) < tier(module)
        assert allowed, f"{module} imports {imported}"


def loaded_of(modules: set[str], statement: str) -> set[str]:
    """Which of the modules a fresh interpreter has loaded after a statement."""
    code = f"import sys; {statement}; print(*({modules!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_is_cheap():
    heavy = {"torch", "timm", "open_clip", "lightning", "av", "huggingface_hub"}
    assert loaded_of(heavy, "import img2vid, img2vid.cli") == set()


def test_using_models_pulls_in_neither_lightning_nor_a_decoder():
    statement = "import img2vid; img2vid.VideoModel, img2vid.certify, img2vid.load, img2vid.convert"
    assert loaded_of({"lightning", "av", "decord", "torchcodec"}, statement) == set()


def test_public_names_exist_and_unknown_ones_are_explained():
    assert all(getattr(img2vid, name) is not None for name in img2vid.__all__)
    with pytest.raises(AttributeError, match="it has Certificate"):
        img2vid.nothing  # noqa: B018

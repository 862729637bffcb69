"""Every kind of backbone converts and runs; ``-m census`` does so with every single one."""

import os

import pytest
import timm

import img2vid
from img2vid.backbones import BackboneError, load_backbone
from img2vid.backbones.from_timm import REFUSALS
from img2vid.backbones.tower import structural_copy
from img2vid.certificate import certify
from tests.census.models import all_names, load_full_size, load_small_with_text
from tests.census.page import PAGE as PAGE_FILE
from tests.census.page import installed, read_page, summary, write_page
from tests.census.survey import RESULTS, by_stratum, exact_arithmetic, examine, survey, survey_modes

PAGE = read_page()
KNOWN = set(all_names())  # to the installed libraries, which may be older or newer than the page's


@pytest.mark.parametrize("name", [name for name in PAGE.sample() if name in KNOWN])
def test_smallest_of_each_kind(name):
    row = examine(name, num_frames=(1, 2, 3, 8), depth=1)
    assert row.outcome == "converted", row.text
    assert row.stratum == PAGE.strata[name]


@pytest.mark.parametrize("name", sorted(KNOWN & set(PAGE.refusals)))
def test_refused_with_the_reason_on_the_page(name):
    with pytest.raises(BackboneError) as refusal:
        load_full_size(name)
    assert str(refusal.value) == PAGE.refusals[name]
    with pytest.raises(BackboneError):  # and by the way everyone takes
        load_backbone(name, random_weights=True)


def test_the_page_shows_every_refusal():
    said = [f"{cls} cannot become a video model: {reason}." for cls, reason in REFUSALS.items()]
    assert set(said) - set(PAGE.refusals.values()) == set()


def test_the_page_counts():
    assert sum(name.startswith("timm:") for name in PAGE.converted) >= 327
    assert sum(name.startswith("open_clip:") for name in PAGE.converted) >= 116
    assert len(set(PAGE.converted)) == len(PAGE.converted)


def test_the_readme_shows_the_summary_of_the_page():
    assert summary(PAGE) in (PAGE_FILE.parents[1] / "README.md").read_text(), f"README.md must hold:\n{summary(PAGE)}"


def test_old_name_of_withdrawn_weights_is_refused():
    assert timm.is_model("vit_base_patch16_224_sam")
    with pytest.raises(BackboneError, match="vit_base_patch16_224_sam"):
        load_backbone("timm:vit_base_patch16_224_sam", random_weights=True)


# CLIP; CustomTextCLIP around a timm tower; the same with SigLIP's bias; CoCa
@pytest.mark.parametrize("name", ["ViT-B-32", "ViTamin-S", "ViT-B-16-SigLIP", "coca_ViT-B-32"])
def test_models_with_a_text_tower(name):
    with exact_arithmetic():
        model = load_small_with_text(f"open_clip:{name}")
        reference = structural_copy(model)
        certificate = certify(img2vid.convert(model, num_frames=2), reference, num_frames=(1, 2, 3))
    assert certificate.ok
    assert certificate.text_difference == 0.0


@pytest.mark.census
def test_every_architecture(tmp_path):
    workers = os.cpu_count() or 1
    rows = survey(sorted(KNOWN), tmp_path / "rows.jsonl", workers)
    modes = survey_modes(rows, tmp_path / "modes.jsonl", workers)
    write_page(rows, modes, RESULTS / "backbones.md")
    assert {row.name: row.text for row in rows if row.outcome == "failed"} == {}
    assert {name: mode for name, found in modes.items() for mode, held in found.items() if held is False} == {}
    converted = {row.name for row in rows if row.outcome == "converted"}
    assert (KNOWN & set(PAGE.converted)) - converted == set()
    if PAGE.versions == installed():
        assert converted == set(PAGE.converted)
        assert {members[0].name: stratum for stratum, members in by_stratum(rows).items()} == PAGE.strata

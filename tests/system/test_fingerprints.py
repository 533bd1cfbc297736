"""A setting that enters other fingerprints than it did is a change of meaning: deliberate, or a fault.

After a deliberate one, `python tests/support/fingerprints.py` prints what differs, and `--write` records it.
"""

import json

import pytest
from fingerprints import NO_DATA, PRESETS, RECORD, differences, fingerprints, under

from thinkimg.config.load import load_config

RECORDED = json.loads(RECORD.read_text())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_recorded_fingerprints(preset):
    assert fingerprints(load_config(preset, [] if preset == "tiny" else NO_DATA)) == RECORDED[preset][""]


@pytest.mark.parametrize("preset", ["tiny", "balanced"])  # a whole policy and an adapter
def test_each_setting_changes_the_recorded_stages(preset):
    assert list(differences({preset: RECORDED[preset]}, {preset: under(preset)})) == []
    changed = [setting for setting, stages in RECORDED[preset].items() if stages and "refused" not in stages]
    assert len(changed) > 80


def test_where_things_run_is_in_no_fingerprint():
    for settings in RECORDED.values():
        assert all(not stages or "refused" in stages for setting, stages in settings.items() if setting[:6] == "where.")

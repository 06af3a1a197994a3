"""The settings themselves: texts, groups, and the limits of the endpoints."""

from __future__ import annotations

from dataclasses import fields

from embedwire.cli.options import load
from embedwire.cli.settings import GROUPS, Settings
from embedwire.limits import DEFAULT_LIMITS, Limits


def test_the_limits_of_the_endpoints_are_settings_with_their_own_defaults() -> None:
    assert load().settings.limits == DEFAULT_LIMITS
    assert load({"retry_s": 0.125}).settings.limits == Limits(retry_s=0.125)
    assert {f.name for f in fields(Limits)} <= Settings.model_fields.keys()


def test_every_setting_has_a_text_and_one_group() -> None:
    grouped = [name for group in GROUPS for name in group.model_fields]
    assert sorted(grouped) == sorted(Settings.model_fields)
    assert all(field.description for group in GROUPS for field in group.model_fields.values())

"""What is claimed of KD3's choice, on the small digits."""

import json

import pytest

from vestige.bench import claims


@pytest.mark.slow
def test_most_of_what_it_learns_from_is_of_the_teachers_classes(tmp_path, monkeypatch):
    definition = claims.load_definition("kd3")
    precise = next(one for one in definition.claims if one.bound == 0.7)
    digits = definition.model_copy(
        update={
            "cases": {"digits": definition.cases["digits"].model_copy(update={"arms": ("kd3",)})},
            "claims": (precise,),
        }
    )
    monkeypatch.setattr(claims, "load_definition", lambda name: digits)
    path = claims.run_claim("kd3", seeds=range(3), out=tmp_path / "out", cells=tmp_path / "cells")
    result = json.loads(path.read_text())
    assert (result["verdict"], result["failures"]) == ("holds", "")

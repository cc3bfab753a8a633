"""The headline claim on the digits, against the arms that must lose."""

import json

import pytest

from vestige.bench import claims


@pytest.mark.slow
def test_headline_claim_of_dfad_holds_on_the_digits(tmp_path, monkeypatch):
    definition = claims.load_definition("dfad")
    digits = definition.model_copy(
        update={"cases": {"digits": definition.cases["digits"]}, "claims": definition.claims[:1]}
    )
    monkeypatch.setattr(claims, "load_definition", lambda name: digits)
    path = claims.run_claim("dfad", seeds=range(3), out=tmp_path / "out", cells=tmp_path / "cells")
    result = json.loads(path.read_text())
    assert (result["verdict"], result["failures"]) == ("holds", "")

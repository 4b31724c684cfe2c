"""`tandem keys`: what is made works, what is listed hides it, what is revoked is."""

import asyncio

from typer.testing import CliRunner

from services.cli.__main__ import app
from shared.access.api_keys import key_id_of
from shared.access.key_store import FileKeys


def run(*arguments):
    result = CliRunner().invoke(app, ["keys", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_key_is_made_listed_and_revoked(tmp_path):
    where = ("--where", str(tmp_path / "keys.json"))
    key = run("create", "acme", *where, "--requests-per-minute", "5", "--model", "pydoc-mini").strip()
    listed = run("list", *where)
    assert key_id_of(key) in listed
    assert key not in listed
    [record] = asyncio.run(FileKeys(tmp_path / "keys.json").records()).values()
    assert record.matches(key)
    assert (record.tenant, record.requests_per_minute, record.models) == ("acme", 5, ("pydoc-mini",))
    run("revoke", key_id_of(key), *where)
    [record] = asyncio.run(FileKeys(tmp_path / "keys.json").records()).values()
    assert not record.matches(key)


def test_revoking_an_unknown_key_says_so(tmp_path):
    result = CliRunner().invoke(app, ["keys", "revoke", "abc", "--where", str(tmp_path / "keys.json")])
    assert "no key 'abc'" in str(result.exception)

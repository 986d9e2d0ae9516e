"""What a failed statement leaves behind."""

from __future__ import annotations

import sqlite3

import peewee
import pytest

from peewee_frameworks import connection_scope


def test_an_error_keeps_no_statement_of_its_connection_open(lite, lite_note):
    """Else whoever frees the error later, an event loop's thread say, waits for the next user of the connection."""
    with connection_scope(lite):
        note = lite_note.create(text="one")
        with pytest.raises(peewee.IntegrityError) as caught:
            lite_note.insert(id=note.id, text="two").execute()
    traceback, cursors = caught.value.__traceback__, []
    while traceback is not None:
        cursor = traceback.tb_frame.f_locals.get("cursor")
        if isinstance(cursor, sqlite3.Cursor):
            cursors.append(cursor)
        traceback = traceback.tb_next
    assert cursors
    for cursor in cursors:
        with pytest.raises(sqlite3.ProgrammingError, match="closed cursor"):
            cursor.fetchone()

"""A run's journal on disk: records, one a line. A whole line is a commit; a half-written last one does not count."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from sphere_edit.errors import SphereEditError
from sphere_edit.files import plain_errors, write_atomically
from sphere_edit.runs.history import History, Inconsistent
from sphere_edit.runs.records import Record, parse_record


class Journal:
    """The file ``journal.jsonl`` of a run folder."""

    NAME = "journal.jsonl"

    def __init__(self, folder: Path):
        self.path = folder / self.NAME

    @property
    def begun(self) -> bool:
        """Whether it has a line, that of the first facts."""
        try:
            with self.path.open("rb") as file:
                return file.readline().endswith(b"\n")
        except OSError:
            return False

    def read(self) -> list[Record]:
        """The records of its whole lines.

        Raises:
            SphereEditError: it cannot be read, or a line is damaged or does not follow from those before it.
        """
        with plain_errors(self.path, "read"):
            content = self.path.read_bytes()
        return self._parsed(content)

    def take_over(self) -> list[Record]:
        """The same, once nobody else writes; what an interrupted write left behind is removed."""
        with plain_errors(self.path):
            content = self.path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if self.path.stat().st_nlink > 1:  # a copy by hard links: what is appended here must not stand there
                write_atomically(self.path, lambda file: file.write_bytes(content[:whole]))
            elif whole < len(content):
                os.truncate(self.path, whole)
        return self._parsed(content)

    def append(self, record: Record) -> Record:
        """Commit one record, with the time: written and flushed to disk before this returns."""
        record = record.model_copy(update={"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
        text = json.dumps(record.as_entry(), ensure_ascii=False, allow_nan=False)
        line = text.encode("utf-8", "backslashreplace") + b"\n"
        with plain_errors(self.path):
            size = self.path.stat().st_size
            try:
                with self.path.open("ab", buffering=0) as file:
                    rest = memoryview(line)
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
            except BaseException:  # all of the line or nothing, whatever stopped it
                os.truncate(self.path, size)
                raise
        return record

    def _parsed(self, content: bytes) -> list[Record]:
        """The records of whole lines, each of which must follow from those before it."""
        history, records = History(), []
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            where = f"{self.path}, line {number}"
            records.append(parse_record(line, where))
            try:
                history.take(records[-1])
            except Inconsistent as error:
                raise SphereEditError(f"{where} is damaged ({error}); restore it from a backup") from None
        return records

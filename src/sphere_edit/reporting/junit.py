"""Limits as JUnit XML, which pipelines show: a test case a limit."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from sphere_edit.evaluation.limits import Verdict
from sphere_edit.text import visible


def junit(title: str, verdicts: Sequence[Verdict]) -> str:
    """One test suite (https://github.com/testmoapp/junitxml); limits that were not kept are failures."""
    failed = str(sum(not verdict.kept for verdict in verdicts))
    counts = {"tests": str(len(verdicts)), "failures": failed, "errors": "0", "skipped": "0"}
    suite = ElementTree.Element("testsuite", {"name": visible(title), **counts})
    for verdict in verdicts:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "sphere-edit.eval", "name": verdict.limit.words})
        if not verdict.kept:
            ElementTree.SubElement(case, "failure", {"message": verdict.words}).text = verdict.words
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"

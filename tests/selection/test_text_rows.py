"""Rows that are texts without a prompt go the whole way, and are written as texts for other programs."""

import json

from tests.conftest import make_rows


def test_texts_are_ranked_trained_on_and_written_as_texts(make_project, tmp_path):
    project = make_project(tmp_path / "project", strategies=["prism", "rds", "bm25"], seeds=[0])
    project.add("texts", [{"text": f"reverse: {word}={word[::-1]}"} for word in ("abc", "drawn", "tools", "lived")])
    project.configure(selection={"budget": 44})
    project.run()
    rows = project.selected("prism")
    texts = [row for row in rows if row["prompt"] == ""]
    assert len(texts) == 4 and len(rows) == 44
    lines = [json.loads(line) for line in project.lake.local(project.selection("prism"), suffix=".jsonl").open()]
    written = [line for line in lines if "text" in line]
    assert {line["text"] for line in written} == {row["completion"] for row in texts}
    assert not any({"prompt", "completion", "messages"} & line.keys() for line in written)
    assert len(lines) - len(written) == len(make_rows(20, 0)) * 2

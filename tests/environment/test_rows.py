"""Rows of files and data sets: every column reaches the reward, and errors name the line."""

import csv
import json
from collections import UserDict

import pandas as pd
import pytest
from toy_tokenizers import Letters

from textpolicy.environment import env_from_rows, read_rows
from textpolicy.errors import UserError
from textpolicy.tasks import task_from_rows


def right(prompt, completion, example, **kwargs):
    return float(completion == example["answer"])


ROWS = [{"question": "2+2?", "answer": "4", "level": 1}, {"question": "3 + 3 ?\nü", "answer": "6", "level": 2}]


def jsonl(path):
    path.write_text("\n".join([json.dumps(ROWS[0]), "", json.dumps(ROWS[1], ensure_ascii=False)]), encoding="utf-8")


def csv_file(path):
    path.write_text('question,answer,level\n2+2?,4,1\n"3 + 3 ?\nü",6,2\n', encoding="utf-8")


def parquet(path):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is an extra: pip install 'textpolicy[data]'")
    files = pytest.importorskip("pyarrow.parquet", reason="as above")
    files.write_table(pyarrow.Table.from_pylist(ROWS), path)


WRITERS = {".jsonl": jsonl, ".csv": csv_file, ".parquet": parquet}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_gives_its_rows_and_they_give_an_environment(kind, tmp_path):
    path = tmp_path / f"rows{kind}"
    WRITERS[kind](path)
    rows = read_rows(path)
    assert rows == ([{**r, "level": str(r["level"])} for r in ROWS] if kind == ".csv" else ROWS)
    assert read_rows(str(path), limit=1) == rows[:1]
    env = env_from_rows(rows, right, tokenizer=Letters(), prompt="question")
    assert [env.prompt_text(i) for i in range(2)] == [r["question"] for r in ROWS]
    assert [env.score(i, [ord("6")], False).reward for i in range(2)] == [0.0, 1.0]


def test_rows_of_a_hugging_face_data_set_reach_the_reward():
    datasets = pytest.importorskip("datasets", reason="data sets are an extra: pip install 'textpolicy[data]'")
    data = datasets.Dataset.from_list(ROWS)
    env = env_from_rows(data, right, tokenizer=Letters(), prompt=lambda row: f"Level {row['level']}: {row['question']}")
    assert env.prompt_text(0) == "Level 1: 2+2?"
    assert env.score(0, [ord("4")], False).reward == 1.0
    streamed = env_from_rows(
        data.to_iterable_dataset(), right, tokenizer=Letters(), prompt="question", limit=1, group_size=3
    )
    assert (len(streamed), streamed.group_size) == (1, 3)


def test_a_column_may_hold_messages():
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(UserError, match="no chat template"):  # so it was taken for messages
        env_from_rows([{"prompt": messages}], right, tokenizer=Letters())


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": ', r"line 2 of .*a.jsonl is not JSON"),
        ("a.jsonl", "[1, 2]\n", "line 1 of .*a.jsonl is not a JSON object"),
        ("a.csv", "a,b\n1,2\n3\n", "line 3 of .*a.csv does not have as many cells as the header"),
        ("a.csv", "a,b\n1,2,3\n", "line 2 of .*a.csv does not have as many cells as the header"),
        ("a.csv", "\n\na,b\n1\n", "line 4 of .*a.csv does not have as many cells as the header"),
        ("a.csv", "a,b,a\n1,2,3\n", r"a.csv names 'a' twice; rename one"),
        ("a.jsonl", '{"a": 1}\n{"b": 2, "a": 1, "b": 3}', r"line 2 of .*a.jsonl names 'b' twice"),
        ("a.txt", "a", r"no kind of file called '.txt'; .*choose one of .csv, .jsonl, .parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_with_line_and_reason(tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=sentence):
        read_rows(path)


def test_every_other_file_that_cannot_be_read_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*missing\.csv"):
        read_rows(tmp_path / "missing.csv")
    (tmp_path / "latin.jsonl").write_bytes('{"a": "ü"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl is not UTF-8"):
        read_rows(tmp_path / "latin.jsonl")
    (tmp_path / "quoted.csv").write_text('a,b\n1,"2"3\n')
    with pytest.raises(UserError, match=r"quoted\.csv is not a valid CSV file"):
        read_rows(tmp_path / "quoted.csv")
    pytest.importorskip("pyarrow", reason="Parquet is an extra: pip install 'textpolicy[data]'")
    (tmp_path / "no.parquet").write_text("no")
    with pytest.raises(UserError, match=r"no\.parquet is not a Parquet file"):
        read_rows(tmp_path / "no.parquet")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".CSV", ".Jsonl"])
def test_a_byte_order_mark_and_a_long_cell_are_read(mark, kind, tmp_path):
    long = "x" * 300_000
    text = f'{mark}question,answer\n"{long}",1\n' if kind.lower() == ".csv" else None
    lines = mark.join([json.dumps({"question": long, "answer": "1"}) + "\n"] * 2)  # as "cat" joins two files
    (tmp_path / f"a{kind}").write_text(text or mark + lines, encoding="utf-8")
    before = csv.field_size_limit()
    rows = read_rows(tmp_path / f"a{kind}")
    assert rows == [{"question": long, "answer": "1"}] * len(rows)
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ({"train": ROWS, "test": ROWS}, "type dict with the keys train, test"),
        (UserDict(question=["1?", "2?"]), "type UserDict with the keys question"),
        (pd.DataFrame(ROWS), "row 1 of the DataFrame is a str"),
        (pd.DataFrame(ROWS)["question"], "row 1 of the Series is a str"),
        (pd.DataFrame(ROWS).iterrows(), "row 1 of the generator is a tuple"),
        (pd.DataFrame(ROWS).to_numpy(), "row 1 of the ndarray is a ndarray"),
        (pd.DataFrame(ROWS).to_records(), "row 1 of the recarray is a record"),
        (["2+2?", "3+3?"], "row 1 of the list is a str"),
        ([ROWS[0], None], "row 2 of the list is a NoneType"),
        ((row["question"] for row in ROWS), "row 1 of the generator is a str"),
        ([tuple(ROWS[0].items())], "row 1 of the list is a tuple"),
        (b"rows.jsonl", "row 1 of the bytes is a int"),
        (None, "the rows are of the type NoneType"),
        (7, "the rows are of the type int"),
    ],
)
def test_a_container_that_is_no_rows_is_refused_with_the_way_to_them(rows, what):
    for read in (
        lambda: env_from_rows(rows, right, tokenizer=Letters(), prompt="question"),
        lambda: task_from_rows(rows, right),
    ):
        with pytest.raises(UserError, match=rf"{what}.*; give .*data\['train'\].*to_dict\('records'\)") as error:
            read()
        assert "\n" not in str(error.value)
        if not hasattr(rows, "__getitem__"):
            break  # a generator has been read


def test_rows_of_every_right_kind_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Arrow is an extra: pip install 'textpolicy[data]'")
    jsonl(tmp_path / "rows.jsonl")
    frame = pd.DataFrame(ROWS)
    kinds = [ROWS, tuple(ROWS), iter(ROWS), map(UserDict, ROWS), frame.to_dict("records"), tmp_path / "rows.jsonl"]
    for rows in [*kinds, str(tmp_path / "rows.jsonl"), pyarrow.Table.from_pylist(ROWS).to_pylist()]:
        env = env_from_rows(rows, right, tokenizer=Letters(), prompt="question")
        assert [dict(example) for example in env.examples] == ROWS
    with pytest.raises(UserError, match="the rows are of the type Table; give"):
        env_from_rows(pyarrow.Table.from_pylist(ROWS), right, tokenizer=Letters(), prompt="question")


def test_a_missing_column_is_named_with_the_near_one():
    with pytest.raises(UserError, match="no column in row 1 of the rows called 'qestion'; did you mean 'question'"):
        env_from_rows(ROWS, right, tokenizer=Letters(), prompt="qestion")
    with pytest.raises(UserError, match="there are no rows"):
        env_from_rows([], right, tokenizer=Letters())

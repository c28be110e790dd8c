"""The paper's data sets, on small files in the published formats: clients, held-out sets and draws."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.data.code_alpaca import LANGUAGES, CodeAlpaca
from fedferret.data.dolly import Dolly
from fedferret.data.examples import Example, FederatedData
from fedferret.data.gsm8k import GSM8K
from fedferret.data.natural_instructions import NaturalInstructions

KEY = Key.of(1)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def prompts(examples: Sequence[Example]) -> list[str]:
    return [example.turns[0].content for example in examples]


def trained(data: FederatedData) -> list[Example]:
    return [example for examples in data.clients.values() for example in examples]


# --- Natural Instructions ---------------------------------------------------------------------------------------------

TRAIN = {"task001_a": 100, "task002_b": 20, "task003_c": 19, "task004_d": 47}
TEST = {"task101_e": 5, "task102_f": 30, "task103_g": 2_000}


def write_task(clone: Path, name: str, instances: int) -> None:
    """A task in the format of version 2.8: ``instances`` instances of 1,023 characters and ten of 1,024."""
    inputs = [f"{name} {row}".ljust(1023) for row in range(instances)] + [
        f"{name} {row}".ljust(1024) for row in range(10)
    ]
    content = {
        "Contributors": ["Somebody"],
        "Categories": [f"Category of {name}"],
        "Definition": [f"Definition of {name}."],
        "Input_language": ["English"],
        "Instances": [
            {"id": f"{name}-{row}", "input": given, "output": [f"first {row}", "second"]}
            for row, given in enumerate(inputs)
        ],
    }
    (clone / "tasks" / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of the repository: seven tasks in the lists of training and test tasks, and one excluded task."""
    clone = tmp_path / "natural-instructions"
    (clone / "tasks").mkdir(parents=True)
    (clone / "splits" / "default").mkdir(parents=True)
    for split, tasks in (("train", TRAIN), ("test", TEST), ("excluded", {"task900_french": 50})):
        (clone / "splits" / "default" / f"{split}_tasks.txt").write_text("".join(f"{name}\n" for name in tasks))
        for name, instances in tasks.items():
            write_task(clone, name, instances)
    return clone


def test_a_fifth_of_every_training_task_with_twenty_short_instances_is_a_client(clone: Path) -> None:
    data = NaturalInstructions(path=str(clone)).load(KEY)
    assert {task: len(examples) for task, examples in data.clients.items()} == {
        "task001_a": 20,
        "task002_b": 4,
        "task004_d": 9,
    }
    assert all(example.metadata["task"] == task for task, examples in data.clients.items() for example in examples)


def test_of_a_test_task_two_per_cent_are_held_out_and_twenty_at_least(clone: Path) -> None:
    held_out = NaturalInstructions(path=str(clone)).load(KEY).held_out["tasks"]
    counts = {task: sum(example.metadata["task"] == task for example in held_out) for task in TEST}
    assert counts == {"task101_e": 5, "task102_f": 20, "task103_g": 40}


def test_an_instance_is_its_definition_its_input_and_the_first_output(clone: Path) -> None:
    data = NaturalInstructions(path=str(clone)).load(KEY)
    for example in (*trained(data), *data.held_out["tasks"]):
        task, given = example.metadata["task"], example.metadata["input"]
        assert len(given) == 1023 and given.startswith(f"{task} ")
        assert example.turns[0].content == f"Definition of {task}.\n\n{given}"
        assert example.response == f"first {given.split()[1]}"
        assert example.metadata["category"] == f"Category of {task}"
    assert len(set(prompts(trained(data)))) == 33


def test_instances_and_tasks_are_drawn_by_the_key(clone: Path) -> None:
    settings = NaturalInstructions(path=str(clone), num_clients=2, max_held_out=12)
    first, again, other = (settings.load(Key.of(seed)) for seed in (1, 1, 2))
    assert first == again and first != other
    assert len(first.clients) == 2 and len(first.held_out["tasks"]) == 12


def test_the_draw_from_a_task_does_not_depend_on_the_other_tasks(clone: Path) -> None:
    before = NaturalInstructions(path=str(clone)).load(KEY)
    (clone / "splits" / "default" / "train_tasks.txt").write_text("task004_d")
    assert NaturalInstructions(path=str(clone)).load(KEY).clients == {"task004_d": before.clients["task004_d"]}


def test_a_blank_output_is_dropped_and_an_older_definition_is_read(clone: Path) -> None:
    instances = [{"input": "", "output": "one"}] * 30 + [{"input": "", "output": [" "]}] * 30
    content = {"Definition": "Say one.", "Categories": ["x"], "Instances": instances}
    (clone / "tasks" / "task001_a.json").write_text(json.dumps(content))
    examples = NaturalInstructions(path=str(clone)).load(KEY).clients["task001_a"]
    assert [(example.turns[0].content, example.response) for example in examples] == [("Say one.", "one")] * 6


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"Definition": [], "Categories": [], "Instances": [{}]}'])
def test_an_error_names_a_broken_task(clone: Path, content: str) -> None:
    (clone / "tasks" / "task002_b.json").write_text(content)
    with pytest.raises(UserError, match=r"task002_b\.json") as error:
        NaturalInstructions(path=str(clone)).load(KEY)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["splits/default/train_tasks.txt", "tasks/task103_g.json"])
def test_an_incomplete_clone_is_one_line_with_the_clone_command(clone: Path, missing: str) -> None:
    (clone / missing).unlink()
    with pytest.raises(UserError, match=r"git clone --depth 1 --branch v2\.8 https://github\.com/allenai/") as error:
        NaturalInstructions(path=str(clone)).load(KEY)
    assert missing in str(error.value) and "\n" not in str(error.value)


# --- Dolly ------------------------------------------------------------------------------------------------------------

CATEGORIES = ("brainstorming", "closed_qa", "open_qa", "summarization")
DOLLY = [
    {
        "instruction": f"Question {row}?",
        "context": f"Context {row}." if row % 2 else "",
        "response": f"Answer {row}.",
        "category": CATEGORIES[row % 4],
    }
    for row in range(800)
]


@pytest.fixture
def dolly(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "databricks-dolly-15k.jsonl", [*DOLLY, {**DOLLY[0], "response": " "}])


def test_the_last_category_is_held_out_and_the_others_are_partitioned(dolly: str) -> None:
    data = Dolly(path=dolly, clients=12).load(KEY)
    assert list(data.held_out) == ["categories"]
    assert [example.metadata["category"] for example in data.held_out["categories"]] == ["summarization"] * 200
    assert len(data.clients) == 12 and min(map(len, data.clients.values())) >= 10
    expected = sorted(row["response"] for row in DOLLY if row["category"] != "summarization")
    assert sorted(example.response for example in trained(data)) == expected


def test_the_context_is_the_second_part_of_a_prompt(dolly: str) -> None:
    examples = {example.response: example for example in trained(Dolly(path=dolly, clients=4).load(KEY))}
    assert examples["Answer 1."].turns[0].content == "Question 1?\n\nContext 1."
    assert examples["Answer 1."].metadata["input"] == "Context 1."
    assert examples["Answer 2."].turns[0].content == "Question 2?" and "input" not in examples["Answer 2."].metadata


def test_small_alpha_gives_clients_few_categories(dolly: str) -> None:
    def categories(alpha: float) -> float:
        data = Dolly(path=dolly, clients=6, alpha=alpha, min_examples=1).load(KEY)
        return sum(len({example.metadata["category"] for example in part}) for part in data.clients.values()) / 6

    assert categories(0.05) < 2.5 < categories(100.0) == 3


def test_another_category_and_fewer_examples_can_be_held_out(dolly: str) -> None:
    data = Dolly(path=dolly, clients=4, held_out_category="open_qa", max_held_out=7).load(KEY)
    assert [example.metadata["category"] for example in data.held_out["categories"]] == ["open_qa"] * 7
    with pytest.raises(UserError, match='did you mean "open_qa"'):
        Dolly(path=dolly, clients=4, held_out_category="open-qa").load(KEY)


def test_too_many_clients_for_the_rows_are_one_line_with_the_sources_setting_names(dolly: str) -> None:
    with pytest.raises(UserError, match=r"raise data\.alpha, lower data\.clients .* data\.min_examples"):
        Dolly(path=dolly, clients=60, alpha=0.05).load(KEY)


# --- Code Alpaca ------------------------------------------------------------------------------------------------------


def test_where_inputs_name_the_language_they_name_the_client(tmp_path: Path) -> None:
    rows = [
        {"instruction": f"Sort {row} numbers, as in Java", "input": language, "output": f"{language} {row}"}
        for row in range(20)
        for language in (*LANGUAGES, "X86-64 Assembly")
    ]
    path = tmp_path / "rosetta_alpaca.json"
    path.write_text(json.dumps(rows))
    data = CodeAlpaca(path=str(path)).load(KEY)
    assert tuple(data.clients) == LANGUAGES
    assert len(data.held_out["rows"]) == 18 and len(trained(data)) == 162
    assert not {example.response for example in trained(data)} & {example.response for example in data.held_out["rows"]}
    for language, examples in data.clients.items():
        assert {example.metadata["input"] for example in examples} == {language}
        assert {example.metadata["category"] for example in examples} == {language}


@pytest.mark.parametrize(
    ("instruction", "language"),
    [
        ("Write a python program.", "Python"),
        ("Create a C++ class.", "C++"),
        ("Create a C# class.", "C#"),
        ("Write a C program.", "C"),
        ("What does this C/POSIX call do?", "C"),
        ("Write a Go server.", "Go"),
        ("Make the loop go on.", None),
        ("Write a JavaScript function.", None),
        ("Write an Objective-C method.", None),
        ("Translate this Java code to Scala.", None),
        ("Sort a list.", None),
    ],
)
def test_where_inputs_name_no_language_the_instruction_names_the_client(
    tmp_path: Path, instruction: str, language: str | None
) -> None:
    rows = [{"instruction": instruction, "input": "", "output": str(row)} for row in range(4)]
    rows += [{"instruction": "Write PHP.", "input": "Python", "output": "<?php"}] * 2 + [{**rows[0], "output": ""}]
    path = tmp_path / "code_alpaca_20k.json"
    path.write_text(json.dumps(rows))
    data = CodeAlpaca(path=str(path), held_out_fraction=0).load(KEY)
    sizes = {client: len(examples) for client, examples in data.clients.items()}
    assert sizes == ({"PHP": 2} if language is None else {language: 4, "PHP": 2})


def test_rows_in_none_of_the_languages_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "code_alpaca_20k.json"
    path.write_text(json.dumps([{"instruction": "Write PHP.", "input": "", "output": "<?php"}]))
    with pytest.raises(UserError, match=r"in Rust: check data\.languages"):
        CodeAlpaca(path=str(path), languages=("Rust",)).load(KEY)


# --- GSM8K ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for split, count in (("train", 32), ("test", 9)):
        rows = [
            {"question": f"{split} {n}?", "answer": f"It is <<{n}=1,00{n}>>1,00{n}.\n#### 1,00{n}"}
            for n in range(count)
        ]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def test_three_clients_share_the_training_problems_and_the_test_set_is_held_out(gsm8k: Path) -> None:
    data = GSM8K(path=str(gsm8k)).load(KEY)
    assert sorted(map(len, data.clients.values())) == [10, 11, 11]
    assert sorted(prompts(trained(data))) == sorted(f"train {n}?" for n in range(32))
    assert prompts(data.held_out["rows"]) == [f"test {n}?" for n in range(9)]
    assert len(GSM8K(path=str(gsm8k), max_held_out=4).load(KEY).held_out["rows"]) == 4


def test_a_response_is_the_whole_solution_and_metadata_has_the_number(gsm8k: Path) -> None:
    data = GSM8K(path=str(gsm8k)).load(KEY)
    for example in (*trained(data), *data.held_out["rows"]):
        number = example.turns[0].content.split()[1].rstrip("?")
        assert example.response == f"It is <<{number}=1,00{number}>>1,00{number}.\n#### 1,00{number}"
        assert example.metadata["answer"] == f"100{number}"


def test_a_solution_without_a_final_number_is_one_line(gsm8k: Path) -> None:
    write_jsonl(gsm8k / "test.jsonl", [{"question": "1 + 1?", "answer": "It is 2."}])
    with pytest.raises(UserError, match=r'no "#### answer" at its end: "…It is 2\."'):
        GSM8K(path=str(gsm8k)).load(KEY)


# --- all sources of rows ----------------------------------------------------------------------------------------------


def test_the_hub_gives_what_a_local_copy_gives(gsm8k: Path, dolly: str, tmp_path: Path) -> None:
    """A folder in the hub's layout replaces the hub; "main" is the configuration of GSM8K's original files."""
    (gsm8k / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: train.jsonl}\n"
        "  - {split: test, path: test.jsonl}\n---\n"
    )
    assert GSM8K(name=str(gsm8k)).load(KEY) == GSM8K(path=str(gsm8k)).load(KEY)
    write_jsonl(tmp_path / "hub" / "train.jsonl", DOLLY)
    assert Dolly(name=str(tmp_path / "hub"), clients=4).load(KEY) == Dolly(path=dolly, clients=4).load(KEY)


@pytest.mark.parametrize(
    ("source", "file"),
    [(Dolly, "databricks-dolly-15k.jsonl"), (CodeAlpaca, "rosetta_alpaca.json"), (GSM8K, "train.jsonl")],
)
@pytest.mark.parametrize("path", [None, "nowhere.jsonl"])
def test_without_hub_and_file_the_error_is_one_line_with_how_to_get_the_file(
    source: type[Any], file: str, path: str | None
) -> None:
    with pytest.raises(UserError, match=rf"get .*{file}.* from https://.* and set data\.path to") as error:
        source(path=path).load(KEY)
    assert "\n" not in str(error.value)
    assert (source().name if path is None else "nowhere.jsonl") in str(error.value)


@pytest.mark.parametrize("source", [Dolly, CodeAlpaca])
@pytest.mark.parametrize("row", [{"text": "one"}, {"instruction": "", "output": "", "response": "", "category": ""}])
def test_an_error_names_a_file_of_other_data(tmp_path: Path, source: type[Any], row: dict[str, str]) -> None:
    path = write_jsonl(tmp_path / "other.jsonl", [row])
    with pytest.raises(UserError, match=r'other\.jsonl" .*not the published data: get') as error:
        source(path=path).load(KEY)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (NaturalInstructions, {"path": ".", "train_fraction": 0.0}, r"data\.train_fraction is 0\.0"),
        (NaturalInstructions, {"path": ".", "num_clients": 0}, r"data\.num_clients is 0"),
        (Dolly, {"clients": 0}, r"data\.clients is 0"),
        (Dolly, {"alpha": 0.0}, r"data\.alpha is 0\.0"),
        (CodeAlpaca, {"held_out_fraction": 1.0}, r"data\.held_out_fraction is 1\.0"),
        (GSM8K, {"max_held_out": 0}, r"data\.max_held_out is 0"),
    ],
)
def test_impossible_settings_are_refused_at_once(source: type[Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        source(**settings)


def test_more_clients_than_tasks_is_one_line(clone: Path) -> None:
    with pytest.raises(UserError, match="num_clients is 4 but 3 tasks qualify"):
        NaturalInstructions(path=str(clone), num_clients=4).load(KEY)

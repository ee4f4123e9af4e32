"""Data in which a template is already applied, from the command line to the shards; the oracle is AutoTokenizer."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import make_hf_llama
from family_templates import FAMILIES
from test_prepare import facts, main_of, stored
from tokenizer_kinds import made, of_transformers, write
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from lit_sft.args import ConvertArgs, ExportHFArgs
from lit_sft.cli import run
from lit_sft.convert import convert_checkpoint
from lit_sft.export import export_hf
from lit_sft.prompts import Message
from lit_sft.samples import encode_prompt
from lit_sft.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("day_of_templates")
KINDS = {"chatml_both": "SMOLLM2", "qwen3": "QWEN25", "llama3": "LLAMA31", "mistral_v3_both": "MISTRAL_V3"}
TALKS = [(f"What is {n} + 1?", f"It is {n + 1}.") for n in range(12)]


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer_model) -> dict[str, Path]:
    """A converted checkpoint with each kind of tokenizer; its weights are those of another."""
    found = {}
    for name, template in KINDS.items():
        found[name] = directory = tmp_path_factory.mktemp(name) / "checkpoints" / "test" / name
        make_hf_llama(directory, tokenizer_model, vocab_size=700)
        (directory / "tokenizer.model").unlink()
        config = json.loads((directory / "config.json").read_text())
        write(directory, name, **made(name).beside, config=config)
        (directory / "chat_template.jinja").write_text(FAMILIES[template])
        convert_checkpoint(ConvertArgs(checkpoint_dir=str(directory)))
    return found


@pytest.fixture
def command(models, kind, tmp_path, monkeypatch, capsys):
    """Runs prepare_csv with flags in a folder of its own; gives what it printed, or its complaint."""
    monkeypatch.chdir(models[kind].parents[2])

    def call(*flags: object, code: int = 0) -> str:
        given = [*flags, "--destination_path", tmp_path / "data", "--val_split_fraction", "0"]
        with pytest.raises(SystemExit) as end:
            run(main_of("prepare_csv"), list(map(str, given)), prog="prepare_csv.py")
        out, err = capsys.readouterr()
        assert end.value.code == code, err
        return err.splitlines()[-1] if code else out

    return call


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turns_of(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rendered(kind: str, turns: list[dict], prompt: bool = False) -> str:
    special = special_tokens(kind)
    template = FAMILIES[KINDS[kind]]
    return render_jinja_template([turns], chat_template=template, add_generation_prompt=prompt, **special)[0][0]


def special_tokens(kind: str) -> dict[str, str]:
    return {k: v for k, v in of_transformers(kind).special_tokens_map.items() if isinstance(v, str)}


def texts_of(kind: str) -> list[str]:
    return [rendered(kind, turns_of(*talk)) for talk in TALKS]


def ids_of(kind: str, text: str) -> list[int]:
    return of_transformers(kind)(text, add_special_tokens=False).input_ids


def test_a_text_column_with_a_template_is_refused_and_taken_as_it_is_written(command, kind, tmp_path):
    texts = texts_of(kind)
    path = write_rows(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    complaint = command("--data_file", path, code=2)
    assert (
        "t.jsonl row 1: a template seems to be applied in it already (control tokens are written in 12 of 12 records)"
        in complaint
    )
    assert "--template_applied true" in complaint and "--template_applied false" in complaint
    assert not (tmp_path / "data").exists()
    out = command("--data_file", path, "--template_applied", "true", "--show", 1)
    examples = stored(tmp_path / "data", "train")
    assert sorted(ids for ids, _ in examples) == sorted(ids_of(kind, text) for text in texts)
    end = special_tokens(kind)["eos_token"]
    for ids, mask in examples:
        last = max(i for i, label in enumerate(mask) if label)
        assert all(mask[1 : last + 1]) and of_transformers(kind).convert_ids_to_tokens(ids[last]) == end
    assert f"⟨{end}⟩" in out and "learned whole, its prompts too" in out
    assert facts(tmp_path / "data")["prompt_style"] == "as-written"


def test_the_same_dialogue_as_messages_has_the_same_ids(command, kind, tmp_path):
    rows = [{"messages": turns_of(*talk)} for talk in TALKS]
    command("--data_file", write_rows(tmp_path / "m.jsonl", rows))
    messages = sorted(ids for ids, _ in stored(tmp_path / "data", "train"))
    assert messages == sorted(ids_of(kind, text) for text in texts_of(kind))


def test_an_exported_model_is_asked_with_the_tokens_it_learned(command, kind, models, tmp_path):
    command("--data_file", write_rows(tmp_path / "m.jsonl", [{"messages": turns_of(*talk)} for talk in TALKS]))
    export_hf(ExportHFArgs(checkpoint_dir=str(models[kind]), out_dir=str(tmp_path / "exported")))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "exported")
    examples = {tuple(ids): mask for ids, mask in stored(tmp_path / "data", "train")}
    for talk in TALKS:
        whole = theirs.apply_chat_template(turns_of(*talk), return_dict=False)
        prompt = theirs.apply_chat_template(turns_of(*talk)[:1], add_generation_prompt=True, return_dict=False)
        assert whole[: len(prompt)] == prompt and examples[tuple(whole)].index(True) == len(prompt)


def test_prompt_and_completion_with_a_template_inside(command, kind, tmp_path):
    prompts = [rendered(kind, turns_of(*talk)[:1], prompt=True) for talk in TALKS]
    rest = [text.removeprefix(prompt) for text, prompt in zip(texts_of(kind), prompts, strict=True)]
    rows = [{"prompt": p, "completion": c} for p, c in zip(prompts, rest, strict=True)]
    path = write_rows(tmp_path / "p.jsonl", rows)
    assert "p.jsonl row 1: a template seems to be applied" in command("--data_file", path, code=2)
    command("--data_file", path, "--template_applied", "true")
    examples = {tuple(ids): mask for ids, mask in stored(tmp_path / "data", "train")}
    for prompt, text in zip(prompts, texts_of(kind), strict=True):
        ids, start = ids_of(kind, text), len(ids_of(kind, prompt))
        mask = examples[tuple(ids)]
        end = of_transformers(kind).convert_tokens_to_ids(special_tokens(kind)["eos_token"])
        last = len(ids) - 1 - ids[::-1].index(end)
        assert mask == [start <= i <= last for i in range(len(ids))]
    told = facts(tmp_path / "data")
    assert end in told["stop_ids"] and told["prompt_style"] == "as-written"
    tokenizer = Tokenizer(told["checkpoint_dir"])
    assert encode_prompt((Message("user", prompts[0]),), "as-written", tokenizer) == ids_of(kind, prompts[0])


def test_a_completion_without_an_end_gets_one(command, kind, tmp_path):
    rows = [{"prompt": rendered(kind, turns_of(q, a)[:1], prompt=True), "completion": a} for q, a in TALKS]
    command("--data_file", write_rows(tmp_path / "p.jsonl", rows), "--template_applied", "true")
    end = of_transformers(kind).convert_tokens_to_ids(special_tokens(kind)["eos_token"])
    assert all(ids[-1] == end and mask[-1] for ids, mask in stored(tmp_path / "data", "train"))


def test_as_plain_characters(command, kind, tmp_path):
    texts = texts_of(kind)
    path = write_rows(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    command("--data_file", path, "--template_applied", "false")
    theirs = of_transformers(kind)
    plain = theirs(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    assert sorted(
        ids[len(ids) - len(p) - 1 : -1]
        for (ids, _), p in zip(sorted(stored(tmp_path / "data", "train")), sorted(plain), strict=True)
    ) == sorted(plain)


def test_a_few_texts_about_control_tokens_are_no_templates(command, kind, tmp_path):
    eos = special_tokens(kind)["eos_token"]
    rows = [{"text": f"Page {n} is about nothing."} for n in range(199)] + [{"text": f"{eos} ends a text."}]
    command("--data_file", write_rows(tmp_path / "t.jsonl", rows))
    rows = [{"instruction": f"Do {n}", "output": f"{eos} ends it." if n < 5 else "Done."} for n in range(12)]
    command("--data_file", write_rows(tmp_path / "i.jsonl", rows), "--overwrite", "true")


def test_a_style_that_is_written_in_the_questions_already(command, kind, tmp_path):
    form = "### Instruction:\n{}\n\n### Response:\n"
    rows = [{"prompt": form.format(q), "completion": a} for q, a in TALKS]
    path = write_rows(tmp_path / "p.jsonl", rows)
    complaint = command("--data_file", path, "--prompt_style", "alpaca", code=2)
    assert "(control tokens, or parts of 'alpaca', are written in 12 of 12 records)" in complaint
    command("--data_file", path, "--prompt_style", "alpaca", "--template_applied", "false")


def test_both_a_style_and_none_are_refused(command, tmp_path):
    path = write_rows(tmp_path / "p.jsonl", [{"text": "T"}])
    complaint = command("--data_file", path, "--template_applied", "true", "--prompt_style", "alpaca", code=2)
    assert re.search("--template_applied true .*--prompt_style", complaint)


@pytest.mark.parametrize("style", [[], ["--prompt_style", "alpaca"], ["--system_prompt", "Be brief."]])
def test_a_model_of_plain_text_is_not_asked_in_a_style(command, kind, tmp_path, style):
    path = write_rows(tmp_path / "t.jsonl", [{"text": f"A page about {n}."} for n in range(9)])
    command("--data_file", path, *style)
    told = facts(tmp_path / "data")
    assert (told["prompt_style"], told["system_prompt"]) == ("plain", None)
    text = "A page"
    tokenizer = Tokenizer(told["checkpoint_dir"])
    ids = encode_prompt((Message("user", text),), told["prompt_style"], tokenizer)
    assert ids == of_transformers(kind)(text).input_ids
    assert all(example[: len(ids)] == ids for example, _ in stored(tmp_path / "data", "train"))
    assert np.all([mask[1:] == [True] * len(mask[1:]) for _, mask in stored(tmp_path / "data", "train")])


def test_control_tokens_within_texts(command, kind, tmp_path):
    """Documents joined by EOS, or turns without a head: refused where most have them, and told where few have."""
    eos = special_tokens(kind)["eos_token"]
    rows = [{"text": f"Page {n}.{eos}Page {n + 1}."} for n in range(9)]
    path = write_rows(tmp_path / "t.jsonl", rows)
    assert "control tokens are written in 9 of 9 records" in command("--data_file", path, code=2)
    command("--data_file", path, "--template_applied", "true")
    whole = {tuple(of_transformers(kind)(row["text"]).input_ids) for row in rows}
    assert {tuple(ids[:-1]) for ids, _ in stored(tmp_path / "data", "train")} == whole  # and EOS
    few = [{"text": f"Page {n}."} for n in range(20)] + rows
    out = command("--data_file", write_rows(tmp_path / "f.jsonl", few), "--overwrite", "true")
    assert "notice: f.jsonl: control tokens are written in 9 of 29 records, the first in row 21" in out


def test_templates_in_a_smaller_part_of_the_dialogues_are_told(command, kind, tmp_path):
    eos = special_tokens(kind)["eos_token"]
    rows = [{"prompt": q, "completion": a + eos * (n % 2)} for n, (q, a) in enumerate(TALKS)]
    out = command("--data_file", write_rows(tmp_path / "p.jsonl", rows))
    assert "notice: p.jsonl: control tokens, or parts of 'chat-template', are written in 6 of 12 records" in out


WRITTEN = {
    "vicuna": ["USER: {} ASSISTANT:", "USER: {}"],
    "alpaca": ["{}\n\n### Response:\n", "### Instruction:\n{}"],
    "redpajama-instruct": ["Q: {}\nA:"],
    "llama2-chat": ["[INST] {} [/INST]"],
    "Ask {instruction}\n=>": ["Ask {}\n=>", "{} =>"],
}


@pytest.mark.parametrize(("style", "form"), [(style, form) for style, forms in WRITTEN.items() for form in forms])
def test_parts_of_a_style_in_the_questions(command, kind, tmp_path, style, form):
    rows = [{"prompt": form.format(q), "completion": a} for q, a in TALKS]
    path = write_rows(tmp_path / "p.jsonl", rows)
    assert "a template seems to be applied" in command("--data_file", path, "--prompt_style", style, code=2)


@pytest.mark.parametrize("form", ["user {} asks", "users of {}", "User: {}", "assistant {}", "Question: {}"])
def test_questions_that_begin_alike_are_no_templates(command, kind, tmp_path, form):
    rows = [{"prompt": form.format(q), "completion": a} for q, a in TALKS]
    assert "notice" not in command("--data_file", write_rows(tmp_path / "p.jsonl", rows))


def test_a_system_prompt_has_no_place_in_texts_as_they_are_written(command, kind, tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [{"text": text} for text in texts_of(kind)])
    complaint = command("--data_file", path, "--template_applied", "true", "--system_prompt", "Be brief.", code=2)
    assert "leaves no place for --system_prompt" in complaint


def test_two_bos_in_a_text(command, kind, tmp_path):
    if bos := special_tokens(kind).get("bos_token"):
        path = write_rows(tmp_path / "t.jsonl", [{"text": f"{bos}{bos}a"}])
        assert "the text begins with two BOS tokens" in command("--data_file", path, "--template_applied=true", code=2)


def test_a_model_trained_on_text_is_not_asked_in_the_style_of_its_val_split(command, kind, tmp_path):
    texts = write_rows(tmp_path / "t.jsonl", [{"text": f"Page {n}."} for n in range(9)])
    talks = write_rows(tmp_path / "v.jsonl", [{"messages": turns_of(*talk)} for talk in TALKS])
    command("--data_file", texts, "--val_file", talks)
    assert facts(tmp_path / "data")["prompt_style"] == "plain"
    command("--data_file", talks, "--val_file", texts, "--overwrite", "true")
    assert facts(tmp_path / "data")["prompt_style"] == "chat-template"


def test_a_mix_of_texts_with_a_template_and_dialogues_without_is_refused(kind, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(models[kind].parents[2])
    write_rows(tmp_path / "m.jsonl", [{"messages": turns_of(*talk)} for talk in TALKS])
    write_rows(tmp_path / "t.jsonl", [{"text": text} for text in texts_of(kind)])
    (tmp_path / "mix.yaml").write_text(f"- data_file: {tmp_path}/m.jsonl\n- data_file: {tmp_path}/t.jsonl\n")
    flags = ["--mix", str(tmp_path / "mix.yaml"), "--destination_path", str(tmp_path / "data")]
    for applied, says in (
        (["--template_applied=true"], "no control token is written in m.jsonl"),
        ([], "t.jsonl row 1"),
    ):
        with pytest.raises(SystemExit) as end:
            run(main_of("prepare_dataset"), [*flags, *applied], prog="prepare_dataset.py")
        assert end.value.code == 2 and says in capsys.readouterr().err and not (tmp_path / "data").exists()


def test_plain_text_is_not_refused_for_a_template_that_is_not_applied(command, kind, models, tmp_path):
    """Such as one of several without a default; dialogues are."""
    folder = models[kind] / "additional_chat_templates"
    template = (models[kind] / "chat_template.jinja").rename(models[kind] / "kept")
    folder.mkdir()
    (folder / "rag.jinja").write_text("R")
    try:
        talks = write_rows(tmp_path / "m.jsonl", [{"messages": turns_of(*talk)} for talk in TALKS])
        assert "has the chat templates rag, none of which is the default" in command("--data_file", talks, code=2)
        texts = write_rows(tmp_path / "t.jsonl", [{"text": f"Page {n}."} for n in range(9)])
        command("--data_file", texts)
        assert facts(tmp_path / "data")["prompt_style"] == "plain"
    finally:
        (folder / "rag.jinja").unlink()
        folder.rmdir()
        template.rename(models[kind] / "chat_template.jinja")
